"""The ledger of communication is what a run of two processes sends."""

from collections import Counter

import pytest
import torch.distributed as dist
from pytorch_lightning import Callback

from tests import processes, tiny
from vlmo.planning.communication import ledger
from vlmo.planning.recording import Recorder
from vlmo.settings import Settings
from vlmo.training.runner import run

pytestmark = pytest.mark.slow
TASKS = {
    "task_textmlm_base": {"datasets": ["wikibk"]},
    "task_finetune_irtr_coco_base_image384": {"datasets": ["coco"], "get_recall_metric": False},
    "task_finetune_vqa_base_image480": {"vqav2_label_size": 3},
    "task_mlm_itm_itc_base": {"datasets": ["coco"]},
}


class Listener(Callback):
    """Records the third optimizer step, when everything has been set up."""

    def __init__(self, passes):
        self.passes, self.recorder = passes, Recorder()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx + 1 == 2 * self.passes:
            self.recorder.__enter__()
        if batch_idx + 1 == 3 * self.passes:
            self.recorder.__exit__(None, None, None)


def sums(calls):
    """Calls and bytes by operation."""
    found = Counter()
    for call in calls:
        found[call.operation, "calls"] += call.count
        found[call.operation, "sent"] += call.sent
        found[call.operation, "received"] += call.received
    return dict(found)


# (of texts there are too few for more passes)
@pytest.mark.parametrize(("task", "passes"), [*((task, 1) for task in TASKS), *((task, 2) for task in list(TASKS)[1:])])
def test_a_step_of_two_processes(data, tmp_path, monkeypatch, task, passes):
    options = {"data_root": str(data), "tokenizer": str(data / "vocab.txt"), "log_dir": str(tmp_path / "result")}
    options |= {"per_gpu_batchsize": 1, "batch_size": 2 * passes, "max_steps": 4, "max_epoch": 100, "warmup_steps": 1}
    # every text is cut, so that all are as long as the ledger takes them to be
    config = tiny.config(task, **options, max_text_len=4, val_check_interval=1.0, **TASKS[task])

    def listened(config):
        listener = Listener(passes)
        run(config, callbacks=[listener])
        dist.destroy_process_group()
        # (here, as autograd cannot go on in a process that was forked from one that has used it)
        return sums(listener.recorder.take()), sums(ledger(Settings.from_config(config), 2))

    monkeypatch.setattr(processes, "run", listened)
    for found, expected in processes.run_on(2, config, tmp_path / "processes"):
        assert found == expected
