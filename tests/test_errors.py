"""Every argument of the public functions in turn, wrong in kind, shape and value.

Proved here: TypeError for a wrong kind of object or dtype, ValueError for a wrong shape, value or combination; the message
names the argument; and a call that raises leaves each byte of the cache, and `out`, as they were.
"""

import lola
import numpy as np
import pytest

from oracle import Case, assert_same_bits, build, lola_map, new_cache, options, run, run_pieces, snapshot

CASE = Case(T=30, mixing="gated")


def arguments(data, lo=20, hi=30):
    part = data.at(t=slice(lo, hi))
    return {**{n: part.stored[n] for n in "qkv"}, **options(part)}


def assert_refused(data, cache, changes, kind, match):
    """The call with `changes` raises, writes nothing, and the cache works on as if it had never been made."""
    out = np.full(data.stored["q"][:, :10].shape[:3] + (data.case.Dv,), 7, np.float32)
    before = snapshot(cache)
    given = {**arguments(data), "cache": cache, "out": out, **changes}
    with pytest.raises(kind, match=match):
        lola.attention(given.pop("q"), given.pop("k"), given.pop("v"), **given)
    assert snapshot(cache) == before
    assert (out == 7).all()


def bad_arrays():
    """(name, what, change of the good array, exception)."""
    for name in ("q", "k", "v", "gate", "q_features", "k_features", "scores", "starts", "stops", "cu_seqlens"):
        index = name in ("starts", "stops", "cu_seqlens")
        yield name, "text", lambda x: "text", TypeError
        yield name, "a number", lambda x: 3, (TypeError, ValueError)
        yield name, "an object", lambda x: object(), TypeError
        yield name, "complex", lambda x: np.asarray(x).astype(np.complex64), TypeError
        yield name, "objects", lambda x: np.asarray(x).astype(object), TypeError
        yield name, "a wrong dtype", lambda x, wrong=np.float32 if index else np.int64: x.astype(wrong), TypeError
        yield name, "booleans", lambda x: np.asarray(x).astype(bool), TypeError
        yield name, "one axis more", lambda x: x[..., None], ValueError
        yield name, "one axis less", lambda x: np.asarray(x[0]), ValueError
        yield name, "a longer last axis", lambda x: np.concatenate([x, x[..., :1]], axis=-1), ValueError
        if name in ("q", "k", "v", "q_features", "k_features", "scores"):
            yield name, "a row more", lambda x: np.concatenate([x, x[:1]]), ValueError
            yield name, "a row less", lambda x: x[:1], ValueError
            yield name, "a token more", lambda x: np.concatenate([x, x[:, :1]], axis=1), ValueError
            yield name, "a head more", lambda x: np.concatenate([x, x[:, :, :1]], axis=2), ValueError
            yield name, "no head", lambda x: x[:, :, :0], ValueError
            yield name, "a NaN", lambda x: poisoned(x, np.nan), ValueError
            yield name, "an infinity", lambda x: poisoned(x, -np.inf), ValueError
        if name in ("q", "k", "v"):
            yield name, "float64", lambda x: x.astype(np.float64), TypeError
            yield name, "another float", lambda x: x.astype(np.float16), (TypeError, ValueError)


def poisoned(x, value):
    x = x.copy()
    x.reshape(-1)[-1] = value
    return x


@pytest.mark.parametrize("name, change, kind", [
    pytest.param(name, change, kind, id=f"{name}: {what}") for name, what, change, kind in bad_arrays()])
