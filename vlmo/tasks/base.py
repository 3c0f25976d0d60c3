"""The contract of a task: everything that one way of training or fine-tuning needs, in one place.

A task says which heads it has, which sequences it wants encoded, what its loss is, and everything that the rest of the
program would otherwise have to know about it: options and rules, data sets, fields of the batch, metrics, prediction
files, published numbers, and what `Predictor` and the command line offer with it.

To add one, write a file with a subclass and `@TASKS.register("name")` above it: `vlmo/tasks/name.py`, or a module of
your own that `plugins='["my_package.name"]'` loads. The name is then an entry of `loss_names`.

In a step (`compute_tasks`), `requests` are asked of every task, all pairs are encoded together, and each task's
`loss` gets the hidden states of its own requests. A task is handed what it needs (`Step`); it never sees the trainer.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, NamedTuple, cast
from zlib import crc32

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmo.batch import IGNORE_INDEX, Batch, Field
from vlmo.distributed.collectives import gather_numbers
from vlmo.modules.model import Encode, Hidden, VLMoModel
from vlmo.modules.random import fold_in
from vlmo.settings.groups import Share
from vlmo.settings.option import OptionGroup, option

Measured = tuple[Tensor, Tensor | int]  # a sum, and over how many things


@dataclass
class TaskOutput:
    """What one task computed of a batch.

    Attributes:
        loss: scalar, weighted as published (the option `loss_names` multiplies it further).
        outputs: tensors for users and other tasks: "logits", "labels", ...
        measured: metrics by name, each a sum and a count, so that means over batches and processes weigh every item
            alike. A name with a slash ("dev/accuracy") names the split itself.
        scalars: numbers to log that are neither losses nor means.
    """

    loss: Tensor
    outputs: dict[str, Tensor] = field(default_factory=dict)
    measured: dict[str, Measured] = field(default_factory=dict)
    scalars: dict[str, Tensor] = field(default_factory=dict)


class BatchSize(NamedTuple):
    """The size of one process's batch, in plain numbers: what an exchange is planned by without asking a device.

    Attributes:
        samples: B.
        text_len: T, 0 without texts.
        images_are_bytes: as in the batch.
    """

    samples: int
    text_len: int
    images_are_bytes: int

    @classmethod
    def of_all_processes(cls, batch: Batch) -> "list[BatchSize]":
        """Gives those of this step's batches, by rank; all processes must ask."""
        text_len = batch["text_ids"].shape[1] if "text_ids" in batch else 0
        samples = num_samples(batch)
        # (a batch that lost all its images does not keep those of other processes from travelling as bytes)
        own = (samples, text_len, int(batch.get("images_are_bytes", not samples)))
        return [cls(*numbers) for numbers in gather_numbers(own)]


@dataclass(frozen=True)
class Step:
    """What a task is handed in a step.

    Attributes:
        heads: modules and parameters by their name in the state dict: those of all tasks, and the "pooler".
        provided: outputs of tasks that were computed before, by the role that they provide.
        sizes: of the batches of all processes, by rank, for tasks with `spans_processes`; else empty.
    """

    batch: Batch
    heads: Mapping[str, Any]
    training: bool
    provided: Mapping[str, TaskOutput] = field(default_factory=dict)
    sizes: Sequence[BatchSize] = ()

    @property
    def keys(self) -> Tensor | None:
        """Gives (B,) int64: what random numbers follow from (`vlmo/modules/random.py`); None: the global generator."""
        return self.batch.get("random_keys")

    def of(self, task: "Task") -> "Step":
        """The step with the samples of the task, where it has data of its own."""
        return replace(self, batch=task.samples(self.batch)) if task.prefix else self

    def requests(self, task: "Task") -> list[Encode]:
        """Asks a task for its requests; with keys, each gets its own."""
        requests = task.requests(self)
        if self.keys is not None:
            for number, request in enumerate(requests):
                rows = next(len(each) for each in (request.image, request.text_ids) if each is not None)
                request.keys = fold_in(self.keys[:rows], crc32(f"{task.name} {number}".encode()))
        return requests


