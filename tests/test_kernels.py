"""Each step of `lola.kernels` against the oracle's step of the same name, on every instruction set and dtype.

Proved here: features, score, fold and attend are within the contract's bounds and select is exact; features of 16-bit
arrays are bfloat16 values, off by rounding at most; invalid pairs are never read; a score's bits depend on its pair and
state alone; +0 and -0 are equal; and a short loop over the steps reproduces `lola.attention`.
"""

import lola
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cases import cases
from oracle import (DTYPES, MAPS, MIXINGS, Case, assert_close, assert_same_bits, build, error, float32_bound, host,
                    kernels, lola_map, new_cache, oracle_map, reference, replay, rms, rounding_bound, run)

SIZES = [(1, 1, 1, 1), (3, 5, 7, 9), (8, 8, 8, 8), (17, 16, 24, 33), (64, 64, 128, 100)]     # S, D, F, Dv


def state(rng, B, Hq, F, Dv, pairs=40):
    """What folding `pairs` pairs leaves, in float32."""
    fk, v = np.exp(rng.normal(size=(pairs, B, Hq, F))), rng.normal(size=(pairs, B, Hq, Dv))
    H = np.einsum("nbhf,nbhe->bhfe", fk, v).astype(np.float32)
    return H, fk.sum(axis=0).astype(np.float32)


def bfloat16_values(x):
    return reference.round_to_bfloat16(x).astype(np.float32)


# ----------------------------------------------------------------------------------------------------- features