def test_wrong_arrays(name, change, kind):
    case = CASE.but(map="given" if name.endswith("features") else "hedgehog",
                    score="external" if name == "scores" else "self_recall")
    data = build(case)
    cache = new_cache(data)
    run(data, cache, 0, 20)
    changes = {}
    if name == "cu_seqlens":
        good = np.array([0, 4, 10])
        changes = {n: x[:1] for n, x in arguments(data).items() if n in "qkv"}
        changes["out"] = None
    elif name in ("starts", "stops"):
        good = np.array([3, 5])
    else:
        good = arguments(data)[name]
    # Where two arrays disagree about a size, either may be named.
    bad = change(good)
    disagree = isinstance(bad, np.ndarray) and bad.ndim == good.ndim > 2 and bad.shape != good.shape
    match = r"\b(q|k|v|q_features|k_features|scores)\b" if disagree else rf"\b{name}\b"
    assert_refused(data, cache, {**changes, name: bad}, kind, match)


@pytest.mark.parametrize("changes, kind, match", [
    (dict(cache="cache"), TypeError, "cache"),
    (dict(cache={}), TypeError, "cache"),
    (dict(config=lola.Config()), ValueError, "config"),
    (dict(config="config"), (TypeError, ValueError), "config"),
    (dict(feature_map=None), ValueError, "feature_map"),
    (dict(feature_map="hedgehog"), TypeError, "feature_map"),
    (dict(feature_map=lola.EluPlusOne()), ValueError, "feature_map"),
    (dict(gate=None), ValueError, "gate"),
    (dict(gate=np.float32([0.5, 0.5, 0, 0.5])), ValueError, "gate"),
    (dict(gate=np.float32([0.5, 0.5, 1, 0.5])), ValueError, "gate"),
    (dict(gate=np.float32([0.5, 0.5, -1, 0.5])), ValueError, "gate"),
    (dict(gate=np.float32([0.5, 0.5, np.nan, 0.5])), ValueError, "gate"),
    (dict(gate=np.float32([0.5, 0.4, 0.3, 0.2])), ValueError, "gate"),              # bound by the first call
    (dict(scores=np.ones((2, 10, 4), np.float32)), ValueError, "scores"),
    (dict(q_features=np.ones((2, 10, 4, 12), np.float32)), ValueError, "feature"),
    (dict(q_features=np.ones((2, 10, 4, 12), np.float32), k_features=np.ones((2, 10, 4, 12), np.float32)), ValueError,
     "feature"),
    (dict(feature_map=None, q_features=np.ones((2, 10, 4, 12), np.float32),
          k_features=np.ones((2, 10, 4, 12), np.float32)), ValueError, "feature"),
    (dict(starts=np.array([-1, 0])), ValueError, "starts"),
    (dict(starts=np.array([0, 11])), ValueError, "starts"),
    (dict(stops=np.array([0, 11])), ValueError, "stops"),
    (dict(stops=np.array([-1, 3])), ValueError, "stops"),
    (dict(starts=np.array([5, 0]), stops=np.array([4, 3])), ValueError, "starts|stops"),
    (dict(starts=np.array([2 ** 62, 0])), ValueError, "starts"),
    (dict(cu_seqlens=np.array([0, 4, 10])), ValueError, "cu_seqlens"),              # two rows given
    (dict(device=3), TypeError, "device"),
    (dict(device="tpu"), ValueError, "device"),
    (dict(check="yes"), TypeError, "check"),
])
def test_wrong_values_and_combinations(changes, kind, match):
    data = build(CASE)
    cache = new_cache(data)
    run(data, cache, 0, 20)
    assert_refused(data, cache, changes, kind, match)
    assert_same_bits(run(data, cache, 20), run_pieces(data, new_cache(data), [20])[:, 20:])


@pytest.mark.parametrize("cu", [[1, 4, 10], [0, 4, 9], [0, 4, 11], [0, 7, 4], [0, -1, 10], [0, 10], [0, 3, 5, 10], []])
def test_wrong_cu_seqlens(cu):
    data = build(CASE)
    cache = new_cache(data)
    run(data, cache, 0, 20)
    packed = {n: x[:1] for n, x in arguments(data).items() if n in "qkv"}
    assert_refused(data, cache, {**packed, "out": None, "cu_seqlens": np.array(cu, np.int64)}, ValueError, "cu_seqlens")


