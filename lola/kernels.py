"""The five steps of LoLA as plain array functions, for those who script a memory of their own.

    features   phi(x) of a feature map
    score      self-recall error of pairs against a state (Eq. 10 of arXiv 2505.23666)
    select     the highest scores (Eq. 12)
    fold       adds pairs to a state (Eq. 13)
    attend     a softmax over exact pairs and the state (Eq. 14)

Symbols: B rows, T queries, S pairs, Hq query heads, Hs heads of the pairs (Hq a multiple of Hs), D, Dv and F sizes of
keys, values and features. Arrays are NumPy's, torch's, or anything that speaks DLPack, and so is the result; x, q, k and v
are float32, float16 or bfloat16, all else float32. A step runs where its arrays lie: on the CPU, or on a CUDA device on the
caller's current stream; NumPy arrays with `device="cuda"` are copied there and back. TypeError for a wrong kind of object or
dtype, ValueError for a wrong shape or value.
"""

from __future__ import annotations

from typing import Any, TypeVar

from . import _lola
from ._maps import FeatureMap

__all__ = ["attend", "features", "fold", "score", "select"]

Array = TypeVar("Array")


def features(x: Array, feature_map: FeatureMap, side: str, heads: int, *, device: Any = None) -> Array:
    """phi(x) for each query head: x (B, T, Hx, D) -> (B, T, heads, F) float32.

    `side` is "q" or "k" and picks the map's weights; head h reads x's head h // (heads / Hx). Features of 16-bit x are
    rounded to bfloat16 values.

    >>> import numpy as np, lola
    >>> x = np.array([-1.0, 0.0, 2.0], np.float32).reshape(1, 1, 1, 3)
    >>> features(x, lola.EluPlusOne(), "q", heads=1).round(3).tolist()
    [[[[0.36800000071525574, 1.0, 3.0]]]]
    """
    return _lola.features(x, feature_map, side, heads, device)  # type: ignore[no-any-return]


def score(fk: Array, v: Any, H: Any, s: Any, *, device: Any = None) -> Array:
    """The self-recall error (Eq. 10), how badly the state returns a pair's own value: || fk H / (fk s) - v ||^2.

    fk (B, S, Hq, F), v (B, S, Hs, Dv), H (B, Hq, F, Dv), s (B, Hq, F) -> (B, S, Hq) float32; ||v||^2 where fk s = 0.

    >>> import numpy as np
    >>> one = np.ones((1, 1, 1, 1), np.float32)
    >>> score(one, 3 * one, 5 * one, one[0]).item(), score(one, 3 * one, 0 * one, 0 * one[0]).item()
    (4.0, 9.0)
    """
    return _lola.score(fk, v, H, s, device)  # type: ignore[no-any-return]


def select(scores: Array, keep: int, count: Any = None, *, device: Any = None) -> tuple[Array, Array]:
    """The `keep` highest scores of each head (Eq. 12): a tie keeps the earlier pair; +0 and -0 are equal.

    scores (B, S, Hs); `count` (B, Hs) integers: only that many leading pairs are valid, default all. Returns int64 indices
    in ascending order, kept (B, Hs, min(keep, S)) and dropped (B, Hs, S - min(keep, S)), padded at the end with -1.

    >>> import numpy as np
    >>> kept, dropped = select(np.array([1, 7, 7, 7], np.float32).reshape(1, 4, 1), keep=2)
    >>> kept.tolist(), dropped.tolist()
    ([[[1, 2]]], [[[0, 3]]])
    """
    return _lola.select(scores, keep, count, device)  # type: ignore[no-any-return]


def fold(fk: Any, v: Any, H: Any, s: Any, count: Any = None, *, device: Any = None) -> None:
    """Adds pairs to a state in place (Eq. 13): H += fk v^T, s += fk, over the first `count` (B, Hs) pairs, default all.

    fk (B, S, Hq, F), v (B, S, Hs, Dv); H (B, Hq, F, Dv) and s (B, Hq, F) dense, writable and float32.

    >>> import numpy as np
    >>> one, H, s = np.ones((1, 1, 1, 1), np.float32), np.zeros((1, 1, 1, 1), np.float32), np.zeros((1, 1, 1), np.float32)
    >>> fold(2 * one, 3 * one, H, s)
    >>> H.item(), s.item()
    (6.0, 2.0)
    """
    _lola.fold(fk, v, H, s, count, device)


def attend(
    q: Array,
    k: Any,
    v: Any,
    fq: Any = None,
    H: Any = None,
    s: Any = None,
    gate: Any = None,
    mixing: str = "paper",
    scale: float | None = None,
    causal: bool = False,
    count: Any = None,
    *,
    device: Any = None,
) -> Array:
    """Attention over S exact pairs and, where fq, H and s are given, a state (Eq. 14), in one softmax.

    q (B, T, Hq, D), k (B, S, Hs, D), v (B, S, Hs, Dv), fq (B, T, Hq, F), H (B, Hq, F, Dv), s (B, Hq, F), gate (Hq,) with
    mixing "gated" and "lolcats" -> (B, T, Hq, Dv) in q's dtype. `scale` defaults to D ** -0.5; with `causal` query i sees
    pairs up to S - T + i; `count` (B, Hs) says how many leading pairs are valid. A query that sees nothing gets zeros.

    >>> import numpy as np
    >>> q, k, v = np.random.default_rng(0).normal(size=(3, 1, 5, 2, 8)).astype(np.float32)
    >>> bool(np.allclose(attend(q, k, v, causal=True)[:, 0], v[:, 0]))
    True
    """
    return _lola.attend(q, k, v, fq, H, s, gate, mixing, scale, causal, count, device)  # type: ignore[no-any-return]
