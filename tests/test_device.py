"""Everything between a user and a device, on any machine: tests/c/fake_cuda.c stands in for CUDA (see there what it forbids).

Proved here: caches on devices do all that caches on the CPU do, with the same bits; arrays of other libraries are read and
written in place, on their streams; what a stream must wait for it waits for, and a recorded graph holds nothing that moves;
NumPy arrays are copied there and back, in pieces too; no failure leaves a cache changed, a fault leaves it unusable; decoding
allocates nothing and waits for nothing; nothing leaks.
"""

import copy
import gc
import os
import pathlib
import pickle
import subprocess
import sys
import threading

import lola
import numpy as np
import pytest

import fake_device
from fake_device import DEVICE_ERROR, MEMORY_ERROR, VALUE_ERROR, Allocating, Array, Exchanging, Interface, taken
from lola import _lola
from oracle import (DTYPES, MAPS, Case, assert_same_bits, build, contents, lola_map, new_cache, options, run, run_pieces)

KINDS = [Array, Allocating, Exchanging]
CASE = Case(T=60, D=24, Dv=40, F=36, mixing="gated")


@pytest.fixture(scope="module")
def module():
    return fake_device.build()


@pytest.fixture
def fake(module, monkeypatch):
    before = _lola.isa()
    _lola.set_isa("scalar")                     # which the fake's attention runs on
    monkeypatch.setitem(sys.modules, "lola._cuda", module)
    monkeypatch.setattr(lola, "_cuda", module, raising=False)
    assert lola.cuda_available()
    Array.fake, Array.ready = module, 0
    module.current_stream(0)
    gc.collect()
    live = module.live()
    yield module
    _lola.set_isa(before)
    gc.collect()
    assert module.illegal() == ""
    assert module.live() == live                # nothing leaks
    monkeypatch.undo()
    lola.cuda_available()                       # the table that is really there is found again


@pytest.fixture(params=KINDS, ids=lambda kind: kind.__name__)
def kind(request):
    if request.param is Exchanging:
        Exchanging.__dlpack_c_exchange_api__ = fake_device_module().exchange
    return request.param


def python(code):
    """A new interpreter's output; it sees the lola that this one does."""
    path = os.pathsep.join([str(pathlib.Path(lola.__file__).parent.parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path})
    assert not done.stderr, done.stderr
    return done.stdout


def fake_device_module():
    return sys.modules["lola._cuda"]


def device_cache(data, device="cuda", **more):
    return lola.Cache(lola.Config(**data.case.config), **{"batch": data.case.B, **data.case.sizes, "device": device, **more})


def give(kind, x, device=0, stream=None):
    return kind(x, device, stream) if isinstance(x, np.ndarray) else x


def call(data, cache, kind=Allocating, lo=0, hi=None, **more):
    """lola.attention on device arrays; the result as NumPy array."""
    part = data.at(t=slice(lo, hi))
    arrays = {n: part.stored[n] for n in "qkv"} | {n: x for n, x in options(part).items() if isinstance(x, np.ndarray)}
    given = {n: give(kind, x) for n, x in arrays.items()}
    rest = {n: x for n, x in options(part).items() if n not in given}
    out = lola.attention(**given, **rest, cache=cache, **more)
    return out.numpy() if isinstance(out, Array) else taken(out, sys.modules["lola._cuda"])


def assert_same(cache, plain):
    """A cache on a device and one on the CPU hold the same."""
    here = cache.to("cpu")
    for name, x in plain.buffers().items():
        np.testing.assert_array_equal(here.buffers()[name].view(np.uint8), x.view(np.uint8), err_msg=name)
    a, b = contents(here, plain.heads), contents(plain, plain.heads)
    for name, x in b.items():
        np.testing.assert_array_equal(a[name], x)


# ------------------------------------------------------------------------------------- is there any

def test_not_built_says_how_to_get_it():
    code = ("import sys; sys.modules['lola._cuda'] = None\nimport lola, numpy as np\n"
            "print(lola.cuda_available(), lola.cuda_unavailable_reason())\n"
            "try: lola.Cache(lola.Config(), heads=1, head_dim=4, feature_dim=4, device='cuda')\n"
            "except RuntimeError as error: print(error)")
    lines = python(code).splitlines()
    assert lines[0].startswith("False this build of lola has no CUDA part: ") and "LOLA_CUDA=1" in lines[0]
    assert lines[1].startswith("device 'cuda' is not available: this build")


def test_arrays_on_a_device_say_why_they_are_refused():
    code = ("import sys; sys.modules['lola._cuda'] = None\nimport lola\n"
            "class Tensor:\n    __dlpack_device__ = lambda self: (2, 1)\n    __dlpack__ = None\n"
            "try: lola.attention(Tensor(), Tensor(), Tensor(), feature_map=lola.EluPlusOne())\n"
            "except RuntimeError as error: print(error)")
    assert python(code).startswith("q lies on cuda:1, but this build of lola has no CUDA part: ")


def test_reasons_of_the_driver(fake):
    fake.set("devices", 0)
    try:
        assert not lola.cuda_available() and lola.cuda_unavailable_reason() == "no NVIDIA driver was found"
        with pytest.raises(RuntimeError, match="'cuda' is not available: no NVIDIA driver"):
            lola.Cache(lola.Config(), heads=1, head_dim=4, feature_dim=4, device="cuda")
    finally:
        fake.set("devices", 2)
    assert lola.cuda_available() and lola.cuda_unavailable_reason() is None


def test_import_and_cpu_work_load_nothing():
    code = ("import sys, lola, numpy as np\nq = np.ones((1, 9, 1, 4), 'f')\n"
            "lola.attention(q, q, q, feature_map=lola.EluPlusOne())\nlola.Cache(lola.Config(), heads=1, head_dim=4, feature_dim=4)\n"
            "print('lola._cuda' in sys.modules)")
    assert python(code) == "False\n"


def test_names_of_devices(fake):
    class Torchlike:
        type, index = "cuda", 1

    sizes = dict(heads=1, head_dim=4, feature_dim=4)
    for name, full in [("cpu", "cpu"), (None, "cpu"), ("cuda", "cuda:0"), ("cuda:1", "cuda:1"), (Torchlike(), "cuda:1")]:
        assert lola.Cache(lola.Config(), device=name, **sizes).device == full
    fake.set("current", 1)
    try:
        assert lola.Cache(lola.Config(), device="cuda", **sizes).device == "cuda:1"
    finally:
        fake.set("current", 0)
    for name in ("cuda:2", "cuda:-1", "cuda:", "cuda:x", "cudaa", "tpu", "cuda:99999999999999999999"):
        with pytest.raises(ValueError, match="device must be"):
            lola.Cache(lola.Config(), device=name, **sizes)
    with pytest.raises(TypeError, match="device must be"):
        lola.Cache(lola.Config(), device=3.5, **sizes)


# ------------------------------------------------------------------------------------- attention

CASES = [CASE, CASE.but(map="given"), CASE.but(sparse=0), CASE.but(score="external", sparse_per="kv_head"), Case(mixing="cache_only", chunk=1),
         Case(map="elu_plus_one", mixing="lolcats", dtype="float16"), Case(map="relu_w", dtype="bfloat16", score="random")]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.map}-{case.score}-{case.mixing}-{case.sparse}")