class PredictionFiles(NamedTuple):
    """What became of the predictions of a test run: files, numbers to log by tag, and lines to warn of."""

    paths: list[Path] = []
    metrics: dict[str, float] = {}
    warnings: list[str] = []


class Use(NamedTuple):
    """One thing that a trained model can be used for: a method of `Predictor` and a command of `vlmo.predict`.

    `run(predictor, columns..., **options)` gives a list with one result for each row. It gets every column as a list,
    all of one length (None for an optional one that is not given), and works with the predictor's `model`, `tokenizer`,
    `vocabulary`, `answers`, `compute` and `best`. Its signature and docstring are those of the method.

    Attributes:
        name: of the method.
        run: see above; raises InputError for an input that cannot be used.
        head: what the model must have at its root; `purpose` says what for, as in "answering needs ...".
        columns: the inputs of a row that it needs; names that begin with "image" are images, the others texts.
        result: key of the result in a row of JSON.
        optional: inputs that it can also take.
        options: options of the command, each with its default; they are arguments of `run`.
        command: name of the command where it is another.

    Tasks that offer the same thing give it the same name, columns and options; the model's heads tell which is meant.
    """

    name: str
    run: Callable[..., list[Any]]
    head: str
    purpose: str
    columns: tuple[str, ...]
    result: str
    optional: tuple[str, ...] = ()
    options: Mapping[str, Any] = {}
    command: str = ""


class LabelSmoothing(OptionGroup):
    """Base of the options of tasks that choose among classes, or of contrasts among pairs."""

    label_smoothing: Share = option(
        0.0, "share of a training target that is spread evenly over all classes, or the pairs of a contrast; 0: none"
    )


