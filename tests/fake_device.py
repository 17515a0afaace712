"""A stand-in for CUDA devices: tests/c/fake_cuda.c compiled into a module, and arrays that lie on such a device."""

import hashlib
import importlib.machinery
import importlib.util
import os
import pathlib
import subprocess
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from oracle import DTYPES

ROOT = pathlib.Path(__file__).parent.parent
CODES = {"float32": (2, 32), "float64": (2, 64), "float16": (2, 16), "bfloat16": (4, 16), "int32": (0, 32), "int64": (0, 64)}
VALUE_ERROR, MEMORY_ERROR, DEVICE_ERROR = 1, 2, 3


def build():
    """The module `lola._cuda` of tests/c/fake_cuda.c; compiled once for the same files."""
    sources = [ROOT / "tests/c/fake_cuda.c", *sorted(ROOT.glob("csrc/core/*.c")), *sorted(ROOT.glob("csrc/cpu/*.c")),
               ROOT / "csrc/cpu/isa/scalar.c"]
    read = [*sources, *sorted(ROOT.glob("csrc/**/*.h")), ROOT / "csrc/python/dlpack.h"]
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in read)).hexdigest()[:16]
    folder = pathlib.Path(tempfile.gettempdir()) / f"lola-fake-{os.getuid()}"
    folder.mkdir(exist_ok=True)
    made = folder / f"{digest}{sysconfig.get_config_var('EXT_SUFFIX')}"
    if not made.exists():
        cc = [*sysconfig.get_config_var("CC").split(), "-std=gnu11", "-O2", "-fPIC", "-ffp-contract=off", "-fno-math-errno",
              "-pthread", "-Wall", f"-I{ROOT}/csrc", f"-I{ROOT}/csrc/include",
              f"-I{sysconfig.get_path('include')}"]
        with tempfile.TemporaryDirectory(dir=folder) as work, ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = [f"{work}/{i}.o" for i in range(len(sources))]
            compile_one = lambda source, target: subprocess.run([*cc, "-c", str(source), "-o", target], check=True)
            list(pool.map(compile_one, sources, objects))
            subprocess.run([*cc, "-shared", "-o", f"{work}/made", *objects, "-lm"], check=True)
            os.replace(f"{work}/made", made)
    loader = importlib.machinery.ExtensionFileLoader("lola._cuda", str(made))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader("lola._cuda", loader))
    loader.exec_module(module)
    return module


class Array:
    """A dense array on a device, of a library whose work is done on `stream`; through __dlpack__."""

    fake = None                 # the module
    ready = 0                   # the library's current stream

    def __init__(self, x, device=0, stream=None):
        x = np.asarray(x)
        self.dtype = "bfloat16" if x.dtype == DTYPES["bfloat16"] else x.dtype.name
        self.shape, self.device, self.asked = x.shape, device, []
        self.strides = tuple(s // x.itemsize for s in np.ascontiguousarray(x).strides)
        self.nbytes, self.owned = x.nbytes, True
        self.address = self.fake.allocate(device, x.nbytes)
        self.fake.put(device, self.address, np.ascontiguousarray(x).tobytes(), self.ready if stream is None else stream)

    def __del__(self):
        if getattr(self, "owned", False):
            self.owned = False
            self.fake.free(self.address)

    def shipment(self):
        return (self.address, self.shape, self.strides, *CODES[self.dtype], self.device, 0, True)

    def __dlpack_device__(self):
        return 2, self.device

    def __dlpack__(self, *, stream=None, max_version=None):
        self.asked.append(stream)
        if stream not in (None, -1):            # as the protocol asks of a producer
            self.fake.follow(self.device, 0 if stream == 1 else stream, self.ready)
        return self.fake.ship(*self.shipment())

    def numpy(self, stream=None):
        size = int(np.prod(self.shape)) * np.dtype(DTYPES.get(self.dtype, self.dtype)).itemsize
        data = self.fake.take(self.device, self.address, size, self.ready if stream is None else stream)
        return np.frombuffer(data, DTYPES.get(self.dtype, self.dtype)).reshape(self.shape).copy()

    def view(self, shape, strides, offset=0):
        """Another array over the same memory; strides and offset in elements."""
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__, shape=tuple(shape), strides=tuple(strides), owned=False, base=self)
        other.address = self.address + offset * (CODES[self.dtype][1] // 8)
        return other


class Allocating(Array):
    """The same with torch's way to make results."""

    def new_empty(self, shape, dtype=None):
        self.made = type(self)(np.full(shape, 77, DTYPES[self.dtype]), self.device)
        return self.made


class Exchanging(Allocating):
    """The same through DLPack's C table, as torch's tensors are read."""

    __dlpack__ = __dlpack_device__ = None


class Interface:
    """An array that only has the CUDA array interface."""

    def __init__(self, array, stream=None):
        self.array = array
        self.__cuda_array_interface__ = {
            "shape": array.shape, "typestr": np.dtype(array.dtype).str, "data": (array.address, False), "version": 3,
            "strides": tuple(s * np.dtype(array.dtype).itemsize for s in array.strides), "stream": stream,
        }


def taken(x, fake, stream=0):
    """A device array of lola's own as NumPy array, read on a stream that was announced to it."""
    capsule = x.__dlpack__(stream=stream or 1, max_version=(1, 0))
    address, shape, strides, code, bits, device, flags = fake.unship(capsule)
    name = next(name for name, known in CODES.items() if known == (code, bits))
    size = int(np.prod(shape)) * bits // 8
    return np.frombuffer(fake.take(device, address, size, stream), DTYPES.get(name, name)).reshape(shape).copy()
