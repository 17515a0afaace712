"""The CPU: its timer, its ceilings and the peers on the same cores.

A backend is an object with the attributes and methods of `Cpu`; `sections.py` asks nothing of the device itself.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import numpy as np

import lola

try:
    import threadpoolctl
except ImportError:
    threadpoolctl = None
try:
    import torch
    import torch.nn.functional as F
except ImportError:
    torch = None

_FMA_ROUNDS = 4_000_000
_GEMM_SIZE = 2048


class Cpu:
    """Where things run and what else could run there.

    Attributes
    ----------
    name : str
    threads : int
        As many as are measured at most.
    cache_bytes : int
        The last-level cache.
    """

    name = "cpu"

    def __init__(self, threads: int | None = None):
        self.cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self.threads = threads or self.cores
        self.cache_bytes = _last_level_cache()
        self._ceilings = None

    # ------------------------------------------------------------------------------------------------- the machine

    def describe(self) -> dict:
        return {
            "device": {
                "kind": "cpu",
                "name": _processor(),
                "machine": platform.machine(),
                "system": platform.system(),
                "cores": self.cores,
                "threads": self.threads,
                "cache_bytes": self.cache_bytes,
                "isa": lola._lola.isa(),
            },
            "versions": {
                "lola": lola.__version__,
                "python": platform.python_version(),
                "numpy": np.__version__,
                "torch": None if torch is None else torch.__version__,
                "compiler": _compiler_version(),
            },
            "blas": self._blas(),
        }

    def _blas(self) -> list[dict]:
        if threadpoolctl is None:
            return []
        names = ("internal_api", "version", "architecture", "threading_layer", "num_threads")
        return [{n: x[n] for n in names if x.get(n)} for x in threadpoolctl.threadpool_info()]

    @contextlib.contextmanager
    def using(self, threads: int):
        """Everything inside, lola and peers alike, runs on so many threads."""
        before = lola.get_num_threads(), torch and torch.get_num_threads()
        limits = threadpoolctl.threadpool_limits(threads) if threadpoolctl else contextlib.nullcontext()
        with limits:
            lola.set_num_threads(threads)
            if torch:
                torch.set_num_threads(threads)
            try:
                yield
            finally:
                lola.set_num_threads(before[0])
                if torch:
                    torch.set_num_threads(before[1])

    # ---------------------------------------------------------------------------------------------------- the timer

    def settle(self):
        """Lets the threads of other libraries, which spin for a while after their work, fall asleep."""
        time.sleep(0.03)

    def timed(self, run):
        """(seconds, what it returned)."""
        begin = time.perf_counter()
        value = run()
        return time.perf_counter() - begin, value

    # ------------------------------------------------------------------------------------------------- the ceilings

    def _library(self):
        if self._ceilings is None:
            self._ceilings = _build_ceilings()
            # The pages must be there before the first pass that counts.
            if not self._ceilings.ceiling_open(max(4 * self.cache_bytes, 256 << 20)):
                raise MemoryError("no memory to measure the read bandwidth with")
        return self._ceilings

    def peak_flops(self, threads: int) -> float:
        """FLOP/s of fused multiply-adds in registers, float32, for some 30 ms."""
        return self._library().ceiling_fma(threads, _FMA_ROUNDS) * 1e9

    def read_bandwidth(self, threads: int) -> float:
        """Bytes/s of reading more than four times the last-level cache once."""
        return self._library().ceiling_read(threads) * 1e9

    def gemm_flops(self):
        """A function that returns the FLOP/s of one float32 matrix product by NumPy's BLAS."""
        n = _GEMM_SIZE
        a, b = np.random.default_rng(0).standard_normal((2, n, n), np.float32)
        out = np.empty_like(a)

        def run():
            seconds, _ = self.timed(lambda: np.matmul(a, b, out=out))
            return 2 * n**3 / seconds

        return run

    def close(self):
        if self._ceilings is not None:
            self._ceilings.ceiling_close()
            self._ceilings = None

    # --------------------------------------------------------------------------------------------------- the peers

    has_torch = torch is not None

    def tensor(self, x: np.ndarray, dtype: str):
        """A torch tensor of float32 data in the dtype of a case."""
        return torch.from_numpy(np.ascontiguousarray(x)).to(getattr(torch, dtype))

    def softmax_prefill(self, drawn, dtype: str):
        """Causal softmax attention by torch: a function that returns (1, T, H, D), its layout made beforehand."""
        q, k, v = (self.tensor(x.swapaxes(1, 2), dtype) for x in drawn)

        def run():
            with torch.inference_mode():
                return F.scaled_dot_product_attention(q, k, v, is_causal=True)

        return run, lambda out: out.transpose(1, 2).float().numpy()

    def softmax_decode(self, drawn, dtype: str, copies: int):
        """One query over all keys, in the three ways that torch offers for grouped heads; the best of them is the peer.

        Each call takes the next of `copies` copies of keys and values. Returns names and functions, which return
        (1, Hq, 1, D) or (1, Hkv, r, D).
        """
        q, k, v = (self.tensor(x.swapaxes(1, 2), dtype) for x in drawn)
        q = q[:, :, -1:].contiguous()
        layers = [(k, v)] + [(k.clone(), v.clone()) for _ in range(copies - 1)]
        (_, heads, _, d), kv_heads = q.shape, k.shape[1]
        grouped = q.view(1, kv_heads, heads // kv_heads, d)
        turn = iter_forever(layers)

        def flag():
            k, v = next(turn)
            return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)

        def rows():
            k, v = next(turn)
            return F.scaled_dot_product_attention(grouped, k, v)

        def products():
            k, v = next(turn)
            return ((grouped * d**-0.5) @ k.transpose(2, 3)).softmax(-1) @ v

        def without_gradients(run):
            def inside():
                with torch.inference_mode():
                    return run()

            return inside

        runs = {"SDPA, enable_gqa": flag, "SDPA, a group's heads as queries": rows, "matmul, softmax, matmul": products}
        return {name: without_gradients(run) for name, run in runs.items()}, lambda out: out.reshape(1, 1, heads, d).float().numpy()

    def plain(self, layer, dtype: str):
        """LoLA in plain PyTorch, for this layer."""
        from plain_torch import PlainLola

        weights = (torch.from_numpy(x) for x in (layer.w_q, layer.w_k, layer.gate))
        return PlainLola(layer.geometry, *weights, dtype=getattr(torch, dtype))


