"""From a resolved config to a finished run: check everything, build, train or evaluate, report.

Order matters: whatever can be wrong is looked at before the model is built and before anything is written.
"""

import logging
import sys
import warnings
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback, LearningRateMonitor, TQDMProgressBar
from pytorch_lightning.loggers import Logger
from pytorch_lightning.strategies import Strategy

from vlmo.checkpoints import loading as checkpoint
from vlmo.datamodules.multitask_datamodule import MTDataModule
from vlmo.errors import Stopped, VLMoError
from vlmo.modules import VLMo
from vlmo.settings import Settings
from vlmo.training.callbacks.console import ConsoleLine
from vlmo.training.callbacks.ema import WeightAverages
from vlmo.training.callbacks.knn import NearestNeighbours
from vlmo.training.callbacks.predictions import Predictions
from vlmo.training.callbacks.process_watchdog import ProcessWatchdog
from vlmo.training.callbacks.profile import StepProfile
from vlmo.training.callbacks.retrieval import RetrievalEvaluation
from vlmo.training.callbacks.signals import StopSignals
from vlmo.training.callbacks.skipping import NonFinite, UnreadableImages
from vlmo.training.checkpointing.checkpoints import Checkpoints
from vlmo.training.checkpointing.files import check_resume, resume_path
from vlmo.training.checkpointing.saved_run import fingerprint
from vlmo.training.environment import SHARDED, Environment, choose_environment
from vlmo.training.error_translation import explain_failures
from vlmo.training.learning.callback import LearningChecks
from vlmo.training.loggers import build_loggers, check_loggers
from vlmo.training.optimizer import check_optimizer
from vlmo.training.preparation import (
    check_log_dir,
    make_run_folder,
    next_run_folder,
    resolve_label_names,
    save_settings,
)
from vlmo.training.run_length import RunLength
from vlmo.training.run_report.page import REPORT
from vlmo.training.run_report.record import RunRecord, how_it_failed
from vlmo.training.run_report.warnings_heard import WarningsHeard
from vlmo.training.strategy import build_strategy
from vlmo.training.summary import results, summary

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prepared:
    """A run whose settings, files and devices have been checked.

    Attributes:
        folder: of the run; it need not be there yet.
        loggers: that the settings ask for.
        label_names: of the classes, where they have names.
        resumed_from: the checkpoint that training goes on from.
        start: fingerprint of the weights at `load_path`, for a training.
    """

    settings: Settings
    environment: Environment
    datamodule: MTDataModule
    model: VLMo
    folder: Path
    loggers: list[Logger] = field(default_factory=list)
    label_names: list[str] | None = None
    resumed_from: Path | None = None
    start: str = ""


def run(
    config: Mapping[str, Any], *, callbacks: Iterable[Callback] = (), loggers: Iterable[Logger] = ()
) -> dict[str, float]:
    """Trains, or evaluates with `test_only`, as the config says.

    Args:
        callbacks, loggers: of Lightning's, beside those that the config asks for.

    Returns:
        the numbers that were measured last, by log tag.

    Raises:
        VLMoError: for anything wrong with the config, the files or the machine, before the model is built.
    """
    with WarningsHeard() as heard:
        return execute(prepare(config), callbacks, loggers, heard)


def prepare(config: Mapping[str, Any]) -> Prepared:
    """Checks everything, then builds the model. Raises VLMoError as `run` does."""
    settings = Settings.from_config(config)
    environment = choose_environment(settings)
    datamodule = MTDataModule(settings)
    datamodule.check("test" if settings.test_only else "fit")
    loaded = checkpoint.read(settings.load_path) if settings.load_path else None
    if loaded:
        checkpoint.refuse_foreign(loaded)
    label_names, vocabulary = resolve_label_names(settings, datamodule, loaded.metadata if loaded else None)
    start, resumed_from = "", None
    if not settings.test_only:
        check_optimizer(settings.optim_type)
        start = fingerprint(loaded.tensors if loaded else None)
        resumed_from = resume_path(settings, start)
    check_log_dir(settings)
    check_loggers(settings.loggers)

    _quieten()
    for notice in environment.notices:
        log.warning(notice)
    pl.seed_everything(settings.seed, workers=True, verbose=False)
    model = VLMo(settings, loaded, label_names=label_names, vocabulary=vocabulary)
    if resumed_from:
        check_resume(resumed_from, model)
    if settings.compile:
        model.transformer.compile_blocks()
    folder, loggers = _place(settings)
    return Prepared(settings, environment, datamodule, model, folder, loggers, label_names, resumed_from, start)


