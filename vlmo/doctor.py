"""Looks at everything that a run needs, without training: the same command line as run.py's.

python -m vlmo.doctor with data_root=<ARROW_ROOT> <named config> load_path=<CKPT> ...

Prints a checklist, and at the end "ready" (exit status 0) or what to do (2). No problem hides another: what can still
be looked at is.

python -m vlmo.doctor plan [--device NAME ...] [--memory GB ...] [--mfu SHARE] [--samples N] with <the same> ...

Prints what a training run will take, before any device is touched: memory by part, the largest per_gpu_batchsize that
fits, operations, bytes and disk, and hours (docs/planning.md).

python -m vlmo.doctor learn [--seconds N] [--samples N] [--rate R] with <the same> ...
python -m vlmo.doctor compare RUN [--expected FILE.csv] [--png FILE]

Two minutes of learning a single batch by heart; a run's curves over those expected of its recipe
(docs/learning_doctor.md).
"""

import argparse
import importlib.metadata
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

# The packages themselves are one of the things to look at: whatever needs one is imported where it is used.
from vlmo.errors import VLMoError, called_as, print_anything, print_error
from vlmo.training.checklist import Checklist

if TYPE_CHECKING:
    from vlmo.settings import Settings

REQUIREMENTS = Path(__file__).parent.parent / "requirements.txt"
INSTALL = "pip install -r requirements.txt"
SHOWN = ("torch", "pytorch-lightning", "transformers", "pyarrow")  # versions worth reading


# --- packages ---------------------------------------------------------------------------------------------------------


def requirements() -> list[str]:
    """Lines such as "torch>=2.11": of the file beside the package, or as it was installed."""
    if not REQUIREMENTS.is_file():
        return importlib.metadata.requires("vlmo") or []
    lines = [line.split("#")[0].strip() for line in REQUIREMENTS.read_text().splitlines()]
    return [line for line in lines if line]


def packages() -> Iterator[str]:
    """Are all there, in versions that work? Raises VLMoError with a line for each that is not."""
    from packaging.requirements import Requirement

    problems, versions = [], {}
    for line in requirements():
        required = Requirement(line)
        if required.marker and not required.marker.evaluate({"extra": ""}):
            continue
        try:
            version = importlib.metadata.version(required.name)
        except importlib.metadata.PackageNotFoundError:
            problems.append(f"{required.name}: is not installed: {INSTALL}")
            continue
        versions[required.name] = version
        if not required.specifier.contains(version, prereleases=True):
            problems.append(f"{required.name} {version}: {required.specifier} is needed: {INSTALL}")
    if problems:
        raise VLMoError("\n".join(problems))
    yield f"{len(versions)}, among them {', '.join(f'{name} {versions[name]}' for name in SHOWN)}"


# --- the run ----------------------------------------------------------------------------------------------------------


