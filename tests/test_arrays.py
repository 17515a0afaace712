"""Arrays in and out of `lola.attention`: kinds, strides, `out`, empty sizes, PyTorch on the CPU.

Proved here: any strides with a contiguous last axis are read in place, torch tensors and other DLPack producers give the
same bits as NumPy arrays, `out` is written in full and must not overlap, sizes of zero and one work, and `import lola`
needs no torch.
"""

import subprocess
import sys
import tracemalloc

import lola
import numpy as np
import pytest

from oracle import (DTYPES, Case, assert_close, assert_same_bits, assert_same_memory, build, contents, lola_map, new_cache,
                    options, replay, run, run_pieces, snapshot)


def call(data, cache, arrays=None, **more):
    arrays = arrays or [data.stored[n] for n in "qkv"]
    return lola.attention(*arrays, cache=cache, **{**options(data), **more})


# ----------------------------------------------------------------------------------- strides

def transposed(x):
    """(B, T, H, D) as a view of (B, H, T, D)."""
    return np.ascontiguousarray(x.transpose(0, 2, 1, 3)).transpose(0, 2, 1, 3)


def padded(x):
    """With gaps between rows, tokens and heads, and an odd offset."""
    room = np.full([n + 3 for n in x.shape], np.nan, x.dtype)
    view = room[1:-2, 2:-1, 1:-2, 1:-2]
    view[:] = x
    return view


def reversed_storage(x):
    return np.ascontiguousarray(x[:, ::-1])[:, ::-1]


def every_other(x):
    return np.repeat(x, 2, axis=1)[:, ::2]


def unaligned(x):
    raw = np.zeros(x.nbytes + 1, np.uint8)[1:].view(x.dtype).reshape(x.shape)
    raw[:] = x
    return raw


@pytest.mark.parametrize("view", [transposed, padded, reversed_storage, every_other])
def test_strides(isa, dtype, view):
    data = build(Case(T=60, map="given", dtype=dtype))
    plain, cache = new_cache(data), new_cache(data)
    expected = call(data, plain)
    got = call(data, cache, [view(data.stored[n]) for n in "qkv"],
               **{n: view(data.stored[n]) for n in ("q_features", "k_features")})
    assert_same_bits(got, expected)
    assert_same_memory(cache, plain, 4)


def test_broadcast_and_read_only_arrays(isa, dtype):
    data = build(Case(T=30, dtype=dtype))
    q, k, v = (data.stored[n] for n in "qkv")
    wide = [np.broadcast_to(x[:1], x.shape) for x in (q, k, v)]       # stride 0, read-only
    assert not wide[0].flags.writeable
    assert_same_bits(call(data, new_cache(data), wide), call(data, new_cache(data), [np.ascontiguousarray(x) for x in wide]))


def test_a_transposed_view_is_not_copied(isa):
    """Peak allocation of a long call stays far below the inputs' size."""
    data = build(Case(B=1, T=20000, Hq=4, Hkv=2, D=64, Dv=64, F=8, window=8, chunk=8, sparse=4))
    arrays = [transposed(data.stored[n]) for n in "qkv"]
    cache, out = new_cache(data), np.empty_like(data.stored["q"])
    tracemalloc.start()
    try:
        call(data, cache, arrays, out=out)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < sum(x.nbytes for x in arrays) / 10
    assert lola._lola.scratch_peak() < sum(x.nbytes for x in arrays)


@pytest.mark.parametrize("name", ["q", "k", "v", "q_features", "k_features"])
def test_a_strided_last_axis_raises(name):
    data = build(Case(T=20, map="given"))
    cache = new_cache(data)
    before = snapshot(cache)
    x = data.stored[name]
    data.stored[name] = np.repeat(x, 2, axis=-1)[..., ::2]
    with pytest.raises(ValueError, match=rf"\b{name}\b"):
        call(data, cache)
    assert snapshot(cache) == before


def test_an_unaligned_array_works_or_says_so():
    data = build(Case(T=20))
    expected = call(data, new_cache(data))
    arrays = [unaligned(data.stored[n]) for n in "qkv"]
    try:
        got = call(data, new_cache(data), arrays)
    except ValueError as exception:
        assert "align" in str(exception)
    else:
        assert_same_bits(got, expected)


def test_big_endian_arrays_raise():
    data = build(Case(T=20))
    data.stored["k"] = data.stored["k"].astype(">f4")
    with pytest.raises(TypeError, match=r"\bk\b"):
        call(data, new_cache(data))


def test_inputs_are_only_read(isa, dtype):
    data = build(Case(T=60, dtype=dtype, map="given", mixing="gated", score="external"))
    copies = {n: x.copy() for n, x in data.stored.items()}
    call(data, new_cache(data))
    for n, x in data.stored.items():
        assert_same_bits(x, copies[n])


