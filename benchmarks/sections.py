"""The five sections of the benchmark: prefill, decode, scaling, update, steps.

Each takes a backend, a report and a `Plan`, checks before it times, and tells the report figures and goals. All speeds are of
useful work (see `workload.py`) and all ratios are taken round by round, with the ceilings and the peers in the same rounds.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np

import workload
import lola
from workload import Geometry
from harness import Report, alternate
from lola import kernels, reference


@dataclass(frozen=True)
class Plan:
    """Sizes and patience of a run."""

    repeats: int
    budget: float                         # seconds for a group of runs that take turns, about
    layer: Geometry                       # Llama's layer, r = 4
    single: Geometry                      # r = 1, for the comparison with softmax attention
    head_dims: tuple[int, ...]
    dtypes: tuple[str, ...]
    attention_tokens: int                 # C1
    softmax_tokens: tuple[int, ...]       # C3
    plain_tokens: int                     # C4
    context: int                          # C2, C5
    decode_chunks: int
    cold: float                           # how many last-level caches' worth of layers take turns in decoding
    scaling: tuple[int, ...]              # C6
    scaling_layer: Geometry
    sparse: tuple[int, ...]               # the curve of updates

    def with_head_dims(self, geometry: Geometry):
        """The geometry with each head size and dtype that is asked for and to be had."""
        for d, dtype in itertools.product(self.head_dims, self.dtypes):
            if workload.has_dtype(dtype):
                yield geometry.but(head_dim=d, dtype=dtype)


_LLAMA = Geometry(heads=32, kv_heads=8)
FULL = Plan(
    repeats=20, budget=30, layer=_LLAMA, single=Geometry(heads=8, kv_heads=8), head_dims=(64, 128), dtypes=("float32", "bfloat16"),
    attention_tokens=4096, softmax_tokens=(8192, 32768), plain_tokens=8192, context=32768, decode_chunks=20, cold=4,
    scaling=(8192, 16384, 32768, 65536, 131072), scaling_layer=Geometry(heads=8, kv_heads=2, head_dim=64),
    sparse=(64, 128, 256, 512, 1024),
)  # fmt: skip
QUICK = Plan(
    repeats=3, budget=1, layer=Geometry(heads=8, kv_heads=2, head_dim=64, sparse=64),
    single=Geometry(heads=2, kv_heads=2, head_dim=64, sparse=64),
    head_dims=(64,), dtypes=("float32",), attention_tokens=1024, softmax_tokens=(2048,), plain_tokens=1024, context=2048,
    decode_chunks=3, cold=0.1, scaling=(1024, 2048, 4096), scaling_layer=Geometry(heads=4, kv_heads=2, head_dim=64, sparse=64), sparse=(64, 128),
)  # fmt: skip


def _gated(report: Report, what: str, action):
    """Runs `action`; where a check fails, says so and prints no speed."""
    try:
        return action()
    except workload.CheckFailed as failed:
        report.skip(what, f"CHECK FAILED, no speed: {failed}")
        return None


def _check_prefill(report, layer, tokens, what) -> None:
    """The call that will be timed, at full length: its first tokens against the oracle, its last ones in closed form."""
    cache = layer.new_cache()
    out = layer.attention(*tokens.stored, cache=cache, scores=tokens.scores)
    last = (tokens.count - 1) // layer.geometry.chunk * layer.geometry.chunk
    report.checked(workload.check_features(layer, tokens) + workload.check_prefix(layer, tokens, out, what)
                   + workload.check_end(layer, tokens, cache, out[:, last:], what))


# -------------------------------------------------------------------------------------------------------------- prefill


def prefill(backend, report: Report, plan: Plan):
    """C1 (against the peak), C3 (against torch's softmax attention), C4 (against LoLA in plain PyTorch)."""
    report.begin("prefill", "prefill: one layer, one row, from an empty cache")
    for threads in sorted({1, backend.threads}):
        with backend.using(threads):
            case = f"NumPy matrix product 2048^3, {threads} of {backend.threads} threads"
            values = alternate(backend, {"peak": lambda: backend.peak_flops(threads), "gemm": backend.gemm_flops()}, plan.repeats, plan.budget)
            report.figure("multiply-add peak", case, "GFLOP/s", values["peak"] / 1e9)
            report.figure("NumPy's BLAS", case, "GFLOP/s", values["gemm"] / 1e9)
    for geometry in plan.with_head_dims(plan.layer):
        _gated(report, f"prefill, {geometry}", lambda: _attention_phase(backend, report, plan, geometry))
    if not backend.has_torch:
        report.skip("C3, C4", "torch is not installed")
        return
    for geometry in plan.with_head_dims(plan.single):
        for tokens in plan.softmax_tokens:
            what = f"prefill against softmax, {geometry}, {tokens} tokens"
            _gated(report, what, lambda: _against_softmax(backend, report, plan, geometry, tokens))
    for geometry in plan.with_head_dims(plan.layer):
        if geometry.dtype == "float32":
            _gated(report, f"prefill against plain PyTorch, {geometry}", lambda: _against_plain(backend, report, plan, geometry))


def _attention_phase(backend, report, plan, geometry):
    """Prefill with the caller's scores, so that nothing is ranked against the state: what is left is attention with its
    gathers, the feature maps and the fold. And the whole prefill beside it."""
    T = plan.attention_tokens
    whole, phase = workload.new_layer(geometry), workload.new_layer(geometry.but(score="external"))
    tokens = workload.new_tokens(geometry, T)
    scored = tokens.scored()
    case = f"{geometry}, {T} tokens"
    print(f"\n {case}")
    for threads in sorted({1, backend.threads}):
        with backend.using(threads):
            _check_prefill(report, whole, tokens, f"{threads} threads")
            _check_prefill(report, phase, scored, f"{threads} threads, scores given")
            out = np.empty_like(tokens.stored[0])
            runs = {
                "peak": lambda: backend.peak_flops(threads),
                "attention": lambda: drop(phase.attention(*scored.stored, config=phase.geometry.config, scores=scored.scores, out=out)),
                "whole": lambda: drop(whole.attention(*tokens.stored, config=geometry.config, out=out)),
            }
            seconds = alternate(backend, runs, plan.repeats, plan.budget)
        where = f"{case}, {threads} of {backend.threads} threads"
        work, all_work = workload.prefill_work(phase.geometry, T), workload.prefill_work(geometry, T)
        report.figure("multiply-add peak", where, "GFLOP/s", seconds["peak"] / 1e9)
        report.figure("attention phase", where, "GFLOP/s", work.total / seconds["attention"] / 1e9)
        share = report.figure("attention phase / peak", where, "", work.total / seconds["attention"] / seconds["peak"])
        report.figure("whole prefill", where, "GFLOP/s", all_work.total / seconds["whole"] / 1e9)
        report.figure("whole prefill / peak", where, "", all_work.total / seconds["whole"] / seconds["peak"])
        report.figure("whole prefill", where, "us/token", seconds["whole"] / T * 1e6)
        report.figure("ranking's part of the time", where, "", 1 - seconds["attention"] / seconds["whole"])
        if geometry.dtype == "float32":
            goal, floor = (0.75, 0.55) if threads == 1 else (0.65, 0.45)
            cores = "one core" if threads == 1 else f"all {threads} cores"
            report.goal("C1", f"attention phase / multiply-add peak, {cores}, D = {geometry.head_dim}", goal, floor, share)


def drop(_):
    """Forgets a result, so that a run counts by its seconds."""
    return None


def _against_softmax(backend, report, plan, geometry, T):
    layer, tokens = workload.new_layer(geometry), workload.new_tokens(geometry, T)
    case = f"{geometry}, {T} tokens"
    print(f"\n {case}, all {backend.threads} threads")
    with backend.using(backend.threads):
        _check_prefill(report, layer, tokens, "LoLA")
        run, numpy = backend.softmax_prefill(tokens.drawn, geometry.dtype)
        report.checked(workload.check_softmax(geometry, tokens, numpy(run()), "torch's softmax attention"))
        out = np.empty_like(tokens.stored[0])
        runs = {
            "peak": lambda: backend.peak_flops(backend.threads),
            "lola": lambda: drop(layer.attention(*tokens.stored, config=geometry.config, out=out)),
            "softmax": lambda: drop(run()),
        }
        seconds = alternate(backend, runs, plan.repeats, 2 * plan.budget)
    report.figure("LoLA", case, "ms", seconds["lola"] * 1e3)
    report.figure("torch's softmax attention", case, "ms", seconds["softmax"] * 1e3)
    flop = workload.softmax_flop(geometry.heads, geometry.head_dim, T)
    report.figure("torch's softmax attention / peak", case, "", flop / seconds["softmax"] / seconds["peak"])
    ratio = report.figure("LoLA faster than softmax", case, "x", seconds["softmax"] / seconds["lola"])
    if geometry.dtype == "float32":
        goal, floor = (4, 2.5) if T <= 8192 else (15, 9)
        what = f"prefill of {T} against torch's softmax, r = {geometry.heads // geometry.kv_heads}, D = {geometry.head_dim}"
        report.goal("C3", what, goal, floor, ratio, "x")


def _against_plain(backend, report, plan, geometry):
    T = plan.plain_tokens
    layer, tokens = workload.new_layer(geometry), workload.new_tokens(geometry, T)
    case = f"{geometry}, {T} tokens"
    print(f"\n {case}, all {backend.threads} threads")
    with backend.using(backend.threads):
        _check_prefill(report, layer, tokens, "LoLA")
        tensors = [backend.tensor(x, geometry.dtype) for x in tokens.drawn]
        peer = backend.plain(layer, geometry.dtype)
        peer.held = []
        made = peer(*tensors)[:, : workload.prefix_length(geometry, T)].numpy()
        report.checked(workload.check_plain(layer, tokens, made, peer.held))
        out = np.empty_like(tokens.stored[0])
        runs = {"lola": lambda: drop(layer.attention(*tokens.stored, config=geometry.config, out=out))}
        runs |= _on_one_and_all(backend, lambda: backend.plain(layer, geometry.dtype)(*tensors))
        seconds = alternate(backend, runs, plan.repeats, plan.budget)
    plain = _best(seconds, runs)
    report.figure("LoLA", case, "ms", seconds["lola"] * 1e3)
    report.figure("LoLA in plain PyTorch", case, "ms", plain * 1e3, "the better of one thread and all")
    ratio = report.figure("LoLA faster than plain PyTorch", case, "x", plain / seconds["lola"])
    report.goal("C4", f"prefill of {T} against LoLA in plain PyTorch, D = {geometry.head_dim}", 5, 3, ratio, "x")


def _on_one_and_all(backend, run):
    """A peer of many small operations may be faster on one thread than on all: runs of both."""

    def on(threads):
        def inside():
            with backend.using(threads):
                run()

        return inside

    return {f"plain on {threads}": on(threads) for threads in sorted({1, backend.threads})}


def _best(values, runs):
    """The values of the plain peer whose median is the lower."""
    return min((values[name] for name in runs if name.startswith("plain on")), key=np.median)


# --------------------------------------------------------------------------------------------------------------- decode


class Decoding:
    """Layers that decode the same tokens in turn, with a cache and weights each, together more than `cold` last-level caches.

    All layers begin from copies of one prefilled cache; `step` lets each take one token.
    """

    def __init__(self, backend, geometry: Geometry, context: int, cold: float):
        self.geometry = geometry
        self.first = workload.new_layer(geometry)
        self.context = workload.new_tokens(geometry, context)
        self.filled = self.first.new_cache()
        self.first.attention(*self.context.stored, cache=self.filled)
        self.count = int(cold * backend.cache_bytes / workload.decode_bytes(geometry, context)) + 1
        # Each layer reads weights of its own, but the values may be the same.
        g = self.geometry
        self.layers = [self.first] + [workload.Layer(g, self.first.w_q, self.first.w_k, self.first.gate) for _ in range(self.count - 1)]
        self.pool = workload.new_tokens(geometry, 4 * geometry.chunk, seed=1)
        self.inputs = [self.pool.part(i, i + 1).stored for i in range(self.pool.count)]
        self.out = np.empty_like(self.inputs[0][0])
        self.rewind()

    def rewind(self):
        """Back to the prefilled cache."""
        self.caches = [self.filled.copy() for _ in range(self.count)]
        self.taken: list[int] = []

    @property
    def position(self) -> int:
        return self.context.count + len(self.taken)

    def step(self):
        at = len(self.taken) % self.pool.count
        q, k, v = self.inputs[at]
        for layer, cache in zip(self.layers, self.caches):
            lola.attention(q, k, v, cache=cache, feature_map=layer.map, gate=layer.gate, out=self.out)
        self.taken.append(at)

    def chunk(self, backend) -> tuple[float, float, float]:
        """Decodes a whole chunk: seconds per layer of an ordinary step (median), of the update, and of the mean step."""
        assert self.position % self.geometry.chunk == 0
        seconds = np.array([backend.timed(self.step)[0] for _ in range(self.geometry.chunk)]) / self.count
        plain = float(np.median(seconds[1:]))
        return plain, float(seconds[0]) - plain, float(seconds.mean())

    def check(self) -> list[workload.Check]:
        """The last token of the first and the last layer, after all that was decoded."""
        self.step()
        parts = [self.context] + [self.pool.part(i, i + 1) for i in self.taken]
        tokens = workload.joined(parts)
        checks = []
        for i in sorted({0, self.count - 1}):
            # Taken back and decoded once more, since all layers write one output array.
            cache = self.caches[i]
            cache.crop(self.position - 1)
            q, k, v = self.inputs[self.taken[-1]]
            out = self.layers[i].attention(q, k, v, cache=cache)
            checks += workload.check_end(self.layers[i], tokens, cache, out, f"decoding, layer {i + 1} of {self.count}")
        return checks

    def mean_bytes(self) -> float:
        """Compulsory bytes of a step, averaged over a chunk, the step of the update left out."""
        first = self.context.count
        return float(np.mean([workload.decode_bytes(self.geometry, p) for p in range(first + 1, first + self.geometry.chunk)]))


def decode(backend, report: Report, plan: Plan):
    """C2 (against the read bandwidth), C5 (against torch's softmax attention over the full cache), C4 (plain PyTorch)."""
    report.begin("decode", "decode: one token, one row, layers in turn over more than four last-level caches")
    for geometry in plan.with_head_dims(plan.layer):
        _gated(report, f"decode, {geometry}", lambda: _decode(backend, report, plan, geometry))


def _decode(backend, report, plan, geometry):
    T = plan.context
    case = f"{geometry}, after {T} tokens"
    print(f"\n {case}")
    with backend.using(backend.threads):
        rig = Decoding(backend, geometry, T, plan.cold)
    for threads in sorted({1, backend.threads}):
        with backend.using(threads):
            rig.rewind()
            for _ in range(geometry.chunk // 2):
                rig.step()
            report.checked(rig.check())
            rig.rewind()
            peers, numpy = {}, None
            if backend.has_torch and threads == backend.threads:
                size = 2 * geometry.itemsize * T * geometry.kv_heads * geometry.head_dim
                peers, numpy = backend.softmax_decode(rig.context.drawn, geometry.dtype, int(plan.cold * backend.cache_bytes / size) + 1)
                for name, run in peers.items():
                    report.checked(workload.check_softmax(geometry, rig.context, numpy(run()), f"torch, {name}"))
            steps: list[tuple[float, float, float]] = []
            runs = {"read": lambda: backend.read_bandwidth(threads), "lola": lambda: steps.append(rig.chunk(backend))}
            runs |= {name: (lambda run=run: drop(run())) for name, run in peers.items()}
            values = alternate(backend, runs, plan.decode_chunks, 2 * plan.budget)
            plain, update, mean = np.array(steps[1:]).T
        where = f"{case}, {threads} of {backend.threads} threads, {rig.count} layers"
        report.figure("read bandwidth", where, "GB/s", values["read"] / 1e9)
        report.figure("step without update", where, "us", plain * 1e6, "median of the chunk's other steps")
        report.figure("step without update", where, "GB/s", rig.mean_bytes() / plain / 1e9, "compulsory bytes")
        share = report.figure("step without update / read bandwidth", where, "", rig.mean_bytes() / plain / values["read"])
        report.figure("update, once a chunk", where, "us", update * 1e6)
        report.figure("mean step, update included", where, "us", mean * 1e6)
        report.figure("what the update adds to the mean step", where, "%", 100 * (mean / plain - 1))
        if geometry.dtype == "float32":
            cores = "one core" if threads == 1 else f"all {threads} cores"
            report.goal("C2", f"decode, compulsory bytes / read bandwidth, {cores}, D = {geometry.head_dim}", 0.80, 0.60, share)
        if peers:
            for name in peers:
                report.figure(f"torch, {name}", where, "us", values[name] * 1e6)
            best = min(peers, key=lambda name: np.median(values[name]))
            ratio = report.figure("faster than torch over the full cache", where, "x", values[best] / mean, f"against {best}, updates included")
            if geometry.dtype == "float32":
                report.goal("C5", f"decode at {T} against torch's softmax over the full cache, D = {geometry.head_dim}", 20, 10, ratio, "x")
    if backend.has_torch and geometry.dtype == "float32":
        _decode_plain(backend, report, plan, geometry, rig)


def _decode_plain(backend, report, plan, geometry, rig):
    """LoLA in plain PyTorch, whose cost of a step does not depend on the length, so it begins from a short context."""
    T = workload.prefix_length(geometry, rig.context.count) // geometry.chunk * geometry.chunk
    context = rig.context.first(T)
    where = f"{geometry}, all {backend.threads} threads, plain PyTorch after {T} tokens"
    with backend.using(backend.threads):
        tensors = [backend.tensor(x, geometry.dtype) for x in context.drawn]
        peer = backend.plain(rig.first, geometry.dtype)
        peer.held = []
        outs = [peer(*(x[:, : T - 8] for x in tensors))] + [peer(*(x[:, t : t + 1] for x in tensors)) for t in range(T - 8, T)]
        made = np.concatenate([out.numpy() for out in outs], axis=1)
        report.checked(workload.check_plain(rig.first, context, made, peer.held))
        peers = []
        for _ in range(rig.count):
            peers.append(backend.plain(rig.first, geometry.dtype))
            peers[-1](*tensors)
        inputs = [[backend.tensor(x, geometry.dtype) for x in rig.pool.part(i, i + 1).drawn] for i in range(geometry.chunk)]

        def chunk():
            for step in inputs:
                for peer in peers:
                    peer(*step)

        rig.rewind()
        means: list[float] = []
        runs = {"lola": lambda: means.append(rig.chunk(backend)[2])} | _on_one_and_all(backend, chunk)
        values = alternate(backend, runs, plan.repeats, plan.budget)
    seconds = _best(values, runs) / geometry.chunk / rig.count
    report.figure("LoLA in plain PyTorch, mean step", where, "us", seconds * 1e6, "the better of one thread and all")
    ratio = report.figure("faster than LoLA in plain PyTorch", where, "x", seconds / np.array(means[1:]))
    report.goal("C4", f"decode against LoLA in plain PyTorch, D = {geometry.head_dim}", 5, 3, ratio, "x")


# -------------------------------------------------------------------------------------------------------------- scaling


def scaling(backend, report: Report, plan: Plan):
    """C6: time per token and memory from short to long."""
    report.begin("scaling", "scaling: time and memory against length")
    _gated(report, "scaling", lambda: _scaling(backend, report, plan))


def _scaling(backend, report, plan):
    geometry, lengths = plan.scaling_layer, plan.scaling
    layer, tokens = workload.new_layer(geometry), workload.new_tokens(geometry, lengths[-1])
    case = f"{geometry}, all {backend.threads} threads"
    print(f"\n {case}")
    sizes, scratch = {}, {}
    with backend.using(backend.threads):
        for T in lengths:
            _check_prefill(report, layer, tokens.first(T), f"{T} tokens")
        out = np.empty_like(tokens.stored[0])

        def run(T):
            cache = layer.new_cache()
            layer.attention(*tokens.first(T).stored, cache=cache, out=out[:, :T])
            sizes[T], scratch[T] = cache.nbytes, lola._lola.scratch_peak()

        seconds = alternate(backend, {str(T): lambda T=T: run(T) for T in lengths}, plan.repeats, 2 * plan.budget)
    for T in lengths:
        report.figure(f"prefill of {T}", case, "us/token", seconds[str(T)] / T * 1e6)
        note = f"{sizes[T] / 1e6:.2f} MB cache, {scratch[T] / 1e6:.1f} MB scratch"
        report.figure(f"time per token, {T} to {lengths[0]}", case, "x",
                      seconds[str(T)] / T / (seconds[str(lengths[0])] / lengths[0]), note)
    base = lengths[0]
    worst = max((float(np.median(seconds[str(T)] / T * base / seconds[str(base)])) for T in lengths), key=lambda x: abs(x - 1))
    report.curve("prefill", "tokens", {"us per token": [float(np.median(seconds[str(T)])) / T * 1e6 for T in lengths],
                                       "cache bytes": [sizes[T] for T in lengths]}, list(lengths), case)
    report.goal("C6", f"time per token, {lengths[0]} to {lengths[-1]} tokens, furthest from 1 (distance)", 0.15, 0.15, abs(worst - 1), most=True)
    report.goal("C6", "cache bytes, longest over shortest", 1, 1, max(sizes.values()) / min(sizes.values()), "x", most=True)
    report.goal("C6", "scratch bytes, longest over shortest", 1, 1.1, scratch[lengths[-1]] / scratch[base], "x", most=True)


# --------------------------------------------------------------------------------------------------------------- update


def update(backend, report: Report, plan: Plan):
    """The method's overhead: what an update costs against the size of the sparse cache."""
    report.begin("update", "update: score, select and fold, against the size of the sparse cache")
    for per in ("kv_head", "query_head"):
        geometry = plan.layer.but(sparse_per=per)
        _gated(report, f"update, {geometry}", lambda: _update(backend, report, plan, geometry))


def _update(backend, report, plan, geometry):
    curves: dict[str, list[float]] = {"decode, us per update": [], "decode, % of the mean step": [], "prefill, us per chunk": [], "prefill, % of the time": []}
    case = f"{geometry.but(sparse=0)}".replace("lambda 0", "lambda as said") + f", all {backend.threads} threads"
    print(f"\n {case}")
    with backend.using(backend.threads):
        for sparse in plan.sparse:
            g = geometry.but(sparse=sparse)
            T = (g.window + sparse + 8 * g.chunk) // g.chunk * g.chunk
            # Prefill is timed once everything is full, so that every chunk ranks: on a copy of a filled cache.
            whole, phase = workload.new_layer(g), workload.new_layer(g.but(score="external"))
            tokens, more = workload.new_tokens(g, T), workload.new_tokens(g, 8 * g.chunk, seed=1)
            caches = whole.new_cache(), phase.new_cache()
            out = whole.attention(*tokens.stored, cache=caches[0])
            report.checked(workload.check_prefix(whole, tokens, out, f"lambda {sparse}")
                           + workload.check_end(whole, tokens, caches[0], out[:, -g.chunk :], f"lambda {sparse}"))
            scored, more_scored = tokens.scored(), more.scored(1)
            phase.attention(*scored.stored, cache=caches[1], scores=scored.scores)
            buffer = np.empty_like(more.stored[0])

            def call(layer, cache, scores, more=more, buffer=buffer):
                cache = cache.copy()
                return backend.timed(lambda: layer.attention(*more.stored, cache=cache, scores=scores, out=buffer))[0]

            rig = Decoding(backend, g, T, plan.cold)
            steps: list[tuple[float, float, float]] = []
            runs = {
                "decode": lambda: steps.append(rig.chunk(backend)),
                "whole": lambda: call(whole, caches[0], None),
                "phase": lambda: call(phase, caches[1], more_scored.scores),
            }
            values = alternate(backend, runs, plan.repeats, plan.budget / 2)
            plain, ups, mean = np.array(steps[1:]).T
            where = f"{case}, lambda {sparse}"
            figures = (
                ("decode: update", "us", ups * 1e6),
                ("decode: what it adds to the mean step", "%", 100 * (mean / plain - 1)),
                ("prefill: ranking", "us/chunk", (values["whole"] - values["phase"]) / 8 * 1e6),
                ("prefill: ranking's part of the time", "%", 100 * (1 - values["phase"] / values["whole"])),
            )
            for of, (name, unit, data) in zip(curves.values(), figures):
                of.append(report.figure(f"{name}, lambda {sparse}", where, unit, data))
            del rig
    report.curve("update", "sparse", curves, list(plan.sparse), case)


# ---------------------------------------------------------------------------------------------------------------- steps


def steps(backend, report: Report, plan: Plan):
    """Each of the five steps alone, as `lola.kernels` offers it, against the ceiling that bounds it."""
    report.begin("steps", "steps: each alone, through lola.kernels")
    for geometry in plan.with_head_dims(plan.layer):
        if geometry.dtype == "float32":
            _gated(report, f"steps, {geometry}", lambda: _steps(backend, report, plan, geometry))


def _steps(backend, report, plan, geometry):
    g = geometry
    B, Hq, Hkv, D, F, C = 8, g.heads, g.kv_heads, g.head_dim, g.feature_dim, g.chunk
    S, pairs = g.sparse + C, g.sparse + g.window + C
    layer = workload.new_layer(g)
    rng = np.random.default_rng(0)

    def normal(*shape):
        return rng.standard_normal(shape, np.float32)

    x, q = normal(B, C, Hkv, D), normal(B, C, Hq, D)
    k, v = normal(B, pairs, Hkv, D), normal(B, pairs, Hkv, D)
    phi = np.asarray(kernels.features(normal(B, S, Hkv, D), layer.map, "k", Hq))
    fq = np.asarray(kernels.features(q, layer.map, "q", Hq))
    # A state of many pairs: sums of features and of features times values.
    H, s = 64 * np.abs(normal(B, Hq, F, D)), 64 * np.abs(normal(B, Hq, F)) + 64
    values, leaving, phi_leaving = v[:, :S], v[:, :C], phi[:, :C]
    scores = normal(B, S, Hkv)
    case = f"{g}, {B} rows of a chunk of {C}"
    print(f"\n {case}")

    def some(x, heads):
        return x[:1, :, heads]

    def checks():
        """Each step at full size; the oracle runs some heads of the first row."""
        q_heads, kv_heads = workload.some_heads(g)
        fmap = SimpleNamespace(name="hedgehog", w_q=layer.w_q[q_heads], w_k=layer.w_k[q_heads])
        error, check = workload.error, workload.Check
        exact = reference.features(some(x, kv_heads), fmap, "k", len(q_heads))
        yield check("features", error(some(np.asarray(kernels.features(x, layer.map, "k", Hq)), q_heads), exact), 2e-5)
        exact = reference.score(some(phi, q_heads), some(values, kv_heads), H[:1, q_heads], s[:1, q_heads])
        yield check("score", error(some(np.asarray(kernels.score(phi, values, H, s)), q_heads), exact), 2e-5)
        got, exact = kernels.select(scores, g.sparse), reference.select(scores, g.sparse)
        yield check("select, indices that differ", float(sum((np.asarray(a) != b).sum() for a, b in zip(got, exact))), 0.0)
        H2, s2 = H[:1].copy(), s[:1].copy()
        kernels.fold(phi_leaving[:1], leaving[:1], H2, s2)
        H3, s3 = H[:1, q_heads].astype(np.float64), s[:1, q_heads].astype(np.float64)
        reference.fold(some(phi_leaving, q_heads), some(leaving, kv_heads), H3, s3)
        yield check("fold", max(error(H2[:, q_heads], H3), error(s2[:, q_heads], s3)), 2e-5)
        arguments = dict(mixing=g.mixing, causal=True)
        exact = reference.attend(some(q, q_heads), some(k, kv_heads), some(v, kv_heads), some(fq, q_heads), H[:1, q_heads],
                                 s[:1, q_heads], layer.gate[q_heads], **arguments)
        got = kernels.attend(q, k, v, fq, H, s, layer.gate, **arguments)
        yield check("attend", error(some(np.asarray(got), q_heads), exact), 2e-5)

    for threads in sorted({1, backend.threads}):
        with backend.using(threads):
            report.checked(list(checks()))
            calls = {
                "features": lambda: kernels.features(x, layer.map, "k", Hq),
                "score": lambda: kernels.score(phi, values, H, s),
                "select": lambda: kernels.select(scores, g.sparse),
                "fold": lambda: kernels.fold(phi_leaving, leaving, H, s),
                "attend": lambda: kernels.attend(q, k, v, fq, H, s, layer.gate, g.mixing, causal=True),
            }
            runs = {name: (lambda call=call: drop(call())) for name, call in calls.items()}
            runs |= {"peak": lambda: backend.peak_flops(threads), "read": lambda: backend.read_bandwidth(threads)}
            seconds = alternate(backend, runs, plan.repeats, plan.budget)
        where = f"{case}, {threads} of {backend.threads} threads"
        seen = pairs * C - C * (C - 1) / 2
        flop = {
            "features": B * C * Hq * D * F,
            "score": B * S * Hq * 2 * F * (D + 1),
            "fold": B * C * Hq * (2 * F * D + F),
            "attend": B * Hq * (4 * D * seen + 2 * F * (D + 1) * C),
        }
        for name, amount in flop.items():
            report.figure(name, where, "GFLOP/s", amount / seconds[name] / 1e9)
            report.figure(f"{name} / multiply-add peak", where, "", amount / seconds[name] / seconds["peak"])
        # Folding writes what it reads; the state of all rows is larger than a core's caches.
        moved = B * Hq * F * (D + 1) * 4 * 2
        report.figure("fold, state read and written", where, "GB/s", moved / seconds["fold"] / 1e9)
        report.figure("fold, state read and written / read bandwidth", where, "", moved / seconds["fold"] / seconds["read"])
        report.figure("select", where, "Mscores/s", scores.size / seconds["select"] / 1e6)


SECTIONS = {"prefill": prefill, "decode": decode, "scaling": scaling, "update": update, "steps": steps}
