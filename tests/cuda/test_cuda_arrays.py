"""Arrays on the device in and out of lola: torch, CuPy, JAX, DLPack, NumPy; strides, alignment, `out`, index arrays.

Proved here: any strides with a contiguous last axis and any alignment to the item are read in place and give the same bits;
what goes in comes out of the same library, from its own allocator, on the same device; every element of a result is written
and nothing beside it; NumPy arrays are copied there and back, at any size; index arrays on the device are clamped, and
validated with check=True.
"""

import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

import lola
from oracle import (DTYPES, Case, assert_close, assert_same_bits, assert_same_memory, build, lola_map, new_cache, options,
                    replay, run, run_pieces, snapshot)
from places import DEVICE, array, only_on_cuda, tensor
from test_cuda_sizes import LLAMA

SMALL = Case(T=60, D=24, Dv=40, F=36, mixing="gated")
WIDE = LLAMA.but(B=2, T=400, D=64, Dv=64, F=64, window=64, sparse=64)


def call(data, cache, arrays=None, **more):
    """lola.attention on tensors; everything else as NumPy arrays but for what is given."""
    arrays = arrays or [tensor(data.stored[n]) for n in "qkv"]
    return lola.attention(*arrays, cache=cache, **{**options(data), **more})


# ----------------------------------------------------------------------------------- strides and alignment

def transposed(x):
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def gaps(x):
    """With NaN between rows, tokens and heads, and an odd offset: aligned to the item alone."""
    room = x.new_full([n + 3 for n in x.shape], float("nan"))
    view = room[1:-2, 2:-1, 1:-2, 1:-2]
    view.copy_(x)
    return view


def every_other(x):
    return x.repeat_interleave(2, dim=1)[:, ::2]


def offset(x):
    """Dense, one item past an aligned address."""
    flat = x.new_zeros(x.numel() + 1)[1:]
    flat.copy_(x.reshape(-1))
    return flat.view(x.shape)


def fused(x):
    """One slice of a wider last axis, as q, k and v of one projection are."""
    import torch
    return torch.cat([x.new_full(x.shape, float("nan")), x], dim=-1)[..., x.shape[-1]:]


@pytest.mark.parametrize("view", [transposed, gaps, every_other, offset, fused])
@pytest.mark.parametrize("case", [SMALL.but(map="given"), WIDE], ids=["small", "wide"])
def test_strides_and_alignment(dtype, case, view):
    data = build(case.but(dtype=dtype))
    plain, cache, single = new_cache(data), new_cache(data), new_cache(data)
    expected = run(data, plain)
    more = {n: view(tensor(data.stored[n])) for n in ("q_features", "k_features") if n in data.stored}
    tensors = [view(tensor(data.stored[n])) for n in "qkv"]
    out = view(tensor(np.full(expected.shape, 7, expected.dtype)))
    assert call(data, cache, tensors, out=out, **more) is out
    if dtype == "float32":
        assert_same_bits(array(out), expected)
    else:  # arrays that no tile can be loaded from take another kernel, whose sums round differently
        assert_close(array(out), expected.astype(np.float64), 5e-2)
    assert_same_memory(cache, plain, case.Hq)
    # Decoding from slices of the same views.
    at = case.T - 9
    call(data, single, [x[:, :at] for x in tensors], **{n: x[:, :at] for n, x in more.items()})
    steps = [call(data, single, [x[:, t:t + 1] for x in tensors], **{n: x[:, t:t + 1] for n, x in more.items()})
             for t in range(at, case.T)]
    assert_same_memory(single, plain, case.Hq)
    plain = new_cache(data)
    assert_same_bits(np.concatenate([array(x) for x in steps], axis=1), run_pieces(data, plain, range(at, case.T))[:, at:])


def test_broadcast_tensors(dtype):
    data = build(SMALL.but(dtype=dtype))
    tensors = [tensor(data.stored[n])[:1] for n in "qkv"]
    wide = [x.expand(2, -1, -1, -1) for x in tensors]
    got = call(data, new_cache(data), wide)
    assert_same_bits(array(got), array(call(data, new_cache(data), [x.contiguous() for x in wide])))
    heads = [x[:, :, :1].expand(-1, -1, h, -1) for x, h in zip(wide, (4, 2, 2))]
    got = call(data, new_cache(data), heads)
    assert_same_bits(array(got), array(call(data, new_cache(data), [x.contiguous() for x in heads])))


