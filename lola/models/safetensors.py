"""A strict reader of safetensors files by memory map, and a small writer.

The format (huggingface/safetensors): eight bytes with the header's length (little endian), a JSON header that maps each
tensor's name to ``{"dtype", "shape", "data_offsets"}``, then the data. A file is checked in full before a tensor is
read: header, names, shapes, and that the tensors fill the data exactly, without gap or overlap.

Needs NumPy only. bfloat16, which NumPy lacks, is widened to float32 as it is read, which is exact.
"""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

__all__ = ["SafeTensors", "open_folder", "write"]

_DTYPES = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "|i1",
    "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "|u1", "BOOL": "|b1",
}  # fmt: skip
_NAMES = {np.dtype(code): name for name, code in _DTYPES.items() if name != "BF16"}
_LONGEST_HEADER = 100_000_000


class SafeTensors(Mapping):
    """The tensors of one file, or of several that an index joins, by name.

    Parameters
    ----------
    *paths : path
        The files. No name may occur in two of them.

    Raises
    ------
    FileNotFoundError
        If a file is absent.
    ValueError
        If a file is no safetensors file or is damaged; the message names the file and, where it can, the tensor.

    Examples
    --------
    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "one.safetensors"
    >>> write(path, {"x": np.arange(3, dtype=np.float16)})
    >>> tensors = SafeTensors(path)
    >>> tensors["x"], list(tensors)
    (array([0., 1., 2.], dtype=float16), ['x'])
    """

    def __init__(self, *paths: str | os.PathLike):
        self._where: dict[str, tuple[Path, np.ndarray, str, tuple[int, ...]]] = {}
        for path in map(Path, paths):
            for name, raw, dtype, shape in _parse(path):
                if name in self._where:
                    raise ValueError(f"tensor {name!r} is in {self._where[name][0]} and again in {path}")
                self._where[name] = path, raw, dtype, shape

    def __getitem__(self, name: str) -> np.ndarray:
        """The tensor, read-only, a view of the file; BF16 as a float32 copy. Raises KeyError for a name not there."""
        _, raw, dtype, shape = self._where[name]
        array = raw.view(_DTYPES[dtype])
        if dtype == "BF16":
            array = (array.astype(np.uint32) << 16).view(np.float32)
        return array.reshape(shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)

    def file(self, name: str) -> Path:
        """The file that holds a tensor."""
        return self._where[name][0]

    def dtype(self, name: str) -> str:
        """Its dtype as the file calls it, e.g. ``"F16"`` or ``"BF16"``."""
        return self._where[name][2]

    def shape(self, name: str) -> tuple[int, ...]:
        """Its shape, without reading it."""
        return self._where[name][3]

    def raw(self, name: str) -> np.ndarray:
        """Its bytes as they stand in the file: (n,) uint8, read-only."""
        return self._where[name][1]


