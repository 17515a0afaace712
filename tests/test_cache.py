"""`lola.Cache`: invariant 9 and everything else that a cache says or does.

Proved here: continuing from a copy, a selection, a repetition, a saved file or a crop equals continuing from the
original, bit for bit; reset equals new; originals are untouched; damaged and foreign files raise and change nothing;
`memory()` accounts for every byte and `nbytes` follows the formula; views are views and buffers stay where they are.
"""

import os
import pickle
import zipfile

import lola
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cases import cases
from oracle import (Case, assert_same_bits, assert_same_memory, build, host, load, new_cache, oracle, oracle_cache, run,
                    run_pieces, snapshot)


def split(case, at):
    """A cache that has seen tokens 0 .. at, and the data."""
    data = build(case)
    cache = new_cache(data)
    run(data, cache, 0, at)
    return data, cache


def assert_continues_alike(data, at, cache, other, rows=None):
    """The rest of the tokens, prefilled and decoded, gives the same bits and memory from both."""
    rows = list(range(data.case.B)) if rows is None else rows
    middle = (at + data.case.T) // 2
    for lo, hi in [(at, middle), *((t, t + 1) for t in range(middle, data.case.T))]:
        out, others = run(data, cache, lo, hi), run(data.at(rows=rows), other, lo, hi)
        assert_same_bits(out[rows], others)
    assert_same_memory(cache.select(rows), other, data.case.Hq)


# ----------------------------------------------------------------------------------- invariant 9

@given(st.data())
def test_continuing_from_a_copy(isa, dtype, draw):
    case = draw.draw(cases(dtype=dtype))
    at = draw.draw(st.integers(0, case.T))
    data, cache = split(case, at)
    other = cache.copy()
    assert_same_memory(cache, other, case.Hq)
    assert other.config == cache.config
    before = snapshot(cache)
    run(data, other, at)
    assert snapshot(cache) == before
    assert_continues_alike(data, at, cache.copy(), cache)


@given(st.data())
def test_continuing_from_a_saved_file(isa, dtype, tmp_path_factory, draw):
    case = draw.draw(cases(dtype=dtype))
    at = draw.draw(st.integers(0, case.T))
    data, cache = split(case, at)
    path = tmp_path_factory.mktemp("cache") / "cache.lola"
    before = snapshot(cache)
    cache.save(path)
    assert snapshot(cache) == before
    other = load(path)
    assert other.config == cache.config
    assert_same_memory(cache, other, case.Hq)
    assert_continues_alike(data, at, cache, other)


@given(st.data())
def test_continuing_from_selected_and_repeated_rows(isa, dtype, draw):
    case = draw.draw(cases(dtype=dtype))
    at = draw.draw(st.integers(0, case.T))
    data, cache = split(case, at)
    before = snapshot(cache)
    rows = draw.draw(st.lists(st.integers(0, case.B - 1), min_size=1, max_size=5))
    chosen = cache.select(rows)
    twice = cache.repeat(2)
    same_size = [draw.draw(st.integers(0, case.B - 1)) for _ in range(case.B)]
    in_place = cache.copy()
    in_place.select_(same_size)
    assert snapshot(cache) == before
    assert_continues_alike(data, at, cache.copy(), chosen, rows)
    assert_continues_alike(data, at, cache.copy(), twice, [b for b in range(case.B) for _ in range(2)])
    assert_continues_alike(data, at, cache.copy(), in_place, same_size)


@given(st.data())
def test_continuing_from_a_crop(isa, dtype, draw):
    """crop(n) keeps n tokens; then other tokens may follow, as if the cropped ones had never been."""
    case = draw.draw(cases(dtype=dtype))
    at = draw.draw(st.integers(1, case.T))
    start = (at - 1) // case.chunk * case.chunk
    keep = draw.draw(st.integers(start, at))
    data, cache = split(case, at)
    _, expected = split(case, keep)
    cache.crop(keep)
    assert np.asarray(cache.tokens_seen).tolist() == [keep] * case.B
    if keep > start:                       # at the chunk's start its update is already done, and stays
        assert_same_memory(cache, expected, case.Hq)
    assert_continues_alike(data, keep, expected, cache)


def test_crop_beyond_the_chunk_raises(isa):
    data, cache = split(Case(T=60), 47)
    for keep in (43, 0, -1):
        before = snapshot(cache)
        with pytest.raises(ValueError):
            cache.crop(keep)
        assert snapshot(cache) == before
    with pytest.raises(TypeError):
        cache.crop("3")