def test_scores_and_features_with_strides():
    data = build(SMALL.but(score="external", map="given"))
    expected = run(data, new_cache(data))
    scores = tensor(data.stored["scores"])
    for view in (scores.transpose(1, 2).contiguous().transpose(1, 2), scores.repeat_interleave(3, dim=1)[:, ::3]):
        features = {n: tensor(data.stored[n]) for n in ("q_features", "k_features")}
        assert_same_bits(array(call(data, new_cache(data), scores=view, **features)), expected)


# ----------------------------------------------------------------------------------- out

@pytest.mark.parametrize("Dv", [1, 3, 7, 17, 33, 64, 128])
def test_only_out_is_written_and_all_of_it(dtype, Dv):
    data = build(Case(T=121, D=32, Dv=Dv, F=32, window=32, chunk=16, sparse=20, dtype=dtype))
    expected, cache = run(data, new_cache(data)), new_cache(data)
    room = tensor(np.full((2, 125, 6, Dv + 5), 7, DTYPES[dtype]))
    place = room[:, 2:123, 1:5, 2:-3]
    place.fill_(float("nan"))
    call(data, cache, out=place)
    assert_same_bits(array(place), expected)
    place.fill_(7)
    assert (array(room) == 7).all()
    place.fill_(float("nan"))                                # a decoding step
    step = [tensor(data.stored[n][:, :1]) for n in "qkv"]
    call(data, cache, step, out=place[:, :1])
    assert np.isfinite(array(place[:, :1]).astype(np.float32)).all() and np.isnan(array(place[:, 1:]).astype(np.float32)).all()


def test_outputs_of_tokens_that_enter_no_row_are_zero(dtype):
    data = build(WIDE.but(B=3, dtype=dtype))
    shape = (3, 400, 4, 64)
    out = tensor(np.full(shape, np.nan, DTYPES[dtype]))
    call(data, new_cache(data), out=out, starts=np.array([3, 400, 0]), stops=np.array([9, 400, 399]))
    got = array(out).astype(np.float32)
    assert not got[0, :3].any() and not got[0, 9:].any() and not got[1].any() and not got[2, 399:].any()
    assert got[0, 3:9].any(axis=(-1, -2)).all() and got[2, :399].any(axis=(-1, -2)).all()
    out.fill_(float("nan"))
    step = [tensor(data.stored[n][:, :1]) for n in "qkv"]
    call(data, new_cache(data), step, out=out[:, :1], stops=np.array([1, 0, 1]))
    got = array(out[:, :1]).astype(np.float32)
    assert np.isfinite(got).all() and got[0].any() and not got[1].any() and got[2].any()


def test_results_are_torchs_own(dtype):
    import torch
    data = build(SMALL.but(dtype=dtype))
    tensors = [tensor(data.stored[n]) for n in "qkv"]
    out = call(data, new_cache(data), tensors)
    assert isinstance(out, torch.Tensor) and out.dtype == tensors[0].dtype and out.device == tensors[0].device
    assert out.shape == (2, 60, 4, 40) and out.is_contiguous() and not out.requires_grad
    if DEVICE == "cuda":
        before = torch.cuda.memory_allocated()
        kept = call(data, new_cache(data), tensors)
        assert torch.cuda.memory_allocated() - before >= kept.numel() * kept.element_size()


# ----------------------------------------------------------------------------------- NumPy there and back

@pytest.mark.parametrize("case", [SMALL, SMALL.but(map="given", score="external"), WIDE, WIDE.but(T=20_000, B=1)],
                         ids=["small", "all arrays", "wide", "long"])
def test_numpy_arrays_are_copied_there_and_back(dtype, case):
    """The same bits as tensors give; a cache on the device, or device= alone."""
    data = build(case.but(dtype=dtype))
    plain, cache = new_cache(data), new_cache(data)
    expected = run(data, plain)
    arrays = [data.stored[n] for n in "qkv"]
    out = lola.attention(*arrays, cache=cache, **options(data))
    assert isinstance(out, np.ndarray) and out.dtype == DTYPES[dtype]
    assert_same_bits(out, expected)
    assert_same_memory(cache, plain, case.Hq)
    once = lola.attention(*arrays, config=lola.Config(**data.case.config), device=DEVICE, **options(data))
    assert_same_bits(once, expected)
    given = np.full(expected.shape, np.nan, expected.dtype)
    assert lola.attention(*arrays, config=lola.Config(**data.case.config), device=DEVICE, out=given, **options(data)) is given
    assert_same_bits(given, expected)