def test_attention_is_that_of_the_cpu(fake, kind, case):
    data = build(case)
    plain, cache = new_cache(data), device_cache(data)
    expected = run_pieces(data, plain, [7, 20, 21, 22, 40])
    cuts = [0, 7, 20, 21, 22, 40, case.T]
    got = [call(data, cache, kind, lo, hi) for lo, hi in zip(cuts, cuts[1:])]
    assert_same_bits(np.concatenate(got, axis=1), expected)
    assert_same(cache, plain)
    assert_same_bits(call(data, None, kind, config=lola.Config(**case.config)), run(data, new_cache(data)))


def test_results_are_of_the_callers_library(fake, kind):
    data = build(CASE)
    arrays = [kind(data.stored[n]) for n in "qkv"]
    out = lola.attention(*arrays, config=lola.Config(**CASE.config), **options(data))
    if kind is Array:
        assert type(out) is _lola.Array and out.shape == (2, 60, 4, 40) and out.dtype == "float32" and out.device == "cuda:0"
    else:
        assert out is arrays[0].made


def test_the_cuda_array_interface(fake):
    data = build(CASE)
    plain = new_cache(data)
    arrays = [Array(data.stored[n]) for n in "qkv"]
    out = lola.attention(*map(Interface, arrays), cache=device_cache(data), **options(data))
    assert_same_bits(out.numpy(), run(data, plain))
    interface = out.__cuda_array_interface__
    assert interface["shape"] == (2, 60, 4, 40) and interface["typestr"] == "<f4" and interface["version"] == 3
    assert interface["stream"] == 1 and interface["data"][1] is False
    # Data that are written on another stream, of which the interface tells.
    other = fake.stream(0)
    late = [Array(data.stored[n], stream=other) for n in "qkv"]
    out = lola.attention(*(Interface(x, other) for x in late), cache=device_cache(data), **options(data))
    assert_same_bits(out.numpy(), run(data, new_cache(data)))


def test_strides_and_out(fake, kind):
    data = build(CASE)
    B, T, H, Dv = 2, 60, 4, 40
    expected = run(data, new_cache(data))
    room = kind(np.zeros((B, H, T, Dv), np.float32))
    out = room.view((B, T, H, Dv), (H * T * Dv, Dv, T * Dv, 1))
    turned = {n: kind(np.ascontiguousarray(data.stored[n].transpose(0, 2, 1, 3))) for n in "qkv"}
    views = []
    for x in turned.values():
        b, h, t, n = x.shape
        views.append(x.view((b, t, h, n), (h * t * n, n, t * n, 1)))
    assert lola.attention(*views, cache=device_cache(data), out=out, **options(data)) is out
    assert_same_bits(room.numpy().transpose(0, 2, 1, 3), expected)
    with pytest.raises(ValueError, match="out must not overlap q"):
        q = kind(np.zeros((2, 60, 4, 40), np.float32))
        k = kind(data.stored["k"])
        wide = build(CASE.but(D=40))
        lola.attention(q, kind(wide.stored["k"]), kind(wide.stored["v"]), out=q, feature_map=lola_map(wide), gate=data.gate)
    with pytest.raises(ValueError, match="last axis of q must be contiguous"):
        lola.attention(views[0].view((2, 60, 4, 24), (1, 1, 1, 2)), *views[1:], cache=device_cache(data), **options(data))


def test_share(fake, kind):
    data = build(CASE)
    _, share = lola.stats.linear_share(*(data.stored[n] for n in "qkv"), cache=new_cache(data), **options(data))
    arrays = [kind(data.stored[n]) for n in "qkv"]
    out, there = lola.stats.linear_share(*arrays, cache=device_cache(data), **options(data))
    assert_same_bits(there.numpy() if not isinstance(there, _lola.Array) else taken(there, fake), share)


@pytest.mark.parametrize("index", ["host", "int64", "int32", "mixed"])
def test_rows_of_different_length(fake, index):
    data = build(CASE.but(B=3))
    starts, stops = np.array([3, 0, 60]), np.array([60, 41, 60])
    expected = run(data, plain := new_cache(data), starts=starts, stops=stops)
    as_given = {"host": lambda x: x.tolist(), "int64": Array, "int32": lambda x: Array(x.astype(np.int32)), "mixed": Array}[index]
    cache = device_cache(data)
    got = call(data, cache, starts=starts.tolist() if index == "mixed" else as_given(starts), stops=as_given(stops))
    assert_same_bits(got, expected)
    assert_same(cache, plain)
    # One packed row.
    row = data.at(rows=[0])
    bounds = np.array([0, 25, 25, 60])
    expected = run(row, plain := new_cache(row, batch=3), cu_seqlens=bounds)
    got = call(row, cache := device_cache(row, batch=3), cu_seqlens=bounds if index == "mixed" else as_given(bounds))
    assert_same_bits(got, expected)
    assert_same(cache, plain)


def test_index_arrays_are_checked(fake):
    data = build(CASE)
    cache = device_cache(data)
    for wrong, error, what in [(Array(np.ones(2, np.float32)), TypeError, "int32 or int64"), (Array(np.ones(3, int)), ValueError, "shape"),
                               (Array(np.ones(4, int)).view((2,), (2,)), ValueError, "contiguous"),
                               (Array(np.ones(2, int), 1), ValueError, "cuda:0"), ([0, 61], ValueError, "stops")]:
        with pytest.raises(error, match=what):
            call(data, cache, stops=wrong)
    with pytest.raises(ValueError, match="starts and stops"):
        call(data, cache, starts=Array(np.array([9, 9])), stops=Array(np.array([8, 60])), check=True)
    assert cache.tokens_seen.tolist() == [0, 0] and cache._terms is None
    call(data, cache, starts=Array(np.array([-9, 90])), stops=Array(np.array([800, 60])))
    assert cache.tokens_seen.tolist() == [60, 0]