def test_a_crop_changes_only_the_rows_that_are_longer(isa):
    data = build(Case(B=3, T=60))
    cache = new_cache(data)
    run(data, cache, stops=np.array([47, 45, 20]))
    before = snapshot(cache)
    cache.crop(47)                         # nothing to forget
    assert snapshot(cache) == before
    with pytest.raises(ValueError):        # row 0 could, row 1 cannot: neither does
        cache.crop(43)
    assert snapshot(cache) == before
    cache.crop(46)
    assert np.asarray(cache.tokens_seen).tolist() == [46, 45, 20]
    fresh = new_cache(data)
    run(data, fresh, stops=np.array([46, 45, 20]))
    assert_same_memory(cache, fresh, 4)


def test_what_a_crop_removes_is_forgotten(isa):
    """Continue with other tokens after the crop."""
    data, cache = split(Case(T=60), 47)
    cache.crop(45)
    fresh = new_cache(data)
    run(data, fresh, 0, 45)
    other = build(data.case.but(seed=9))
    other.weights = data.weights
    assert_same_bits(run(other, cache, 45), run(other, fresh, 45))
    assert_same_memory(cache, fresh, 4)


# ----------------------------------------------------------------------------------- reset

@given(st.data())
def test_reset_rows_are_new(isa, dtype, draw):
    case = draw.draw(cases(dtype=dtype))
    data, cache = split(case, case.T)
    rows = sorted(draw.draw(st.sets(st.integers(0, case.B - 1))))
    kept = [b for b in range(case.B) if b not in rows]
    untouched = cache.select(kept) if kept else None
    cache.reset(rows)
    if kept:
        assert_same_memory(cache.select(kept), untouched, case.Hq)
    if rows:
        fresh = new_cache(data)
        assert_same_memory(cache.select(rows), fresh.select(rows), case.Hq)
    cache.reset()
    fresh = new_cache(data)
    assert_same_memory(cache, fresh, case.Hq)
    assert_continues_alike(data, 0, fresh, cache)


def test_a_reset_cache_stays_bound_to_its_kind(isa):
    """Mixing, map and dtype are bound by the first call for the life of the cache."""
    data, cache = split(Case(T=30), 30)
    cache.reset()
    with pytest.raises(ValueError, match="feature"):
        run(build(Case(T=30, map="given")), cache)


# ----------------------------------------------------------------------------------- what it says

def test_an_empty_cache(isa, dtype):
    data = build(Case(dtype=dtype))
    cache = new_cache(data)
    assert np.asarray(cache.tokens_seen).tolist() == [0, 0]
    assert cache.hidden.shape == (2, 4, 12, 6) and cache.normalizer.shape == (2, 4, 12) and cache.folded.shape == (2, 4)
    assert not any(np.any(host(x)) for x in (cache.hidden, cache.normalizer, cache.folded))
    assert len(cache.window_positions(0)) == len(cache.sparse_positions(1, 3)) == len(cache.sparse_scores(1, 3)) == 0


@pytest.mark.parametrize("sparse_per", ["query_head", "kv_head"])
def test_scores_are_nan_until_the_first_ranking(isa, sparse_per):
    data = build(Case(T=60, sparse_per=sparse_per))
    cache, exact = new_cache(data), oracle_cache(data)
    for t in range(60):
        run(data, cache, t, t + 1)
        oracle(data.at(t=slice(t, t + 1)), cache=exact)
        for h in range(4):
            np.testing.assert_array_equal(np.isnan(cache.sparse_scores(1, h)), np.isnan(exact.sparse_scores(1, h)))
            assert len(cache.sparse_positions(1, h)) == len(exact.sparse_positions(1, h))
        np.testing.assert_array_equal(cache.window_positions(1), exact.window_positions(1))
        np.testing.assert_array_equal(host(cache.folded), exact.folded)


def test_heads_of_a_group_share_a_set(isa):
    _, cache = split(Case(T=60, sparse_per="kv_head"), 60)
    for a, b, same in [(0, 1, True), (2, 3, True), (1, 2, False)]:
        assert np.array_equal(cache.sparse_positions(0, a), cache.sparse_positions(0, b)) is same
        assert not np.array_equal(host(cache.hidden)[0, a], host(cache.hidden)[0, b])


def test_hidden_and_normalizer_are_views(isa):
    data, cache = split(Case(T=60), 30)
    hidden, normalizer = cache.hidden, cache.normalizer
    assert hidden.dtype == normalizer.dtype == np.float32
    run(data, cache, 30)
    np.testing.assert_array_equal(hidden, cache.hidden)
    np.testing.assert_array_equal(normalizer, cache.normalizer)
    assert np.any(hidden)