@pytest.mark.parametrize("T", [2, 31, 65, 1023, 1024, 1025, 2047, 2048, 2049, 6100])
def test_numpy_arrays_of_any_length(dtype, T):
    """About the ends of pieces; results in memory that nobody has written yet, and in one whose heads do not lie together."""
    data = build(LLAMA.but(Hq=32, Hkv=8, sparse=64, T=T, dtype=dtype))
    plain, cache = new_cache(data), new_cache(data)
    expected = array(call(data, plain))
    arrays = [data.stored[n] for n in "qkv"]
    assert_same_bits(lola.attention(*arrays, cache=cache, **options(data)), expected)
    assert_same_memory(cache, plain, 32)
    strided = [np.ascontiguousarray(x.transpose(0, 2, 1, 3)).transpose(0, 2, 1, 3) for x in arrays]
    room = np.full((1, 32, T + 3, 128), 7, DTYPES[dtype])
    out = room[:, :, 1:-2].transpose(0, 2, 1, 3)
    assert lola.attention(*strided, cache=new_cache(data), out=out, **options(data)) is out
    assert_same_bits(np.ascontiguousarray(out), expected)
    out[...] = 7
    assert (room == 7).all()


def test_strided_numpy_arrays(dtype):
    data = build(WIDE.but(dtype=dtype))
    expected = run(data, new_cache(data))
    arrays = [np.ascontiguousarray(data.stored[n].transpose(0, 2, 1, 3)).transpose(0, 2, 1, 3) for n in "qkv"]
    room = np.full((3, 405, 6, 70), 7, DTYPES[dtype])
    lola.attention(*arrays, cache=new_cache(data), out=room[:2, 2:-3, 1:-1, 3:-3], **options(data))
    assert_same_bits(room[:2, 2:-3, 1:-1, 3:-3], expected)
    room[:2, 2:-3, 1:-1, 3:-3] = 7
    assert (room == 7).all()
    broadcast = [np.broadcast_to(x[:1], x.shape) for x in arrays]
    got = lola.attention(*broadcast, cache=new_cache(data), **options(data))
    dense = lola.attention(*map(np.ascontiguousarray, broadcast), cache=new_cache(data), **options(data))
    assert_same_bits(got, dense)


def test_results_of_numpy_calls_do_not_share_memory():
    data = build(WIDE)
    cache = new_cache(data)
    first = lola.attention(*(data.stored[n][:, :100] for n in "qkv"), cache=cache, **options(data))
    kept = first.copy()
    lola.attention(*(data.stored[n][:, 100:200] for n in "qkv"), cache=cache, **options(data))
    assert_same_bits(first, kept)


def test_kernels_take_numpy_arrays_and_a_device(dtype, rng):
    x = rng.normal(size=(2, 33, 2, 16)).astype(DTYPES[dtype])
    m = lola.Hedgehog(*rng.normal(size=(2, 4, 16, 8)).astype(np.float32))
    there = {"device": DEVICE} if DEVICE == "cuda" else {}
    fk = lola.kernels.features(x, m, "k", 4, **there)
    assert isinstance(fk, np.ndarray)
    assert_same_bits(fk, array(lola.kernels.features(tensor(x), m, "k", 4)))
    H, s = np.zeros((2, 4, 16, 16), np.float32), np.zeros((2, 4, 16), np.float32)
    assert lola.kernels.fold(fk, x, H, s, **there) is None
    H2, s2 = tensor(np.zeros_like(H)), tensor(np.zeros_like(s))
    lola.kernels.fold(tensor(fk), tensor(x), H2, s2)
    assert_same_bits(H, array(H2))
    assert_same_bits(s, array(s2))
    scores = lola.kernels.score(fk, x, H, s, **there)
    kept, dropped = lola.kernels.select(scores, 7, **there)
    assert isinstance(kept, np.ndarray) and kept.dtype == dropped.dtype == np.int64
    for got, expected in zip(lola.kernels.select(tensor(scores), 7), (kept, dropped)):
        assert_same_bits(array(got), expected)
    q = rng.normal(size=(2, 33, 4, 16)).astype(DTYPES[dtype])
    out = lola.kernels.attend(q, x, x, causal=True, **there)
    assert_same_bits(out, array(lola.kernels.attend(tensor(q), tensor(x), tensor(x), causal=True)))