def test_all_lies_in_one_place(fake):
    data = build(CASE)
    host, there, other = ([f(data.stored[n]) for n in "qkv"] for f in (np.asarray, Array, lambda x: Array(x, 1)))
    cache, plain = device_cache(data), new_cache(data)
    more = options(data)
    with pytest.raises(ValueError, match="k must lie on cuda:0 as q does, got one on cuda:1"):
        lola.attention(there[0], other[1], there[2], **more)
    with pytest.raises(ValueError, match="v must lie on cuda:0"):
        lola.attention(*there[:2], host[2], **more)
    with pytest.raises(ValueError, match="q must lie on cpu as the cache does, got one on cuda:0"):
        lola.attention(*there, cache=plain, **more)
    with pytest.raises(ValueError, match="q must lie on cuda:0 as the cache does"):
        lola.attention(*other, cache=cache, **more)
    with pytest.raises(ValueError, match="device must be None or 'cuda:0'"):
        lola.attention(*there, device="cpu", **more)
    with pytest.raises(ValueError, match="device must be None or 'cuda:0'"):
        lola.attention(*there, device="cuda:1", **more)
    with pytest.raises(ValueError, match="device must be None or 'cpu'"):
        lola.attention(*host, cache=plain, device="cuda", **more)
    with pytest.raises(ValueError, match="stream must be None"):
        lola.attention(*host, stream=3, **more)
    with pytest.raises(TypeError, match="stream"):
        lola.attention(*there, stream="x", **more)
    with pytest.raises(ValueError, match="k must lie on cpu"):
        lola.attention(host[0], there[1], host[2], cache=cache, **more)
    torch = pytest.importorskip("torch")
    with pytest.raises(ValueError, match="only NumPy arrays are copied"):
        lola.attention(*map(torch.from_numpy, host), cache=cache, **more)
    assert lola.attention(*other, device="cuda", **more).device == "cuda:1"


def test_gates_on_the_device(fake):
    data = build(CASE)
    expected = run_pieces(data, plain := new_cache(data), [30])
    cache, gate = device_cache(data), Array(data.gate)
    given = {**options(data), "gate": gate}
    arrays = lambda lo, hi: [Array(data.stored[n][:, lo:hi]) for n in "qkv"]
    first = lola.attention(*arrays(0, 30), cache=cache, **given)
    del given["gate"], gate                     # the cache has its own copy
    second = lola.attention(*arrays(30, 60), cache=cache, **given, gate=data.gate)
    assert_same_bits(np.concatenate([first.numpy(), second.numpy()], axis=1), expected)
    with pytest.raises(ValueError, match="gate must be the same"):
        lola.attention(*arrays(0, 1), cache=cache, **given, gate=data.gate / 2)
    with pytest.raises(ValueError, match="gate must be the same"):
        lola.attention(*arrays(0, 1), cache=cache, **given, gate=Array(data.gate / 2), check=True)
    with pytest.raises(ValueError, match="between 0 and 1"):
        lola.attention(*arrays(0, 1), **given, gate=Array(data.gate * 0), check=True)
    with pytest.raises(TypeError, match="gate must be float32"):
        lola.attention(*arrays(0, 1), cache=cache, **given, gate=Array(data.gate.astype(np.float64)))
    assert_same(cache, plain)
    moved = cache.copy().to("cpu")
    np.testing.assert_array_equal(moved._terms[-1], data.gate)


@pytest.mark.parametrize("name", ["q", "k", "v", "q_features", "k_features", "scores"])
def test_check_finds_what_is_not_finite(fake, name):
    data = build(CASE.but(map="given", score="external"))
    cache = device_cache(data)
    call(data, cache, hi=20)
    before = {n: x.numpy() for n, x in cache.buffers().items()}
    data.stored[name] = data.stored[name].copy()
    data.stored[name][1, 33] = -1 if "features" in name else np.nan
    with pytest.raises(ValueError, match=f"{name} must be finite"):
        call(data, cache, lo=20, check=True)
    for n, x in cache.buffers().items():
        np.testing.assert_array_equal(x.numpy(), before[n])


# ------------------------------------------------------------------------------------- streams

def test_the_librarys_current_stream_is_taken(fake):
    """Inputs are written there, and the result is ready there."""
    data = build(CASE)
    expected = run(data, new_cache(data))
    Exchanging.__dlpack_c_exchange_api__ = fake.exchange
    mine = fake.stream(0)
    Array.ready = mine
    fake.current_stream(mine)
    cache = device_cache(data)
    assert_same_bits(call(data, cache, Exchanging), expected)
    assert (cache.tokens_seen == 60).all()
    # Through __dlpack__ the library is asked for the default stream, and waits there.
    arrays = [Array(data.stored[n]) for n in "qkv"]
    out = lola.attention(*arrays, cache=device_cache(data), **options(data))
    assert arrays[0].asked == [1]
    assert_same_bits(taken(out, fake, fake.stream(0)), expected)


def test_a_stream_that_is_named(fake):
    data = build(CASE)
    expected = run(data, new_cache(data))
    mine = fake.stream(0)

    class Torch:
        cuda_stream = mine

    class Cupy:
        ptr = mine

    class Protocol:
        def __cuda_stream__(self):
            return 0, mine

    for stream in (mine, Torch(), Cupy(), Protocol()):
        arrays = [Allocating(data.stored[n]) for n in "qkv"]    # written on the default stream
        out = lola.attention(*arrays, cache=device_cache(data), stream=stream, **options(data))
        assert_same_bits(out.numpy(mine), expected)


def test_a_cache_on_another_stream_waits_for_its_last_use(fake):
    data = build(CASE)
    expected = run_pieces(data, plain := new_cache(data), [20, 40])
    cache, streams = device_cache(data), [fake.stream(0) for _ in range(3)]
    outs = []
    for i, stream in enumerate(streams):
        arrays = [Allocating(data.stored[n][:, 20 * i:20 * i + 20]) for n in "qkv"]
        outs.append(lola.attention(*arrays, cache=cache, stream=stream, **options(data)))
    got = [out.numpy(stream) for out, stream in reversed(list(zip(outs, streams)))]
    assert_same_bits(np.concatenate(got[::-1], axis=1), expected)
    assert_same(cache, plain)


def test_decoding_allocates_nothing_and_waits_for_nothing(fake):
    data = build(CASE)
    cache = device_cache(data)
    call(data, cache, hi=20)
    Exchanging.__dlpack_c_exchange_api__ = fake.exchange
    names = ["allocate", "allocate_host", "synchronize", "copy", "event_create", "zero", "begin_rows"]
    more = {**options(data), "gate": Exchanging(data.gate)}
    lola.attention(*(Exchanging(data.stored[n][:, 20:21]) for n in "qkv"), cache=cache, **more)
    for t in range(21, 60):
        arrays = [Exchanging(data.stored[n][:, t:t + 1]) for n in "qkv"]
        out = Exchanging(np.zeros((2, 1, 4, 40), np.float32))
        before = {n: fake.calls(n) for n in names}
        lola.attention(*arrays, cache=cache, out=out, **more)
        assert {n: fake.calls(n) for n in names} == before
    assert_same_bits(out.numpy(), run_pieces(data, new_cache(data), range(20, 60))[:, 59:])