def test_views_outlive_the_cache(isa):
    _, cache = split(Case(T=60), 60)
    hidden, copied = cache.hidden, np.array(cache.hidden)
    del cache
    other = [split(Case(T=60, seed=i), 60) for i in range(4)]
    np.testing.assert_array_equal(hidden, copied)
    assert len(other) == 4


def test_negative_rows_and_heads_count_from_the_end(isa):
    """As everywhere in Python."""
    _, cache = split(Case(T=60), 60)
    np.testing.assert_array_equal(cache.sparse_positions(-1, -2), cache.sparse_positions(1, 2))
    np.testing.assert_array_equal(cache.sparse_scores(-2, -4), cache.sparse_scores(0, 0))
    np.testing.assert_array_equal(cache.window_positions(-1), cache.window_positions(1))
    assert_same_memory(cache.select([-1, 0]), cache.select([1, 0]), 4)
    cache.reset([-1])
    assert np.asarray(cache.tokens_seen).tolist() == [60, 0]


@pytest.mark.parametrize("row, head", [(2, 0), (-3, 0), (0, 4), (0, -5)])
def test_rows_and_heads_that_do_not_exist(isa, row, head):
    _, cache = split(Case(T=20), 20)
    for ask in (cache.sparse_positions, cache.sparse_scores):
        with pytest.raises((ValueError, IndexError), match="row|head"):
            ask(row, head)
    if head == 0:
        with pytest.raises((ValueError, IndexError), match="row"):
            cache.window_positions(row)


def test_buffers_are_the_cache_and_stay_in_place(isa, dtype):
    data, cache = split(Case(T=60, dtype=dtype), 20)
    parts = cache.buffers()
    parts = list(parts.values()) if hasattr(parts, "values") else list(parts)
    addresses = [x.__array_interface__["data"][0] if isinstance(x, np.ndarray) else np.asarray(x).ctypes.data for x in parts]
    before = snapshot(cache)
    for t in range(20, 60):
        run(data, cache, t, t + 1)
    cache.select_([1, 0])
    cache.reset([0])
    assert snapshot(cache) != before
    again = cache.buffers()
    again = list(again.values()) if hasattr(again, "values") else list(again)
    assert [np.asarray(x).ctypes.data for x in again] == addresses


# ----------------------------------------------------------------------------------- memory

@pytest.mark.parametrize("sparse_per", ["query_head", "kv_head"])
@pytest.mark.parametrize("given_features", [False, True])
def test_memory_accounts_for_every_byte(dtype, sparse_per, given_features):
    """The sizes of a layer of `needle`: window and sparse pairs, state, and a little for positions and scores."""
    case = Case(B=3, T=20, Hq=4, Hkv=2, D=64, Dv=64, F=128, window=64, chunk=64, sparse=256, sparse_per=sparse_per,
                map="given" if given_features else "hedgehog", dtype=dtype)
    data, cache = split(case, 20)
    parts = cache.memory()
    assert all(isinstance(n, int) and n >= 0 for n in parts.values())
    assert sum(parts.values()) == cache.nbytes
    size = {"float32": 4, "float16": 2, "bfloat16": 2}[dtype]
    slots = case.window + case.chunk
    pairs = (slots * 2 + 256 * case.sets) * (64 + 64) * size
    state = 4 * (128 * 64 + 128) * 4
    notes = 16 * (slots * 4 + 256 * 4) + 4096                         # positions, scores, counters, alignment
    low = high = 3 * (pairs + state)
    if given_features:
        low += 3 * (slots + 256) * 4 * 128 * 2
        high += 3 * (slots + 256) * 4 * 128 * 4
    assert low <= cache.nbytes <= high + 3 * notes
    if dtype != "float32" and not given_features:
        saving = 4096 * 2 * (64 + 64) * size / (cache.nbytes / 3)
        assert saving > {"query_head": 4.3, "kv_head": 6.0}[sparse_per]


def test_memory_does_not_grow(isa):
    data, cache = split(Case(T=400), 20)
    before = cache.nbytes, cache.memory()
    run(data, cache, 20)
    assert (cache.nbytes, cache.memory()) == before


def test_copies_are_as_large(isa):
    _, cache = split(Case(B=2, T=60), 60)
    assert cache.copy().nbytes == cache.select([1, 0]).nbytes == cache.nbytes
    assert cache.repeat(3).nbytes == pytest.approx(3 * cache.nbytes, rel=0.2)


# ----------------------------------------------------------------------------------- files

def test_a_file_loads_anywhere(tmp_path):
    """str and Path, an existing file is replaced, an idle and a full row."""
    data = build(Case(T=60))
    cache = new_cache(data)
    run(data, cache, stops=np.array([0, 60]))
    for path in (tmp_path / "a", str(tmp_path / "b")):
        (tmp_path / "a").write_bytes(b"older")
        cache.save(path)
        assert_same_memory(lola.Cache.load(path), cache, 4)


