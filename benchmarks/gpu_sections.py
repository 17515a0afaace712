"""The sections of the benchmark on a GPU: decode, host, prefill, phases, rankings, stack, update, numpy, plain, llama.

As on the CPU each checks before it times, and ratios are taken round by round with the ceilings and the peers in the same
rounds. Goals G1 to G8 are for one layer of Llama-3.1-8B in bfloat16, W 128, lambda 512, one sparse set per KV head; the same
figures with one per query head stand beside them.
"""

from __future__ import annotations

import functools
import math
import time
from dataclasses import dataclass

import numpy as np
import torch

import gpu_work
import lola
import workload
from gpu_work import Decoding, Draw
from harness import Report, alternate
from sections import _gated, drop
from workload import Geometry


@dataclass(frozen=True)
class Llama:
    """A whole model and what it is asked to do. Memory is all that is in use on the device, what the driver takes included."""

    layers: int
    width: int
    inner: int
    vocabulary: int
    context: int                          # tokens before decoding
    memory: float                         # H2: bytes that the largest batch may take
    card: float                           # H3: bytes of a consumer's card
    card_tokens: tuple[int, int]          # read and written on it
    few: int                              # LoLA's rows from which the largest batch is reckoned
    rounds: int


@dataclass(frozen=True)
class Plan:
    """Sizes and patience of a run."""

    repeats: int
    budget: float                         # seconds for a group of runs that take turns, about
    layer: Geometry
    batches: tuple[int, ...]              # G1, G2, G3
    contexts: tuple[int, ...]             # of the softmax peers in decoding; LoLA's step does not depend on it
    cold: float                           # how many L2 caches' worth of layers, or of inputs, take turns
    least: int                            # layers in a decoding graph
    prefill: tuple[int, ...]              # G4
    crossover: tuple[int, ...]
    phases: int                           # G5: tokens
    judged: int                           # G7
    stack: tuple[int, int, int, int]      # G6: layers, tokens, width, width of the MLP
    sparse: tuple[int, ...]               # the curve of updates
    update_tokens: int
    numpy_tokens: int
    plain_tokens: tuple[int, ...]
    host_calls: int
    llama: Llama                          # H1, H2, H3

    def layers(self):
        """One set per KV head, for the goals, and one per query head."""
        return [self.layer.but(sparse_per=per) for per in ("kv_head", "query_head")]


_LLAMA = Geometry(heads=32, kv_heads=8, head_dim=128, feature_dim=128, window=128, chunk=64, sparse=512, dtype="bfloat16")
_K = 1024
FULL = Plan(
    repeats=20, budget=30, layer=_LLAMA, batches=(1, 16, 64), contexts=(8 * _K, 32 * _K), cold=4, least=8,
    prefill=(4 * _K, 8 * _K, 16 * _K, 32 * _K, 64 * _K, 128 * _K), crossover=(_K, 2 * _K, 3 * _K, 4 * _K, 6 * _K, 8 * _K, 12 * _K),
    phases=32 * _K, judged=32 * _K, stack=(4, 32 * _K, 4096, 14336), sparse=(64, 128, 256, 512, 1024), update_tokens=8 * _K,
    numpy_tokens=32 * _K, plain_tokens=(4 * _K, 32 * _K), host_calls=60,
    llama=Llama(32, 4096, 14336, 128256, 32 * _K, 80e9, 22 * 2.0**30, (8 * _K, 64), few=64, rounds=3),
)  # fmt: skip
QUICK = Plan(
    repeats=5, budget=1.5, layer=_LLAMA, batches=(1, 16), contexts=(8 * _K, 32 * _K), cold=2, least=4,
    prefill=(8 * _K, 32 * _K), crossover=(4 * _K, 8 * _K), phases=32 * _K, judged=4 * _K, stack=(2, 32 * _K, 4096, 14336),
    sparse=(64, 512), update_tokens=4 * _K, numpy_tokens=16 * _K, plain_tokens=(4 * _K,), host_calls=60,
    llama=Llama(4, 4096, 14336, 128256, 8 * _K, 20e9, 22 * 2.0**30, (8 * _K, 64), few=16, rounds=3),
)  # fmt: skip
# What --quick measures unless --only says otherwise: what changes while kernels are written.
QUICK_SECTIONS = ("decode", "host", "prefill", "phases", "rankings")


def _layer(backend, geometry):
    return workload.new_layer(geometry, device=backend.device)


def _torch_gate(layer):
    return torch.from_numpy(layer.gate).to(layer.device)