# ----------------------------------------------------------------------------------- other libraries

class Producer:
    """Any object with the DLPack protocol."""

    def __init__(self, x):
        self.x = x

    def __dlpack__(self, **options):
        return self.x.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.x.__dlpack_device__()


class Interface:
    """Any object with CUDA's array interface."""

    def __init__(self, x):
        self.__cuda_array_interface__ = x.__cuda_array_interface__
        self.x = x


def test_any_dlpack_producer(dtype):
    data = build(SMALL.but(dtype=dtype))
    expected = run(data, new_cache(data))
    got = call(data, new_cache(data), [Producer(tensor(data.stored[n])) for n in "qkv"])
    assert_same_bits(array(got), expected)


@only_on_cuda
def test_the_cuda_array_interface():
    import torch
    data = build(SMALL.but(dtype="float16"))
    expected = run(data, new_cache(data))
    got = call(data, new_cache(data), [Interface(tensor(data.stored[n])) for n in "qkv"])
    if not hasattr(got, "__dlpack__"):
        got = torch.as_tensor(got, device="cuda")
    assert_same_bits(array(got), expected)


@only_on_cuda
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_cupy(dtype):
    cupy = pytest.importorskip("cupy")
    data = build(WIDE.but(dtype=dtype))
    expected, cache = run(data, new_cache(data)), new_cache(data)
    for stream in (None, cupy.cuda.Stream(non_blocking=True)):
        with stream or cupy.cuda.Stream.null:
            arrays = [cupy.asarray(data.stored[n]) for n in "qkv"]
            out = lola.attention(*arrays, cache=new_cache(data), **options(data))
            assert isinstance(out, cupy.ndarray) and out.dtype == arrays[0].dtype
            assert_same_bits(cupy.asnumpy(out), expected)
            views = [cupy.ascontiguousarray(x.transpose(0, 2, 1, 3)).transpose(0, 2, 1, 3) for x in arrays]
            room = cupy.full(expected.shape, cupy.nan, dtype)
            assert lola.attention(*views, cache=cache, out=room, **options(data)) is room
            assert_same_bits(cupy.asnumpy(room), expected)
            cache.reset()


@only_on_cuda
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_jax(dtype, monkeypatch):
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    jax = pytest.importorskip("jax")
    if jax.default_backend() != "gpu":
        pytest.skip("JAX finds no GPU")
    data = build(WIDE.but(dtype=dtype))
    expected = run(data, new_cache(data))
    cache = new_cache(data).to("cuda:0")                     # of several devices JAX leaves another one current than it uses
    arrays = [jax.numpy.asarray(data.stored[n]) for n in "qkv"]
    out = lola.attention(*arrays, cache=cache, **options(data))
    assert isinstance(out, jax.Array) and out.dtype == arrays[0].dtype
    assert_same_bits(np.asarray(out), expected)
    with pytest.raises((TypeError, ValueError)):             # JAX's arrays cannot be written
        lola.attention(*arrays, cache=cache, out=out, **options(data))


def test_libraries_may_mix_on_one_device():
    """q decides what comes out."""
    import torch
    data = build(SMALL)
    expected = run(data, new_cache(data))
    got = call(data, new_cache(data), [tensor(data.stored["q"]), *(Producer(tensor(data.stored[n])) for n in "kv")])
    assert isinstance(got, torch.Tensor)
    assert_same_bits(array(got), expected)


# ----------------------------------------------------------------------------------- small operands

def test_gates_and_weights_from_the_device(dtype):
    """A gate or a feature map made of device tensors is the same as one made of NumPy arrays."""
    data = build(SMALL.but(dtype=dtype))
    cache = new_cache(data)
    m = lola.Hedgehog(*(tensor(data.weights[n]) for n in ("w_q", "w_k")))
    assert m == lola_map(data) and hash(m) == hash(lola_map(data))
    gate = tensor(data.gate)
    got = [call(data, cache, [tensor(data.stored[n][:, lo:lo + 20]) for n in "qkv"], gate=gate, feature_map=m)
           for lo in (0, 20)]
    got.append(call(data, cache, [tensor(data.stored[n][:, 40:]) for n in "qkv"]))         # the host's gate: the same one
    single = new_cache(data)
    assert_same_bits(np.concatenate([array(x) for x in got], axis=1), run_pieces(data, single, [20, 40]))
    assert_same_memory(cache, single, 4)


