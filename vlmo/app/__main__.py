"""A page to try checkpoints and to look at data, in a browser, without any network.

vlmo app --checkpoint CKPT [CKPT ...] [--images FOLDER]
vlmo app --data ROOT --config NAME [option=value ...]        browse the data of a config as the model sees them

Both together also show the hard negatives of a batch. The page is for this machine alone unless --host says otherwise.
Needs the extra `app`: pip install 'vlmo[app]'. See docs/app.md.
"""

import argparse
import importlib.util
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlmo.errors import VLMoError, print_anything, print_error

HOST, PORT = "127.0.0.1", 7860


def parser() -> argparse.ArgumentParser:
    assert __doc__
    made = argparse.ArgumentParser(
        prog="vlmo app", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--checkpoint", nargs="+", default=[], metavar="CKPT", help="files, folders or hub names")
    made.add_argument("--images", metavar="FOLDER", help="images that visitors can search; also the examples")
    made.add_argument("--data", metavar="ROOT", help="folder of the data, as data_root= of run.py")
    made.add_argument("--config", metavar="NAME", help="named config whose data are browsed")
    made.add_argument("options", nargs="*", default=[], metavar="option=value", help="of the config, as of run.py")
    made.add_argument("--host", default=HOST, help=f"address to listen at; default: {HOST}, this machine alone")
    made.add_argument("--port", type=int, default=PORT, help=f"default: {PORT}; 0: any that is free")
    made.add_argument("--device", help="default: the GPU if there is one")
    made.add_argument("--tokenizer", help="vocab.txt, folder or hub name, if the checkpoint has no vocabulary")
    made.add_argument("--answers", metavar="FILE", help="JSON list of answers, if the checkpoint has none")
    made.add_argument("--cache", type=Path, metavar="FOLDER", help="where features of images are kept")
    made.add_argument("--requests-per-minute", type=int, default=60, metavar="N", help="of one visitor; default: 60")
    made.add_argument("--plugins", action="append", default=[], metavar="MODULE", help="can be given several times")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Serves the page until Ctrl-C; returns the exit status: 0, or 2 after a mistake."""
    print_anything()
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.INFO)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    options = parser().parse_intermixed_args(arguments)
    try:
        page = prepare(options)
        from vlmo.app.page import launch

        print(f"http://{options.host}:{options.port}/ (Ctrl-C ends it)", flush=True)
        launch(page, options.host, options.port)
    except VLMoError as error:
        return print_error(error)
    except OSError as error:
        return print_error(
            f"--host {options.host} --port {options.port}: {error.strerror or error}; give another --port"
        )
    return 0


def prepare(options: argparse.Namespace) -> Any:
    """Loads checkpoints and data, and gives the page. Raises VLMoError for what is wrong with the options."""
    if not options.checkpoint and not options.data:
        raise VLMoError("nothing to show: give --checkpoint CKPT, --data ROOT, or both")
    if options.data and not options.config:
        raise VLMoError("--data: give the --config whose data they are, such as --config task_mlm_itm_itc_base")
    if not options.data and (options.config or options.options):
        raise VLMoError("--config and options are for --data ROOT: give it, too")
    if options.images and not Path(options.images).expanduser().is_dir():
        raise VLMoError(f"--images {options.images}: is no folder")
    if importlib.util.find_spec("gradio") is None:
        raise VLMoError("the page needs a package that is not here: pip install 'vlmo[app]' (gradio)")
    from vlmo.app.browser import Browser
    from vlmo.app.examples import painted
    from vlmo.app.image_folder import ImageFolder, cache_folder
    from vlmo.app.limits import Requests
    from vlmo.app.models import LoadedModel, Models
    from vlmo.app.page import Page
    from vlmo.inference.io import image_files

    loading = {"tokenizer": options.tokenizer, "answers": options.answers, "device": options.device}
    models = Models(LoadedModel.load(each, plugins=options.plugins, **loading) for each in options.checkpoint)
    cache = options.cache or cache_folder()
    folders = {}
    if options.images:
        folders = {
            name: ImageFolder(options.images, models.by_name[name].predictor, models.by_name[name].key, cache)
            for name in models.able("search")
        }
    examples = image_files(options.images)[:8] if options.images else painted(cache / "examples")
    browser = Browser(data_settings(options)) if options.data else None
    return Page(models, folders, browser, examples, Requests(options.requests_per_minute))


def data_settings(options: argparse.Namespace) -> Any:
    """The settings of the config whose data are browsed."""
    from vlmo.config import explain, resolve
    from vlmo.settings import Settings

    # isort: split
    from sacred.arg_parser import get_config_updates
    from sacred.utils import SacredError

    updates, named = get_config_updates(options.options)
    fixed = {"data_root": options.data, "num_workers": 0, "num_gpus": 0, "plugins": options.plugins}
    try:
        return Settings.from_config(resolve(options.config, *named, **(updates | fixed)))
    except SacredError as error:
        raise VLMoError(explain(error)) from error


if __name__ == "__main__":
    sys.exit(main())
