"""Decoding on a device where 16-bit caches of width 128 stream through its pipeline, and next to that.

Proved here: a row's outputs and memory have the same bits in any batch, whichever rows beside it begin a chunk or are idle;
entering pairs, groups of heads, given features and more rows than a block looks after, against the oracle or one row alone;
keys, values and queries that lie anywhere.
"""

import numpy as np
import pytest

import lola
import oracle
from oracle import (Case, assert_close, assert_same_bits, assert_same_memory, build, lola_map, new_cache, replay, run,
                    run_pieces)
from places import only_on_cuda, tensor

WIDE = Case(B=1, T=260, Hq=4, Hkv=1, D=128, Dv=128, F=128, window=64, chunk=32, sparse=70, mixing="gated", sparse_per="kv_head",
            dtype="bfloat16")


@pytest.mark.parametrize("case", [
    WIDE, WIDE.but(sparse_per="query_head", dtype="float16"), WIDE.but(Hq=8), WIDE.but(Hq=16, Hkv=2, sparse_per="query_head"),
    WIDE.but(Hq=2, Hkv=2, F=64), WIDE.but(map="given"), WIDE.but(map="given", sparse_per="query_head", F=192),
    WIDE.but(map="relu_w", mixing="lolcats"), WIDE.but(mixing="cache_only"), WIDE.but(sparse=0), WIDE.but(sparse=300),
    WIDE.but(score="external"), WIDE.but(window=5, chunk=1, sparse=9, T=90), WIDE.but(window=192, chunk=64, T=420),
    WIDE.but(D=64, Dv=64, F=64), WIDE.but(F=96), WIDE.but(dtype="float32")], ids=str)
def test_against_the_oracle(case):
    data = build(case)
    played = replay(data)
    cache = new_cache(data)
    at = case.T - 2 * case.chunk - 5
    out = run_pieces(data, cache, [at // 2, *range(at, case.T)])
    assert_close(out, played.exact, played.bound)
    assert_same_memory(cache, played.record.cache, case.Hq)


def decode_ragged(data, rows, lengths, steps, batch_of):
    """Prefills rows to their lengths, then decodes; in step i only rows with (row + i) % 7 != 0 take a token. Returns the
    outputs of each row's tokens and the caches, each holding the rows that `batch_of` gives together."""
    outs, caches = {row: [] for row in rows}, []
    for batch in batch_of:
        part = data.at(list(batch))
        cache = new_cache(part)
        seen = np.array([lengths[row] for row in batch])
        run(part, cache, stops=seen)
        for i in range(steps):
            takes = np.array([(row + i) % 7 != 0 for row in batch])
            step = part.at()
            step.stored = {n: np.stack([x[j, seen[j]:seen[j] + 1] for j in range(len(batch))]) for n, x in part.stored.items()}
            out = run(step, cache, stops=takes.astype(np.int64))
            for j, row in enumerate(batch):
                if takes[j]:
                    outs[row].append(out[j])
            seen += takes
        caches.append(cache)
    return {row: np.stack(out) for row, out in outs.items()}, caches


@pytest.mark.parametrize("case", [WIDE, WIDE.but(sparse_per="query_head", dtype="float16"), WIDE.but(map="given"),
                                  WIDE.but(D=64, Dv=64, F=64)], ids=str)
def test_rows_are_the_same_in_any_batch(case):
    rows = range(6)
    data = build(case.but(B=6))
    lengths = [150, 95, 127, 0, 191, 128]
    together, (cache,) = decode_ragged(data, rows, lengths, 45, [rows])
    alone, caches = decode_ragged(data, rows, lengths, 45, [[row] for row in rows])
    for row in rows:
        assert_same_bits(together[row], alone[row])
        assert_same_memory(cache.select([row]), caches[row], case.Hq)


@pytest.mark.parametrize("case", [
    WIDE, WIDE.but(sparse_per="query_head", dtype="float16"), WIDE.but(map="hedgehog_exp", F=192), WIDE.but(score="external"),
    WIDE.but(Hq=16, Hkv=4, mixing="lolcats"), WIDE.but(Hq=3, mixing="cache_only")], ids=str)
def test_rows_of_a_large_batch_are_those_of_a_small_one(case):
    """A small batch goes through a kernel of its own; a row of a large one has the same bits there."""
    B = 160 // case.Hkv
    rows, few = range(B), [0, 3, 6, B - 1]
    data = build(case.but(B=B, T=190))
    lengths = [60 + 29 * row % 70 for row in rows]
    together, (cache,) = decode_ragged(data, rows, lengths, 40, [rows])
    alone, caches = decode_ragged(data, few, lengths, 40, [[row] for row in few])
    for i, row in enumerate(few):
        assert_same_bits(together[row], alone[row])
        assert_same_memory(cache.select([row]), caches[i], case.Hq)


def test_more_rows_than_a_block_looks_after():
    case = WIDE.but(B=1300, T=24, Hq=1, window=4, chunk=4, sparse=3)
    data = build(case)
    ahead = np.arange(case.B) % 5
    cache = new_cache(data)
    run(data, cache, hi=12, stops=8 + ahead)
    steps = [data.at(t=slice(t, t + 1)) for t in range(12, 19)]
    outs = [run(step, cache) for step in steps]
    for row in (0, 1, 131, 640, 1299):
        one = data.at([row])
        single = new_cache(one)
        run(one, single, hi=8 + ahead[row])
        for step, out in zip(steps, outs):
            assert_same_bits(run(step.at([row]), single), out[[row]])
        assert_same_memory(cache.select([row]), single, case.Hq)


@only_on_cuda
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_arrays_that_lie_anywhere(dtype):
    """Steps whose rows of q, k and v do not begin at 16 bytes, or whose q is of another type, give the bits of those that do."""
    import torch
    data = build(WIDE.but(B=2, T=140, dtype=dtype))
    gate = tensor(data.gate)

    def decode(change, change_q):
        cache = new_cache(data)
        outs = []
        for lo, hi in [(0, 120), *((t, t + 1) for t in range(120, 140))]:
            q, k, v = (tensor(data.stored[n][:, lo:hi]) for n in "qkv")
            outs.append(lola.attention(change_q(q), change(k), change(v), cache=cache, feature_map=lola_map(data), gate=gate))
        return torch.cat(outs, 1), cache

    def shifted(x):
        """The same numbers an element further, in steps: prefill multiplies such rows in another way."""
        if x.shape[1] > 1:
            return x
        wide = torch.empty(*x.shape[:-1], x.shape[-1] + 1, dtype=x.dtype, device=x.device)
        wide[..., 1:] = x
        return wide[..., 1:]

    plain, cache = decode(lambda x: x, lambda x: x)
    for change_q in (shifted, lambda x: x):
        out, moved = decode(shifted, change_q)
        assert_same_bits(oracle.place.take(out[:, 120:]), oracle.place.take(plain[:, 120:]))
        assert_same_memory(moved, cache, 4)
    if dtype == "bfloat16":                              # float16 caches do not split float32 queries
        out, _ = decode(lambda x: x, lambda x: x.float())
        assert_same_bits(oracle.place.take(out[:, 120:].bfloat16()), oracle.place.take(plain[:, 120:]))
