"""Raw data -> Arrow files, and indices of data that are read in place, from the command line.

python -m vlmo.utils.convert coco /data/coco /data/arrow
python -m vlmo.utils.convert index "tar:/data/cc3m/{00000..00331}.tar"
python -m vlmo.utils.convert --help            all data sets
python -m vlmo.utils.convert vqa --help        the options of one
"""

import argparse
import inspect
import os
import signal
import sys
from collections.abc import Callable, Sequence
from functools import partial
from types import ModuleType
from typing import Any

from vlmo.errors import VLMoError, command_parser, print_anything, print_error
from vlmo.utils import (
    index_sources,
    write_coco_karpathy,
    write_conceptual_caption,
    write_easy_vqa,
    write_f30k_karpathy,
    write_gqa,
    write_images,
    write_labelled_images,
    write_nlvr2,
    write_own_captions,
    write_own_karpathy,
    write_own_pairs,
    write_own_vqa,
    write_sbu,
    write_snli_ve,
    write_vg,
    write_vqa,
    write_webdataset,
    write_wikibk,
)
from vlmo.utils.ray_workers import ENGINES, RayWorkers

SETS: dict[str, ModuleType] = {
    "coco_karpathy": write_coco_karpathy,
    "f30k_karpathy": write_f30k_karpathy,
    "vg": write_vg,
    "conceptual_caption": write_conceptual_caption,
    "sbu": write_sbu,
    "vqa": write_vqa,
    "nlvr2": write_nlvr2,
    "gqa": write_gqa,
    "snli_ve": write_snli_ve,
    "wikibk": write_wikibk,
    "images": write_images,
    "labelled_images": write_labelled_images,
    "own_captions": write_own_captions,
    "own_karpathy": write_own_karpathy,
    "own_vqa": write_own_vqa,
    "own_pairs": write_own_pairs,
    "webdataset": write_webdataset,
    "easy_vqa": write_easy_vqa,
}
ALIASES = {"coco_karpathy": "coco", "f30k_karpathy": "f30k", "conceptual_caption": "gcc"}  # as in `datasets=[...]`
HELP = {
    "annotations": "file that lists the records, relative to ROOT or to the working directory",
    "caption_key": "name of the entry or column with the caption",
    "image_key": "name of the entry or column with the image's path",
    "data_cache": "folder for indices of remote files, and of those whose folder cannot be written to",
    "image_column": "column with the images, as the option of training",
    "text_column": "column, or entry of the .json, with the captions, as the option of training",
    "images": "folder of the images, relative to ROOT",
    "min_occurrences": "how often an answer must occur to become a label",
    "name": "data set that training shall read the tables as: coco, f30k, gcc, sbu or a new name",
    "normalise": "compare answers by the VQA challenge's rules (case, articles, number words, punctuation)",
    "num_workers": "processes that read images; 1: only this one",
    "rest_val_images": "how many images of val are for validation; the others are trained on",
    "seed": "of the shuffle that precedes the split",
    "skip_missing": "leave out records whose image does not exist",
    "test_share": "share of the records without a split that is for testing",
    "val_share": "share of the records without a split that is for validation",
}
USUAL_WORKERS = 4


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status: 0, or 2 after a mistake of the user."""
    print_anything()
    options = vars(_parser().parse_args(arguments))
    work: Callable[..., object] = options.pop("work")
    # so that unfinished files are removed
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        work(**options)
    except VLMoError as error:
        return print_error(error)
    except KeyboardInterrupt:
        print("interrupted: nothing was written", file=sys.stderr)
        return 128 + signal.SIGINT
    finally:
        signal.signal(signal.SIGTERM, before)
    return 0


def _parser() -> argparse.ArgumentParser:
    """One sub-command a data set; its options are the keyword arguments of its `make_arrow`."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = command_parser("vlmo.utils.convert", __doc__)
    commands = parser.add_subparsers(metavar="SET", required=True)
    for name, module in SETS.items():
        summary = (module.__doc__ or "").splitlines()[0]
        command = commands.add_parser(
            name,
            aliases=[ALIASES[name]] if name in ALIASES else [],
            help=summary,
            description=_description(module),
            formatter_class=formatter,
        )
        command.add_argument("root", metavar="ROOT", help="folder of the raw data")
        command.add_argument("out", metavar="OUT", help="folder for the Arrow files: data_root in training")
        for parameter in inspect.signature(module.make_arrow).parameters.values():
            if parameter.kind is parameter.KEYWORD_ONLY:
                _add_option(command, parameter.name, parameter.default)
            if parameter.name == "num_workers":
                text = "what makes the processes; ray: also on other machines (DATA.md says when it is worth it)"
                command.add_argument("--engine", choices=list(ENGINES), default="processes", help=text)
        command.set_defaults(work=partial(_convert, module.make_arrow))
    index = commands.add_parser(
        "index",
        help=(index_sources.__doc__ or "").splitlines()[0],
        description=index_sources.__doc__,
        formatter_class=formatter,
    )
    index.add_argument("sources", metavar="SOURCE", nargs="+", help='as in datasets: "tar:/data/*.tar"')
    for parameter in list(inspect.signature(index_sources.make_indices).parameters.values())[1:]:
        _add_option(index, parameter.name, parameter.default)
    index.set_defaults(work=index_sources.make_indices)
    return parser


def _convert(make_arrow: Callable[..., object], root: str, out: str, engine: str = "", **options: Any) -> None:
    if engine == "ray":
        options["num_workers"] = RayWorkers(options["num_workers"])
    make_arrow(os.path.expanduser(root), out, **options)


def _description(module: ModuleType) -> str:
    layout = getattr(module, "LAYOUT", "")
    return f"{module.__doc__}\nExpected in ROOT:{layout}" if layout else str(module.__doc__)


def _add_option(command: argparse.ArgumentParser, name: str, default: object) -> None:
    flag, text = "--" + name.replace("_", "-"), HELP[name]
    if isinstance(default, bool):
        command.add_argument(flag, action="store_true", help=text)
        return
    if name == "num_workers":
        default = min(USUAL_WORKERS, os.cpu_count() or 1)
    kind = str if default is None else type(default)
    command.add_argument(flag, type=kind, default=default, metavar=kind.__name__.upper(), help=f"{text} ({default})")


if __name__ == "__main__":
    sys.exit(main())
