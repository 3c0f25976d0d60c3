"""The transformer against plain formulas, and its sizes."""

import pytest
import timm
import torch
import torch.nn.functional as F

from vlmo.errors import VLMoError
from vlmo.modules.attention import Attention, first_positions, rows_at
from vlmo.modules.block import Block
from vlmo.modules.multiway_transformer import ARCHITECTURES, MultiWayTransformer, build_transformer


def moved(module):
    """In float64 and off the initial values, so that every parameter has an effect."""
    module = module.double().eval()
    for parameter in module.parameters():
        parameter.data.add_(0.3 * torch.randn_like(parameter))
    return module


def eager_attention(attention, x, mask):
    """softmax(q k^T / sqrt(d) + mask) v, head by head."""
    size, length, dim = x.shape
    width = dim // attention.num_heads
    q_weight, k_weight, v_weight = attention.qkv.weight.split(dim)
    q = x @ q_weight.T + attention.q_bias
    k = x @ k_weight.T
    v = x @ v_weight.T + attention.v_bias
    mask = mask.expand(size, attention.num_heads, length, length)
    heads = []
    for head in range(attention.num_heads):
        own = slice(head * width, (head + 1) * width)
        scores = q[..., own] @ k[..., own].mT / width**0.5 + mask[:, head]
        heads.append(scores.softmax(-1) @ v[..., own])
    return torch.cat(heads, dim=-1) @ attention.proj.weight.T + attention.proj.bias


def mask_with_padding(size, heads, length):
    mask = torch.randn(size, heads, length, length, dtype=torch.float64)
    mask[1, :, :, -2:] = -torch.inf
    return mask


def test_attention_is_softmax_over_scaled_products():
    attention = moved(Attention(12, 3))
    x = torch.randn(2, 7, 12, dtype=torch.float64)
    for mask in (mask_with_padding(2, 3, 7), mask_with_padding(2, 1, 7)[:, :, :1], torch.zeros(1, 3, 7, 7).double()):
        assert torch.allclose(attention(x, mask), eager_attention(attention, x, mask), atol=1e-12)
    assert torch.allclose(attention(x, None), eager_attention(attention, x, torch.zeros(1).double()), atol=1e-12)


def test_attention_in_float32():
    attention = moved(Attention(192, 6)).float()
    x, mask = torch.randn(2, 9, 192), mask_with_padding(2, 6, 9).float()
    exact = eager_attention(attention.double(), x.double(), mask.double())
    error = attention.float()(x, mask).double() - exact
    assert error.abs().max() < 1e-5 * exact.abs().max()


def test_masked_positions_change_nothing_and_get_no_gradient():
    attention = moved(Attention(12, 3))
    x = torch.randn(2, 7, 12, dtype=torch.float64, requires_grad=True)
    mask = torch.zeros(2, 1, 1, 7, dtype=torch.float64)
    mask[..., -2:] = -torch.inf
    out = attention(x, mask)
    assert torch.allclose(out[:, :5], attention(x[:, :5], None), atol=1e-12)
    out[:, :5].sum().backward()
    assert x.grad.isfinite().all()
    assert not x.grad[:, -2:].any()


def expert_by_hand(x, norm, mlp, gamma):
    normed = F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, eps=1e-6)
    hidden = normed @ mlp.fc1.weight.T + mlp.fc1.bias
    hidden = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))  # GELU
    return x + gamma * (hidden @ mlp.fc2.weight.T + mlp.fc2.bias)


