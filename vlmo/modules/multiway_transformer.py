"""The multiway transformer under the original's module name, and for `timm.create_model`.

The network itself is in `transformer.py`, which needs no timm (importing that takes longer than importing torch).
"""

from typing import Any

from timm.models import register_model

from vlmo.errors import VLMoError
from vlmo.modules.transformer import ARCHITECTURES, MultiWayTransformer, PatchEmbed, build_transformer

__all__ = ["ARCHITECTURES", "MultiWayTransformer", "PatchEmbed", "build_transformer"]


def _register(name: str) -> None:
    def create(pretrained: bool = False, **kwargs: Any) -> MultiWayTransformer:
        if pretrained:
            raise VLMoError(f"{name}: timm has no weights for it; load a file with VLMoModel.from_pretrained")
        for unused in (
            "pretrained_cfg",
            "pretrained_cfg_overlay",
            "cache_dir",
        ):  # timm hands these to all
            kwargs.pop(unused, None)
        return build_transformer(name, **kwargs)

    create.__name__, create.__module__ = name, __name__  # (by which timm registers it)
    globals()[name] = register_model(create)


for _name in ARCHITECTURES:
    _register(_name)
