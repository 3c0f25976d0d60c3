"""Compositionality: which caption is right, by each score of pairs (Winoground, SugarCrepe, ARO, VL-CheckList, BiVLC).

An item has one image with a right caption and wrong ones, or two images with two captions. Of the latter (Winoground,
arXiv 2204.03162): text, for each image its caption scores higher; image, for each caption its image scores higher;
group, both. A tie counts against the model.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vlmo.evaluation.measures import Measure, macro_mean, mean_of
from vlmo.evaluation.pair_scores import TIES, encode_and_score
from vlmo.evaluation.pictures import require_files
from vlmo.evaluation.suites import layouts
from vlmo.evaluation.suites.base import Context, Example, Need, Result, Suite, sha256, warn_of_unknown
from vlmo.evaluation.suites.layouts import Question, Questions, Reader
from vlmo.registry import SUITES

EXAMPLES = 12  # of the best and of the worst, in the report
CHANCE = {"text": 1 / 4, "image": 1 / 4, "group": 1 / 6}  # of two images and two captions


class Compositional(Suite):
    """A benchmark of items that `read` brings into one form.

    Args:
        meaning, needs: as of `Suite`.
        read: the place below the root of the data -> the items.
        place: folder or file below the root that `read` is given.
    """

    def __init__(self, meaning: str, place: str, read: Reader, *needs: Need) -> None:
        self.meaning, self.place, self.read, self.needs = meaning, place, read, needs

    def load(self, name: str, root: Path) -> Questions:
        """Reads all items and makes sure that their images are there. Raises VLMoError if not."""
        self.check(name, root)
        found = self.read(root / self.place)
        hint = "; ".join(f"{need.where}: {need.source}" for need in self.needs)
        require_files(found.image_files, f"Needed below {root}: {hint}")
        return found

    def run(self, context: Context) -> Result:
        questions = self.load(self.place, context.root)
        files = {str(path): sha256(path) for path in questions.files}
        pairs = pairs_of(questions.questions)
        store = context.store(Path(self.place).stem, sorted(files.values()))
        encoded = encode_and_score(context.scorer, questions.pictures, questions.texts, pairs, store)
        result = Result([], files)
        warn_of_unknown(result, encoded.known, "their items count as wrong")
        for score in context.scorer.names:
            rows = score_matrices(questions.questions, pairs, encoded.pairs[score])
            result.measures += measure(questions.questions, rows, score, questions.least)
            add_details(result, questions, rows, score)
        return result


def pairs_of(questions: Sequence[Question]) -> np.ndarray:
    """Gives every image with every caption of the items, (P, 2), each pair once."""
    pairs = [(image, caption) for each in questions for image in each.images for caption in each.captions]
    return np.unique(np.array(pairs, np.int64).reshape(-1, 2), axis=0)


def score_matrices(questions: Sequence[Question], pairs: np.ndarray, scores: Tensor) -> list[Tensor]:
    """Gives the scores of each item, (images, captions).

    Args:
        pairs: (P, 2) of `pairs_of`. scores: (P,).
    """
    rows = {(image, text): row for row, (image, text) in enumerate(pairs.tolist())}
    numbers = ([[rows[image, text] for text in each.captions] for image in each.images] for each in questions)
    return [scores[torch.tensor(each)] for each in numbers]


def judge(question: Question, scores: Tensor, tie: float) -> dict[str, bool]:
    """Tells what is right of one item: "accuracy", or of several images "text", "image" and "group".

    Args:
        scores: (images, captions), nan where an image cannot be decoded.
    """
    own = torch.zeros(scores.shape, dtype=torch.bool)
    own[range(len(question.images)), question.right] = True
    best = scores[range(len(question.images)), question.right]
    ahead = best > scores.masked_fill(own, -torch.inf).amax(1) + tie
    text = bool(ahead.all())
    if len(question.images) == 1:
        return {"accuracy": text}
    columns = scores[:, question.right]
    others = columns.masked_fill(torch.eye(len(columns), dtype=torch.bool), -torch.inf).amax(0)
    image = bool((best > others + tie).all())
    return {"text": text, "image": image, "group": text and image}


def measure(questions: Sequence[Question], scores: Sequence[Tensor], score: str, least: int = 1) -> list[Measure]:
    """Gives the share of right items: by kind, over all, and as a mean over kinds, and over groups of `least` items."""
    judged = [judge(each, rows, TIES[score]) for each, rows in zip(questions, scores, strict=True)]
    kinds, groups = [each.kind for each in questions], [each.group for each in questions]
    found: list[Measure] = []
    for metric in judged[0] if judged else ():
        right = torch.tensor([each[metric] for each in judged])
        chances = torch.tensor([CHANCE.get(metric, 1 / len(each.captions)) for each in questions])

        for kind in dict.fromkeys(kinds):
            if len(set(kinds)) > 1:
                own = torch.tensor([each == kind for each in kinds])
                found.append(mean_of(right[own], metric, score, kind or "other", float(chances[own].mean())))
        found.append(mean_of(right, metric, score, "all", float(chances.mean())))
        if len(set(kinds)) > 1:
            found.append(macro_mean(right, kinds, metric, score, "mean of kinds", float(chances.mean())))
        counts = Counter(group for group in groups if group)
        own = torch.tensor([counts[group] >= least for group in groups])
        if any(groups) and own.any():
            names = [group for group in groups if counts[group] >= least]
            found.append(macro_mean(right[own], names, metric, score, "mean of groups", float(chances[own].mean())))
    return found


def add_details(result: Result, questions: Questions, scores: Sequence[Tensor], score: str) -> None:
    """Adds the items with the largest and smallest margins; and, of ITM, how sure it is of what is right.

    The confidence is the mean of the probabilities that it gives its choices, among the captions of an image.
    """
    margins, confidences, right = [], [], []
    for question, rows in zip(questions.questions, scores, strict=True):
        for image, place in enumerate(question.right):
            others = [rows[image, other] for other in range(len(question.captions)) if other != place]
            margins.append(float(rows[image, place] - torch.stack(others).max()))
            if score in ("itm", "mlm"):
                probabilities = rows[image].softmax(0)
                confidences.append(float(probabilities.max()))
                right.append(int(probabilities.argmax()) == place)
    if confidences:
        result.calibration[score] = torch.tensor(confidences), torch.tensor(right)
    asked = [(each, image) for each in range(len(scores)) for image in range(len(questions.questions[each].images))]
    order = sorted(
        (number for number in range(len(margins)) if margins[number] == margins[number]), key=margins.__getitem__
    )
    for kept, chosen in ((result.worst, order[:EXAMPLES]), (result.best, order[: -EXAMPLES - 1 : -1])):
        for number in chosen:
            item, image = asked[number]
            kept.append(_example(questions, item, image, scores[item], margins[number], score))


def _example(questions: Questions, item: int, image: int, scores: Tensor, margin: float, score: str) -> Example:
    question = questions.questions[item]
    lines = [
        f"{'right' if place == question.right[image] else 'wrong'} {scores[image, place]:+.3f} {questions.texts[text]}"
        for place, text in enumerate(question.captions)
    ]
    return Example(
        [questions.pictures[question.images[image]]], [*lines, question.kind or question.group], margin, score
    )


def _register(suites: Mapping[str, Compositional]) -> None:
    for name, suite in suites.items():
        SUITES.register(name)(suite)


WINOGROUND, WINOGROUND_FILES = "huggingface.co/datasets/facebook/winoground", "winoground/data/*.parquet"
VAL2017 = "COCO's val2017.zip, from cocodataset.org"
ARO = "of ARO, github.com/mertyg/vision-language-models-are-bows (its README links vgr_vga_images.zip)"
ORDER = (
    "the list `test_cases` of ARO's {} as JSON, which its own code makes with spaCy "
    "(json.dump({}(None, root_dir=...).test_cases, file)), `image` below images/"
)

_register(
    {
        "winoground": Compositional(
            "two images, two captions of the same words in another order",
            "winoground",
            layouts.winoground,
            Need("winoground/examples.jsonl", f"data/ of {WINOGROUND}, a gated set", WINOGROUND_FILES),
            Need("winoground/images", f"data/images.zip of {WINOGROUND}, unpacked", WINOGROUND_FILES),
        ),
        "sugarcrepe": Compositional(
            "captions of COCO against fluent wrong ones (add, replace, swap)",
            "sugarcrepe",
            layouts.sugarcrepe,
            *(
                Need(f"sugarcrepe/{kind}.json", f"data/{kind}.json of github.com/RAIVNLab/sugar-crepe")
                for kind in ("add_att", "add_obj", "replace_att", "replace_obj", "replace_rel", "swap_att", "swap_obj")
            ),
            Need("sugarcrepe/val2017", VAL2017),
        ),
        "aro_relation": Compositional(
            "Visual Genome: 'A over B' against 'B over A'",
            "aro",
            layouts.aro_relation,
            Need("aro/visual_genome_relation.json", ARO),
            Need("aro/images", f"the images {ARO}"),
        ),
        "aro_attribution": Compositional(
            "Visual Genome: attributes of two things swapped",
            "aro",
            layouts.aro_attribution,
            Need("aro/visual_genome_attribution.json", ARO),
            Need("aro/images", f"the images {ARO}"),
        ),
        "aro_coco_order": Compositional(
            "captions of COCO against their words in another order",
            "aro_coco_order/coco_order.json",
            layouts.aro_order,
            Need("aro_coco_order/coco_order.json", ORDER.format("COCO_Order", "COCO_Order")),
            Need("aro_coco_order/images", "COCO's val2014, below it val2014/*.jpg"),
        ),
        "aro_flickr_order": Compositional(
            "captions of Flickr30K against their words in another order",
            "aro_flickr_order/flickr_order.json",
            layouts.aro_order,
            Need("aro_flickr_order/flickr_order.json", ORDER.format("Flickr30k_Order", "Flickr30k_Order")),
            Need("aro_flickr_order/images", "the images of Flickr30K"),
        ),
        "vl_checklist": Compositional(
            "objects, attributes and relations, each against a wrong one",
            "vl_checklist",
            layouts.vl_checklist,
            Need("vl_checklist/data/**/*.json", "the folder data/ of github.com/om-ai-lab/VL-CheckList"),
            Need("vl_checklist/images", "the folders vg/, swig/ and hake/ of images, as its DATASETS.md has them"),
        ),
        "bivlc": Compositional(
            "two images, two captions: both ways between true and made ones",
            "bivlc",
            layouts.bivlc,
            Need("bivlc/data/*.parquet", "data/ of huggingface.co/datasets/imirandam/BiVLC"),
        ),
        "caption_pairs": Compositional(
            "data of your own in SugarCrepe's layout, a file a kind",
            "caption_pairs",
            partial(layouts.sugarcrepe, images="images"),
            Need("caption_pairs/*.json", '{"0": {"filename": ..., "caption": ..., "negative_caption": ...}, ...}'),
            Need("caption_pairs/images", "its images"),
        ),
    }
)
