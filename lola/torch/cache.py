"""LoLA's memory as a layer of a transformers cache, and the mask that tells it which tokens are padding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.masking_utils import AttentionMaskInterface, causal_mask_function
from transformers.modeling_utils import AttentionInterface

import lola

from . import ops

NAME = "lola"
# Columns that are recorded for a rollback at most, while transformers asks for it.
RECORDED = 1024
# What a copy of a layer needs beside its memory.
_STATE = ("seen", "is_initialized", "_spec", "_sizes", "_dtype", "_padded", "_ahead")


class LolaCacheLayer(CacheLayerMixin):
    """One layer of a `transformers.Cache`, around a `lola.Cache`. Its size does not depend on the number of tokens.

    `LolaAttention` puts it in the place of an empty layer of whatever cache it is given, so `generate`, pipelines and
    `DynamicCache()` need not know of it. Its length, as transformers counts, is the columns of the attention mask so far,
    padding included; `cache.tokens_seen` counts the tokens of each row.

    Attributes:
        cache: The `lola.Cache`; None before the first token.
        seen: Columns so far.
    """

    is_sliding = False
    is_croppable = False  # a fold cannot be undone: see crop
    supports_early_init = False

    def __init__(self, **kwargs: Any):
        super().__init__()
        self.seen = 0
        self._cache: lola.Cache | None = None
        # The cache's memory, which is all that a traced call knows of it: there the memory may be made in the graph.
        self._buffers: list[Tensor] = []
        self._spec: ops.Spec = ([], "", None)
        self._sizes: tuple[int, ...] = ()
        self._dtype = torch.float32
        # For rollbacks of speculative decoding: the memory as it was, and the calls since then.
        self.record_past = False
        self._past: lola.Cache | None = None
        self._calls: list[_Call] = []
        # The last call that had padding: where it begins and ends, its columns, and which of them were tokens.
        self._padded: tuple[int, int, int, Rows] = (0, 0, 0, Rows())
        self._ahead: int | None = 0  # `_columns_ahead`; None: padding came since it was last counted
        self._home: torch.device | None = None  # where an offloaded memory comes from

    @property
    def cache(self) -> lola.Cache | None:
        if self._cache is None and self._buffers:
            self._set(ops.find(self._buffers) or ops.adopt(self._buffers, ops.config_of(*self._spec), self._sizes, self._dtype))
        return self._cache

    def _set(self, cache: lola.Cache) -> None:
        self._forget_past()
        self._cache, self._buffers = cache, ops.tensors_of(cache)

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        spec: ops.Spec,
        feature_map: str,
        w_q: Tensor | None,
        w_k: Tensor | None,
        feature_dim: int,
        factors: Tensor | None,
        rows: Rows,
    ) -> Tensor:
        """Appends the tokens of q (B, T, Hq, D), k and v (B, T, Hkv, D) and attends: (B, T, Hq, D).

        `spec` is `ops.spec_of` of the configuration, `factors` are the window factors whose sigmoid is the gate.
        """
        if not self._buffers or (self.seen == 0 and (self._buffers[0].shape[0] != k.shape[0] or self._spec != spec)):
            self._spec, self._sizes, self._dtype = spec, (q.shape[2], k.shape[2], k.shape[3], v.shape[3], feature_dim), k.dtype
            if ops.traced(q):
                self._cache, self._buffers = None, ops._new_cache(k, *spec, list(self._sizes))
            else:
                self._set(ops.new_cache(ops.config_of(*spec), k.shape[0], self._sizes, k.dtype, k.device))
            self.is_initialized = True
        if ops.traced(q):
            self._forget_past()  # a graph records nothing
            spec, gated = self._spec, factors is not None

            def attend(q, k, v, starts, stops):
                return ops._attention(
                    q, k, v, self._buffers, *spec, feature_map, w_q, w_k, factors, gated, None, starts, stops, None, None
                )  # fmt: skip
        else:
            made = ops.feature_map_of(feature_map, w_q, w_k)
            gate = None if factors is None else ops.gate_of(factors)
            if rows.starts is None and not self.record_past:  # nearly always
                recorded = q.is_cuda and torch.cuda.is_current_stream_capturing()
                if self._ahead is None:
                    if recorded:
                        raise RuntimeError("after a call with padding, run a step before you record one in a CUDA graph")
                    self._ahead = self._columns_ahead()  # waits for the device, once
                out = ops.run(q, k, v, self.cache, None, made, gate=gate)
                if not recorded:  # what a graph records is not read yet
                    self.seen += q.shape[1]
                return out

            def attend(q, k, v, starts, stops):
                return ops.run(q, k, v, self.cache, None, made, gate=gate, starts=starts, stops=stops)

            if self.record_past and (self._past is None or self._recorded() > RECORDED):
                self._past, self._calls = self.cache.copy(), []
        out = rows.attend(q, k, v, attend)
        if self._past is not None:
            self._calls.append(_Call(q, k, v, rows, attend))
        if rows.starts is not None:
            self._padded, self._ahead = (self.seen, self.seen + q.shape[1], q.shape[1], rows), None
        self.seen += q.shape[1]
        return out

    def sync(self) -> None:
        """Counts what replays of a CUDA graph have read, of which the host knows nothing; waits for the device.

        A decode step can be recorded where its position is a tensor, which the graph moves on; nothing else in it counts tokens.

        >>> step = lambda: (model(token, position_ids=at, past_key_values=cache), at.add_(1))  # doctest: +SKIP
        """
        if self.cache is not None:
            self.cache.sync()
            if self._ahead is not None:
                self.seen = int(self.cache.tokens_seen.max()) + self._ahead

    def _columns_ahead(self) -> int:
        """How many more columns there are than tokens of the longest row."""
        return self.seen - int(self.cache.tokens_seen.max())

    # --- what transformers asks of a layer ----------------------------------------------------------------------------

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: only an attention module knows window, sparse cache and features."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        raise TypeError("a LolaCacheLayer has no keys and values to hand out: it serves LolaAttention, not softmax attention")

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    def get_seq_length(self) -> int:
        return self.seen

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        self._forget_past()
        if self.cache is not None:
            self.cache.reset()
        self.seen, self._padded, self._ahead = 0, (0, 0, 0, Rows()), 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._forget_past()
        if self.cache is not None:
            self.cache.select_(beam_idx.cpu())
        self._forget_longest()

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.cache is not None:
            self._set(self.cache.repeat(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.cache is not None:
            indices = torch.as_tensor(indices)
            rows = indices.nonzero().flatten() if indices.dtype == torch.bool else indices
            self._set(self.cache.select(rows.cpu()))
        self._forget_longest()

    def _forget_longest(self) -> None:
        if self._padded[3].starts is not None:  # else all rows are as long
            self._ahead = None

    def activate_past_recording(self) -> None:
        """Speculative decoding begins: what is read from now on may be taken back by `crop`, across chunks too."""
        self.record_past = True

    def _forget_past(self) -> None:
        self._past, self._calls = None, []

    def _recorded(self) -> int:
        return sum(call.columns for call in self._calls)

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the last -tokens_to_remove tokens of every row, back to the start of its current chunk at most.

        A positive number is the length to keep, as in earlier versions of transformers.

        After `activate_past_recording`, which speculative decoding calls, also what was read since the last crop.

        Raises:
            ValueError: Beyond that, since what left the window then is folded and cannot be taken out again; and for rows of
                different length.
        """
        if tokens_to_remove > 0:
            tokens_to_remove = min(0, tokens_to_remove - self.seen)
        past, calls, recorded = self._past, self._calls, self._recorded()
        self._forget_past()
        if tokens_to_remove == 0 or self.cache is None:
            return
        seen, left = self.cache.tokens_seen, recorded + tokens_to_remove
        if (seen != seen[0]).any():
            raise ValueError(f"crop cannot shorten rows of different length, {seen.tolist()}: LoLA crops all rows to one length")
        keep = int(seen[0]) + tokens_to_remove + self._padding(calls, self.seen + tokens_to_remove)
        if keep < 0:
            raise ValueError(f"crop cannot forget {-tokens_to_remove} tokens of {seen[0]}")
        try:
            self.cache.crop(keep)
        except ValueError:
            if past is None or left < 0:
                raise
            self._set(past)
            for call in calls:
                call.repeat(min(call.columns, left))
                left = max(0, left - call.columns)
        self.seen += tokens_to_remove
        begin, end, columns, rows = self._padded
        self._padded = begin, min(end, max(begin, self.seen)), columns, rows
        self._ahead = self._columns_ahead()

    def _padding(self, calls: list[_Call], first: int) -> int:
        """How many columns from `first` on are padding, in a row; `calls` are the last ones."""
        found, at = 0, self.seen
        for call in reversed(calls):
            at -= call.columns
            found += call.rows.padding(call.columns, max(0, first - at), call.columns)
        begin, end, columns, rows = self._padded
        end = min(end, at)
        if first < end:
            if first < begin:
                raise ValueError("crop cannot forget more columns than those since the last call with padding, and that call's")
            found += rows.padding(columns, first - begin, end - begin)
        return found

    def offload(self) -> None:
        if self.cache is not None and self._buffers[0].device.type != "cpu":
            self._home = self._buffers[0].device
            self._set(self.cache.to("cpu"))

    def prefetch(self) -> None:
        if self._home is not None and self._buffers[0].device != self._home:
            self._set(self.cache.to(str(self._home)))

    def __deepcopy__(self, memo: dict[int, Any]) -> LolaCacheLayer:
        twin = type(self)()
        memo[id(self)] = twin
        for name in _STATE:
            setattr(twin, name, getattr(self, name))
        if self.cache is not None:
            twin._set(self.cache.copy())
        return twin

    def __reduce__(self) -> tuple[Any, ...]:
        state = {name: getattr(self, name) for name in _STATE}
        return _from_pickle, (type(self), state, self.cache)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(seen={self.seen}, cache={self.cache!r})"


