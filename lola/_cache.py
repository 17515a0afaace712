"""The memory of a sequence: window, sparse cache and hidden state, for every row and head."""

from __future__ import annotations

import hashlib
import json
import os
import struct
import threading
from dataclasses import asdict
from typing import Any

import numpy as np

from . import _lola
from ._config import Config, integer

_SHAPE = ("batch", "heads", "kv_heads", "head_dim", "value_dim", "feature_dim", "dtype")
_DTYPES = ("float32", "float16", "bfloat16")

# A saved cache: magic, version, length of the header; the header, JSON; the buffers that it lists, little-endian and
# dense; the SHA-256 of all that.
_MAGIC = b"LOLA\x00mem"
_VERSION = 1
_PREFIX = struct.Struct("<8sIQ")


def _dtype_name(dtype: Any) -> str:
    """The name of a dtype of NumPy, torch or ml_dtypes, or of its scalar type."""
    name = dtype if isinstance(dtype, str) else getattr(dtype, "name", None) or getattr(dtype, "__name__", None)
    if name is None and type(dtype).__name__ == "dtype":
        name = str(dtype).removeprefix("torch.")
    if not isinstance(name, str):
        raise TypeError(f"dtype must name a floating-point type, got {type(dtype).__name__}")
    if name not in _DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(map(repr, _DTYPES))}, got {name!r}")
    return name


