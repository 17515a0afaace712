"""The oracle itself, before anything is measured against it; needs no compiled code.

Proved here: its examples run; it equals formulas written independently (`oracle.naive`: one query at a time, plain sets,
nothing stabilised), LoLA's update included; its memories partition the past; cuts, paddings, packing and copies change
nothing; every score ranks by its definition; and `history`, `trace` and `margin` tell right rankings from wrong ones.
"""

import doctest
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cases import cases, cuts
from oracle import (MAPS, MIXINGS, SCORES, Case, assert_same_memory, build, causal_softmax, naive, oracle, oracle_cache,
                    oracle_map, reference, rms, rounding_bound, store)

ALL_SCORES = SCORES + ("attention",)


def phi(data):
    """The oracle's features of all tokens."""
    if data.case.map == "given":
        return tuple(np.asarray(data.stored[x]).astype(np.float64) for x in ("q_features", "k_features"))
    return tuple(reference.features(data.stored[x], oracle_map(data), x, data.case.Hq) for x in "qk")


def close(a, b, relative=1e-9):
    assert np.abs(a - b).max(initial=0) <= relative * rms(b)


def pieces(data, cache, cuts, **more):
    cuts = sorted({0, data.case.T, *cuts})
    parts = [oracle(data.at(t=slice(lo, hi)), cache=cache, **more) for lo, hi in zip(cuts, cuts[1:])]
    return np.concatenate(parts, axis=1) if parts else oracle(data, cache=cache, **more)


