"""The device at the sizes of real heads, where its fast paths run, and at sizes next to them.

Proved here: outputs and rankings against the float64 oracle for random sizes (heads of 32 to 256, groups of 1 to 16, chunks
of 1 to 128, sparse caches from none to everything); memories that are bit-identical for prefill, decoding and any mixture,
across segments too; rows bit-identical whatever the batch; a million tokens in bounded memory; agreement with the CPU.
"""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import lola
from oracle import (DTYPES, MIXINGS, SCORES, Case, assert_close, assert_same_bits, assert_same_memory, build, contents, error,
                    host, kernels, lola_map, new_cache, options, reference, replay, rms, run, run_pieces, snapshot)
from places import DEVICE, array, only_on_cuda, tensor
from test_attention import assert_rankings

# One layer of Llama-3.1-8B but for its number of heads.
LLAMA = Case(B=1, T=1100, Hq=4, Hkv=1, D=128, Dv=128, F=128, window=128, chunk=64, sparse=256, mixing="gated",
             sparse_per="kv_head", dtype="bfloat16")


def judge(case):
    data = build(case)
    played = replay(data)
    cache = new_cache(data)
    assert_close(run(data, cache), played.exact, played.bound)
    assert_close(played.record.out, played.exact, played.bound)
    assert_same_memory(cache, played.record.cache, case.Hq)
    assert_rankings(played, case)
    return data, played


# ----------------------------------------------------------------------------------- against the oracle

@st.composite
def real_cases(draw, **fixed):
    """A case that takes the oracle about a second at most."""
    pick = lambda *of: draw(st.sampled_from(of))
    chunk = pick(64, 16, 3, 1, 64, 128, 32)
    window = chunk * pick(1, 2, 5)
    D, Dv, F = pick(64, 128, 128, 32, 256, 96, 40, 129), pick(64, 128, 128, 32, 256, 72, 33), pick(128, 64, 256, 2, 90)
    Hkv, r = pick(1, 2), pick(1, 2, 4, 8, 16, 3)
    sparse = pick(0, 5, 64, 200, 512)
    part = draw(st.integers(0, chunk))
    for updates in ({1: 40, 3: 30}.get(chunk, 6), 3, 3, 3):
        T = min(window + sparse + updates * chunk + part, 900)
        if Hkv * r * T * ((1 + sparse / chunk) * F * Dv + (window + chunk + sparse) * (D + Dv)) < 2e8:
            break
        sparse, r = sparse // 2, max(1, r // 2)
    drawn = dict(B=1, T=T, Hq=Hkv * r, Hkv=Hkv, D=D, Dv=Dv, F=F, window=window, chunk=chunk,
                 sparse=draw(st.sampled_from((sparse, sparse, sparse, T))), mixing=pick(*MIXINGS),
                 score=pick("self_recall", "self_recall", *SCORES), map=pick("hedgehog", "given", "hedgehog_exp", "relu_w"),
                 sparse_per=pick("query_head", "kv_head"), seed=draw(st.integers(0, 99)))
    return Case(**{**drawn, **fixed})


@given(st.data())
def test_random_sizes(dtype, draw):
    judge(draw.draw(real_cases(dtype=dtype)))


@pytest.mark.parametrize("sparse_per", ["query_head", "kv_head"])
@pytest.mark.parametrize("heads", [(1, 1), (2, 1), (3, 1), (5, 1), (8, 1), (16, 1), (6, 3), (32, 2)],
                         ids=lambda h: f"{h[0]} on {h[1]}")
def test_groups_of_heads(heads, sparse_per):
    Hq, Hkv = heads
    judge(Case(B=1, T=330, Hq=Hq, Hkv=Hkv, D=64, Dv=64, F=64, window=64, chunk=32, sparse=48, sparse_per=sparse_per,
               mixing="gated", dtype="bfloat16"))


@pytest.mark.parametrize("sparse", [0, 1, 63, 64, 65, 2000])
@pytest.mark.parametrize("chunk, window", [(1, 1), (1, 40), (3, 9), (16, 16), (64, 64), (64, 192), (100, 100)])
def test_chunks_windows_and_sparse_caches(chunk, window, sparse):
    T = min(400, window + min(sparse, 70) + (40 if chunk < 16 else 4 * chunk + 7))
    judge(Case(B=1, T=T, Hq=4, Hkv=2, D=64, Dv=64, F=64, window=window, chunk=chunk, sparse=sparse, dtype="float16"))


