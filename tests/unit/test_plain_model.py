"""The plain model: built, trained, saved and loaded without a trainer or a configuration."""

import subprocess
import sys

import pytest
import torch

import vlmo
from tests import tiny
from vlmo.checkpoints.pretrained import metadata_of
from vlmo.errors import VLMoError
from vlmo.modules import VLMo, VLMoModel
from vlmo.registry import TASKS
from vlmo.tasks.base import Step

FRAMEWORKS = {"pytorch_lightning", "sacred", "transformers", "torchmetrics", "pydantic", "timm", "torchvision", "scipy"}
TINY = {"image_size": 32, "vocab_size": 64, "max_text_len": 24}
NAMED = {
    "task_textmlm_base": ("textmlm",),
    "task_mlm_itm_itc_base": ("itc", "itm", "mlm"),
    "task_finetune_vqa_base_image480": ("vqa",),
    "task_finetune_nlvr2_base": ("nlvr2",),
    "task_finetune_irtr_coco_base_image384": ("irtr",),
    "task_mim_base": ("mim",),
}


def equal(one, other):
    one, other = one.state_dict(), other.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def plain(*tasks, **options):
    return VLMoModel("vlmo_tiny_patch16", tasks, **TINY | options)


# --- built ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "statement, further",
    [
        ("import vlmo", {"torch", "numpy"}),
        ("from vlmo.modules.model import VLMoModel", set()),
        ("from vlmo.modules import VLMoModel", set()),
        ("from vlmo import VLMoModel", set()),
        ("from vlmo.inference import Predictor", {"matplotlib", "pyarrow", "huggingface_hub"}),
    ],
)
def test_imports_nothing_heavy(statement, further):
    code = f"import sys; {statement}; print(*{{name.split('.')[0] for name in sys.modules}})"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert not (FRAMEWORKS | further) & set(printed.split())


def test_lazy_names_of_the_package():
    assert vlmo.VLMoModel is VLMoModel
    assert {*vlmo.__all__} <= {*dir(vlmo)}
    for name in vlmo.__all__:
        assert callable(getattr(vlmo, name))
    with pytest.raises(AttributeError, match="nonsense"):
        vlmo.nonsense  # noqa: B018


def test_five_lines():
    model = plain("itc", "itm").eval()
    batch = tiny.batch()
    images, texts = model.image_features(batch["image"]), model.text_features(batch["text_ids"], batch["text_masks"])
    pairs = model.encode_pair(batch["text_ids"], batch["text_masks"], batch["image"])
    assert images.shape == texts.shape == (3, 96) and pairs.shape == (3, 16 + 5, 96)
    assert model.itm_score(model.pooler(pairs)).shape == (3, 2)


@pytest.mark.parametrize("named, tasks", NAMED.items())
def test_is_the_model_of_a_config(named, tasks):
    """State dicts load into each other, and outputs are equal."""
    module = tiny.model(named)
    model = plain(*tasks, vqav2_label_size=7).eval()
    assert list(model.state_dict()) == list(module.state_dict())
    model.load_state_dict(module.state_dict())
    assert equal(model, module)
    batch, again = tiny.batch(images=("image", "image_0", "image_1")), tiny.model(named)
    again.load_state_dict(model.state_dict())
    if model.tasks[0].has_text:
        text = batch["text_ids"], batch["text_masks"]
        assert torch.equal(model.encode_text(*text)[0], module.encode_text(*text)[0])
    outputs = module(batch)
    for task in model.tasks:
        if not task.requires:  # (negatives are drawn of the other task's outputs)
            step = Step(batch, model.heads, False)
            output = task.loss(step, model.encode(task.requests(step)))
            torch.testing.assert_close(output.loss, outputs[task.name].loss, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "arguments, options, message",
    [
        (("vlmo_bas_patch16",), {}, "model_arch: 'vlmo_bas_patch16' is unknown; did you mean vlmo_base_patch16"),
        (("vlmo_tiny_patch16", ("itcc",)), {}, "tasks: 'itcc' is unknown; did you mean itc"),
        (("vlmo_tiny_patch16",), {"image_siz": 32}, "image_siz: there is no such option; did you mean image_size"),
        (("vlmo_tiny_patch16",), {"image_size": 33}, "image_size=33: must be a multiple of the patch size"),
    ],
)
def test_mistakes(arguments, options, message):
    with pytest.raises(VLMoError, match=message):
        VLMoModel(*arguments, **options)


# --- saved and loaded -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("named, tasks", NAMED.items())
def test_files_of_either_kind_are_loaded_by_both(tmp_path, named, tasks):
    module = tiny.model(named)
    module.vocabulary = ["[PAD]", "cat"]
    content = {"state_dict": module.state_dict(), "hyper_parameters": dict(module.hparams)}
    module.on_save_checkpoint(content)
    torch.save(content, tmp_path / "last.ckpt")
    module.save_pretrained(tmp_path / "module")
    torch.save(module.state_dict(), tmp_path / "plain.pt")
    VLMoModel.from_pretrained(tmp_path / "module").save_pretrained(tmp_path / "model")
    for path in tmp_path.iterdir():
        for kind in (VLMoModel, VLMo):
            again = kind.from_pretrained(path)
            assert type(again) is kind and not again.training and equal(again, module)
            assert {task.name for task in again.tasks} == set(tasks)
            assert again.load_report.new == []
            if path.suffix != ".pt":
                assert again.vocabulary == module.vocabulary
                assert metadata_of(again).options == metadata_of(module).options


def test_tasks_and_options_over_those_of_the_file(tmp_path, caplog):
    plain("vqa", vqav2_label_size=7).save_pretrained(tmp_path)
    assert VLMoModel.from_pretrained(tmp_path).vqa_classifier[-1].out_features == 7
    model = VLMoModel.from_pretrained(tmp_path, task="itc", image_size=48, drop_path_rate=0.1)
    assert model.image_size == 48 and [task.name for task in model.tasks] == ["itc"]
    assert "itc_text_proj" in caplog.text and "initialised anew" in caplog.text
    assert model.image_features(torch.zeros(1, 3, 48, 48)).shape == (1, 96)
    for wrong, message in ({"task": "itcc"}, "itcc"), ({"image_siz": 48}, "image_siz: there is no such option"):
        with pytest.raises(VLMoError, match=message):
            VLMoModel.from_pretrained(tmp_path, **wrong)


def test_sizes_are_saved_when_they_are_the_default(tmp_path):
    model = plain("vqa")
    (task,), (option,) = model.tasks, TASKS["vqa"].sized_by.values()
    assert metadata_of(model).options[option] == getattr(task.options, option) == model.vqa_classifier[-1].out_features


def test_name_on_the_hub(tmp_path, monkeypatch):
    model = plain("itc")
    model.save_pretrained(tmp_path)
    asked = []
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **_: asked.append(name) or str(tmp_path))
    assert equal(VLMoModel.from_pretrained("owner/model"), model) and asked == ["owner/model"]


# --- trained by a loop of one's own -----------------------------------------------------------------------------------


@pytest.mark.parametrize("named, tasks", NAMED.items())
def test_learns_in_a_plain_loop(named, tasks):
    model = plain(*tasks, vqav2_label_size=7)
    batch = tiny.batch(images=("image", "image_0", "image_1"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    losses = []
    for _ in range(8):
        total, provided = 0.0, {}
        for task in model.tasks:
            step = Step(batch, model.heads, model.training, provided)
            output = task.loss(step, model.encode(task.requests(step)))
            provided[task.provides] = output
            total = total + output.loss
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        losses.append(float(total.detach()))
    assert losses[-1] < losses[0]
