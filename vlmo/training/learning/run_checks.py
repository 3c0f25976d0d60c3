"""What is wrong with a training, judged by the numbers of its logged steps."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from vlmo.settings import Settings
from vlmo.tasks.base import Task
from vlmo.training.learning.data_checks import Finding
from vlmo.training.optimizer import warmup_length

Numbers = Mapping[str, float]  # by log tag
Chance = Mapping[str, Mapping[str, float]]  # by task and metric

LAST = 3  # logged steps in a row that a finding wants
BELOW = 0.97  # share of the loss at chance above which nothing has been learnt
STEPS = 200  # after which a contrast that is still at chance is worth a word
FEW_PASSES = 4  # passes a step from which on a contrast that sees but one is worth a word
OTHER_CAPTIONS = 0.25  # a pair, from which on they are worth a word: the contrast cannot fall below log 2 times that
SLOWER = 10  # how many times as many steps the other losses are given: what builds upon a contrast waits for it


class RunChecks:
    """Judges the logged steps of a run, in their order.

    Args:
        total: optimizer steps of the run.
    """

    def __init__(self, settings: Settings, tasks: Sequence[Task], total: int) -> None:
        self.settings, self.tasks, self.total = settings, tasks, total
        self.warmup = warmup_length(settings.warmup_steps, total)
        self.first: dict[str, float] = {}
        self.last: list[Numbers] = []
        self.false_negatives: list[float] = []

    def findings(self, step: int, numbers: Numbers, chance: Chance) -> Iterator[Finding]:
        """Judges a logged step. `numbers` may lack any."""
        for name, value in numbers.items():
            self.first.setdefault(name, value)
        self.last = [*self.last, numbers][-LAST:]
        yield from self._temperature(numbers, chance)
        yield from self._false_negatives(numbers)
        yield from self._too_fast(step, chance)
        if len(self.last) < LAST:
            return
        yield from self._no_update(step)
        yield from self._dead(numbers)
        yield from self._at_chance(step, chance)
        yield from self._waiting()

    def validated(self, numbers: Numbers, chance: Chance) -> Iterator[Finding]:
        """Judges a validation, by what was measured of training just before."""
        for task, expected in chance.items():
            for key, by_chance in expected.items():
                tags = f"{task}/train/{key}", f"{task}/val/{key}"
                if key == "loss" or not all(tag in numbers for tag in tags):
                    continue
                train, val = (numbers[tag] for tag in tags)
                if train > min(5 * by_chance, (1 + by_chance) / 2) and val < 1.5 * by_chance:
                    yield Finding(
                        "learnt_by_heart",
                        f"{task}: {key} is {train:.1%} in training and {val:.1%}, hardly more than by chance "
                        f"({by_chance:.1%}), in validation: the training data are learnt by heart; look whether images "
                        "and texts belong together, take more data, or fewer epochs",
                    )
                    return

    # --- one kind of trouble each -------------------------------------------------------------------------------------

    def _all(self, tag: str) -> list[float]:
        """The last logged values of a tag; none where one step lacks it."""
        values = [numbers[tag] for numbers in self.last if tag in numbers]
        return values if len(values) == len(self.last) else []

    def _temperature(self, numbers: Numbers, chance: Chance) -> Iterator[Finding]:
        for tag, scale in numbers.items():
            task = tag.split("/")[0]
            if not tag.endswith("logit_scale") or "loss" not in chance.get(task, {}):
                continue
            expected = chance[task]["loss"]
            # of right pairs with a cosine of 1 and others with 0
            lowest = math.log1p(math.expm1(expected) * math.exp(-scale))
            if lowest > expected / 2:
                yield Finding(
                    "temperature",
                    f"{tag} is {scale:.3g}, a temperature of {1 / scale:.2g}: at best the loss is {lowest:.2f} so, and "
                    f"{expected:.2f} by chance; train it, from a scale of 14 (temperature 0.07)",
                )
            elif scale > 1000:
                yield Finding(
                    "temperature", f"{tag} is {scale:.3g}, and grows without bound: lower learning_rate, or clamp it"
                )

    def _false_negatives(self, numbers: Numbers) -> Iterator[Finding]:
        for tag, share in numbers.items():
            if not tag.endswith("/false_negatives") or getattr(self.settings, "same_image", "") != "published":
                continue
            self.false_negatives.append(share)
            mean = sum(self.false_negatives) / len(self.false_negatives)
            if len(self.false_negatives) >= 2 * LAST and mean > OTHER_CAPTIONS:
                yield Finding(
                    "false_negatives",
                    f"a pair meets {mean:.2f} other captions of its own image in a batch, which it is taught to be "
                    "wrong: give same_image=mask",
                )

    def _too_fast(self, step: int, chance: Chance) -> Iterator[Finding]:
        update = self.last[-1].get("train/update_ratio", 0.0)
        remedy = f"learning_rate={self.settings.learning_rate:g} is too high; divide it by 10"
        if update > 0.25:
            yield Finding(
                "learning_rate_high", f"a step changes the blocks' weights by {update:.0%} of their size: {remedy}"
            )
            return
        tags = {f"{task}/train/loss": expected["loss"] for task, expected in chance.items() if "loss" in expected}
        for tag, expected in tags.items():
            values = self._all(tag)
            if any(not math.isfinite(value) for value in values):
                yield Finding(
                    "learning_rate_high", f"{tag} is inf or NaN: {remedy}, or set gradient_clip_val=1 or precision=bf16"
                )
            elif len(values) >= 2 and min(values[-2:]) > max(1.3 * expected, 1.05 * self.first[tag]):
                yield Finding(
                    "learning_rate_high",
                    f"{tag} is {values[-1]:.3g}, above its beginning ({self.first[tag]:.3g}) and above chance "
                    f"({expected:.3g}): {remedy}, or set gradient_clip_val=1",
                )

    def _no_update(self, step: int) -> Iterator[Finding]:
        updates = self._all("train/update_ratio")
        if updates and max(updates) < 1e-6 and step < 0.95 * self.total:
            yield Finding(
                "no_update",
                f"a step changes the blocks' weights by {max(updates):.1g} of their size, which is nothing: "
                f"learning_rate={self.settings.learning_rate:g} is too low (or the warm-up of {self.warmup:,} steps "
                "too long, or what should be trained is frozen)",
            )

    def _dead(self, numbers: Numbers) -> Iterator[Finding]:
        for tag in numbers:
            if tag.startswith("train/grad_norm/"):
                norms, whole = self._all(tag), self._all("train/grad_norm")
                if norms and whole and all(norm < 1e-7 * total for norm, total in zip(norms, whole, strict=True)):
                    part = tag.rsplit("/", 1)[1].replace("_", " ")
                    yield Finding(
                        "dead_part",
                        f"no gradient arrives at the {part} ({max(norms):.1g} of {max(whole):.1g} in all): no loss "
                        "reaches it, or its weights are broken; look at load_path and loss_names",
                    )

    def _at_chance(self, step: int, chance: Chance) -> Iterator[Finding]:
        stuck: list[str] = []
        fallen: list[str] = []
        due: list[tuple[str, float, float]] = []
        for task in self.tasks:
            values, expected = self._all(f"{task.name}/train/loss"), chance.get(task.name, {}).get("loss")
            if not values or not expected:
                continue
            (stuck if min(values) > BELOW * expected else fallen).append(task.name)
            contrast = task.provides == "contrast"
            if step > 2 * self.warmup and step >= STEPS * (1 if contrast else SLOWER) and task.name in stuck:
                due.append((task.name, values[-1], expected))
        for name, value, expected in due:
            beside = f", while {' and '.join(fallen)} learn{'s' * (len(fallen) == 1)}" if fallen else ""
            yield Finding(
                "at_chance",
                f"after {step:,} steps {name}/train/loss is {value:.3f}, that of a model that knows nothing "
                f"({expected:.3f}){beside}: look whether inputs and targets belong together, and whether one batch "
                "can be learnt by heart (python -m vlmo.doctor learn with ...); else try another learning_rate, or "
                "start from a pre-trained load_path",
            )

    def _waiting(self) -> Iterator[Finding]:
        waits = self._all("train/data_wait")
        if waits and min(waits) > 0.75:
            yield Finding(
                "data_wait",
                f"{min(waits):.0%} of the time is spent waiting for data: raise num_workers="
                f"{self.settings.num_workers}, or give decode_at_scale=True",
            )


def few_negatives(settings: Settings, tasks: Sequence[Task]) -> Iterator[Finding]:
    """Says where a contrast sees a small part of the batch that the optimizer sees: each pass has one of its own."""
    pairs, batch = settings.joint_batch, settings.batch_size
    if FEW_PASSES * pairs <= batch and any(task.provides == "contrast" for task in tasks):
        yield Finding(
            "few_negatives",
            f"the contrast compares {pairs:,} pairs, those of a pass, not the {batch:,} of batch_size: give "
            "contrast_cache=True, which compares all in the memory of a pass, or a greater per_gpu_batchsize",
        )


def frozen_findings(parts: Mapping[str, Mapping[str, Any]], trained: set[int]) -> Iterator[Finding]:
    """Names the parts of the model that the tasks mean to train, and none of whose weights is trained.

    Args:
        parts: see `gauges.trained_parts`.
        trained: ids of the parameters that the optimizer has.
    """
    frozen = [
        part.replace("_", " ")
        for part, parameters in parts.items()
        if not any(parameter.requires_grad and id(parameter) in trained for parameter in parameters.values())
    ]
    if frozen:
        yield Finding(
            "frozen",
            f"nothing of the {', '.join(frozen)} is trained: its weights are frozen, or not given to the optimizer; if "
            "that is not meant, look at what sets requires_grad",
        )
