"""A whole step of the model under plain DDP in two processes, against one process with the joint batch."""

from typing import Any

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from tests import tiny
from tests.processes import in_processes
from vlmo.distributed.wire_format import from_bytes
from vlmo.modules import VLMo
from vlmo.tasks import itm
from vlmo.training.unused_parameters import exclude_from_ddp

STAGE3 = "task_mlm_itm_itc_base"
LENGTHS = ((6, 9, 12), (12, 6, 9))  # as many masked words on both sides, so that the mean of their means is the mean
PADDED = (16, 24)
DRAW = itm.draw_negatives
OTHER_LOSSES = {
    "siglip": {"contrast_loss": "siglip", "same_image": "mask"},
    "decoupled": {"contrast_loss": "decoupled", "label_smoothing": 0.1, "same_image": "positive"},
}


def hardest(logits: torch.Tensor, *_: object) -> torch.Tensor:
    """In place of the draw: the most similar pair that is not the own."""
    if not len(logits):
        return DRAW(logits)
    return logits.detach().clone().fill_diagonal_(-torch.inf).argmax(dim=1)


def pictures(size: int, seed: int) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return from_bytes(torch.randint(0, 256, (size, 3, 32, 32), generator=draw))


def share(rank: int, sizes: tuple[int, int] = (3, 3)) -> dict[str, Any]:
    size, lengths = sizes[rank], LENGTHS[rank]
    batch = tiny.batch([lengths[row % 3] for row in range(size)], PADDED[rank])
    keys = torch.tensor([[0, 1, 2], [3, 2, 4]][rank][:size])  # an image of both processes, with two texts
    return batch | {"image": pictures(size, rank), "image_key": keys}


def joint(sizes: tuple[int, int] = (3, 3)) -> dict[str, Any]:
    """Both shares as one batch, the texts of the first padded to the length of the second."""
    first, second = share(0, sizes), share(1, sizes)
    batch = {}
    for name in ("image", "text_ids", "text_ids_mlm", "text_masks", "text_labels_mlm", "image_key"):
        left = first[name]
        if name not in ("image", "image_key"):
            value = -100 if name == "text_labels_mlm" else 0
            left = torch.nn.functional.pad(left, (0, PADDED[1] - PADDED[0]), value=value)
        batch[name] = torch.cat([left, second[name]])
    return batch


def model_of(exact: bool, *off: str, **options: Any) -> VLMo:
    torch.manual_seed(0)
    gradient = "exact" if exact else "own"
    return tiny.model(
        STAGE3, contrast_gradient=gradient, loss_names=dict.fromkeys(off, 0), max_text_len=24, **options
    ).train()


def step(model: VLMo, batch: dict[str, Any], parallel: bool) -> dict[str, torch.Tensor]:
    """The gradient of all losses, by parameter."""
    model.zero_grad()
    run = model
    if parallel:
        exclude_from_ddp(model)
        run = DistributedDataParallel(model)
    sum(output.loss for output in run(batch).values()).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def work(rank: int) -> dict[str, Any]:
    itm.draw_negatives = hardest  # (this process is forked: nobody else sees it)
    found = {"exact": step(model_of(True), share(rank), True)}
    found |= {mode: step(model_of(True, same_image=mode), share(rank), True) for mode in ("mask", "positive")}
    found |= {name: step(model_of(True, **options), share(rank), True) for name, options in OTHER_LOSSES.items()}
    for name, sizes in (("unequal siglip", (2, 3)), ("siglip of one", (3, 0))):
        model = model_of(False, "itm", "mlm", contrast_loss="siglip")  # (whose gradient is always exact)
        found[name] = step(model, share(rank, sizes) if sizes[rank] else model.empty_batch(), True)
    found["unequal"] = step(model_of(True, "itm", "mlm"), share(rank, (2, 3)), True)
    found["unequal, own"] = step(model_of(False, "itm", "mlm"), share(rank, (2, 3)), True)
    # several steps of one model, as in training: all images of one process unreadable, a single pair in all, none
    model = model_of(False)
    exclude_from_ddp(model)
    run = DistributedDataParallel(model)
    nothing = model.empty_batch()
    batches = [share(0), nothing], [share(0, (1, 0)), nothing]
    for number, (first, second) in enumerate([*batches, [nothing, nothing]]):
        model.zero_grad()
        losses = {name: output.loss for name, output in run((first, second)[rank]).items()}
        sum(losses.values()).backward()
        found[f"empty {number}"] = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        found[f"losses {number}"] = {name: loss.item() for name, loss in losses.items()}
    return found


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return in_processes(work, tmp_path_factory.mktemp("processes"))