def naive_memory(data):
    """Section 2 with plain sets: which positions each (row, head) holds in its sparse cache at each chunk, and the state
    at the end.  Scores of "self_recall", "value_norm" and "key_norm" are written out once more."""
    case, (fq, fk) = data.case, phi(data)
    k, v = (data.stored[n].astype(np.float64) for n in "kv")
    r, p = case.Hq // case.Hkv, case.Hq // case.sets
    held = {}
    H = np.zeros((case.B, case.Hq, case.feature_dim, case.Dv))
    s = np.zeros((case.B, case.Hq, case.feature_dim))
    for b, i in np.ndindex(case.B, case.sets):
        heads = range(i * p, (i + 1) * p)
        G = []
        for n in range(-(-case.T // case.chunk)):
            first = n * case.chunk - case.window - case.chunk
            if first >= 0:
                E = G + list(range(first, first + case.chunk))
                G = E
                if len(E) > case.sparse:
                    def rank(t):
                        total = 0.0
                        for h in heads:
                            key, value, f = k[b, t, h // r], v[b, t, h // r], fk[b, t, h]
                            norm = f @ s[b, h]
                            recalled = f @ H[b, h] / norm if norm else 0 * value
                            total += {"self_recall": lambda: ((recalled - value) ** 2).sum(),
                                      "value_norm": lambda: (value ** 2).sum(),
                                      "key_norm": lambda: -(key ** 2).sum()}[case.score]()
                        return total
                    G = sorted(sorted(E, key=lambda t: (-rank(t), t))[:case.sparse])
                    for t in set(E) - set(G):
                        for h in heads:
                            H[b, h] += np.outer(fk[b, t, h], v[b, t, h // r])
                            s[b, h] += fk[b, t, h]
            for h in heads:
                held[b, h, n] = G
    return held, H, s


def test_examples():
    result = doctest.testmod(reference)
    assert result.attempted >= 20 and result.failed == 0


@pytest.mark.parametrize("map", MAPS)
@pytest.mark.parametrize("mixing", MIXINGS)
def test_without_sparse_cache_it_is_window_softmax_and_linear_attention(mixing, map):
    data = build(Case(sparse=0, mixing=mixing, map=map))
    fq, fk = phi(data)
    q, k, v = (data.stored[n] for n in "qkv")
    close(oracle(data), naive(q, k, v, fq, fk, 8, 4, mixing, data.gate))


@pytest.mark.parametrize("logit", [None, 100, 1e4])
@pytest.mark.parametrize("mixing", MIXINGS)
def test_with_everything_cached_it_is_causal_softmax(mixing, logit):
    data = build(Case(sparse=45, mixing=mixing, logit=logit))
    close(oracle(data), causal_softmax(*(data.stored[n] for n in "qkv")))


@given(cases(scores=("self_recall", "value_norm", "key_norm"), max_T=40))
def test_it_equals_the_update_written_with_plain_sets(case):
    data = build(case)
    held, H, s = naive_memory(data)
    cache, trace = oracle_cache(data), []
    out = oracle(data, cache=cache, trace=trace)
    for b in range(case.B):
        for h in range(case.Hq):
            assert cache.sparse_positions(b, h).tolist() == held[b, h, (case.T - 1) // case.chunk]
    for ranking in trace:
        assert ranking.kept.tolist() == held[ranking.row, ranking.set * case.Hq // case.sets, ranking.chunk]
    close(cache.hidden, H)
    close(cache.normalizer, s)
    close(out, naive(*(data.stored[n] for n in "qkv"), *phi(data), case.window, case.chunk, case.mixing, data.gate,
                     case.scale, lambda b, h, t: held[b, h, t // case.chunk]))


@given(cases(scores=ALL_SCORES))
def test_the_memories_partition_the_past(case):
    data = build(case)
    cache = oracle_cache(data)
    oracle(data, cache=cache)
    fk, v = phi(data)[1], np.repeat(data.stored["v"].astype(np.float64), case.Hq // case.Hkv, axis=2)
    begin = max(0, (case.T - 1) // case.chunk * case.chunk - case.window)
    for b in range(case.B):
        window = cache.window_positions(b).tolist()
        assert window == list(range(begin, case.T))
        for h in range(case.Hq):
            sparse = cache.sparse_positions(b, h).tolist()
            assert sparse == sorted(sparse) and len(sparse) == min(case.sparse, begin)
            folded = sorted(set(range(case.T)) - set(window) - set(sparse))
            assert len(window) + len(sparse) + len(folded) == case.T and len(folded) == cache.folded[b, h]
            close(cache.normalizer[b, h], fk[b, folded, h].sum(axis=0), 1e-12)
            close(cache.hidden[b, h], fk[b, folded, h].T @ v[b, folded, h], 1e-12)


@given(cases(scores=ALL_SCORES), st.data())
def test_cuts_change_nothing(case, draw):
    data = build(case)
    whole, cut = oracle_cache(data), oracle_cache(data)
    out = oracle(data, cache=whole)
    again = pieces(data, cut, draw.draw(cuts(case.T)))
    close(again, out)
    if case.score != "attention":                    # whose sums depend on the cut in the last bits
        assert_same_memory(whole, cut, case.Hq)


@given(cases(scores=ALL_SCORES), st.data())
def test_padded_and_packed_rows_equal_plain_ones(case, draw):
    data = build(case)
    lengths = draw.draw(st.lists(st.integers(0, case.T), min_size=case.B, max_size=case.B))
    starts = [draw.draw(st.integers(0, case.T - n)) for n in lengths]
    plain, outs = oracle_cache(data), []
    for b, n in enumerate(lengths):                  # one row at a time, the others idle: row ids stay
        stops = [n if i == b else 0 for i in range(case.B)]
        outs.append(oracle(data, cache=plain, stops=stops)[b, :n])
    shift = build(case)
    for b, (n, start) in enumerate(zip(lengths, starts)):
        for name in shift.stored:
            shift.stored[name][b, start:start + n] = data.stored[name][b, :n]
            shift.stored[name][b, :start] = shift.stored[name][b, start + n:] = np.nan
    padded = oracle_cache(data)
    out = oracle(shift, cache=padded, starts=starts, stops=np.add(starts, lengths))
    assert_same_memory(plain, padded, case.Hq)
    for b, (n, start) in enumerate(zip(lengths, starts)):
        assert not out[b, :start].any() and not out[b, start + n:].any()
        close(out[b, start:start + n], outs[b])
    row = data.at()
    row.stored = {name: np.concatenate([x[b, :n] for b, n in enumerate(lengths)])[None] for name, x in data.stored.items()}
    packed = oracle_cache(data)
    out = oracle(row, cache=packed, cu_seqlens=np.cumsum([0] + lengths))
    assert_same_memory(plain, packed, case.Hq)
    close(out[0], np.concatenate(outs))


@pytest.mark.parametrize("sparse_per", ["query_head", "kv_head"])
@pytest.mark.parametrize("score", ALL_SCORES)
def test_each_ranking_follows_its_score(score, sparse_per):
    data = build(Case(T=60, score=score, sparse_per=sparse_per, mixing="lolcats"))
    case, trace, cache = data.case, [], oracle_cache(data)
    out = oracle(data, cache=cache, trace=trace)
    k, v = (data.stored[n].astype(np.float64) for n in "kv")
    kept = {}
    for ranking in trace:
        b, p = ranking.row, case.Hq // case.sets
        heads = range(ranking.set * p, (ranking.set + 1) * p)
        expected = {
            "value_norm": lambda t, h: (v[b, t, h // 2] ** 2).sum(),
            "key_norm": lambda t, h: -(k[b, t, h // 2] ** 2).sum(),
            "recency": lambda t, h: t / p,
            "external": lambda t, h: data.stored["scores"][b, t, h],
            "random": lambda t, h: float(reference.random_score(0, b, h, t)),
        }.get(score)
        if expected:
            mine = [sum(expected(t, h) for h in heads) for t in ranking.positions]
            np.testing.assert_allclose(ranking.scores, mine, rtol=1e-12)
        order = sorted(range(len(ranking.positions)), key=lambda i: (-ranking.scores[i], i))
        assert ranking.kept.tolist() == sorted(ranking.positions[order[:case.sparse]].tolist())
        kept[b, ranking.set, ranking.chunk] = ranking
    for b in range(case.B):
        for h in range(case.Hq):
            last = kept[b, h * case.sets // case.Hq, (case.T - 1) // case.chunk]
            assert cache.sparse_positions(b, h).tolist() == last.kept.tolist()
            np.testing.assert_array_equal(cache.sparse_scores(b, h), last.scores[np.isin(last.positions, last.kept)])
    assert np.isfinite(out).all()


def test_attention_scores_are_the_shares_received():
    """While nothing is folded the shares are those of causal softmax attention over finished chunks."""
    data = build(Case(B=1, T=45, sparse=20, score="attention"))
    trace = []
    oracle(data, trace=trace)
    q, k = (data.stored[n].astype(np.float64) for n in "qk")
    first = min(r.chunk for r in trace)
    t = first * data.case.chunk
    for r in (r for r in trace if r.chunk == first):
        a = np.tril(np.exp(q[0, :t, r.set] @ k[0, :t, r.set // 2].T * 8 ** -0.5))
        shares = (a / a.sum(axis=1, keepdims=True)).sum(axis=0)
        np.testing.assert_allclose(r.scores, shares[r.positions], rtol=1e-12)


def test_random_scores_are_a_splitmix_hash():
    mask = 2 ** 64 - 1

    def mix(x):
        x = (x + 0x9E3779B97F4A7C15) & mask
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
        return x ^ (x >> 31)

    for seed, row, head, position in [(0, 0, 0, 0), (7, 1, 2, 3), (2 ** 63, 5, 31, 10 ** 12)]:
        h = mix(mix(mix(mix(seed) ^ row) ^ head) ^ position)
        assert reference.random_score(seed, row, head, position) == np.float32((h >> 40) * 2.0 ** -24)


def test_row_ids_travel_with_select_and_repeat_and_return_on_reset():
    data = build(Case(B=2, T=60, score="random"))
    cache = oracle_cache(data)
    twice = data.at(rows=[1, 1, 0, 0])
    moved = cache.select([1, 0]).repeat(2)
    oracle(data, cache=cache)
    oracle(twice, cache=moved)
    for b, origin in enumerate([1, 1, 0, 0]):
        assert moved.sparse_positions(b, 0).tolist() == cache.sparse_positions(origin, 0).tolist()
    moved.reset([2, 3])
    oracle(twice, cache=moved, stops=[0, 0, 60, 60])
    assert moved.rows[2].id == 2 and moved.sparse_positions(2, 0).tolist() != cache.sparse_positions(0, 0).tolist()
    fresh = oracle_cache(twice)
    oracle(twice, cache=fresh)
    assert moved.sparse_positions(2, 0).tolist() == fresh.sparse_positions(2, 0).tolist()


def test_copies_do_not_share():
    data = build(Case(T=60))
    cache = oracle_cache(data)
    half = data.at(t=slice(0, 30))
    oracle(half, cache=cache)
    other, before = cache.copy(), cache.copy()
    oracle(data.at(t=slice(30, 60)), cache=other)
    assert_same_memory(cache, before, 4)
    cache.reset()
    assert cache.tokens_seen.tolist() == [0, 0] and not cache.hidden.any() and other.tokens_seen.tolist() == [60, 60]


def test_ties_keep_the_earlier_position():
    data = build(Case(score="value_norm", T=60))
    data.stored["v"][:] = 0
    cache = oracle_cache(data)
    oracle(data, cache=cache)
    assert cache.sparse_positions(1, 2).tolist() == [0, 1, 2, 3, 4]
    kept, dropped = reference.select(np.array([[0.0], [-0.0], [0.0]]), keep=1)
    assert kept.tolist() == [[0]] and dropped.tolist() == [[1, 2]]


def test_select_counts_and_pads():
    scores = np.array([[1.0, 5], [3, 6], [2, np.nan]])
    kept, dropped = reference.select(scores, keep=2, count=np.array([3, 1]))
    assert kept.tolist() == [[1, 2], [0, -1]] and dropped.tolist() == [[0], [-1]]
    kept, dropped = reference.select(scores[:, :1], keep=9)
    assert kept.tolist() == [[0, 1, 2]] and dropped.shape == (1, 0)


def test_a_history_is_followed_and_judged():
    """Replaying the oracle's own choice reproduces it; a wrong choice is followed, and its margin is negative."""
    data, trace = build(Case(T=60)), []
    out = oracle(data, trace=trace)
    own = {(r.row, r.set, r.chunk): r.kept for r in trace}
    assert min(map(reference.margin, trace)) >= 0
    again = oracle(data, history=lambda b, i, n, candidates: own[b, i, n])
    np.testing.assert_array_equal(again, out)

    worst = []
    other = oracle(data, history=lambda b, i, n, candidates: candidates[:5], trace=worst)
    assert min(map(reference.margin, worst)) < -0.1 and np.abs(other - out).max() > 0.01
    assert all(r.kept.tolist() == [0, 1, 2, 3, 4] for r in worst)
    with pytest.raises(ValueError, match="must keep 5"):
        oracle(data, history=lambda b, i, n, candidates: candidates[:4])
    with pytest.raises(ValueError, match="must keep 5"):
        oracle(data, history=lambda b, i, n, candidates: np.arange(100, 105))


def test_bfloat16_rounding_is_to_nearest_even(rng):
    x = np.concatenate([rng.normal(size=20000) * 10.0 ** rng.integers(-12, 5, size=20000),
                        1 + np.arange(64) * 2.0 ** -8, [0, 1e-12]]).astype(np.float32)
    np.testing.assert_array_equal(reference.round_to_bfloat16(x), x.astype(ml_dtypes.bfloat16).astype(np.float64))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_sixteen_bit_caches_round_features_alone(dtype):
    """Inputs count at their stored value, features are rounded after the clamp, everything else is exact."""
    data = build(Case(sparse=0, mixing="lolcats", dtype=dtype))
    fq, fk = (reference.round_to_bfloat16(reference.features(data.stored[x].astype(np.float64), oracle_map(data), x, 4))
              for x in "qk")
    np.testing.assert_array_equal(fq, phi(data)[0])
    close(oracle(data), naive(*(data.stored[n] for n in "qkv"), fq, fk, 8, 4, "lolcats", data.gate))
    given = build(Case(map="given", dtype=dtype))
    close(oracle(given), oracle(given, features=[reference.round_to_bfloat16(f) for f in phi(given)]))


def test_the_rounding_bound_is_the_size_of_the_rounding():
    data = build(Case(T=60, dtype="bfloat16"))
    exact, unrounded = oracle(data), oracle(data, unrounded=True)
    assert 2 ** -9 < rounding_bound(exact, unrounded, "bfloat16") < 0.1
    assert store({"q": np.ones(1)}, "float16")["q"].dtype == np.float16


@pytest.mark.parametrize("change, message", [
    (dict(gate=None), "gate"), (dict(feature_map=None), "features"), (dict(scores=np.zeros((2, 45, 4))), "scores"),
    (dict(k_features=np.ones((2, 45, 4, 12))), "features"), (dict(cu_seqlens=[0, 45]), "cu_seqlens"),
    (dict(v=np.zeros((2, 45, 1, 6))), "v must be"), (dict(q=np.zeros((2, 45, 4, 7))), "q must"),
])
def test_wrong_combinations_raise(change, message):
    data = build(Case(mixing="gated"))
    args = {**{n: data.stored[n] for n in "qkv"}, "feature_map": oracle_map(data), "gate": data.gate, **change}
    with pytest.raises(ValueError, match=message):
        reference.attention(cache=oracle_cache(data), **args)


def test_without_a_cache_one_is_made():
    data = build(Case(T=60, mixing=None))
    out = reference.attention(*(data.stored[n] for n in "qkv"), config=SimpleNamespace(**data.case.config),
                              feature_map=oracle_map(data))
    np.testing.assert_array_equal(out, oracle(data))
    gated = reference.attention(*(data.stored[n] for n in "qkv"), config=SimpleNamespace(**data.case.config),
                                feature_map=oracle_map(data), gate=np.full(4, 0.3, np.float32))
    named = build(Case(T=60, mixing="gated"))
    named.gate[:] = 0.3
    np.testing.assert_array_equal(gated, oracle(named))
