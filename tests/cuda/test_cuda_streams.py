"""Streams, graphs, waiting and memory: what a serving loop relies on.

Proved here: work goes to the caller's current stream, or to stream=; a cache used on another stream waits for its last use;
neither prefill nor decoding waits for the device; decoding takes no memory, prefill no more for longer calls, and what it
takes is kept for the next one; a captured decode step replays over hundreds of steps, updates included, with the bits of
eager calls; threads may use caches of their own; what does not fit raises MemoryError, says how many bytes, and changes
nothing.
"""

import contextlib
import gc
import threading
import time

import numpy as np
import pytest

import lola
from oracle import Case, assert_same_bits, assert_same_memory, build, lola_map, new_cache, options, run, snapshot
from places import DEVICE, array, only_on_cuda, tensor
from test_cuda_sizes import LLAMA

pytestmark = only_on_cuda

LAYER = LLAMA.but(B=3, T=700, D=64, Dv=64, F=64, window=64, sparse=96)
CASES = [LAYER, LAYER.but(sparse_per="query_head", dtype="float32"), LAYER.but(window=16, chunk=16, sparse=24),
         LAYER.but(window=20, chunk=1, sparse=24), LAYER.but(B=1, D=128, Dv=128, F=128, window=128, sparse=200),
         LAYER.but(D=24, Dv=40, F=36, window=9, chunk=3, map="given"), LAYER.but(sparse=0)]
IDS = ["kv_head", "query_head", "C 16", "C 1", "D 128", "odd and given", "no cache"]
APART = [CASES[1], CASES[5], CASES[6]]                       # whose updates have a kernel for their features


class Step:
    """A layer whose decode step reads fixed tensors and writes another."""

    def __init__(self, data):
        import torch
        self.data = data
        self.names = [n for n in ("q", "k", "v", "q_features", "k_features") if n in data.stored]
        self.tokens = {n: tensor(data.stored[n]) for n in self.names}
        self.at = {n: x[:, :1].clone() for n, x in self.tokens.items()}
        case = data.case
        self.out = torch.full((case.B, 1, case.Hq, case.Dv), float("nan"), dtype=self.at["q"].dtype, device=DEVICE)
        self.fixed = {"gate": tensor(data.gate)}
        if case.map != "given":
            self.fixed["feature_map"] = lola_map(data)

    def prefill(self, cache, lo, hi):
        return lola.attention(**{n: x[:, lo:hi] for n, x in self.tokens.items()}, cache=cache, **self.fixed)

    def load(self, t):
        for n, x in self.at.items():
            x.copy_(self.tokens[n][:, t:t + 1])

    def __call__(self, cache, **more):
        return lola.attention(**self.at, cache=cache, out=self.out, **self.fixed, **more)


def long_wait(seconds=0.3):
    """Keeps the current stream busy; returns an event at its end."""
    import torch
    torch.cuda._sleep(int(seconds * 1.7e9))
    done = torch.cuda.Event()
    done.record()
    return done


# ----------------------------------------------------------------------------------- graphs

@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_a_captured_step_replays_as_eager_calls_do(case):
    """300 steps over several updates, begun inside a chunk; then eager calls continue where the graph left off."""
    import torch
    data = build(case)
    step, cache = Step(data), new_cache(data)
    at = 300 if case.chunk > 1 else 100
    step.prefill(cache, 0, at - 1)
    step.load(at - 1)
    step(cache)                                              # everything that is made once is made
    eager = cache.copy()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(cache)
    outs, expected = [], []
    for t in range(at, at + 300):
        step.load(t)
        step.out.fill_(float("nan"))
        graph.replay()
        outs.append(step.out.clone())
    for t in range(at, at + 300):
        step.load(t)
        expected.append(step(eager).clone())
    assert_same_bits(array(torch.cat(outs, 1)), array(torch.cat(expected, 1)))
    cache.sync()
    assert np.asarray(cache.tokens_seen).tolist() == [at + 300] * case.B
    assert_same_memory(cache, eager, case.Hq)
    assert_same_bits(array(step.prefill(cache, at + 300, None)), array(step.prefill(eager, at + 300, None)))
    assert_same_memory(cache, eager, case.Hq)
    whole = new_cache(data)
    step.prefill(whole, 0, None)
    assert_same_memory(cache, whole, case.Hq)


