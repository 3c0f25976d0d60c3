"""An exported folder at work (`vlmo export`): the methods of `Predictor`, computed by another runtime."""

import json
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from vlmo.checkpoints.files import VOCABULARY_FILE
from vlmo.checkpoints.metadata import Metadata
from vlmo.errors import VLMoError
from vlmo.inference.attention_maps import AttentionMap
from vlmo.inference.predictor import Predictor
from vlmo.inference.uses import ComputesBy, bind, find_use
from vlmo.modules.model import VLMoModel

EXPORT_FILE = "export.json"
ENDINGS = {"onnx": ".onnx", "openvino": ".xml", "torch": ".pt2"}  # of the graphs, by format
PACKAGES = {"onnx": "onnxruntime", "openvino": "openvino"}  # that run them

Run = Callable[[Sequence[Tensor]], Tensor]  # a graph's inputs in their order -> its output


def is_export(path: str | Path) -> bool:
    """Tells whether it is a folder that `vlmo export` wrote."""
    return (Path(path).expanduser() / EXPORT_FILE).is_file()


def open_predictor(path: str | Path, threads: int | None = None, **options: Any) -> Predictor:
    """Loads an exported folder, or a checkpoint.

    Args:
        threads: that compute; None: as many as there are cores.
        options: of `Predictor.from_pretrained`; an export takes `batch_size` and `image_decoding` of them.

    Raises:
        VLMoError: if it cannot be loaded, or the package that runs it is not installed.
    """
    if is_export(path):
        return ExportedPredictor(path, threads, **options)
    if threads:
        torch.set_num_threads(threads)
    return Predictor.from_pretrained(path, **options)


class ExportedPredictor(Predictor):
    """Does what `Predictor` does, as far as it was exported, without the weights: the graphs have them.

    Args:
        threads: that compute; None: as many as there are cores.

    Raises:
        VLMoError: if the folder is damaged, or the package that runs it is not installed.
    """

    def __init__(
        self,
        folder: str | Path,
        threads: int | None = None,
        batch_size: int = 16,
        image_decoding: Literal["correct", "original"] = "correct",
    ) -> None:
        folder = Path(folder).expanduser()
        content = read_export(folder)
        model = _outline(folder, content)
        # (a model on the meta device has shapes and heads, and no numbers)
        super().__init__(model, device="meta", batch_size=batch_size, image_decoding=image_decoding)
        self.device = torch.device("cpu")
        for name, value in content["parameters"].items():
            setattr(model, name, nn.Parameter(torch.tensor(value)))
        self._graphs = {
            name: Graph(folder / graph["file"], content["format"], graph["inputs"], threads)
            for name, graph in content["graphs"].items()
        }

    @property
    def offers(self) -> list[str]:
        """Names of the methods that the folder has a graph for."""
        return list(self._graphs)

    def __getattr__(self, name: str) -> Any:
        use = find_use(self.model, name) if "model" in vars(self) else None
        if use is None:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}, and no task offers it")
        self.require_head(use.head, use.purpose)
        return bind(use, self._by_graph(name))

    def embed_images(self, images: Sequence[Any], branch: Literal["v", "vl"] = "v") -> Tensor:
        graph: Any = self._by_graph("embed_images" if branch == "v" else f"embed_images of branch {branch}")
        return Predictor.embed_images(graph, images)

    def embed_texts(self, texts: Sequence[str], branch: Literal["l", "vl"] = "l") -> Tensor:
        graph: Any = self._by_graph("embed_texts" if branch == "l" else f"embed_texts of branch {branch}")
        return Predictor.embed_texts(graph, texts)

    def attention(self, image: Any, text: str, layers: Sequence[int] | None = None) -> AttentionMap:
        raise VLMoError("attention is not exported; ask the checkpoint")

    def _by_graph(self, name: str) -> ComputesBy:
        if name not in self._graphs:
            raise VLMoError(f"{name}: is not among what was exported ({', '.join(self._graphs)}); ask the checkpoint")
        graph = self._graphs[name]
        return ComputesBy(self, lambda _, **columns: self.collect(graph, columns))


