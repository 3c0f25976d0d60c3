"""Graphs as files, and their INT8 versions."""

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from vlmo.errors import VLMoError

ONE_FILE = 1 << 30  # bytes of weights above which an ONNX file has them beside it (it cannot hold 2 GiB)
ATTENTION: Any = torch.ops.aten.scaled_dot_product_attention.default


def write_torch(graph: ExportedProgram, inputs: Sequence[str], image_size: int, path: Path) -> None:
    """Writes what `torch.export.load` reads."""
    torch.export.save(graph, path)


def write_onnx(graph: ExportedProgram, inputs: Sequence[str], image_size: int, path: Path) -> None:
    """Writes an ONNX file; above 1 GiB the weights lie beside it."""
    size = sum(tensor.nbytes for tensor in graph.state_dict.values())
    plain = graph.run_decompositions({ATTENTION: plain_attention})
    torch.onnx.export(
        plain, (), path, input_names=list(inputs), output_names=["output"], dynamo=True, verbose=False,
        external_data=size > ONE_FILE,
    )  # fmt: skip


def plain_attention(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, *_: Any, scale: float | None = None
) -> Tensor:
    """Attends by the formula: the converter to ONNX trips over the memory layout that the fused kernel gives."""
    scores = (q * (q.shape[-1] ** -0.5 if scale is None else scale)) @ k.transpose(-1, -2)
    return (scores if attn_mask is None else scores + attn_mask).softmax(dim=-1) @ v


def write_openvino(graph: ExportedProgram, inputs: Sequence[str], image_size: int, path: Path) -> None:
    """Writes OpenVINO's .xml, and the weights, float32, as .bin beside it."""
    import openvino

    model = openvino.convert_model(graph)
    for port, name in zip(model.inputs, inputs, strict=True):
        port.get_tensor().set_names({name})
        if name.startswith("image"):
            port.get_node().set_partial_shape(openvino.PartialShape([-1, 3, image_size, image_size]))
    model.validate_nodes_and_infer_types()
    openvino.save_model(model, path, compress_to_fp16=False)


WRITERS: dict[str, Callable[[ExportedProgram, Sequence[str], int, Path], None]] = {
    "onnx": write_onnx,
    "openvino": write_openvino,
    "torch": write_torch,
}


# --- INT8 -------------------------------------------------------------------------------------------------------------


def quantize_openvino(path: Path, batches: Sequence[Sequence[Tensor]]) -> None:
    """Has weights and activations of the matrix products as INT8, the latter in ranges that the batches show (NNCF)."""
    import logging

    import nncf
    import openvino

    logging.getLogger("nncf").setLevel(logging.ERROR)
    model = openvino.Core().read_model(path)
    samples = nncf.Dataset([[tensor.numpy() for tensor in batch] for batch in batches])
    model = nncf.quantize(
        model, samples, subset_size=len(batches), model_type=nncf.ModelType.TRANSFORMER,
        preset=nncf.QuantizationPreset.MIXED, fast_bias_correction=True,
    )  # fmt: skip
    _replace(path, lambda new: openvino.save_model(model, new))


def quantize_onnx(path: Path, batches: Sequence[Sequence[Tensor]]) -> None:
    """Has the weights of the matrix products as INT8; activations get their ranges from each batch as it runs."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    _replace(path, lambda new: quantize_dynamic(path, new, per_channel=True, weight_type=QuantType.QInt8))


def _replace(path: Path, write: Callable[[Path], None]) -> None:
    new = path.with_name(f"int8_{path.name}")
    write(new)
    path.with_suffix(".onnx.data").unlink(missing_ok=True)
    if new.with_suffix(".bin").exists():
        new.with_suffix(".bin").replace(path.with_suffix(".bin"))
    new.replace(path)


QUANTIZERS: dict[str, Callable[[Path, Sequence[Sequence[Tensor]]], None]] = {
    "onnx": quantize_onnx,
    "openvino": quantize_openvino,
}


def require_packages(kind: str, int8: bool) -> None:
    """Raises VLMoError if a package that a format needs is not installed."""
    needed = {"onnx": ["onnx", "onnxscript", "onnxruntime"], "openvino": ["openvino"], "torch": []}[kind]
    if int8 and kind == "openvino":
        needed.append("nncf")
    missing = [name for name in needed if find_spec(name) is None]
    if missing:
        raise VLMoError(f'--format {kind}: needs {", ".join(missing)}, not installed: pip install "vlmo[export]"')
    if int8 and kind not in QUANTIZERS:
        raise VLMoError(f"--int8: is for --format {' and '.join(QUANTIZERS)}, not {kind}")
