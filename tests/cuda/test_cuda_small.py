"""Every kernel at sizes so small that compute-sanitizer gets through, with NumPy arrays alone: no other library's kernels run.

    compute-sanitizer --tool memcheck --error-exitcode 1 python -m pytest -q -p no:xdist tests/cuda/test_cuda_small.py

and the same with racecheck, initcheck and synccheck. Each case is a prefill in two pieces that ends inside a chunk, and
decoding over a chunk's end, against the oracle; and each of the five steps. Together they launch every kernel that an H100
takes, most of them in both 16-bit types.
"""

import numpy as np
import pytest

from oracle import (DTYPES, Case, assert_close, assert_same_memory, build, error, kernels, lola_map, new_cache, oracle_map,
                    reference, replay, run, run_pieces)

ARRAYS = "numpy"

LLAMA = Case(B=1, T=261, Hq=4, Hkv=1, D=128, Dv=128, F=128, window=64, chunk=64, sparse=70, mixing="gated", sparse_per="kv_head",
             dtype="bfloat16")
SMALL = Case(B=2, T=40, Hq=4, Hkv=2, D=16, Dv=16, F=16, window=8, chunk=4, sparse=6)
CASES = {
    "llama": LLAMA,
    "llama, query_head": LLAMA.but(sparse_per="query_head", dtype="float16", T=197, sparse=20),
    "llama, float32": LLAMA.but(dtype="float32", T=197, sparse=20),
    "groups of 2": LLAMA.but(Hq=2, T=197, sparse=20),
    "heads of 64": LLAMA.but(D=64, Dv=64, F=64, Hq=2, Hkv=2, sparse=33),
    "heads of 64, groups of 4": LLAMA.but(D=64, Dv=64, F=64, T=197, sparse=20),
    "heads of 64, groups of 2": LLAMA.but(D=64, Dv=64, F=64, Hq=2, T=197, sparse=20, dtype="float16"),
    "heads of 64, groups of 3": LLAMA.but(D=64, Dv=64, F=64, Hq=3, T=197, sparse=20),
    "heads of 48": LLAMA.but(D=48, Dv=32, F=64, T=197, sparse=20),
    "heads of 96": LLAMA.but(D=96, Dv=80, F=64, T=197, sparse=20),
    "heads of 96, alone": LLAMA.but(D=96, Dv=80, F=64, Hq=1, T=197, sparse=20, dtype="float16"),
    "heads of 192": LLAMA.but(D=192, Dv=192, F=64, Hq=1, T=197, sparse=20, dtype="float16"),
    "heads of 192, groups of 3": LLAMA.but(D=192, Dv=192, F=64, Hq=3, T=197, sparse=20),
    "values of 300": LLAMA.but(D=64, Dv=300, F=64, Hq=1, T=197, sparse=20),
    "heads of 256": LLAMA.but(D=256, Dv=256, F=64, Hq=1, T=197, sparse=5),
    "features of 256": LLAMA.but(F=256, window=16, chunk=16, sparse=20, T=84),
    "heads of 64, float32": LLAMA.but(D=64, Dv=64, F=64, Hq=2, window=16, chunk=16, sparse=20, T=84, dtype="float32"),
    "heads of 201": LLAMA.but(D=201, Dv=7, F=64, Hq=2, window=16, chunk=16, sparse=20, T=84),
    "features of 130": LLAMA.but(F=130, Dv=33, Hq=2, window=16, chunk=16, sparse=20, T=84),
    "features of 130, float16": LLAMA.but(F=130, Dv=33, Hq=2, window=16, chunk=16, sparse=20, T=84, dtype="float16"),
    "features of 90": LLAMA.but(F=90, Dv=33, Hq=2, window=16, chunk=16, sparse=20, T=84),
    "features of 90, float16": LLAMA.but(F=90, Dv=33, Hq=2, window=16, chunk=16, sparse=20, T=84, dtype="float16"),
    "C 16": LLAMA.but(window=32, chunk=16, sparse=20, T=100),
    "more rows than groups of blocks": LLAMA.but(B=12, window=8, chunk=4, sparse=6, T=29),
    "more pairs than rounds": LLAMA.but(D=32, Dv=32, F=32, Hq=1, sparse=600, T=13 * 64 + 4),
    "C 1": LLAMA.but(window=5, chunk=1, sparse=8, T=40, D=64, Dv=64, F=64),
    "float32": SMALL,
    "float16": SMALL.but(dtype="float16", mixing="lolcats"),
    "bfloat16": SMALL.but(dtype="bfloat16", mixing="cache_only", sparse_per="kv_head"),
    "no cache": SMALL.but(sparse=0, mixing="gated"),
    "no cache, 16 bits": SMALL.but(sparse=0, mixing="lolcats", dtype="bfloat16"),
    "all cached": SMALL.but(sparse=40),
    "odd": SMALL.but(Hq=3, Hkv=1, D=7, Dv=33, F=22, window=6, chunk=3, sparse=7),
    "odd, 16 bits": SMALL.but(Hq=3, Hkv=3, D=33, Dv=7, F=34, window=5, chunk=5, sparse=3, dtype="bfloat16"),
    "odd, float16": SMALL.but(Hq=3, Hkv=1, D=33, Dv=7, F=34, window=5, chunk=5, sparse=3, dtype="float16"),
    "one": Case(B=1, T=12, Hq=1, Hkv=1, D=1, Dv=1, F=2, window=1, chunk=1, sparse=1),
    "groups of 16": SMALL.but(B=1, Hq=16, Hkv=1, T=30, sparse_per="kv_head", dtype="bfloat16"),
    "external": SMALL.but(score="external", sparse_per="kv_head"),
    "random": SMALL.but(score="random"),
    "recency": SMALL.but(score="recency"),
    "value_norm": SMALL.but(score="value_norm", dtype="float16"),
    "key_norm": SMALL.but(score="key_norm"),
    "given": SMALL.but(map="given", dtype="bfloat16"),
    "given, float32": SMALL.but(map="given"),
    "hedgehog_exp": SMALL.but(map="hedgehog_exp", dtype="bfloat16"),
    "elu_plus_one": SMALL.but(map="elu_plus_one"),
    "relu": SMALL.but(map="relu", dtype="float16"),
    "relu_w": SMALL.but(map="relu_w"),
}