@pytest.mark.parametrize("kind", [np.int32, np.int64])
@pytest.mark.parametrize("case", [SMALL, WIDE], ids=["small", "wide"])
def test_index_arrays_on_host_and_device(case, kind):
    import torch
    data = build(case)
    T = case.T
    starts, stops = np.array([3, 0], kind), np.array([T, T - 11], kind)
    cu = np.array([0, 11, T], kind)
    packed = data.at(rows=[0])
    expected, plain = run(data, new_cache(data), starts=starts, stops=stops), new_cache(data)
    joined = call(packed, plain, cu_seqlens=cu)
    for put in (lambda x: x, torch.from_numpy, tensor):
        cache, other = new_cache(data), new_cache(data)
        assert_same_bits(array(call(data, cache, starts=put(starts), stops=put(stops))), expected)
        cache.sync()
        assert np.asarray(cache.tokens_seen).tolist() == [T - 3, T - 11]
        assert_same_bits(array(call(packed, other, cu_seqlens=put(cu))), array(joined))
        other.sync()
        assert_same_memory(other, plain, case.Hq)
        # and in decoding: one of the rows is idle
        step = [tensor(data.stored[n][:, :1]) for n in "qkv"]
        out = call(data, cache, step, stops=put(np.array([1, 0], kind)))
        cache.sync()
        assert np.asarray(cache.tokens_seen).tolist() == [T - 2, T - 11] and not array(out)[1].any()


@only_on_cuda
@pytest.mark.parametrize("name, wrong, right", [
    ("starts", [-5, 70], [0, 60]), ("stops", [-1, 2 ** 40], [0, 60]), ("stops", [100, -2 ** 62], [60, 0]),
])
def test_index_arrays_on_the_device_are_clamped(name, wrong, right):
    data = build(SMALL)
    plain, cache = new_cache(data), new_cache(data)
    expected = run(data, plain, **{name: np.array(right)})
    assert_same_bits(array(call(data, cache, **{name: tensor(np.array(wrong))})), expected)
    cache.sync()
    assert_same_memory(cache, plain, 4)
    before = snapshot(cache)
    with pytest.raises(ValueError, match=name):
        call(data, cache, check=True, **{name: tensor(np.array(wrong))})
    assert snapshot(cache) == before


@only_on_cuda
@pytest.mark.parametrize("wrong", [[0, 50, 20], [-3, 7, 60], [0, 70, 900], [60, 0, 0], [2 ** 40, -2 ** 40, 1]])
def test_cu_seqlens_on_the_device_are_never_followed_out_of_bounds(wrong):
    """What enters then is some clamped part of the row; the cache stays whole."""
    data = build(SMALL)
    packed, cache = data.at(rows=[0]), new_cache(data)
    out = call(packed, cache, cu_seqlens=tensor(np.array(wrong)))
    assert np.isfinite(array(out)).all()
    cache.sync()
    seen = np.asarray(cache.tokens_seen)
    assert (seen >= 0).all() and seen.sum() <= 60
    run(data, cache)
    other = new_cache(data)
    before = snapshot(other)
    with pytest.raises(ValueError, match="cu_seqlens"):
        call(packed, other, check=True, cu_seqlens=tensor(np.array(wrong)))
    assert snapshot(other) == before


# ----------------------------------------------------------------------------------- sizes

def test_no_tokens_and_no_rows(dtype):
    data = build(SMALL.but(dtype=dtype))
    cache, plain = new_cache(data), new_cache(data)
    for at in (0, 17, 20):
        run(data, cache, int(cache.tokens_seen[0]), at)
        before = snapshot(cache)
        assert run(data, cache, at, at).shape == (2, 0, 4, 40)
        assert snapshot(cache) == before
    run(data, cache, 20)
    run(data, plain)
    assert_same_memory(cache, plain, 4)
    none = build(SMALL.but(B=0, dtype=dtype))
    cache = new_cache(none)
    assert run(none, cache).shape == (0, 60, 4, 40) and len(cache.tokens_seen) == 0
    packed = build(SMALL.but(B=1, T=0, dtype=dtype))
    assert run(packed, cache, cu_seqlens=np.array([0])).shape == (1, 0, 4, 40)


