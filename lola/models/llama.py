"""Llama in NumPy float32: a Hugging Face folder, run with softmax attention or with LoLA.

Matrix products are NumPy's BLAS, attention is Lola's kernels, and there is no torch. A layer is

    x += attention(rope(norm(x) Wq), rope(norm(x) Wk), norm(x) Wv) Wo
    x += (silu(norm(x) Wgate) * norm(x) Wup) Wdown,    norm(x) = x / sqrt(mean(x^2) + eps) * weight

Symbols: B rows, T tokens of a call, Hq and Hkv query and KV heads, D their size, M the MLP's width.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import hashlib
import os
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

import lola

from . import tokenizer as _tokenizer
from .folder import MAPS, Adapter, Geometry, StrictTensors, locate, read_json, rope_frequencies
from .safetensors import open_folder

__all__ = ["Llama", "ModelCache"]

# Tokens of a prefill that go through the layers together: few enough for what a layer passes on to stay in the processor's
# caches, enough for BLAS to reach its speed.
SEGMENT = 512


# ---------------------------------------------------------------------------------------------------------- the caches


class _SoftmaxLayer:
    """All keys and values of one layer, in arrays that grow: (B, Hkv, capacity, D) each."""

    def __init__(self, batch, kv_heads, head_dim, dtype):
        self.keys = np.empty((batch, kv_heads, 0, head_dim), dtype)
        self.values = np.empty((batch, kv_heads, 0, head_dim), dtype)
        self.tokens_seen = np.zeros(batch, np.int64)

    @property
    def nbytes(self):
        """Bytes of the pairs held; capacity beyond them is not counted."""
        pairs = int(self.tokens_seen.sum()) * self.keys.shape[1]
        return pairs * (self.keys.shape[3] + self.values.shape[3]) * self.keys.itemsize

    def reserve(self, tokens):
        """Makes room for so many positions."""
        if tokens > self.keys.shape[2]:
            held = int(self.tokens_seen.max())
            for name in ("keys", "values"):
                old = getattr(self, name)
                new = np.empty((*old.shape[:2], tokens, old.shape[3]), old.dtype)
                new[:, :, :held] = old[:, :, :held]
                setattr(self, name, new)

    def copy(self):
        other = copy.copy(self)
        held = int(self.tokens_seen.max())
        other.keys, other.values = self.keys[:, :, :held].copy(), self.values[:, :, :held].copy()
        return other

    @classmethod
    def stack(cls, layers):
        batch, held = sum(len(layer.tokens_seen) for layer in layers), max(int(layer.tokens_seen.max()) for layer in layers)
        one = layers[0].keys
        other = cls(batch, one.shape[1], one.shape[3], one.dtype)
        # Stacked rows are about to be decoded: leave some room.
        other.reserve(held + 128)
        first = 0
        for layer in layers:
            rows, seen = slice(first, first + len(layer.tokens_seen)), int(layer.tokens_seen.max())
            other.keys[rows, :, :seen], other.values[rows, :, :seen] = layer.keys[:, :, :seen], layer.values[:, :, :seen]
            other.tokens_seen[rows] = layer.tokens_seen
            first = rows.stop
        return other

    def append(self, k, v, spans):
        seen = self.tokens_seen + spans.counts
        if seen.max() > self.keys.shape[2]:
            self.reserve(max(int(seen.max()), 2 * self.keys.shape[2]))
        for b, start, stop in spans.rows:
            place = slice(self.tokens_seen[b], seen[b])
            self.keys[b, :, place] = k[b, start:stop].swapaxes(0, 1)
            self.values[b, :, place] = v[b, start:stop].swapaxes(0, 1)
        # A new array, so that a copy made before keeps its own.
        self.tokens_seen = seen

    def attend(self, q, k, v, spans, out):
        self.append(k, v, spans)
        seen = self.tokens_seen
        if spans.whole and (seen == seen[0]).all():
            out[...] = self._causal(q, slice(None), seen[0])
            return
        out[...] = 0
        for b, start, stop in spans.rows:
            if stop > start:
                out[b : b + 1, start:stop] = self._causal(q[b : b + 1, start:stop], slice(b, b + 1), seen[b])

    def _causal(self, q, rows, held):
        keys, values = self.keys[rows, :, :held].swapaxes(1, 2), self.values[rows, :, :held].swapaxes(1, 2)
        return lola.kernels.attend(q, keys, values, causal=True)


class _LolaLayer:
    """A ``lola.Cache`` with the feature map and the gate of its layer."""

    def __init__(self, cache, feature_map, gate):
        self.cache, self.feature_map, self.gate = cache, feature_map, gate

    @property
    def tokens_seen(self):
        return self.cache.tokens_seen

    @property
    def nbytes(self):
        return self.cache.nbytes

    def reserve(self, tokens):
        """Nothing to do: its size does not depend on the number of tokens."""

    def copy(self):
        return _LolaLayer(self.cache.copy(), self.feature_map, self.gate)

    @classmethod
    def stack(cls, layers):
        one = layers[0].cache
        sizes = {name: getattr(one, name) for name in ("heads", "kv_heads", "head_dim", "value_dim", "feature_dim", "dtype")}
        cache = lola.Cache(one.config, batch=sum(layer.cache.batch for layer in layers), **sizes)
        # Each buffer has a row's part in its first axis, and nothing of a row is elsewhere.
        parts = [layer.cache.to("cpu").buffers() for layer in layers]
        for name, buffer in cache.buffers().items():
            np.concatenate([part[name] for part in parts], out=buffer)
        return cls(cache.to(one.device), layers[0].feature_map, layers[0].gate)

    # Set where a call without queries is to be had.
    append = None

    def attend(self, q, k, v, spans, out):
        lola.attention(q, k, v, cache=self.cache, feature_map=self.feature_map, gate=self.gate, out=out, **spans.arguments)


class _Spans:
    """Which offsets of a call enter each row: starts[b] <= j < stops[b], as in ``lola.attention``."""

    def __init__(self, batch, tokens, starts=None, stops=None):
        self.starts = np.zeros(batch, np.int64) if starts is None else starts
        self.stops = np.full(batch, tokens, np.int64) if stops is None else stops
        self.counts = self.stops - self.starts
        self.whole = bool((self.counts == tokens).all())
        self.arguments = {} if self.whole else {"starts": self.starts, "stops": self.stops}
        self.rows = [(b, int(start), int(stop)) for b, (start, stop) in enumerate(zip(self.starts, self.stops))]

    def cut(self, first, last):
        """The same for offsets first .. last-1 of the call, counted from ``first``."""
        starts, stops = (np.clip(ends, first, last) - first for ends in (self.starts, self.stops))
        return _Spans(len(starts), last - first, starts, np.maximum(starts, stops))


class ModelCache:
    """What a model remembers of its rows: one cache a layer. Made by ``Llama.new_cache``.

    Attributes
    ----------
    layers : list
        With LoLA, the ``lola.Cache`` of each layer. With softmax attention, objects with ``keys`` and ``values``, of which
        the first ``tokens_seen[b]`` positions of row b are in use: (B, Hkv, capacity, D).
    """

    def __init__(self, layers: Sequence):
        self._layers = list(layers)

    @property
    def layers(self) -> list:
        return [layer.cache if isinstance(layer, _LolaLayer) else layer for layer in self._layers]

    @property
    def tokens_seen(self) -> np.ndarray:
        """Tokens so far, (B,) int64."""
        return np.array(self._layers[0].tokens_seen)

    @property
    def nbytes(self) -> int:
        """Bytes of all layers and rows; of a softmax cache, of the pairs held."""
        return sum(int(layer.nbytes) for layer in self._layers)

    def copy(self) -> ModelCache:
        """A cache that goes on from here by itself."""
        return ModelCache(layer.copy() for layer in self._layers)

    @classmethod
    def stack(cls, caches: Sequence[ModelCache]) -> ModelCache:
        """A new cache with the rows of several of one model, in their order."""
        return cls(type(layers[0]).stack(layers) for layers in zip(*(cache._layers for cache in caches)))


# ----------------------------------------------------------------------------------------------------------- the model


@dataclasses.dataclass
class _Layer:
    """Weights of one layer, (inputs, outputs) float32 in C order, which is what BLAS takes without a transposition.

    Norm weights are multiplied into the matrices behind them, and the gate half of ``gate_up`` is halved:
    silu(g) = g/2 (1 + tanh(g/2)), and tanh never overflows.
    """

    qkv: np.ndarray  # (width, (Hq + 2 Hkv) D)
    out: np.ndarray  # (Hq D, width)
    gate_up: np.ndarray  # (width, 2 M)
    down: np.ndarray  # (M, width)
    feature_map: object = None
    gate: np.ndarray | None = None  # (Hq,)


class _Scratch:
    """One thread's working arrays for segments of up to ``rows`` tokens, made once so that no call waits for memory."""

    def __init__(self, g: Geometry, rows: int, kv_dtype):
        def empty(*shape):
            return np.empty(shape, np.float32)

        both = g.heads + g.kv_heads
        self.rows = rows
        self.x, self.normed, self.step = (empty(rows, g.width) for _ in range(3))
        self.qkv = empty(rows, both + g.kv_heads, g.head_dim)
        self.turned, self.swapped = empty(rows, both, g.head_dim), empty(rows, both, g.head_dim)
        self.attended = empty(rows, g.heads, g.head_dim)
        self.kv = None if kv_dtype == np.float32 else np.empty((2, rows, g.kv_heads, g.head_dim), kv_dtype)
        self.gate_up, self.activated = empty(rows, 2 * g.mlp), empty(rows, g.mlp)


