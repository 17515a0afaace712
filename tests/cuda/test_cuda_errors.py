"""Wrong arguments on the device: the CPU's own tests with NumPy arrays beside a cache there, and those that only devices have.

Proved here: the same exceptions with the same names; arrays on different devices, tensors beside NumPy arrays and wrong
dtypes are refused or read rightly; check=True finds what is not finite; and a call that raises leaves each byte of the
cache, and `out`, as they were.
"""

import numpy as np
import pytest

import lola
from oracle import DTYPES, Case, assert_same_bits, build, new_cache, options, run, run_pieces, snapshot
from places import DEVICE, array, only_on_cuda, tensor
from test_errors import (                                             # noqa: F401
    bad_arrays, test_a_differing_later_call_raises, test_a_later_call_without_the_gate_raises,
    test_an_equal_map_in_another_object_is_the_same_map, test_cu_seqlens_excludes_starts_and_stops, test_unknown_arguments,
    test_weights_are_not_aliased, test_wrong_cu_seqlens)
from test_errors import test_wrong_arrays as _wrong_arrays
from test_kernels import test_wrong_arguments_raise_and_say_which     # noqa: F401

ARRAYS = "numpy"
CASE = Case(T=30, mixing="gated")

# Whether values are finite is asked with check=True alone.
_of_shape = [(name, what, change, kind) for name, what, change, kind in bad_arrays() if what not in ("a NaN", "an infinity")]


@pytest.mark.parametrize("name, change, kind", [
    pytest.param(name, change, kind, id=f"{name}: {what}") for name, what, change, kind in _of_shape])
def test_wrong_numpy_arrays(name, change, kind):
    _wrong_arrays(name, change, kind)


def prepared(case=CASE, at=20):
    data = build(case)
    cache = new_cache(data)
    run(data, cache, 0, at)
    return data, cache


def arguments(data, lo=20, hi=30):
    part = data.at(t=slice(lo, hi))
    given = {**{n: tensor(part.stored[n]) for n in "qkv"}, **options(part)}
    return {n: tensor(x) if isinstance(x, np.ndarray) else x for n, x in given.items()}


def assert_refused(data, cache, changes, kind, match):
    """The call with `changes` raises, writes nothing, and the cache works on as if it had never been made."""
    out = tensor(np.full(data.stored["q"][:, :10].shape[:3] + (data.case.Dv,), 7, DTYPES[data.case.dtype]))
    before = snapshot(cache)
    given = {**arguments(data), "cache": cache, "out": out, **changes}
    with pytest.raises(kind, match=match):
        lola.attention(given.pop("q"), given.pop("k"), given.pop("v"), **given)
    assert snapshot(cache) == before
    assert (array(out) == 7).all()


def tensors_changed():
    import torch
    for name in ("q", "k", "v", "q_features", "k_features", "scores"):
        if name in "qkv":
            yield name, "float64", lambda x: x.double(), TypeError
            yield name, "another float", lambda x: x.half(), (TypeError, ValueError)
        yield name, "int32", lambda x: x.int(), TypeError
        yield name, "bool", lambda x: x.bool(), TypeError
        yield name, "complex", lambda x: x.to(torch.complex64), TypeError
        yield name, "an axis more", lambda x: x[..., None], ValueError
        yield name, "a row less", lambda x: x[:1], ValueError
        yield name, "a token more", lambda x: torch.cat([x, x[:, :1]], 1), ValueError
        yield name, "no head", lambda x: x[:, :, :0], ValueError
        yield name, "a longer last axis", lambda x: torch.cat([x, x[..., :1]], -1), ValueError
        yield name, "a gradient", lambda x: x.clone().requires_grad_(), (TypeError, ValueError, RuntimeError)
        if name != "scores":
            yield name, "a strided last axis", lambda x: x.repeat_interleave(2, -1)[..., ::2], ValueError
    yield "gate", "float64 of a wrong size", lambda x: x.double()[:2], ValueError
    yield "gate", "integers", lambda x: x.int(), TypeError


def tensor_cases():
    try:
        return [pytest.param(name, change, kind, id=f"{name}: {what}") for name, what, change, kind in tensors_changed()]
    except ImportError:
        return []


@pytest.mark.parametrize("name, change, kind", tensor_cases())
def test_wrong_tensors(name, change, kind):
    data, cache = prepared(CASE.but(map="given" if name.endswith("features") else "hedgehog",
                                    score="external" if name == "scores" else "self_recall"))
    good = arguments(data)[name]
    bad = change(good)
    disagree = bad.shape != good.shape and bad.dim() == good.dim() > 2
    match = r"\b(q|k|v|q_features|k_features|scores)\b" if disagree else rf"\b{name}\b"
    assert_refused(data, cache, {name: bad}, kind, match)
    assert_same_bits(run(data, cache, 20), run_pieces(data, new_cache(data), [20])[:, 20:])