@pytest.mark.parametrize("layer_scale", [0.1, None])
@pytest.mark.parametrize("with_vl_expert", [False, True])
def test_block(layer_scale, with_vl_expert):
    block = moved(Block(12, 3, 4.0, 0.0, layer_scale, ("text", "vl")[: 1 + with_vl_expert]))
    assert block.mlp_text.fc1.out_features == 48
    x, mask = torch.randn(2, 7, 12, dtype=torch.float64), mask_with_padding(2, 3, 7)
    normed = F.layer_norm(x, (12,), block.norm1.weight, block.norm1.bias, eps=1e-6)
    attended = x + block.gamma_1 * eager_attention(block.attn, normed, mask)
    text = expert_by_hand(attended, block.norm2_text, block.mlp_text, block.gamma_2)
    image = expert_by_hand(attended, block.norm2_imag, block.mlp_imag, block.gamma_2)
    assert torch.allclose(block(x, mask, "text"), text, atol=1e-12)
    assert torch.allclose(block(x, mask, "image"), image, atol=1e-12)
    if with_vl_expert:
        pair = expert_by_hand(attended, block.norm2_vl, block.mlp_vl, block.gamma_2)
    else:  # the words of a pair go through the language expert, its patches through the vision expert
        pair = torch.cat([text[:, :3], image[:, 3:]], dim=1)
    assert torch.allclose(block(x, mask, "vl", text_len=3), pair, atol=1e-12)


def test_encoding_runs_all_blocks_and_the_norm():
    model = moved(MultiWayTransformer(32, 16, 12, depth=3, num_heads=3, vl_start=2))
    x = torch.randn(2, 7, 12, dtype=torch.float64)
    masks = [mask_with_padding(2, 3, 7) for _ in range(3)]
    for modality in ("text", "image", "vl"):
        by_hand = x
        for block, mask in zip(model.blocks, masks, strict=True):
            by_hand = block(by_hand, mask, modality, 3)
        hidden, branch = model.encode(x, masks, modality, text_len=3)
        assert torch.equal(hidden, model.norm(by_hand))
        assert branch is None


@pytest.mark.parametrize("modality", ["text", "image"])
def test_vl_branch_passes_the_last_blocks_again(modality):
    model = moved(MultiWayTransformer(32, 16, 12, depth=4, num_heads=3, vl_start=2))
    x = torch.randn(2, 7, 12, dtype=torch.float64)
    masks = [mask_with_padding(2, 3, 7) for _ in range(4)]
    by_hand = x
    for number, (block, mask) in enumerate(zip(model.blocks, masks, strict=True)):
        by_hand = block(by_hand, mask, "vl" if number >= 2 else modality)
    hidden, branch = model.encode(x, masks, modality, vl_branch=True)
    assert torch.equal(branch, model.norm(by_hand))
    assert torch.equal(hidden, model.encode(x, masks, modality)[0])


def test_image_tokens_are_cls_and_patches_row_by_row():
    model = moved(MultiWayTransformer(32, 16, 12, depth=1, num_heads=3, vl_start=1, relative_positions=False))
    image = torch.rand(2, 3, 32, 32, dtype=torch.float64)
    tokens = model.embed_image(image)
    assert tokens.shape == (2, 5, 12)
    projection = model.patch_embed.proj
    for number, (row, column) in enumerate([(0, 0), (0, 16), (16, 0), (16, 16)], start=1):
        patch = image[:, :, row : row + 16, column : column + 16].flatten(1)
        by_hand = patch @ projection.weight.flatten(1).T + projection.bias + model.pos_embed[0, number]
        assert torch.allclose(tokens[:, number], by_hand, atol=1e-12)
    assert torch.allclose(tokens[:, 0], (model.cls_token + model.pos_embed[:, :1])[0], atol=1e-12)


# layers, width, heads, VL experts from block, relative bias, LayerScale, parameters in millions
SIZES = {
    "vlmo_base_patch16": (12, 768, 12, 10, True, True, 152),
    "vlmo_base_plus_patch16": (24, 544, 16, 21, False, False, 150),
    "vlmo_large_patch16": (24, 1024, 16, 21, True, True, 530),
}