# ----------------------------------------------------------------------------------- out

def test_out_is_written_in_full(isa, dtype):
    data = build(Case(T=60, dtype=dtype))
    expected = call(data, new_cache(data))
    out = np.full(expected.shape, np.nan, expected.dtype)
    assert call(data, new_cache(data), out=out) is out
    assert_same_bits(out, expected)
    for view in (transposed, padded):
        out = view(np.full(expected.shape, np.nan, expected.dtype))
        call(data, new_cache(data), out=out)
        assert_same_bits(out, expected)


def test_only_out_is_written(isa, dtype):
    """Whatever lies around a view is left alone, at odd sizes too."""
    for Dv in (1, 3, 7, 17, 33):
        data = build(Case(T=21, Dv=Dv, dtype=dtype))
        room = np.full((2, 25, 6, Dv + 5), 7, DTYPES[dtype])
        call(data, new_cache(data), out=room[:, 2:23, 1:5, 2:-3])
        room[:, 2:23, 1:5, 2:-3] = 7
        assert (room == 7).all()


def test_padding_in_out_is_zeroed(isa):
    data = build(Case(T=20))
    out = np.full((2, 20, 4, 6), np.nan, np.float32)
    call(data, new_cache(data), out=out, starts=np.array([3, 20]), stops=np.array([9, 20]))
    assert not out[0, :3].any() and not out[0, 9:].any() and not out[1].any() and out[0, 3:9].all()


@pytest.mark.parametrize("name", ["q", "v", "q_features"])
def test_out_that_overlaps_an_input_raises(name):
    data = build(Case(T=20, Dv=8, map="given", F=8))
    cache = new_cache(data)
    before = snapshot(cache)
    size = 2 * 20 * 4 * 8
    memory = np.zeros(2 * size, np.float32)
    x = data.stored[name]
    place = memory[size - 1:][:x.size].reshape(x.shape)               # shares one number with out
    place[:] = x
    data.stored[name] = place
    kept = memory.copy()
    with pytest.raises(ValueError, match="out"):
        call(data, cache, out=memory[:size].reshape(2, 20, 4, 8))
    assert snapshot(cache) == before and (memory == kept).all()
    place = memory[size:][:x.size].reshape(x.shape)                   # next to each other is fine
    place[:] = x
    data.stored[name] = place
    call(data, cache, out=memory[:size].reshape(2, 20, 4, 8))


@pytest.mark.parametrize("out, kind", [
    (np.zeros((2, 20, 4, 5), np.float32), ValueError), (np.zeros((2, 20, 4), np.float32), ValueError),
    (np.zeros((2, 20, 4, 6), np.float64), TypeError), ([[1.0]], TypeError), ("out", TypeError),
    (np.broadcast_to(np.zeros(6, np.float32), (2, 20, 4, 6)), ValueError),
    (np.zeros((2, 20, 4, 12), np.float32)[..., ::2], ValueError)])
def test_a_wrong_out_raises(out, kind):
    data = build(Case(T=20))
    cache = new_cache(data)
    before = snapshot(cache)
    with pytest.raises(kind, match=r"\bout\b"):
        call(data, cache, out=out)
    assert snapshot(cache) == before


# ----------------------------------------------------------------------------------- sizes

def test_no_tokens(isa, dtype):
    data = build(Case(T=60, dtype=dtype))
    cache, plain = new_cache(data), new_cache(data)
    for at in (0, 17, 20):                             # at the start, inside a chunk, between chunks
        run(data, cache, int(cache.tokens_seen[0]), at)
        before = snapshot(cache)
        out = run(data, cache, at, at)
        assert out.shape == (2, 0, 4, 6) and out.dtype == DTYPES[dtype]
        assert snapshot(cache) == before
    run(data, cache, 20)
    run(data, plain)
    assert_same_memory(cache, plain, 4)


def test_no_rows(isa):
    data = build(Case(B=0, T=20))
    cache = new_cache(data)
    assert run(data, cache).shape == (0, 20, 4, 6)
    assert len(cache.tokens_seen) == 0
    packed = build(Case(B=1, T=0))
    assert call(packed, cache, cu_seqlens=np.array([0])).shape == (1, 0, 4, 6)


def test_all_rows_idle(isa):
    data = build(Case(T=20))
    cache = new_cache(data)
    run(data, cache)
    before = snapshot(cache)
    assert not run(data, cache, starts=np.array([4, 20]), stops=np.array([4, 20])).any()
    assert snapshot(cache) == before


