"""A loaded model at work: what it says is what the model computes, one input at a time or many."""

import inspect
import json

import numpy as np
import pytest
import torch
from PIL import Image

from tests import tiny
from tests.tables import VOCABULARY, encoded, picture
from vlmo.batch import FIELDS
from vlmo.datamodules.collate import Collator
from vlmo.errors import VLMoError
from vlmo.inference import InputError, Predictor
from vlmo.inference.attention_maps import attention_weights
from vlmo.inference.io import load_image
from vlmo.modules.model import VLMoModel
from vlmo.registry import ARCHITECTURES, TASKS
from vlmo.tasks.base import Task, Use
from vlmo.transforms import square_transform

TINY = ARCHITECTURES["vlmo_tiny_patch16"]
WORDS = list(dict.fromkeys(VOCABULARY))
ANSWERS = ["yes", "no", "red", "blue"]  # fewer than the model has room for
IMAGES = [picture(seed) for seed in range(3)]
TEXTS = ["the red cat", "a dog runs on the table", "what is left"]
PRETRAIN, VQA, NLVR2 = "task_mlm_itm_itc_base", "task_finetune_vqa_base_image480", "task_finetune_nlvr2_base"


def predictor(task=PRETRAIN, answers=None, batch_size=2):
    torch.manual_seed(0)
    model = tiny.model(task)
    model.vocabulary, model.answers = WORDS, answers
    return Predictor(model, batch_size=batch_size)


@pytest.fixture(scope="module")
def pairs():
    return predictor()


@pytest.fixture(scope="module")
def vqa():
    return predictor(VQA, ANSWERS)


def batch(predictor, texts, **images):
    rows = [
        {name: square_transform(32)(many[i]) for name, many in images.items()}
        | {"text_ids": predictor.tokenizer(text)["input_ids"]}
        for i, text in enumerate(texts)
    ]
    return Collator(FIELDS, 24)(rows)


def close(a, b):
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=0, atol=2e-6)


# --- what is computed -------------------------------------------------------------------------------------------------


def test_answer(vqa):
    with torch.no_grad():
        logits = vqa.model(batch(vqa, TEXTS, image=IMAGES) | {"vqa_labels": [[]] * 3, "vqa_scores": [[]] * 3})[
            "vqa"
        ].outputs["logits"][:, :4]
    many = vqa.answer(IMAGES, TEXTS, top_k=2)
    for guesses, row in zip(many, logits, strict=True):
        values, labels = row.sigmoid().topk(2)
        assert [guess.text for guess in guesses] == [ANSWERS[label] for label in labels]
        close([guess.score for guess in guesses], values)
    one = vqa.answer(IMAGES[1], TEXTS[1], top_k=9)
    assert len(one) == 4 and one[0].text == many[1][0].text


def test_one_goes_with_each_of_many(vqa, pairs):
    first = vqa.answer(IMAGES[0], TEXTS)
    assert [guesses[0].text for guesses in first] == [vqa.answer(IMAGES[0], text)[0].text for text in TEXTS]
    close(pairs.match(IMAGES, TEXTS[0]), [pairs.match(image, TEXTS[0]) for image in IMAGES])
    assert vqa.answer([], []) == [] == pairs.match([], TEXTS[0])
    with pytest.raises(VLMoError, match="different lengths: image 2, question 3"):
        vqa.answer(IMAGES[:2], TEXTS)


def test_match(pairs):
    with torch.no_grad():
        encoded = pairs.model.infer(batch(pairs, TEXTS, image=IMAGES))
        expected = pairs.model.itm_score(encoded["cls_feats"]).softmax(-1)[:, 1]
    close(pairs.match(IMAGES, TEXTS), expected)
    assert isinstance(pairs.match(IMAGES[0], TEXTS[0]), float)


def test_compare():
    comparer = predictor(NLVR2)
    others = IMAGES[::-1]
    with torch.no_grad():
        fields = batch(comparer, TEXTS, image_0=IMAGES, image_1=others)
        output = comparer.model(fields | {"answers": [True] * 3, "table_name": ["nlvr2_dev"] * 3})["nlvr2"]
    close(comparer.compare(IMAGES, others, TEXTS), output.outputs["logits"].softmax(-1)[:, 1])
    left, right = comparer.compare(IMAGES[0], IMAGES[1], "a cat"), comparer.compare(IMAGES[1], IMAGES[0], "a cat")
    assert isinstance(left, float) and left != right