@pytest.mark.parametrize("changes, kind, match", [
    (dict(gate=None), ValueError, "gate"),
    (dict(feature_map=None), ValueError, "feature_map"),
    (dict(feature_map=lola.EluPlusOne()), ValueError, "feature_map"),
    (dict(config=lola.Config()), ValueError, "config"),
    (dict(starts=np.array([-1, 0])), ValueError, "starts"),
    (dict(stops=np.array([0, 11])), ValueError, "stops"),
    (dict(starts=np.array([5, 0]), stops=np.array([4, 3])), ValueError, "starts|stops"),
    (dict(starts=np.array([0.0, 1.0])), TypeError, "starts"),
    (dict(cu_seqlens=np.array([0, 4, 10])), ValueError, "cu_seqlens"),
    (dict(device=3.5), TypeError, "device"),
    (dict(device="tpu"), ValueError, "device"),
    (dict(check="yes"), TypeError, "check"),
    (dict(out="out"), TypeError, "out"),
])
def test_wrong_values_beside_tensors(changes, kind, match):
    data, cache = prepared()
    assert_refused(data, cache, changes, kind, match)


@pytest.mark.parametrize("bad", [
    lambda t, x: t.empty(2, 10, 4, 5, device=x.device), lambda t, x: t.empty(2, 10, 4, device=x.device),
    lambda t, x: t.empty(2, 10, 4, 6, device=x.device, dtype=t.float64),
    lambda t, x: t.empty(1, 10, 4, 6, device=x.device).expand(2, -1, -1, -1),
    lambda t, x: t.empty(2, 10, 4, 12, device=x.device)[..., ::2], lambda t, x: np.empty((2, 10, 4, 6), np.float32),
    lambda t, x: t.empty(2, 10, 4, 6)], ids=["size", "axes", "dtype", "overlapping", "strided", "NumPy", "on the CPU"])
def test_wrong_outs(bad):
    import torch
    data, cache = prepared()
    before = snapshot(cache)
    given = arguments(data)
    out = bad(torch, given["q"])
    if DEVICE == "cpu" and out.shape == (2, 10, 4, 6) and getattr(out, "dtype", None) in (torch.float32, np.float32):
        pytest.skip("right on the CPU")
    with pytest.raises((TypeError, ValueError), match=r"\bout\b"):
        lola.attention(**given, cache=cache, out=out)
    assert snapshot(cache) == before


@pytest.mark.parametrize("name", ["q", "k", "v", "q_features"])
def test_out_that_overlaps_an_input_raises(name):
    data, cache = prepared(Case(T=30, Dv=8, map="given", F=8))
    before = snapshot(cache)
    size = 2 * 10 * 4 * 8
    memory = tensor(np.zeros(2 * size, np.float32))
    given = arguments(data)
    x = given[name]
    place = memory[size - 1:][:x.numel()].view(x.shape)               # shares one number with out
    place.copy_(x)
    kept = memory.clone()
    with pytest.raises(ValueError, match="out"):
        lola.attention(**{**given, name: place}, cache=cache, out=memory[:size].view(2, 10, 4, 8))
    assert snapshot(cache) == before and (memory == kept).all()


# ----------------------------------------------------------------------------------- where arrays lie

@only_on_cuda
@pytest.mark.parametrize("name", ["q", "k", "v", "scores"])
def test_a_tensor_on_the_cpu_among_others(name):
    """Refused by name, or read rightly; never wrong."""
    data, cache = prepared(CASE.but(score="external"))
    expected = run(data, cache.copy(), 20)
    given = arguments(data)
    given[name] = given[name].cpu()
    before = snapshot(cache)
    try:
        out = lola.attention(**given, cache=cache)
    except (TypeError, ValueError) as error:
        assert "device" in str(error) or "cuda" in str(error).lower() or name in str(error)
        assert snapshot(cache) == before
    else:
        assert_same_bits(array(out), expected)


@only_on_cuda
def test_tensors_on_the_device_beside_a_cache_on_the_cpu():
    data = build(CASE)
    cache = lola.Cache(lola.Config(**CASE.config), batch=2, **CASE.sizes)
    before = {n: x.copy() for n, x in cache.buffers().items()}
    with pytest.raises((TypeError, ValueError), match="cpu|CPU|device"):
        lola.attention(**arguments(data, 0, 10), cache=cache)
    assert all(np.array_equal(x, before[n], equal_nan=True) for n, x in cache.buffers().items())


@only_on_cuda
def test_a_device_that_contradicts_the_cache_or_the_arrays():
    data, cache = prepared()
    assert_refused(data, cache, dict(device="cpu"), ValueError, "device")
    with pytest.raises(ValueError, match="device"):
        lola.attention(**arguments(data), config=lola.Config(**CASE.config), device="cpu")
    numpy = {n: data.stored[n] for n in "qkv"}
    with pytest.raises(ValueError, match="device"):
        lola.attention(**numpy, cache=cache.to("cpu"), device="cuda", **options(data))
    assert lola.attention(**numpy, cache=cache, device="cuda", **options(data)).shape == (2, 30, 4, 6)