@pytest.mark.parametrize("size", [1, 5, 16, 33, 64])
@pytest.mark.parametrize("map", [m for m in MAPS if m != "given"])
def test_features(isa, dtype, map, size):
    data = build(Case(D=size, F=2 * size, map=map, dtype=dtype))
    for side in "qk":
        x = data.stored[side]
        got = kernels.features(x, lola_map(data), side, 4)
        exact = reference.features(x, oracle_map(data), side, 4, sixteen_bit=False)
        assert got.dtype == np.float32 and got.shape == (2, 45, 4, data.case.feature_dim) and (got >= 0).all()
        # The error measure of section 8; the products here are those of x and W.
        w = np.abs(data.weights["w_" + side]).astype(np.float64) if data.weights else np.ones((4, 1, 1))
        wide = np.repeat(np.abs(x.astype(np.float64)), 4 // x.shape[2], axis=2)
        A = np.einsum("bthd,hdf->bthf", wide, w).max() if data.weights else wide.max()
        e = 2e-5 * max(1, A / 16)
        if dtype == "float32":
            assert error(got, exact) <= e
            continue
        # Rounded to nearest: only a value within float32's error of a rounding boundary may go either way.
        slack = e * (np.maximum(np.abs(exact), rms(exact)) if map == "relu_w" else np.abs(exact))
        low, high = (reference.round_to_bfloat16(np.maximum(exact + x, 0)) for x in (-slack, slack))
        assert (low <= got).all() and (got <= high).all()
        np.testing.assert_array_equal(got, bfloat16_values(got))
        assert (got == reference.round_to_bfloat16(exact)).mean() > 0.99 or map == "relu_w"


@pytest.mark.parametrize("map", ["hedgehog", "hedgehog_exp", "elu_plus_one", "relu_w"])
def test_features_of_extreme_values_are_finite(isa, map):
    data = build(Case(map=map))
    for factor in (1e4, 1e-30, 0):
        got = kernels.features(data.stored["q"] * np.float32(factor), lola_map(data), "q", 4)
        assert np.isfinite(got).all() and (got >= 0).all()
        if map != "elu_plus_one":
            assert got.min() >= np.float32(1e-12)


@pytest.mark.parametrize("map", ["hedgehog", "hedgehog_exp", "elu_plus_one", "relu", "relu_w"])
def test_features_do_not_depend_on_place(isa, dtype, map):
    """A cached key's features are recomputed elsewhere: same bits."""
    data = build(Case(map=map, dtype=dtype, D=24, F=24))
    k, m = data.stored["k"], lola_map(data)
    whole = kernels.features(k, m, "k", 4)
    for b, t in [(0, 0), (1, 3), (0, 44)]:
        assert_same_bits(kernels.features(k[b:b + 1, t:t + 1], m, "k", 4)[0, 0], whole[b, t])
    assert_same_bits(kernels.features(k[:, ::-1], m, "k", 4), whole[:, ::-1])


# -------------------------------------------------------------------------------------------------------- score

@pytest.mark.parametrize("sets", [1, 2, 4])
@pytest.mark.parametrize("S, D, F, Dv", SIZES)
def test_score(isa, dtype, rng, S, D, F, Dv, sets):
    H, s = state(rng, 2, 4, F, Dv)
    fk = bfloat16_values(np.exp(rng.normal(size=(2, S, 4, F))))
    v = rng.normal(size=(2, S, sets, Dv)).astype(DTYPES[dtype])
    got, exact = kernels.score(fk, v, H, s), reference.score(fk, v, H, s)
    assert got.dtype == np.float32 and got.shape == (2, S, 4)
    norms = np.repeat(np.square(v.astype(np.float64)).sum(axis=-1), 4 // sets, axis=-1)
    assert (np.abs(got - exact) <= 1e-5 * np.maximum(exact, norms)).all()
    assert lola.self_recall_error is lola.kernels.score


def test_score_of_an_empty_state_is_the_values_norm(isa, dtype, rng):
    v = rng.normal(size=(2, 9, 2, 17)).astype(DTYPES[dtype])
    fk = np.ones((2, 9, 4, 8), np.float32)
    got = kernels.score(fk, v, np.zeros((2, 4, 8, 17), np.float32), np.zeros((2, 4, 8), np.float32))
    exact = np.repeat(np.square(v.astype(np.float64)).sum(axis=-1), 2, axis=-1)
    np.testing.assert_allclose(got, exact, rtol=1e-6)


@pytest.mark.parametrize("F, Dv", [(7, 9), (24, 33), (128, 64)])
def test_score_bits_depend_on_pair_and_state_alone(isa, dtype, rng, F, Dv, threads):
    B, S = 3, 61
    H, s = state(rng, B, 4, F, Dv)
    fk, v = np.exp(rng.normal(size=(B, S, 4, F))).astype(np.float32), rng.normal(size=(B, S, 4, Dv)).astype(DTYPES[dtype])
    whole = kernels.score(fk, v, H, s)
    order = rng.permutation(S)
    assert_same_bits(kernels.score(fk[:, order], v[:, order], H, s), whole[:, order])
    for n in (1, 2, 5, 16, 60):
        assert_same_bits(kernels.score(fk[:, -n:], v[:, -n:], H, s), whole[:, -n:])
    assert_same_bits(kernels.score(fk[1:2, :, 2:3], v[1:2, :, 2:3], H[1:2, 2:3], s[1:2, 2:3]), whole[1:2, :, 2:3])
    threads(1)
    assert_same_bits(kernels.score(fk, v, H, s), whole)


# ------------------------------------------------------------------------------------------------------- select

@given(st.data())
def test_select(isa, draw):
    B, S, Hs = (draw.draw(st.integers(lo, hi)) for lo, hi in ((1, 3), (0, 70), (1, 4)))
    keep, seed = draw.draw(st.integers(0, S + 2)), draw.draw(st.integers(0, 99))
    rng = np.random.default_rng(seed)
    scores = draw.draw(st.sampled_from((
        rng.normal(size=(B, S, Hs)), rng.integers(-2, 3, size=(B, S, Hs)) * 1.0, np.zeros((B, S, Hs)),
        np.where(rng.random((B, S, Hs)) < 0.5, -0.0, 0.0)))).astype(np.float32)
    count = draw.draw(st.sampled_from((None, rng.integers(0, S + 1, size=(B, Hs)))))
    if count is not None:
        scores = np.where(np.arange(S)[:, None] < count[:, None, :], scores, np.float32(99))
    for got, exact in zip(kernels.select(scores, keep, count), reference.select(scores, keep, count)):
        assert got.dtype == np.int64
        np.testing.assert_array_equal(got, exact)


# --------------------------------------------------------------------------------------------------------- fold

@pytest.mark.parametrize("sets", [1, 2, 4])
@pytest.mark.parametrize("S, D, F, Dv", SIZES)
@pytest.mark.parametrize("counted", [False, True])
def test_fold(isa, dtype, rng, S, D, F, Dv, sets, counted):
    H, s = state(rng, 2, 4, F, Dv)
    fk = bfloat16_values(np.exp(rng.normal(size=(2, S, 4, F))))
    v = rng.normal(size=(2, S, sets, Dv)).astype(DTYPES[dtype])
    count = rng.integers(0, S + 1, size=(2, sets)) if counted else None
    if counted:
        invalid = np.arange(S)[:, None] >= count[:, None, :]
        v[invalid] = np.nan
        fk[np.repeat(invalid, 4 // sets, axis=2)] = np.nan
    exact = H.astype(np.float64), s.astype(np.float64)
    reference.fold(fk, v, *exact, count)
    assert kernels.fold(fk, v, H, s, count) is None
    assert error(H, exact[0]) <= 2e-5 and error(s, exact[1]) <= 2e-5


# ------------------------------------------------------------------------------------------------------- attend

@pytest.mark.parametrize("mixing", MIXINGS)
@pytest.mark.parametrize("sets", [1, 4])
@pytest.mark.parametrize("S, D, F, Dv", SIZES)
@pytest.mark.parametrize("T", [1, 6])
def test_attend(isa, dtype, rng, mixing, sets, S, D, F, Dv, T):
    def arrays(kind):
        rng = np.random.default_rng(1)
        q, k, v = (rng.normal(size=s) for s in ((2, T, 4, D), (2, S, sets, D), (2, S, sets, Dv)))
        return [x.astype(np.float32).astype(kind) for x in (q, k, v)]

    H, s = state(rng, 2, 4, F, Dv)
    fq = bfloat16_values(np.exp(rng.normal(size=(2, T, 4, F))))
    gate = rng.uniform(0.1, 0.9, size=4).astype(np.float32)
    for causal, count in [(False, None), (S >= T, None), (False, rng.integers(1, S + 1, size=(2, sets)))]:
        options = dict(fq=fq, H=H, s=s, gate=gate, mixing=mixing, causal=causal, count=count)
        q, k, v = arrays(DTYPES[dtype])
        exact = reference.attend(q, k, v, **options)
        limit = (float32_bound(q, np.repeat(k, 4 // sets, 2)) if dtype == "float32" else
                 rounding_bound(exact, reference.attend(*arrays(np.float32), **options), dtype))
        if count is not None:
            k[np.arange(S)[:, None] >= count[:, None, :]] = np.nan
            v[np.arange(S)[:, None] >= count[:, None, :]] = np.nan
        got = kernels.attend(q, k, v, **options)
        assert got.dtype == DTYPES[dtype]
        assert_close(got, exact, limit)


@pytest.mark.parametrize("logit", [1, 1e4])
def test_attend_without_a_state_is_softmax(isa, rng, logit):
    q, k, v = (rng.normal(size=(1, 33, 2, 16)).astype(np.float32) for _ in range(3))
    q *= np.float32(logit)
    assert_close(kernels.attend(q, k, v, causal=True, scale=0.5), reference.attend(q, k, v, causal=True, scale=0.5),
                 float32_bound(q, k, 0.5))


@pytest.mark.parametrize("mixing", ["paper", "gated", "lolcats"])
@pytest.mark.parametrize("share", [1e-30, 1e-3, 1e3, 1e30])
@pytest.mark.parametrize("logit", [-1e4, 0, 1e4])
def test_attend_with_a_state_of_any_weight(isa, rng, mixing, share, logit):
    """z from vanishing to overwhelming: the state is one more pair of the softmax and must not overflow it, even where
    every other logit is near -1e4 and the state alone answers."""
    q, k, v = (rng.normal(size=(1, 9, 2, 16)).astype(np.float32) for _ in range(3))
    if logit:
        q[..., 0], k[..., 0] = logit / 100, 400
    fq = np.exp(rng.normal(size=(1, 9, 2, 8))).astype(np.float32)
    H, s = state(rng, 1, 2, 8, 16)
    options = dict(fq=fq, H=H * np.float32(share), s=s * np.float32(share), gate=np.float32([0.2, 0.7]), mixing=mixing)
    assert_close(kernels.attend(q, k, v, **options), reference.attend(q, k, v, **options), float32_bound(q, k))


# ------------------------------------------------------------------------------------------- the steps together

def loop(q, k, v, m, config, gate=None):
    """lola.attention for whole rows, as a researcher would script it."""
    (B, T, Hq, D), (Hkv, Dv) = q.shape, v.shape[2:]
    Hs, W, C = Hq if config.sparse_per == "query_head" else Hkv, config.window, config.chunk
    mixing, steps = config.mixing or ("gated" if gate is not None else "paper"), kernels
    wide = lambda x: np.repeat(x, Hs // Hkv, axis=2)
    each = lambda i, x: np.take_along_axis(x, np.repeat(i, x.shape[2] // Hs, axis=2)[..., None], axis=1)
    fq, fk = steps.features(q, m, "q", Hq), steps.features(k, m, "k", Hq)
    H, s = np.zeros((B, Hq, fk.shape[3], Dv), np.float32), np.zeros((B, Hq, fk.shape[3]), np.float32)
    G, outs = [x[:, :0] for x in (wide(k), wide(v), fk)], []
    for t in range(0, T, C):
        leave = slice(t - W - C, t - W)
        if leave.start >= 0:
            G = [np.concatenate([old, new[:, leave]], axis=1) for old, new in zip(G, (wide(k), wide(v), fk))]
            if G[0].shape[1] > config.sparse:
                scores = steps.score(G[2], G[1], H, s).reshape(B, G[0].shape[1], Hs, -1).sum(axis=-1)
                kept, dropped = (i.transpose(0, 2, 1) for i in steps.select(scores, config.sparse))
                steps.fold(each(dropped, G[2]), each(dropped, G[1]), H, s)
                G = [each(kept, x) for x in G]
        now, near = slice(t, t + C), slice(max(0, t - W), t + C)
        keys, values = (np.concatenate([g, wide(x)[:, near]], axis=1) for g, x in zip(G, (k, v)))
        outs.append(steps.attend(q[:, now], keys, values, fq[:, now], H, s, gate, mixing, config.scale, causal=True))
    return np.concatenate(outs, axis=1), H, s


@pytest.mark.parametrize("sparse_per", ["query_head", "kv_head"])
@pytest.mark.parametrize("mixing", MIXINGS)
def test_a_short_loop_reproduces_attention(isa, dtype, mixing, sparse_per):
    data = build(Case(T=70, D=16, mixing=mixing, sparse_per=sparse_per, dtype=dtype))
    played = replay(data)
    config = lola.Config(**data.case.config)
    out, H, s = loop(*(data.stored[n] for n in "qkv"), lola_map(data), config, data.gate)
    assert_close(out, played.exact, played.bound)
    cache = new_cache(data)
    assert_close(run(data, cache), played.exact, played.bound)
    assert error(H, host(cache.hidden).astype(np.float64)) <= 2e-5
    assert error(s, host(cache.normalizer).astype(np.float64)) <= 2e-5


@given(cases(scores=("self_recall",), maps=("hedgehog", "elu_plus_one")))
def test_the_loop_and_attention_agree_on_odd_shapes(isa, case):
    data = build(case)
    exact = replay(data)
    out, _, _ = loop(*(data.stored[n] for n in "qkv"), lola_map(data), lola.Config(**case.config), data.gate)
    assert_close(out, exact.exact, exact.bound)


# -------------------------------------------------------------------------------------------------- wrong input

def kernel_arguments(rng):
    x = lambda *shape: np.exp(rng.normal(size=shape)).astype(np.float32)
    m = lola.Hedgehog(x(4, 8, 6), x(4, 8, 6))
    return {
        "features": dict(x=x(2, 5, 2, 8), feature_map=m, side="k", heads=4),
        "score": dict(fk=x(2, 5, 4, 12), v=x(2, 5, 2, 6), H=x(2, 4, 12, 6), s=x(2, 4, 12)),
        "select": dict(scores=x(2, 5, 4), keep=3, count=np.full((2, 4), 5)),
        "fold": dict(fk=x(2, 5, 4, 12), v=x(2, 5, 2, 6), H=x(2, 4, 12, 6), s=x(2, 4, 12), count=np.full((2, 2), 5)),
        "attend": dict(q=x(2, 3, 4, 8), k=x(2, 5, 2, 8), v=x(2, 5, 2, 6), fq=x(2, 3, 4, 12), H=x(2, 4, 12, 6),
                       s=x(2, 4, 12), gate=np.full(4, 0.5, np.float32), mixing="gated", scale=0.3, causal=True,
                       count=np.full((2, 2), 5)),
    }


def wrong_arguments():
    arrays = ("x", "fk", "v", "H", "s", "scores", "q", "k", "fq", "gate", "count")
    for step, names in kernel_arguments(np.random.default_rng(0)).items():
        for name, good in names.items():
            if name in arrays:
                yield step, name, "text", TypeError
                yield step, name, good.astype(np.complex64), TypeError
                yield step, name, good[..., None], ValueError
                yield step, name, np.concatenate([good, good], axis=-1), ValueError
    yield "features", "feature_map", 3, TypeError
    yield "features", "side", "v", ValueError
    yield "features", "side", 3, TypeError
    yield "features", "heads", 0, ValueError
    yield "features", "heads", 3, ValueError
    yield "features", "heads", 2.5, TypeError
    yield "select", "keep", -1, ValueError
    yield "select", "keep", 1.5, TypeError
    yield "select", "count", np.full((2, 4), 6), ValueError
    yield "fold", "count", np.full((2, 2), -1), ValueError
    yield "attend", "mixing", "other", ValueError
    yield "attend", "mixing", 3, TypeError
    yield "attend", "gate", None, ValueError
    yield "attend", "gate", np.full(4, 1.5, np.float32), ValueError
    yield "attend", "scale", "wide", TypeError
    yield "attend", "scale", float("nan"), ValueError


@pytest.mark.parametrize("step, name, bad, kind", [
    pytest.param(*w, id=f"{w[0]}-{w[1]}-{i}") for i, w in enumerate(wrong_arguments())])
def test_wrong_arguments_raise_and_say_which(rng, step, name, bad, kind):
    arguments = kernel_arguments(rng)[step]
    good = arguments[name]
    state = {n: arguments[n].copy() for n in ("H", "s") if n in arguments}
    # Where two arrays disagree about a size, either may be named.
    disagree = kind is ValueError and isinstance(bad, np.ndarray) and bad.ndim == good.ndim and bad.shape != good.shape
    with pytest.raises(kind, match=rf"\b({'|'.join(arguments) if disagree else name})\b"):
        getattr(kernels, step)(**{**arguments, name: bad})
    assert all((arguments[n] == x).all() for n, x in state.items())


@pytest.mark.parametrize("step", ["features", "score", "select", "fold", "attend"])
def test_the_same_arguments_are_right_otherwise(rng, step):
    getattr(kernels, step)(**kernel_arguments(rng)[step])