@pytest.mark.parametrize("branches", [("v", "l", "cls_feats"), ("vl", "vl", "cls_vlffn_feats")])
def test_embeddings_and_ranking(pairs, branches):
    image_branch, text_branch, key = branches
    with torch.no_grad():
        fields = batch(pairs, TEXTS, image=IMAGES)
        expected = pairs.model.infer_image(fields)[key], pairs.model.infer_text(fields)[key]
    images, texts = pairs.embed_images(IMAGES, image_branch), pairs.embed_texts(TEXTS, text_branch)
    close(images, expected[0])
    close(texts, expected[1])
    close(images.norm(dim=1), np.ones(3))
    ranking = pairs.rank(IMAGES, TEXTS[:2], vl_branch=image_branch == "vl")
    close(ranking.scores, images @ texts[:2].t())
    assert ranking.images.shape == (2, 3) and ranking.texts.shape == (3, 2)
    assert ranking.images[1, 0] == ranking.scores[:, 1].argmax()


def test_classify(pairs):
    classes, templates = ["cat", "dog"], ["a {}.", "the {} on the table"]
    found = pairs.classify(IMAGES, classes, templates)
    sentences = pairs.embed_texts([t.format(c) for c in classes for t in templates]).view(2, 2, -1).mean(1)
    scores = torch.nn.functional.cosine_similarity(pairs.embed_images(IMAGES)[:, None], sentences[None], dim=-1)
    expected = (scores * pairs.model.logit_scale.detach().exp()).softmax(-1)
    for guesses, row in zip(found, expected, strict=True):
        assert {guess.text for guess in guesses} == set(classes)
        close([guess.score for guess in guesses], row.sort(descending=True).values)


def test_fill_mask(pairs):
    texts = ["a [MASK] cat", "the [MASK] runs on [MASK]"]
    with torch.no_grad():
        hidden = pairs.model.infer(batch(pairs, texts, image=IMAGES[:2]))["text_feats"]
        expected = pairs.model.mlm_score(hidden)[:, :, : len(WORDS)].softmax(-1)
    found = pairs.fill_mask(texts, IMAGES[:2], top_k=3)
    assert [len(masks) for masks in found] == [1, 2]
    values, ids = expected[1, 5].topk(3)  # [CLS] the [MASK] runs on [MASK]
    assert [guess.text for guess in found[1][1]] == [WORDS[i] for i in ids]
    close([guess.score for guess in found[1][1]], values)
    alone = pairs.fill_mask(texts[0])
    assert len(alone) == 1 and len(alone[0]) == 5 and alone[0] != found[0][0]
    with pytest.raises(InputError, match="has no .MASK. among its first 24 tokens"):
        pairs.fill_mask(["a [MASK]", "cat " * 30 + "[MASK]"])


def test_text_only_model_fills_words():
    words = predictor("task_textmlm_base")
    assert len(words.fill_mask("a [MASK]", top_k=2)[0]) == 2
    with pytest.raises(VLMoError, match="needs a checkpoint with itm_score; this one was trained for textmlm"):
        words.match(IMAGES[0], "a cat")


# --- attention --------------------------------------------------------------------------------------------------------


def test_attention_weights_are_what_the_layer_uses(pairs):
    model = pairs.model
    attention = model.transformer.blocks[0].attn
    text_masks = tiny.batch()["text_masks"]
    (bias, *_), padding = model.attention_masks(model.relative_position_bias_table, "vl", text_masks)
    x = torch.randn(3, 16 + 5, model.transformer.embed_dim)
    for mask in ((bias, padding), (None, padding), (None, None)):
        with torch.no_grad():
            weights = attention_weights(attention, x, *mask)
            dim = x.shape[-1]
            v = x @ attention.qkv.weight[2 * dim :].t() + attention.v_bias
            v = v.view(3, 21, attention.num_heads, -1).transpose(1, 2)
            torch.testing.assert_close(attention.proj((weights @ v).transpose(1, 2).flatten(2)), attention(x, *mask))
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))
    assert not attention_weights(attention, x, bias, padding)[0, :, :, 6:16].any()  # padding of a text of six tokens


