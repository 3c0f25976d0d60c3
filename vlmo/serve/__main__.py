"""Answer requests over HTTP with a checkpoint, or with a folder of `vlmo export`.

python -m vlmo.serve CKPT_OR_EXPORT [--port 8000]

    curl localhost:8000/health                   what there is
    curl localhost:8000/metrics                  counts, for Prometheus
    echo "{\\"image\\": \\"$(base64 -w0 a.jpg)\\", \\"question\\": \\"what is it?\\"}" |
        curl localhost:8000/answer -d @-

POST /embed/image, /embed/text and one endpoint for each thing that the checkpoint's tasks offer (answer, match, ...): a
JSON object with the inputs, images in base64; one comes back with the result, or with {"error": ...}. Requests
that come together are computed together. The server listens to this machine alone unless --host says otherwise; it
knows no users and no encryption, for which a proxy stands before it.
"""

import contextlib
import logging
import socket
import sys
from collections.abc import Sequence
from importlib.util import find_spec

from vlmo import plugins
from vlmo.errors import VLMoError, command_parser, print_anything, print_error
from vlmo.inference.exported import is_export, open_predictor
from vlmo.serve.app import Limits, create_app

GRACE = 30  # seconds that requests have to come to their end when the server is stopped


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line until it is interrupted; returns the exit status: 0, or 2 after a mistake of the user."""
    print_anything()
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    limits = Limits()
    parser = command_parser("vlmo.serve", __doc__)
    parser.add_argument("model", metavar="CKPT_OR_EXPORT", help="file, folder or name on the hub")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen to (127.0.0.1; 0.0.0.0: all)")
    parser.add_argument("--port", type=int, default=8000, help="(8000; 0: any that is free)")
    parser.add_argument("--batch-size", type=int, default=limits.batch_size, help="most requests of a batch")
    parser.add_argument("--wait-ms", type=float, default=1000 * limits.wait, help="that a request waits for others")
    parser.add_argument("--queue", type=int, default=limits.queue, help="requests that may wait; then 429")
    parser.add_argument("--max-body", type=int, default=limits.body, help="bytes of a request; more: 413")
    parser.add_argument("--max-pixels", type=int, default=limits.pixels, help="of an image; more: 413")
    parser.add_argument("--threads", type=int, help="that compute (all cores)")
    parser.add_argument("--tokenizer", help="vocab.txt, folder or hub name, if a checkpoint has no vocabulary")
    parser.add_argument("--answers", help="JSON list of the answers, if a checkpoint has none")
    parser.add_argument("--plugins", action="append", default=[], metavar="MODULE", help="can be given several times")
    options = parser.parse_args(arguments)
    try:
        require_packages()
        with bound(options.host, options.port) as listener:
            plugins.load(options.plugins)
            names = {} if is_export(options.model) else {"tokenizer": options.tokenizer, "answers": options.answers}
            predictor = open_predictor(options.model, options.threads, batch_size=options.batch_size, **names)
            if not predictor.offers:
                raise VLMoError(f"{options.model}: has no head to serve")
            wait = options.wait_ms / 1000
            limits = Limits(options.max_body, options.max_pixels, options.queue, options.batch_size, wait)
            app = create_app(predictor, limits)
            import uvicorn

            config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=GRACE)
            listener.listen()
            print(f"http://{options.host}:{listener.getsockname()[1]}: {', '.join(predictor.offers)}", flush=True)
            with contextlib.suppress(KeyboardInterrupt):
                uvicorn.Server(config).run([listener])
    except VLMoError as error:
        return print_error(error)
    return 0


def require_packages() -> None:
    """Raises VLMoError if a package that serving needs is not installed."""
    missing = [name for name in ("fastapi", "uvicorn") if find_spec(name) is None]
    if missing:
        raise VLMoError(f'serving needs {", ".join(missing)}, not installed: pip install "vlmo[serve]"')


def bound(host: str, port: int) -> socket.socket:
    """Takes an address, before a model is loaded. Raises VLMoError if it is another's, or there is none."""
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except (OSError, OverflowError) as error:
        listener.close()
        raise VLMoError(f"--host {host} --port {port}: cannot be listened to ({error}); give another") from error
    return listener


if __name__ == "__main__":
    sys.exit(main())
