"""What a model computes for each of its uses, as modules of their own, and as graphs for any batch and text length.

The forward passes are the uses' own: a method of `Predictor` is called with a `compute` that takes the function which
the method hands it, and computes nothing.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, export

from vlmo.errors import VLMoError
from vlmo.inference.predictor import Predictor
from vlmo.inference.uses import ComputesBy, bind, uses_of

EXAMPLE = 2, 6  # samples and tokens that a graph is made with
EMBEDDINGS: dict[str, tuple[str, ...]] = {"embed_images": ("image",), "embed_texts": ("text",)}
PLACEHOLDER = "a"  # of an input that nothing is computed of


class _Asked(Exception):
    """What a method asked `compute` for."""

    def __init__(self, function: Callable[..., Tensor], columns: dict[str, Any]) -> None:
        super().__init__()
        self.function = function
        self.columns = {name: values for name, values in columns.items() if values is not None}


class ForwardPass(nn.Module):
    """What the method `name` of a predictor computes of a batch.

    Attributes:
        inputs: fields of the batch, in the order of the arguments.
    """

    def __init__(self, name: str, model: nn.Module, function: Callable[..., Tensor], columns: Sequence[str]) -> None:
        super().__init__()
        self.name, self.model, self.function = name, model, function
        fields = [[each] if each.startswith("image") else [f"{each}_ids", f"{each}_masks"] for each in columns]
        self.inputs = tuple(field for column in fields for field in column)

    def forward(self, *tensors: Tensor) -> Tensor:
        return self.function(self.model, dict(zip(self.inputs, tensors, strict=True)))

    def example(self, samples: int = EXAMPLE[0], text_len: int = EXAMPLE[1]) -> tuple[Tensor, ...]:
        """Makes random inputs; the last token of every second text is padding."""
        model: Any = self.model
        size, tensors = model.image_size, []
        for name in self.inputs:
            if name.startswith("image"):
                tensors.append(2 * torch.rand(samples, 3, size, size) - 1)
            elif name.endswith("_ids"):
                tensors.append(torch.randint(1, model.vocab_size, (samples, text_len)))
            else:
                mask = torch.ones(samples, text_len, dtype=torch.long)
                mask[1::2, -1] = 0
                tensors.append(mask)
        return tuple(tensors)

    @torch.no_grad()
    def graph(self) -> ExportedProgram:
        """Exports it, for any number of samples and, to the model's longest text, tokens."""
        samples, tokens = Dim("samples", min=1), Dim("tokens", min=2, max=self.model.max_text_len)  # type: ignore[arg-type]
        shapes = tuple({0: samples} if name.startswith("image") else {0: samples, 1: tokens} for name in self.inputs)
        return export(self, self.example(), dynamic_shapes={"tensors": shapes}, strict=False)


def columns_of(predictor: Predictor) -> dict[str, tuple[str, ...]]:
    """Gives, for each method that the model has the head for, the columns of a row that it takes.

    What takes optional inputs is not among them: it has several forward passes.
    """
    uses = uses_of(predictor.model)
    found = {name: uses[name].columns if name in uses else EMBEDDINGS[name] for name in predictor.offers}
    return {name: columns for name, columns in found.items() if name not in uses or not uses[name].optional}


def asked_of(
    predictor: Predictor, name: str, inputs: Mapping[str, Any]
) -> tuple[Callable[..., Tensor], dict[str, Any]]:
    """Gives the function that a method computes by, and the columns that it computes it of (see `Predictor.compute`).

    Raises:
        VLMoError: if the checkpoint lacks what the method needs, such as the names of its answers.
    """

    def compute(function: Callable[..., Tensor], **columns: Any) -> Tensor:
        raise _Asked(function, columns)

    listener: Any = ComputesBy(predictor, compute)
    uses = uses_of(predictor.model)
    try:
        if name in uses:
            bind(uses[name], listener)(**inputs)
        else:
            getattr(Predictor, name)(listener, *inputs.values())
    except _Asked as asked:
        return asked.function, asked.columns
    raise VLMoError(f"{name}: computes nothing of a batch, so that there is nothing to export")


def forward_passes(predictor: Predictor) -> tuple[list[ForwardPass], list[str]]:
    """Gives the forward passes of all that the model can be used for, and a line for each that is left out.

    Raises:
        VLMoError: if there are none.
    """
    found, left_out = [], []
    for name, columns in columns_of(predictor).items():
        try:
            function, computed = asked_of(predictor, name, {column: [PLACEHOLDER] for column in columns})
            found.append(ForwardPass(name, predictor.model, function, list(computed)).eval())
        except VLMoError as error:
            left_out.append(f"{name}: left out, {error}")
    if not found:
        tasks = ", ".join(task.name for task in predictor.model.tasks)
        raise VLMoError("\n".join([f"nothing to export: the checkpoint ({tasks}) has no head for it", *left_out]))
    return found, left_out
