"""lola.attention on torch tensors: direct in eager mode, a custom operator where torch traces.

The operators are functions of their tensors alone: the cache's memory comes in as tensors, which `lola::attention` mutates.
They are nearly always the memory of a live lola.Cache, found by its addresses, and then nothing is copied. A backend that
functionalises mutation by clones instead gets the same result on a cache built of the clones.
"""

from __future__ import annotations

import ctypes
import functools
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

import lola

_MAPS: dict[str, Callable[..., Any]] = {
    "hedgehog": lola.Hedgehog,
    "hedgehog_exp": lola.HedgehogExp,
    "elu_plus_one": lola.EluPlusOne,
    "relu": lola.Relu,
}


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cache: lola.Cache | None = None,
    config: lola.Config | None = None,
    feature_map: Any = None,
    q_features: Tensor | None = None,
    k_features: Tensor | None = None,
    gate: Tensor | None = None,
    scores: Tensor | None = None,
    starts: Tensor | None = None,
    stops: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    device: Any = None,
    stream: Any = None,
    check: bool | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """`lola.attention` for torch, under torch.compile too (LoLA, arXiv 2505.23666, Eq. 10 and 12-14).

    Eager calls go straight to `lola.attention`, with its arguments, meanings and errors: tensors are read in place through
    DLPack, and the result is memory of torch's allocator. Where torch traces (torch.compile, torch.export, fake tensors) the
    call becomes the operator `lola::attention`, whose mutated arguments are the cache's buffers: no graph break, and one
    graph for every cache of the same shape. A cache and a feature map that no eager call has seen must be named to
    `lola.torch.prepare` before a traced call.

    Args:
        q: Queries (B, T, Hq, D), after the position embedding; float32, float16 or bfloat16.
        k, v: Keys (B, T, Hkv, D) and values (B, T, Hkv, Dv), of the cache's dtype.
        cache: A lola.Cache on the tensors' device, to continue and to append to; None: one for this call alone.
        config: A lola.Config, default lola.Config(); beside a cache None or equal to the cache's.
        feature_map: lola.Hedgehog, HedgehogExp, EluPlusOne or Relu.
        q_features, k_features: Features of your own instead, (B, T, Hq, F) float32. Not with a cache while torch traces.
        gate: (Hq,) between 0 and 1.
        scores: (B, T, Hq) float32, with score "external".
        starts, stops: (B,) int64: only starts[b] <= t < stops[b] enter row b; outputs elsewhere are zero.
        cu_seqlens: (N + 1,) int64: bounds of the sequences in one packed row.
        device: None: where q lies.
        stream: None: torch's current stream.
        check: Whether non-finite values raise; default: on the CPU. On a CUDA device it waits for the device.
        out: (B, T, Hq, Dv) of q's dtype, to write the result to.

    Returns:
        (B, T, Hq, Dv) in q's dtype, on q's device.

    Raises:
        TypeError, ValueError, MemoryError, RuntimeError: As `lola.attention`; ValueError for an input that requires grad
            while gradients are recorded.

    >>> q, k, v = torch.randn(3, 1, 1000, 4, 64)
    >>> cache = lola.Cache(lola.Config(window=64, chunk=64, sparse=32), heads=4, head_dim=64, feature_dim=64)
    >>> attention(q, k, v, cache=cache, feature_map=lola.EluPlusOne()).shape, cache.tokens_seen
    (torch.Size([1, 1000, 4, 64]), array([1000]))
    """
    if device is not None and torch.device(device).type != q.device.type:
        raise ValueError(f"device must be None or where q lies ({q.device}), got {device!r}")
    if torch.is_grad_enabled():
        for name, x in (("q", q), ("k", k), ("v", v), ("q_features", q_features), ("k_features", k_features)):
            if x is not None and x.requires_grad:
                raise ValueError(
                    f"{name} requires grad, and LoLA's kernels have no gradient: run under torch.no_grad(), or pass {name}.detach()"
                )
    if not traced(q):
        return run(
            q, k, v, cache, config, feature_map, q_features, k_features, gate, scores, starts, stops, cu_seqlens, check, out, stream
        )  # fmt: skip
    kind, w_q, w_k = "", None, None
    if feature_map is not None:
        if not hasattr(feature_map, "_torch"):
            prepare(feature_map)
        kind, w_q, w_k = feature_map._torch
    if cache is None:
        result = _attention_once(
            q, k, v, *spec_of(config or lola.Config()), kind, w_q, w_k, q_features, k_features, gate, False, scores, starts, stops,
            cu_seqlens, check,
        )  # fmt: skip
    else:
        if not hasattr(cache, "_torch"):
            prepare(cache)
        buffers, spec = cache._torch
        if config is not None and spec_of(config) != spec:
            raise ValueError("config must be None or equal to the cache's")
        if feature_map is None:
            raise ValueError("feature_map must be given with a cache under torch.compile; features of your own work in eager mode")
        result = _attention(
            q, k, v, buffers, *spec, kind, w_q, w_k, gate, False, scores, starts, stops, cu_seqlens, check
        )  # fmt: skip
    return result if out is None else out.copy_(result)