def close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], factor: float = 1.0) -> None:
    assert set(found) == set(expected)
    for name, gradient in expected.items():
        norm = gradient.norm().item()
        assert (found[name] - factor * gradient).norm().item() <= 1e-5 * norm + 1e-9, name


def test_exact_gradients_are_those_of_the_joint_batch(results, monkeypatch):
    monkeypatch.setattr(itm, "draw_negatives", hardest)
    expected = step(model_of(True), joint(), False)
    for result in results:
        close(result["exact"], expected)


@pytest.mark.parametrize("mode", ["mask", "positive"])
def test_one_image_in_two_processes(results, mode, monkeypatch):
    monkeypatch.setattr(itm, "draw_negatives", hardest)
    expected = step(model_of(True, same_image=mode), joint(), False)
    for result in results:
        close(result[mode], expected)
    published = step(model_of(True), joint(), False)
    assert not torch.allclose(expected["itc_text_proj.fc.weight"], published["itc_text_proj.fc.weight"], rtol=1e-3)


@pytest.mark.parametrize("name", OTHER_LOSSES)
def test_other_losses_of_the_contrast(results, name, monkeypatch):
    monkeypatch.setattr(itm, "draw_negatives", hardest)
    expected = step(model_of(True, **OTHER_LOSSES[name]), joint(), False)
    for result in results:
        close(result[name], expected)


def test_siglip_with_shares_of_unequal_size(results):
    model = model_of(True, "itm", "mlm", contrast_loss="siglip")
    for name, batch in (("unequal siglip", joint((2, 3))), ("siglip of one", share(0))):
        expected = step(model, batch, False)
        for result in results:
            close(result[name], expected)


def test_shares_of_unequal_size_and_text_length(results):
    expected = step(model_of(True, "itm", "mlm"), joint((2, 3)), False)
    for result in results:
        close(result["unequal"], expected)
        # as published, each process differentiates its own rows alone and the mean over processes halves the sum
        heads = {name: gradient for name, gradient in expected.items() if name.startswith("itc_")}
        close({name: result["unequal, own"][name] for name in heads}, heads, 0.5)


def test_a_process_without_readable_images_takes_part(results, monkeypatch):
    monkeypatch.setattr(itm, "draw_negatives", hardest)
    expected = step(model_of(False), share(0), False)
    scales = {name: expected.pop(name) for name in ("logit_scale", "logit_vl_scale")}
    for result in results:
        close({name: result["empty 0"].pop(name) for name in scales}, scales)  # every process computes the contrast
        close(result["empty 0"], expected, 0.5)  # the other half of the mean is of nothing
    assert results[1]["losses 0"]["itm"] == results[1]["losses 0"]["mlm"] == 0
    assert results[1]["losses 0"]["itc"] == pytest.approx(results[0]["losses 0"]["itc"])  # (computed over all rows)


def test_one_pair_in_all_and_none_at_all(results):
    trained = {name for name, _ in model_of(False).trained_parameters()}
    for number in (1, 2):
        assert results[0][f"losses {number}"]["itm"] == 0
        for result in results:
            assert set(result[f"empty {number}"]) == trained
            assert all(gradient.isfinite().all() for gradient in result[f"empty {number}"].values())
    assert not any(gradient.any() for gradient in results[0]["empty 2"].values())