def test_attention_of_a_text_to_the_patches(pairs):
    depth = TINY["depth"]
    shown = pairs.attention(IMAGES[0], "the red cat", layers=[0, depth - 1])
    assert shown.tokens == ["[CLS]", "the", "red", "cat", "[SEP]"] and shown.layers == [0, depth - 1]
    assert shown.weights.shape == (2, TINY["num_heads"], 5, 2, 2)
    assert (shown.weights > 0).all() and (shown.weights.sum((-1, -2)) < 1).all()
    every = pairs.attention(IMAGES[0], "the red cat")
    assert torch.equal(every.weights[[0, depth - 1]], shown.weights)
    assert not any(module._forward_pre_hooks for module in pairs.model.modules())
    width, height = shown.image.size
    drawn = shown.picture()
    assert max(drawn.size) >= 512  # to be looked at, whatever the size of image and model
    assert drawn.size[0] / drawn.size[1] == pytest.approx(width / height, rel=0.01)
    assert max(shown.picture(longer_side=100).size) == 100
    assert shown.picture("cat").tobytes() != shown.picture("red").tobytes() != shown.picture(1, layer=0).tobytes()
    assert shown.picture(opacity=0, longer_side=max(shown.image.size)).tobytes() == shown.image.tobytes()
    for wrong in ({"token": "dog"}, {"token": 5}, {"layer": 2}):
        with pytest.raises(VLMoError, match="token=|layer="):
            shown.picture(**wrong)
    with pytest.raises(VLMoError, match=f"the model has {depth}, from 0"):
        pairs.attention(IMAGES[0], "cat", layers=[depth])


# --- what is handed in ------------------------------------------------------------------------------------------------


def test_images_in_every_form(tmp_path):
    image = picture(0)
    image.save(tmp_path / "a.png")
    array = np.asarray(image)
    forms = [image, str(tmp_path / "a.png"), tmp_path / "a.png", encoded(image), array, array / 255.0]
    tensor = torch.from_numpy(array.copy()).permute(2, 0, 1)
    forms += [tensor, tensor / 255, np.dstack([array, np.full(array.shape[:2], 255, np.uint8)])]
    for form in forms:
        assert load_image(form).tobytes() == image.tobytes()
    assert load_image(array[:, :, 0]).mode == "RGB" == load_image(tensor[:1]).mode
    turned = Image.new("RGB", (4, 2))
    exif = Image.Exif()
    exif[0x0112] = 6
    assert load_image(encoded(turned, "JPEG", exif=exif)).size == (2, 4)
    assert load_image(encoded(turned, "JPEG", exif=exif), "original").size == (4, 2)


@pytest.mark.parametrize("text", [7, None, b"a cat", ["a", 7]])
def test_texts_that_are_none(pairs, text):
    for use in (lambda: pairs.match(IMAGES[0], text), lambda: pairs.fill_mask(text)):
        with pytest.raises(InputError, match="a text is a str, not"):
            use()


def test_images_as_released_weights_saw_them():
    clear = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    correct, original = predictor(), Predictor(predictor().model, image_decoding="original")
    assert not torch.equal(correct.embed_images([clear]), original.embed_images([clear]))
    assert torch.equal(correct.embed_images([clear]), original.embed_images([Image.new("RGB", (4, 4), "white")]))
    with pytest.raises(VLMoError, match="image_decoding"):
        Predictor(correct.model, image_decoding="plain")


@pytest.mark.parametrize(
    "image, message",
    [
        ("absent.png", "absent.png: cannot be read .No such file"),
        (b"text", "these bytes: is no image"),
        (None, "not NoneType"),
        (np.zeros((2, 2, 5), np.uint8), r"not \(2, 2, 5\)"),
        (np.zeros((0, 2), np.uint8), r"not \(0, 2\)"),
        (np.full((2, 2), 2.0), r"must be in \[0, 1\]"),
        (np.full((2, 2), np.nan), r"must be in \[0, 1\]"),
        (torch.zeros(3, 2, 2, dtype=torch.int64), "not int64"),
    ],
)
def test_images_that_are_none(pairs, image, message):
    with pytest.raises(InputError, match=message):
        pairs.match([IMAGES[0], image], "a cat")


def test_tokenizer_and_answers(tmp_path):
    model = tiny.model(VQA)
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    (tmp_path / "answers.json").write_text(json.dumps(ANSWERS))
    given = Predictor(model, tmp_path / "vocab.txt", tmp_path / "answers.json")
    assert given.answers == ANSWERS and len(given.tokenizer) == len(WORDS)
    with pytest.raises(VLMoError, match="give answers=FILE"):
        Predictor(model, tmp_path / "vocab.txt").answer(IMAGES[0], "what")
    with pytest.raises(VLMoError, match="has 7 answers, not the 9"):
        Predictor(model, tmp_path / "vocab.txt", list("abcdefghi"))
    model.vocabulary, model.answers = WORDS, ANSWERS
    with pytest.raises(VLMoError, match="other answers: number 0"):
        Predictor(model, answers=["no"])
    (tmp_path / "vocab.txt").write_text("\n".join([*WORDS[:5], *WORDS[:4:-1]]) + "\n")
    with pytest.raises(VLMoError, match="another vocabulary: token number 5"):
        Predictor(model, tmp_path / "vocab.txt")
    (tmp_path / "vocab.txt").write_text("\n".join([*WORDS, *map(str, range(64))]) + "\n")
    with pytest.raises(VLMoError, match="tokens, the model 64"):
        Predictor(model, tmp_path)
    (tmp_path / "answers.json").write_text("{}")
    with pytest.raises(VLMoError, match="must be a list of answers"):
        Predictor(model, answers=tmp_path / "answers.json")