def _parse(path: Path) -> Iterator[tuple[str, np.ndarray, str, tuple[int, ...]]]:
    """(name, bytes, dtype, shape) of each tensor of one file, in the order of the data."""
    size = path.stat().st_size
    if size < 8:
        raise ValueError(f"{path} is no safetensors file: it has {size} bytes, fewer than the 8 that say how long the header is")
    with path.open("rb") as file:
        # The map outlives the file handle and is dropped with the last array that looks into it.
        data = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
    length = int(data[:8].view("<u8")[0])
    if length > min(size - 8, _LONGEST_HEADER):
        raise ValueError(f"{path} is no safetensors file or is cut short: its header would take {length} bytes of {size - 8}")
    try:
        header = json.loads(data[8 : 8 + length].tobytes(), object_pairs_hook=_no_repeats)
    except ValueError as error:
        raise ValueError(f"{path} is no safetensors file: its header is not JSON ({error})") from None
    if not isinstance(header, dict):
        raise ValueError(f"{path} is no safetensors file: its header is a JSON {type(header).__name__}, not an object")
    header.pop("__metadata__", None)
    data = data[8 + length :]

    spans = []
    for name, entry in header.items():
        try:
            dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
            whole = all(type(n) is int and n >= 0 for n in (*shape, begin, end))
        except (TypeError, KeyError, ValueError):
            whole = False
        if not whole:
            raise ValueError(f"{path}: tensor {name!r} must have dtype, shape and data_offsets; it has {entry!r}")
        if dtype not in _DTYPES:
            raise ValueError(f"{path}: tensor {name!r} has dtype {dtype}; readable are {', '.join(_DTYPES)}")
        count = 1
        for n in shape:
            count *= n
        need = count * np.dtype(_DTYPES[dtype]).itemsize
        if end - begin != need:
            raise ValueError(f"{path}: tensor {name!r}, {dtype} {shape}, takes {need} bytes; data_offsets give {end - begin}")
        spans.append((begin, end, name, dtype, tuple(shape)))
    at = 0
    for begin, end, name, dtype, shape in sorted(spans):
        if begin != at:
            raise ValueError(f"{path}: tensor {name!r} begins at byte {begin} of the data; the one before it ends at {at}")
        at = end
    if at != len(data):
        raise ValueError(f"{path} is damaged: the tensors take {at} bytes, the file holds {len(data)}")
    for begin, end, name, dtype, shape in sorted(spans):
        yield name, data[begin:end], dtype, shape


def _no_repeats(pairs):
    names = [name for name, _ in pairs]
    if len(set(names)) != len(names):
        raise ValueError("a name occurs twice")
    return dict(pairs)


def open_folder(folder: str | os.PathLike) -> SafeTensors:
    """The weights of a Hugging Face folder: ``model.safetensors``, or the files of ``model.safetensors.index.json``.

    Raises
    ------
    FileNotFoundError
        If there is neither, or a file that the index names is absent.
    ValueError
        As ``SafeTensors``; and if the index and its files disagree about a tensor.
    """
    folder = Path(folder)
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return SafeTensors(single)
    if not index.is_file():
        raise FileNotFoundError(f"{folder} has neither {single.name} nor {index.name}")
    try:
        places = json.loads(index.read_text("utf-8"))["weight_map"]
        files = sorted(set(places.values()))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{index} must be JSON with a weight_map from tensor to file ({error!r})") from None
    for name in files:
        # An index is data from elsewhere: it may name files of its own folder only.
        if not isinstance(name, str) or Path(name).name != name:
            raise ValueError(f"{index} must name files in its own folder; it names {name!r}")
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{index} names {name}, which is not in {folder}")
    tensors = SafeTensors(*(folder / name for name in files))
    for name in sorted(places.keys() ^ tensors.keys()):
        raise ValueError(f"{index} and its files disagree: tensor {name!r} is only in {'it' if name in places else tensors.file(name)}")
    for name, file in places.items():
        if tensors.file(name).name != file:
            raise ValueError(f"{index} places tensor {name!r} in {file}; it is in {tensors.file(name).name}")
    return tensors


def write(path: str | os.PathLike, tensors: Mapping[str, np.ndarray]) -> None:
    """Write one file: each array in its own dtype, C order, in the order given.

    Raises ``TypeError`` for a dtype that the format lacks.
    """
    header, at, arrays = {}, 0, []
    for name, array in tensors.items():
        array = np.asarray(array, order="C")
        array = array.astype(array.dtype.newbyteorder("<"), copy=False)
        if array.dtype not in _NAMES:
            raise TypeError(f"tensor {name!r} must have one of the dtypes {', '.join(d.name for d in _NAMES)}; it has {array.dtype}")
        header[name] = {"dtype": _NAMES[array.dtype], "shape": list(array.shape), "data_offsets": [at, at + array.nbytes]}
        at += array.nbytes
        arrays.append(array)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that the data is aligned in the file, and in a map of it
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for array in arrays:
            file.write(array.tobytes())