def _data(backend, plan, tokens: int) -> Draw:
    """The first tokens of one row that all sections share."""
    longest = max(*plan.prefill, *plan.crossover, *plan.contexts, *plan.plain_tokens, plan.phases, plan.judged, plan.stack[1],
                  plan.update_tokens, plan.numpy_tokens)
    if "data" not in backend.memo:
        backend.memo["data"] = Draw.new(plan.layer, longest, backend.device)
    return backend.memo["data"].first(tokens)


def _prefix(backend, plan, layer, tokens: int):
    """`workload.follow_prefix` of that row, once for each geometry."""
    g = layer.geometry
    if g not in backend.memo:
        n = workload.prefix_length(g, tokens)
        backend.memo[g] = n, workload.follow_prefix(layer, _data(backend, plan, n).on_host(n), g.sparse_per)
    n, prefix = backend.memo[g]
    if n < workload.prefix_length(g, tokens):
        del backend.memo[g]
        return _prefix(backend, plan, layer, tokens)
    return prefix


def _k(tokens: int) -> str:
    return f"{tokens // 1024}K" if tokens % 1024 == 0 else str(tokens)


def _sharing(geometry) -> str:
    return geometry.sparse_per


# --------------------------------------------------------------------------------------------------------------- decode


def decode(backend, report: Report, plan: Plan):
    """G1 (against the copy), G2 (against softmax over the full cache), G3 (what updates cost)."""
    report.begin("decode", "decode: one token for each row, by replays of a graph, layers in turn over more than the L2")
    for batch in plan.batches:
        _gated(report, f"decode, {batch} rows", lambda: _decode(backend, report, plan, batch))
        backend.free()


def _decode(backend, report, plan, batch):
    print(f"\n {batch} rows")
    context = _data(backend, plan, max(plan.contexts))
    rigs = {}
    for geometry in plan.layers():
        for stagger in (False, True) if batch > 1 else (False,):
            rig = Decoding(backend, geometry, context, batch, plan.cold, plan.least, stagger)
            # Over the end of a chunk, then the check: the very graph that is timed, after what it did to the cache.
            rig.chunk()
            report.checked(rig.check())
            rigs[_sharing(geometry), stagger] = rig
    steps: dict = {key: [] for key in rigs}

    def chunk(key):
        seconds, begins = rigs[key].chunk()
        steps[key].append((seconds, begins))
        return float(seconds.mean())

    runs = {"copy": backend.copy_bandwidth}
    runs |= {f"{key}": (lambda key=key: chunk(key)) for key in rigs}
    peers = {}
    for tokens in plan.contexts:
        for name, run in _softmax_peers(backend, report, plan, context, tokens, batch).items():
            peers[tokens, name] = run
            runs[f"{tokens}, {name}"] = run
    values = alternate(backend, runs, plan.repeats, plan.budget)
    best = {}
    for tokens in plan.contexts:
        mine = [name for t, name in peers if t == tokens]
        if not mine:
            report.skip(f"softmax over {tokens} tokens, {batch} rows", "no backend of torch ran")
            continue
        where = f"softmax over {_k(tokens)} tokens, {batch} rows, {plan.layer.heads}/{plan.layer.kv_heads} heads, D {plan.layer.head_dim}"
        print(f"\n {where}")
        for name in mine:
            report.figure(name, where, "us", values[f"{tokens}, {name}"] * 1e6)
        best[tokens] = min((values[f"{tokens}, {name}"] for name in mine), key=np.median)
    for (per, stagger), measured in steps.items():
        rig = rigs[per, stagger]
        where = f"{rig.geometry}, {batch} rows{', staggered' if stagger else ''}, {rig.count} layers"
        print(f"\n {where}")
        rounds = measured[1:]                                     # the first one warmed up
        mean = np.array([seconds.mean() for seconds, _ in rounds])
        aligned = steps[per, False][1:]
        plain = np.array([np.median(np.delete(seconds, begins)) for seconds, begins in aligned])
        copy = values["copy"]
        if not stagger:
            report.figure("copy", where, "GB/s", copy / 1e9)
            report.figure("step without update", where, "us", plain * 1e6)
            share = report.figure("compulsory bytes / time / copy", where, "", rig.bytes / plain / copy, f"{rig.bytes / 1e6:.1f} MB")
            report.figure("the same, mean step", where, "", rig.bytes / mean / copy)
            report.figure("step with update", where, "us", np.array([seconds[begins] for seconds, begins in rounds]) * 1e6)
            if per == "kv_head" and batch in (16, 64):
                report.goal("G1", f"decode, compulsory bytes / time / copy, B = {batch}", *((0.90, 0.70) if batch == 64 else (0.80, 0.60)), share)
        report.figure("mean step, updates included", where, "us", mean * 1e6)
        every = np.concatenate([seconds for seconds, _ in rounds])
        report.figure("99th percentile of all steps", where, "us", [np.percentile(every, 99) * 1e6], f"{len(every)} steps")
        cost = report.figure("what updates add to the step", where, "%", 100 * (mean / plain - 1))
        if per == "kv_head" and batch == max(plan.batches):
            kind = "staggered" if stagger else "aligned"
            report.goal("G3", f"decode, what updates add to the mean step, %, rows {kind}, B = {batch}", 10, 25, cost, "%", most=True)
        if stagger:
            continue
        for tokens, peer in best.items():
            ratio = report.figure(f"faster than the best softmax over {_k(tokens)}", where, "x", peer / mean, "updates included")
            at32 = tokens == 32 * _K
            goals = {("kv_head", 16): (20, 10) if at32 else (5, 3), ("query_head", 16): (10, 5) if at32 else (2.6, 1.5)}
            if batch == 1 and at32 and per == "kv_head":
                report.goal("G2", f"decode at {_k(tokens)} against the best softmax peer, B = 1, {per}", 10, 5, ratio, "x")
            elif (per, batch) in goals:
                report.goal("G2", f"decode at {_k(tokens)} against the best softmax peer, B = {batch}, {per}", *goals[per, batch], ratio, "x")


