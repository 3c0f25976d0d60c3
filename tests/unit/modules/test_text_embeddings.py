"""BERT's input embedding, by its formula."""

import torch
import torch.nn.functional as F

from vlmo.modules.transformer import TextEmbeddings

IDS = torch.tensor([[2, 7, 3, 0], [2, 7, 7, 3]])


def embeddings(absolute_positions, dropout=0.5):
    module = TextEmbeddings(10, 6, 8, absolute_positions, dropout).eval()
    for parameter in module.parameters():
        parameter.data.normal_()
    return module


def by_hand(module, positions):
    x = module.word_embeddings.weight[IDS] + module.token_type_embeddings.weight[0]
    if positions:
        x = x + module.position_embeddings.weight[: IDS.shape[1]]
    return F.layer_norm(x, (6,), module.LayerNorm.weight, module.LayerNorm.bias, 1e-12)


def test_words_and_token_type_0():
    module = embeddings(absolute_positions=False)
    assert torch.allclose(module(IDS), by_hand(module, positions=False), atol=1e-6)
    assert torch.equal(module(IDS)[0, 1], module(IDS)[1, 2])  # a word is the same anywhere


def test_with_positions():
    module = embeddings(absolute_positions=True)
    assert torch.allclose(module(IDS), by_hand(module, positions=True), atol=1e-6)


def test_the_parameters_of_both_kinds_are_those_of_released_files():
    names = {"word_embeddings.weight", "position_embeddings.weight", "token_type_embeddings.weight"}
    names |= {"LayerNorm.weight", "LayerNorm.bias"}
    assert set(embeddings(True).state_dict()) == set(embeddings(False).state_dict()) == names


def test_dropout_is_for_training():
    module = embeddings(absolute_positions=False)
    assert torch.equal(module(IDS), module(IDS))
    dropped = (module.train()(torch.randint(10, (64, 8))) == 0).float().mean()
    assert 0.4 < dropped < 0.6


def test_small_values_are_not_lost_in_the_norm():
    module = embeddings(absolute_positions=False)
    with torch.no_grad():
        module.token_type_embeddings.weight.zero_()
        module.LayerNorm.weight.fill_(1)
        module.LayerNorm.bias.zero_()
        module.word_embeddings.weight.mul_(1e-4)
    assert torch.allclose(module(IDS).var(dim=-1, unbiased=False), torch.ones(2, 4), atol=1e-3)