class Graph:
    """One exported forward pass: takes a batch, gives a tensor. Threads wait for each other."""

    def __init__(self, path: Path, kind: str, inputs: Sequence[str], threads: int | None = None) -> None:
        if not path.is_file():
            raise VLMoError(f"{path.parent}: lacks {path.name}, which {EXPORT_FILE} names; copy or export it again")
        self.inputs, self._lock = tuple(inputs), threading.Lock()
        try:
            self._run = RUNTIMES[kind](path, self.inputs, threads)
        except ModuleNotFoundError as error:
            raise VLMoError(
                f'{path.parent}: needs {PACKAGES.get(kind, kind)}, which is not installed: pip install "vlmo[export]"'
            ) from error
        except RuntimeError as error:
            reason = next(iter(str(error).splitlines()), "")
            raise VLMoError(f"{path}: cannot be loaded ({reason}); copy or export it again") from error

    def __call__(self, batch: Mapping[str, Tensor]) -> Tensor:
        with self._lock:
            return self._run([batch[name].contiguous() for name in self.inputs])


def _openvino(path: Path, inputs: Sequence[str], threads: int | None) -> Run:
    import openvino

    options: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
    if threads:
        options["INFERENCE_NUM_THREADS"] = threads
    request = openvino.Core().compile_model(path, "CPU", options).create_infer_request()

    def run(tensors: Sequence[Tensor]) -> Tensor:
        named = {name: tensor.numpy() for name, tensor in zip(inputs, tensors, strict=True)}
        return torch.from_numpy(np.array(request.infer(named)[0]))  # (copied: the request's memory is used again)

    return run


def _onnx(path: Path, inputs: Sequence[str], threads: int | None) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or 0
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def run(tensors: Sequence[Tensor]) -> Tensor:
        named = {name: tensor.numpy() for name, tensor in zip(inputs, tensors, strict=True)}
        return torch.from_numpy(session.run(None, named)[0])

    return run


def _torch(path: Path, inputs: Sequence[str], threads: int | None) -> Run:
    if threads:
        torch.set_num_threads(threads)
    module = torch.export.load(path).module()

    def run(tensors: Sequence[Tensor]) -> Tensor:
        with torch.inference_mode():
            return module(*tensors)

    return run


RUNTIMES: dict[str, Callable[[Path, Sequence[str], int | None], Run]] = {
    "onnx": _onnx,
    "openvino": _openvino,
    "torch": _torch,
}


def read_export(folder: Path) -> dict[str, Any]:
    """Reads `export.json`. Raises VLMoError if there is none, or it is damaged."""
    path = folder / EXPORT_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise VLMoError(f"{path}: cannot be read ({error}); copy or export it again") from error
    wanted = {"format": str, "model": dict, "graphs": dict, "parameters": dict}
    wrong = [name for name, kind in wanted.items() if not isinstance(content.get(name), kind)]
    if wrong or content["format"] not in RUNTIMES:
        raise VLMoError(f"{path}: is damaged ({', '.join(wrong) or 'format'}); copy or export it again")
    return content


def _outline(folder: Path, content: Mapping[str, Any]) -> VLMoModel:
    """Builds the model without memory for its weights, with answers and vocabulary."""
    path = folder / VOCABULARY_FILE
    try:
        words = path.read_bytes().decode(errors="replace").removesuffix("\n").split("\n")
    except OSError as error:
        raise VLMoError(f"{path}: cannot be read ({error.strerror}); copy or export it again") from error
    metadata = Metadata.from_dict({**content["model"], "vocabulary": words}, folder / EXPORT_FILE)
    options = {name: value for name, value in metadata.options.items() if name != "loss_names"}
    with torch.device("meta"):
        model = VLMoModel.build(metadata.tasks, options)
    model.answers, model.vocabulary = metadata.answers, metadata.vocabulary
    return model
