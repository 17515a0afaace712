"""What attention does, in numbers."""

from __future__ import annotations

from typing import Any, TypeVar

from . import _lola
from ._attention import DEFAULT_CONFIG, attention

__all__ = ["linear_share"]

Array = TypeVar("Array")


def linear_share(q: Array, k: Any, v: Any, **arguments: Any) -> tuple[Array, Array]:
    """lola.attention, and the linear term's share of each softmax denominator.

    Takes the arguments of lola.attention, appends to its cache and raises as it does. Returns `out` and the share
    (B, T, Hq) float32, from 0 (all weight on window and sparse cache) to 1 (all on the hidden state); 0 for tokens that
    enter no row.

    >>> import numpy as np, lola
    >>> q, k, v = np.random.default_rng(0).normal(size=(3, 1, 100, 2, 8)).astype(np.float32)
    >>> config = lola.Config(window=16, chunk=16, sparse=0)
    >>> out, share = linear_share(q, k, v, config=config, feature_map=lola.EluPlusOne())
    >>> out.shape, share.shape, share[:, :32].max().item(), bool((share[:, 32:] > 0).all())
    ((1, 100, 2, 8), (1, 100, 2), 0.0, True)
    """
    defaults: dict[str, Any] = attention.__kwdefaults__ or {}
    for name in arguments:
        if name not in defaults:
            raise TypeError(f"linear_share got an unexpected keyword argument '{name}'")
    given = {**defaults, **arguments}
    if given["cache"] is None and given["config"] is None:
        given["config"] = DEFAULT_CONFIG
    in_order: Any = (q, k, v, *given.values(), True)
    return _lola.attention(*in_order)  # type: ignore[no-any-return]
