"""With `layout_invariant`, what is learnt does not depend on how samples are dealt out to processes and passes."""

import pytest

from tests import tiny
from tests.processes import run_on
from vlmo.errors import VLMoError
from vlmo.training.runner import run

TASKS = {
    "stage 3": ("task_mlm_itm_itc_base", {"datasets": ["coco"]}),
    "vqa": ("task_finetune_vqa_base_image480", {"vqav2_label_size": 3}),
}
LAYOUTS = {1: 4, 2: 1, 3: 2}  # samples a pass by number of processes; 8 samples do not divide by 3


def options(name, data, folder, **updates):
    named, more = TASKS[name]
    more = more | {"data_root": str(data), "tokenizer": str(data / "vocab.txt"), "log_dir": str(folder / "runs")}
    more |= {"batch_size": 8, "max_steps": 4, "learning_rate": 1e-3, "drop_path_rate": 0.3, "warmup_steps": 1}
    return tiny.config(named, layout_invariant=True, **more | updates)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name == "vqa" else name for name in TASKS]
)
def test_any_number_of_processes_and_passes(name, data, tmp_path):
    found = {}
    for world, passes in LAYOUTS.items():
        folder = tmp_path / str(world)
        config = options(name, data, folder, per_gpu_batchsize=passes)
        found[world] = run_on(world, config, folder)[0]
    tags = [tag for tag in found[1] if tag.endswith(("/loss", "grad_norm"))]
    assert any("train" in tag for tag in tags) and any("val" in tag for tag in tags)
    for world in (2, 3):
        for tag in tags:
            assert found[world][tag] == pytest.approx(found[1][tag], rel=1e-5), (world, tag)


def test_more_samples_a_step_than_there_are(data, tmp_path):
    with pytest.raises(VLMoError, match="there are 16 training samples"):
        run(options("stage 3", data, tmp_path, batch_size=17))