class _Call(NamedTuple):
    """What was read at once, to read its beginning again."""

    q: Tensor
    k: Tensor
    v: Tensor
    rows: Rows
    attend: Callable[..., Tensor]

    @property
    def columns(self) -> int:
        return self.q.shape[1]

    def repeat(self, columns: int) -> None:
        if columns:
            rows = self.rows if self.rows.starts is None else rows_of(self.rows.valid(self.columns)[:, :columns])
            rows.attend(*(x[:, :columns] for x in (self.q, self.k, self.v)), self.attend)


def _from_pickle(cls: type[LolaCacheLayer], state: dict[str, Any], cache: lola.Cache | None) -> LolaCacheLayer:
    layer = cls()
    layer.__dict__.update(state)
    if cache is not None:
        layer._set(cache)
    return layer


def layer_of(cache: Cache, index: int) -> LolaCacheLayer:
    """The layer of a transformers cache, replaced by a LolaCacheLayer if it is still empty."""
    replicate = getattr(cache, "layer_class_to_replicate", None)
    while replicate is not None and len(cache.layers) <= index:
        cache.layers.append(replicate())
    layer = cache.layers[index]
    if not isinstance(layer, LolaCacheLayer):
        if getattr(layer, "is_initialized", False):
            raise ValueError(
                f"past_key_values holds the keys of softmax attention in layer {index}, which LoLA cannot continue: begin with a new cache"
            )
        layer = cache.layers[index] = LolaCacheLayer()
    return layer