class Task:
    """Base of all tasks; one instance a model, which holds options but no weights and no state of a step.

    Args:
        options: the settings of a run; None: the defaults of the task's own options under `values`.
        values: option values, for use without settings.
    """

    name: ClassVar[str]
    # stage of pre-training that it belongs to; None: it is a fine-tuning task
    stage: ClassVar[int | None] = None
    # roles: what other tasks can build upon ("contrast": the similarities of all pairs), and what this one builds upon
    provides: ClassVar[str] = ""
    requires: ClassVar[str] = ""
    # whether its loss is about the samples of all processes together: it is then told their sizes
    spans_processes: ClassVar[bool] = False
    # whether no other task can be on beside it
    alone: ClassVar[bool] = False
    # names of the data sets that it can be trained on; None: all that have what `reads` says
    datasets: ClassVar[frozenset[str] | None] = None
    reads: ClassVar[frozenset[str]] = frozenset({"image", "text"})
    # whether it can be measured on the test split (test sets of challenges have no labels: val is measured as well)
    test_has_labels: ClassVar[bool] = True
    # whether a test run writes files of predictions (`predictions`, `write_predictions`)
    writes_predictions: ClassVar[bool] = False
    # whether the data say the names of its classes, which are then saved with the weights
    named_classes: ClassVar[bool] = False

    # experts that the model needs beside the vision expert, whether it has a text part, and its token types
    experts: ClassVar[tuple[str, ...]] = ("text", "vl")
    has_text: ClassVar[bool] = True
    token_types: ClassVar[int] = 2  # 0 text, 1 image, 2 second image of a sample
    # what of the model its loss runs through (see `vlmo/training/unused_parameters.py`): "text" and "image", one
    # modality alone through its experts; "vl branch", one through the vision-language experts; "pair"; "pooler"
    paths: ClassVar[tuple[str, ...]]
    # beginnings of names of the parameters that are trained; None: all
    trains: ClassVar[tuple[str, ...] | None] = None
    # whether its heads are trained at `lr_mult` times the learning rate
    head_group: ClassVar[bool] = False
    # heads without which a loaded file cannot be evaluated
    required_heads: ClassVar[tuple[str, ...]] = ()
    # heads shared with other tasks' whole models: the option that gives the length of a weight's first axis
    sized_by: ClassVar[Mapping[str, str]] = {}  # beginning of a parameter's name -> option

    Options: ClassVar[type[OptionGroup] | None] = None
    fields: ClassVar[Mapping[str, Field]]  # of the batch, those that it reads
    metrics: ClassVar[tuple[str, ...]] = ("loss", "accuracy")
    primary_metrics: ClassVar[tuple[str, ...]] = ("accuracy",)  # whose sum enters `val/the_metric`, as published
    uses: ClassVar[tuple[Use, ...]] = ()

    def __init__(self, options: Any = None, **values: Any) -> None:
        if options is None:
            fields = self.Options.model_fields if self.Options else {}
            own = {name: field.get_default(call_default_factory=True) for name, field in fields.items()}
            options = SimpleNamespace(**(own | values))
        self.options = options
        # of the names of its fields in a batch: with data of its own they are not those of the pairs
        self.prefix = f"{self.name}." if self.name in getattr(options, "beside", ()) else ""

    # --- the model ---------------------------------------------------------------------------------------------------

    def heads(self, width: int) -> dict[str, nn.Module | nn.Parameter]:
        """Heads by name at the root of the model; one that another task has made is shared."""
        raise NotImplementedError

    # --- the step ----------------------------------------------------------------------------------------------------

    def derive(self, batch: Batch) -> dict[str, Tensor]:
        """Fields computed of the others, on the CPU: when a batch is collated, and again of each part of one."""
        return {}

    def derived(self, batch: Batch) -> dict[str, Tensor]:
        """What it derives of its samples, by the names that the fields have in the batch."""
        if not self.is_served(batch):
            return {}
        return {self.prefix + name: value for name, value in self.derive(self.samples(batch)).items()}

    def samples(self, batch: Batch) -> Batch:
        """Gives the part of a batch that is its own: all of it, or, with data of its own (`beside`), those."""
        if not self.prefix:
            return batch
        mine = {name.removeprefix(self.prefix): value for name, value in batch.items() if name.startswith(self.prefix)}
        shared = {name: batch[name] for name in ("images_are_bytes", "random_keys") if name in batch}
        return cast(Batch, mine | shared)

    def is_served(self, batch: Batch) -> bool:
        """Whether the batch has its samples: data of its own may have none for validation."""
        return not self.prefix or any(name.startswith(self.prefix) for name in batch)

    @property
    def own_fields(self) -> dict[str, Field]:
        """The fields that it reads, by the names that they have in a batch."""
        return {self.prefix + name: field for name, field in self.fields.items()}

    def prepare(self, step: Step) -> dict[str, Tensor]:
        """Fields, one entry a sample, that need the whole batch before `contrast_cache` splits it into chunks."""
        return {}

    def requests(self, step: Step) -> list[Encode]:
        """The sequences to encode, a row a sample; none if nothing is to be learnt: `loss` is not called then."""
        raise NotImplementedError

    def loss(self, step: Step, encoded: Sequence[Hidden]) -> TaskOutput:
        """The loss from the hidden states of its requests."""
        raise NotImplementedError

    def limit_weights(self, heads: Mapping[str, Any]) -> None:
        """Puts weights that an update has moved beyond their limits back, without gradient."""

    def num_items(self, batch: Batch) -> Tensor | int:
        """How many things of the batch the loss is a mean over, up to a factor: the share of a chunk in the whole."""
        return num_samples(batch)

    # --- the run -----------------------------------------------------------------------------------------------------

    def chance(self, batches: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """What its metrics are for the best model that looks at no input, by metric; what is unknown is missing.

        Args:
            batches: some of the run's, on the CPU, without images; at least one.
        """
        return {}

    @classmethod
    def check(cls, settings: Any) -> list[str]:
        """Problems with the settings of a run that this task is part of, one line each with its remedy."""
        return []

    @classmethod
    def check_files(cls, settings: Any) -> list[str]:
        """Problems with files beside the data sets that a run needs, looked at before the model is built."""
        return []

    @classmethod
    def published(cls, settings: Any) -> dict[str, float]:
        """Published results (percent, by log tag) that a run with these settings can be compared with."""
        return {}

    def predictions(self, batch: Batch, output: TaskOutput | None, label_names: Sequence[str] | None) -> list[Any]:
        """What a test run has to write of a batch, skipped samples included: rows that can be pickled."""
        return []

    def write_predictions(self, rows: list[Any], folder: Path, checkpoint: str) -> PredictionFiles:
        """Writes the rows of all processes in the official form.

        Args:
            checkpoint: name of the evaluated file, for names.
        """
        raise NotImplementedError


def compute_tasks(
    model: VLMoModel, tasks: Sequence[Task], batch: Batch, sizes: Sequence[BatchSize] = ()
) -> dict[str, TaskOutput]:
    """Computes tasks by name, their losses unweighted: those that others build upon first, all others together.

    Args:
        sizes: of the batches of all processes, where they are known already.
    """
    outputs: dict[str, TaskOutput] = {}
    provided: dict[str, TaskOutput] = {}
    heads, waiting = model.heads, [task for task in tasks if task.is_served(batch)]
    if not sizes and any(task.spans_processes for task in tasks):
        sizes = BatchSize.of_all_processes(batch)
    while waiting:
        awaited = {task.requires for task in waiting} & {task.provides for task in waiting if task.provides}
        ready = [task for task in waiting if task.requires not in awaited]
        ready = [task for task in ready if task.provides in awaited] or ready
        step = Step(batch, heads, model.training, provided, sizes)
        requests = {task: step.of(task).requests(task) for task in ready}
        encoded = iter(model.encode([request for asked in requests.values() for request in asked]))
        for task, asked in requests.items():
            if asked:
                outputs[task.name] = output = task.loss(step.of(task), [next(encoded) for _ in asked])
                provided |= {task.provides: output} if task.provides else {}
        waiting = [task for task in waiting if task not in ready]
    return outputs


def num_samples(batch: Mapping[str, Any]) -> int:
    """How many samples a batch has; 0 if it lost all of them as unreadable."""
    return next((len(batch[name]) for name in ("raw_index", "text_ids", "image") if name in batch), 0)


def locate(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Finds the chosen places of each row; on a GPU this would wait for the device, so the loader does it.

    Args:
        chosen: (B, T) bool.

    Returns:
        their positions (B, R), R being the most in one row, and shorter rows filled up with 0; and (M,) the numbers of
        the B * R that are no filling.
    """
    counts = chosen.sum(dim=1)
    most = max(int(counts.max()), 1) if len(chosen) else 1
    real = torch.arange(most, device=chosen.device) < counts[:, None]
    positions = torch.zeros(len(chosen), most, dtype=torch.long, device=chosen.device)
    positions[real] = chosen.nonzero()[:, 1]
    return positions, real.flatten().nonzero()[:, 0]


def mean_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean over the rows of (N, classes) logits; 0, not NaN, and with a gradient of zeros where there is no row."""
    return F.cross_entropy(logits, labels, reduction="sum") / max(len(labels), 1)


def mean(value: Tensor, count: Tensor | int) -> Measured:
    """For `TaskOutput.measured`, a mean over `count` things; nothing where there is none, whatever the value."""
    value = value.detach().double()
    if isinstance(count, int):  # (as a tensor it would have to be sent to the device)
        return (value * count if count else value.new_zeros(())), count
    return (value * count).where(count > 0, 0.0), count


def entropy(shares: Tensor) -> float:
    """Entropy in nats of (classes,) probabilities, or counts: the cross-entropy of the best constant guess."""
    return float(torch.special.entr(shares.double() / shares.sum()).sum())


def accuracy(predicted: Tensor, labels: Tensor) -> Measured:
    """For `TaskOutput.measured`, the predictions that hit the label; labels of IGNORE_INDEX do not count.

    Args:
        predicted: (N, classes) logits, or (N,) classes. labels: (N,)
    """
    if not predicted.numel():  # (a contrast of nothing has no class to choose)
        return labels.new_zeros(()), 0
    counted = labels != IGNORE_INDEX
    classes = predicted.argmax(-1) if predicted.ndim > labels.ndim else predicted
    return ((classes == labels) & counted).sum(), counted.sum()