@pytest.mark.parametrize("name", SIZES)
def test_sizes_from_timm(name):
    depth, width, heads, vl_start, relative, layer_scale, millions = SIZES[name]
    with torch.device("meta"):
        model = timm.create_model(name)
    assert isinstance(model, MultiWayTransformer)
    assert len(model.blocks) == depth
    assert model.cls_token.shape == (1, 1, width)
    assert {block.attn.num_heads for block in model.blocks} == {heads}
    assert [hasattr(block, "mlp_vl") for block in model.blocks] == [number >= vl_start for number in range(depth)]
    assert (model.pos_embed is None) == relative
    assert all(isinstance(block.gamma_1, torch.nn.Parameter) == layer_scale for block in model.blocks)
    assert model.blocks[0].mlp_imag.fc1.weight.shape == (4 * width, width)
    assert round(sum(parameter.numel() for parameter in model.parameters()) / 1e6) == millions


def test_every_size_is_tested():
    own = {"vlmo_tiny_patch16", "vlmo_micro_patch16"}  # of the demo, of the tests
    assert set(SIZES) == set(ARCHITECTURES) - own


def test_tiny():
    model = timm.create_model("vlmo_tiny_patch16")
    assert sum(parameter.numel() for parameter in model.parameters()) < 10e6
    depth = len(model.blocks)
    assert [hasattr(block, "mlp_vl") for block in model.blocks] == [number >= model.vl_start for number in range(depth)]
    assert 0 < model.vl_start < depth
    assert model.pos_embed is None


def test_timm_takes_options_and_has_no_weights():
    with torch.device("meta"):
        model = timm.create_model("vlmo_base_plus_patch16", img_size=384, drop_path_rate=0.2)
    assert model.pos_embed.shape == (1, 1 + 24**2, 544)
    with pytest.raises(VLMoError, match="has no weights"):
        timm.create_model("vlmo_tiny_patch16", pretrained=True)


def test_text_only_pre_training_has_no_vl_experts():
    model = build_transformer("vlmo_tiny_patch16", experts=("text",))
    assert not [name for name, _ in model.named_parameters() if "_vl" in name]


def test_initial_weights():
    model = build_transformer("vlmo_base_patch16", embed_dim=96)
    for name, parameter in model.named_parameters():
        if "gamma" in name:
            assert (parameter == 0.1).all(), name
        elif "norm" in name and name.endswith("weight"):
            assert (parameter == 1).all(), name
        elif "bias" in name:
            assert not parameter.any(), name
        else:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.2), name


def test_drop_path_rises_linearly_and_is_for_training():
    model = build_transformer("vlmo_base_patch16", embed_dim=96, depth=6, img_size=32, drop_path_rate=0.25)
    rates = [block.drop_path.drop_prob for block in model.blocks]
    assert rates == pytest.approx([0, 0.05, 0.1, 0.15, 0.2, 0.25])
    x, masks = torch.randn(8, 5, 96), [None] * 6
    assert torch.equal(model.eval().encode(x, masks, "image")[0], model.encode(x, masks, "image")[0])
    model.train()
    assert not torch.equal(model.encode(x, masks, "image")[0], model.encode(x, masks, "image")[0])


@pytest.mark.parametrize("modality", ["text", "image", "vl"])
def test_the_last_block_computes_what_is_read(modality):
    model = moved(MultiWayTransformer(32, 16, 12, depth=3, num_heads=3, vl_start=2))
    x = torch.randn(2, 7, 12, dtype=torch.float64)
    biases = [torch.randn(1, 3, 7, 7, dtype=torch.float64) for _ in range(3)]
    read = torch.tensor([[0, 3], [6, 0]])
    branch = modality != "vl"
    whole = model.encode(x, biases, modality, 3, vl_branch=branch)
    some = model.encode(x, biases, modality, 3, vl_branch=branch, positions=read)
    for all_positions, few in zip(whole, some, strict=True):
        if few is not None:
            assert torch.allclose(few, rows_at(all_positions, read), atol=1e-12)
    assert first_positions(x).tolist() == [[0], [0]]


