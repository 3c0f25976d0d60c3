"""Measure a checkpoint: retrieval, compositionality, zero-shot classification, probes, errors by type.

python -m vlmo.evaluate CKPT --suite winoground sugarcrepe --data ROOT [--out FOLDER]
python -m vlmo.evaluate --list                          the suites, and what each needs below ROOT

CKPT: Lightning's file, a released one, a folder of save_pretrained or a name on the Hugging Face hub. Pairs are scored
in every way that it has heads for: cosine of the L/V-FFN features, cosine of the VL-FFN features, matching (ITM), and
the likelihood of the text (MLM). The figures stand in one table, in FOLDER/results.json with settings and hashes, and
with --report in FOLDER/report.html with examples.

What is computed is kept in FOLDER/work: the same command goes on where it was stopped, with any number of processes.
--devices N starts N processes, on GPUs if there are; torchrun and srun may have started them, too.
"""

import argparse
import hashlib
import logging
import multiprocessing
import os
import pickle
import queue
import socket
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from vlmo import __version__, plugins
from vlmo.checkpoints.pretrained import resolve_path
from vlmo.errors import VLMoError, command_parser, print_anything, print_error
from vlmo.evaluation.pair_scores import OF_PAIRS, Scorer
from vlmo.evaluation.report import table, write_json, write_report
from vlmo.evaluation.suites.base import Context, Result, sha256
from vlmo.inference import Predictor
from vlmo.registry import SUITES

log = logging.getLogger(__name__)

OUT = "result/evaluate"


def evaluate(
    checkpoint: str | Path,
    suites: str | Sequence[str],
    data: str | Path,
    out: str | Path | None = None,
    batch_size: int = 32,
    devices: int = 1,
    *,
    tokenizer: str | Path | None = None,
    image_size: int | None = None,
    image_decoding: str = "correct",
    rerank: int = 0,
    rerank_by: Iterable[str] = ("itm",),
    blocks: Iterable[int] = (),
    report: bool = False,
    plugin_modules: Iterable[str] = (),
) -> dict[str, Result]:
    """Measures a checkpoint by some suites; in several processes, each gets the results.

    Args:
        suites: names, those of `vlmo.registry.SUITES`.
        data: folder that their data lie in (`python -m vlmo.evaluate --list`).
        out: folder of the results and of what is kept; None: nothing is, but for the time of this call.
        batch_size: images, texts or pairs at a time on a device.
        devices: processes to start, unless torchrun has started them.
        tokenizer, image_size, image_decoding: as of `Predictor`, over what the checkpoint says.
        rerank: candidates of each query of retrieval that scores of pairs order anew; 0 for none.
        rerank_by: these scores, "itm" or "mlm".
        blocks: whose features probes are made of, from 0; none: the last.
        report: also write an HTML page with examples.
        plugin_modules: modules to import first, which bring suites or tasks.

    Raises:
        VLMoError: for an unknown suite, missing data, and a checkpoint that does not load; before anything is computed.
    """
    names = [suites] if isinstance(suites, str) else list(dict.fromkeys(suites))
    options = dict(
        checkpoint=str(checkpoint),
        suites=names,
        data=str(Path(data).expanduser()),
        out=None if out is None else str(Path(out).expanduser()),
        batch_size=batch_size,
        tokenizer=None if tokenizer is None else str(tokenizer),
        image_size=image_size,
        image_decoding=image_decoding,
        rerank=rerank,
        rerank_by=list(rerank_by),
        blocks=list(blocks),
        report=report,
        plugins=list(plugin_modules),
    )
    _check(options)
    if devices > 1 and not _launched():
        return _start(devices, options)
    return _run(options)


