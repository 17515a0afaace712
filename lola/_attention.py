"""lola.attention."""

from __future__ import annotations

from typing import Any, TypeVar

from . import _lola
from ._cache import Cache
from ._config import Config
from ._maps import FeatureMap

Array = TypeVar("Array")
DEFAULT_CONFIG = Config()


def attention(
    q: Array,
    k: Any,
    v: Any,
    *,
    cache: Cache | None = None,
    config: Config | None = None,
    feature_map: FeatureMap | None = None,
    q_features: Any = None,
    k_features: Any = None,
    gate: Any = None,
    scores: Any = None,
    starts: Any = None,
    stops: Any = None,
    cu_seqlens: Any = None,
    device: Any = None,
    stream: Any = None,
    check: bool | None = None,
    out: Any = None,
) -> Array:
    """LoLA attention (arXiv 2505.23666, Eq. 10 and 12-14) over what the cache holds and the tokens of this call.

    The tokens are appended to the cache, in prefill and in decoding alike: any way of cutting a sequence into calls gives
    the same memory. Arrays are NumPy's, torch's, or anything that speaks DLPack; float32, float16 or bfloat16. They are read
    in place: any strides will do as long as the last axis is contiguous. A call that raises leaves the cache as it was.

    It runs where the cache and the arrays lie, on a CUDA device without waiting for it; only NumPy arrays are copied to a
    device and back. All on a device can be recorded in a CUDA graph and replayed, once an eager call has been made.

    Args:
        q: Queries (B, T, Hq, D), after the position embedding.
        k: Keys (B, T, Hkv, D), after the position embedding; Hq is a multiple of Hkv. Of the cache's dtype.
        v: Values (B, T, Hkv, Dv), of k's dtype.
        cache: A lola.Cache to continue and to append to; None: one for this call alone.
        config: A lola.Config, default lola.Config(); beside a cache None or equal to the cache's.
        feature_map: lola.Hedgehog, HedgehogExp, EluPlusOne or Relu. Needed, unless features are given.
        q_features, k_features: Features of your own instead, (B, T, Hq, F) float32, at least 0.
        gate: (Hq,) floats between 0 and 1, for mixing "gated" (the default where it is given) and "lolcats".
        scores: (B, T, Hq) floats, with score "external" and only then.
        starts, stops: (B,) integers: only tokens starts[b] <= t < stops[b] enter row b; outputs elsewhere are zero.
        cu_seqlens: (N + 1,) integers: q, k and v hold one packed row, whose tokens cu_seqlens[i] to cu_seqlens[i + 1] enter
            row i of the cache.
        device: None: where the cache or q lies. "cuda" or "cuda:1": also for NumPy arrays without a cache. NumPy arrays come
            and go in pieces, while the device computes; what lola takes for that does not grow with their length.
        stream: On a device the CUDA stream to run on, an object or an address, on which the result is ready; None: the
            current stream of the library that q is from.
        check: Whether non-finite values, and negative features, raise. Default: True on the CPU; False on a device, where
            True waits for it and also checks starts, stops, cu_seqlens and gate that lie there.
        out: An array (B, T, Hq, Dv) of q's dtype to write the result to; it must overlap no input.

    Returns:
        (B, T, Hq, Dv) in q's dtype, from the library that q is from; `out` if that was given.

    Raises:
        TypeError: A wrong kind of object or dtype.
        ValueError: A wrong shape, value or combination, a tensor that requires grad, or what differs from the cache's
            first call: mixing, feature map, gate, or q's dtype (a TypeError).
        MemoryError: Too little memory.
        RuntimeError: A device that cannot be used, or a fault of it, after which the cache is unusable.

    >>> import numpy as np, lola
    >>> rng = np.random.default_rng(0)
    >>> q, k, v = rng.normal(size=(3, 1, 1000, 4, 64)).astype(np.float32)
    >>> config = lola.Config(window=64, chunk=64, sparse=32)
    >>> cache = lola.Cache(config, heads=4, head_dim=64, feature_dim=64)
    >>> out = lola.attention(q[:, :999], k[:, :999], v[:, :999], cache=cache, feature_map=lola.EluPlusOne())
    >>> last = lola.attention(q[:, 999:], k[:, 999:], v[:, 999:], cache=cache, feature_map=lola.EluPlusOne())
    >>> out.shape, last.shape, cache.tokens_seen, len(cache.sparse_positions(0, head=3))
    ((1, 999, 4, 64), (1, 1, 4, 64), array([1000]), 32)
    """
    if config is None:
        if cache is None:
            config = DEFAULT_CONFIG
    elif not isinstance(config, Config):
        raise TypeError(f"config must be a lola.Config, got {type(config).__name__}")
    return _lola.attention(  # type: ignore[no-any-return]
        q, k, v, cache, config, feature_map, q_features, k_features, gate, scores, starts, stops, cu_seqlens, device,
        stream, check, out, False,
    )  # fmt: skip