class Cache(_lola.Cache):
    """What LoLA (arXiv 2505.23666) remembers of `batch` sequences in one layer. Its size does not depend on their length.

    `lola.attention(q, k, v, cache=cache, ...)` appends tokens to it; calls from several threads come one after the other.
    The first call in which a token enters fixes the mixing, the feature map (or that features are given), the gate and
    the dtype of q for the life of the cache, through `reset` too.

    Args:
        config: A lola.Config.
        batch: Rows, B.
        heads: Query heads, Hq.
        kv_heads: Key and value heads, a divisor of `heads`; default: as many as `heads`.
        head_dim: Size of queries and keys, D.
        value_dim: Size of values, Dv; default: `head_dim`.
        feature_dim: Size of the features, F; `feature_map.feature_dim(head_dim)` says it.
        dtype: Of keys and values: "float32", "float16" or "bfloat16", or a dtype of NumPy, torch or ml_dtypes.
        device: "cpu", "cuda" (the current device), "cuda:1" and so on, or a torch.device.

    On a device, calls and operations are queued in the order of the caller's current stream, and one on another stream waits
    for the last; looking at positions and scores waits for the device. After a fault of the device the cache is unusable:
    whatever uses it raises RuntimeError.

    Raises:
        TypeError, ValueError: An argument of a wrong kind or value.
        MemoryError: It does not fit.
        RuntimeError: A device that cannot be used; the text says why.

    >>> cache = Cache(Config(window=64, chunk=64, sparse=256), heads=4, kv_heads=2, head_dim=64, feature_dim=128)
    >>> cache.tokens_seen, cache.hidden.shape, sum(cache.memory().values()) == cache.nbytes
    (array([0]), (1, 4, 128, 64), True)
    """

    def __new__(
        cls,
        config: Config,
        *,
        batch: int = 1,
        heads: int,
        kv_heads: int | None = None,
        head_dim: int,
        value_dim: int | None = None,
        feature_dim: int,
        dtype: Any = "float32",
        device: Any = "cpu",
    ) -> Cache:
        if not isinstance(config, Config):
            raise TypeError(f"config must be a lola.Config, got {type(config).__name__}")
        return super().__new__(
            cls,
            config,
            batch,
            heads,
            heads if kv_heads is None else kv_heads,
            head_dim,
            head_dim if value_dim is None else value_dim,
            feature_dim,
            _dtype_name(dtype),
            device,
        )

    # --- what it holds ------------------------------------------------------------------------

    def sparse_positions(self, row: int, head: int) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Positions in the sparse cache that query head `head` of `row` reads, ascending, (n,) int64."""
        positions, _ = self._sparse(row, head)
        positions.sort()
        return positions

    def sparse_scores(self, row: int, head: int) -> np.ndarray[Any, np.dtype[np.float32]]:
        """Their scores at the last ranking, in the same order, (n,) float32; NaN where never ranked."""
        positions, scores = self._sparse(row, head)
        return scores[positions.argsort()]

    def window_positions(self, row: int) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Positions in the window of `row`, ascending, (n,) int64."""
        return np.arange(*self._window(row), dtype=np.int64)

    def sync(self) -> None:
        """Waits for the last use on the current stream, replays of graphs too; RuntimeError if it failed. On the CPU: nothing.

        `tokens_seen` is counted by eager calls and waits for nothing, but is read from the device once a graph was recorded.
        """
        self._sync()

    # --- rows ---------------------------------------------------------------------------------

    def copy(self) -> Cache:
        """A cache of the same contents and of its own memory."""
        return self._gather(None)

    def select(self, rows: Any) -> Cache:
        """A new cache of these rows, integers (n,), in this order; a row may be named several times.

        >>> cache = Cache(Config(), batch=3, heads=1, head_dim=8, feature_dim=8)
        >>> cache.select([2, 0]).batch
        2
        """
        return self._gather(self._rows(rows))

    def select_(self, rows: Any) -> Cache:
        """The same in place, for as many rows as there are: beam search. Returns the cache."""
        self._gather_in_place(self._rows(rows))
        return self

    def repeat(self, n: int) -> Cache:
        """A new cache with each row n times, one after the other, as torch.repeat_interleave does."""
        return self._gather(np.repeat(np.arange(self.batch), integer("n", n, 1)))

    def reset(self, rows: Any = None) -> None:
        """Empties these rows, integers (n,), or all. What the first call fixed stays."""
        self._reset(rows)

    def crop(self, n: int) -> None:
        """Forgets positions n and later. A row goes back to the start of its current chunk at most; ValueError beyond."""
        self._crop(n)

    def to(self, device: Any) -> Cache:
        """The cache on this device: itself if it lies there, else a new one of the same contents, which continues."""
        return self._to(device)

    @staticmethod
    def _rows(rows: Any) -> Any:
        if rows is None:
            raise TypeError("rows must be integers, got None")
        return list(rows) if isinstance(rows, range) else rows

    # --- files --------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes one file, in whole or not at all: an existing one is replaced when the new one is complete.

        The file names the feature map and the gate by which the cache is bound, but holds no feature map.
        """
        path = os.fspath(path)
        data = self._to_bytes()
        temporary = f"{path}.{os.getpid()}-{threading.get_ident()}.tmp"
        with open(temporary, "xb") as file:
            try:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
                os.replace(temporary, path)
            except BaseException:
                os.unlink(temporary)
                raise

    @classmethod
    def load(cls, path: str | os.PathLike[str], device: Any = "cpu") -> Cache:
        """Reads a file of `save`. Continuing from it equals continuing from the original, given the same feature map.

        A file does not say where its cache lay; `device` says where the new one lies.

        Raises:
            OSError: The file cannot be read.
            ValueError: It is damaged, truncated, of a newer version or no such file; the text says which.
            RuntimeError: A device that cannot be used.
        """
        path = os.fspath(path)
        device = _lola.device(device)
        with open(path, "rb") as file:
            return cls._from_bytes(file.read(), str(path)).to(device)

    def _to_bytes(self) -> bytes:
        cache = self.copy() if self.device == "cpu" else self.to("cpu")
        terms: list[Any] | None = None
        if cache._terms is not None:
            mixing, query_dtype, source, feature_map, fingerprint, gate = cache._terms
            if feature_map is not None:
                fingerprint = feature_map.fingerprint
            terms = [mixing, query_dtype, source, fingerprint, None if gate is None else gate.tolist()]
        buffers = [(name, str(x.dtype), x.shape, _little_endian(x)) for name, x in cache.buffers().items()]
        header = json.dumps(
            {
                "config": asdict(cache.config),
                "shape": {name: getattr(cache, name) for name in _SHAPE},
                "terms": terms,
                "buffers": [[name, shape] for name, _, shape, _ in buffers],
            }
        ).encode()
        body = b"".join([_PREFIX.pack(_MAGIC, _VERSION, len(header)), header, *(data for *_, data in buffers)])
        return body + hashlib.sha256(body).digest()

    @classmethod
    def _from_bytes(cls, data: bytes, name: str) -> Cache:
        size = hashlib.sha256().digest_size
        if len(data) < _PREFIX.size + size or not data.startswith(_MAGIC):
            what = "is no saved cache" if not data.startswith(_MAGIC[: len(data)]) else "is truncated"
            raise ValueError(f"{name} {what}")
        _, version, length = _PREFIX.unpack_from(data)
        if version > _VERSION:
            raise ValueError(f"{name} was saved by a newer lola: its version is {version}, this one reads {_VERSION}")
        if hashlib.sha256(data[:-size]).digest() != data[-size:]:
            raise ValueError(f"{name} is damaged or truncated: its checksum is wrong")
        try:
            header = json.loads(data[_PREFIX.size : _PREFIX.size + length])
            cache = cls(Config(**header["config"]), **header["shape"])
            if header["terms"] is not None:
                cache._bind(*header["terms"])
            cache._fill(header["buffers"], memoryview(data)[_PREFIX.size + length : -size])
            cache._check()
        except (TypeError, ValueError, LookupError, MemoryError) as error:
            raise ValueError(f"{name} holds no valid cache: {error}") from error
        return cache

    def _fill(self, listed: list[Any], data: memoryview) -> None:
        buffers = self.buffers()
        if [[name, list(x.shape)] for name, x in buffers.items()] != listed:
            raise ValueError("its buffers are not those of its configuration")
        if sum(x.nbytes for x in buffers.values()) != len(data):
            raise ValueError("its buffers have another length than they should")
        for buffer in buffers.values():
            stored = np.frombuffer(data[: buffer.nbytes], f"<u{buffer.itemsize}")
            buffer.view(f"u{buffer.itemsize}")[...] = stored.reshape(buffer.shape)
            data = data[buffer.nbytes :]

    def __reduce__(self) -> tuple[Any, ...]:
        return _from_pickle, (type(self), self._to_bytes(), self.device)

    def __copy__(self) -> Cache:
        return self.copy()

    def __deepcopy__(self, memo: dict[int, Any]) -> Cache:
        return self.copy()

    def __repr__(self) -> str:
        sizes = ", ".join(f"{name}={getattr(self, name)!r}" for name in (*_SHAPE, *(["device"] if self.device != "cpu" else [])))
        try:
            seen = self.tokens_seen.tolist()
        except RuntimeError as error:
            return f"<lola.Cache {sizes}, {error}>"
        tokens = f"{seen}" if len(seen) <= 8 else f"[{', '.join(map(str, seen[:8]))}, ...]"
        return f"<lola.Cache {sizes}, tokens_seen={tokens}, nbytes={self.nbytes}, {self.config}>"


def _little_endian(array: np.ndarray[Any, Any]) -> bytes:
    numbers = array.view(f"u{array.itemsize}")
    return numbers.astype(numbers.dtype.newbyteorder("<"), copy=False).tobytes()


def _from_pickle(cls: type[Cache], data: bytes, device: str = "cpu") -> Cache:
    return cls._from_bytes(data, "the pickle").to(device)