@pytest.mark.parametrize("given", ["map", "features"])
def test_a_graph_is_recorded_and_replayed(fake, given):
    """Steps at fixed addresses; the counters are the device's own."""
    data = build(CASE.but(map="given") if given == "features" else CASE)
    names = [*"qkv", *(["q_features", "k_features"] if given == "features" else [])]
    expected = run_pieces(data, plain := new_cache(data), range(20, 60))
    cache, mine = device_cache(data), fake.stream(0)
    gate, rows = Array(data.gate), Array(np.zeros(2, int))
    call(data, cache, hi=20)
    arrays = {n: Allocating(data.stored[n][:, :1]) for n in names}
    out = Allocating(np.zeros((2, 1, 4, 40), np.float32))
    more = {**options(data), **arrays, "gate": gate}
    cache.sync()
    fake.take(0, out.address, 1, 0)
    fake.capture(0, mine)
    lola.attention(**more, cache=cache, out=out, starts=rows, stream=mine)
    for what in (lambda: lola.attention(**more, cache=cache, out=out, starts=[0, 0], stream=mine),
                 lambda: lola.attention(**more, cache=cache, out=out, check=True, stream=mine)):
        with pytest.raises(RuntimeError, match="records a graph"):
            what()
    graph = fake.captured(0, mine)
    for t in range(20, 60):
        for n in names:
            fake.put(0, arrays[n].address, data.stored[n][:, t:t + 1].tobytes(), 0)
        fake.replay(0, graph, 0)
        assert_same_bits(out.numpy(0), expected[:, t:t + 1])
        assert cache.tokens_seen.tolist() == [t + 1] * 2
    assert_same(cache, plain)
    assert fake.illegal() == ""


def test_what_cannot_be_recorded_says_so(fake):
    data = build(CASE)
    cache, mine = device_cache(data), fake.stream(0)
    Exchanging.__dlpack_c_exchange_api__ = fake.exchange
    call(data, cache, Exchanging, hi=20)
    fake.current_stream(mine)
    fake.capture(0, mine)
    for what in (lambda: cache.folded, lambda: cache.copy(), lambda: cache.reset(), lambda: cache.crop(20), lambda: cache.sync(),
                 lambda: cache.sparse_positions(0, 0), lambda: cache.select_([0, 1]), lambda: cache.to("cpu"),
                 lambda: run(data, cache, 20)):
        with pytest.raises(RuntimeError, match="records a graph"):
            what()
    fake.captured(0, mine)
    assert cache.tokens_seen.tolist() == [20, 20]


# ------------------------------------------------------------------------------------- the cache

@pytest.mark.parametrize("map", ["hedgehog", "given"])
def test_rows_and_crop_are_those_of_the_cpu(fake, map):
    data = build(CASE.but(B=3, map=map, score="external"))
    plain, cache = new_cache(data), device_cache(data)
    run(data, plain, 0, 41), call(data, cache, hi=41)
    for change in (lambda c: c.copy(), lambda c: c.select([2, 0]), lambda c: c.select([1, 1, 0, 2]), lambda c: c.repeat(2),
                   lambda c: c.select_([2, 2, 0]), lambda c: c.select([]), lambda c: c.select(range(0, 3, 2)),
                   lambda c: copy.deepcopy(c), lambda c: pickle.loads(pickle.dumps(c))):
        there, here = change(cache), change(plain)
        assert there.device == "cuda:0" and there.batch == here.batch
        assert_same(there, here)
        if there.batch == 3:
            assert_same_bits(call(data, there.copy(), lo=41), run(data, here.copy(), 41))
    for c in (plain, cache):
        c.reset([1, -1])
    assert_same(cache, plain)
    for c in (plain, cache):
        with pytest.raises(ValueError, match="start of row 0's current chunk"):
            c.crop(3)
        c.crop(40)
    assert_same(cache, plain)
    for c in (plain, cache):
        c.reset()
    assert_same(cache, plain)
    assert_same_bits(call(data, cache), run(data, plain))
    cache._check()


@pytest.mark.parametrize("map", ["hedgehog", "given"])
@pytest.mark.parametrize("rows", [None, [0, 1, 2], [0, -1], [1, 2], [2, 1, 0]], ids=str)
def test_a_reset_queues_little(fake, map, rows):
    """Zeros an allocation, of which a caller's own features have the second, and the counters; of some rows zeros a buffer."""
    data = build(CASE.but(B=3, map=map, score="external"))
    cache = device_cache(data)
    call(data, cache, hi=41)
    before = {n: x.copy() for n, x in cache.to("cpu").buffers().items()}
    names = ["zero", "begin_rows", "copy", "allocate", "allocate_host", "event_create", "event_wait", "synchronize"]
    calls = [fake.calls(n) for n in names]
    cache.reset(rows)
    zeros, begun, *others = (fake.calls(n) - c for n, c in zip(names, calls))
    runs = {"None": 1, "[0, 1, 2]": 1, "[0, -1]": 2, "[1, 2]": 1, "[2, 1, 0]": 3}[str(rows)]
    pieces = len(before) if rows and rows != [0, 1, 2] else 2 if map == "given" else 1
    assert (zeros, begun) == (runs * pieces, runs) and not any(others)
    emptied = range(3) if rows is None else [row % 3 for row in rows]
    new = {"chunks": lambda row: -1, "row_ids": lambda row: row}
    for name, x in cache.to("cpu").buffers().items():
        for row in range(3):
            expected = before[name][row] if row not in emptied else np.full_like(x[row], new.get(name, lambda row: 0)(row))
            np.testing.assert_array_equal(x[row], expected, err_msg=name)
    assert any(x[row].any() for n, x in before.items() for row in emptied if n == "hidden")
    if len(emptied) == 3:
        assert_same_bits(call(data, cache), run(data, new_cache(data)))
    cache._check()


@pytest.mark.parametrize("case", [CASE, CASE.but(map="given", dtype="bfloat16"), CASE.but(B=0)], ids=["map", "given", "no rows"])
def test_a_cache_moves_and_continues(fake, case, tmp_path):
    data = build(case)
    expected = run_pieces(data, plain := new_cache(data), [13, 30, 45])
    cache, outs = new_cache(data), []
    for lo, hi, where in [(0, 13, "cuda"), (13, 30, "cpu"), (30, 45, "cuda:1"), (45, 60, "cuda:0")]:
        cache = cache.to(where)
        assert cache.to(where) is cache
        part = data.at(t=slice(lo, hi))
        given = {n: part.stored[n] for n in "qkv"} | options(part)
        if where != "cpu":
            given = {n: give(lambda x, d, s: Allocating(x, cache.device == "cuda:1"), x) for n, x in given.items()}
        outs.append(lola.attention(cache=cache, **given))
    if case.B:
        outs = [x if isinstance(x, np.ndarray) else x.numpy() for x in outs]
        assert_same_bits(np.concatenate(outs, axis=1), expected)
    assert_same(cache, plain)
    cache.save(tmp_path / "there")
    plain.save(tmp_path / "here")
    assert (tmp_path / "there").read_bytes() == (tmp_path / "here").read_bytes()
    assert lola.Cache.load(tmp_path / "there").device == "cpu"
    assert_same(lola.Cache.load(tmp_path / "there", device="cuda:1"), plain)


