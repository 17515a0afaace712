"""`lola.attention` against the contract: invariants 1 to 8 of its section 8, on every instruction set and dtype.

The error measure is section 8's (`oracle.bound`); memories are compared bit for bit.  Rankings are judged in float64 on
the backend's own history (`oracle.replay`), so a near-tie that float32 orders differently is no failure, and a wrong
ranking is one whatever the output looks like.  Invariant 9 is in test_cache.py.
"""

import lola
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cases import cases, cuts
from oracle import (DTYPES, MAPS, MIXINGS, SCORES, Case, assert_close, assert_same_bits, assert_same_memory, build,
                    causal_softmax, error, float32_bound, host, lola_features, naive, new_cache, options, oracle,
                    oracle_cache, reference, replay, rms, rounding_bound, run, run_pieces)

EXACT_SCORES = ("recency", "random", "external")                      # numbers that float32 holds exactly


# ----------------------------------------------------------------------------------- 1. cutting

@given(st.data())
def test_cutting_leaves_the_same_memory_and_outputs(isa, dtype, draw):
    case = draw.draw(cases(dtype=dtype))
    data = build(case)
    played = replay(data)
    where = draw.draw(cuts(case.T))
    whole, cut = new_cache(data), new_cache(data)
    out, pieces = run(data, whole), run_pieces(data, cut, where)
    assert_same_memory(whole, cut, case.Hq)
    assert_same_memory(whole, played.record.cache, case.Hq)
    for got in (out, pieces):
        assert got.dtype == DTYPES[dtype]
        assert_close(got, played.exact, played.bound)
    if dtype == "float32":
        assert_close(pieces, out.astype(np.float64), played.bound)


@pytest.mark.parametrize("chunk, window", [(1, 16), (16, 16), (16, 64)])
def test_prefill_and_decoding_agree_at_length(isa, dtype, chunk, window):
    """Sizes of real heads; the prefill's last call ends inside a chunk and decoding crosses several."""
    data = build(Case(B=1, T=400, Hq=4, Hkv=2, D=64, Dv=64, F=128, chunk=chunk, window=window, sparse=48, dtype=dtype))
    whole, cut = new_cache(data), new_cache(data)
    out = run(data, whole)
    pieces = run_pieces(data, cut, [300, 333, *range(350, 400)])
    assert_same_memory(whole, cut, 4)
    played = replay(data)
    assert_close(out, played.exact, played.bound)
    assert_close(pieces, played.exact, played.bound)


# ----------------------------------------------------------------------------------- 2. no sparse cache

@pytest.mark.parametrize("map", MAPS)
@pytest.mark.parametrize("mixing", MIXINGS)
def test_without_sparse_cache_it_is_window_softmax_and_linear_attention(isa, dtype, mixing, map):
    data = build(Case(sparse=0, T=45, mixing=mixing, map=map, dtype=dtype))
    case = data.case

    def formula(arrays, fq, fk):
        return naive(arrays["q"], arrays["k"], arrays["v"], fq, fk, case.window, case.chunk, mixing, data.gate)

    fq, fk = lola_features(data)
    if dtype != "float32":
        fq, fk = reference.round_to_bfloat16(fq), reference.round_to_bfloat16(fk)
    exact = formula(data.stored, fq, fk)
    limit = (float32_bound(data.stored["q"], data.stored["k"]) if dtype == "float32" else
             rounding_bound(exact, oracle(data, unrounded=True), dtype))
    for pieces in ([], range(45)):
        assert_close(run_pieces(data, new_cache(data), pieces), exact, limit)


@given(st.data())
def test_the_state_carries_the_answer_under_lolcats(isa, dtype, draw):
    """Long past the window the linear term outweighs the softmax term, so a wrong state cannot hide."""
    case = draw.draw(cases(mixings=("lolcats",), maps=("hedgehog", "hedgehog_exp", "elu_plus_one", "given"), sparse=0,
                           min_T=40, max_T=90, window=4, chunk=draw.draw(st.sampled_from((1, 2, 4))), dtype=dtype))
    data = build(case)
    played = replay(data)
    assert_close(run(data, new_cache(data)), played.exact, played.bound)
    assert_close(played.record.out, played.exact, played.bound)
    data.case = case.but(mixing="cache_only")
    assert error(oracle(data), played.exact) > 0.05


# ----------------------------------------------------------------------------------- 3. everything cached