def _check(options: dict[str, Any]) -> None:
    """Raises VLMoError for what is known to be wrong before a model is loaded."""
    plugins.load(options["plugins"])
    SUITES.require(options["suites"], "--suite")
    if not options["suites"]:
        raise VLMoError(f"--suite: give one or more of {', '.join(SUITES)}")
    root, problems = Path(options["data"]), []
    for name in options["suites"]:
        try:
            SUITES[name].check(name, root)
        except VLMoError as error:
            problems.append(str(error))
    if problems:
        raise VLMoError("\n".join(dict.fromkeys(problems)))
    if options["rerank"] < 0 or options["batch_size"] < 1:
        raise VLMoError("--rerank must be 0 or more, --batch-size 1 or more")


def _run(options: dict[str, Any]) -> dict[str, Result]:
    """Measures in this process, or in its share of those that a launcher has started."""
    if _launched() and not dist.is_initialized():
        dist.init_process_group("gloo")  # results are exchanged between the CPUs
    began = time.monotonic()
    path = resolve_path(options["checkpoint"])
    predictor = Predictor.from_pretrained(
        path,
        options["tokenizer"],
        device=_device(),
        image_decoding=options["image_decoding"],
        **({"image_size": options["image_size"]} if options["image_size"] else {}),
    )
    hashes = checkpoint_hashes(path)
    scorer = Scorer(predictor.model, predictor.tokenizer, options["batch_size"], options["image_decoding"])
    first = not dist.is_initialized() or dist.get_rank() == 0
    of_pairs = any(SUITES[name].of_pairs for name in options["suites"])
    for name, why in scorer.absent.items() if first and of_pairs else ():
        log.warning(f"score {name} is left out: {why}")
    out = Path(options["out"]) if options["out"] else None
    key = hashlib.sha256("".join(hashes.values()).encode()).hexdigest()[:16]
    results: dict[str, Result] = {}
    with tempfile.TemporaryDirectory(prefix="vlmo-evaluate-") as temporary:  # suites share what they encode
        work = (out or Path(temporary)) / "work" / key
        by = tuple(options["rerank_by"])
        context = Context(scorer, Path(options["data"]), work, options["rerank"], by, tuple(options["blocks"]))
        for name in options["suites"]:
            results[name] = SUITES[name].run(context)
            for note in results[name].notes if first else ():
                log.warning(f"{name}: {note}")
    if first and out:
        about: dict[str, Any] = {
            "vlmo_version": __version__,
            "settings": options,
            "checkpoint_sha256": hashes,
            "absent": scorer.absent,
        }
        about |= {"processes": dist.get_world_size() if dist.is_initialized() else 1, "device": str(scorer.device)}
        about |= {"torch": torch.__version__, "seconds": round(time.monotonic() - began, 1)}
        write_json(out / "results.json", about, results)
        if options["report"]:
            write_report(out / "report.html", about, results, options["image_decoding"])
    return results


def checkpoint_hashes(path: Path) -> dict[str, str]:
    """Gives the SHA-256 of the files of a checkpoint, by name: of a folder those of its weights."""
    files = [path] if path.is_file() else sorted(each for each in path.rglob("*") if each.suffix in WEIGHTS)
    return {str(each): sha256(each) for each in files}


WEIGHTS = (".safetensors", ".pt", ".pth", ".ckpt")


# --- processes --------------------------------------------------------------------------------------------------------


def _launched() -> bool:
    """Whether there are several processes already."""
    return dist.is_initialized() or int(os.environ.get("WORLD_SIZE", "1")) > 1


def _device() -> str | None:
    """Gives this process's device; None: whichever there is."""
    if not _launched():
        return None
    local = int(os.environ.get("LOCAL_RANK", "0"))
    return f"cuda:{local % torch.cuda.device_count()}" if torch.cuda.is_available() else "cpu"


