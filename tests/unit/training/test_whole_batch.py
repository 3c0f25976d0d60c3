"""The cached contrast gives the losses and gradients of one pass over the whole batch, in one process and in two."""

import multiprocessing
import traceback

import pytest
import torch

from tests import tiny
from vlmo.distributed.wire_format import from_bytes
from vlmo.tasks.base import BatchSize, Step, num_samples
from vlmo.tasks.itm import same_chunk
from vlmo.training import whole_batch

TASKS = {"irtr": "task_finetune_irtr_coco_base_image384", "itc": "task_mlm_itm_itc_base"}
PAIRS, CHUNK = 64, 4


def model_of(*losses, **updates):
    off = dict.fromkeys(("mlm", "itm", "itc", "irtr"), 0)
    sizes = {"batch_size": PAIRS, "per_gpu_batchsize": CHUNK, "loss_names": off | dict.fromkeys(losses, 1)}
    torch.manual_seed(1)
    model = tiny.model(TASKS.get(losses[-1]), **sizes | updates)
    model.log = model.log_dict = lambda *_, **__: None  # there is no trainer
    return model.train()


def pairs(number=PAIRS):
    """Texts of 3 to 12 tokens."""
    return tiny.batch([3 + (5 * row) % 10 for row in range(number)], 16)


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def cached(batch, *losses, seed=0, **updates):
    """Contrast's loss, all losses, gradients."""
    model = model_of(*losses, contrast_cache=True, **updates)
    torch.manual_seed(seed)
    model.backward(model.training_step(batch, 0))
    means = model.metrics.compute_step(model.device)
    return {name: means[name, "loss"] for name in losses if num_samples(batch)}, gradients(model)


def at_once(batch, *losses, seed=0, **updates):
    model = model_of(*losses, **updates)
    torch.manual_seed(seed)
    outputs = model(batch)
    sum(output.loss for output in outputs.values()).backward()
    return {name: output.loss.detach() for name, output in outputs.items()}, gradients(model)


def assert_same(one, other):
    losses, found = one
    expected_losses, expected = other
    assert losses.keys() == expected_losses.keys()
    for name, loss in losses.items():
        assert loss.item() == pytest.approx(expected_losses[name].item(), rel=1e-5), name
    assert found.keys() == expected.keys()
    # rounding in a tensor's small entries is that of its large ones
    for name, gradient in found.items():
        assert (gradient - expected[name]).norm() <= 1e-5 * expected[name].norm() + 1e-9, name


@pytest.mark.parametrize("name", ["irtr", "itc"])
def test_as_one_pass_over_all(name):
    assert_same(cached(pairs(), name), at_once(pairs(), name))


@pytest.mark.parametrize("losses", [("mlm", "itc"), ("itm", "itc"), ("mlm", "itm", "itc")])
def test_the_other_losses_of_stage_3(losses):
    # the negatives are the only random numbers here, and both draw them of all pairs
    assert_same(cached(pairs(), *losses), at_once(pairs(), *losses))