def _softmax_peers(backend, report, plan, context, tokens, batch):
    """Graphs of softmax attention over caches of `tokens`, more than the L2 together: functions that return seconds per call. Of
    the ways that torch offers, the fastest two."""
    g = plan.layer
    last = context.first(tokens)
    q, k, v = last.stored
    one = 4 * g.head_dim * g.kv_heads * tokens * batch        # bytes of keys and values
    copies = max(1, math.ceil(plan.cold * backend.cache_bytes / one))
    layers = [tuple(torch.cat([x, torch.randn(batch - 1, *x.shape[1:], dtype=x.dtype, device=x.device)]) for x in (k, v))
              for _ in range(copies)]
    query = q[:, -1:].expand(batch, -1, -1, -1).contiguous()
    calls = 1 if one > 1 << 30 else max(1, math.ceil(8 / copies))
    peers = {}
    for name, run in backend.softmax_decode(query, layers).items():
        try:
            report.checked(gpu_work.check_softmax(last, run()[:1], name))
        except workload.CheckFailed as failed:
            report.skip(f"{name}, {tokens} tokens, {batch} rows", f"not counted as a peer: {failed}")
            continue
        replay = backend.capture(lambda run=run: drop([run() for _ in range(calls)]))
        peers[name] = lambda replay=replay: backend.timed(replay)[0] / (calls * copies)
    first = {name: min(run() for _ in range(3)) for name, run in peers.items()}
    return {name: peers[name] for name in sorted(peers, key=first.get)[:2]}


# ----------------------------------------------------------------------------------------------------------------- host


def host(backend, report: Report, plan: Plan):
    """G8: what one eager call costs the host, while the queue of the device has room."""
    report.begin("host", "host: one eager decode call")
    _gated(report, "host", lambda: _host(backend, report, plan))


def _host(backend, report, plan):
    for geometry in plan.layers():
        context = _data(backend, plan, geometry.window + geometry.sparse + 4 * geometry.chunk)
        rig = Decoding(backend, geometry, context, 1, 0, 1)
        rig.take(), rig.step()
        report.checked(rig.check())
        begin = time.perf_counter()
        costs = []
        while len(costs) < 3 or (len(costs) < 3 * plan.repeats and time.perf_counter() - begin < plan.budget):
            costs.append(rig.host_seconds(plan.host_calls))
        print(f"\n {geometry}, 1 row")
        cost = report.figure("eager call, on the host", f"{geometry}, 1 row", "us", np.array(costs[1:]) * 1e6, f"means of {plan.host_calls} calls")
        if geometry.sparse_per == "kv_head":
            report.goal("G8", "host cost of one eager decode call, us", 10, 30, cost, "us", most=True)


# -------------------------------------------------------------------------------------------------------------- prefill


