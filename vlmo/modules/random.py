"""Random numbers that follow from keys: the same on every device and in every order, whatever was drawn before.

The numbers of a key are those of SplitMix64 (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number
generators") started at it: number e is a hash of key + (e + 1) * GAMMA, so that any of them can be had without the
others. Keys and hashes are int64, whose products wrap around.
"""

import torch
from torch import Tensor

GAMMA = 0x9E3779B97F4A7C15 - 2**64
STEPS = ((30, 0xBF58476D1CE4E5B9 - 2**64), (27, 0x94D049BB133111EB - 2**64), (31, 1))
BITS = 23  # of a uniform number: with the half that keeps it off 0 and 1, they fill a float's 24


def _right(x: Tensor, bits: int) -> Tensor:
    """Shifts right, zeros coming in from the left (int64's own shift copies the sign)."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _hash(x: Tensor) -> Tensor:
    for bits, factor in STEPS:
        x = (x ^ _right(x, bits)) * factor
    return x


def fold_in(keys: Tensor, number: Tensor | int) -> Tensor:
    """Makes keys for one use among several: those of different numbers have nothing to do with each other.

    Args:
        keys: int64 of any shape.
        number: of the use; a tensor is broadcast.
    """
    product = number * GAMMA + 1
    if isinstance(product, int):
        product = (product + 2**63) % 2**64 - 2**63  # wrapped around, as a tensor's is
    return _hash(_hash(keys + GAMMA) ^ product)


def uniform(keys: Tensor, *shape: int) -> Tensor:
    """Draws floats in (0, 1): (B,) keys -> (B, *shape).

    A row's numbers are counted in order, so one that is padded at the end of its first axis keeps those that it had.
    """
    count = torch.Size(shape).numel()
    numbers = torch.arange(1, count + 1, device=keys.device) * GAMMA
    return to_uniform(_hash(keys[:, None] + numbers)).view(len(keys), *shape)


def to_uniform(hashes: Tensor) -> Tensor:
    """Turns int64 hashes (of `fold_in`) into floats in (0, 1)."""
    return (_right(hashes, 64 - BITS).float() + 0.5) / 2**BITS