def traced(q: Tensor) -> bool:
    """Whether this call is to become an operator in a graph: q is, or will be, no tensor with memory."""
    return torch.compiler.is_compiling() or type(q) is not Tensor or q.is_meta


def run(
    q, k, v, cache, config, feature_map, q_features=None, k_features=None, gate=None, scores=None, starts=None, stops=None,
    cu_seqlens=None, check=None, out=None, stream=None,
):  # fmt: skip
    """lola.attention at once, on real tensors, wherever they lie."""
    return lola.attention(
        _plain(q), _plain(k), _plain(v), cache=cache, config=config, feature_map=feature_map, q_features=q_features,
        k_features=k_features, gate=gate if gate is None else _plain(gate), scores=scores, starts=starts, stops=stops,
        cu_seqlens=cu_seqlens, stream=stream, check=check, out=out,
    )  # fmt: skip


def _plain(x: Tensor) -> Tensor:
    return x.detach() if x.requires_grad else x


@torch.compiler.disable
def prepare(*objects: Any) -> None:
    """Makes caches and feature maps known to torch, so that a traced `attention` finds their tensors.

    Args:
        objects: lola.Cache and feature map objects. A cache's tensors are its own memory; a feature map's weights are copied.

    Raises:
        TypeError: Another object.

    >>> cache = lola.Cache(lola.Config(), heads=4, head_dim=64, feature_dim=64)
    >>> prepare(cache, lola.EluPlusOne())
    """
    for known in objects:
        if isinstance(known, lola.Cache):
            # Tensors that kept the cache alive would do so for ever from here, as no garbage collector sees through them.
            known._torch = (_tensors(known, keep_alive=False), spec_of(known.config))
            register(known, known._torch[0])
        elif isinstance(known, lola._lola.FeatureMap):
            weights = [None if w is None else torch.from_numpy(w.copy()) for w in (known.w_q, known.w_k)]
            if weights[0] is not None:
                derive.remember(known, _feature_map, known.name, *weights)
            known._torch = (known.name, *weights)
        else:
            raise TypeError(f"prepare takes caches and feature maps, got {type(known).__name__}")


# --- a cache's memory as tensors --------------------------------------------------------------------------------------

# The addresses of caches whose tensors were handed out: the first one finds the cache, the others confirm it.
_known: dict[int, tuple[tuple[int, ...], weakref.ref]] = {}


def tensors_of(cache: lola.Cache) -> list[Tensor]:
    """The cache's buffers as tensors over its own memory, which keep it alive, known to the operator."""
    buffers = _tensors(cache, keep_alive=True)
    register(cache, buffers)
    return buffers


def register(cache: lola.Cache, buffers: list[Tensor]) -> None:
    addresses = _addresses(buffers)
    first = addresses[0]
    _known[first] = (addresses, weakref.ref(cache, lambda _: _known.pop(first, None)))


def find(buffers: list[Tensor]) -> lola.Cache | None:
    """The live cache whose memory these tensors are."""
    addresses = _addresses(buffers)
    found = _known.get(addresses[0])
    return found[1]() if found is not None and found[0] == addresses else None


def _addresses(buffers: list[Tensor]) -> tuple[int, ...]:
    return tuple(x.data_ptr() for x in buffers if x.numel())


def _tensors(cache: lola.Cache, keep_alive: bool) -> list[Tensor]:
    return [_tensor(array, keep_alive) for array in cache.buffers().values()]


class _Borrowed:
    """An array's memory on a CUDA device without its owner."""

    def __init__(self, array: Any):
        self.__cuda_array_interface__ = array.__cuda_array_interface__