def test_capturing_runs_nothing():
    import torch
    data = build(LAYER)
    step, cache = Step(data), new_cache(data)
    step.prefill(cache, 0, 200)
    step(cache)
    before = snapshot(cache)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(cache)
    torch.cuda.synchronize()
    cache.sync()
    assert snapshot(cache) == before and np.asarray(cache.tokens_seen).tolist() == [201] * 3


@pytest.mark.parametrize("case", [LAYER, LAYER.but(B=20, T=460, Hq=8, Hkv=4, D=128, Dv=128, F=128, window=128, sparse=200)],
                         ids=["small", "large"])
def test_several_layers_and_ragged_rows_in_one_graph(case):
    """Four layers, rows that idle by an index array on the device. A step's kernels start while the layer's before it ends."""
    import torch
    data = [build(case.but(seed=i)) for i in range(4)]
    steps, caches = [Step(d) for d in data], [new_cache(d) for d in data]
    stops = tensor(np.ones(case.B, np.int64))
    for step, cache in zip(steps, caches):
        step.prefill(cache, 0, 250)
        step(cache, stops=stops)
    eager = [cache.copy() for cache in caches]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for step, cache in zip(steps, caches):
            step(cache, stops=stops)
    for t in range(251, 451):
        stops.copy_(tensor(np.resize([1, t % 3 > 0, t % 2], case.B)))
        for step in steps:
            step.load(t)
        graph.replay()
        got = [step.out.clone() for step in steps]
        for step, cache, out in zip(steps, eager, got):
            assert torch.equal(step(cache, stops=stops), out)
    for cache, other in zip(caches, eager):
        cache.sync(), other.sync()
        assert_same_memory(cache, other, case.Hq)
    assert len(set(np.asarray(caches[0].tokens_seen).tolist())) == 3


def test_a_captured_prefill():
    """A call of several chunks, its scratch memory included, replayed."""
    import torch
    data = build(LAYER)
    step, cache = Step(data), new_cache(data)
    step.prefill(cache, 0, 200)
    step.prefill(cache, 200, 350)
    eager = cache.copy()
    part = {n: x[:, :150].clone() for n, x in step.tokens.items()}
    out = torch.empty_like(part["q"])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        lola.attention(**part, cache=cache, out=out, **step.fixed)
    for lo in (350, 500):
        for n, x in part.items():
            x.copy_(step.tokens[n][:, lo:lo + 150])
        out.fill_(float("nan"))
        graph.replay()
        assert torch.equal(step.prefill(eager, lo, lo + 150), out)
    cache.sync()
    assert_same_memory(cache, eager, 4)


