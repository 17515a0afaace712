"""What a LoLA memory is made of."""

from __future__ import annotations

import math
import numbers
import operator
from dataclasses import dataclass
from typing import Any

MIXINGS = ("paper", "gated", "lolcats", "cache_only")
SCORES = ("self_recall", "value_norm", "key_norm", "recency", "random", "external", "attention")
SETS = ("query_head", "kv_head")


def integer(name: str, value: Any, least: int) -> int:
    """`value` as an int of at least `least` that fits 63 bits."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}")
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}") from None
    if not least <= number < 2**63:
        raise ValueError(f"{name} must be from {least} to 2**63 - 1, got {number}")
    return number


def _choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a string, got {type(value).__name__}")
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


@dataclass(frozen=True)
class Config:
    """The shape of the three memories of LoLA (arXiv 2505.23666): window, sparse cache and hidden state.

    A query in chunk n, positions n * chunk and on, attends exactly to the `window` positions before its chunk and to its
    chunk up to itself, exactly to at most `sparse` pairs of the sparse cache, and to everything else through the hidden
    state of linear attention.

    Args:
        window: Positions before the current chunk that are attended to exactly; a multiple of `chunk`, at least `chunk`.
        chunk: How many positions leave the window at once. 1 is the paper's per-token update.
        sparse: Size of the sparse cache, lambda; 0 is plain windowed linear attention.
        mixing: "paper" (Eq. 14), "gated", "lolcats" or "cache_only"; None: "gated" where a gate is given, else "paper".
        score: What decides who stays in the sparse cache: "self_recall" (Eq. 10), and for ablations "value_norm",
            "key_norm", "recency", "random", "attention" or "external".
        sparse_per: "query_head", one sparse set for each, or "kv_head", one for the group that shares keys and values.
        scale: Factor of q.k; None: head_dim ** -0.5.
        seed: Of score "random".

    Raises:
        TypeError: A field of a wrong kind.
        ValueError: A field of a wrong value.

    >>> Config(window=128, sparse=32)
    Config(window=128, chunk=64, sparse=32, mixing=None, score='self_recall', sparse_per='query_head', scale=None, seed=0)
    >>> Config(window=100)
    Traceback (most recent call last):
    ValueError: window must be a multiple of chunk (64), got 100
    """

    window: int = 64
    chunk: int = 64
    sparse: int = 256
    mixing: str | None = None
    score: str = "self_recall"
    sparse_per: str = "query_head"
    scale: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("window", 1), ("chunk", 1), ("sparse", 0), ("seed", 0)):
            object.__setattr__(self, name, integer(name, getattr(self, name), least))
        if self.window % self.chunk:
            raise ValueError(f"window must be a multiple of chunk ({self.chunk}), got {self.window}")
        if self.mixing is not None:
            _choice("mixing", self.mixing, MIXINGS)
        _choice("score", self.score, SCORES)
        _choice("sparse_per", self.sparse_per, SETS)
        if self.scale is not None:
            if isinstance(self.scale, bool) or not isinstance(self.scale, numbers.Real):
                raise TypeError(f"scale must be a number or None, got {type(self.scale).__name__}")
            if not (self.scale > 0 and math.isfinite(self.scale)):
                raise ValueError(f"scale must be positive and finite, got {self.scale}")
            object.__setattr__(self, "scale", float(self.scale))