def iter_forever(items):
    while True:
        yield from items


def _build_ceilings():
    compiler = _compiler()
    if compiler is None:
        raise RuntimeError("the ceilings take a C compiler: install gcc or clang, or name one in CC")
    source = Path(__file__).with_name("ceilings.c")
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "ceilings.so"
        flags = ["-std=gnu11", "-O3", "-ffp-contract=fast", "-shared", "-fPIC", "-pthread"]
        native = ["-mcpu=native"] if platform.machine() in ("arm64", "aarch64") else ["-march=native"]
        subprocess.run([*compiler, *flags, *native, str(source), "-o", str(made)], check=True)
        library = ctypes.CDLL(str(made))
    library.ceiling_fma.restype = library.ceiling_read.restype = ctypes.c_double
    library.ceiling_fma.argtypes = [ctypes.c_int, ctypes.c_int64]
    library.ceiling_read.argtypes = [ctypes.c_int]
    library.ceiling_open.argtypes = [ctypes.c_int64]
    return library


def _compiler() -> list[str] | None:
    words = os.environ.get("CC", "").split() or ["cc"]
    return words if shutil.which(words[0]) else None


def _compiler_version() -> str | None:
    compiler = _compiler()
    if compiler is None:
        return None
    said = subprocess.run([*compiler, "--version"], capture_output=True, text=True).stdout
    return said.splitlines()[0] if said else None


def _processor() -> str:
    try:
        for said in Path("/proc/cpuinfo").read_text().splitlines():
            if said.startswith("model name"):
                return said.split(":", 1)[1].strip()
    except OSError:
        pass
    return _sysctl("machdep.cpu.brand_string") or platform.processor() or platform.machine()


def _last_level_cache() -> int:
    """Bytes; 32 MiB where the system does not say."""
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        sizes.append(int(text.rstrip("KMG")) << {"K": 10, "M": 20, "G": 30}.get(text[-1], 0))
    for name in ("hw.l3cachesize", "hw.perflevel0.l2cachesize", "hw.l2cachesize"):
        said = _sysctl(name) if not sizes else None
        if said and said.isdigit() and int(said):
            sizes.append(int(said))
    return max(sizes, default=32 << 20)


def _sysctl(name: str) -> str | None:
    if platform.system() != "Darwin":
        return None
    return subprocess.run(["sysctl", "-n", name], capture_output=True, text=True).stdout.strip() or None
