"""Masked language modelling on text alone (stage 2; paper: Stagewise Pre-Training)."""

from typing import Any

from vlmo.batch import FIELDS
from vlmo.modules.model import Encode
from vlmo.registry import TASKS
from vlmo.tasks.base import Step
from vlmo.tasks.mlm import MaskedTokens, located_tokens


@TASKS.register("textmlm")
class TextMLM(MaskedTokens):
    """Tokens of a text from the rest of it, through the language experts; the shared attention stays as it is."""

    name = "textmlm"
    stage = 2
    alone = True
    reads = frozenset({"text"})
    datasets = frozenset({"wikibk"})
    experts = ("text",)
    paths = ("text",)
    # the shared attention and the vision experts keep what stage 1 learnt
    trains = (
        "text_embeddings",
        "token_type_embeddings",
        "mlp_text",
        "norm2_text",
        "mlm_score",
        "relative_position_bias_table",
        "transformer.norm",
    )
    fields = {name: FIELDS[name] for name in ("text_ids_mlm", "text_masks", "text_labels_mlm")}
    weight = 1.0

    @classmethod
    def check(cls, settings: Any) -> list[str]:
        if not settings.shared_ffn:
            return []
        return ["shared_ffn=True: stage 2 trains the language experts, and without experts there are none"]

    def requests(self, step: Step) -> list[Encode]:
        batch = step.batch
        positions = located_tokens(batch)["masked_positions"]
        return [Encode(text_ids=batch["text_ids_mlm"], text_masks=batch["text_masks"], positions=positions)]