def resolve_leniently(words: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """The config of a command line (what follows `with`) without the options that do not exist, and those as problems.

    Raises:
        VLMoError: if a named config does not exist: what the run shall be is unknown.
    """
    from vlmo.config import explain, resolve

    # isort: split
    from sacred.arg_parser import get_config_updates
    from sacred.utils import ConfigAddedError, SacredError

    problems: list[str] = []
    while True:
        updates, named = get_config_updates(words)
        try:
            return resolve(*named, **updates), problems
        except (ConfigAddedError, VLMoError) as error:
            problems += explain(error).splitlines()
            wrong = [error.field] if isinstance(error, VLMoError) else error.__conflicting_configs__
            right = [word for word in words if word.split("=")[0].strip() not in wrong]
            if right == words:
                raise VLMoError("\n".join(problems)) from error
            words = right
        except SacredError as error:
            raise VLMoError(explain(error)) from error


def examine(words: Sequence[str]) -> int:
    """The whole checklist for what follows `with` on the command line; returns the exit status."""
    checklist = Checklist()
    checklist.look("packages", packages)
    if any("is not installed" in problem for problem in checklist.problems):
        return checklist.conclude()
    from vlmo.settings import Settings
    from vlmo.training.readiness import RunChecks

    problems: list[str] = []
    settings: Settings | None = None

    def options() -> Iterator[str]:
        nonlocal settings
        config, unknown = resolve_leniently(words)
        settings, wrong = Settings.examine(config)
        problems.extend(unknown + wrong)
        if problems:
            raise VLMoError("\n".join(problems))
        yield f"{', '.join(settings.active)} on {', '.join(settings.datasets)}; run {settings.run_name}"

    checklist.look("options", options)
    if settings is not None:
        for name, check in RunChecks(settings, problems).checks():
            checklist.look(name, check)
    return checklist.conclude()


# --- the plan ---------------------------------------------------------------------------------------------------------


class _OneLine(argparse.ArgumentParser):
    """A parser that says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        raise VLMoError(f"{message}: python -m vlmo.doctor --help lists the options")


def plan_options(words: Sequence[str]) -> argparse.Namespace:
    """What stands between `plan` and `with`. Raises VLMoError where it makes no sense."""
    parser = _OneLine(add_help=False)
    parser.add_argument("--device", nargs="+", default=[])
    parser.add_argument("--memory", nargs="+", type=float, default=[])
    parser.add_argument("--mfu", type=float)
    parser.add_argument("--samples", type=int)
    options = parser.parse_args(words)
    if options.mfu is not None and not 0 < options.mfu <= 1:
        raise VLMoError(f"--mfu {options.mfu:g}: is a share of the device's peak, such as 0.35")
    if options.samples is not None and options.samples < 1:
        raise VLMoError(f"--samples {options.samples}: is the number of samples of an epoch, at least 1")
    for size in options.memory:
        if not 0 < size < float("inf"):
            raise VLMoError(f"--memory {size:g}: is the device's memory in GB, such as 80")
    return options


def _settings_of(command: str, words: Sequence[str]) -> tuple[Sequence[str], "Settings"]:
    """What stands before `with`, and the settings of the run that is named after it. Raises VLMoError if wrong."""
    if "with" not in words:
        raise VLMoError(
            f"{command}: of which run? Give its options: python -m vlmo.doctor {command} with task_mlm_itm_itc_base ..."
        )
    from vlmo.settings import Settings

    start = list(words).index("with")
    config, problems = resolve_leniently(words[start + 1 :])
    settings, wrong = Settings.examine(config)
    if problems + wrong:
        raise VLMoError("\n".join(problems + wrong))
    return words[:start], settings


def plan(words: Sequence[str]) -> int:
    """Prints the plan of a run for what follows `plan` on the command line; returns the exit status."""
    given, settings = _settings_of("plan", words)
    options = plan_options(given)
    from vlmo.planning.devices import DEVICES, Device, device

    devices = [device(name) for name in options.device]
    devices += [Device(f"{size:g} GB", size, 0, "") for size in options.memory]
    from vlmo.planning.plan import MFU, plan_run

    print(plan_run(settings, devices or list(DEVICES.values()), options.mfu or MFU, options.samples))
    return 0


# --- learning ---------------------------------------------------------------------------------------------------------


def learn(words: Sequence[str]) -> int:
    """Overfits one batch of a run, for what follows `learn` on the command line; returns the exit status."""
    given, settings = _settings_of("learn", words)
    parser = _OneLine(add_help=False)
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--rate", type=float)
    options = parser.parse_args(given)
    if options.seconds <= 0 or options.samples < 2 or (options.rate is not None and options.rate <= 0):
        raise VLMoError("learn: --seconds and --rate must be above 0, --samples at least 2")
    from vlmo.training.learning.overfit import report

    return report(settings, options.seconds, options.samples, options.rate)


def compare(words: Sequence[str]) -> int:
    """Lays a run over expected curves, for what follows `compare`; returns the exit status, 1 if one leaves."""
    parser = _OneLine(add_help=False)
    parser.add_argument("run", type=Path)
    parser.add_argument("--expected", type=Path)
    parser.add_argument("--png", type=Path)
    options = parser.parse_args(words)
    from vlmo.training.learning.compare import report

    return report(options.run, options.expected, options.png)


COMMANDS = {"plan": plan, "learn": learn, "compare": compare}


def main(arguments: Sequence[str]) -> int:
    """Runs the command line; returns the exit status: 0 if all is ready, 2 if there is something to do."""
    print_anything()
    if arguments and arguments[0] in COMMANDS:
        try:
            return COMMANDS[arguments[0]](arguments[1:])
        except VLMoError as error:
            return print_error(error)
    if not arguments or arguments[0] != "with":
        print((__doc__ or "").replace("python -m vlmo.doctor", called_as("vlmo.doctor")))
        return 0 if set(arguments) <= {"-h", "--help"} else 2
    return examine(arguments[1:])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