def test_missing_heads_and_branches(vqa, pairs):
    with pytest.raises(VLMoError, match="answering needs a checkpoint with vqa_classifier"):
        pairs.answer(IMAGES[0], "what")
    with pytest.raises(VLMoError, match="embedding needs a checkpoint with itc_image_proj"):
        vqa.embed_images(IMAGES)
    with pytest.raises(VLMoError, match="must be 'l' or 'vl'"):
        pairs.embed_texts(TEXTS, "v")
    retrieval = predictor("task_finetune_irtr_coco_base_image384")
    assert retrieval.embed_texts(TEXTS).shape == (3, TINY["embed_dim"])
    with pytest.raises(VLMoError, match="itc_vl_image_proj"):
        retrieval.rank(IMAGES, TEXTS, vl_branch=True)


# --- what tasks offer -------------------------------------------------------------------------------------------------


def test_every_use_is_a_method(pairs):
    for task in TASKS.values():
        for use in task.uses:
            method = getattr(pairs, use.name)
            assert use.name in dir(pairs) and method.__doc__ == use.run.__doc__ and method.__name__ == use.name
            names = list(inspect.signature(method).parameters)
            assert names == [*use.columns, *use.optional, *use.options]
    with pytest.raises(AttributeError, match="nonsense.*no task offers it"):
        pairs.nonsense  # noqa: B018
    with pytest.raises(TypeError, match="missing a required argument: 'text'"):
        pairs.match(IMAGES[0])


def length(predictor, text, factor=1):
    """Gives the length of a text."""
    return [factor * predictor.model.scale.item() * len(each) for each in text]


class Length(Task):
    name = "length"
    has_text = True
    uses = (Use("length", length, "scale", "measuring", ("text",), "length"),)

    def heads(self, width):
        return {"scale": torch.nn.Parameter(torch.tensor(2.0))}


def test_use_of_a_task_from_outside(pairs):
    """It may have the name of another task's: the model's own task goes first, and the head decides."""
    model = VLMoModel("vlmo_tiny_patch16", [Length()], image_size=32, vocab_size=64, max_text_len=24)
    model.vocabulary = WORDS
    own = Predictor(model, device="cpu")
    assert own.length("four") == 8 and own.length(["four", "a"], factor=10) == [80, 20] and own.length([]) == []
    assert not hasattr(pairs, "length")
    TASKS.register("length")(Length)
    try:
        assert "length" in dir(pairs)
        with pytest.raises(VLMoError, match="measuring needs a checkpoint with scale; this one was trained for itc"):
            pairs.length("four")
    finally:
        del TASKS["length"]


class Sigmoid(TASKS["itc"]):
    name = "sigmoid"

    def heads(self, width):
        return super().heads(width) | {"logit_bias": torch.nn.Parameter(torch.tensor([3.0, 0.0]))}

    def scores(self, heads, image, text):
        return image @ text.t() + heads["logit_bias"].detach()


def test_classes_are_scored_by_the_contrast_of_the_model():
    model = VLMoModel("vlmo_tiny_patch16", [Sigmoid(shared_ffn=False)], image_size=32, vocab_size=64, max_text_len=24)
    model.vocabulary = WORDS
    own = Predictor(model, device="cpu")
    sentences = own.embed_texts(["a photo of a cat.", "a photo of a dog."])
    expected = (own.embed_images(IMAGES) @ sentences.t() + torch.tensor([3.0, 0.0])).softmax(-1)
    for found, row in zip(own.classify(IMAGES, ["cat", "dog"]), expected, strict=True):
        assert found[0].text == "cat"
        close([guess.score for guess in found], row)


def test_device_that_is_not_there(vqa):
    with pytest.raises(VLMoError, match="device=nonsense"):
        Predictor(vqa.model, device="nonsense")


def test_from_pretrained(tmp_path, vqa):
    vqa.model.save_pretrained(tmp_path)
    again = Predictor.from_pretrained(tmp_path, device="cpu", batch_size=1)
    assert again.answer(IMAGES, TEXTS) == Predictor(vqa.model, device="cpu", batch_size=1).answer(IMAGES, TEXTS)
    assert Predictor.from_pretrained(tmp_path, image_size=48).model.image_size == 48