class Llama:
    """A Llama language model in NumPy. Made by ``Llama.from_pretrained``.

    Several threads may call one model at the same time, each with a cache of its own.

    Attributes
    ----------
    geometry : Geometry
        Its sizes.
    attention : "softmax" or lola.Config
        How it attends.
    adapter : Adapter or None
        The linearisation in use; None with softmax attention.
    device : str
        Where LoLA's caches lie.
    folder : Path
        Where it was read from.
    weights_hash : str
        SHA-256, in 64 hexadecimal digits, of the names, dtypes, shapes and bytes of the tensors in use, the adapter's included. It
        depends neither on how they are spread over files nor on the ``Config``.

    Examples
    --------
    >>> model = Llama.from_pretrained("needle", attention=lola.Config(window=64, sparse=256))  # doctest: +SKIP
    >>> ids = model.tokenizer.encode("In the beginning God created the")  # doctest: +SKIP
    >>> model.tokenizer.decode(model.generate(ids, max_new_tokens=11))  # doctest: +SKIP
    ' heaven and'
    """

    def __init__(self):
        raise TypeError("a Llama is made by Llama.from_pretrained(folder)")

    @classmethod
    def from_pretrained(
        cls,
        name: str | os.PathLike,
        attention="softmax",
        *,
        adapter: str | os.PathLike | None = None,
        cache_dtype: str = "float32",
        device: str = "cpu",
    ) -> Llama:
        """Read a model.

        Parameters
        ----------
        name : str or path
            ``"needle"`` or ``"needle-8k"`` for the bundled model with that adapter, or a folder with ``config.json``,
            ``model.safetensors`` (or an index and its files) and, for text, ``tokenizer.json``.
        attention : "softmax" or lola.Config
            Softmax attention runs the model as it is, without an adapter. A ``Config`` runs it with LoLA: the adapter's
            LoRA is merged into the weights, its feature maps and gates are used.
        adapter : path, optional
            Folder with ``adapter.json``, ``feature_maps.safetensors`` and, if its LoRA has a rank, ``lora.safetensors``. By
            default the bundled model's own, or the model's folder if ``adapter.json`` is there.
        cache_dtype : {"float32", "float16"}
            Of the keys and values in caches; everything else is float32.
        device : str
            Where LoLA's caches lie and its attention runs, "cpu", "cuda" or "cuda:1" and so on; everything else is NumPy's.

        Raises
        ------
        FileNotFoundError
            If the folder or a file is absent.
        ValueError
            If the model is of another kind, or a tensor is missing, of a wrong shape or unknown; the message names the
            file and the key. Also for LoLA without an adapter.
        TypeError
            If ``attention`` is of another type.
        RuntimeError
            For a device that cannot be used.
        """
        device = lola._lola.device(device)
        if not (attention == "softmax" if isinstance(attention, str) else isinstance(attention, lola.Config)):
            raise TypeError(f"attention must be 'softmax' or a lola.Config; it is {attention!r}")
        folder, own_adapter = locate(name, adapter)
        self = object.__new__(cls)
        self.folder = folder
        self.cache_dtype = _cache_dtype(cache_dtype)
        self.device = device
        self.geometry = Geometry.from_config(read_json(folder / "config.json"), folder / "config.json")
        self.attention = attention
        self.adapter = None
        if attention != "softmax":
            if own_adapter is None:
                raise ValueError(
                    f"{folder} has no adapter.json: LoLA needs trained feature maps. Pass adapter=, a folder with them, "
                    "or attention='softmax'"
                )
            self.adapter = Adapter.from_folder(own_adapter)
        self._load()
        return self

    def with_attention(self, config) -> Llama:
        """The same weights and adapter with another ``lola.Config``; nothing is read or copied.

        Raises ValueError for a model read with softmax attention, which has no adapter.
        """
        if self.adapter is None:
            raise ValueError("with_attention takes a model that was read with a lola.Config; this one has softmax attention")
        if not isinstance(config, lola.Config):
            raise TypeError(f"config must be a lola.Config; it is {config!r}")
        other = copy.copy(self)
        other.attention = config
        return other

    def with_cache_dtype(self, cache_dtype: str) -> Llama:
        """The same weights and attention with caches of another dtype; nothing is read or copied."""
        other = copy.copy(self)
        other.cache_dtype = _cache_dtype(cache_dtype)
        return other

    def _load(self):
        g = self.geometry
        weights = StrictTensors(open_folder(self.folder), self.folder)
        sources = [weights]
        maps = lora = None
        if self.adapter is not None:
            path = self.adapter.folder / "feature_maps.safetensors"
            maps = StrictTensors.from_file(path)
            sources.append(maps)
            if self.adapter.rank:
                path = self.adapter.folder / "lora.safetensors"
                lora = StrictTensors.from_file(path)
                sources.append(lora)

        self.embedding = weights.take("model.embed_tokens.weight", g.vocabulary, g.width)
        self._layers = [self._load_layer(i, weights, maps, lora) for i in range(g.layers)]
        self.norm = weights.take("model.norm.weight", g.width)
        self.head = self.embedding if g.tied else weights.take("lm_head.weight", g.vocabulary, g.width)
        # Files may repeat a tied head, and older ones hold a table of rotary frequencies that follows from config.json.
        weights.finish(lambda name: name.endswith("rotary_emb.inv_freq") or (g.tied and name == "lm_head.weight"))
        for source in sources[1:]:
            source.finish()
        lines = sorted(line for source in sources for line in source.taken.values())
        self.weights_hash = hashlib.sha256("".join(lines).encode()).hexdigest()
        short = g.vocabulary <= SEGMENT
        self._table = _normed(self.embedding, g.eps, np.empty_like(self.embedding)) @ self._layers[0].qkv if short else None
        self._rope = _Rope(rope_frequencies(g.rope, g.head_dim))
        self._local = threading.local()

    def _load_layer(self, i, weights, maps, lora):
        g = self.geometry
        query, pair = g.heads * g.head_dim, g.kv_heads * g.head_dim
        base = f"model.layers.{i}."

        def matrix(name, inputs, outputs):
            w = weights.take(f"{base}{name}.weight", outputs, inputs)
            prefix = f"base_model.model.{base}{name}.lora_"
            if lora is not None and (f"{prefix}A.default.weight" in lora or f"{prefix}B.default.weight" in lora):
                a = lora.take(f"{prefix}A.default.weight", self.adapter.rank, inputs)
                b = lora.take(f"{prefix}B.default.weight", outputs, self.adapter.rank)
                w += np.float32(self.adapter.alpha / self.adapter.rank) * (b @ a)
            return w.T

        attend_norm = weights.take(base + "input_layernorm.weight", g.width)[:, None]
        mlp_norm = weights.take(base + "post_attention_layernorm.weight", g.width)[:, None]
        sizes = {"q": query, "k": pair, "v": pair}
        qkv = np.concatenate([matrix(f"self_attn.{n}_proj", g.width, size) for n, size in sizes.items()], axis=1)
        gate, up = (matrix(f"mlp.{n}_proj", g.width, g.mlp) for n in ("gate", "up"))
        layer = _Layer(
            qkv=np.multiply(attend_norm, qkv, order="C"),
            out=np.ascontiguousarray(matrix("self_attn.o_proj", query, g.width)),
            gate_up=np.multiply(mlp_norm, np.concatenate([gate / 2, up], axis=1), order="C"),
            down=np.ascontiguousarray(matrix("mlp.down_proj", g.mlp, g.width)),
        )
        if maps is not None:
            name = f"{base}self_attn.feature_map_q.mlp.layer"
            half = maps.tensors.shape(name)[-1] if name in maps and len(maps.tensors.shape(name)) == 3 else g.head_dim
            w_q, w_k = (maps.take(name.replace("_q.", f"_{side}."), g.heads, g.head_dim, half) for side in "qk")
            layer.feature_map = getattr(lola, MAPS[self.adapter.feature_map])(w_q, w_k)
            factors = maps.take(f"{base}self_attn.window_factors", 1, g.heads, 1, 1).ravel()
            layer.gate = 1 / (1 + np.exp(-factors))
        return layer

    @functools.cached_property
    def tokenizer(self):
        """The folder's tokenizer, with ``encode(text)``, ``decode(ids)`` and ``newlines``; read on first use."""
        return _tokenizer.load(self.folder)

    def new_cache(self, batch: int = 1) -> ModelCache:
        """An empty cache for ``batch`` rows."""
        if not isinstance(batch, (int, np.integer)) or batch < 1:
            raise ValueError(f"batch must be a positive integer; it is {batch!r}")
        g = self.geometry
        if self.adapter is None:
            return ModelCache(_SoftmaxLayer(batch, g.kv_heads, g.head_dim, self.cache_dtype) for _ in self._layers)
        return ModelCache(_LolaLayer(self._new_lola(layer, batch), layer.feature_map, layer.gate) for layer in self._layers)

    def _new_lola(self, layer, batch):
        g = self.geometry
        return lola.Cache(
            self.attention,
            batch=batch,
            heads=g.heads,
            kv_heads=g.kv_heads,
            head_dim=g.head_dim,
            value_dim=g.head_dim,
            feature_dim=2 * layer.feature_map.w_q.shape[-1],
            dtype=self.cache_dtype.name,
            device=self.device,
        )

    def __call__(self, ids, cache: ModelCache | None = None, *, starts=None, stops=None) -> np.ndarray:
        """The logits after each token.

        Parameters
        ----------
        ids : int array, (B, T)
            Token ids. T may be 0.
        cache : ModelCache, optional
            What the rows remember; it takes these tokens up as well. Without it the rows are new.
        starts, stops : int arrays, (B,), optional
            Of this call's offsets only starts[b] <= j < stops[b] enter row b, so rows may be padded on either side.
            Logits elsewhere mean nothing.

        Returns
        -------
        ndarray of float32, (B, T, vocabulary)

        Raises
        ------
        TypeError, ValueError
            For ids that are no integers, of another shape or outside the vocabulary, and for a cache of another model or
            batch, or one that an interrupted call left half done.
        """
        ids, cache, spans = self._check(ids, cache, starts, stops)
        batch, tokens = ids.shape
        logits = np.empty((batch, tokens, self.geometry.vocabulary), np.float32)
        for first, last in _segments(batch, tokens):
            hidden = self._forward(ids[:, first:last], cache, spans.cut(first, last))
            np.matmul(hidden, self.head.T, out=logits[:, first:last])
        return logits

    def last_logits(self, ids, cache: ModelCache | None = None, *, starts=None) -> np.ndarray:
        """The logits after the last token alone, (B, vocabulary) float32: what a generation needs of its prompt.

        It saves the head for all other positions, and most of the last layer. Arguments and errors as in a call; T >= 1, and
        every row ends with the array (padding on the left, if any).
        """
        ids, cache, spans = self._check(ids, cache, starts, None)
        batch, tokens = ids.shape
        if tokens == 0 or (spans.counts == 0).any():
            raise ValueError("ids must hold at least one token for each row")
        for first, last in _segments(batch, tokens):
            hidden = self._forward(ids[:, first:last], cache, spans.cut(first, last), final=tokens == last)
        return np.matmul(hidden[:, 0], self.head.T)

    def read(self, ids, cache: ModelCache, *, starts=None, stops=None) -> None:
        """Let ``cache`` take tokens up without computing logits; arguments and errors as in a call."""
        ids, cache, spans = self._check(ids, cache, starts, stops)
        for first, last in _segments(*ids.shape):
            self._forward(ids[:, first:last], cache, spans.cut(first, last), final=False)

    def generate(self, ids, max_new_tokens: int, stop: int | Iterable[int] | None = None, cache: ModelCache | None = None):
        """The most probable continuation, token by token.

        Parameters
        ----------
        ids : int array (T,), int array (B, T), or a sequence of B rows of different length
            The prompts, at least one token each.
        max_new_tokens : int
            At most so many tokens for each row.
        stop : int or ints, optional
            Tokens that end a row; by default the configuration's ``eos_token_id``. ``()`` never ends early.
        cache : ModelCache, optional
            A conversation so far. It takes up the prompts and the new tokens, all but each row's last one (the stop token
            included), which no step has read; begin the next turn with it.

        Returns
        -------
        ndarray of int64, (n,), or a list of B of them
            The new tokens, without the stop token. One array if ``ids`` was one row of shape (T,).
        """
        rows, single = _rows(ids)
        batch, width = len(rows), max(map(len, rows))
        if min(map(len, rows)) == 0:
            raise ValueError("ids must hold at least one token for each row")
        padded = np.zeros((batch, width), np.int64)
        starts = np.array([width - len(row) for row in rows])
        for row, start, target in zip(rows, starts, padded):
            target[start:] = row
        cache = self.new_cache(batch) if cache is None else cache
        answers = self.decode(self.last_logits(padded, cache, starts=starts), max_new_tokens, stop, cache)
        return answers[0] if single else answers

    def decode(self, logits, max_new_tokens: int, stop: int | Iterable[int] | None, cache: ModelCache) -> list[np.ndarray]:
        """The second half of ``generate``: goes on from the ``logits`` (B, vocabulary) of ``last_logits`` and its cache."""
        if not isinstance(max_new_tokens, (int, np.integer)) or max_new_tokens < 0:
            raise ValueError(f"max_new_tokens must be an integer >= 0; it is {max_new_tokens!r}")
        stop = self.geometry.eos if stop is None else (stop,) if isinstance(stop, (int, np.integer)) else stop
        stop = np.array(list(stop), np.int64)
        batch = len(logits)
        new = np.empty((batch, max_new_tokens), np.int64)
        lengths = np.zeros(batch, np.int64)
        active = np.ones(batch, bool)
        for n in range(max_new_tokens):
            if n:
                # Rows that ended are idle: nothing of theirs enters.
                logits = self(new[:, n - 1 : n], cache, starts=(~active).astype(np.int64))[:, 0]
            new[:, n] = np.where(active, logits.argmax(axis=-1), 0)
            active &= ~np.isin(new[:, n], stop)
            lengths += active
            if not active.any():
                break
        return [row[:length].copy() for row, length in zip(new, lengths)]

    # What follows is one segment's way through the layers.

    def _check(self, ids, cache, starts, stops):
        ids = np.asarray(ids)
        if ids.dtype.kind not in "iu" and ids.size:
            raise TypeError(f"ids must be integers; they are {ids.dtype}")
        if ids.ndim != 2 or ids.shape[0] < 1:
            raise ValueError(f"ids must have shape (B, T) with B >= 1; they have {ids.shape}")
        ids = ids.astype(np.int64, copy=False)
        batch, tokens = ids.shape
        if ids.size and not (0 <= ids.min() and ids.max() < self.geometry.vocabulary):
            wrong = ids.min() if ids.min() < 0 else ids.max()
            raise ValueError(f"ids must be from 0 to {self.geometry.vocabulary - 1}; one is {wrong}")
        if cache is None:
            cache = self.new_cache(batch)
        elif not isinstance(cache, ModelCache):
            raise TypeError(f"cache must come from new_cache(); it is {type(cache).__name__}")
        kind = _SoftmaxLayer if self.adapter is None else _LolaLayer
        if len(cache._layers) != len(self._layers) or not isinstance(cache._layers[0], kind):
            raise ValueError("cache must come from this model's new_cache()")
        seen = cache.tokens_seen
        if len(seen) != batch:
            raise ValueError(f"cache must have the {batch} rows of ids; it has {len(seen)}")
        if any((layer.tokens_seen != seen).any() for layer in cache._layers):
            raise ValueError("cache was left half done by a call that was interrupted; begin with a new one")
        limits = []
        for name, ends, default in (("starts", starts, 0), ("stops", stops, tokens)):
            ends = np.full(batch, default) if ends is None else np.asarray(ends)
            if ends.shape != (batch,) or ends.dtype.kind not in "iu":
                raise ValueError(f"{name} must be {batch} integers; it is {ends!r}")
            limits.append(ends.astype(np.int64))
        starts, stops = limits
        if not ((0 <= starts) & (starts <= stops) & (stops <= tokens)).all():
            raise ValueError(f"0 <= starts <= stops <= {tokens} must hold; they are {starts.tolist()} and {stops.tolist()}")
        for layer in cache._layers:
            if tokens > 1:
                layer.reserve(int((seen + stops - starts).max()))
        return ids, cache, _Spans(batch, tokens, starts, stops)

    def _scratch(self, rows):
        scratch = getattr(self._local, "scratch", None)
        if scratch is None or scratch.rows < rows or (scratch.kv is None) != (self.cache_dtype == np.float32):
            scratch = self._local.scratch = _Scratch(self.geometry, rows, self.cache_dtype)
        return scratch

    def _forward(self, ids, cache, spans, final=None):
        """Hidden states behind the final norm, (B, T, width), of a segment's tokens.

        ``final`` says that only the last token of a prompt is wanted: False, this segment is not its last, and None is
        returned; True, it is, and the result is (B, 1, width).
        """
        g = self.geometry
        batch, tokens = ids.shape
        buffers = self._scratch(batch * tokens)
        x = buffers.x[: batch * tokens]
        np.take(self.embedding, ids.ravel(), axis=0, out=x, mode="clip")
        # Padding before a row's start has no position of its own; its outputs are never read.
        positions = np.maximum(cache.tokens_seen[:, None] + np.arange(tokens) - spans.starts[:, None], 0)
        rope = self._rope(positions)
        for layer, memory in zip(self._layers[:-1], cache._layers):
            self._attend(layer, memory, x, rope, spans, buffers, ids if layer is self._layers[0] else None)
            self._mlp(layer, x, buffers)
        layer, memory = self._layers[-1], cache._layers[-1]
        if final is None:
            self._attend(layer, memory, x, rope, spans, buffers)
        else:
            x = self._attend_last(layer, memory, x, rope, spans, buffers, final)
            if not final:
                return None
        self._mlp(layer, x, buffers)
        hidden = _normed(x, g.eps, np.empty_like(x))
        hidden *= self.norm
        return hidden.reshape(batch, -1, g.width)

    def _qkv(self, layer, x, rope, buffers, batch, only_pairs=False, ids=None):
        """q (B, T, Hq, D), k and v (B, T, Hkv, D) of hidden states x (B T, width); q is None with ``only_pairs``.

        Given the token ``ids`` that x are the embeddings of, products with a short vocabulary's embeddings are looked up.
        """
        g = self.geometry
        n, skipped = len(x), g.heads if only_pairs else 0
        heads = g.heads + 2 * g.kv_heads - skipped
        qkv = buffers.qkv[:n].reshape(n, -1)[:, : heads * g.head_dim]
        if ids is not None and self._table is not None:
            np.take(self._table, ids.ravel(), axis=0, out=qkv, mode="clip")
        else:
            np.matmul(_normed(x, g.eps, buffers.normed[:n]), layer.qkv[:, skipped * g.head_dim :], out=qkv)
        qkv = qkv.reshape(batch, -1, heads, g.head_dim)
        turned = self._turn(qkv[:, :, : -g.kv_heads], rope, buffers)
        k, v = turned[:, :, g.heads - skipped :], qkv[:, :, -g.kv_heads :]
        if buffers.kv is not None:
            kv = buffers.kv[:, :n].reshape(2, *k.shape)
            np.copyto(kv[0], k, casting="same_kind")
            np.copyto(kv[1], v, casting="same_kind")
            k, v = kv
        return (None if only_pairs else turned[:, :, : g.heads]), k, v

    def _turn(self, x, rope, buffers):
        """Rotary embedding of x (B, T, H, D): [a, b] -> [a cos - b sin, b cos + a sin]."""
        cos, sin = rope
        n = x.shape[0] * x.shape[1]
        flat = buffers.turned.reshape(-1)[: x.size].reshape(x.shape)
        other = buffers.swapped.reshape(-1)[: x.size].reshape(x.shape)
        halves = (*x.shape[:3], 2, x.shape[3] // 2)
        np.multiply(x, cos, out=flat)
        np.multiply(x.reshape(halves)[..., ::-1, :], sin, out=other.reshape(halves))
        return np.add(flat, other, out=flat)

    def _attend(self, layer, memory, x, rope, spans, buffers, ids=None):
        """x += attention, in place."""
        batch, n = len(spans.rows), len(x)
        q, k, v = self._qkv(layer, x, rope, buffers, batch, ids=ids)
        attended = buffers.attended[:n].reshape(q.shape)
        memory.attend(q, k, v, spans, attended)
        x += np.matmul(attended.reshape(n, -1), layer.out, out=buffers.step[:n])

    def _attend_last(self, layer, memory, x, rope, spans, buffers, final):
        """The last layer's attention where only the last token's output is wanted: x + attention of it, (B, width).

        Every token enters the cache. Without ``final`` that is all, and None is returned.
        """
        batch, width = len(spans.rows), x.shape[1]
        tokens = len(x) // batch
        if memory.append is None:
            q, k, v = self._qkv(layer, x, rope, buffers, batch)
            attended = buffers.attended[: len(x)].reshape(q.shape)
            memory.attend(q, k, v, spans, attended)
            attended = attended[:, -1]
        else:
            _, k, v = self._qkv(layer, x, rope, buffers, batch, only_pairs=True)
            k, v = k.copy(), v.copy()
            before = tokens - 1 if final else tokens
            memory.append(k[:, :before], v[:, :before], spans.cut(0, before))
            if final:
                attended = np.empty((batch, 1, self.geometry.heads, self.geometry.head_dim), np.float32)
                last = x.reshape(batch, tokens, width)[:, -1]
                q, _, _ = self._qkv(layer, last, tuple(part[:, -1:] for part in rope), buffers, batch)
                memory.attend(q, k[:, -1:], v[:, -1:], spans.cut(tokens - 1, tokens), attended)
        if final:
            return x.reshape(batch, tokens, width)[:, -1] + attended.reshape(batch, -1) @ layer.out

    def _mlp(self, layer, x, buffers):
        """x += MLP, in place."""
        n, inner = len(x), self.geometry.mlp
        gate_up, activated = buffers.gate_up[:n], buffers.activated[:n]
        np.matmul(_normed(x, self.geometry.eps, buffers.normed[:n]), layer.gate_up, out=gate_up)
        np.tanh(gate_up[:, :inner], out=activated)
        activated += np.float32(1)
        activated *= gate_up[:, :inner]
        activated *= gate_up[:, inner:]
        x += np.matmul(activated, layer.down, out=buffers.step[:n])


class _Rope:
    """Cosines and sines of positions, made as far as they are needed."""

    def __init__(self, frequencies):
        self.frequencies = frequencies
        self.cos = self.sin = np.empty((0, 2 * len(frequencies)), np.float32)

    def __call__(self, positions):
        """positions (B, T) -> cos (B or 1, T, 1, D) and sin (B or 1, T, 1, 2, D/2), the first half negated."""
        need = int(positions.max(initial=0)) + 1
        cos, sin = self.cos, self.sin
        if need > len(cos):
            # The angles are float32 products, as in transformers, so that both turn by the same.
            angles = np.arange(max(need, 2 * len(cos)), dtype=np.float32)[:, None] * self.frequencies
            angles = angles.astype(np.float64)
            cos = np.concatenate([np.cos(angles)] * 2, axis=1).astype(np.float32)
            sin = np.concatenate([-np.sin(angles), np.sin(angles)], axis=1).astype(np.float32)
            self.cos, self.sin = cos, sin
        if (positions == positions[:1]).all():
            positions = positions[:1]
        half = cos.shape[1] // 2
        return cos[positions][:, :, None], sin[positions].reshape(*positions.shape, 1, 2, half)


def _normed(x, eps, out):
    """x / sqrt(mean(x^2) + eps) for each row."""
    scale = np.vecdot(x, x)
    scale /= x.shape[1]
    scale += np.float32(eps)
    np.sqrt(scale, out=scale)
    return np.divide(x, scale[:, None], out=out)


def _segments(batch, tokens):
    """Cuts a call of (B, T) tokens into parts of at most SEGMENT tokens in all rows together."""
    step = max(1, SEGMENT // batch)
    return [(first, min(first + step, tokens)) for first in range(0, tokens, step)]


def _rows(ids):
    """The prompts as a list of 1-D integer arrays, and whether ``ids`` was one row alone."""
    try:
        array = np.asarray(ids)
    except ValueError:  # rows of different length
        array = None
    single = array is not None and array.ndim == 1 and array.dtype.kind in "iu"
    rows = [np.asarray(row) for row in ([ids] if single else ids)]
    if not rows or any(row.ndim != 1 or row.dtype.kind not in "iu" for row in rows if row.size):
        raise TypeError("ids must be integers: one row of them, an array (B, T), or a sequence of rows")
    return rows, single


def _cache_dtype(name):
    if name not in ("float32", "float16"):
        raise ValueError(f"cache_dtype must be 'float32' or 'float16'; it is {name!r}")
    return np.dtype(name)
