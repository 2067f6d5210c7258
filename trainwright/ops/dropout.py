"""Dropout whose mask is a pure function of what is dropped, not of the order in which devices draw random numbers.

Whether an element is kept depends on the seed of the step, the site (which dropout of which layer), the row of the
global batch, the document in the row, the position of the token and the index of the feature (or head and key). So
micro-batches, ranks and recomputing see the same mask, whoever computes which part: a counter-based generator (Salmon
et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), with hashes in place of ciphers so that it is fast in
plain integer operations on any device.

Two levels: a 64-bit key for each token (the finaliser of SplitMix64, Steele et al., OOPSLA 2014), then for each element
a 32-bit hash of the index under both halves of the key (three multiplications, the constants of C. Wellons' `triple32`,
found by search for the least bias).
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["drop", "head_keys", "keep_mask", "site_keys", "token_keys", "uniform"]

_GOLDEN = 0x9E3779B97F4A7C15
_CHUNK = 1 << 17  # elements hashed at once on a CPU, so that their scratch stays in the cache


def _signed(value: int, bits: int) -> int:
    """`value` mod 2**bits as the signed integer of the same bits, as torch has it."""
    value &= (1 << bits) - 1
    return value - (1 << bits) if value >> (bits - 1) else value


def _shift(x: Tensor, count: int, bits: int) -> Tensor:
    """x >> count with zeros from the left, for signed integers."""
    return (x >> count) & ((1 << (bits - count)) - 1)


def _mix64(x: Tensor) -> Tensor:
    x = (x ^ _shift(x, 30, 64)) * _signed(0xBF58476D1CE4E5B9, 64)
    x = (x ^ _shift(x, 27, 64)) * _signed(0x94D049BB133111EB, 64)
    return x ^ _shift(x, 31, 64)


def _absorb(key: Tensor, value: Tensor) -> Tensor:
    """A new key from a key and a number: for one key different numbers never give the same."""
    return _mix64(key ^ (value.to(torch.int64) * _signed(_GOLDEN, 64) + _signed(_GOLDEN, 64)))


def token_keys(seed: int, rows: Tensor, positions: Tensor, documents: Tensor | None = None) -> Tensor:
    """The key of each token, int64 [B, T].

    Args:
        seed: of the step.
        rows: [B], numbers of the rows in the global batch.
        positions: [T] or [B, T], the position of each token.
        documents: [B, T], the number of a token's document in its row, where positions start anew in each.
    """
    device = positions.device
    start = torch.full((), _signed(seed, 64), dtype=torch.int64, device=device)
    keys = _absorb(_mix64(start), rows.to(device)[:, None])
    documents = torch.zeros((), dtype=torch.int64, device=device) if documents is None else documents
    return _absorb(_absorb(keys, documents), positions)


def site_keys(keys: Tensor, site: Tensor | int) -> Tensor:
    """Keys [B, T] for one of the model's dropouts; `site` is a number or a 0-d int64 tensor."""
    return _absorb(keys, torch.as_tensor(site, dtype=torch.int64, device=keys.device))


def head_keys(keys: Tensor, heads: int, first_head: int = 0) -> Tensor:
    """Keys [B, T] for each of `heads` attention heads numbered from `first_head`: [B, H, T]."""
    numbers = torch.arange(first_head, first_head + heads, device=keys.device)
    return _absorb(keys[:, None, :], numbers[None, :, None])


def keep_mask(keys: Tensor, index: Tensor, p: float) -> Tensor:
    """Which elements are kept, bool [..., S]: each dropped with probability p (to 2**-32).

    Args:
        keys: int64 [...], one for each token (and head).
        index: [S], or [..., S] broadcastable: what tells the elements of one key apart, at most 2**32 values.
    """
    low = keys.to(torch.int32)[..., None]
    high = (keys >> 32).to(torch.int32)[..., None]
    # The index is not multiplied: the compiler would fold that into its loop counters, which overflow undefined.
    counter = index.to(torch.int32)
    threshold = round(p * 2**32) - 2**31
    elements = keys.numel() * index.shape[-1]
    if keys.device.type != "cpu" or elements <= _CHUNK or index.dim() > 1 or torch.compiler.is_compiling():
        return _hash32(counter ^ low, high) >= threshold
    keep = torch.empty((keys.numel(), index.shape[-1]), dtype=torch.bool, device=keys.device)
    rows = max(1, _CHUNK // index.shape[-1])
    pieces = zip(keep.split(rows), low.reshape(-1, 1).split(rows), high.reshape(-1, 1).split(rows), strict=True)
    for out, part_low, part_high in pieces:
        torch.ge(_hash32(counter ^ part_low, part_high), threshold, out=out)
    return keep.view(*keys.shape, index.shape[-1])


def uniform(keys: Tensor, index: Tensor) -> Tensor:
    """Numbers in [-1, 1), float32 [..., S], as equally distributed as 24 bits are; arguments as of `keep_mask`."""
    low = keys.to(torch.int32)[..., None]
    high = (keys >> 32).to(torch.int32)[..., None]
    return (_hash32(index.to(torch.int32) ^ low, high) >> 7).float() * 2.0**-24


def _hash32(x: Tensor, key: Tensor) -> Tensor:
    """The int32 hash of x under another 32 bits of key, in place.

    The last fold of `triple32` only stirs low bits, and what is compared with a threshold is the whole number. In its
    place stands the key: C++ may compare a product with zero as if it could not overflow, but not this.
    """
    x ^= _shift(x, 17, 32)
    x *= _signed(0xED5AD4BB, 32)
    x ^= _shift(x, 11, 32)
    x += key
    x *= _signed(0xAC4C1B51, 32)
    x ^= _shift(x, 15, 32)
    x *= _signed(0x31848BAB, 32)
    x ^= key
    return x


def drop(x: Tensor, keys: Tensor, p: float, first_feature: int = 0) -> Tensor:
    """x [B, T, D] with each element zeroed with probability p, the others divided by 1 - p.

    keys [B, T] are those of `site_keys`; the features of x are numbered from `first_feature`.
    """
    if p == 0.0:
        return x
    features = torch.arange(first_feature, first_feature + x.shape[-1], device=x.device)
    return x * keep_mask(keys, features, p) * (1.0 / (1.0 - p))