@only_on_cuda
def test_steps_refuse_arrays_in_different_places():
    x = np.ones((1, 5, 2, 4), np.float32)
    fk, H, s = np.ones((1, 5, 2, 6), np.float32), np.ones((1, 2, 6, 4), np.float32), np.ones((1, 2, 6), np.float32)
    with pytest.raises((TypeError, ValueError), match=r"\b(v|H|s|fk|device)\b"):
        lola.kernels.score(tensor(fk), tensor(x, "cpu"), tensor(H), tensor(s))
    with pytest.raises((TypeError, ValueError), match=r"\b(H|s|fk|v|device)\b"):
        lola.kernels.fold(tensor(fk), tensor(x), tensor(H, "cpu"), tensor(s))
    with pytest.raises((TypeError, ValueError), match="device"):
        lola.kernels.score(tensor(fk), tensor(x), tensor(H), tensor(s), device="cpu")


# ----------------------------------------------------------------------------------- check

@pytest.mark.parametrize("where", ["first", "middle", "last"])
@pytest.mark.parametrize("name", ["q", "k", "v", "q_features", "k_features", "scores"])
@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_check_finds_what_is_not_finite(dtype, name, value, where):
    case = Case(T=300, map="given" if name.endswith("features") else "hedgehog", dtype=dtype,
                score="external" if name == "scores" else "self_recall")
    data, cache = prepared(case)
    given = arguments(data, 20, 300)
    bad = given[name] = given[name].clone()
    bad.view(-1)[{"first": 0, "middle": bad.numel() // 2 + 1, "last": bad.numel() - 1}[where]] = value
    before = snapshot(cache)
    with pytest.raises(ValueError, match=rf"\b{name}\b"):
        lola.attention(**given, cache=cache, check=True)
    assert snapshot(cache) == before


def test_check_finds_negative_features():
    data, cache = prepared(CASE.but(map="given"))
    for name in ("q_features", "k_features"):
        given = arguments(data)
        given[name] = given[name].clone()
        given[name][0, 3, 1, 2] = -1
        before = snapshot(cache)
        with pytest.raises(ValueError, match=name):
            lola.attention(**given, cache=cache, check=True)
        assert snapshot(cache) == before


def test_check_does_not_look_at_tokens_that_enter_no_row():
    data, cache = prepared()
    given = arguments(data)
    given["k"] = given["k"].clone()
    given["k"][0, 3:] = float("nan")
    out = lola.attention(**given, cache=cache, check=True, stops=np.array([3, 10]))
    assert np.isfinite(array(out)).all()


@only_on_cuda
def test_without_check_nothing_raises_and_other_rows_are_untouched():
    """What is not finite spoils its own row at most."""
    data, cache = prepared(CASE.but(B=3, T=60))
    given = arguments(data, 20, 60)
    expected = array(lola.attention(**given, cache=cache.copy()))
    given["v"] = given["v"].clone()
    given["v"][1, 5:] = float("nan")
    given["k"] = given["k"].clone()
    given["k"][1, 7] = float("inf")
    out = array(lola.attention(**given, cache=cache))
    assert_same_bits(out[[0, 2]], expected[[0, 2]])
    cache.sync()
    assert np.asarray(cache.tokens_seen).tolist() == [60] * 3


# ----------------------------------------------------------------------------------- what a device does not do

@only_on_cuda
def test_the_attention_score_is_refused_and_says_so():
    """It needs outputs before the next update; the CPU has it."""
    data = build(Case(T=30, score="attention"))
    with pytest.raises((ValueError, RuntimeError, NotImplementedError), match="attention"):
        run(data, new_cache(data))


@only_on_cuda
def test_windows_and_heads_of_unusual_size_work_or_say_what_to_pass():
    """Whatever cannot run is refused before anything is written; never a wrong result."""
    for case in (Case(B=1, T=9, D=520, Dv=8, window=4, chunk=2), Case(B=1, T=9, D=8, Dv=520, window=4, chunk=2),
                 Case(B=1, T=9, F=2048, window=4, chunk=2), Case(B=1, T=50, window=8, chunk=4, sparse=10 ** 6),
                 Case(B=1, T=9, Hq=66, Hkv=1, window=4, chunk=2), Case(B=1, T=40, window=4096, chunk=4096, sparse=3)):
        data = build(case)
        cache = new_cache(data)
        before = snapshot(cache)
        try:
            out = run(data, cache)
        except ValueError as error:
            assert len(str(error)) > 20
            assert snapshot(cache) == before
        else:
            expected = run(data, lola.Cache(lola.Config(**case.config), batch=1, **case.sizes))
            assert np.abs(out - expected).max() < 1e-3