def _place(settings: Settings) -> tuple[Path, list[Logger]]:
    """The run's folder, which is there from now on (not for a trial), and the loggers that write to it."""
    if settings.fast_dev_run:
        return next_run_folder(settings), []
    folder = make_run_folder(settings)
    try:
        return folder, build_loggers(settings, folder)
    except VLMoError:
        with suppress(OSError):  # (one of them has written into it)
            folder.rmdir()
        raise


def execute(
    prepared: Prepared,
    callbacks: Iterable[Callback] = (),
    loggers: Iterable[Logger] = (),
    heard: WarningsHeard | None = None,
) -> dict[str, float]:
    """Trains or evaluates, and prints and reports what came of it; returns the numbers by log tag.

    Args:
        heard: the warnings so far, for the report.
    """
    settings, model = prepared.settings, prepared.model
    record = RunRecord(
        settings,
        prepared.environment,
        prepared.datamodule,
        model,
        heard,
        prepared.resumed_from,
        prepared.start,
    )
    trainer = build_trainer(prepared, [record, *callbacks], loggers)
    if settings.test_only:
        _warn_of_resizing(model, settings)
    if trainer.is_global_zero:
        print(summary(settings, prepared.environment, model, _length(prepared)), flush=True)
    try:
        metrics = _evaluate(prepared, trainer) if settings.test_only else _train(prepared, trainer)
    except Stopped as stopped:
        record.end(trainer, str(stopped), _metrics(trainer))
        raise
    except BaseException as error:  # (Ctrl-C, too: the record says how the run ended, whatever ended it)
        watchdog = _own(trainer, ProcessWatchdog) if isinstance(error, RuntimeError) else None
        explained = watchdog.explain(error, trainer) if watchdog else error
        record.end(trainer, how_it_failed(explained))
        if explained is not error:
            raise explained from error
        raise
    record.end(trainer, "ended", metrics)
    if trainer.is_global_zero:
        print(results(settings, metrics), flush=True)
        if settings.test_only and not settings.fast_dev_run:
            predictions = _own(trainer, Predictions)
            for path in predictions.written if predictions else ():
                print(f"  predictions: {path}", flush=True)
        elif not settings.fast_dev_run:
            print(f"  logs and checkpoints: {trainer.default_root_dir}", flush=True)
        if not settings.fast_dev_run:
            print(f"  report: {Path(trainer.default_root_dir) / REPORT}", flush=True)
    return metrics


def _length(prepared: Prepared) -> RunLength | None:
    """How long the training is, with a warning where its schedule is longer; None for an evaluation and a trial."""
    if prepared.settings.test_only or prepared.settings.fast_dev_run:
        return None
    length = RunLength.of(prepared.settings, prepared.datamodule.epoch_samples)
    for warning in length.warnings():
        log.warning(warning)
    return length


def _train(prepared: Prepared, trainer: pl.Trainer) -> dict[str, float]:
    """The numbers of the last step and the last validation."""
    settings, model, datamodule = prepared.settings, prepared.model, prepared.datamodule
    if trainer.is_global_zero and not settings.fast_dev_run:
        save_settings(settings, Path(trainer.default_root_dir))
    with explain_failures(settings, trainer):
        trainer.fit(model, datamodule=datamodule, ckpt_path=prepared.resumed_from)
    checkpoints = _own(trainer, Checkpoints)
    if trainer.is_global_zero and trainer.global_step == checkpoints.resumed_at:
        log.warning(
            f"nothing was left to train: {prepared.resumed_from} has all {trainer.global_step:,} steps (max_steps="
            f"{settings.max_steps}, max_epoch={settings.max_epoch}); raise max_steps to train on"
        )
    ended_between_validations = trainer.global_step != checkpoints.validated_at
    if ended_between_validations and datamodule.has("val"):
        trainer.validate(model, datamodule=datamodule, verbose=False)
    return _metrics(trainer)


def _evaluate(prepared: Prepared, trainer: pl.Trainer) -> dict[str, float]:
    """The numbers of a test run; of val too, where the labels of test are not known."""
    model, datamodule = prepared.model, prepared.datamodule
    metrics: dict[str, float] = {}
    testable = datamodule.has("test")  # if not, recall on val is what there is to measure
    test_has_labels = all(task.test_has_labels for task in model.tasks)
    if not testable or (not test_has_labels and datamodule.has("val")):
        trainer.validate(model, datamodule=datamodule, verbose=False)
        metrics = _metrics(trainer)
    if testable:
        trainer.test(model, datamodule=datamodule, verbose=False)
    return metrics | _metrics(trainer)


