"""From a resolved config to a finished run: check everything, build, train or evaluate, report.

Order matters: whatever can be wrong is looked at before the model is built and before anything is written.
"""

import importlib.util
import json
import logging
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback, LearningRateMonitor

from vlmo.checkpoints import loading as checkpoint
from vlmo.datamodules.multitask_datamodule import MTDataModule
from vlmo.datasets import DATASETS
from vlmo.errors import VLMoError
from vlmo.files import atomic_write, existing_folder
from vlmo.modules import VLMo
from vlmo.modules.multiway_transformer import ARCHITECTURES
from vlmo.settings import Settings
from vlmo.tasks import objective_names
from vlmo.training.callbacks.console import console_callbacks, summary
from vlmo.training.callbacks.nonfinite import NonFinite
from vlmo.training.callbacks.predictions import NLVR2Predictions, VQAPredictions
from vlmo.training.callbacks.process_watchdog import ProcessWatchdog, explain
from vlmo.training.callbacks.profile import StepProfile
from vlmo.training.callbacks.retrieval import RetrievalEvaluation
from vlmo.training.callbacks.signals import StopSignals
from vlmo.training.callbacks.unreadable import UnreadableImages
from vlmo.training.checkpointing.checkpoints import Checkpoints, newest_intact
from vlmo.training.checkpointing.resume import Resume
from vlmo.training.environment import Environment, choose_environment
from vlmo.training.error_translation import explain_failures
from vlmo.training.label_names import resolve_label_names
from vlmo.training.loggers import build_loggers
from vlmo.training.results import results
from vlmo.training.strategy import ShardedBlocks, build_strategy

log = logging.getLogger(__name__)

KNOWN: dict[str, Iterable[str]] = {
    "architectures": ARCHITECTURES,
    "datasets": DATASETS,
    "losses": objective_names(),
}


def run(config: Mapping[str, Any]) -> dict[str, float]:
    """Trains, or evaluates with `test_only`, as the config says.

    Returns:
        the numbers that were measured last, by log tag.

    Raises:
        VLMoError: for anything wrong with the config, the files or the machine, before the model is built.
    """
    settings = Settings.from_config(config, KNOWN)
    environment = choose_environment(settings)
    if settings.compile:
        check_compiler(environment.accelerator)
    datamodule = MTDataModule(settings)
    stage = "test" if settings.test_only else "fit"
    datamodule.check(stage)
    loaded = checkpoint.read(settings.load_path) if settings.load_path else None
    if loaded:
        checkpoint.refuse_foreign(loaded)
    answers, vocabulary = resolve_label_names(settings, datamodule, loaded.metadata if loaded else None)
    resume = resume_path(settings)
    check_log_dir(settings)

    _quieten()
    for notice in environment.notices:
        log.warning(notice)
    pl.seed_everything(settings.seed, workers=True, verbose=False)
    model = VLMo(dict(config), loaded)
    del loaded  # (its tensors would stay in memory beside the model's)
    model.answers, model.vocabulary = answers, vocabulary
    if resume:
        check_resume(resume, model)
    if settings.compile:
        model.transformer.compile_steps()
    trainer = build_trainer(settings, environment, datamodule, model, answers, resume)
    if settings.test_only:
        _warn_of_resizing(model, settings)
    if trainer.is_global_zero:
        print(summary(settings, environment, model), flush=True)

    try:
        if settings.test_only:
            measured = _evaluate(settings, trainer, model, datamodule)
        else:
            measured = _train(settings, trainer, model, datamodule, resume)
    except RuntimeError as error:
        raise explain(error, trainer) from error
    if trainer.is_global_zero:
        print(results(settings, measured), flush=True)
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            for path in callback.written if isinstance(callback, VQAPredictions | NLVR2Predictions) else ():
                print(f"  predictions: {path}", flush=True)
        if trainer.logger and not settings.test_only:  # (not trainer.log_dir, which waits for the other processes)
            print(f"  logs and checkpoints: {trainer.logger.log_dir}", flush=True)
    return measured