def test_what_a_cache_says(fake):
    data = build(CASE)
    plain, cache = new_cache(data), device_cache(data)
    run(data, plain), call(data, cache)
    for row in range(2):
        np.testing.assert_array_equal(cache.window_positions(row), plain.window_positions(row))
        for head in range(4):
            np.testing.assert_array_equal(cache.sparse_positions(row, head), plain.sparse_positions(row, head))
            np.testing.assert_array_equal(cache.sparse_scores(row, head), plain.sparse_scores(row, head))
    np.testing.assert_array_equal(cache.folded, plain.folded)
    assert cache.nbytes == plain.nbytes and cache.memory() == plain.memory()
    assert "device='cuda:0'" in repr(cache) and "tokens_seen=[60, 60]" in repr(cache) and "device" not in repr(plain)
    assert cache.hidden.shape == (2, 4, 36, 40) and cache.hidden.__dlpack_device__() == (2, 0)
    for name in ("hidden", "normalizer"):
        view = getattr(cache, name)
        assert_same_bits(taken(view, fake, fake.stream(0)), getattr(plain, name))
        assert_same_bits(view.numpy(), getattr(plain, name))
        assert view.__cuda_array_interface__["data"] == (fake.unship(view.__dlpack__(max_version=(1, 0)))[0], True)
        assert fake.unship(view.__dlpack__(max_version=(1, 0)))[-1] == 1       # read only
    buffers = cache.buffers()
    assert list(buffers) == list(plain.buffers()) and sum(x.nbytes for x in buffers.values()) == cache.nbytes
    assert not buffers["hidden"].__cuda_array_interface__["data"][1]
    assert buffers["window_keys"].numpy().dtype == plain.buffers()["window_keys"].dtype
    cache.sync()
    view = cache.hidden
    del cache, buffers
    gc.collect()
    assert_same_bits(view.numpy(), plain.hidden)    # it keeps the memory


def test_tokens_are_counted_without_waiting(fake):
    data = build(CASE)
    cache = device_cache(data)

    def count(right, cache=cache):
        before = fake.calls("synchronize")
        seen = cache.tokens_seen.tolist()
        waited = fake.calls("synchronize") - before
        assert seen == right == [cache._window(row)[1] for row in range(len(right))]
        return waited

    assert count([0, 0]) == 0
    call(data, cache, hi=20)
    assert count([20, 20]) == 0
    call(data, cache, lo=20, hi=43, starts=[3, 0], stops=[23, 22])
    assert count([40, 42]) == 0
    cache.crop(41)
    assert count([40, 41]) == 0
    cache.reset([1])
    assert count([40, 0]) == 0
    call(data, cache, lo=40, hi=43, stops=Array(np.array([2, 3])))
    assert count([42, 3]) == 1 and count([42, 3]) == 0
    cache.select_([1, 0])
    assert count([3, 42]) == 0
    assert count([3, 42], cache.copy()) == 0 and count([42], cache.select([1])) == 0 and count([3, 3, 42, 42], cache.repeat(2)) == 0
    assert count([3, 42], cache.to("cpu").to("cuda")) == 0
    call(data, cache, lo=43, hi=44)
    assert count([4, 43]) == 0
    run(data, cache, 43, 44)                                                                # NumPy
    assert count([5, 44]) == 0
    with pytest.raises(ValueError):
        call(data, cache, stops=[0, 99])
    assert count([5, 44]) == 0
    call(data, cache, lo=40, hi=43, stops=Array(np.array([0, 1])))
    assert count([5, 45], cache.copy()) == 1            # what the host does not know, it does not pass on


def test_terms_bind_on_a_device_too(fake):
    data = build(CASE)
    cache = device_cache(data)
    call(data, cache, hi=30)
    with pytest.raises(ValueError, match="feature_map must be the same"):
        w = np.ones((4, 24, 18), np.float32)
        lola.attention(*(Array(data.stored[n]) for n in "qkv"), cache=cache, feature_map=lola.Hedgehog(w, w), gate=data.gate)
    same = lola.Hedgehog(data.weights["w_q"], data.weights["w_k"])
    expected = run_pieces(data, new_cache(data), [30])[:, 30:]
    arrays = [Array(data.stored[n][:, 30:]) for n in "qkv"]
    out = lola.attention(*arrays, cache=cache, feature_map=same, gate=data.gate)
    del same
    assert_same_bits(out.numpy(), expected)


def test_attention_scores_run_on_the_cpu_alone(fake):
    config = lola.Config(score="attention")
    sizes = dict(heads=1, head_dim=4, feature_dim=4)
    with pytest.raises(ValueError, match="CPU only"):
        lola.Cache(config, device="cuda", **sizes)
    with pytest.raises(ValueError, match="CPU only"):
        lola.Cache(config, **sizes).to("cuda")
    x = Array(np.ones((1, 3, 1, 4), np.float32))
    with pytest.raises(ValueError, match="CPU only"):
        lola.attention(x, x, x, config=config, feature_map=lola.EluPlusOne())


# ------------------------------------------------------------------------------------- NumPy arrays

@pytest.mark.parametrize("case", [*CASES, CASE.but(B=0), CASE.but(T=3)], ids=lambda case: f"{case.map}-{case.score}-{case.B}-{case.T}")
def test_numpy_there_and_back(fake, case):
    data = build(case)
    cuts = [c for c in (7, 20, 21, 40) if c < case.T]
    expected = run_pieces(data, plain := new_cache(data), cuts)
    cache = device_cache(data)
    got = run_pieces(data, cache, cuts)
    assert isinstance(got, np.ndarray) and got.dtype == DTYPES[case.dtype]
    assert_same_bits(got, expected)
    assert_same(cache, plain)
    arrays = [data.stored[n] for n in "qkv"]
    once = lola.attention(*arrays, config=lola.Config(**case.config), device="cuda:1", **options(data))
    assert_same_bits(once, run(data, new_cache(data)))