@pytest.mark.parametrize("D, Dv, F", [(128, 128, 128), (64, 64, 64), (64, 128, 256), (128, 64, 128), (256, 256, 64), (32, 32, 32),
                                      (80, 96, 160), (136, 120, 72), (17, 33, 66), (128, 1, 2), (1, 128, 128)])
def test_sizes_of_heads(dtype, D, Dv, F):
    judge(Case(B=2, T=300, Hq=4, Hkv=2, D=D, Dv=Dv, F=F, window=64, chunk=64, sparse=70, mixing="lolcats", dtype=dtype))


@pytest.mark.parametrize("sparse_per", ["query_head", "kv_head"])
@pytest.mark.parametrize("map", ["hedgehog", "given"])
def test_a_layer_of_llama(dtype, map, sparse_per):
    judge(LLAMA.but(map=map, sparse_per=sparse_per, dtype=dtype, T=900))


@pytest.mark.parametrize("mixing", MIXINGS)
@pytest.mark.parametrize("logit", [50, 1e4])
def test_extreme_logits_on_fast_paths(mixing, logit):
    judge(LLAMA.but(mixing=mixing, logit=logit, T=600, sparse=64))


# ----------------------------------------------------------------------------------- cutting

@pytest.mark.parametrize("case", [
    LLAMA, LLAMA.but(sparse_per="query_head", dtype="float16"), LLAMA.but(dtype="float32", T=700),
    LLAMA.but(D=64, Dv=64, window=64), LLAMA.but(window=16, chunk=16, sparse=100, T=600),
    LLAMA.but(window=100, chunk=1, sparse=100, T=400), LLAMA.but(D=96, Dv=80, F=90, window=40, chunk=20, sparse=99, T=500),
    LLAMA.but(score="external", sparse=64, T=600), LLAMA.but(sparse=0, T=600)],
    ids=["kv_head", "query_head", "float32", "D 64", "C 16", "C 1", "odd", "external", "no cache"])