def _train(
    settings: Settings, trainer: pl.Trainer, model: VLMo, datamodule: MTDataModule, resume: Path | None
) -> dict[str, float]:
    """The numbers of the last step and the last validation."""
    _save_settings(settings, trainer)
    with explain_failures(settings, trainer):
        trainer.fit(model, datamodule=datamodule, ckpt_path=resume)
    if trainer.global_step != model.validated_at and datamodule.has("val"):  # training ended between two validations
        if isinstance(trainer.strategy, ShardedBlocks):
            log.warning("not validated at the end: FSDP cannot; evaluate last.ckpt with test_only=True")
        else:
            trainer.validate(model, datamodule=datamodule, verbose=False)
    return _measured(trainer)


def _evaluate(settings: Settings, trainer: pl.Trainer, model: VLMo, datamodule: MTDataModule) -> dict[str, float]:
    """The numbers of a test run. The answers to VQA's test are not known: what is held out of val shows the score."""
    measured: dict[str, float] = {}
    testable = datamodule.has("test")  # if not, recall on val is what there is to measure
    if not testable or ("vqa" in settings.active and datamodule.has("val")):
        trainer.validate(model, datamodule=datamodule, verbose=False)
        measured = _measured(trainer)
    if testable:
        trainer.test(model, datamodule=datamodule, verbose=False)
    return measured | _measured(trainer)


def _measured(trainer: pl.Trainer) -> dict[str, float]:
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


def build_trainer(
    settings: Settings,
    environment: Environment,
    datamodule: MTDataModule,
    model: VLMo,
    answers: list[str] | None = None,
    resumed_from: Path | None = None,
) -> pl.Trainer:
    """Lightning's Trainer with this project's loggers and callbacks.

    Args:
        answers: of the VQA labels.
        resumed_from: the checkpoint that the run will go on from.
    """
    strategy, callbacks = build_strategy(environment.strategy, model)
    callbacks += _callbacks(settings, datamodule, answers)
    plugins: list[Any] = [environment.cluster] if environment.cluster else []
    checkpoints = None
    if not (settings.fast_dev_run or settings.test_only):
        resume = Resume(settings)
        checkpoints = Checkpoints(settings, resume, not datamodule.has("val"), resumed_from)
        callbacks += [resume, checkpoints]  # in this order: the one knows the place that the other saves
        plugins.append(checkpoints.io)
    callbacks.append(StopSignals(settings, checkpoints))
    return pl.Trainer(
        accelerator=environment.accelerator,
        devices=environment.devices,
        num_nodes=environment.num_nodes,
        strategy=strategy,
        plugins=plugins,
        precision=environment.precision,
        deterministic=settings.deterministic,
        max_epochs=settings.max_epoch if settings.max_epoch else -1,
        max_steps=settings.max_steps if settings.max_steps else -1,
        accumulate_grad_batches=settings.accumulated_batches,
        gradient_clip_val=settings.gradient_clip_val,
        val_check_interval=settings.val_check_interval,
        # a number of batches counts on over the ends of epochs, as the published runs did
        check_val_every_n_epoch=None if isinstance(settings.val_check_interval, int) else 1,
        log_every_n_steps=settings.log_every_n_steps,
        fast_dev_run=int(settings.fast_dev_run),
        num_sanity_val_steps=0,  # the checks have been made, and recall over two batches means nothing
        use_distributed_sampler=False,  # the data module shares out the samples itself
        enable_model_summary=False,  # ours says more
        logger=False if settings.fast_dev_run else build_loggers(settings),
        default_root_dir=os.path.join(settings.log_dir, settings.run_name),
        enable_checkpointing=False,  # ours write from any batch, and what a full disk refuses does not end the run
        callbacks=callbacks,
    )


def _callbacks(settings: Settings, datamodule: MTDataModule, answers: list[str] | None) -> list[Callback]:
    callbacks: list[Callback] = [ProcessWatchdog(), UnreadableImages(), NonFinite(settings.max_nonfinite)]
    if settings.get_recall_metric:
        callbacks.append(RetrievalEvaluation(rerank=settings.k_test if settings.get_recall_rerank_metric else 0))
    if settings.test_only and not settings.fast_dev_run:
        folder, name = Path(settings.log_dir), Path(settings.load_path).stem
        if answers is not None:
            callbacks.append(VQAPredictions(folder / f"vqa_submit_{name}.json", answers))
        if "nlvr2" in settings.active:
            callbacks.append(NLVR2Predictions(folder, name))
    callbacks += console_callbacks(settings)
    if settings.profile_steps:
        callbacks.append(StepProfile(settings.profile_steps))
    if not settings.fast_dev_run:
        callbacks.append(LearningRateMonitor(logging_interval="step"))
    return callbacks