@pytest.mark.parametrize("rows", ["all", "padded", "packed"])
def test_long_numpy_arrays_go_in_pieces(fake, rows):
    """Strided ones too; cut anywhere, so what the pieces hold equals the whole by invariant 1."""
    T, heads = 3000, 16 if rows != "packed" else 32
    case = Case(B=3 if rows != "packed" else 1, T=T, Hq=heads, Hkv=heads // 2, D=64, Dv=64, window=16, chunk=16, sparse=4, map="elu_plus_one",
                mixing="gated", score="external")
    data = build(case)
    more, batch = {}, case.B
    if rows == "padded":
        more = dict(starts=[5, 0, 2990], stops=[3000, 1200, 2990])
    if rows == "packed":
        more, batch = dict(cu_seqlens=np.array([0, 100, 100, 2500, 3000])), 4
    stretch = lambda x: np.ascontiguousarray(x.transpose(0, 2, 1, *range(3, x.ndim))).transpose(0, 2, 1, *range(3, x.ndim))
    for name in ("q", "k", "v", "scores"):
        data.stored[name] = stretch(data.stored[name])
    plain, cache = new_cache(data, batch), device_cache(data, batch=batch)
    expected = run(data, plain, **more)
    before = fake.calls("attention")
    out = stretch(np.full((case.B, T, heads, 64), np.nan, np.float32))
    assert run(data, cache, out=out, **more) is out
    assert fake.calls("attention") - before >= 3
    np.testing.assert_allclose(out, expected, atol=2e-5)
    assert_same(cache, plain)
    assert_same_bits(run(data, device_cache(data, batch=batch), check=True, **more), out)
    data.stored["v"][-1, 2500, 3] = np.nan
    again = device_cache(data, batch=batch)
    if rows != "padded":                        # where the last row is idle
        with pytest.raises(ValueError, match="v must be finite"):
            run(data, again, check=True, **more)
        assert not again.tokens_seen.any() and again._terms is None


WIDE = Case(B=1, Hq=16, Hkv=16, D=256, Dv=256, F=4, window=16, chunk=16, sparse=4, mixing="gated")   # 64 KB a token


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("T", [1, 2, 15, 65, 639, 640, 641, 2600])
def test_numpy_arrays_of_any_length(fake, threads, T, count):
    """About the ends of blocks and pieces; results in memory that nobody has written yet, in the caller's, and in one whose
    heads do not lie together."""
    threads(count)
    data = build(WIDE.but(T=T))
    expected = run(data, plain := new_cache(data))
    cache = device_cache(data)
    before = fake.calls("decode")
    got = run(data, cache)
    assert fake.calls("decode") - before == (T == 1)          # a token that is left over goes the way of all others
    np.testing.assert_allclose(got, expected, atol=2e-5)
    assert_same(cache, plain)
    given = np.full_like(got, np.nan)
    assert_same_bits(run(data, device_cache(data), out=given), got)
    room = np.full((1, 18, T + 2, 260), 7, np.float32)
    out = room[:, 1:-1, 1:-1, 2:-2].transpose(0, 2, 1, 3)
    for name in "qkv":
        data.stored[name] = np.repeat(data.stored[name], 2, axis=1)[:, ::2]
    assert_same_bits(np.ascontiguousarray(run(data, device_cache(data), out=out)), got)
    out[...] = 7
    assert (room == 7).all()


def test_numpy_arrays_without_tokens(fake):
    data = build(WIDE.but(T=20))
    cache = device_cache(data)
    first = run(data, cache, 0, 13)
    before = cache.to("cpu")
    for rows in ({}, {"check": True}):
        assert run(data, cache, 13, 13, **rows).shape == (1, 0, 16, 256)
    assert_same(cache, before)
    expected = run_pieces(data, new_cache(data), [13])
    np.testing.assert_allclose(np.concatenate([first, run(data, cache, 13)], 1), expected, atol=2e-5)


@pytest.mark.parametrize("T", [1111, 3300])
def test_what_goes_back_may_be_late(fake, T):
    """No piece comes in where an earlier one has not gone out, and none goes out behind the work on a later one."""
    data = build(WIDE.but(T=T))
    expected = run(data, new_cache(data))
    fake.set("late", 100)
    fake.set("waits", 0)
    try:
        np.testing.assert_allclose(run(data, device_cache(data)), expected, atol=2e-5)
    finally:
        fake.set("late", 0)
    assert fake.calls("waits") <= 1             # the first copy waits for what came before and for its piece, others for that


def test_memory_on_the_way_does_not_grow_with_length(fake):
    """Pieces on the device and page-locked blocks are used again, within calls and from call to call."""
    T = 16_000                                      # 1 GB there and back
    data = build(WIDE.but(T=1000))
    cache = device_cache(data)
    run(data, cache)
    before = fake.calls("allocate_host")
    long = [np.broadcast_to(data.stored[n][:, :1], (1, T, 16, 256)) for n in "qkv"]
    fake.set("limit", fake.live() + (100 << 20))
    try:
        assert lola.attention(*long, cache=cache, **options(data)).shape == (1, T, 16, 256)
    finally:
        fake.set("limit", -1)
    assert fake.calls("allocate_host") == before


def test_threads_may_call_at_once(fake, threads):
    """One device's staging and one pool between callers of a device and of the CPU."""
    threads(3)
    data = build(WIDE.but(T=700))
    expected = run(data, new_cache(data))
    there = run(data, device_cache(data))
    results = {}

    def work(i):
        results[i] = [run(data, device_cache(data) if i < 3 else new_cache(data)) for _ in range(3)]

    callers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    for i in range(4):
        for got in results[i]:
            assert_same_bits(got, there if i < 3 else expected)


@pytest.mark.parametrize("name, at", [("attention", 1), ("attention", 3), ("copy", 9), ("copy", 25), ("allocate", 1), ("allocate", 2),
                                      ("event_wait", 4), ("event_wait", 9), ("event_record", 7), ("event_query", 1), ("event_query", 60)])
def test_a_failure_among_the_pieces_leaves_the_cache(fake, name, at):
    case = Case(B=2, T=4000, Hq=16, Hkv=8, D=64, Dv=64, window=16, chunk=16, sparse=4, map="elu_plus_one")
    data = build(case)
    cache = device_cache(data)
    run(data, cache, 0, 300)
    plain = cache.to("cpu")
    fake.fail(name, MEMORY_ERROR, at)
    with pytest.raises(MemoryError):
        run(data, cache, 300)
    fake.fail(name, 0, 0)
    assert_same(cache, plain)
    expected = run(data, plain, 300)
    np.testing.assert_allclose(run(data, cache, 300), expected, atol=2e-5)


# ------------------------------------------------------------------------------------- kernels

def test_large_arrays_of_the_kernels(fake, threads, rng):
    """Of many blocks each way; one that is written in place."""
    threads(3)
    x, m = rng.normal(size=(1, 3000, 4, 64)).astype(np.float32), lola.EluPlusOne()
    fk = lola.kernels.features(x, m, "k", 16, device="cuda")
    assert_same_bits(fk, lola.kernels.features(x, m, "k", 16))
    H, s = rng.random((1, 64, 64, 600), np.float32), rng.random((1, 64, 64), np.float32)
    few, v = np.ascontiguousarray(x[:, :3]).repeat(16, 2) ** 2, rng.normal(size=(1, 3, 64, 600)).astype(np.float32)
    H2, s2 = H.copy(), s.copy()
    lola.kernels.fold(few, v, H, s, device="cuda")
    lola.kernels.fold(few, v, H2, s2)
    assert_same_bits(H, H2)
    assert_same_bits(s, s2)