@pytest.mark.parametrize("case", [
    Case(B=1, T=20, Hq=1, Hkv=1, D=1, Dv=1, F=2, window=1, chunk=1, sparse=1),
    Case(B=1, T=20, Hq=1, Hkv=1, D=1, Dv=1, window=1, chunk=1, sparse=0, map="elu_plus_one"),
    Case(B=1, T=20, Hq=7, Hkv=1, D=1, Dv=65, F=2, window=3, chunk=3, sparse=1),
    Case(B=1, T=20, Hq=1, Hkv=1, D=65, Dv=1, F=130, window=2, chunk=1, sparse=2),
    Case(B=5, T=1, Hq=3, Hkv=3, D=3, Dv=5, F=6),
    Case(B=1, T=30, Hq=1, Hkv=1, D=300, Dv=257, F=514, window=4, chunk=2, sparse=3),
    Case(B=1, T=30, window=1000, chunk=500, sparse=10 ** 4),
])
def test_smallest_and_odd_sizes(isa, dtype, case):
    data = build(case.but(dtype=dtype))
    played = replay(data)
    assert_close(run(data, new_cache(data)), played.exact, played.bound)
    assert_close(played.record.out, played.exact, played.bound)


@pytest.mark.parametrize("kind", [np.int32, np.int64])
def test_kinds_of_index_arrays(isa, kind):
    data = build(Case(T=20))
    expected = run(data, new_cache(data), starts=np.array([3, 0]), stops=np.array([20, 9]))
    assert_same_bits(run(data, new_cache(data), starts=np.array([3, 0], kind), stops=np.array([20, 9], kind)), expected)
    packed = data.at(rows=[0])
    got = run(packed, new_cache(data), cu_seqlens=np.array([0, 11, 20], kind))
    assert_same_bits(got, run(packed, new_cache(data), cu_seqlens=np.array([0, 11, 20])))


# ----------------------------------------------------------------------------------- DLPack and torch

class Producer:
    """Any object with the DLPack protocol."""

    def __init__(self, array):
        self.array = array

    def __dlpack__(self, **options):
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


def test_any_dlpack_producer(isa):
    data = build(Case(T=40))
    expected = call(data, new_cache(data))
    got = call(data, new_cache(data), [Producer(data.stored[n]) for n in "qkv"])
    got = got if isinstance(got, np.ndarray) else np.from_dlpack(got)
    assert_same_bits(got, expected)


@pytest.fixture
def torch():
    return pytest.importorskip("torch")


def tensor(torch, x):
    """A tensor that shares x's memory."""
    if x.dtype == DTYPES["bfloat16"]:
        return torch.from_numpy(x.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(x)


def array(torch, t):
    return t.view(torch.int16).numpy().view(DTYPES["bfloat16"]) if t.dtype == torch.bfloat16 else t.numpy()


def test_torch_tensors_give_tensors_of_the_same_bits(isa, dtype, torch):
    data = build(Case(T=60, dtype=dtype, map="given", mixing="gated"))
    plain, cache = new_cache(data), new_cache(data)
    expected = call(data, plain)
    tensors = [tensor(torch, data.stored[n]) for n in "qkv"]
    more = {n: tensor(torch, data.stored[n]) for n in ("q_features", "k_features")}
    got = call(data, cache, tensors, gate=torch.from_numpy(data.gate), **more)
    assert isinstance(got, torch.Tensor) and got.dtype == tensors[0].dtype and not got.requires_grad
    assert_same_bits(array(torch, got), expected)
    assert_same_memory(cache, plain, 4)
    out = torch.full_like(got, float("nan"))
    assert call(data, new_cache(data), tensors, out=out, **more) is out
    assert_same_bits(array(torch, out), expected)


def test_torch_views_feature_maps_and_lengths(isa, torch):
    data = build(Case(T=60))
    expected = call(data, new_cache(data), starts=np.array([2, 0]))
    m = lola.Hedgehog(*(torch.from_numpy(data.weights[n]) for n in ("w_q", "w_k")))
    views = [torch.from_numpy(data.stored[n]).transpose(1, 2).contiguous().transpose(1, 2) for n in "qkv"]
    assert not views[0].is_contiguous()
    got = call(data, new_cache(data), views, feature_map=m, starts=torch.tensor([2, 0]))
    assert_same_bits(got.numpy(), expected)


@pytest.mark.parametrize("name", ["q", "k", "v", "q_features", "k_features", "gate"])
def test_tensors_that_require_grad_raise_and_say_what_to_use(torch, name):
    data = build(Case(T=20, map="given", mixing="gated"))
    cache = new_cache(data)
    before = snapshot(cache)
    arrays = {n: torch.from_numpy(data.stored[n]) for n in ("q", "k", "v", "q_features", "k_features")}
    arrays["gate"] = torch.from_numpy(data.gate)
    arrays[name].requires_grad_(True)
    with pytest.raises((TypeError, ValueError, RuntimeError), match=rf"\b{name}\b(.|\n)*(detach|no_grad)"):
        lola.attention(cache=cache, **arrays)
    assert snapshot(cache) == before


def test_out_that_overlaps_a_tensor_raises(torch):
    data = build(Case(T=20, Dv=8))
    q = torch.from_numpy(data.stored["q"])
    with pytest.raises(ValueError, match="out"):
        call(data, new_cache(data), [q, *(torch.from_numpy(data.stored[n]) for n in "kv")], out=q)


def test_kinds_may_not_mix_silently(torch):
    """A tensor among arrays works or raises; it never gives a wrong result."""
    data = build(Case(T=20))
    expected = call(data, new_cache(data))
    try:
        got = call(data, new_cache(data), [torch.from_numpy(data.stored["q"]), data.stored["k"], data.stored["v"]])
    except TypeError:
        return
    assert_same_bits(np.asarray(got), expected)


def test_results_of_calls_do_not_share_memory(isa):
    data = build(Case(T=20))
    cache = new_cache(data)
    first = run(data, cache, 0, 10)
    kept = first.copy()
    run(data, cache, 10, 20)
    assert_same_bits(first, kept)


# ----------------------------------------------------------------------------------- the package

def python(code, **environment):
    import os
    import pathlib
    where = str(pathlib.Path(lola.__file__).parent.parent)
    environment = {**os.environ, "PYTHONPATH": where + os.pathsep + os.environ.get("PYTHONPATH", ""), **environment}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=60)