def test_any_cutting_leaves_the_same_bits(case):
    """One call; decoding alone; pieces of every kind of length; pieces that end at, before and after a chunk."""
    data = build(case)
    played = replay(data)
    n, T = case.chunk, case.T
    rng = np.random.default_rng(0)
    for cuts in ([], [1], range(T - 150, T), np.cumsum(rng.integers(1, 3 * n + 2, size=30)) % T, [n - 1, n, n + 1, T // 2 // n * n],
                 [T // 2, *range(T // 2, T // 2 + n + 1)]):
        cache = new_cache(data)
        out = run_pieces(data, cache, [int(c) for c in cuts])
        assert_same_memory(cache, played.record.cache, case.Hq)
        assert_close(out, played.exact, played.bound)


def test_decoding_alone_leaves_the_bits_of_prefill(dtype):
    data = build(LLAMA.but(T=500, sparse=64, dtype=dtype))
    whole, single = new_cache(data), new_cache(data)
    run(data, whole)
    run_pieces(data, single, range(500))
    assert_same_memory(whole, single, 4)


def assert_state_is_the_rest(data, cache, row=0, heads=(0,)):
    """Invariant 4 for one row and some heads, on the device in float64, so that a million tokens take no time."""
    import torch
    case, T = data.case, int(cache.tokens_seen[row])
    begin = max(0, (T - 1) // case.chunk * case.chunk - case.window)
    m = lola_map(data)
    k, v = (tensor(data.stored[n][row:row + 1, :T]) for n in "kv")
    hidden, normalizer = host(cache.hidden)[row], host(cache.normalizer)[row]
    for h in heads:
        kv = h * case.Hkv // case.Hq
        if case.map == "given":
            fk = tensor(data.stored["k_features"][row, :T, h]).bfloat16()
        else:
            one = type(m)(m.w_q[h:h + 1], m.w_k[h:h + 1])
            fk = lola.kernels.features(k[:, :, kv:kv + 1], one, "k", 1)[0, :, 0]
        sparse = cache.sparse_positions(row, h)
        assert len(np.unique(sparse)) == len(sparse) == min(case.sparse, begin) and (sparse < begin).all()
        np.testing.assert_array_equal(cache.window_positions(row), np.arange(begin, T))
        rest = torch.zeros(T, dtype=torch.bool)
        rest[:begin] = True
        rest[torch.from_numpy(sparse)] = False
        rest = rest.to(DEVICE)
        assert host(cache.folded)[row, h] == int(rest.sum())
        fk = fk[rest].double()
        # Rounding errors of a float32 sum grow as the root of its length.
        limit = 2e-5 * max(1, len(fk) / 4096) ** 0.5
        assert_close(hidden[h], (fk.T @ v[0, rest, kv].double()).cpu().numpy(), limit)
        assert_close(normalizer[h], fk.sum(0).cpu().numpy(), limit)


def closed_form(data, cache, queries, row=0, head=0):
    """The last outputs of a row in float64 from what the cache says: invariant 4 and section 4."""
    case, T = data.case, int(cache.tokens_seen[row])
    kv, r = head * case.Hkv // case.Hq, slice(head, head + 1)
    exact = np.concatenate([cache.sparse_positions(row, head), cache.window_positions(row)])
    m = lola_map(data)
    q = data.stored["q"][row:row + 1, T - queries:T, r]
    fq = kernels.features(np.ascontiguousarray(q), type(m)(m.w_q[r], m.w_k[r]), "q", 1)
    return reference.attend(q[0], data.stored["k"][row, exact, kv:kv + 1], data.stored["v"][row, exact, kv:kv + 1], fq[0],
                            host(cache.hidden)[row, r], host(cache.normalizer)[row, r], gate=data.gate[r], mixing=case.mixing,
                            causal=True)


def test_segments(dtype):
    """Longer than what is worked on at a time: the cuts fall inside segments, at their ends and at neither."""
    data = build(LLAMA.but(T=20_300, Hq=2, D=64, Dv=64, sparse=128, window=64, dtype=dtype, sparse_per="query_head"))
    whole = new_cache(data)
    out = run(data, whole)
    assert np.isfinite(out.astype(np.float32)).all()
    assert_state_is_the_rest(data, whole, heads=(0, 1))
    last = 20_300 % 64
    exact = closed_form(data, whole, last)
    assert error(out[0, -last:, :1], exact) <= {"float32": 1e-4, "float16": 2e-2, "bfloat16": 5e-2}[dtype]
    for cuts in ([8192], [10_000, 10_001], [5, 16_384 + 17]):
        cache = new_cache(data)
        pieces = run_pieces(data, cache, cuts)
        assert_same_memory(whole, cache, 2)
        assert np.abs(pieces.astype(np.float64) - out.astype(np.float64)).max() <= {
            "float32": 1e-4, "float16": 4e-3, "bfloat16": 4e-2}[dtype] * rms(out.astype(np.float64))


def test_segments_of_ragged_rows():
    """Rows of very different lengths at different positions, padded on the left, packed, and alone: the same bits of memory."""
    data = build(LLAMA.but(B=4, T=9000, Hq=2, D=64, Dv=64, sparse=100, window=64))
    starts, stops = np.array([0, 8990, 700, 4000]), np.array([9000, 9000, 700, 8999])
    padded, packed = new_cache(data), new_cache(data)
    out = run(data, padded, starts=starts, stops=stops)
    row = data.at()
    row.stored = {n: np.concatenate([x[b, starts[b]:stops[b]] for b in range(4)])[None] for n, x in data.stored.items()}
    cu = np.concatenate([[0], np.cumsum(stops - starts)])
    together = run(row, packed, cu_seqlens=cu)
    assert_same_memory(padded, packed, 2)
    for b in range(4):
        one = data.at(rows=[b], t=slice(starts[b], stops[b]))
        alone = new_cache(one)
        expected = run(one, alone)
        assert_same_memory(padded.select([b]), alone, 2)
        for got in (out[b, starts[b]:stops[b]], together[0, cu[b]:cu[b + 1]]):
            assert np.abs(got.astype(np.float64) - expected[0].astype(np.float64)).max(initial=0) <= 0.04
        assert not out[b, :starts[b]].any() and not out[b, stops[b]:].any()


@pytest.mark.parametrize("sparse_per", ["query_head", "kv_head"])
def test_rows_have_the_same_bits_wherever_segments_end(sparse_per):
    """Rows of a batch are worked on in shorter segments than a row alone."""
    data = build(LLAMA.but(B=3, T=6000, Hq=2, D=64, Dv=64, sparse=100, window=64, sparse_per=sparse_per))
    out = run(data, new_cache(data))
    for b in range(3):
        one = data.at(rows=[b])
        assert_same_bits(run(one, new_cache(one))[0], out[b])


@pytest.mark.parametrize("case, T", [
    (LLAMA, 20_000), (LLAMA.but(D=64, Dv=64, sparse_per="query_head", dtype="float16"), 26_000), (LLAMA.but(map="given", B=2), 9000),
    (LLAMA.but(mixing="cache_only", sparse=600, chunk=16, window=48), 5000), (LLAMA.but(D=96, Dv=80, F=90, B=3), 3000)],
    ids=["kv_head", "query_head", "given", "C 16", "odd"])
def test_segments_beside_each_other_leave_the_same_bits(case, T):
    """One call, whose segments overlap where the scan leaves room, and calls that are too short for that."""
    data = build(case.but(T=T))
    whole, pieces = new_cache(data), new_cache(data)
    out = run(data, whole)
    assert_same_bits(run_pieces(data, pieces, range(777, T, 777)), out)
    assert_same_memory(whole, pieces, case.Hq)
    assert snapshot(whole) == snapshot(pieces)


@pytest.mark.parametrize("T", [9000, 7000])
def test_ragged_segments_beside_each_other_leave_the_same_bits(T):
    """Rows that begin late, end early or idle for whole segments."""
    data = build(LLAMA.but(B=4, T=T, Hq=2, D=64, Dv=64, sparse=100, window=64))
    starts, stops = np.array([0, T - 30, 700, 2000]), np.array([T, T, 700, 4100])
    cache = new_cache(data)
    run(data, cache, 0, 50)
    out = run(data, cache, starts=starts, stops=stops)
    for b in range(4):
        one = data.at(rows=[b])
        alone = new_cache(one)
        run(one, alone, 0, 50)
        for lo in range(starts[b], stops[b], 2000):
            hi = min(lo + 2000, stops[b])
            assert_same_bits(run(one, alone, lo, hi)[0], out[b, lo:hi])
        got, expected = snapshot(cache.select([b])), snapshot(alone)
        assert got.pop("row_ids") != expected.pop("row_ids") or b == 0
        assert got == expected


LONG_WINDOW = LLAMA.but(B=16, T=2400, Hq=2, D=64, Dv=64, sparse=100, window=1024)


@pytest.mark.parametrize("case", [
    LONG_WINDOW, LONG_WINDOW.but(dtype="float32"), LONG_WINDOW.but(score="external"), LONG_WINDOW.but(map="given", dtype="float16"),
    LONG_WINDOW.but(B=1, T=21_000, window=6400, chunk=128)], ids=["16 bits", "32 bits", "external", "given", "beside"])
def test_windows_longer_than_a_segment(case):
    """What an earlier call left in the ring goes on leaving the window, and slots that it filled being dropped, segment after
    segment; tokens of the call leave it in a later segment than they entered in."""
    data = build(case)
    whole, pieces = new_cache(data), new_cache(data)
    begin = case.window + case.window // 8 + 7
    run(data, whole, 0, begin)
    run(data, pieces, 0, begin)
    out = run(data, whole, begin, case.T)
    step = 300 if case.B > 1 else 2000
    parts = [run(data, pieces, lo, min(lo + step, case.T)) for lo in range(begin, case.T, step)]
    assert_same_bits(np.concatenate(parts, 1), out)
    assert_same_memory(whole, pieces, case.Hq)
    assert snapshot(whole) == snapshot(pieces)


@only_on_cuda
def test_a_million_tokens():
    """In one call; memory beyond inputs and outputs does not grow with the length."""
    import torch
    T = 2 ** 20 + 37
    case = LLAMA.but(T=T, Hq=1, Hkv=1, D=64, Dv=64, sparse=64, window=64)
    k = torch.randn(1, T, 1, 64, device="cuda", dtype=torch.bfloat16, generator=torch.Generator("cuda").manual_seed(0))
    v, q = k.flip(1), k.roll(1, 1)
    data = build(case.but(T=1))
    m, gate = lola_map(data), np.float32([0.4])
    data.gate = gate
    cache = new_cache(data)
    out = lola.attention(q, k, v, cache=cache, feature_map=m, gate=gate)
    assert torch.isfinite(out).all() and int(cache.tokens_seen[0]) == T
    data.case, data.stored = case, {"q": array(q), "k": array(k), "v": array(v)}
    assert_state_is_the_rest(data, cache)
    exact = closed_form(data, cache, 37)
    assert error(array(out[0, -37:]), exact) <= 5e-2


# ----------------------------------------------------------------------------------- batches

@pytest.mark.parametrize("T", [1, 5, 130])
def test_rows_have_the_same_bits_in_any_batch(dtype, T):
    """Prefill and decoding of 1, 3 and 70 rows: whatever the grid, a row's outputs and memory are its own."""
    B, at = 70, 330
    data = build(LLAMA.but(B=B, T=at + T, D=64, Dv=64, F=64, window=64, sparse=96, dtype=dtype))
    whole = new_cache(data)
    run(data, whole, 0, at)
    out = run(data, whole, at)
    for rows in ([69], [3, 0, 69]):
        some = data.at(rows=rows)
        cache = new_cache(some)
        run(some, cache, 0, at)
        assert_same_bits(run(some, cache, at), out[rows])
        assert_same_memory(whole.select(rows), cache, 4)


def test_staggered_rows_decode_as_alone(dtype):
    """Rows at different places in their chunks; each step updates some of them."""
    B, C = 5, 16
    data = build(LLAMA.but(B=B, T=220, D=64, Dv=64, F=64, window=32, chunk=C, sparse=40, dtype=dtype))
    lengths = np.array([150, 153, 0, 160, 99])
    cache = new_cache(data)
    run(data, cache, 0, 160, stops=lengths)
    outs = []
    for t in range(40):
        step = data.at(t=slice(0, 1))
        for n, x in data.stored.items():
            step.stored[n] = np.stack([x[b, lengths[b] + t] for b in range(B)])[:, None]
        idle = t % 7 == 3
        outs.append(run(step, cache, stops=np.where(np.arange(B) == 1, 1 - idle, 1)))
        if idle:
            assert not outs[-1][1].any()
            lengths[1] -= 1
    for b in range(B):
        taken = [t for t in range(40) if not (b == 1 and t % 7 == 3)]
        one = data.at(rows=[b])
        alone = new_cache(one)
        begin = [150, 153, 0, 160, 99][b]
        run(one, alone, 0, begin)
        for i, t in enumerate(taken):
            assert_same_bits(run(one, alone, begin + i, begin + i + 1)[0], outs[t][b])
        assert_same_memory(cache.select([b]), alone, 4)


def test_repeating_at_full_occupancy_gives_the_same_bits():
    """Many blocks at once: a race between them would show sooner or later."""
    data = build(LLAMA.but(B=2, T=3000, Hq=16, Hkv=4, sparse=128))
    first = new_cache(data)
    out = run(data, first)
    for _ in range(4):
        cache = new_cache(data)
        assert_same_bits(run(data, cache), out)
        assert_same_memory(cache, first, 16)


# ----------------------------------------------------------------------------------- CPU and GPU

@pytest.mark.parametrize("score", ["recency", "random", "external", "self_recall"])
def test_the_cpu_agrees(dtype, score):
    """Each within the bound of the oracle; with scores that float32 holds exactly they also hold the same pairs."""
    data = build(LLAMA.but(B=2, T=700, D=64, Dv=64, F=64, window=64, sparse=100, score=score, dtype=dtype))
    played = replay(data)
    there = new_cache(data)
    cpu = lola.Cache(lola.Config(**data.case.config), batch=2, **data.case.sizes)
    got, same = run(data, there), run(data, cpu)
    assert_close(got, played.exact, played.bound)
    if score == "self_recall":
        ours, theirs = contents(there, 4), contents(cpu, 4)
        both = [len(np.intersect1d(ours[n], theirs[n])) / max(1, len(ours[n])) for n in ours if n.startswith("sparse")]
        assert min(both) > 0.8
        return
    for b in range(2):
        for h in range(4):
            assert_same_bits(there.sparse_positions(b, h), cpu.sparse_positions(b, h))
    np.testing.assert_array_equal(host(there.folded), cpu.folded)
    # A feature beside 16-bit keys that falls between two bfloat16 values may be rounded either way: 2^-8 of it.
    bound = 4e-5 if dtype == "float32" else 8e-3
    assert error(host(there.hidden), np.asarray(cpu.hidden).astype(np.float64)) <= bound
    assert_close(same, played.exact, played.bound)


def test_stats_agree(dtype):
    """The linear term's share, on the device and on the CPU."""
    data = build(LLAMA.but(T=500, D=64, Dv=64, sparse=64, score="recency", dtype=dtype))
    q, k, v = (tensor(data.stored[n]) for n in "qkv")
    config = lola.Config(**data.case.config)
    out, share = lola.stats.linear_share(q, k, v, config=config, **options(data))
    expected, theirs = lola.stats.linear_share(*(data.stored[n] for n in "qkv"), config=config, **options(data))
    assert_close(array(share), theirs.astype(np.float64), 1e-3 if dtype == "float32" else 5e-2)
    assert error(array(out), expected.astype(np.float64)) <= (1e-4 if dtype == "float32" else 5e-2)
    assert array(out).dtype == DTYPES[dtype]