def steps(data, give, device=None):
    """Each step on arrays as `give` makes them; the results in order."""
    rng = np.random.default_rng(0)
    there = {} if device is None else {"device": device}
    m = lola_map(data)
    k, v, q = (give(data.stored[n]) for n in "kvq")
    fk, fq = lola.kernels.features(k, m, "k", 4, **there), lola.kernels.features(q, m, "q", 4, **there)
    H, s = give(rng.random((2, 4, 36, 40), np.float32)), give(rng.random((2, 4, 36), np.float32))
    count = np.array([[60, 3], [0, 17]])
    scores = lola.self_recall_error(fk, v, H, s, **there)
    kept, dropped = lola.kernels.select(scores, 9, give(np.array([[60, 3, 9, 10], [0, 17, 1, 2]])), **there)
    lola.kernels.fold(fk, v, H, s, count, **there)
    out = lola.kernels.attend(q, k, v, fq, H, s, data.gate, "gated", causal=True, count=give(count), **there)
    plain = lola.kernels.attend(q, k, v, gate=give(data.gate), mixing="lolcats", **there)
    return fk, scores, kept, dropped, H, s, out, plain


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("how", ["arrays", "allocating", "numpy", "numpy on the other"])
def test_kernels(fake, dtype, how):
    data = build(CASE.but(dtype=dtype))
    expected = steps(data, np.asarray)
    if how.startswith("numpy"):
        got = steps(data, np.asarray, "cuda" if how == "numpy" else "cuda:1")
        assert all(isinstance(x, np.ndarray) for x in got)
    else:
        got = steps(data, lambda x: Array(x))
        if how == "allocating":
            pytest.importorskip("torch")
            got = [lola.kernels.attend(Allocating(data.stored["q"]), Allocating(data.stored["k"]), Allocating(data.stored["v"]),
                                       gate=data.gate, mixing="lolcats")]
            expected = expected[-1:]
        got = [x.numpy() for x in got]
    for a, b in zip(got, expected):
        assert_same_bits(a, b)


def test_kernels_on_other_streams_and_places(fake):
    data = build(CASE)
    x = data.stored["k"]
    m = lola.Hedgehog(data.weights["w_q"], data.weights["w_k"])
    Exchanging.__dlpack_c_exchange_api__ = fake.exchange
    mine = fake.stream(0)
    Array.ready = mine
    fake.current_stream(mine)
    out = lola.kernels.features(Array(x), m, "k", 4)
    del m                                       # its weights are read after this
    assert_same_bits(out.numpy(), lola.kernels.features(x, lola_map(data), "k", 4))
    Array.ready = 0
    with pytest.raises(ValueError, match="v must lie on cuda:0"):
        lola.kernels.attend(Array(data.stored["q"]), Array(x), data.stored["v"])
    with pytest.raises(ValueError, match="k must lie on"):
        lola.kernels.attend(Array(data.stored["q"]), Array(x, 1), Array(data.stored["v"]))
    for device in ("cpu", "cuda:1"):
        with pytest.raises(ValueError, match=f"x must lie on {device[:3]}.* as device says"):
            lola.kernels.features(Array(x), lola_map(data), "k", 4, device=device)
    assert lola.kernels.features(Array(x, 1), lola_map(data), "k", 4, device="cuda").device == "cuda:1"
    with pytest.raises(ValueError, match="v must lie on cpu as the other arrays do"):
        lola.kernels.attend(data.stored["q"], x, Array(data.stored["v"]), device="cuda")
    torch = pytest.importorskip("torch")
    with pytest.raises(ValueError, match="only NumPy arrays are copied"):
        lola.kernels.features(torch.from_numpy(x), lola_map(data), "k", 4, device="cuda")
    kept, _ = lola.kernels.select(Array(np.arange(5, dtype=np.float32).reshape(1, 5, 1)), 2, torch.tensor([[3]]))
    assert kept.numpy().tolist() == [[[1, 2]]]
    with pytest.raises(ValueError, match="count must be from 0"):
        lola.kernels.select(Array(np.ones((1, 5, 2), np.float32)), 3, [[6, 0]])
    with pytest.raises(TypeError, match="int64"):
        lola.kernels.select(Array(np.ones((1, 5, 2), np.float32)), 3, Array(np.ones((1, 2), np.int32)))
    for name in ("features", "attend"):
        fake.fail(name, DEVICE_ERROR)
        with pytest.raises(RuntimeError, match=f"fake_{name}"):
            lola.kernels.features(Array(x), lola_map(data), "k", 4)
            lola.kernels.attend(Array(data.stored["q"]), Array(x), Array(data.stored["v"]))


# ------------------------------------------------------------------------------------- failures

def test_a_launch_that_fails_makes_the_cache_unusable(fake):
    data = build(CASE)
    cache = device_cache(data)
    call(data, cache, hi=20)
    fake.fail("attention", DEVICE_ERROR)
    with pytest.raises(RuntimeError, match="CUDA kernel fake_attention could not be launched"):
        call(data, cache, lo=20)
    for what in (lambda: call(data, cache, lo=20), lambda: cache.tokens_seen, lambda: cache.copy(), lambda: cache.reset(),
                 lambda: cache.to("cpu"), lambda: cache.sync(), lambda: cache.save("nowhere"), lambda: run(data, cache, 20)):
        with pytest.raises(RuntimeError, match="cache is unusable since a fault of its device: CUDA kernel fake_attention"):
            what()
    assert "unusable" in repr(cache) and cache.batch == 2 and cache.nbytes > 0


def test_an_asynchronous_fault_shows_when_somebody_waits(fake):
    data = build(CASE)
    cache = device_cache(data)
    arrays = [Allocating(data.stored[n]) for n in "qkv"]
    lola.attention(*arrays, cache=cache, **options(data))
    fake.take(0, arrays[0].address, 1, 0)
    fake.fail("synchronize", DEVICE_ERROR)
    with pytest.raises(RuntimeError, match="fake_synchronize"):
        cache.sync()
    with pytest.raises(RuntimeError, match="unusable"):
        cache.sync()


@pytest.mark.parametrize("map", ["hedgehog", "given"])
@pytest.mark.parametrize("status, error", [(MEMORY_ERROR, MemoryError), (VALUE_ERROR, ValueError)])
def test_other_failures_leave_the_cache_as_it_was(fake, map, status, error):
    data = build(CASE.but(map=map))
    cache = device_cache(data)
    for start in (0, 20):
        plain = cache.to("cpu")
        for name in ("attention", *(["allocate"] if not start else [])):
            fake.fail(name, status)
            with pytest.raises(error, match="12345 bytes" if error is MemoryError else "fake"):
                call(data, cache if name == "attention" or map == "given" else None, lo=start, hi=20 + start,
                     **({} if name == "attention" or map == "given" else {"config": lola.Config(**data.case.config)}))
            assert_same(cache, plain)
            assert (cache._terms is None) == (not start)
        call(data, cache, lo=start, hi=20 + start)
    assert_same_bits(call(data, cache, lo=40), run_pieces(data, new_cache(data), [20, 40])[:, 40:])