def _start(devices: int, options: dict[str, Any]) -> dict[str, Result]:
    """Starts the processes, waits for them, and gives the first one's results."""
    if torch.cuda.is_available() and devices > torch.cuda.device_count():
        raise VLMoError(f"--devices {devices}: this machine has {torch.cuda.device_count()} GPUs")
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()  # of bytes: tensors would be shared with a process that ends
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    arguments = (devices, port, options, answers)
    processes = [context.Process(target=_work, args=(rank, *arguments)) for rank in range(devices)]
    for process in processes:
        process.start()
    answer: Any = None
    while answer is None:
        try:
            answer = pickle.loads(answers.get(timeout=1))
        except queue.Empty:
            if failed := [each.exitcode for each in processes if each.exitcode]:
                answer = VLMoError(f"a process ended with exit status {failed[0]}; its own message stands above")
    if isinstance(answer, VLMoError):
        for process in processes:
            process.kill()
        raise answer
    for process in processes:
        process.join()
    return answer


def _work(rank: int, world: int, port: int, options: dict[str, Any], answers: Any) -> None:
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()})
    torch.set_num_threads(max((os.cpu_count() or 1) // world, 1))
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    try:
        plugins.load(options["plugins"])
        results = _run(options)
        if rank == 0:
            answers.put(pickle.dumps(results))
        dist.barrier()
        dist.destroy_process_group()
    except VLMoError as error:
        answers.put(pickle.dumps(VLMoError(str(error))))


# --- the command ------------------------------------------------------------------------------------------------------


def listing() -> str:
    """Gives the suites with what each needs."""
    lines = []
    for name, suite in SUITES.items():
        lines += ["", f"{name}: {suite.meaning}", *(f"    {need.where}: {need.source}" for need in suite.needs)]
    return "\n".join(lines[1:])


def _positive(text: str) -> int:
    if int(text) < 1:
        raise ValueError
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("vlmo.evaluate", __doc__)
    parser.add_argument("checkpoint", nargs="?", metavar="CKPT", help="file, folder or name on the hub")
    parser.add_argument("--suite", nargs="+", action="extend", default=[], metavar="NAME", help="what to measure")
    parser.add_argument("--data", metavar="ROOT", help="folder that the suites' data lie in")
    parser.add_argument("--out", default=OUT, metavar="FOLDER", help=f"of the results; default: {OUT}")
    parser.add_argument("--batch-size", type=_positive, default=32)
    parser.add_argument("--devices", type=_positive, default=1, help="processes to start, one a device")
    parser.add_argument("--tokenizer", help="vocab.txt, folder or hub name, if the checkpoint has no vocabulary")
    parser.add_argument("--image-size", type=_positive, help="pixels a side, other than the checkpoint's")
    parser.add_argument(
        "--image-decoding", choices=("correct", "original"), default="correct", help="for released files"
    )
    parser.add_argument("--rerank", type=int, default=0, metavar="K", help="retrieval: order the first K anew")
    parser.add_argument("--rerank-by", nargs="+", choices=OF_PAIRS, default=["itm"], help="by these scores")
    parser.add_argument("--blocks", type=int, nargs="+", default=[], help="of probes, from 0; default: the last")
    parser.add_argument("--report", action="store_true", help="also write an HTML page with examples")
    parser.add_argument("--plugins", action="append", default=[], metavar="MODULE", help="can be given several times")
    parser.add_argument("--list", action="store_true", help="list the suites and what each needs")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status: 0, or 2 after a mistake."""
    print_anything()
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    options = _parser().parse_args(arguments)
    try:
        if options.list:
            plugins.load(options.plugins)
            print(listing())
            return 0
        if not options.checkpoint or not options.data:
            raise VLMoError("give a checkpoint, --suite NAME and --data ROOT (--list shows the suites)")
        given = {name: value for name, value in vars(options).items() if name not in ("list", "plugins", "suite")}
        results = evaluate(suites=options.suite, plugin_modules=options.plugins, **given)
    except VLMoError as error:
        return print_error(error)
    if int(os.environ.get("RANK", "0")) == 0:
        print(table(results))
        print(f"\nwritten to {options.out}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