# --- masks ------------------------------------------------------------------------------------------------------------


class Rows(NamedTuple):
    """Which tokens of a call enter each row of the memory.

    Attributes:
        starts, stops: (B,) int64 as in `lola.attention`; None: all tokens.
        order: (B, T) int64 where padding stands between real tokens, as between the turns of a batch: the real tokens of each
            row before its padding; `starts` and `stops` count in this order then. Else None.
    """

    starts: Tensor | None = None
    stops: Tensor | None = None
    order: Tensor | None = None

    def attend(self, q: Tensor, k: Tensor, v: Tensor, attend: Callable[..., Tensor]) -> Tensor:
        """attend(q, k, v, starts, stops) on (B, T, ., .) in the order of the memory; the output in that of the call."""
        if self.order is None:
            return attend(q, k, v, self.starts, self.stops)
        out = attend(*(_along(x, self.order) for x in (q, k, v)), self.starts, self.stops)
        return _along(out, self.order.argsort(dim=1))

    def padding(self, columns: int, first: int, end: int) -> int:
        """How many of a call's columns `first` .. `end` are padding, in a row."""
        if self.starts is None:
            return 0
        counts = (~self.valid(columns)[:, first:end]).sum(1).tolist()
        if len(set(counts)) > 1:
            raise ValueError(f"crop cannot shorten rows by different numbers of tokens: {counts} of these columns are padding")
        return counts[0]

    def valid(self, columns: int) -> Tensor:
        """Which columns are tokens, (B, columns) bool; what `rows_of` takes."""
        at = torch.arange(columns, device=self.starts.device)
        some = (at >= self.starts[:, None]) & (at < self.stops[:, None])
        return some if self.order is None else torch.zeros_like(some).scatter_(1, self.order, some)