def _metrics(trainer: pl.Trainer) -> dict[str, float]:
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


def _own(trainer: pl.Trainer, kind: Any) -> Any:
    """Gives the trainer's callback of that class, None if it has none."""
    found = (callback for callback in trainer.callbacks if isinstance(callback, kind))  # type: ignore[attr-defined]
    return next(found, None)


def build_trainer(prepared: Prepared, callbacks: Iterable[Callback] = (), loggers: Iterable[Logger] = ()) -> pl.Trainer:
    """Lightning's Trainer with this project's loggers and callbacks, and those given."""
    settings, environment = prepared.settings, prepared.environment
    all_loggers = [] if settings.fast_dev_run else [*prepared.loggers, *loggers]
    learning_rate = [LearningRateMonitor(logging_interval="step")] if all_loggers else []
    strategy: Strategy | str = environment.strategy
    needed: list[Callback] = []
    if strategy != "auto":  # which is a single process
        strategy, needed = build_strategy(environment.strategy, prepared.model)
    plugins: list[Any] = [environment.cluster] if environment.cluster else []
    stop = StopSignals()
    last: list[Callback] = [stop]
    if not settings.test_only:
        each_epoch = not prepared.datamodule.has("val")
        checkpoints = Checkpoints(settings, stop, each_epoch, prepared.resumed_from, prepared.start)
        last = [checkpoints, stop]
        plugins.append(checkpoints.io)
    return pl.Trainer(
        accelerator=environment.accelerator,
        devices=environment.devices,
        num_nodes=environment.num_nodes,
        strategy=strategy,
        plugins=plugins,
        precision=environment.precision,
        deterministic=settings.deterministic,
        inference_mode=environment.strategy not in SHARDED,  # (weights that are gathered in it could not be trained)
        max_epochs=-1 if settings.max_steps else settings.max_epoch,
        max_steps=settings.max_steps or -1,
        accumulate_grad_batches=settings.accumulated_batches,
        gradient_clip_val=settings.gradient_clip_val,
        val_check_interval=settings.val_check_interval,
        # a number of batches counts on over the ends of epochs (the original's began anew in each, and had to fit in)
        check_val_every_n_epoch=None if isinstance(settings.val_check_interval, int) else 1,
        log_every_n_steps=settings.log_every_n_steps,
        fast_dev_run=int(settings.fast_dev_run),
        num_sanity_val_steps=0,  # the checks have been made, and recall over two batches means nothing
        use_distributed_sampler=False,  # the data module shares out the samples itself
        enable_model_summary=False,  # ours says more
        logger=all_loggers or False,
        default_root_dir=prepared.folder,
        enable_checkpointing=False,  # ours write from any batch, and what a full disk refuses does not end the run
        callbacks=[*needed, *_callbacks(prepared), *learning_rate, *callbacks, *last],
    )


def _callbacks(prepared: Prepared) -> list[Callback]:
    """Those that this run has a use for."""
    settings = prepared.settings
    callbacks: list[Callback] = [UnreadableImages(), TQDMProgressBar(refresh_rate=1 if sys.stderr.isatty() else 0)]
    if settings.devices * settings.num_nodes > 1:
        callbacks.append(ProcessWatchdog())
    if settings.get_recall_metric:
        rerank = settings.k_test if settings.get_recall_rerank_metric else 0
        callbacks.append(RetrievalEvaluation(rerank, settings.rerank_by))
    if settings.knn_data:
        data = prepared.datamodule
        callbacks.append(NearestNeighbours(settings, data.epoch_samples, data.has("val")))
    if settings.ema_decay and not settings.test_only:
        callbacks.append(WeightAverages(settings.ema_decay))
    if not settings.test_only:
        weights = {name: settings.loss_names[name] for name in settings.active}
        callbacks.append(NonFinite(settings.max_nonfinite))
        if settings.learning_checks and not settings.fast_dev_run:
            callbacks.append(LearningChecks(settings))
        callbacks.append(ConsoleLine(settings.log_every_n_steps, weights, settings))
    elif not settings.fast_dev_run and any(task.writes_predictions for task in prepared.model.tasks):
        callbacks.append(Predictions(Path(settings.log_dir), Path(settings.load_path).stem, prepared.label_names))
    if settings.profile_steps:
        callbacks.append(StepProfile(settings.profile_steps))
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
        ".*FSDP2-wrapped module .* returned a view tensor.*",  # nothing here changes a block's result in place
    ):
        warnings.filterwarnings("ignore", pattern)
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
