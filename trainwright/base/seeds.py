"""Seeds that depend on names, not on the order of calls: layout and call order cannot change a random stream."""

from __future__ import annotations

import hashlib

__all__ = ["derive_seed"]


def derive_seed(*parts: str | int) -> int:
    """A 63-bit seed from any sequence of names and numbers, the same on every machine and Python version.

    `derive_seed(0, "init", "model.embed_tokens.weight")` seeds one parameter whatever the order in which parameters
    are made, so the same seed gives the same weights in every parallel layout.
    """
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1
