"""Which weights no loss of a run uses.

They get no gradient, ever: data parallelism must not wait for one, and no optimizer that takes a missing gradient for
zeros (as sharded ones do) may decay them.
"""

from torch.nn.parallel import DistributedDataParallel

from vlmo.modules.model import VLMoModel


def unused_parameters(model: VLMoModel) -> set[str]:
    """Gives the names of the parameters that no task of the model runs through, by the tasks' `paths`."""
    paths = {path for task in model.tasks for path in task.paths}
    names = {name for name, _ in model.named_parameters()}
    absent: list[str] = []
    if model.transformer.relative_positions:
        absent.append("text_embeddings.position_embeddings.")  # kept for the names of released files
    if "pooler" not in paths:
        absent.append("pooler.")
    if not {"image", "pair"} & paths:
        absent += ["transformer.cls_token", "transformer.pos_embed", "transformer.patch_embed."]
    for i in range(model.transformer.depth):
        pair = "pair" in paths
        below = i < model.transformer.vl_start
        reached = {
            "text": "text" in paths or (pair and below),
            "imag": "image" in paths or (pair and below),
            "vl": "vl branch" in paths or (pair and not below),
        }
        experts = [expert for expert, used in reached.items() if not used]
        absent += [f"transformer.blocks.{i}.{part}_{expert}." for expert in experts for part in ("norm2", "mlp")]
    return {name for name in names if name.startswith(tuple(absent))}


def exclude_from_ddp(model: VLMoModel) -> None:
    """Tells DDP which weights it need not wait for, and the buffers, which are constants.

    (With `find_unused_parameters` it would look for them anew in every step; frozen they would leave the published
    parameter groups; with zeros for gradients they would decay.)
    """
    names = [*unused_parameters(model), *(name for name, _ in model.named_buffers())]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)