def _tensor(array: Any, keep_alive: bool) -> Tensor:
    if not isinstance(array, np.ndarray):
        if array.nbytes == 0:
            return torch.empty(array.shape, dtype=getattr(torch, array.dtype), device=array.device)
        if keep_alive:
            return torch.from_dlpack(array)
        # The interface has no bfloat16 and gives its bits.
        return torch.as_tensor(_Borrowed(array), device=array.device).view(getattr(torch, array.dtype))
    # What NumPy calls bfloat16 is a type of ml_dtypes or uint16; no buffer holds numbers of the latter kind.
    bfloat16 = array.itemsize == 2 and array.dtype != np.float16
    dtype = torch.bfloat16 if bfloat16 else getattr(torch, array.dtype.name)
    if array.size == 0:
        return torch.empty(array.shape, dtype=dtype)
    if keep_alive:
        return torch.from_numpy(array.view(np.int16) if bfloat16 else array).view(dtype)
    memory = (ctypes.c_char * array.nbytes).from_address(array.ctypes.data)
    return torch.frombuffer(memory, dtype=dtype).view(array.shape)


Spec = tuple[list[int], str, float | None]


def spec_of(config: lola.Config) -> Spec:
    """A configuration as three arguments of an operator; `config_of` reads them. Numbers stay numbers, which torch may trace."""
    return [config.window, config.chunk, config.sparse, config.seed], f"{config.mixing} {config.score} {config.sparse_per}", config.scale


def config_of(numbers: list[int], names: str, scale: float | None) -> lola.Config:
    return _config(*numbers, names, scale)


@functools.lru_cache(maxsize=64)
def _config(window: int, chunk: int, sparse: int, seed: int, names: str, scale: float | None) -> lola.Config:
    mixing, score, sparse_per = names.split()
    return lola.Config(
        window=window, chunk=chunk, sparse=sparse, mixing=None if mixing == "None" else mixing, score=score, sparse_per=sparse_per,
        scale=scale, seed=seed,
    )  # fmt: skip


def new_cache(config: lola.Config, batch: int, sizes: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> lola.Cache:
    """An empty cache; `sizes` are Hq, Hkv, D, Dv and F."""
    heads, kv_heads, head_dim, value_dim, feature_dim = sizes
    return lola.Cache(
        config, batch=batch, heads=heads, kv_heads=kv_heads, head_dim=head_dim, value_dim=value_dim,
        feature_dim=feature_dim, dtype=dtype, device=str(device),
    )  # fmt: skip


def adopt(buffers: list[Tensor], config: lola.Config, sizes: tuple[int, ...], dtype: torch.dtype) -> lola.Cache:
    """A new cache of the contents of a cache's tensors, wherever they lie."""
    cache = new_cache(config, buffers[0].shape[0], sizes, dtype, buffers[0].device)
    for own, given in zip(_tensors(cache, keep_alive=True), buffers):
        own.copy_(given)
    return cache


# --- what is made of parameters ---------------------------------------------------------------------------------------


class _Derive:
    """Values made of tensors, kept while those tensors live and are not written to.

    A cache knows its feature map again at once when it is the same object. Writes through `tensor.data` go unseen, as they
    do in autograd.
    """

    def __init__(self):
        self.kept: dict[tuple, tuple[list[weakref.ref], list[int], Any]] = {}

    def __call__(self, make: Callable, name: str, *tensors: Tensor) -> Any:
        found = self.kept.get((make, name, *map(id, tensors)))
        if found is not None:
            refs, versions, value = found
            for ref, version, x in zip(refs, versions, tensors):
                if ref() is not x or x._version != version:
                    break
            else:
                return value
        return self.remember(make(name, *tensors), make, name, *tensors)

    def remember(self, value: Any, make: Callable, name: str, *tensors: Tensor) -> Any:
        key = (make, name, *map(id, tensors))
        versions = _versions(tensors)
        if versions is None:
            warnings.warn(
                "parameters that were made under torch.inference_mode() count no writes, so LoLA reads its feature maps and gates from "
                "them again in every call, which is slow: make or load the model outside of it",
                stacklevel=2,
            )
        else:
            self.kept[key] = ([weakref.ref(x, lambda _: self.kept.pop(key, None)) for x in tensors], versions, value)
        return value


def _versions(tensors: tuple[Tensor, ...]) -> list[int] | None:
    """None for tensors of inference mode, which do not count writes."""
    return None if any(x.is_inference() for x in tensors) else [x._version for x in tensors]


derive = _Derive()


def _feature_map(name: str, *weights: Tensor) -> Any:
    return _MAPS[name](*(w.detach().float().cpu() for w in weights))


def feature_map_of(name: str, w_q: Tensor | None, w_k: Tensor | None) -> Any:
    """The lola feature map of these weights, (Hq, D, F/2) or, for "relu", (Hq, D, F); the same object for the same weights."""
    return _MAPS[name]() if w_q is None else derive(_feature_map, name, w_q, w_k)


def _gate(name: str, factors: Tensor) -> Tensor:
    return torch.sigmoid(factors.detach().float()).flatten()


def gate_of(factors: Tensor) -> Tensor:
    """g = sigmoid(window_factors), (Hq,) float32. Never left to a compiler: a cache compares gates bit by bit."""
    return derive(_gate, "", factors)


# --- the operators ----------------------------------------------------------------------------------------------------


# Two of them, since a list of mutated arguments that is empty is more than inductor takes.


@torch.library.custom_op("lola::attention", mutates_args=("buffers",))
def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    buffers: list[Tensor],
    numbers: list[int],
    names: str,
    scale: float | None,
    feature_map: str,
    w_q: Tensor | None,
    w_k: Tensor | None,
    gate: Tensor | None,
    gate_is_factors: bool,
    scores: Tensor | None,
    starts: Tensor | None,
    stops: Tensor | None,
    cu_seqlens: Tensor | None,
    check: bool | None,
) -> Tensor:
    made = feature_map_of(feature_map, w_q, w_k)
    cache = find(buffers)
    adopted = cache is None
    if adopted:
        sizes = (q.shape[2], k.shape[2], k.shape[3], v.shape[3], made.feature_dim(k.shape[3]))
        cache = adopt(buffers, config_of(numbers, names, scale), sizes, k.dtype)
    out = q.new_empty(*q.shape[:3], v.shape[3])
    run(
        q, k, v, cache, None, made, gate=gate_of(gate) if gate_is_factors else gate, scores=scores, starts=starts, stops=stops,
        cu_seqlens=cu_seqlens, check=check, out=out,
    )  # fmt: skip
    if adopted:
        for own, given in zip(_tensors(cache, keep_alive=True), buffers):
            given.copy_(own)
    return out


