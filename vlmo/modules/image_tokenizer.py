"""Visual tokens of images: the encoder of DALL-E's discrete variational autoencoder, from its published file.

The architecture (Ramesh et al. 2021, arXiv 2102.12092, appendix A): a 7 x 7 convolution, four groups of two residual
blocks with 1, 2, 4 and 8 times the width and a halving of the picture after the first three, and a 1 x 1 convolution to
one score for each code. Another tokenizer is another module with `visual_tokens`.
"""

from collections import OrderedDict
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmo.errors import VLMoError

NUM_CODES = 8192  # of the published tokenizer
GROUPS = 4
SCALE = 2 ** (GROUPS - 1)  # pixels a side that one token stands for
MARGIN = 0.1  # pixels of [0, 1] are moved to [0.1, 0.9], where the autoencoder's distribution is defined


class _Conv(nn.Module):
    """A convolution that keeps the size; `w` and `b` are the file's names."""

    def __init__(self, inputs: int, outputs: int, kernel: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(outputs, inputs, kernel, kernel))
        self.b = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.w, self.b, padding=self.w.shape[-1] // 2)


class _ResidualBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, gain: float) -> None:
        super().__init__()
        self.gain = gain
        self.id_path = _Conv(inputs, outputs, 1) if inputs != outputs else nn.Identity()
        channels, steps = [inputs, *[outputs // 4] * 3, outputs], OrderedDict[str, nn.Module]()
        for number, kernel in enumerate((3, 3, 3, 1), 1):
            steps[f"relu_{number}"] = nn.ReLU()
            steps[f"conv_{number}"] = _Conv(channels[number - 1], channels[number], kernel)
        self.res_path = nn.Sequential(steps)

    def forward(self, x: Tensor) -> Tensor:
        return self.id_path(x) + self.gain * self.res_path(x)


class DalleEncoder(nn.Module):
    """Frozen; parameter names are those of the published file.

    Args:
        width: channels of the first group (256 in the published file).
        blocks: residual blocks a group (2).
        codes: size of the codebook (8192).
    """

    def __init__(self, width: int = 256, blocks: int = 2, codes: int = NUM_CODES) -> None:
        super().__init__()
        layers = OrderedDict[str, nn.Module](input=_Conv(3, width, 7))
        channels = width
        for group in range(GROUPS):
            parts = OrderedDict[str, nn.Module]()
            for number in range(1, blocks + 1):
                parts[f"block_{number}"] = _ResidualBlock(channels, width * 2**group, 1 / (GROUPS * blocks) ** 2)
                channels = width * 2**group
            if group < GROUPS - 1:
                parts["pool"] = nn.MaxPool2d(2)
            layers[f"group_{group + 1}"] = nn.Sequential(parts)
        layers["output"] = nn.Sequential(OrderedDict(relu=nn.ReLU(), conv=_Conv(channels, codes, 1)))
        self.blocks = nn.Sequential(layers)
        self.requires_grad_(False)

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> "DalleEncoder":
        """Builds the encoder that has these weights. Raises VLMoError if they are another network's."""
        try:
            width, codes = len(tensors["blocks.input.w"]), len(tensors["blocks.output.conv.w"])
            blocks = len({name.split(".")[2] for name in tensors if name.startswith("blocks.group_1.block_")})
            with torch.device("meta"):
                encoder = cls(width, blocks, codes)
            encoder.load_state_dict({name: tensor.float() for name, tensor in tensors.items()}, assign=True)
        except (KeyError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            raise VLMoError(f"is not the encoder of DALL-E's tokenizer ({reason})") from error
        if codes > NUM_CODES:
            raise VLMoError(f"has {codes} codes, and the model predicts {NUM_CODES}")
        return encoder.requires_grad_(False).eval()

    def forward(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) of [0, 1] -> (B, codes, H / 8, W / 8): scores of the codes."""
        return self.blocks((1 - 2 * MARGIN) * image + MARGIN)

    @torch.no_grad()
    def visual_tokens(self, image: Tensor, window: int) -> Tensor:
        """The best code of each patch.

        The tokenizer sees the same view as the model, at 8 pixels a patch side (BEiT: 112 px for 14 x 14 tokens).

        Args:
            image: (B, 3, S, S), normalised for the model: in [-1, 1].
            window: patches a side.

        Returns:
            (B, window^2) int64
        """
        size = (SCALE * window, SCALE * window)
        image = F.interpolate(image.float() / 2 + 0.5, size, mode="bicubic", antialias=True).clamp(0, 1)
        return self(image).argmax(1).flatten(1)