@pytest.mark.parametrize("logit", [1, 100, 1e4])
@pytest.mark.parametrize("mixing", MIXINGS)
def test_with_everything_cached_it_is_causal_softmax(isa, dtype, mixing, logit):
    data = build(Case(T=70, sparse=70, mixing=mixing, logit=logit, dtype=dtype))
    exact = causal_softmax(*(data.stored[n] for n in "qkv"))
    limit = (float32_bound(data.stored["q"], data.stored["k"]) if dtype == "float32" else
             rounding_bound(exact, causal_softmax(*(data.arrays[n] for n in "qkv")), dtype))
    cache = new_cache(data)
    assert_close(run(data, cache), exact, limit)
    assert_close(run_pieces(data, new_cache(data), range(70)), exact, limit)
    assert not np.any(host(cache.folded)) and not np.any(host(cache.hidden))


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("sparse", [5, 40])
@pytest.mark.parametrize("mixing", MIXINGS)
def test_logits_that_are_all_huge(isa, mixing, sparse, sign):
    """Every logit near +1e4 or -1e4: exp of it overflows, or underflows everywhere and the state alone answers."""
    data = build(Case(T=40, sparse=sparse, mixing=mixing, map="given"))
    q, k = data.stored["q"], data.stored["k"]
    q[:], k[:] = 0.01 * q, 0.01 * k
    q[..., 0], k[..., 0] = sign * 100, 100 * 8 ** 0.5
    exact = replay(data).exact if sparse == 5 else causal_softmax(q, k, data.stored["v"])
    assert_close(run(data, new_cache(data)), exact, float32_bound(q, k))


# ----------------------------------------------------------------------------------- 4. partition

