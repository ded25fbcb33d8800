"""Seeds that depend on the sampled item only, so that they are equal on every machine and in every order."""

from __future__ import annotations

from hashlib import blake2b

__all__ = ["stable_seed"]


def stable_seed(*parts: int | str, bits: int = 63) -> int:
    """A seed in [0, 2**bits) from the parts, the same in every process and Python version.

    Args:
        parts: What identifies the draw, such as run seed, group id, index, turn.
        bits: At most 63, so that it fits a signed 64-bit integer.
    """
    text = "\x1f".join(map(str, parts)).encode("utf-8", "surrogatepass")
    return int.from_bytes(blake2b(text, digest_size=8).digest(), "little") >> (64 - bits)