def test_all_rows_idle():
    data = build(WIDE)
    cache = new_cache(data)
    run(data, cache)
    before = snapshot(cache)
    assert not run(data, cache, starts=np.array([4, 20]), stops=np.array([4, 20])).any()
    assert not run(data, cache, 0, 1, stops=np.array([0, 0])).any()
    assert snapshot(cache) == before


@pytest.mark.parametrize("case", [
    Case(B=1, T=20, Hq=1, Hkv=1, D=1, Dv=1, F=2, window=1, chunk=1, sparse=1),
    Case(B=1, T=20, Hq=1, Hkv=1, D=1, Dv=1, window=1, chunk=1, sparse=0, map="elu_plus_one"),
    Case(B=1, T=20, Hq=7, Hkv=1, D=1, Dv=65, F=2, window=3, chunk=3, sparse=1),
    Case(B=1, T=20, Hq=1, Hkv=1, D=65, Dv=1, F=130, window=2, chunk=1, sparse=2),
    Case(B=5, T=1, Hq=3, Hkv=3, D=3, Dv=5, F=6),
    Case(B=1, T=30, window=1000, chunk=500, sparse=10 ** 4),
    Case(B=300, T=9, Hq=1, Hkv=1, D=4, Dv=4, F=4, window=2, chunk=1, sparse=2),
    Case(B=1, T=40, Hq=64, Hkv=64, D=16, Dv=16, F=16, window=8, chunk=8, sparse=9),
    Case(B=1, T=300, Hq=2, Hkv=1, D=32, Dv=32, F=32, window=128, chunk=128, sparse=20),
], ids=str)
def test_smallest_largest_and_odd_sizes(dtype, case):
    data = build(case.but(dtype=dtype))
    played = replay(data)
    assert_close(run(data, new_cache(data)), played.exact, played.bound)
    assert_close(played.record.out, played.exact, played.bound)


@only_on_cuda
def test_more_rows_than_a_grid_has_room_for():
    """70,000 rows, more than 65,535: prefill, decoding and an update."""
    B = 70_000
    data = build(Case(B=B, T=8, Hq=1, Hkv=1, D=4, Dv=4, F=4, window=2, chunk=2, sparse=1, map="elu_plus_one"))
    cache = new_cache(data)
    out = run_pieces(data, cache, [5, 6, 7])
    assert np.isfinite(out).all()
    some = [0, 1, 65_535, 65_536, B - 1]
    part = data.at(rows=some)
    alone = new_cache(part)
    assert_same_bits(run_pieces(part, alone, [5, 6, 7]), out[some])
    assert_same_memory(cache.select(some), alone, 1)


# ----------------------------------------------------------------------------------- loading

def python(code):
    where = str(pathlib.Path(lola.__file__).parent.parent)
    path = where + os.pathsep + os.environ.get("PYTHONPATH", "")
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120,
                          env={**os.environ, "PYTHONPATH": path})


CPU_WORK = """
import os, numpy as np, lola
q, k, v = np.random.default_rng(0).normal(size=(3, 1, 50, 2, 8)).astype("f")
def work(**more):
    return lola.attention(q, k, v, config=lola.Config(window=4, chunk=2, sparse=3), feature_map=lola.EluPlusOne(), **more)
here = work()
driver = lambda: "libcuda.so" in open("/proc/self/maps").read()
"""


@only_on_cuda
def test_nothing_touches_the_driver_before_the_first_device_array():
    done = python(CPU_WORK + """
before = driver()
there = work(device="cuda")
print(before, driver(), abs(here - there).max() < 1e-4)""")
    assert done.stdout.split() == ["False", "True", "True"], done.stderr


@only_on_cuda
def test_a_child_forked_before_the_first_device_array_can_use_the_device():
    done = python(CPU_WORK + """
child = os.fork()
if child == 0:
    os._exit(0 if abs(work(device="cuda") - here).max() < 1e-4 else 3)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), abs(work(device="cuda") - here).max() < 1e-4)""")
    assert done.stdout.split() == ["0", "True"], done.stderr


@only_on_cuda
def test_numpy_arrays_need_neither_torch_nor_cupy():
    done = python("import sys\nsys.modules.update(dict.fromkeys(('torch', 'cupy', 'jax', 'ml_dtypes')))\n" + CPU_WORK
                  + "print(type(work(device='cuda')).__name__)")
    assert done.stdout.split() == ["ndarray"], done.stderr