def _along(x: Tensor, order: Tensor) -> Tensor:
    return x.gather(1, order[:, :, None, None].expand(-1, -1, *x.shape[2:]))


def rows_of(valid: Tensor) -> Rows:
    """From which tokens are real, (B, T) bool."""
    count = valid.sum(-1)
    starts = valid.int().argmax(-1)
    stops = starts + count
    if valid.shape[1] == 1:
        return Rows(starts, stops)
    columns = torch.arange(valid.shape[1], device=valid.device)
    pieces = ((columns >= starts[:, None]) & (columns < stops[:, None])) != valid
    # A graph is to serve every mask, so there the tokens are always put in order.
    if not torch.compiler.is_compiling() and not pieces.any():
        return Rows(starts, stops)
    return Rows(torch.zeros_like(count), count, (~valid).int().argsort(dim=1, stable=True))


def lola_mask(
    batch_size: int, q_length: int, kv_length: int, *, mask_function: Any = causal_mask_function, attention_mask: Any = None, **kwargs: Any
) -> Tensor | None:
    """What a model of LoLA layers alone makes of its mask: None without padding, else `Rows` as one tensor, (B, 1, 2 or 2 + T).

    Made once for all layers, and without the (T, T) mask of softmax attention. Three axes tell it from masks of others.
    """
    compiling = torch.compiler.is_compiling()
    # Where torch traces, transformers always assumes several sequences in a row.
    if mask_function is not causal_mask_function and not compiling:
        raise ValueError(
            "LoLA attends causally over whole rows: it takes no sliding window, no custom mask and no several sequences packed into "
            "one row by position_ids. Pad them to a batch, or pass cu_seqlens to lola.torch.attention"
        )
    if attention_mask is None:
        return None
    valid = attention_mask[:, -q_length:].bool()
    if not compiling and valid.all():
        return None
    starts, stops, order = rows_of(valid)
    ends = torch.stack([starts, stops], dim=-1)
    return (ends if order is None else torch.cat([ends, order], dim=-1))[:, None]


def rows_of_mask(mask: Tensor | None, tokens: int, seen: int) -> Rows:
    """Which of this call's tokens are real, from the mask of any attention implementation.

    Args:
        mask: None; `lola_mask`'s; (B, L) with L >= T, nonzero for real tokens; or (B, 1, T, L), bool or added to scores, in
            which a token that may not attend to itself is padding.
        tokens: T.
        seen: Columns before this call.

    Raises:
        ValueError: For several sequences in a row, tokens that attend to later ones, and another kind of mask.
    """
    if mask is None:
        return Rows()
    if not isinstance(mask, Tensor):
        raise ValueError(f"attention_mask must be a tensor or None, got {type(mask).__name__}: use sdpa, eager or lola attention")
    if mask.ndim == 3:
        starts, stops = (mask[:, 0, i].contiguous() for i in range(2))  # which kernels read
        return Rows(starts, stops, mask[:, 0, 2:] if mask.shape[2] > 2 else None)
    if mask.ndim == 2:
        return rows_of(mask[:, -tokens:].bool())
    if mask.ndim != 4:
        raise ValueError(f"attention_mask must have 2 or 4 axes, got shape {tuple(mask.shape)}")
    if mask.dtype != torch.bool:
        mask = mask > torch.finfo(mask.dtype).min / 2
    own = mask[:, 0, :, seen : seen + tokens]
    valid = own.diagonal(dim1=-2, dim2=-1)
    if not torch.compiler.is_compiling():
        both = valid[:, 1:] & valid[:, :-1]
        if (own.diagonal(offset=1, dim1=-2, dim2=-1) & both).any():
            raise ValueError("attention_mask lets tokens attend to later ones, and LoLA attends causally")
        if (both & ~own.diagonal(offset=-1, dim1=-2, dim2=-1)).any():
            raise ValueError("attention_mask separates several sequences in a row, which LoLA takes as a padded batch only")
    return rows_of(valid)


def _no_softmax(module: Any, *args: Any, **kwargs: Any) -> Any:
    raise ValueError(
        "attention implementation 'lola' serves models whose layers are all LolaAttention; softmax layers need 'sdpa' or 'eager'"
    )


AttentionInterface.register(NAME, _no_softmax)
AttentionMaskInterface.register(NAME, lola_mask)