def test_images_that_are_bytes_become_pixels_chunk_by_chunk():
    batch, losses = pairs(), ("mlm", "itm", "itc")
    levels = torch.randint(0, 256, batch["image"].shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    found = cached(batch | {"image": levels, "images_are_bytes": True}, *losses)
    assert_same(found, cached(batch | {"image": from_bytes(levels)}, *losses))


@pytest.mark.parametrize("mode", ["mask", "positive"])
def test_captions_of_one_image_in_different_chunks(mode):
    batch = pairs() | {"image_key": torch.arange(PAIRS) % 51}  # (with another text)
    losses = ("mlm", "itm", "itc")
    assert_same(cached(batch, *losses, same_image=mode), at_once(batch, *losses, same_image=mode))
    assert cached(batch, "itc", same_image=mode)[0] != cached(batch, "itc")[0]


@pytest.mark.parametrize("loss", ["siglip", "decoupled"])
def test_other_losses_of_the_contrast(loss):
    batch = pairs() | {"image_key": torch.arange(PAIRS) % 51}
    options = {"contrast_loss": loss, "same_image": "mask", "label_smoothing": 0.1 * (loss != "siglip")}
    assert_same(cached(batch, "itm", "irtr", **options), at_once(batch, "itm", "irtr", **options))


def test_a_batch_that_lost_unreadable_images():
    assert_same(cached(pairs(49), "mlm", "itm", "itc"), at_once(pairs(49), "mlm", "itm", "itc"))


@pytest.mark.parametrize("name", ["irtr", "itc"])
def test_dropout_and_stochastic_depth_leave_out_the_same_in_both_passes(name):
    batch = pairs()
    loss, found = cached(batch, name, drop_path_rate=0.3)
    model = model_of(name, drop_path_rate=0.3)
    torch.manual_seed(0)
    (task,) = model.tasks
    steps = [Step(chunk, model.heads, training=True) for chunk in whole_batch.chunks(batch, CHUNK)]
    features = [task.features(step, model.encode(task.requests(step))) for step in steps]  # one graph
    joined = {key: torch.cat([each[key] for each in features]) for key in features[0]}
    sizes = [BatchSize(PAIRS, batch["text_ids"].shape[1], 0)]
    output = task.compare(Step(batch, model.heads, training=True, sizes=sizes), joined)
    output.loss.backward()
    assert_same((loss, found), ({name: output.loss.detach()}, gradients(model)))
    assert loss[name] != cached(batch, name, seed=1, drop_path_rate=0.3)[0][name]


def test_random_numbers_go_on_after_the_replay():
    model = model_of("irtr", contrast_cache=True, drop_path_rate=0.3)
    loss = model.training_step(pairs(), 0)
    before = torch.get_rng_state()
    model.backward(loss)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_loss_that_the_precision_scales():
    model = model_of("mlm", "itc", contrast_cache=True)
    loss = model.training_step(pairs(), 0)
    model.backward(loss * 1024)
    expected = at_once(pairs(), "mlm", "itc")[1]
    for name, gradient in gradients(model).items():
        assert (gradient / 1024 - expected[name]).norm() <= 1e-5 * expected[name].norm() + 1e-9, name


def test_weights_of_the_losses():
    model = model_of("itc", contrast_cache=True, loss_names={"itc": 0.5, "itm": 0, "mlm": 0})
    loss = model.training_step(pairs(), 0)
    assert loss.item() == pytest.approx(0.5 * at_once(pairs(), "itc")[0]["itc"].item(), rel=1e-5)


def test_local_negatives_come_from_the_same_pass():
    near = same_chunk(5, 2, torch.device("cpu"))
    assert near.tolist() == [
        [True, True, False, False, False],
        [True, True, False, False, False],
        [False, False, True, True, False],
        [False, False, True, True, False],
        [True, True, True, True, True],  # the last is alone in its pass
    ]
    model = model_of("itm", "itc", contrast_cache=True, negatives="local", batch_size=8)
    batch = pairs(8)
    model.training_step(batch, 0)
    images = model.whole_batch.first.batch["negative_image"]
    drawn = [next(i for i in range(8) if torch.equal(batch["image"][i], image)) for image in images]
    assert all(other != own and other // CHUNK == own // CHUNK for own, other in enumerate(drawn))


# --- two processes ----------------------------------------------------------------------------------------------------

EXACT = {"contrast_gradient": "exact"}
SHARES = (slice(0, 10), slice(10, 16))  # images that cannot be read make batches of different sizes


def share(batch, rank):
    return {name: value[SHARES[rank]] for name, value in batch.items()}


def work(rank, folder):
    try:
        torch.set_num_threads(1)  # the threads of the parent do not exist in a forked process
        torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
        result = {name: cached(share(pairs(16), rank), name, **EXACT) for name in ("irtr", "itc")}
        result["own"] = cached(share(pairs(16), rank), "itc")
        result["own at once"] = at_once(share(pairs(16), rank), "itc")
        some = {name: value[: (16, 0)[rank]] for name, value in pairs(16).items()}
        result |= {f"{name} of one": cached(some, name, **EXACT) for name in ("irtr", "itc")}
        # (what it logs is of the own pairs, which the metrics bring together: here each process has its own)
        result["siglip"] = cached(share(pairs(16), rank), "irtr", contrast_loss="siglip", layout_invariant=True)
        result["itm"] = cached(share(pairs(16), rank), "mlm", "itm", "itc")
        torch.save(result, folder / f"{rank}.pt")
        torch.distributed.destroy_process_group()
    except Exception:
        (folder / f"{rank}.txt").write_text(traceback.format_exc())


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=work, args=(rank, folder)) for rank in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    for failure in folder.glob("*.txt"):
        pytest.fail(failure.read_text())
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


@pytest.mark.parametrize("name", ["irtr", "itc"])
def test_two_processes_as_one(results, name):
    expected = at_once(pairs(16), name)
    for result in results:
        assert_same(result[name], expected)


@pytest.mark.parametrize("name", ["irtr", "itc"])
def test_two_processes_of_which_one_could_read_no_image(results, name):
    expected = at_once(pairs(16), name)
    assert_same(results[0][f"{name} of one"], expected)
    assert_same(results[1][f"{name} of one"], ({}, expected[1]))


def test_two_processes_with_the_published_gradient(results):
    parts = [result["own at once"][1] for result in results]
    mean = {name: sum(part[name] for part in parts) / 2 for name in parts[0]}
    for result in results:
        assert_same(result["own"], (result["own at once"][0], mean))


def test_two_processes_with_siglip_whatever_the_layout(results):
    expected = at_once(pairs(16), "irtr", contrast_loss="siglip")
    for result in results:
        assert_same(result["siglip"], expected)


def test_two_processes_with_all_losses_of_stage_3(results):
    gradients = [result["itm"][1] for result in results]
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(gradient, gradients[1][name]) for name, gradient in gradients[0].items())
    whole = at_once(pairs(16), "mlm", "itm", "itc")[0]["itc"].item()
    assert results[0]["itm"][0]["itc"].item() == pytest.approx(whole, rel=1e-5)