def test_a_failed_save_raises_and_leaves_no_file(tmp_path):
    _, cache = split(Case(T=20), 20)
    with pytest.raises(OSError):
        cache.save(tmp_path / "missing" / "file")
    with pytest.raises(OSError):
        lola.Cache.load(tmp_path / "nothing")
    assert not list(tmp_path.iterdir())
    with pytest.raises(TypeError):
        cache.save(3.5)


def test_truncated_files_raise(tmp_path):
    _, cache = split(Case(T=60), 60)
    path = tmp_path / "cache"
    cache.save(path)
    whole = path.read_bytes()
    for n in {0, 1, 4, 8, 16, 63, 64, 100, len(whole) // 2, len(whole) - 1}:
        path.write_bytes(whole[:n])
        with pytest.raises(ValueError):
            lola.Cache.load(path)
    path.write_bytes(whole + b"x")
    with pytest.raises(ValueError):
        lola.Cache.load(path)


def test_damaged_files_raise(tmp_path, rng):
    """Any flipped bit is noticed."""
    _, cache = split(Case(B=1, T=40), 40)
    path = tmp_path / "cache"
    cache.save(path)
    whole = path.read_bytes()
    places = set(range(min(256, len(whole)))) | set(rng.integers(0, len(whole), size=300).tolist())
    for place in sorted(places):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        with pytest.raises(ValueError):
            lola.Cache.load(path)


def test_foreign_files_raise(tmp_path, rng):
    path = tmp_path / "cache"
    np.save(path.with_suffix(".npy"), rng.normal(size=30))
    np.savez(path.with_suffix(".npz"), a=rng.normal(size=30))
    path.with_suffix(".pickle").write_bytes(pickle.dumps({"a": 1}))
    path.with_suffix(".random").write_bytes(rng.bytes(5000))
    path.with_suffix(".zero").write_bytes(bytes(5000))
    with zipfile.ZipFile(path.with_suffix(".zip"), "w") as archive:
        archive.writestr("config.json", "{}")
    for file in tmp_path.iterdir():
        with pytest.raises(ValueError):
            lola.Cache.load(file)
    with pytest.raises(OSError):
        lola.Cache.load(tmp_path)


def test_loading_runs_no_code(tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "exploded"),)

    path = tmp_path / "cache"
    path.write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ValueError):
        lola.Cache.load(path)
    np.save(tmp_path / "object.npy", np.array([Bomb()], dtype=object))
    with pytest.raises(ValueError):
        lola.Cache.load(tmp_path / "object.npy")
    assert not (tmp_path / "exploded").exists()


# ----------------------------------------------------------------------------------- wrong arguments

@pytest.mark.parametrize("act", [
    lambda c: c.select([2]), lambda c: c.select([-3]), lambda c: c.select_([0, 5]), lambda c: c.select_([0]),
    lambda c: c.repeat(0), lambda c: c.repeat(-2), lambda c: c.reset([2]), lambda c: c.reset([-3]),
], ids=["select 2", "select -3", "select_ 5", "select_ fewer", "repeat 0", "repeat -2", "reset 2", "reset -3"])
def test_wrong_rows_raise_and_change_nothing(act):
    _, cache = split(Case(T=40), 40)
    before = snapshot(cache)
    with pytest.raises((ValueError, IndexError), match="rows|row|n"):
        act(cache)
    assert snapshot(cache) == before


@pytest.mark.parametrize("act", [
    lambda c: c.select("a"), lambda c: c.select([0.5]), lambda c: c.select_(None), lambda c: c.repeat(1.5),
    lambda c: c.select([True, False]), lambda c: c.repeat("a"), lambda c: c.reset(["a"]), lambda c: c.crop(None),
    lambda c: c.crop(1.5)])
def test_rows_of_a_wrong_kind_raise_and_change_nothing(act):
    _, cache = split(Case(T=40), 40)
    before = snapshot(cache)
    with pytest.raises(TypeError):
        act(cache)
    assert snapshot(cache) == before


def test_pieces_of_one_token_and_a_copy_after_each(isa, dtype):
    """A copy is taken at every position; each continues alike."""
    data = build(Case(B=1, T=30, dtype=dtype))
    cache, copies = new_cache(data), []
    for t in range(30):
        copies.append(cache.copy())
        run(data, cache, t, t + 1)
    for t, other in enumerate(copies):
        run_pieces(data.at(t=slice(t, None)), other, [])
        assert_same_memory(other, cache, 4)