@pytest.mark.parametrize("name", CASES)
def test_prefill_and_decoding(name):
    case = CASES[name]
    data = build(case)
    played = replay(data)
    cache = new_cache(data)
    tail = min(case.T - 2, (case.T - 1) % case.chunk + 4)    # the last chunk, and three tokens of the one before
    at = case.T - tail
    out = run_pieces(data, cache, [at // 2 + 1, *range(at, case.T)])
    assert_close(out, played.exact, played.bound)
    assert_close(played.record.out, played.exact, played.bound)
    assert_same_memory(cache, played.record.cache, case.Hq)
    assert all(reference.margin(ranking) >= -1e-5 for ranking in played.trace)


@pytest.mark.parametrize("case", [SMALL, LLAMA.but(B=3, T=150, D=64, Dv=64, F=64, sparse=9)], ids=["small", "wide"])
def test_ragged_and_packed_rows(case):
    """Starts, stops, idle rows, packed rows; in prefill and in decoding; check=True."""
    data, T, B = build(case), case.T, case.B
    padded, packed = new_cache(data), new_cache(data)
    starts, stops = np.array([3, 0, T])[:B], np.array([T, T - 7, T])[:B]
    out = run(data, padded, starts=starts, stops=stops, check=True)
    assert not out[0, :3].any() and not out[1, T - 7:].any() and np.isfinite(out.astype(np.float32)).all()
    row = data.at()
    row.stored = {n: np.concatenate([x[b, starts[b]:stops[b]] for b in range(B)])[None] for n, x in data.stored.items()}
    run(row, packed, cu_seqlens=np.concatenate([[0], np.cumsum(stops - starts)]), check=True)
    assert_same_memory(padded, packed, case.Hq)
    for t in range(case.chunk + 2):
        run(data, padded, t % T, t % T + 1, stops=np.array([1, t % 2, 1])[:B])


def test_rows_of_a_cache():
    """copy, select, repeat, reset, crop, to."""
    data = build(SMALL)
    cache = new_cache(data)
    run(data, cache, 0, 30)
    for other in (cache.copy(), cache.select([1, 0]), cache.repeat(1), cache.to("cpu").copy().to(cache.device)):
        run(data, other, 30)
    run(data.at(rows=[0, 0, 1, 1]), cache.repeat(2), 30)
    cache.select_([1, 1])
    cache.crop(29)
    cache.reset([0])
    run(data, cache, 30)
    cache.sync()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("B, T, S, Hq, Hs, D, F, Dv", [
    (2, 5, 17, 4, 2, 24, 18, 33), (1, 70, 130, 2, 2, 64, 64, 64), (1, 3, 9, 3, 1, 7, 5, 3)])
def test_steps(rng, dtype, B, T, S, Hq, Hs, D, F, Dv):
    normal = lambda *shape: rng.normal(size=shape).astype(DTYPES[dtype])
    fk = np.exp(rng.normal(size=(B, S, Hq, F))).astype(np.float32)
    v, k, q = normal(B, S, Hs, Dv), normal(B, S, Hs, D), normal(B, T, Hq, D)
    H, s = np.zeros((B, Hq, F, Dv), np.float32), np.zeros((B, Hq, F), np.float32)
    count = rng.integers(1, S + 1, size=(B, Hs))
    kernels.fold(fk, v, H, s)
    kernels.fold(fk, v, H, s, count)
    exact = np.zeros(H.shape), np.zeros(s.shape)
    reference.fold(fk, v, *exact)
    reference.fold(fk, v, *exact, count)
    assert error(H, exact[0]) <= 2e-5 and error(s, exact[1]) <= 2e-5
    assert error(kernels.score(fk, v, H, s), reference.score(fk, v, H, s)) <= 2e-5
    scores = rng.normal(size=(B, S, Hs)).astype(np.float32)
    for keep in (0, 1, S // 2, S, S + 3):
        for counted in (None, count):
            for got, right in zip(kernels.select(scores, keep, counted), reference.select(scores, keep, counted)):
                np.testing.assert_array_equal(got, right)
    fq = np.exp(rng.normal(size=(B, T, Hq, F))).astype(np.float32)
    gate = np.full(Hq, 0.4, np.float32)
    for more in (dict(causal=S >= T), dict(fq=fq, H=H, s=s, count=count), dict(fq=fq, H=H, s=s, gate=gate, mixing="gated")):
        assert error(kernels.attend(q, k, v, **more), reference.attend(q, k, v, **more)) <= (1e-4 if dtype == "float32" else 0.05)
    data = build(Case(B=B, T=T, Hq=Hq, Hkv=Hs, D=D, F=2 * F, dtype=dtype))
    got = kernels.features(data.stored["q"], lola_map(data), "q", Hq)
    exact = reference.features(data.stored["q"], oracle_map(data), "q", Hq)
    assert np.abs(got - exact).max() <= (1e-5 if dtype == "float32" else 0.01)