@_attention.register_fake
def _(
    q, k, v, buffers, numbers, names, scale, feature_map, w_q, w_k, gate, gate_is_factors, scores, starts, stops, cu_seqlens, check
):  # fmt: skip
    return q.new_empty(*q.shape[:3], v.shape[3])


@torch.library.custom_op("lola::attention_once", mutates_args=())
def _attention_once(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    numbers: list[int],
    names: str,
    scale: float | None,
    feature_map: str,
    w_q: Tensor | None,
    w_k: Tensor | None,
    q_features: Tensor | None,
    k_features: Tensor | None,
    gate: Tensor | None,
    gate_is_factors: bool,
    scores: Tensor | None,
    starts: Tensor | None,
    stops: Tensor | None,
    cu_seqlens: Tensor | None,
    check: bool | None,
) -> Tensor:
    out = q.new_empty(*q.shape[:3], v.shape[3])
    return run(
        q, k, v, None, config_of(numbers, names, scale), feature_map_of(feature_map, w_q, w_k) if feature_map else None, q_features,
        k_features, gate_of(gate) if gate_is_factors else gate, scores, starts, stops, cu_seqlens, check, out,
    )  # fmt: skip


@_attention_once.register_fake
def _(
    q, k, v, numbers, names, scale, feature_map, w_q, w_k, q_features, k_features, gate, gate_is_factors, scores, starts, stops,
    cu_seqlens, check,
):  # fmt: skip
    return q.new_empty(*q.shape[:3], v.shape[3])


@torch.library.custom_op("lola::new_cache", mutates_args=())
def _new_cache(k: Tensor, numbers: list[int], names: str, scale: float | None, sizes: list[int]) -> list[Tensor]:
    return tensors_of(new_cache(config_of(numbers, names, scale), k.shape[0], tuple(sizes), k.dtype, k.device))


@_new_cache.register_fake
def _(k, numbers, names, scale, sizes):
    layout = _layout(config_of([int(n) for n in numbers], names, scale), tuple(int(n) for n in sizes), k.dtype)
    return [k.new_empty((k.shape[0], *shape), dtype=dtype) for shape, dtype in layout]


@functools.lru_cache(maxsize=64)
def _layout(config: lola.Config, sizes: tuple[int, ...], dtype: torch.dtype) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Shape without the batch axis and dtype of every buffer, read off a cache of one row: the layout is C's alone."""
    row = new_cache(config, 1, sizes, dtype, torch.device("cpu"))
    return [(tuple(x.shape[1:]), x.dtype) for x in _tensors(row, keep_alive=True)]