@given(st.data())
def test_memories_partition_the_past_and_the_state_is_the_sum_of_the_rest(isa, dtype, draw):
    case = draw.draw(cases(dtype=dtype))
    data = build(case)
    cache = new_cache(data)
    run(data, cache)
    fk = lola_features(data)[1].astype(np.float64)
    fk = fk if dtype == "float32" else reference.round_to_bfloat16(fk)
    v = np.repeat(data.stored["v"].astype(np.float64), case.Hq // case.Hkv, axis=2)
    begin = max(0, (case.T - 1) // case.chunk * case.chunk - case.window)
    assert np.asarray(cache.tokens_seen).tolist() == [case.T] * case.B
    s = np.zeros((case.B, case.Hq, case.feature_dim))
    H = np.zeros(s.shape + (case.Dv,))
    for b in range(case.B):
        window = np.asarray(cache.window_positions(b)).tolist()
        assert window == list(range(begin, case.T))
        for h in range(case.Hq):
            sparse = np.asarray(cache.sparse_positions(b, h)).tolist()
            assert sparse == sorted(set(sparse)) and len(sparse) == min(case.sparse, begin)
            assert set(sparse) <= set(range(begin))
            folded = sorted(set(range(begin)) - set(sparse))
            assert host(cache.folded)[b, h] == len(folded)
            H[b, h], s[b, h] = fk[b, folded, h].T @ v[b, folded, h], fk[b, folded, h].sum(axis=0)
    assert_close(host(cache.hidden), H, 2e-5)
    assert_close(host(cache.normalizer), s, 2e-5)


# ----------------------------------------------------------------------------------- 5. independence

NOT_RANDOM = tuple(s for s in SCORES if s != "random")               # whose hash takes the row and the head


@given(st.data())
def test_rows_and_heads_are_independent(isa, dtype, draw):
    case = draw.draw(cases(scores=NOT_RANDOM, dtype=dtype))
    data = build(case)
    whole = new_cache(data)
    out = run(data, whole)

    rows = draw.draw(st.permutations(range(case.B)))
    cache = new_cache(data)
    assert_same_bits(run(data.at(rows=rows), cache), out[rows])
    assert_same_memory(cache, whole.select(rows), case.Hq)

    r = case.Hq // case.Hkv
    groups = draw.draw(st.permutations(range(case.Hkv)))
    # With one set per KV head the group's scores are added in order, so heads move with their group only.
    order = draw.draw(st.permutations(range(r))) if case.sparse_per == "query_head" else range(r)
    heads = [g * r + i for g in groups for i in order]
    permuted, cache = data.of_heads(heads, list(groups)), new_cache(data)
    assert_same_bits(run(permuted, cache), out[:, :, heads])
    for b in range(case.B):
        for i, h in enumerate(heads):
            assert_same_bits(cache.sparse_positions(b, i), whole.sparse_positions(b, h))
            assert_same_bits(host(cache.hidden)[b, i], host(whole.hidden)[b, h])

    b, g = draw.draw(st.integers(0, case.B - 1)), draw.draw(st.integers(0, case.Hkv - 1))
    heads = list(range(g * r, (g + 1) * r))
    one = data.at(rows=[b]).of_heads(heads, [g])
    assert_same_bits(run(one, new_cache(one)), out[b:b + 1][:, :, heads])


def test_a_changed_row_changes_no_other(isa, dtype):
    data = build(Case(B=3, T=60, score="random", dtype=dtype))
    out = run(data, new_cache(data))
    for name in "qkv":
        data.stored[name][1] = data.stored[name][1][::-1]
    other = run(data, new_cache(data))
    assert_same_bits(other[[0, 2]], out[[0, 2]])
    assert not np.array_equal(other[1], out[1])


# ----------------------------------------------------------------------------------- 6. padding, packing

@given(st.data())
def test_padded_and_packed_rows_equal_plain_ones(isa, dtype, draw):
    """Two ragged calls, the pads full of NaN, and the same rows packed, against each row run alone."""
    case = draw.draw(cases(scores=NOT_RANDOM, dtype=dtype))
    data = build(case)
    first = [draw.draw(st.integers(0, case.T)) for _ in range(case.B)]
    length = [draw.draw(st.integers(n, case.T)) for n in first]
    plain = []
    for b, n in enumerate(length):
        part = data.at(rows=[b], t=slice(0, n))
        plain.append((part, replay(part)))

    padded, packed = new_cache(data), new_cache(data)
    for lo, hi in ((np.zeros(case.B, int), np.array(first)), (np.array(first), np.array(length))):
        room = draw.draw(st.integers(0, 3)) + int((hi - lo).max())
        starts = np.array([draw.draw(st.integers(0, room - n)) for n in hi - lo])
        stops = starts + hi - lo
        ragged = data.at()
        for name, x in data.stored.items():
            ragged.stored[name] = np.full((case.B, room) + x.shape[2:], np.nan, x.dtype)
            for b in range(case.B):
                ragged.stored[name][b, starts[b]:stops[b]] = x[b, lo[b]:hi[b]]
        out = run(ragged, padded, starts=starts, stops=stops)

        row = data.at()
        row.stored = {name: np.concatenate([x[b, lo[b]:hi[b]] for b in range(case.B)])[None]
                      for name, x in data.stored.items()}
        ends = np.concatenate([[0], np.cumsum(hi - lo)])
        together = run(row, packed, cu_seqlens=ends)
        for b, (part, played) in enumerate(plain):
            exact = played.exact[0, lo[b]:hi[b]]
            for got in (out[b, starts[b]:stops[b]], together[0, ends[b]:ends[b + 1]]):
                # In units of the whole row's RMS, as the bound is.
                assert np.abs(got.astype(np.float64) - exact).max(initial=0) <= played.bound * rms(played.exact)
            assert not out[b, :starts[b]].any() and not out[b, stops[b]:].any()
    for b, (part, played) in enumerate(plain):
        assert_same_memory(padded.select([b]), played.record.cache, case.Hq)
        assert_same_memory(packed.select([b]), played.record.cache, case.Hq)


def test_only_starts_or_only_stops(isa):
    data = build(Case(B=2, T=20))
    left, right = new_cache(data), new_cache(data)
    run(data, left, starts=np.array([3, 20]))
    run(data, right, stops=np.array([17, 0]))
    assert np.asarray(left.tokens_seen).tolist() == np.asarray(right.tokens_seen).tolist() == [17, 0]


# ----------------------------------------------------------------------------------- 7. threads

@pytest.mark.parametrize("case", [
    Case(B=1, T=1500, Hq=1, Hkv=1, D=32, Dv=32, F=32, window=32, chunk=16, sparse=24),
    Case(B=3, T=301, Hq=6, Hkv=2, D=24, Dv=40, F=18, window=8, chunk=8, sparse=31, sparse_per="kv_head"),
    Case(B=2, T=200, window=8, chunk=1, sparse=10, mixing="lolcats"),
], ids=["one head", "groups", "per token"])
def test_threads_change_no_bit(isa, dtype, case, threads):
    data = build(case.but(dtype=dtype))
    results = []
    for n in (1, 2, 3, 7):
        threads(n)
        cache = new_cache(data)
        results.append((run(data, cache), cache))
    for out, cache in results[1:]:
        assert_same_bits(out, results[0][0])
        assert_same_memory(cache, results[0][1], case.Hq)
    decoded = []
    for n in (1, 3):
        threads(n)
        decoded.append(run_pieces(data.at(t=slice(0, 60)), new_cache(data), range(60)))
    assert_same_bits(*decoded)


def test_repeating_a_call_gives_the_same_bits(isa, dtype):
    data = build(Case(T=100, dtype=dtype))
    assert_same_bits(run(data, new_cache(data)), run(data, new_cache(data)))


# ----------------------------------------------------------------------------------- 8. against the oracle

def assert_rankings(played, case):
    """Section 8: the lowest kept score >= the highest dropped one - 1e-5 * max(score, ||v||^2)."""
    for ranking in played.trace:
        assert reference.margin(ranking) >= -1e-5, ranking
    assert_same_sparse_caches(played, case)


def assert_same_sparse_caches(played, case):
    """The replay ends with the backend's sparse caches, and their reported scores are those of the last ranking."""
    for b in range(case.B):
        for h in range(case.Hq):
            np.testing.assert_array_equal(played.record.cache.sparse_positions(b, h), played.cache.sparse_positions(b, h))
            got, exact = (c.sparse_scores(b, h) for c in (played.record.cache, played.cache))
            np.testing.assert_array_equal(np.isnan(got), np.isnan(exact))
            if case.score != "recency" and not np.isnan(exact).any():
                v = played.cache.rows[b].sparse.value[:, h * case.sets // case.Hq]
                assert (np.abs(got - exact) <= 1e-5 * np.maximum(np.abs(exact), np.square(v).sum(axis=-1))).all()


@given(st.data())
def test_outputs_and_rankings_against_the_oracle(isa, dtype, draw):
    case = draw.draw(cases(dtype=dtype))
    data = build(case)
    played = replay(data)
    assert_close(played.record.out, played.exact, played.bound)
    assert_rankings(played, case)


@pytest.mark.parametrize("sparse_per", ["query_head", "kv_head"])
@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("mixing", MIXINGS)
def test_every_score_and_mixing(isa, dtype, mixing, score, sparse_per):
    data = build(Case(T=80, mixing=mixing, score=score, sparse_per=sparse_per, dtype=dtype, seed=3))
    played = replay(data)
    assert len(played.trace) > 20
    assert_close(run(data, new_cache(data)), played.exact, played.bound)
    assert_rankings(played, data.case)
    if score in EXACT_SCORES:                        # nothing to round: the oracle alone chooses the same pairs
        own = oracle_cache(data)
        oracle(data, cache=own, features=lola_features(data))
        for b in range(2):
            for h in range(4):
                np.testing.assert_array_equal(played.record.cache.sparse_positions(b, h), own.sparse_positions(b, h))


@pytest.mark.parametrize("sparse_per", ["query_head", "kv_head"])
@pytest.mark.parametrize("mixing", MIXINGS)
def test_the_attention_score(isa, dtype, mixing, sparse_per):
    """Its sums depend on outputs, so a cut may order near-ties differently: each run is judged on its own history."""
    data = build(Case(T=80, mixing=mixing, score="attention", sparse_per=sparse_per, dtype=dtype, seed=3))
    played = replay(data)
    assert len(played.trace) > 20
    assert_close(played.record.out, played.exact, played.bound)
    assert_rankings(played, data.case)


@pytest.mark.parametrize("mixing", MIXINGS)
@pytest.mark.parametrize("logit", [1e2, 1e4])
def test_extreme_logits_while_folding(isa, dtype, mixing, logit):
    """The state competes with logits of +-1e4: what must be zero is zero, and nothing overflows."""
    data = build(Case(T=80, mixing=mixing, logit=logit, map="given", dtype=dtype))
    played = replay(data)
    assert_close(run(data, new_cache(data)), played.exact, played.bound)
    assert_rankings(played, data.case)


@pytest.mark.parametrize("case", [
    Case(B=1, T=700, Hq=4, Hkv=2, D=64, Dv=64, F=128, window=64, chunk=64, sparse=256),
    Case(B=1, T=500, Hq=4, Hkv=2, D=64, Dv=64, F=128, window=64, chunk=64, sparse=64, sparse_per="kv_head"),
    Case(B=1, T=300, Hq=2, Hkv=1, D=128, Dv=128, F=128, window=64, chunk=16, sparse=40, mixing="gated"),
    Case(B=1, T=300, Hq=2, Hkv=2, D=80, Dv=96, F=160, window=32, chunk=32, sparse=0, mixing="lolcats"),
    Case(B=1, T=200, Hq=8, Hkv=1, D=256, Dv=256, F=64, window=16, chunk=8, sparse=33),
], ids=["needle", "kv_head", "wide", "base", "many heads"])
def test_real_sizes(isa, dtype, case):
    data = build(case.but(dtype=dtype))
    played = replay(data)
    assert_close(run(data, new_cache(data)), played.exact, played.bound)
    assert_close(played.record.out, played.exact, played.bound)
    assert_rankings(played, data.case)


@pytest.mark.parametrize("sparse_per", ["query_head", "kv_head"])
def test_ties_keep_the_earlier_position(isa, dtype, sparse_per):
    """Tokens that repeat every 6 positions score the same bits, wherever they are held."""
    data = build(Case(T=90, sparse=10, sparse_per=sparse_per, dtype=dtype))
    for arrays in (data.arrays, data.stored):
        for name in "kv":
            arrays[name][:] = arrays[name][:, np.arange(90) % 6]
    ties = 0
    for ranking in replay(data).trace:
        dropped = np.setdiff1d(ranking.positions, ranking.kept)
        for early in dropped:
            later = ranking.kept[ranking.kept > early]
            assert not (later % 6 == early % 6).any()
            ties += (ranking.kept % 6 == early % 6).any()
    assert ties > 20


def test_zeros_everywhere(isa, dtype):
    """All scores are +-0, so the earliest pairs stay, and the output is zero."""
    data = build(Case(T=60, dtype=dtype))
    for name in "qkv":
        data.stored[name][:] = 0
    data.stored["v"][:, ::2] *= -1
    cache = new_cache(data)
    assert not run(data, cache).any()
    assert np.asarray(cache.sparse_positions(1, 3)).tolist() == [0, 1, 2, 3, 4]


def test_scores_bits_do_not_depend_on_the_call(isa, dtype):
    """Reported scores of one prefill, of decoding, and of another batch are the same bits."""
    data = build(Case(B=3, T=80, D=24, Dv=33, F=30, sparse=20, dtype=dtype))
    whole, cut = new_cache(data), new_cache(data)
    run(data, whole)
    run_pieces(data, cut, range(80))
    one = data.at(rows=[2])
    alone = new_cache(one)
    run(one, alone)
    for h in range(4):
        assert np.isfinite(whole.sparse_scores(2, h)).all()
        assert_same_bits(whole.sparse_scores(2, h), cut.sparse_scores(2, h))
        assert_same_bits(whole.sparse_scores(2, h), alone.sparse_scores(0, h))


def test_row_ids_seed_the_random_score(isa):
    """They travel with select and repeat and return to the row's index on reset."""
    data = build(Case(B=2, T=60, score="random"))
    wide, other = data.at(rows=[1, 1, 0, 0]), oracle_cache(data).select([1, 0]).repeat(2)
    cache = new_cache(data).select([1, 0]).repeat(2)
    for _ in range(2):
        run(wide, cache)
        oracle(wide, cache=other)
        for b in range(4):
            for h in range(4):
                np.testing.assert_array_equal(cache.sparse_positions(b, h), other.sparse_positions(b, h))
        cache.reset([2, 3])
        other.reset([2, 3])


def test_mixing_defaults_to_gated_if_there_is_a_gate(isa):
    data = build(Case(T=60, mixing="gated"))
    named = run(data, new_cache(data))
    gate, data.case = data.gate, data.case.but(mixing=None)
    assert_same_bits(run(data, new_cache(data)), named)
    data.gate, data.case = None, data.case.but(mixing="paper")
    paper = run(data, new_cache(data))
    data.case = data.case.but(mixing=None)
    assert_same_bits(run(data, new_cache(data)), paper)
    data.gate, data.case = gate, data.case.but(mixing="paper")       # a gate is ignored
    assert_same_bits(run(data, new_cache(data)), paper)


def test_a_config_alone_is_one_call(isa, dtype):
    data = build(Case(T=60, dtype=dtype))
    part = {n: data.stored[n] for n in "qkv"}
    out = lola.attention(**part, config=lola.Config(**data.case.config), **options(data))
    assert_same_bits(out, run(data, new_cache(data)))


def test_defaults(isa):
    """No config is lola.Config(); as many KV heads as heads, values as wide as keys."""
    data = build(Case(T=150, Hq=2, Hkv=2, D=8, Dv=8, window=64, chunk=64, sparse=256))
    cache = lola.Cache(lola.Config(), batch=2, heads=2, head_dim=8, feature_dim=12)
    named = new_cache(data)
    out = run(data, cache)
    assert_same_bits(out, run(data, named))
    assert_same_memory(cache, named, 2)
    assert_same_bits(out, lola.attention(*(data.stored[n] for n in "qkv"), **options(data)))


def test_scale_defaults_to_the_root_of_D(isa):
    data = build(Case(T=40))
    named = build(Case(T=40, scale=8 ** -0.5))
    assert_same_bits(run(data, new_cache(data)), run(named, new_cache(named)))
