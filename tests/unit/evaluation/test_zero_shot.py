"""Zero-shot figures against CLIP_benchmark's own code and by hand; probes on features that are known."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from tests import suites
from vlmo.evaluation.clip_benchmark import load_vlmo
from vlmo.evaluation.pair_scores import Scorer
from vlmo.evaluation.pictures import tar_samples
from vlmo.evaluation.rankings import per_query, recall
from vlmo.evaluation.suites.base import Context
from vlmo.evaluation.suites.probes import block_features, feature_names, logistic_regression, nearest_neighbours
from vlmo.evaluation.suites.zero_shot import lines_of, read_classified, read_retrieval
from vlmo.registry import SUITES


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wds")
    suites.write_wds(folder)
    return folder


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """Model, transform and tokenizer as CLIP_benchmark loads them."""
    return load_vlmo("cosine", str(suites.checkpoint(tmp_path_factory.mktemp("checkpoint"))))


@pytest.fixture(scope="module")
def context(loaded, root):
    return Context(Scorer(loaded[0].model, suites.predictor().tokenizer, 5), root)


def values(result, score="cosine"):
    return {(each.part, each.metric): each.value for each in result.measures if each.score == score}


class Loader(list):
    """Batches, with the names of the classes where CLIP_benchmark looks for them."""

    def __init__(self, batches, classes=()):
        super().__init__(batches)
        self.dataset = SimpleNamespace(classes=classes)


def test_classification_is_that_of_clip_benchmark(context, loaded, root):
    theirs = pytest.importorskip("clip_benchmark.metrics.zeroshot_classification")
    model, transform, tokenizer = loaded
    data, folder = read_classified(root / "wds_classes"), root / "wds_classes"
    images = torch.stack([transform(picture.load()) for picture in data.pictures])
    loader = Loader(zip(images.split(4), torch.tensor(data.labels).split(4), strict=True), data.names)
    templates = lines_of(folder / "zeroshot_classification_templates.txt")
    classifier = theirs.zero_shot_classifier(model, tokenizer, data.names, templates, "cpu", amp=False)
    logits, target = theirs.run_classification(model, classifier, loader, "cpu", amp=False)
    expected = {"mean_per_class_recall": theirs.balanced_accuracy_score(target, logits.argmax(1))}
    for k in (1, 5):  # (its own `accuracy` fails with NumPy 2.4: float() of an array of one)
        expected[f"acc{k}"] = float((logits.topk(k).indices == target[:, None]).any(1).double().mean())
    found = values(SUITES["zero_shot_classification"].run(context))
    assert found == pytest.approx({("wds_classes", name): value for name, value in expected.items()}, abs=1e-6)


def test_retrieval_is_that_of_clip_benchmark(context, loaded, root):
    theirs = pytest.importorskip("clip_benchmark.metrics.zeroshot_retrieval")
    model, transform, tokenizer = loaded
    captions = read_retrieval(root / "wds_captions")
    images = torch.stack([transform(picture.load()) for picture in captions.pictures])
    texts = [[captions.texts[row] for row in (captions.owner == image).nonzero()[0]] for image in range(len(images))]
    loader = Loader([(images[:3], texts[:3]), (images[3:], texts[3:])])
    expected = theirs.evaluate(model, loader, tokenizer, "cpu", amp=False, recall_k_list=[1, 5])
    found = values(SUITES["zero_shot_retrieval"].run(context))
    for k in (1, 5):
        assert found["wds_captions text to image", f"R@{k}"] == pytest.approx(expected[f"image_retrieval_recall@{k}"])
        assert found["wds_captions image to text", f"R@{k}"] == pytest.approx(expected[f"text_retrieval_recall@{k}"])


def test_accuracies_on_random_scores():
    """acc1, acc5 and the mean of recalls per class, counted one by one."""
    draw = torch.Generator().manual_seed(0)
    images, classes = (F.normalize(torch.randn(n, 8, generator=draw), dim=1) for n in (60, 9))
    labels = torch.randint(9, (60,), generator=draw).tolist()
    ways = {k: lambda ranks, numbers, k=k: recall(ranks, k) for k in (1, 5)}
    found = per_query(images, classes, [torch.tensor([label]).numpy() for label in labels], ways)
    for k in (1, 5):
        best = (images.double() @ classes.double().t()).argsort(1, descending=True)[:, :k].tolist()
        assert found[k].tolist() == [float(label in row) for label, row in zip(labels, best, strict=True)]


def test_samples_of_tars(root):
    data = read_classified(root / "wds_classes")
    assert data.labels == [0, 2, 4, 0, 2, 4, 1, 3, 5, 1, 3, 5]  # shard by shard
    sample = next(tar_samples([root / "wds_captions/test/0.tar"]))
    assert len(sample.text("txt").splitlines()) == 2 and sample.image.load().size == (40, 30)


# --- probes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("probe", [nearest_neighbours, logistic_regression])
def test_probes_find_classes_that_lie_apart(probe):
    draw = torch.Generator().manual_seed(0)
    centres = torch.randn(4, 12, generator=draw, dtype=torch.float64)
    labels = torch.arange(80) % 4
    features = centres[labels] + 0.3 * torch.randn(80, 12, generator=draw, dtype=torch.float64)
    assert (probe(features[:60], labels[:60], features[60:], 4) == labels[60:]).double().mean() > 0.9
    if probe is nearest_neighbours:  # one by one
        near = (F.normalize(features[60:61], dim=1) @ F.normalize(features[:60], dim=1).t())[0]
        votes = torch.zeros(4, dtype=torch.float64)
        for row in near.argsort(descending=True)[:20]:
            votes[labels[row]] += (near[row] / 0.07).exp()
        assert int(probe(features[:60], labels[:60], features[60:61], 4)) == int(votes.argmax())


def test_features_of_blocks_are_those_of_the_encoder(loaded):
    """After the last norm, block outputs are what `encode_image` gives, of both branches."""
    model = loaded[0].model
    image = 2 * torch.rand(2, 3, 32, 32) - 1
    with torch.inference_mode():
        hidden, vl_hidden = model.encode_image(image, vl_branch=True)
        last = model.transformer.depth - 1
        model.transformer.norm, norm = torch.nn.Identity(), model.transformer.norm
        plain, vl_plain = model.encode_image(image, vl_branch=True)
        model.transformer.norm = norm
        found = block_features(model, image, (0, last))
    assert list(found) == feature_names(model, (0, last))
    for name, whole in ((f"block {last}, image expert", plain), (f"block {last}, vl expert", vl_plain)):
        torch.testing.assert_close(found[name], whole[:, 1:].mean(1))
    assert not torch.equal(hidden, plain) and vl_hidden is not None


def test_probes_run_on_every_stage(root, tmp_path):
    for task in ("task_mim_base", "task_textmlm_base"):
        scorer = Scorer(suites.model(tasks=task), suites.predictor().tokenizer, 5)
        for name in ("knn", "linear_probe"):
            measures = SUITES[name].run(Context(scorer, root, blocks=(1, 2))).measures
            assert len(measures) == 2 and all(0 <= each.value <= 1 for each in measures)