def test_out_of_memory_names_the_bytes(fake):
    data = build(CASE)
    cache = device_cache(data)
    fake.set("limit", fake.live() + 10)
    try:
        for what in (lambda: device_cache(data), lambda: cache.copy(), lambda: cache.select_([0, 1]), lambda: new_cache(data).to("cuda")):
            with pytest.raises(MemoryError, match=r"could not allocate \d+ bytes"):
                what()
    finally:
        fake.set("limit", -1)
    assert cache.tokens_seen.tolist() == [0, 0]


def test_rearranging_that_fails_half_way(fake):
    data = build(CASE)
    cache = device_cache(data)
    call(data, cache)
    fake.fail("copy", DEVICE_ERROR, 20)
    with pytest.raises(RuntimeError, match="fake_copy"):
        cache.select_([1, 0])
    with pytest.raises(RuntimeError, match="unusable"):
        cache.reset()


@pytest.mark.parametrize("map", [m for m in MAPS if m != "given"])
def test_numbers_that_a_device_holds(fake, map):
    """Weights of feature maps, and rows."""
    data = build(CASE.but(map=map))
    there = {n: Array(w.astype(np.float64)) for n, w in data.weights.items()}
    made = type(lola_map(data))(**there)
    assert made == lola_map(data)
    cache = device_cache(data)
    call(data, cache)
    assert_same(cache.select(Array(np.array([1, 0, -1]))), cache.select([1, 0, 1]).to("cpu"))


# ------------------------------------------------------------------------------------- the model, the command, torch

def test_a_model_runs_on_a_device(fake):
    from lola.models import Llama
    config = lola.Config(window=32, chunk=16, sparse=24)
    here, there = (Llama.from_pretrained("needle", config, cache_dtype="float16", device=device) for device in ("cpu", "cuda:1"))
    ids = np.array(here.tokenizer.encode("In the beginning God created the heaven and the earth. " * 6))
    caches = here.new_cache(), there.new_cache()
    assert there.device == "cuda:1" == caches[1].layers[0].device and here.device == "cpu"
    assert_same_bits(*(model.last_logits(ids[None], cache) for model, cache in zip((here, there), caches)))
    stacked = [type(cache).stack([cache.copy(), cache]) for cache in caches]
    assert stacked[1].layers[0].device == "cuda:1"
    assert_same_bits(*(model(ids[None, :9].repeat(2, 0), cache) for model, cache in zip((here, there), stacked)))
    assert caches[0].nbytes == caches[1].nbytes


def test_eval_on_a_device_gives_the_cpus_table(fake):
    """On threads that share the device."""
    from lola.eval import Comparison
    options = dict(tasks=["niah_single_1"], lengths=[640], samples=4, threads=3, sparse=64)
    here, there = (Comparison("needle", device=device, **options) for device in ("cpu", "cuda"))
    assert_same_bits(here.needle().whole, there.needle().whole)
    tables = [comparison.run() for comparison in (here, there)]
    assert [[row.pop("device") for row in rows] for rows in tables] == [["cpu"] * 6, ["cpu"] + ["cuda:0"] * 5]
    for rows in tables:
        for row in rows:
            del row["tokens_per_second"]
    assert tables[0] == tables[1]


def test_the_command_says_why_there_is_no_device(monkeypatch, capsys):
    from lola import cli
    monkeypatch.setitem(sys.modules, "lola._cuda", None)
    assert cli.main(["eval", "--device", "cuda"]) == 2
    assert "lola eval: error: device 'cuda' is not available: this build of lola has no CUDA part" in capsys.readouterr().err
    assert cli.main(["info"]) == 0
    assert "CUDA      not available: this build" in capsys.readouterr().out


def test_torchs_current_stream_is_found_without_the_c_table(fake, monkeypatch):
    """As versions of torch before it offer it, and slowly where that is missing."""
    torch = pytest.importorskip("torch")
    data = build(CASE)
    mine, asked = fake.stream(0), []

    class Tensor(Allocating):
        pass

    class Stream:
        cuda_stream = mine

    monkeypatch.setattr(torch, "Tensor", Tensor)
    Array.ready = mine
    for fast in (True, False):
        if fast:
            monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: asked.append(index) or mine, raising=False)
        else:
            monkeypatch.delattr(torch._C, "_cuda_getCurrentRawStream")
            monkeypatch.setattr(torch.cuda, "current_stream", lambda index: asked.append(index) or Stream())
        asked.clear()
        arrays = [Tensor(data.stored[n]) for n in "qkv"]
        cache = device_cache(data)
        out = lola.attention(*arrays, cache=cache, **options(data))
        assert set(asked) == {0} and arrays[0].asked == [-1]
        assert_same_bits(out.numpy(mine), run(data, new_cache(data)))
        assert cache.folded.shape == (2, 4) and fake.illegal() == ""        # operations go there too


def test_cupys_current_stream_and_arrays(fake, monkeypatch):
    """Its arrays have neither the C table nor a namespace."""
    from types import SimpleNamespace

    mine, offered = fake.stream(0), []

    class ndarray(Array):
        pass

    ndarray.__module__ = "cupy"
    current = lambda: SimpleNamespace(ptr=mine)
    cupy = SimpleNamespace(cuda=SimpleNamespace(get_current_stream=current), from_dlpack=lambda x: offered.append(x) or ("cupy's", x))
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    Array.ready = mine
    data = build(CASE)
    expected, cache = run(data, new_cache(data)), device_cache(data)
    arrays = [ndarray(data.stored[n]) for n in "qkv"]
    word, out = lola.attention(*arrays, cache=cache, **options(data))
    assert word == "cupy's" and offered == [out] and arrays[0].asked == [-1]
    assert out.__cuda_array_interface__["stream"] == mine
    assert_same_bits(out.numpy(), expected)
    room = ndarray(np.zeros((2, 60, 4, 40), np.float32))
    assert lola.attention(*arrays, cache=device_cache(data), out=room, **options(data)) is room
    assert_same_bits(room.numpy(mine), expected)
    offered.clear(), cache.reset()


def test_jaxs_arrays_are_not_written(fake):
    data = build(CASE)

    class ArrayImpl(Array):
        pass

    ArrayImpl.__module__ = "jaxlib._jax"
    arrays = [ArrayImpl(data.stored[n]) for n in "qkv"]
    with pytest.raises(ValueError, match="out must be writable"):
        lola.attention(*arrays, out=ArrayImpl(np.zeros((2, 60, 4, 40), np.float32)), **options(data))