def _warn_of_resizing(model: VLMo, settings: Settings) -> None:
    """A model evaluated at another resolution than it was trained at is usually worse: worth knowing of the numbers."""
    report = model.load_report
    for name in ("relative_position_bias_table", "transformer.pos_embed"):
        if report and name in report.resized:
            log.warning(
                f"{settings.load_path}: is of another image size, its positions are adapted to image_size="
                f"{settings.image_size} ({report.resized[name]}) without training at it: expect lower numbers"
            )


def resume_path(settings: Settings) -> Path | None:
    """The checkpoint that training continues from, if any."""
    if settings.test_only:
        return None
    if settings.resume_from:
        if not Path(settings.resume_from).exists():  # (DeepSpeed's are folders)
            raise VLMoError(f"resume_from={settings.resume_from}: there is no such file")
        return Path(settings.resume_from)
    return newest_intact(settings) if settings.resume_during_training else None


def check_resume(path: Path, model: VLMo) -> None:
    """Resuming takes over the state of a run as a whole, so the model must be the same."""
    if path.is_dir():
        return  # sharded: Lightning's to read
    found = checkpoint.read(path)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    if found.container != "state_dict" or {name: t.shape for name, t in found.tensors.items()} != shapes:
        raise VLMoError(
            f"{path}: is not a checkpoint of this model and task that this project saved, so training cannot be "
            f"resumed from it; to start from its weights give it with load_path instead"
        )


def check_log_dir(settings: Settings) -> None:
    folder = existing_folder(settings.log_dir)
    try:
        with tempfile.TemporaryFile(dir=folder):  # (the permissions alone say nothing of read-only disks and quotas)
            pass
    except OSError as error:
        raise VLMoError(
            f"log_dir={settings.log_dir}: {folder} is no folder that can be written to ({error.strerror}); give "
            "another log_dir"
        ) from error


def _save_settings(settings: Settings, trainer: pl.Trainer) -> None:
    """The resolved settings as JSON beside the checkpoints."""
    if trainer.is_global_zero and trainer.logger:
        with atomic_write(Path(str(trainer.logger.log_dir)) / "settings.json") as file:
            file.write((json.dumps(settings.model_dump(mode="json"), indent=2) + "\n").encode())


def _quieten() -> None:
    """Silences what the libraries say of choices made here on purpose, so that warnings that matter are seen."""
    for pattern in (
        ".*does not have many workers.*",  # num_workers is the person's choice, and free on small data
        ".*Experiment logs directory .* exists and is not empty.*",  # TensorBoard's, the same one
        ".*`isinstance\\(treespec, LeafSpec\\)` is deprecated.*",
        ".*Total length of `list` across ranks is zero.*",  # a data set without validation
        ".*You have overridden .*batch_transfer.*",  # the model's hook is the one that is meant
        ".*You have overridden `transfer_batch_to_device`.*",
        ".*your dataloader is not resumable.*",  # the data module is told where to go on
        ".*It is recommended to use `self.log.*sync_dist=True.*",  # metrics come reduced over the processes
        ".*number of training batches .* smaller than the logging interval.*",
    ):
        warnings.filterwarnings("ignore", pattern)
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)


def check_compiler(accelerator: str) -> None:
    """Raises VLMoError if what torch.compile builds its kernels with is missing."""
    if accelerator == "gpu" and importlib.util.find_spec("triton") is None:
        raise VLMoError("compile=True: needs triton on a GPU: pip install triton, or leave it at False")
    if accelerator == "cpu" and shutil.which(os.environ.get("CXX", "g++")) is None:
        raise VLMoError("compile=True: needs a C++ compiler on a CPU: install g++, or leave it at False")
