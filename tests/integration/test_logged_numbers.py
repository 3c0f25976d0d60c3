"""What training logs: of all passes and processes of a step together, weighted by counts, once a step."""

import csv

import pytest

from tests import tiny
from tests.processes import run_on


@pytest.fixture(scope="module")
def logged(data, micro, tmp_path_factory):
    """Step -> what was logged of it, of a training on 4 texts a step, which have different numbers of masked words."""

    def made(world: int, size: int) -> dict[int, list[dict[str, float]]]:
        folder = tmp_path_factory.mktemp("training")
        options = {"data_root": str(data), "tokenizer": str(data / "vocab.txt"), "model_arch": micro, "max_steps": 2}
        options |= {"batch_size": 4, "per_gpu_batchsize": size, "log_every_n_steps": 1, "mlm_prob": 0.3}
        run_on(world, tiny.config("task_textmlm_base", **options, log_dir=str(folder / "log")), folder / "results")
        (path,) = folder.glob("log/*/version_*/metrics.csv")  # the first process's alone
        steps: dict[int, list[dict[str, float]]] = {}
        with path.open() as file:
            for row in csv.DictReader(file):
                numbers = {name: float(value) for name, value in row.items() if value and "train" in name}
                if "textmlm/train/loss" in numbers:
                    steps.setdefault(int(row["step"]), []).append(numbers)
        return steps

    return made


def test_a_step_is_logged_once_whatever_it_is_split_into(logged):
    joint = logged(1, 4)
    assert sorted(joint) == [0, 1]
    for world, size in ((2, 2), (1, 2), (2, 1)):
        parts = logged(world, size)
        assert sorted(parts) == [0, 1] and all(len(rows) == 1 for rows in parts.values())
        for name in ("textmlm/train/loss", "textmlm/train/accuracy"):
            # of the first step, as the gradient is the mean of the parts' means
            assert parts[0][0][name] == pytest.approx(joint[0][0][name], rel=1e-5), (world, size, name)
