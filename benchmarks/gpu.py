"""The GPU: its timer, its graphs, its ceilings, and the softmax attention that torch and others offer there.

Everything here is asynchronous, so time is told by events on the device. Before a run that is timed the device is kept busy
for a moment, so that the host's part of the work is over when the first event is reached: what is timed is the device.
"""

from __future__ import annotations

import contextlib
import importlib.util
import platform
import subprocess
import threading
import warnings
from collections.abc import Callable

import numpy as np

import lola

try:
    import torch
    import torch.nn.functional as F
    from torch.nn.attention import SDPBackend, sdpa_kernel
except ImportError:
    torch = None

_COPY_BYTES = 1 << 30
_GEMM_SIZE = 8192
_AHEAD = 2_000_000   # cycles, some 1 ms, that the host is ahead of the device when a timed run begins
# A part of a kernel's name, and the step that it belongs to; the first that fits.
_STEPS = {name: name for name in ("features", "scan", "attend", "commit", "decode", "score", "select", "fold")} | {
    "tensor_kernel": "features", "plain_kernel": "features", "plan_kernel": "plan", "zero_outside": "plan", "memset": "memory",
    "memcpy": "memory", "begin_rows": "memory"}


class Gpu:
    """Where things run and what else could run there. Tests replace what only a device can do."""

    name = device = "cuda"

    def __init__(self):
        if torch is None:
            raise RuntimeError("measuring on a GPU takes torch, for its timers, its peers and its arrays")
        if not lola.cuda_available():
            raise RuntimeError(f"lola finds no GPU: {lola.cuda_unavailable_reason()}")
        self.properties = torch.cuda.get_device_properties(0)
        self.cache_bytes = self.properties.L2_cache_size
        self._copy = self._gemm = None
        self.memo: dict = {}                      # data and oracles that several sections share

    # ------------------------------------------------------------------------------------------------- the machine

    def describe(self) -> dict:
        p = self.properties
        return {
            "device": {
                "kind": "cuda",
                "name": p.name,
                "capability": f"{p.major}.{p.minor}",
                "multiprocessors": p.multi_processor_count,
                "memory_bytes": p.total_memory,
                "cache_bytes": p.L2_cache_size,
                "system": platform.system(),
                "machine": platform.machine(),
            },
            "versions": {
                "lola": lola.__version__,
                "python": platform.python_version(),
                "numpy": np.__version__,
                "torch": torch.__version__,
                "CUDA of torch": torch.version.cuda,
                "cuDNN": torch.backends.cudnn.version(),
                "driver": _driver(),
                **{name: _version(name) for name in ("triton", "transformers", "flash_attn", "flash_attn_interface", "fla")},
            },
            "blas": [],
        }

    # --------------------------------------------------------------------------------------------------- the timer

    def settle(self):
        torch.cuda.synchronize()

    def timed(self, run):
        """(seconds on the device, what it returned)."""
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(_AHEAD)
        begin.record()
        value = run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3, value

    def capture(self, run: Callable[[], object], warm: int = 2) -> Callable[[], None]:
        """`run` as a CUDA graph: a function that replays it. It has run `warm` times before."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(warm):
                run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()

        def replay(held=run):                 # a graph does not keep the memory that it reads: whatever `run` holds lives as long
            graph.replay()

        return replay

    def replays(self, replay: Callable[[], None], count: int, before: Callable[[int], object] = lambda i: None) -> np.ndarray:
        """Seconds of each of `count` replays; `before(i)` queues what is not timed."""
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
        torch.cuda._sleep(6 * _AHEAD)
        for i, (begin, end) in enumerate(events):
            before(i)
            begin.record()
            replay()
            end.record()
        torch.cuda.synchronize()
        return np.array([begin.elapsed_time(end) for begin, end in events]) / 1e3

    def kernel_seconds(self, run: Callable[[], object], times: int = 3) -> dict[str, float]:
        """Seconds of each of lola's steps in a run, by the names of its kernels as torch's profiler sees them."""
        from torch.profiler import ProfilerActivity, profile

        run()
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as profiled:
            for _ in range(times):
                run()
            torch.cuda.synchronize()
        seconds: dict[str, float] = {}
        for event in profiled.key_averages():
            spent = getattr(event, "self_device_time_total", 0) / 1e6 / times
            if spent:
                name = event.key.lower()
                step = next((step for part, step in _STEPS.items() if part in name), "other")
                seconds[step] = seconds.get(step, 0.0) + spent
        return seconds

    # ------------------------------------------------------------------------------------------------- the ceilings

    def copy_bandwidth(self) -> float:
        """Bytes/s, read and written together, of one copy of 1 GiB on the device."""
        if self._copy is None:
            self._copy = torch.empty(_COPY_BYTES, dtype=torch.uint8, device="cuda").random_(), torch.empty(
                _COPY_BYTES, dtype=torch.uint8, device="cuda")
        source, target = self._copy
        seconds, _ = self.timed(lambda: target.copy_(source))
        return 2 * _COPY_BYTES / seconds

    def gemm_flops(self) -> float:
        """FLOP/s of one 8192^3 product of random bfloat16 matrices by cuBLAS."""
        n = _GEMM_SIZE
        if self._gemm is None:
            self._gemm = [torch.randn(n, n, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
        a, b, out = self._gemm
        seconds, _ = self.timed(lambda: torch.matmul(a, b, out=out))
        return 2 * n**3 / seconds

    def pinned_copy_seconds(self, to_device: int, to_host: int) -> Callable[[], float]:
        """A function that returns the seconds of copying so many bytes there and back at once, from and to pinned memory."""
        here = [torch.empty(n, dtype=torch.uint8, pin_memory=True) for n in (to_device, to_host)]
        there = [torch.empty(n, dtype=torch.uint8, device="cuda") for n in (to_device, to_host)]
        streams = [torch.cuda.Stream() for _ in range(2)]

        def run():
            now = torch.cuda.current_stream()
            for stream in streams:
                stream.wait_stream(now)
            with torch.cuda.stream(streams[0]):
                there[0].copy_(here[0], non_blocking=True)
            with torch.cuda.stream(streams[1]):
                here[1].copy_(there[1], non_blocking=True)
            for stream in streams:
                now.wait_stream(stream)

        return lambda: self.timed(run)[0]

    def memory_used(self) -> MemoryUsed:
        """A context whose `peak` is the most bytes in use on the device meanwhile, whoever allocated them."""
        def used():
            free, total = torch.cuda.mem_get_info()
            return total - free

        return MemoryUsed(used)

    def free(self):
        """Gives back what torch's allocator and the ceilings hold."""
        self._copy = self._gemm = None
        torch.cuda.empty_cache()

    def close(self):
        self.free()

    # --------------------------------------------------------------------------------------------------- the peers

    has_torch = torch is not None

    def softmax_backends(self) -> dict:
        return {"FlashAttention-2": SDPBackend.FLASH_ATTENTION, "cuDNN": SDPBackend.CUDNN_ATTENTION,
                "memory-efficient": SDPBackend.EFFICIENT_ATTENTION}

    def within(self, backend):
        return sdpa_kernel(backend) if backend is not None else contextlib.nullcontext()

    def softmax_prefill(self, q, k, v) -> dict[str, Callable]:
        """Causal softmax attention over (1, T, H, D): functions that return (1, T, Hq, D)."""
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        runs = {}
        for name, backend in self.softmax_backends().items():
            if name == "memory-efficient":        # takes no grouped heads
                continue

            def run(backend=backend):
                with torch.inference_mode(), self.within(backend):
                    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)

            runs[f"SDPA, {name}"] = run
        if _importable("flash_attn_interface"):
            from flash_attn_interface import flash_attn_func

            def three():
                out = flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v)), causal=True)
                return out[0] if isinstance(out, tuple) else out

            runs["FlashAttention-3"] = three
        return self.that_run(runs)

    def softmax_decode(self, q, layers) -> dict[str, Callable]:
        """One query (B, 1, Hq, D) over all keys: functions that go through `layers`, pairs (k, v) of (B, T, Hkv, D), and return
        the last layer's (B, 1, Hq, D). Each backend twice: told of grouped heads, and with a group's heads as queries."""
        B, _, heads, d = q.shape
        kv_heads = layers[0][0].shape[2]
        turned = [(k.transpose(1, 2), v.transpose(1, 2)) for k, v in layers]
        plain, grouped = q.transpose(1, 2), q.view(B, kv_heads, heads // kv_heads, d)
        runs = {}
        for name, backend in self.softmax_backends().items():

            def flag(backend=backend):
                with torch.inference_mode(), self.within(backend):
                    for k, v in turned:
                        out = F.scaled_dot_product_attention(plain, k, v, enable_gqa=True)
                    return out.reshape(B, 1, heads, d)

            def rows(backend=backend):
                with torch.inference_mode(), self.within(backend):
                    for k, v in turned:
                        out = F.scaled_dot_product_attention(grouped, k, v)
                    return out.reshape(B, 1, heads, d)

            runs[f"SDPA, {name}"] = flag
            runs[f"SDPA, {name}, a group's heads as queries"] = rows
        if _importable("flash_attn_interface"):
            from flash_attn_interface import flash_attn_with_kvcache

            def three():
                for k, v in layers:
                    out = flash_attn_with_kvcache(q, k, v)
                return out[0] if isinstance(out, tuple) else out

            runs["FlashAttention-3, KV cache"] = three
        return self.that_run(runs)

    def that_run(self, runs: dict[str, Callable]) -> dict[str, Callable]:
        """Those that this device and build of torch have code for."""
        able = {}
        for name, run in runs.items():
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")           # torch says at length why a backend does not fit
                    run()
                self.settle()
            except (RuntimeError, TypeError, ValueError, NotImplementedError):
                continue
            able[name] = run
        return able


class MemoryUsed:
    """The greatest `peak` of used(), asked fifty times a second: no allocator tells what all of them had at once."""

    def __init__(self, used: Callable[[], int]):
        self.used, self.peak = used, 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def _watch(self):
        while not self._done.wait(0.02):
            self.peak = max(self.peak, self.used())

    def __enter__(self) -> MemoryUsed:
        self._thread.start()
        return self

    def __exit__(self, *error):
        self._done.set()
        self._thread.join()
        self.peak = max(self.peak, self.used())


def _driver() -> str | None:
    ask = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(ask, capture_output=True, text=True, timeout=20).stdout.splitlines()[0].strip()
    except (OSError, IndexError, subprocess.TimeoutExpired):
        return None


def _importable(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def _version(name: str) -> str | None:
    from importlib import metadata

    try:
        return metadata.version(name) if _importable(name) else None
    except metadata.PackageNotFoundError:
        return "present"