@pytest.mark.parametrize("modality", ["text", "vl"])
@pytest.mark.parametrize("depth_rate", [0.0, 0.5])
def test_experts_leave_out_padding_where_it_is_not_read(modality, depth_rate):
    model = moved(MultiWayTransformer(32, 16, 12, depth=3, num_heads=3, vl_start=2, drop_path_rate=depth_rate)).train()
    x = torch.randn(4, 7, 12, dtype=torch.float64, requires_grad=True)
    biases = [torch.randn(1, 3, 7, 8, dtype=torch.float64) for _ in range(3)]
    padding = torch.zeros(4, 1, 1, 8, dtype=torch.float64)
    padding[::2, ..., 1:3] = -torch.inf  # of texts of 3 tokens
    read = torch.tensor([[0, 6]] * 4)
    tokens = []
    for block in model.blocks:
        block.mlp_text.fc1.register_forward_hook(lambda fc1, inputs, output: tokens.append(inputs[0][..., 0].numel()))
    found = []
    for wanted in (None, read):
        torch.manual_seed(1)
        hidden, _ = model.encode(x, biases, modality, 3, padding=padding, positions=wanted)
        hidden = rows_at(hidden, read) if wanted is None else hidden
        found.append((hidden, *torch.autograd.grad(hidden.square().sum(), [x, model.blocks[0].mlp_text.fc1.weight])))
    for whole, some in zip(*found, strict=True):
        assert torch.allclose(whole, some, atol=1e-10)
    if not depth_rate:
        length = 3 if modality == "vl" else 7
        without_read, with_read = tokens[: len(tokens) // 2], tokens[len(tokens) // 2 :]
        assert without_read[:2] == [4 * length] * 2
        assert with_read[:2] == [4 * length - 4] * 2


def test_stochastic_depth_leaves_samples_out_and_scales_the_others_up():
    block = moved(Block(12, 3, 4.0, 0.4, 0.1, ["text"])).train()
    x, bias = torch.randn(64, 5, 12, dtype=torch.float64), torch.randn(1, 3, 5, 5, dtype=torch.float64)
    padding = torch.zeros(64, 1, 1, 5, dtype=torch.float64)
    padding[::2, ..., 4] = -torch.inf
    torch.manual_seed(1)
    found = block(x, bias, "text", padding=padding)
    torch.manual_seed(1)
    drop_path = timm.layers.DropPath(0.4)  # sample by sample
    attended = x + drop_path(block.gamma_1 * block.attn(block.norm1(x), bias, padding))
    expected = attended + drop_path(block.gamma_2 * block.mlp_text(block.norm2_text(attended)))
    assert torch.allclose(found, expected, atol=1e-12)
    assert 5 < (expected == x).all(dim=(1, 2)).sum() < 20  # 0.4^2 of 64 pass by twice


@pytest.mark.slow
def test_compiled_steps():
    plain = build_transformer("vlmo_tiny_patch16", img_size=32)
    compiled = build_transformer("vlmo_tiny_patch16", img_size=32)
    compiled.load_state_dict(plain.state_dict())
    compiled.compile_blocks()
    counts = torch._dynamo.utils.counters["stats"]
    before = counts["unique_graphs"]
    for number, (size, length) in enumerate([(3, 16), (3, 24), (2, 8), (4, 12), (5, 40)]):
        stance = "default" if number < 3 else "fail_on_recompile"  # few variants, not one for each length
        x, bias = torch.randn(size, length, 96), torch.randn(1, 4, length, length)
        with torch.compiler.set_stance(stance):
            outputs = [
                model.encode(x, [bias] * 3, "vl", 8, positions=torch.zeros(size, 2, dtype=int))
                for model in (plain, compiled)
            ]
        assert torch.allclose(outputs[0][0], outputs[1][0], atol=1e-5)
    assert 0 < counts["unique_graphs"] - before <= 6
