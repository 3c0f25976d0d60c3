"""The four scores of a pair: what the model computes, one pair at a time."""

import numpy as np
import pytest
import torch

from tests import suites
from tests.suites import CAPTIONS
from tests.tables import encoded, picture
from vlmo.evaluation import pair_scores
from vlmo.evaluation.chunks import Store
from vlmo.evaluation.pair_scores import Scorer, encode_and_score, score_more_pairs
from vlmo.evaluation.pictures import Picture

IMAGES = [picture(seed) for seed in range(5)]
PAIRS = np.array([[4, 0], [0, 1], [2, 5], [2, 0], [0, 4], [3, 3], [1, 2]])


class Files(list):
    """Pictures that count how often each is read."""

    def __init__(self):
        self.reads = [0] * len(IMAGES)
        super().__init__(
            Picture(str(number), lambda number=number: self._read(number)) for number in range(len(IMAGES))
        )

    def _read(self, number):
        self.reads[number] += 1
        return encoded(IMAGES[number])


@pytest.fixture(scope="module")
def predictor():
    return suites.predictor()


def scorer(predictor, batch_size=3):
    return Scorer(predictor.model, predictor.tokenizer, batch_size)


def by_hand(predictor):
    """(P,) by score, from the Predictor and single passes."""
    model, tokenizer = predictor.model, predictor.tokenizer
    found = {name: [] for name in pair_scores.HEADS}
    for image, text in PAIRS:
        picked, caption = IMAGES[image], CAPTIONS[text]
        for name, image_branch, text_branch in (("cosine", "v", "l"), ("cosine_vl", "vl", "vl")):
            one, other = predictor.embed_images([picked], image_branch), predictor.embed_texts([caption], text_branch)
            found[name].append(float(one @ other.t()))
        probability = predictor.match(picked, caption)
        found["itm"].append(np.log(probability / (1 - probability)))
        (batch,) = predictor.batches({"image": [picked], "text": [caption]})
        ids, total = batch["text_ids"], []
        for position in range(1, ids.shape[1] - 1):
            masked = ids.clone()
            masked[0, position] = tokenizer.mask_token_id
            with torch.inference_mode():
                hidden = model.encode_pair(masked, batch["text_masks"], batch["image"])
                total.append(float(model.mlm_score(hidden[0, position]).log_softmax(-1)[ids[0, position]]))
        found["mlm"].append(np.mean(total))
    return found


@pytest.mark.parametrize("batch_size", [1, 7])
def test_scores_of_single_passes(predictor, batch_size):
    files = Files()
    found = encode_and_score(scorer(predictor, batch_size), files, CAPTIONS, PAIRS, Store(None))
    for name, values in by_hand(predictor).items():
        np.testing.assert_allclose(found.pairs[name].numpy(), values, rtol=0, atol=2e-5, err_msg=name)
    assert files.reads == [1] * 5 and found.known.all()


def test_more_pairs_are_scored_from_the_pixels_that_were_kept(predictor, tmp_path):
    files, store = Files(), Store(tmp_path)
    kept = encode_and_score(scorer(predictor), files, CAPTIONS, PAIRS[:0], store, keep_pixels=True)
    assert not kept.pairs.get("itm", torch.empty(0)).numel()
    order = PAIRS[np.lexsort((PAIRS[:, 1], PAIRS[:, 0]))]
    again = score_more_pairs(scorer(predictor), files, CAPTIONS, order, "itm", store)
    expected = encode_and_score(scorer(predictor), Files(), CAPTIONS, order, Store(None)).pairs["itm"]
    assert torch.equal(again, expected) and files.reads == [1] * 5


def test_what_is_done_is_not_done_again(predictor, tmp_path, monkeypatch):
    monkeypatch.setattr(pair_scores, "IMAGES_AT_ONCE", 2)
    whole = encode_and_score(scorer(predictor), Files(), CAPTIONS, PAIRS, Store(None))
    encode_and_score(scorer(predictor), Files(), CAPTIONS, PAIRS, Store(tmp_path))
    (tmp_path / "encode_images_0000002.npz").unlink()
    (tmp_path / "encode_images_0000004.npz").write_bytes(b"cut")  # the power went
    files = Files()
    again = encode_and_score(scorer(predictor), files, CAPTIONS, PAIRS, Store(tmp_path))
    assert files.reads == [0, 0, 1, 1, 1]
    assert all(torch.equal(again.pairs[name], whole.pairs[name]) for name in whole.pairs)


def test_an_image_that_cannot_be_decoded(predictor):
    files = Files()
    files[2] = Picture("broken", lambda: b"no image")
    found = encode_and_score(scorer(predictor), files, CAPTIONS, PAIRS, Store(None))
    assert found.known.tolist() == [True, True, False, True, True]
    for values in found.pairs.values():
        assert values.isnan().tolist() == (PAIRS[:, 0] == 2).tolist()


def test_scores_without_their_heads_are_left_out():
    model = suites.model(tasks="task_finetune_irtr_coco_base_image384")
    made = Scorer(model, suites.predictor().tokenizer)
    assert made.names == ("cosine",)
    assert set(made.absent) == {"cosine_vl", "itm", "mlm"} and "itm_score" in made.absent["itm"]