def test_a_captured_prefill_of_several_segments():
    """Phases of neighbouring segments run beside each other in a graph as well; call follows call."""
    import torch
    n = 13_001
    data = build(LLAMA.but(T=5 * n, D=64, Dv=64, F=64, window=64, sparse=96))
    step, cache, pieces = Step(data), new_cache(data), new_cache(data)
    step.prefill(cache, 0, n)
    part = {name: x[:, :n].clone() for name, x in step.tokens.items()}
    out = torch.empty_like(part["q"])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        lola.attention(**part, cache=cache, out=out, **step.fixed)
    outs = []
    for lo in range(n, 5 * n, n):
        for name, x in part.items():
            x.copy_(step.tokens[name][:, lo:lo + n])
        out.fill_(float("nan"))
        graph.replay()
        outs.append(out.clone())
    cache.sync()
    expected = [step.prefill(pieces, lo, lo + n // 4) for lo in range(0, 5 * n, n // 4)]
    assert torch.equal(torch.cat(outs, 1), torch.cat(expected, 1)[:, n:5 * n])
    assert_same_memory(cache, pieces, data.case.Hq)


def test_what_must_wait_raises_while_a_graph_is_captured():
    """check=True looks at the device, so it cannot be recorded; the cache is as it was."""
    import torch
    data = build(LAYER)
    step, cache = Step(data), new_cache(data)
    step.prefill(cache, 0, 200)
    step(cache)
    before = snapshot(cache)
    with pytest.raises((RuntimeError, ValueError)):
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            step(cache, check=True)
    torch.cuda.synchronize()
    assert snapshot(cache) == before
    step(cache)


# ----------------------------------------------------------------------------------- not waiting

@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_calls_do_not_wait_for_the_device(case):
    """While the device is busy with something else, prefill and a chunk of decoding return."""
    import torch
    data = build(case)
    step, cache = Step(data), new_cache(data)
    at = 3 * case.chunk + case.window + case.sparse
    step.prefill(cache, 0, at)
    step.load(at)
    step(cache)
    step.prefill(cache, at + 1, at + 60)                     # a first time, for what is loaded and allocated once
    torch.cuda.synchronize()
    done = long_wait()
    step.prefill(cache, at + 60, at + 120)
    assert not done.query(), "prefill waited"
    for t in range(case.chunk + 1):
        step(cache)
    assert not done.query(), "decoding waited"
    out = lola.attention(**step.at, config=cache.config, **step.fixed)
    assert not done.query(), "a call without a cache waited"
    torch.cuda.synchronize()
    assert torch.isfinite(out).all() and int(cache.tokens_seen[0]) == at + 120 + case.chunk + 1


@pytest.mark.parametrize("B", [1, 3, 20, 80])
@pytest.mark.parametrize("sparse_per", ["kv_head", "query_head"])
def test_calls_that_queue_up_see_what_those_before_them_did(B, sparse_per):
    """Kernels of neighbouring calls overlap, and some look at counters before the last step has ended. So calls of all kinds
    wait in a queue behind each other, with nothing between them: prefill up to a chunk's end and into one, steps of which the
    host knows that they have no update, steps of which it does not, steps that a small batch's own kernel cannot take."""
    import torch
    data = build(LAYER.but(B=B, T=520, D=128, Dv=128, F=128, window=64, chunk=32, sparse=70, sparse_per=sparse_per))
    tokens = {n: tensor(data.stored[n]) for n in "qkv"}
    beside = torch.empty(*tokens["q"].shape[:3], 129, dtype=tokens["q"].dtype, device=DEVICE)
    beside[..., 1:] = tokens["q"]                                        # rows begin at no multiple of 16 bytes
    fixed = {"gate": tensor(data.gate), "feature_map": lola_map(data)}
    takes = tensor(np.ones(B, np.int64))
    pieces = [(0, 128), *((t, t + 1) for t in range(128, 200)), (200, 256), *((t, t + 1) for t in range(256, 330)), (330, 352),
              *((t, t + 1) for t in range(352, 460)), (460, 520)]

    def decode(wait):
        cache = new_cache(data)
        outs = [torch.full_like(tokens["q"][:, lo:hi], float("nan")) for lo, hi in pieces]
        long_wait()
        for out, (lo, hi) in zip(outs, pieces):
            given = {n: x[:, lo:hi] for n, x in tokens.items()}
            if hi - lo == 1 and lo % 23 == 5:
                given["q"] = beside[:, lo:hi, :, 1:]
            if lo in (301, 400) or 410 < lo < 450:                       # from the first on the host counts no longer
                given["stops"] = takes
            lola.attention(**given, cache=cache, out=out, **fixed)
            if wait:
                torch.cuda.synchronize()
        return array(torch.cat(outs, 1)), cache

    out, cache = decode(wait=False)
    waited, other = decode(wait=True)
    assert_same_bits(out, waited)
    assert_same_memory(cache, other, data.case.Hq)
    whole = new_cache(data)
    lola.attention(**tokens, cache=whole, **fixed)
    assert_same_memory(cache, whole, data.case.Hq)


def test_counters_of_eager_calls_need_no_sync():
    """tokens_seen is right while the call that it counts is still queued."""
    import torch
    data = build(LAYER)
    step, cache = Step(data), new_cache(data)
    step.prefill(cache, 0, 100)
    torch.cuda.synchronize()
    long_wait(0.1)
    step(cache)
    assert np.asarray(cache.tokens_seen).tolist() == [101] * 3


# ----------------------------------------------------------------------------------- streams

def handles():
    yield "number", lambda s: s.cuda_stream
    yield "torch", lambda s: s


@pytest.mark.parametrize("given", [h for _, h in handles()], ids=[n for n, _ in handles()])
@pytest.mark.parametrize("T", [1, 300])
def test_work_goes_to_the_stream_that_is_named(given, T):
    """The stream's earlier work is late; the call must come after it, though another stream is current."""
    import torch
    data = build(LAYER.but(T=T))
    expected = run(data, new_cache(data))
    right = {n: tensor(data.stored[n]) for n in "qkv"}
    late = {n: torch.zeros_like(x) for n, x in right.items()}
    cache, stream = new_cache(data), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        done = long_wait(0.1)
        for n, x in late.items():
            x.copy_(right[n])
    out = torch.full(expected.shape, float("nan"), dtype=right["q"].dtype, device="cuda")
    torch.cuda.current_stream().synchronize()
    lola.attention(**late, cache=cache, out=out, stream=given(stream), **options(data))
    assert not done.query()
    stream.synchronize()
    assert_same_bits(array(out), expected)


@pytest.mark.parametrize("T", [1, 300])
def test_work_goes_to_the_current_stream(T):
    import torch
    data = build(LAYER.but(T=T))
    expected = run(data, new_cache(data))
    right = {n: tensor(data.stored[n]) for n in "qkv"}
    late = {n: torch.zeros_like(x) for n, x in right.items()}
    cache, stream = new_cache(data), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        long_wait(0.1)
        for n, x in late.items():
            x.copy_(right[n])
        out = lola.attention(**late, cache=cache, **options(data))
        copied = out.clone()
    stream.synchronize()
    assert_same_bits(array(copied), expected)


def test_a_cache_on_another_stream_waits_for_its_last_use():
    """Five streams in turn, each late, none waited for."""
    import torch
    data = build(LAYER)
    plain, cache = new_cache(data), new_cache(data)
    expected = run(data, plain)
    tokens = {n: tensor(data.stored[n]) for n in "qkv"}
    streams, outs = [torch.cuda.Stream() for _ in range(5)], []
    cuts = [0, 130, 131, 132, 400, 700]
    torch.cuda.synchronize()
    for stream, lo, hi in zip(streams, cuts, cuts[1:]):
        with torch.cuda.stream(stream):
            long_wait(0.05)
            outs.append(lola.attention(**{n: x[:, lo:hi] for n, x in tokens.items()}, cache=cache, **options(data)))
    with torch.cuda.stream(torch.cuda.Stream()):
        copied = cache.copy()
    torch.cuda.synchronize()
    joined = array(torch.cat(outs, 1)).astype(np.float64)
    assert np.abs(joined - expected.astype(np.float64)).max() < 0.05
    assert_same_memory(cache, plain, 4)
    assert_same_memory(copied, plain, 4)


def test_looking_at_a_cache_waits_for_its_last_use():
    import torch
    data = build(LAYER)
    plain, cache = new_cache(data), new_cache(data)
    run(data, plain)
    tokens = {n: tensor(data.stored[n]) for n in "qkv"}
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        long_wait(0.1)
        lola.attention(**tokens, cache=cache, **options(data))
    assert_same_memory(cache, plain, 4)


def test_caches_on_streams_of_their_own():
    import torch
    data = [build(LAYER.but(seed=i)) for i in range(4)]
    expected = [run(d, new_cache(d)) for d in data]
    caches, streams = [new_cache(d) for d in data], [torch.cuda.Stream() for _ in data]
    tokens = [{n: tensor(d.stored[n]) for n in "qkv"} for d in data]
    outs = [[] for _ in data]
    torch.cuda.synchronize()
    for lo, hi in ((0, 200), (200, 201), (201, 202), (202, 700)):
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                part = {n: x[:, lo:hi] for n, x in tokens[i].items()}
                outs[i].append(lola.attention(**part, cache=caches[i], **options(data[i])))
    torch.cuda.synchronize()
    for d, cache, out, right in zip(data, caches, outs, expected):
        got = array(torch.cat(out, 1)).astype(np.float64)
        assert np.abs(got - right.astype(np.float64)).max() < 0.05
        plain = new_cache(d)
        run(d, plain)
        assert_same_memory(cache, plain, 4)


def test_threads_on_streams_of_their_own():
    import torch
    data = [build(LAYER.but(seed=i)) for i in range(4)]
    expected = [run(d, new_cache(d)) for d in data]
    got, failed = [None] * 4, []

    def work(i):
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                for _ in range(5):
                    got[i] = run(data[i], new_cache(data[i]))
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert not failed, failed
    for a, b in zip(got, expected):
        assert_same_bits(a, b)


@pytest.mark.parametrize("wrong", ["main", 1.5, [0]])
def test_wrong_streams(wrong):
    data = build(LAYER.but(T=5))
    cache = new_cache(data)
    before = snapshot(cache)
    with pytest.raises(TypeError, match="stream"):
        lola.attention(*(tensor(data.stored[n]) for n in "qkv"), cache=cache, stream=wrong, **options(data))
    assert snapshot(cache) == before


# ----------------------------------------------------------------------------------- several devices

def test_the_arrays_device_counts_not_the_current_one():
    import torch
    if torch.cuda.device_count() < 2:
        pytest.skip("takes two devices")
    data = build(LAYER)
    expected = run(data, new_cache(data))
    cache = lola.Cache(lola.Config(**data.case.config), batch=3, device="cuda:1", **data.case.sizes)
    there = [tensor(data.stored[n], "cuda:1") for n in "qkv"]
    out = lola.attention(*there, cache=cache, **options(data))
    assert out.device == there[0].device and torch.cuda.current_device() == 0
    assert_same_bits(array(out), expected)
    with pytest.raises(ValueError, match="device|cuda"):
        lola.attention(there[0], *(tensor(data.stored[n], "cuda:0") for n in "kv"), cache=cache, **options(data))


# ----------------------------------------------------------------------------------- memory

class Pool:
    """The memory pool that a cache on a device is allocated from, and calls with it, by cuda-python."""

    def __init__(self, cache):
        self.driver = driver = pytest.importorskip("cuda.bindings.driver")
        import torch
        pointer = torch.from_dlpack(cache.hidden).data_ptr()
        handle = driver.CUpointer_attribute.CU_POINTER_ATTRIBUTE_MEMPOOL_HANDLE
        self.pool = driver.CUmemoryPool(int(self.ask(driver.cuPointerGetAttribute(handle, pointer))))
        assert int(self.pool), "a cache's memory comes from no pool"

    @staticmethod
    def ask(result):
        assert int(result[0]) == 0, result[0]
        return result[1] if len(result) > 1 else None

    def get(self, name):
        attribute = getattr(self.driver.CUmemPool_attribute, f"CU_MEMPOOL_ATTR_{name}")
        return int(self.ask(self.driver.cuMemPoolGetAttribute(self.pool, attribute)))

    @property
    def used(self):
        return self.get("USED_MEM_CURRENT")

    @property
    def most(self):
        """The most that was used at once since reset()."""
        return self.get("USED_MEM_HIGH")

    @property
    def free(self):
        """What it holds and nobody uses."""
        return self.get("RESERVED_MEM_CURRENT") - self.used

    def reset(self):
        attribute = self.driver.CUmemPool_attribute.CU_MEMPOOL_ATTR_USED_MEM_HIGH
        self.ask(self.driver.cuMemPoolSetAttribute(self.pool, attribute, self.driver.cuuint64_t(0)))


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_decoding_takes_no_memory(case):
    """With out=, two chunks of steps: nothing from torch, nothing from lola's pool. Where an update does not compute its
    features itself, it takes the room of those of all its pairs for a moment, in the stream's order."""
    import torch
    data = build(case)
    step, cache = Step(data), new_cache(data)
    step.prefill(cache, 0, 300)
    for t in range(case.chunk + 1):
        step(cache)
    torch.cuda.synchronize()
    gc.collect()
    pool = Pool(cache)
    assert pool.used >= cache.nbytes
    pool.reset()
    before = pool.used, torch.cuda.memory_allocated(), cache.nbytes
    torch.cuda.reset_peak_memory_stats()
    for t in range(2 * case.chunk + 1):
        step(cache)
    torch.cuda.synchronize()
    assert (pool.used, torch.cuda.memory_allocated(), cache.nbytes) == before
    item = 4 if case.dtype == "float32" else 2
    moment = case.B * case.Hq * (case.sparse + case.window + case.chunk) * case.F * item if case in APART else 0
    assert pool.most - before[0] <= moment + (2 ** 16 if moment else 0) and torch.cuda.max_memory_allocated() == before[1]


def test_nothing_leaks():
    """Calls, copies, errors and dropped caches leave as much memory free as before."""
    import torch
    data = build(LAYER)
    step = Step(data)

    def once():
        cache = new_cache(data)
        step.prefill(cache, 0, 300)
        step(cache)
        cache.copy().select([0]).sparse_positions(0, 0)
        cache.to("cpu").to("cuda")
        with pytest.raises(ValueError):
            lola.attention(**step.at, cache=cache, stops=np.array([2, 2, 2]), **step.fixed)
        run(data, cache, 0, 3)

    for _ in range(3):
        once()
    pool = Pool(new_cache(data))
    gc.collect()
    torch.cuda.synchronize()
    before = pool.used, torch.cuda.memory_allocated()
    for _ in range(20):
        once()
    gc.collect()
    torch.cuda.synchronize()
    assert (pool.used, torch.cuda.memory_allocated()) == before


def test_scratch_does_not_grow_with_the_length():
    """Two segments of at most 8192 tokens: phi(k) and phi(q) in bfloat16, phi(q)^T H in float32, and little else."""
    import torch
    case = LLAMA.but(Hq=8, Hkv=2, sparse=64, D=64, Dv=64)
    segments = 2 * 8192 * case.Hq * 4 * (case.F + case.Dv)
    for T in (20_000, 60_000, 100_000):
        data = build(case.but(T=T))
        cache, tokens = new_cache(data), {n: tensor(data.stored[n]) for n in "qkv"}
        out, pool = torch.empty_like(tokens["q"]), Pool(cache)
        torch.cuda.synchronize()
        pool.reset()
        before = pool.used
        lola.attention(**tokens, cache=cache, out=out, **options(data))
        torch.cuda.synchronize()
        assert segments / 2 < pool.most - before < 1.1 * segments + 2 ** 22, T


def test_scratch_is_kept_for_the_next_call():
    """However much memory caches take: mapping it anew takes longer than many a call. Dropped caches are given back."""
    import torch
    data = build(LAYER.but(B=1, T=4096, Hq=8, Hkv=2))
    config = lola.Config(window=64, chunk=64, sparse=64)
    large = lola.Cache(config, batch=1200, heads=32, head_dim=128, feature_dim=128, device=DEVICE)
    cache, tokens = new_cache(data), {n: tensor(data.stored[n]) for n in "qkv"}
    pool = Pool(cache)
    assert large.nbytes > 2 ** 31 and pool.used > large.nbytes
    free = []
    for _ in range(3):
        pool.reset()
        before = pool.used
        lola.attention(**tokens, cache=cache, **options(data))
        torch.cuda.synchronize()
        free.append(pool.free)
        assert pool.free >= pool.most - before > 2 ** 20
    assert free[1] == free[2]
    del large
    gc.collect()
    torch.cuda.synchronize()
    assert pool.free <= 2 ** 31


def test_a_cache_that_does_not_fit():
    for batch in (2 ** 14, 2 ** 17):
        with pytest.raises(MemoryError, match=r"\d{9,}|\d+(\.\d+)? ?[GT]i?B"):
            lola.Cache(lola.Config(window=1024, chunk=64, sparse=8192), batch=batch, heads=64, head_dim=256, feature_dim=512,
                       dtype="float32", device="cuda")
    data = build(LAYER)                                      # nothing is left behind
    assert np.isfinite(run(data, new_cache(data)).astype(np.float32)).all()


def test_a_call_that_does_not_fit_leaves_the_cache_as_it_was():
    """Features of the cached pairs of 64 heads for each of 64 rows: far more than the cache itself, and than any device has."""
    case = Case(B=64, T=3, Hq=64, Hkv=1, D=4, Dv=4, F=1024, window=1, chunk=1, sparse=2 ** 15, sparse_per="kv_head", map="relu_w",
                score="self_recall")
    data = build(case)
    try:
        cache = new_cache(data)
    except MemoryError as error:                             # decoding's own memory comes with the cache
        assert any(c.isdigit() for c in str(error))
        return
    before = snapshot(cache)
    try:
        run(data, cache)
    except MemoryError as error:
        assert any(c.isdigit() for c in str(error))
        assert snapshot(cache) == before
    else:                                                    # it took no such memory: nothing is cached yet
        assert np.asarray(cache.tokens_seen).tolist() == [3] * 64


def test_tensors_freed_right_after_a_call_are_not_overwritten_early():
    """torch hands their memory out again at once; its stream's order protects the call."""
    import torch
    data = build(LAYER)
    expected = run(data, new_cache(data))
    long_wait(0.1)
    tensors = [tensor(data.stored[n]) for n in "qkv"]
    out = lola.attention(*tensors, cache=new_cache(data), **options(data))
    sizes = [x.shape for x in tensors]
    del tensors
    noise = [torch.full(s, 99.0, dtype=out.dtype, device="cuda") for s in sizes]
    torch.cuda.synchronize()
    assert_same_bits(array(out), expected)
    assert noise[0][0, 0, 0, 0] == 99


def test_a_dropped_cache_finishes_its_work():
    import torch
    data = build(LAYER)
    expected = run(data, new_cache(data))
    long_wait(0.1)
    out = lola.attention(*(tensor(data.stored[n]) for n in "qkv"), config=lola.Config(**data.case.config), **options(data))
    with contextlib.suppress(MemoryError):
        others = [new_cache(data) for _ in range(20)]
        assert len(others) == 20
    torch.cuda.synchronize()
    assert_same_bits(array(out), expected)


# ----------------------------------------------------------------------------------- time on the host

def test_an_eager_step_costs_the_host_little():
    """A guard with much room: the benchmark measures it."""
    import torch
    data = build(LAYER)
    step, cache = Step(data), new_cache(data)
    step.prefill(cache, 0, 300)
    for _ in range(20):
        step(cache)
    best = np.inf
    for _ in range(10):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(50):
            step(cache)
        best = min(best, (time.perf_counter() - begin) / 50)
    torch.cuda.synchronize()
    assert best < 200e-6