class Filling:
    """Prefill of one layer from an empty cache, in and out of torch; inputs change place from call to call."""

    def __init__(self, backend, geometry: Geometry):
        self.backend, self.geometry = backend, geometry
        self.layer = _layer(backend, geometry)
        self.gate = _torch_gate(self.layer)
        self.cache = self.layer.new_cache()
        self.at = 0

    def __call__(self, q, k, v, out=None):
        self.cache.reset()
        return lola.attention(q, k, v, cache=self.cache, feature_map=self.layer.map, gate=self.gate, out=out)

    def in_calls(self, tokens: int, q, k, v, out):
        """The same in calls of so many tokens."""
        self.cache.reset()
        for part in zip(*(x.split(tokens, 1) for x in (q, k, v, out))):
            lola.attention(*part[:3], cache=self.cache, feature_map=self.layer.map, gate=self.gate, out=part[3])

    def checks(self, data: Draw, tokens: int, prefix) -> list[workload.Check]:
        """The call at full size: its first tokens, and its last ones in closed form."""
        end, (check, _) = self.check_end(data, tokens), prefix
        return [check(gpu_work.to_numpy(self.out[:, : workload.prefix_length(self.geometry, tokens)]), self.named(tokens)), end]

    def check_end(self, data: Draw, tokens: int) -> workload.Check:
        self.out = torch.full_like(data.stored[0][:, :tokens], float("nan"))
        self(*data.first(tokens).stored, out=self.out)
        last = (tokens - 1) // self.geometry.chunk * self.geometry.chunk
        return gpu_work.check_end(self.layer, data.first(tokens), self.cache, self.out[:, last:], self.named(tokens))

    def named(self, tokens: int) -> str:
        return f"{_k(tokens)}, lambda {self.geometry.sparse}, {self.geometry.sparse_per}"


