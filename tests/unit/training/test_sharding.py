"""What sharding makes of a model, in two processes; and the private names of torch that it builds upon."""

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, OffloadPolicy
from torch.distributed.tensor import DTensor

from tests import tiny
from tests.processes import in_processes
from vlmo.training.sharding import ScalarsAsVectors, WholeInEvaluation, shard
from vlmo.training.unused_parameters import unused_parameters


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.weight = nn.Parameter(torch.ones(3))


def test_scalars_are_vectors_in_memory_alone():
    module = Scaled()
    ScalarsAsVectors(module)
    assert module.scale.shape == (1,) and module.weight.shape == (3,)
    saved = module.state_dict()
    assert saved["scale"].shape == () and saved["scale"] == 2
    module.load_state_dict({"scale": torch.tensor(5.0), "weight": torch.zeros(3)})
    assert module.scale.shape == (1,) and module.scale.item() == 5


def test_without_scalars_nothing_is_changed():
    module = nn.Linear(2, 2)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    ScalarsAsVectors(module)
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


def sharded_model(named):
    torch.manual_seed(0)
    model = tiny.model(named, datasets=["wikibk" if "text" in named else "coco"])
    whole = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    ScalarsAsVectors(model)
    shard(model, init_device_mesh("cpu", (2,)), OffloadPolicy())
    return model, whole


def test_an_evaluation_has_all_weights_whole_and_shares_them_out_again(tmp_path):
    def work(rank):
        model, whole = sharded_model("task_mlm_itm_itc_base")
        evaluation, seen = WholeInEvaluation(), []
        for _ in range(2):
            evaluation.on_validation_start(None, model)
            if rank:  # the other process computes nothing
                with torch.no_grad():
                    model.encode_image(tiny.batch()["image"])
            seen.append(all(torch.equal(p.reshape(whole[n].shape), whole[n]) for n, p in model.named_parameters()))
            evaluation.on_validation_end(None, model)
            parts = dict(model.named_parameters())
            seen.append(all(isinstance(part, DTensor) for part in parts.values()))
            seen.append(sum(part.to_local().numel() for part in parts.values()))
        return seen, sum(each.numel() for each in whole.values())

    for seen, size in in_processes(work, tmp_path):
        assert seen[0] and seen[1] and seen[3] and seen[4]
        assert seen[2] == seen[5] and 0.4 < seen[2] / size < 0.6


def test_what_no_loss_reaches_is_never_gathered(tmp_path):
    def work(rank):
        model, _ = sharded_model("task_textmlm_base")
        unreached = [name for name in unused_parameters(model) if "cls_token" not in name]
        reached = {name for name, _ in model.named_parameters() if "mlp_text" in name}
        model.train()
        outputs = model(tiny.batch())  # (the blocks have shared out theirs again; what is at the root is whole)
        gathered = {n for n, p in model.named_parameters() if not isinstance(p, DTensor)}
        sum(output.loss for output in outputs.values()).backward()
        gradients = {name for name, p in model.named_parameters() if p.grad is not None}
        return len(unreached), gathered & set(unreached), reached <= gradients | gathered

    for unreached, gathered, trained in in_processes(work, tmp_path):
        assert unreached and not gathered and trained


def test_an_infinite_gradient_in_one_part_is_seen_by_the_scaler_of_all(tmp_path):
    def work(rank):
        model, _ = sharded_model("task_textmlm_base")
        parameters = [p for _, p in model.trained_parameters()]
        optimizer, scaler = torch.optim.SGD(parameters, lr=1.0), torch.amp.GradScaler("cpu", init_scale=2.0)
        scaler.scale(torch.zeros(()))
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        if rank:
            parameters[0].grad.to_local().fill_(float("inf"))
        scaler.step(optimizer)
        scaler.update()
        return scaler.get_scale()

    assert in_processes(work, tmp_path) == [1.0, 1.0]


def test_private_names_of_torch(tmp_path):
    def work(rank):
        model, _ = sharded_model("task_textmlm_base")
        state = model._get_fsdp_state() if isinstance(model, FSDPModule) else None
        ends = hasattr(model, "reset_iter_state") or hasattr(state, "_root_post_backward_final_callback")
        return [hasattr(state, "_lazy_init"), ends]

    assert in_processes(work, tmp_path) == [[True, True]] * 2, "vlmo/training/sharding.py calls these of FSDP2's state"