def test_import_needs_neither_torch_nor_ml_dtypes():
    code = "import sys; import lola; print([m for m in ('torch', 'ml_dtypes', 'transformers') if m in sys.modules])"
    done = python(code)
    assert done.stdout.strip() == "[]", done.stderr


def test_it_works_where_torch_and_ml_dtypes_are_absent():
    done = python("""
import sys
sys.modules["torch"] = sys.modules["ml_dtypes"] = None
import numpy as np, lola
q, k, v = np.random.default_rng(0).normal(size=(3, 1, 50, 2, 8)).astype("f")
out = lola.attention(q, k, v, config=lola.Config(window=4, chunk=2, sparse=3), feature_map=lola.EluPlusOne())
print(out.shape)""")
    assert done.stdout.strip() == "(1, 50, 2, 8)", done.stderr


def test_the_isa_can_be_forced_and_fails_loudly():
    for name in lola._lola.available_isas():
        done = python("import lola; print(lola._lola.isa())", LOLA_ISA=name)
        assert done.stdout.strip() == name, done.stderr
    absent = [n for n in ("scalar", "avx2", "avx512", "neon") if n not in lola._lola.available_isas()]
    for name in absent + ["sse9"]:
        done = python("import lola", LOLA_ISA=name)
        assert done.returncode != 0 and name in done.stderr and "LOLA_ISA" in done.stderr
        with pytest.raises(ValueError, match=name):
            lola._lola.set_isa(name)


def test_instruction_sets_agree():
    """Not bit for bit, but each within the bound of the oracle on its own history; here: of each other."""
    data = build(Case(T=60, sparse=0, mixing="lolcats"))
    before, outs = lola._lola.isa(), []
    try:
        for name in lola._lola.available_isas():
            lola._lola.set_isa(name)
            outs.append(run(data, new_cache(data)))
    finally:
        lola._lola.set_isa(before)
    for out in outs:
        assert_close(out, outs[0].astype(np.float64), 4e-5)


def test_scalar_is_always_there():
    assert "scalar" in lola._lola.available_isas() and lola._lola.isa() in lola._lola.available_isas()


def test_rounded_weights_are_taken_at_their_stored_value(isa, dtype):
    """Weights and gates in 16 bits equal the same values in float32."""
    data = build(Case(T=60, mixing="gated"))
    for store in (data.weights, ):
        for n in store:
            store[n] = store[n].astype(DTYPES[dtype])
    m16 = lola_map(data)
    data.weights = {n: w.astype(np.float32) for n, w in data.weights.items()}
    assert_same_bits(call(data, new_cache(data), feature_map=m16), call(data, new_cache(data)))


def test_pieces_of_different_kinds_of_calls_mix(isa):
    """A padded prefill, a packed continuation and plain decoding fill one cache."""
    data = build(Case(B=2, T=60))
    plain, cache = new_cache(data), new_cache(data)
    expected = run_pieces(data, plain, [])
    run(data, cache, 0, 20)
    middle = data.at(t=slice(20, 50))
    row = data.at()
    row.stored = {n: x.reshape(1, 60, *x.shape[2:]) for n, x in middle.stored.items()}
    run(row, cache, cu_seqlens=np.array([0, 30, 60]))
    got = run_pieces(data.at(t=slice(50, 60)), cache, range(10))
    assert_same_memory(cache, plain, 4)
    assert_close(got, expected[:, 50:].astype(np.float64), 4e-5)
    assert contents(cache, 4).keys() == contents(plain, 4).keys()