def _rotating(data: Draw, tokens: int, bytes_wanted: float):
    """Slices of `tokens` tokens, as many as there are or as hold so many bytes, in turn."""
    one = sum(x[:, :tokens].numel() * x.element_size() for x in data.stored)
    count = max(1, min(data.count // tokens, math.ceil(bytes_wanted / one)))
    turn = 0

    def take():
        nonlocal turn
        turn = (turn + 1) % count
        return tuple(x[:, turn * tokens : (turn + 1) * tokens] for x in data.stored)

    return take


def prefill(backend, report: Report, plan: Plan):
    """G4: against causal softmax attention, and the length from which prefill is faster."""
    report.begin("prefill", "prefill: one layer, one row, from an empty cache")
    _gated(report, "prefill", lambda: _prefill(backend, report, plan))
    backend.free()


def _prefill(backend, report, plan):
    lengths = sorted({*plan.prefill, *plan.crossover})
    data = _data(backend, plan, lengths[-1])
    ours, prefixes = {}, {}
    for geometry in plan.layers():
        filling = ours[geometry.sparse_per] = Filling(backend, geometry)
        prefixes[geometry.sparse_per] = prefix = _prefix(backend, plan, filling.layer, lengths[-1])
        report.checked(workload.check_features(filling.layer, data.on_host(16)) + prefix[1])
    ratios: dict[str, dict[int, float]] = {per: {} for per in ours}
    curves: dict[str, list[float]] = {}
    for tokens in lengths:
        for per, filling in ours.items():
            report.checked(filling.checks(data, tokens, prefixes[per]))
        peers = {}
        for name, run in backend.softmax_prefill(*data.first(tokens).stored).items():
            try:
                report.checked(gpu_work.check_softmax(data.first(tokens), run(), name))
                peers[name] = run
            except workload.CheckFailed as failed:
                report.skip(f"{name}, {tokens} tokens", f"not counted as a peer: {failed}")
        take = _rotating(data, tokens, plan.cold * backend.cache_bytes)
        out = torch.empty_like(data.stored[0][:, :tokens])
        runs = {f"LoLA, {per}": (lambda filling=filling: drop(filling(*take(), out=out))) for per, filling in ours.items()}
        runs |= {name: (lambda run=run: drop(run())) for name, run in peers.items()}
        values = alternate(backend, runs, plan.repeats, plan.budget)
        where = f"{plan.layer}, {_k(tokens)} tokens".replace("kv_head, ", "")
        print(f"\n {where}")
        for name, seconds in values.items():
            report.figure(name, where, "ms", seconds * 1e3)
            curves.setdefault(name, []).append(float(np.median(seconds)) * 1e3)
        if not peers:
            report.skip(f"G4 at {tokens}", "no softmax backend of torch ran")
            continue
        best = min((values[name] for name in peers), key=np.median)
        for per in ours:
            ratio = report.figure(f"{per}: faster than the best softmax", where, "x", best / values[f"LoLA, {per}"])
            ratios[per][tokens] = ratio
            goals = {32 * _K: (5, 2.5), 128 * _K: (20, 10)}
            if per == "kv_head" and tokens in goals:
                report.goal("G4", f"prefill of {_k(tokens)} against the best softmax peer", *goals[tokens], ratio, "x")
        del out, runs, peers
        backend.free()
    if len(set(map(len, curves.values()))) == 1:
        report.curve("prefill", "tokens", {f"{name}, ms": y for name, y in curves.items()}, lengths, str(plan.layer))
    for per, at in ratios.items():
        if at:
            length = crossover(at)
            report.figure(f"{per}: length from which prefill is faster", "interpolated between the lengths above", "tokens", [length])
            if per == "kv_head" and math.isfinite(length):
                report.goal("G4", "length from which prefill is faster than the best softmax peer", 6 * _K, 12 * _K, length, most=True)


def crossover(ratios: dict[int, float]) -> float:
    """The length from which all ratios are at least 1, between two lengths in proportion to the logarithms; the first length where
    all are, infinite where none is."""
    lengths = sorted(ratios)
    slower = [t for t in lengths if ratios[t] < 1]
    if not slower:
        return float(lengths[0])
    later = [t for t in lengths if t > slower[-1]]
    if not later:
        return math.inf
    a, b = slower[-1], later[0]
    part = -math.log(ratios[a]) / (math.log(ratios[b]) - math.log(ratios[a]))
    return math.exp(math.log(a) + part * (math.log(b) - math.log(a)))


# --------------------------------------------------------------------------------------------------------------- phases

_APART = 2048        # tokens of a call whose phases come one after the other: in longer ones they run beside each other


def phases(backend, report: Report, plan: Plan):
    """G5: where the time of prefill goes, and the attention kernels against the matrix product."""
    report.begin("phases", "phases: kernels of prefill, by torch's profiler")
    for geometry in plan.layers():
        _gated(report, f"phases, {geometry}", lambda: _phases(backend, report, plan, geometry))
        backend.free()


def _phases(backend, report, plan, geometry):
    T = plan.phases
    data, filling = _data(backend, plan, T), Filling(backend, geometry)
    prefix = _prefix(backend, plan, filling.layer, T)
    report.checked(prefix[1] + filling.checks(data, T, prefix))
    out = torch.empty_like(data.stored[0])
    gathered: list[dict[str, float]] = []
    runs = {
        "gemm": backend.gemm_flops,
        "kernels": lambda: (gathered.append(backend.kernel_seconds(lambda: filling.in_calls(_APART, *data.stored, out))), 0.0)[1],
        "whole": lambda: drop(filling(*data.stored, out=out)),
    }
    values = alternate(backend, runs, max(5, plan.repeats // 3), plan.budget)
    where = f"{geometry}, {_k(T)} tokens"
    kernels = gathered[1:]
    print(f"\n {where}")
    report.figure("bf16 matrix product 8192^3", where, "TFLOP/s", values["gemm"] / 1e12)
    report.figure("whole prefill", where, "ms", values["whole"] * 1e3)
    work = workload.prefill_work(geometry, T)
    report.figure("whole prefill, useful work", where, "TFLOP/s", work.total / values["whole"] / 1e12)
    for step in sorted({step for of in kernels for step in of}):
        report.figure(f"kernels of {step}", where, "ms", np.array([of.get(step, 0.0) for of in kernels]) * 1e3)
    seconds = np.array([of.get("attend", 0.0) for of in kernels])
    if not seconds.all():
        report.skip("G5", "the profiler saw no kernel named attend")
        return
    # The attention kernels take softmax over the exact pairs; phi(q) H is the scan's, and is counted there.
    pairs = workload.prefill_work(geometry.but(feature_dim=0), T).attend
    report.figure("attention kernels, exact pairs", where, "TFLOP/s", pairs / seconds / 1e12)
    share = report.figure("attention kernels / matrix product", where, "", pairs / seconds / values["gemm"][: len(seconds)])
    scan = np.array([of.get("scan", 0.0) for of in kernels])
    if scan.all():
        chunks = T / geometry.chunk
        report.figure("scan, per chunk", where, "us", scan / chunks * 1e6)
        report.figure("scan, useful work", where, "TFLOP/s", (work.score + work.fold + work.attend - pairs) / scan / 1e12)
    goal = (0.60, 0.35) if geometry.sparse_per == "kv_head" else (0.45, 0.25)
    report.goal("G5", f"attention kernels' useful FLOP / matrix product, {geometry.sparse_per}", *goal, share)


# ------------------------------------------------------------------------------------------------------------- rankings


def rankings(backend, report: Report, plan: Plan):
    """G7: every ranking of a long prefill, judged in float64 on its own history; and that one call leaves the same memory."""
    report.begin("rankings", "rankings: all of a prefill in float64, on the backend's own history")
    for geometry in plan.layers():
        layer, data = _layer(backend, geometry), _data(backend, plan, plan.judged)
        cut, whole = layer.new_cache(), layer.new_cache()
        count, wrong, worst = gpu_work.judge_rankings(layer, data, cut)
        layer.attention(*data.stored, cache=whole)
        where = f"{geometry}, {_k(plan.judged)} tokens"
        same = gpu_work.same_memory(cut, whole)
        print(f"\n {where}")
        report.figure("rankings", where, "", [count])
        report.figure("rankings that hold", where, "%", [100 * (1 - wrong / max(1, count))], f"worst margin {worst:.1e}")
        _gated(report, f"rankings, {geometry}", lambda: report.checked([
            workload.Check(f"one call leaves the memory of {plan.judged // geometry.chunk} calls, {geometry.sparse_per}", float(not same), 0.0)]))
        held = 100 * (1 - wrong / max(1, count)) if same and count else 0.0
        report.goal("G7", f"rankings of {_k(plan.judged)} that hold in float64, {geometry.sparse_per}, %", 100, 100, held, "%")
        backend.free()


# ---------------------------------------------------------------------------------------------------------------- stack


class Stack(torch.nn.Module):
    """Whole layers of Llama's geometry: norms, projections, RoPE and the MLP in torch, attention by lola."""

    def __init__(self, backend, geometry: Geometry, layers: int, width: int, inner: int):
        super().__init__()
        g = self.geometry = geometry
        kind = dict(dtype=gpu_work.dtype_of(g), device=backend.device)
        random = torch.Generator(backend.device).manual_seed(0)

        def weight(*shape):
            return torch.randn(*shape, generator=random, **kind) * shape[0] ** -0.5

        sizes = (g.heads * g.head_dim, (g.heads + 2 * g.kv_heads) * g.head_dim)
        self.weights = [
            dict(qkv=weight(width, sizes[1]), o=weight(sizes[0], width), up=weight(width, 2 * inner), down=weight(inner, width))
            for _ in range(layers)
        ]
        self.fillings: list[Filling] = []
        self.layers, self.kind = layers, kind

    def attend_with(self, fillings):
        self.fillings = fillings
        return self

    def rope(self, x):
        T, d = x.shape[1], x.shape[-1]
        angle = torch.arange(T, device=x.device)[:, None] * 5e5 ** (-torch.arange(0, d, 2, device=x.device) / d)
        cos, sin = (f(angle).to(x.dtype)[None, :, None] for f in (torch.cos, torch.sin))
        a, b = x.chunk(2, -1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

    @torch.inference_mode()
    def forward(self, x):
        g = self.geometry
        norm = torch.nn.functional.rms_norm
        for filling, w in zip(self.fillings, self.weights):
            qkv = (norm(x, x.shape[-1:]) @ w["qkv"]).view(*x.shape[:2], -1, g.head_dim)
            q, k, v = qkv.split([g.heads, g.kv_heads, g.kv_heads], 2)
            x = x + filling(self.rope(q), self.rope(k), v).flatten(2) @ w["o"]
            a, b = (norm(x, x.shape[-1:]) @ w["up"]).chunk(2, -1)
            x = x + (torch.nn.functional.silu(a) * b) @ w["down"]
        return x


def stack(backend, report: Report, plan: Plan):
    """G6: what lambda = 512 costs in whole layers, against lambda = 0."""
    report.begin("stack", "stack: whole layers of Llama-3.1-8B's geometry, prefill")
    _gated(report, "stack", lambda: _stack(backend, report, plan))
    backend.free()


def _stack(backend, report, plan):
    layers, tokens, width, inner = plan.stack
    sparse = plan.layer.sparse
    model = Stack(backend, plan.layer, layers, width, inner)
    x = torch.randn(1, tokens, width, **model.kind)
    geometries = {"lambda 0": plan.layer.but(sparse=0), **{f"lambda {sparse}, {g.sparse_per}": g for g in plan.layers()}}
    data = _data(backend, plan, tokens)
    runs, fillings = {}, {}
    for name, geometry in geometries.items():
        fillings[name] = [Filling(backend, geometry) for _ in range(layers)]
        prefix = _prefix(backend, plan, fillings[name][0].layer, tokens)
        report.checked(prefix[1] + fillings[name][0].checks(data, tokens, prefix))
        runs[name] = lambda name=name: drop(model.attend_with(fillings[name])(x))
    values = alternate(backend, runs, plan.repeats, plan.budget)
    where = f"{layers} layers of width {width}, MLP {inner}, {plan.layer}, {_k(tokens)} tokens"
    print(f"\n {where}")
    for name in runs:
        report.figure(name, where, "ms/layer", values[name] / layers * 1e3)
    for name in list(runs)[1:]:
        ratio = report.figure(f"{name} over lambda 0", where, "x", values[name] / values["lambda 0"])
        if name.endswith("kv_head"):
            report.goal("G6", f"stack at {_k(tokens)}, lambda = {sparse} over lambda = 0, whole layers", 1.10, 1.30, ratio, "x", most=True)


# --------------------------------------------------------------------------------------------------------------- update


def _rankings_of(layer, data) -> list[workload.Check]:
    count, wrong, worst = gpu_work.judge_rankings(layer, data, layer.new_cache())
    return [workload.Check(f"{count} rankings in float64, lambda {layer.geometry.sparse}", max(0.0, -worst) if wrong else 0.0, 1e-5)]


def update(backend, report: Report, plan: Plan):
    """The method's overhead: what an update costs against the size of the sparse cache."""
    report.begin("update", "update: score, select and fold, against the size of the sparse cache")
    for geometry in plan.layers():
        _gated(report, f"update, {geometry}", lambda: _update(backend, report, plan, geometry))
        backend.free()


def _update(backend, report, plan, geometry):
    names = ("decode, us per update", "decode, % of the mean step", "prefill, us per chunk", "prefill's scan, us per chunk")
    curves: dict[str, list[float]] = {name: [] for name in names}
    batch, T = plan.batches[min(1, len(plan.batches) - 1)], plan.update_tokens
    case = f"{geometry.but(sparse=0)}".replace("lambda 0", "lambda as said")
    for sparse in plan.sparse:
        g = geometry.but(sparse=sparse)
        data, filling = _data(backend, plan, T), Filling(backend, g)
        report.checked(_rankings_of(filling.layer, data.first(workload.prefix_length(g, T))) + [filling.check_end(data, T)])
        rig = Decoding(backend, g, data, batch, plan.cold, plan.least)
        rig.chunk()
        report.checked(rig.check())
        out, steps, scans = torch.empty_like(data.stored[0]), [], []
        apart = functools.partial(filling.in_calls, _APART, *data.stored, out)  # a scan may wait while the last one runs
        runs = {
            "decode": lambda: (steps.append(rig.chunk()), 0.0)[1],
            "prefill": lambda: drop(filling(*data.stored, out=out)),
            "scan": lambda: (scans.append(backend.kernel_seconds(apart, 1).get("scan", 0.0)), 0.0)[1],
        }
        values = alternate(backend, runs, min(plan.repeats, 10), plan.budget / 4)
        plain = np.array([np.median(np.delete(seconds, begins)) for seconds, begins in steps[1:]])
        ups = np.array([seconds[begins] for seconds, begins in steps[1:]]) - plain
        mean = np.array([seconds.mean() for seconds, _ in steps[1:]])
        chunks = T / g.chunk
        where = f"{case}, {batch} rows in decoding, {_k(T)} tokens in prefill, lambda {sparse}"
        print(f"\n {where}")
        figures = (ups * 1e6, 100 * (mean / plain - 1), values["prefill"] / chunks * 1e6, np.array(scans[1:]) / chunks * 1e6)
        for (name, curve), unit, data in zip(curves.items(), ("us", "%", "us", "us"), figures):
            curve.append(report.figure(f"{name}, lambda {sparse}", where, unit, data))
        del rig, filling, runs
        backend.free()
    report.curve("update", "sparse", curves, list(plan.sparse), case)


# ---------------------------------------------------------------------------------------------------------------- numpy


def numpy(backend, report: Report, plan: Plan):
    """NumPy arrays in and out: at most 1.15 times the longer of the kernels and the pinned copies, plus a millisecond."""
    report.begin("numpy", "numpy: prefill with NumPy arrays in and out, copied by lola")
    for geometry in plan.layers():
        _gated(report, f"numpy, {geometry}", lambda: _numpy(backend, report, plan, geometry))
        backend.free()


def _numpy(backend, report, plan, geometry):
    T = plan.numpy_tokens
    data, filling = _data(backend, plan, T), Filling(backend, geometry)
    prefix = _prefix(backend, plan, filling.layer, T)
    report.checked(prefix[1] + filling.checks(data, T, prefix))
    there = filling(*data.stored)
    host = [gpu_work.to_numpy(x) for x in data.stored]
    out = np.empty_like(host[0])
    layer, cache = filling.layer, filling.layer.new_cache()

    def run():
        cache.reset()
        backend.settle()
        begin = time.perf_counter()
        layer.attention(*host, cache=cache, out=out)
        return time.perf_counter() - begin

    run()
    same = np.array_equal(out.view(np.uint8), gpu_work.to_numpy(there).view(np.uint8))
    report.checked([workload.Check("NumPy arrays give the bits of tensors", float(not same), 0.0)])
    copies = backend.pinned_copy_seconds(sum(x.nbytes for x in host), out.nbytes)
    runs = {"numpy": run, "copies": copies, "kernels": lambda: drop(filling(*data.stored, out=there))}
    values = alternate(backend, runs, plan.repeats, plan.budget)
    where = f"{geometry}, {_k(T)} tokens"
    print(f"\n {where}")
    for name, what in (("numpy", "NumPy in, NumPy out"), ("kernels", "tensors in, tensor out"), ("copies", "pinned copies of the same bytes")):
        report.figure(what, where, "ms", values[name] * 1e3)
    allowed = 1.15 * np.maximum(values["kernels"], values["copies"]) + 1e-3
    share = report.figure("time / (1.15 x the longer of the two + 1 ms)", where, "", values["numpy"] / allowed)
    if geometry.sparse_per == "kv_head":
        report.goal("NumPy", f"prefill of {_k(T)}, NumPy in and out, time / (1.15 max(kernels, copies) + 1 ms)", 1, 1, share, most=True)


# ---------------------------------------------------------------------------------------------------------------- plain


def plain(backend, report: Report, plan: Plan):
    """LoLA in plain and in compiled PyTorch, on the same device."""
    report.begin("plain", "plain: LoLA in PyTorch, eager and compiled, beside lola")
    for tokens in plan.plain_tokens:
        _gated(report, f"plain, {tokens} tokens", lambda: _plain(backend, report, plan, tokens))
        backend.free()


def _plain(backend, report, plan, T):
    from gpu_plain import CompiledLola, PlainLola

    g = plan.layer
    data, filling = _data(backend, plan, T), Filling(backend, g)
    n = workload.prefix_length(g, T)
    host = data.on_host(n)
    prefix = _prefix(backend, plan, filling.layer, T)
    report.checked(prefix[1] + filling.checks(data, T, prefix))
    weights = [torch.from_numpy(x).to(backend.device) for x in (filling.layer.w_q, filling.layer.w_k, filling.layer.gate)]
    makers = {"eager": PlainLola, "compiled, a graph per chunk": CompiledLola}
    runs = {"lola": lambda: drop(filling(*data.stored))}
    for name, kind in makers.items():
        try:
            peer = kind(g, *weights, dtype=gpu_work.dtype_of(g), capture=backend.capture)
            peer.held = []
            made = peer(*data.stored)[:, :n]
            report.checked([_plain_check(filling.layer, host, made, peer.held, name)])
        except workload.CheckFailed as failed:
            report.skip(f"LoLA in PyTorch, {name}", f"not counted as a peer: {failed}")
            continue
        except Exception as error:                     # torch.compile has many ways to fail, and none of them is ours
            report.skip(f"LoLA in PyTorch, {name}", f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}")
            continue
        peer.held = None
        runs[name] = lambda peer=peer: drop((peer.clear(), peer(*data.stored)))
    values = alternate(backend, runs, min(plan.repeats, 5), plan.budget / 2)
    where = f"{g}, {_k(T)} tokens"
    print(f"\n {where}")
    report.figure("lola", where, "ms", values["lola"] * 1e3)
    for name in list(runs)[1:]:
        report.figure(f"LoLA in PyTorch, {name}", where, "ms", values[name] * 1e3)
        report.figure(f"faster than LoLA in PyTorch, {name}", where, "x", values[name] / values["lola"])


def _plain_check(layer, host, made, held, name):
    """In 16 bits a peer may round its features and weights as it likes, which no bound of the contract is for; along its own
    rankings it stays within a tenth of the reference's RMS."""
    first, *_ = workload.check_plain(layer, host, gpu_work.to_numpy(made).astype(np.float32), held)
    return workload.Check(f"PyTorch, {name}: {first.what}", first.error, 0.1)


# --------------------------------------------------------------------------------------------------------------- llama


def llama(backend, report: Report, plan: Plan):
    """H1 (tokens per second of one row), H2 (of the largest batch that fits), H3 (on a consumer's card)."""
    report.begin("llama", "llama: a whole model of transformers, LoLA and softmax attention in the same decoding loop")
    try:
        from llama import measure
    except ImportError as error:
        report.skip("llama", f"takes transformers: {error}")
        return
    _gated(report, "llama", lambda: measure(backend, report, plan.layer, plan.llama))
    backend.free()


SECTIONS = {"decode": decode, "host": host, "prefill": prefill, "phases": phases, "rankings": rankings, "stack": stack,
            "update": update, "numpy": numpy, "plain": plain, "llama": llama}