@pytest.mark.parametrize("other", ["starts", "stops"])
def test_cu_seqlens_excludes_starts_and_stops(other):
    data = build(CASE)
    cache = new_cache(data)
    packed = {n: x[:1] for n, x in arguments(data).items() if n in "qkv"}
    assert_refused(data, cache, {**packed, "out": None, "cu_seqlens": np.array([0, 4, 10]), other: np.array([0, 1])},
                   ValueError, "cu_seqlens")


def test_unknown_arguments():
    data = build(CASE)
    with pytest.raises(TypeError):
        lola.attention(**arguments(data), cache=new_cache(data), windows=3)
    with pytest.raises(TypeError):
        lola.attention(data.stored["q"], data.stored["k"], cache=new_cache(data))
    with pytest.raises(TypeError):
        lola.attention(*(data.stored[n] for n in "qkv"), new_cache(data))


@pytest.mark.parametrize("where", ["first", "middle", "last"])
@pytest.mark.parametrize("name", ["q", "k", "v", "q_features", "k_features", "scores"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_non_finite_tokens_raise(isa, dtype, name, value, where):
    """Wherever it stands, even in a token that a long call would reach late."""
    case = Case(T=300, map="given" if name.endswith("features") else "hedgehog", dtype=dtype,
                score="external" if name == "scores" else "self_recall")
    data = build(case)
    cache = new_cache(data)
    run(data, cache, 0, 20)
    before = snapshot(cache)
    part = data.at(t=slice(20, 300))
    part.stored[name] = part.stored[name].copy()
    place = {"first": 0, "middle": part.stored[name].size // 2 + 1, "last": part.stored[name].size - 1}[where]
    part.stored[name].reshape(-1)[place] = value
    with pytest.raises(ValueError, match=rf"\b{name}\b"):
        run(part, cache)
    assert snapshot(cache) == before


def test_check_false_skips_the_look_for_non_finite_values():
    data = build(Case(T=20))
    data.stored["q"][0, 5, 0, 0] = np.nan
    out = run(data, new_cache(data), check=False)
    assert np.isfinite(out[1]).all() and np.isfinite(out[0, :5]).all()


def test_negative_features_raise():
    data = build(Case(T=20, map="given"))
    for name in ("q_features", "k_features"):
        cache = new_cache(data)
        bad = build(data.case)
        bad.stored[name][0, 3, 1, 2] = -1
        with pytest.raises(ValueError, match=name):
            run(bad, cache)


# ----------------------------------------------------------------------------------- a cache goes one way for life

@pytest.mark.parametrize("change, match", [
    (dict(map="given"), "feature"), (dict(map="relu_w", F=12), "feature_map"), (dict(map="hedgehog_exp"), "feature_map"),
    (dict(seed=5), "feature_map|gate"), (dict(dtype="float16"), "dtype|float32|float16"), (dict(Hq=2), "q|heads"),
    (dict(Hkv=1), "k|heads"), (dict(D=16), "q|k|head_dim"), (dict(Dv=8), "v|value_dim"), (dict(F=24), "feature"),
    (dict(B=3), "q|rows|batch"),
])
def test_a_differing_later_call_raises(change, match):
    data = build(CASE)
    cache = new_cache(data)
    run(data, cache, 0, 20)
    before = snapshot(cache)
    with pytest.raises((TypeError, ValueError), match=match):
        run(build(CASE.but(**change)), cache, 20, 30)
    assert snapshot(cache) == before


def test_a_later_call_without_the_gate_raises():
    data = build(CASE.but(mixing=None))
    data.gate = np.full(4, 0.5, np.float32)
    cache = new_cache(data)
    run(data, cache, 0, 20)
    before = snapshot(cache)
    data.gate = None
    with pytest.raises(ValueError, match="gate|mixing"):
        run(data, cache, 20, 30)
    assert snapshot(cache) == before


def test_an_equal_map_in_another_object_is_the_same_map():
    data = build(CASE)
    cache = new_cache(data)
    run(data, cache, 0, 20)
    run(build(CASE), cache, 20, 30)


# ----------------------------------------------------------------------------------- config, cache, feature maps

@pytest.mark.parametrize("name, value, kind", [
    ("window", 0, ValueError), ("window", -64, ValueError), ("window", 63, ValueError), ("window", 2.5, TypeError),
    ("window", "64", TypeError), ("window", None, TypeError), ("window", 2 ** 63, (ValueError, OverflowError)),
    ("window", True, TypeError),
    ("chunk", 0, ValueError), ("chunk", -1, ValueError), ("chunk", 128, ValueError), ("chunk", 48, ValueError),
    ("chunk", 1.0, TypeError), ("chunk", "1", TypeError),
    ("sparse", -1, ValueError), ("sparse", 1.5, TypeError), ("sparse", None, TypeError),
    ("sparse", 2 ** 63, (ValueError, OverflowError)),
    ("mixing", "other", ValueError), ("mixing", 3, TypeError),
    ("score", "other", ValueError), ("score", None, TypeError),
    ("sparse_per", "head", ValueError), ("sparse_per", 1, TypeError),
    ("scale", 0.0, ValueError), ("scale", -1.0, ValueError), ("scale", float("nan"), ValueError),
    ("scale", float("inf"), ValueError), ("scale", "1", TypeError),
    ("seed", 1.5, TypeError), ("seed", "0", TypeError),
])
def test_wrong_configs(name, value, kind):
    with pytest.raises(kind, match=name):
        lola.Config(**{name: value})


def test_a_config_is_a_value():
    config = lola.Config(window=128, sparse=7)
    assert config == lola.Config(window=128, sparse=7) != lola.Config(window=128, sparse=8)
    assert "window=128" in repr(config) and hash(config) == hash(lola.Config(window=128, sparse=7))
    assert (config.window, config.chunk, config.sparse, config.mixing, config.score, config.sparse_per, config.scale,
            config.seed) == (128, 64, 7, None, "self_recall", "query_head", None, 0)
    with pytest.raises(AttributeError):
        config.window = 64
    with pytest.raises(TypeError):
        lola.Config(windows=3)
    assert lola.Config(window=np.int64(64), sparse=np.int32(3)).sparse == 3


GOOD = dict(batch=2, heads=4, kv_heads=2, head_dim=8, value_dim=6, feature_dim=12, dtype="float32", device="cpu")


@pytest.mark.parametrize("name, value, kind", [
    ("config", None, TypeError), ("config", "config", TypeError),
    *((name, bad, kind) for name in ("batch", "heads", "kv_heads", "head_dim", "value_dim", "feature_dim")
      for bad, kind in ((-1, ValueError), (1.5, TypeError), ("1", TypeError))),
    *((name, None, TypeError) for name in ("batch", "heads", "head_dim", "feature_dim")),
    *((name, 0, ValueError) for name in ("heads", "kv_heads", "head_dim", "value_dim", "feature_dim")),
    ("heads", 3, ValueError), ("kv_heads", 8, ValueError),
    ("dtype", "float64", (TypeError, ValueError)), ("dtype", "int8", (TypeError, ValueError)), ("dtype", 3, TypeError),
    ("device", "tpu", ValueError), ("device", 3, TypeError),
])
def test_wrong_caches(name, value, kind):
    good = {"config": lola.Config(), **GOOD}
    lola.Cache(good.pop("config"), **good)
    bad = {"config": lola.Config(), **GOOD, name: value}
    with pytest.raises(kind, match=name.replace("kv_", "(kv_)?")):
        lola.Cache(bad.pop("config"), **bad)


@pytest.mark.parametrize("name", ["heads", "head_dim", "feature_dim"])
def test_a_cache_must_be_told_its_sizes(name):
    with pytest.raises(TypeError, match=name):
        lola.Cache(lola.Config(), **{n: x for n, x in GOOD.items() if n != name})


@pytest.mark.parametrize("changes", [
    dict(batch=2 ** 40), dict(batch=2 ** 62), dict(feature_dim=2 ** 31, value_dim=2 ** 31), dict(head_dim=2 ** 40),
    dict(heads=2 ** 40, kv_heads=1), dict(heads=2 ** 61, kv_heads=2 ** 61), dict(batch=2 ** 32, head_dim=2 ** 32)])
def test_sizes_that_overflow_raise(changes):
    with pytest.raises((MemoryError, ValueError, OverflowError)):
        lola.Cache(lola.Config(), **{**GOOD, **changes})


def test_windows_and_sets_that_overflow_raise():
    for changes in (dict(window=2 ** 50, chunk=1), dict(window=2 ** 50, chunk=2 ** 50), dict(sparse=2 ** 50)):
        with pytest.raises((MemoryError, ValueError, OverflowError)):
            lola.Cache(lola.Config(**changes), **GOOD)


@pytest.mark.parametrize("kind", ["Hedgehog", "HedgehogExp", "Relu"])
@pytest.mark.parametrize("bad, error", [
    ("text", TypeError), (3, TypeError), (np.ones((4, 8, 6), np.int64), TypeError), (np.ones((4, 8), np.float32), ValueError),
    (np.ones((4, 8, 5), np.float32), ValueError), (np.ones((3, 8, 6), np.float32), ValueError),
    (np.full((4, 8, 6), np.nan, np.float32), ValueError), (np.ones((4, 8, 0), np.float32), ValueError)])
def test_wrong_feature_maps(kind, bad, error):
    good = np.ones((4, 8, 6), np.float32)
    make = getattr(lola, kind)
    make(good, good)
    for wrong in (dict(w_q=bad, w_k=good), dict(w_q=good, w_k=bad)):
        with pytest.raises(error, match="w_q|w_k"):
            make(**wrong)


def test_relu_takes_both_weights_or_none():
    w = np.ones((4, 8, 6), np.float32)
    lola.Relu()
    with pytest.raises((TypeError, ValueError), match="w_k|w_q"):
        lola.Relu(w)


@pytest.mark.parametrize("map", [
    lola.Hedgehog(*[np.ones((4, 8, 5), np.float32)] * 2), lola.Hedgehog(*[np.ones((4, 7, 6), np.float32)] * 2),
    lola.Hedgehog(*[np.ones((2, 8, 6), np.float32)] * 2), lola.EluPlusOne(), lola.Relu()],
    ids=["F", "D", "Hq", "elu", "relu"])
def test_a_feature_map_of_another_size_raises(map):
    data = build(CASE)
    cache = new_cache(data)
    assert_refused(data, cache, dict(feature_map=map), ValueError, "feature_map|feature_dim")


def test_weights_are_not_aliased(isa):
    """Changing the caller's arrays, or the gate, afterwards changes no later call unless it raises."""
    data = build(CASE)
    expected = run_pieces(data, new_cache(data), [15])
    m, cache = lola_map(data), new_cache(data)
    part = data.at(t=slice(0, 15))
    given = {**arguments(part, 0, 15), "feature_map": m}
    first = lola.attention(given.pop("q"), given.pop("k"), given.pop("v"), cache=cache, **given)
    for w in data.weights.values():
        w[:] = 99
    given = {**arguments(data, 15, 30), "feature_map": m}
    second = lola.attention(given.pop("q"), given.pop("k"), given.pop("v"), cache=cache, **given)
    assert_same_bits(np.concatenate([first, second], axis=1), expected)


@pytest.mark.parametrize("bad, kind", [
    (0, ValueError), (-1, ValueError), (1.5, TypeError), ("2", TypeError), (None, TypeError)])
def test_wrong_numbers_of_threads(bad, kind):
    before = lola.get_num_threads()
    with pytest.raises(kind):
        lola.set_num_threads(bad)
    assert lola.get_num_threads() == before
