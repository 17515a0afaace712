"""`lola.Cache` on the device: moving, views and buffers, files, what it says.

Proved here: a cache moves to the device and back, at any token and as often as one likes, and continues; all that was said
of it is then the same; its buffers are device memory that other libraries see without a copy and that stays in place;
rows are selected, repeated, reset and cropped as on the CPU (test_cuda_contract.py has the CPU's own tests of that).
"""

import copy
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import lola
from cases import cases
from oracle import (Case, assert_close, assert_same_bits, assert_same_memory, build, contents, host, new_cache, options, record,
                    replay, run, run_pieces, snapshot)
from places import DEVICE, array, only_on_cuda, tensor
from test_attention import assert_rankings
from test_cuda_sizes import LLAMA

SMALL = Case(T=60, D=24, Dv=40, F=36, mixing="gated")
WIDE = LLAMA.but(B=2, T=600, D=64, Dv=64, F=64, window=64, sparse=96)


def split(case, at):
    data = build(case)
    cache = new_cache(data)
    run(data, cache, 0, at)
    return data, cache


# ----------------------------------------------------------------------------------- moving

@given(st.data())
def test_a_cache_that_moves_at_every_chunk_continues(dtype, draw):
    """There and back again; outputs and rankings are judged along its own history."""
    case = draw.draw(cases(dtype=dtype))
    data = build(case)

    def move(cache, chunk):
        before = contents(cache, case.Hq)
        moved = cache.to(DEVICE if chunk % 2 else "cpu")
        after = contents(moved, case.Hq)
        assert moved.config == cache.config and all(np.array_equal(after[n], x, equal_nan=True) for n, x in before.items())
        return moved

    # Features come from two backends, which may round a value at a boundary of bfloat16 differently.
    played = replay(data, record(data, move), own_features=dtype == "float32")
    slack = 1 if dtype == "float32" else 2
    assert_close(played.record.out, played.exact, slack * played.bound)
    if dtype == "float32":
        assert_rankings(played, case)


@pytest.mark.parametrize("case", [SMALL.but(score="external"), WIDE.but(score="recency"), WIDE.but(score="random", chunk=16),
                                  SMALL.but(score="external", map="given")], ids=["external", "recency", "random", "given"])
def test_moving_inside_chunks(dtype, case):
    """With scores that float32 holds exactly all backends cache the same pairs, so any way leads to the same memory."""
    data = build(case.but(dtype=dtype))
    T = case.T
    here, moving = lola.Cache(lola.Config(**case.config), batch=case.B, **data.case.sizes), new_cache(data)
    expected = run(data, here)
    cuts = [0, T // 7, T // 3, T // 3 + 1, T // 2, T - 2, T - 1, T]
    outs = []
    for i, (lo, hi) in enumerate(zip(cuts, cuts[1:])):
        moving = moving.to("cpu" if i % 2 else DEVICE)
        outs.append(run(data, moving, lo, hi))
    moving = moving.to("cpu")
    assert moving.device == "cpu" and isinstance(moving.hidden, np.ndarray)
    a, b = contents(here, case.Hq), contents(moving, case.Hq)
    for name, x in a.items():
        if name in ("hidden", "normalizer"):
            assert_close(b[name], x.astype(np.float64), 4e-5 if dtype == "float32" else 5e-3)
        elif not name.startswith("scores"):
            np.testing.assert_array_equal(b[name], x)
    played = replay(data)
    for got in (np.concatenate(outs, axis=1), expected):
        assert_close(got, played.exact, 2 * played.bound)


def test_moving_keeps_every_byte(dtype):
    data, cache = split(WIDE.but(dtype=dtype), 500)
    here = cache.to("cpu")
    assert snapshot(here) == snapshot(cache) == snapshot(here.to(DEVICE))
    assert cache.to("cpu").nbytes == cache.nbytes and here.memory() == cache.memory()
    # What the first call fixed travels along.
    other = build(data.case.but(map="given"))
    for there in (here, here.to(DEVICE)):
        with pytest.raises(ValueError, match="feature"):
            run(other, there, 500)
    assert_same_bits(run(data, here.copy().to(DEVICE), 500), run(data, cache, 500))


def test_to_where_it_is():
    data, cache = split(SMALL, 30)
    assert_same_memory(cache.to(DEVICE), cache, 4)
    assert cache.to(DEVICE).device.startswith(DEVICE)
    if DEVICE == "cuda":
        assert cache.to("cuda:0").device == cache.device == "cuda:0"
    assert_same_bits(run(data, cache.copy().to(DEVICE), 30), run(data, cache, 30))


@only_on_cuda
def test_names_of_devices():
    import torch
    config, sizes = lola.Config(), dict(heads=1, head_dim=4, feature_dim=4)
    for name in ("cuda", "cuda:0", torch.device("cuda"), torch.device("cuda", 0)):
        cache = lola.Cache(config, device=name, **sizes)
        assert cache.device == "cuda:0" and cache.to("cpu").to(name).device == "cuda:0"
    for name in (f"cuda:{torch.cuda.device_count()}", "cuda:-1", "cuda:x", "tpu", "cuda:999999999999999999999"):
        with pytest.raises((ValueError, RuntimeError), match="device|cuda"):
            lola.Cache(config, device=name, **sizes)
        with pytest.raises((ValueError, RuntimeError), match="device|cuda"):
            cache.to(name)
    with pytest.raises(TypeError, match="device"):
        cache.to(3.5)


# ----------------------------------------------------------------------------------- views and buffers

@only_on_cuda
def test_buffers_are_the_cache_and_stay_in_place(dtype):
    """Addresses last as long as the cache: through calls, select_, reset and crop."""
    data, cache = split(WIDE.but(dtype=dtype), 200)
    where = lambda: {n: x.__cuda_array_interface__["data"][0] for n, x in cache.buffers().items()}
    before, addresses = snapshot(cache), where()
    for t in range(200, 330):
        run(data, cache, t, t + 1)
    cache.select_([1, 0])
    run(data, cache, 330, 600)
    cache.crop(599)
    cache.reset([0])
    assert snapshot(cache) != before and where() == addresses
    assert sum(x.nbytes for x in cache.buffers().values()) == cache.nbytes


@only_on_cuda
def test_other_libraries_see_the_memory_itself(dtype):
    """hidden and normalizer, through DLPack and the CUDA array interface; what they see changes with the cache."""
    import torch
    data, cache = split(WIDE.but(dtype=dtype), 300)
    hidden = torch.from_dlpack(cache.hidden)
    assert hidden.is_cuda and hidden.dtype == torch.float32 and tuple(hidden.shape) == tuple(cache.hidden.shape) == (2, 4, 64, 64)
    kept = hidden.clone()
    assert torch.equal(kept, torch.as_tensor(cache.buffers()["hidden"], device="cuda"))  # torch takes no read-only interface
    run(data, cache, 300)
    assert not torch.equal(hidden, kept) and hidden.data_ptr() == torch.from_dlpack(cache.hidden).data_ptr()
    assert_same_bits(array(hidden), host(cache.hidden))
    for name, x in cache.buffers().items():
        seen = torch.from_dlpack(x)
        assert seen.data_ptr() == x.__cuda_array_interface__["data"][0], name
        assert seen.contiguous().view(torch.uint8).cpu().numpy().tobytes() == host(x).tobytes(), name
    del cache
    assert torch.isfinite(hidden).all()                      # the view keeps the memory


@only_on_cuda
def test_views_see_what_is_queued():
    """Memory read on another stream waits for the cache's last use."""
    import torch
    data = build(WIDE)
    plain, cache = new_cache(data), new_cache(data)
    run(data, plain)
    tokens = [tensor(data.stored[n]) for n in "qkv"]
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(10 ** 8)
        lola.attention(*tokens, cache=cache, **options(data))
    seen = torch.from_dlpack(cache.hidden).clone()
    torch.cuda.synchronize()
    assert_same_bits(array(seen), host(plain.hidden))


def test_a_copy_is_independent(dtype):
    data, cache = split(WIDE.but(dtype=dtype), 300)
    before = snapshot(cache)
    others = [cache.copy(), copy.copy(cache), copy.deepcopy(cache), pickle.loads(pickle.dumps(cache)).to(DEVICE)]
    expected = None
    for other in others:
        assert other.device == cache.device
        assert_same_memory(other, cache, 4)
        out = run(data, other, 300)
        expected = out if expected is None else expected
        assert_same_bits(out, expected)
    assert snapshot(cache) == before


def test_files_are_the_same_from_both_sides(tmp_path, dtype):
    """A cache saved on the device equals its copy saved on the CPU, and loads on either."""
    data, cache = split(WIDE.but(dtype=dtype), 450)
    cache.save(tmp_path / "there")
    cache.to("cpu").save(tmp_path / "here")
    assert (tmp_path / "there").read_bytes() == (tmp_path / "here").read_bytes()
    for name in ("there", "here"):
        loaded = lola.Cache.load(tmp_path / name).to(DEVICE)
        assert_same_bits(run(data, loaded, 450), run(data, cache.copy(), 450))


def test_repr_and_memory():
    _, cache = split(WIDE, 70)
    assert "tokens_seen=[70, 70]" in repr(cache) and str(cache.nbytes) in repr(cache)
    parts = cache.memory()
    assert sum(parts.values()) == cache.nbytes and {"window", "sparse", "state"} <= set(parts)


# ----------------------------------------------------------------------------------- rows, at real sizes

def test_rows_selected_at_real_sizes(dtype):
    """More rows than copies go together: beams that reorder at each step."""
    data, cache = split(WIDE.but(B=7, dtype=dtype), 400)
    rng = np.random.default_rng(0)
    beams = cache.copy()
    order = np.arange(7)
    for t in range(400, 420):
        rows = rng.integers(0, 7, size=7)
        beams.select_(rows)
        order = order[rows]
        got = run(data.at(rows=list(order)), beams, t, t + 1)
        expected = run(data, cache, t, t + 1)
        assert_same_bits(got, expected[order])
    assert_same_memory(beams, cache.select(order.tolist()), 4)


def test_speculative_steps_are_taken_back(dtype):
    """crop after wrong guesses inside a chunk, over several chunks."""
    data, cache = split(WIDE.but(dtype=dtype, chunk=32), 500)
    plain = cache.copy()
    wrong = build(data.case.but(seed=5))
    wrong.weights, wrong.gate = data.weights, data.gate
    for t in range(500, 560):
        if t % 32 < 28:
            run(wrong, cache, t, t + 3)
            cache.crop(t)
        got, expected = run(data, cache, t, t + 1), run(data, plain, t, t + 1)
        assert_same_bits(got, expected)
    assert_same_memory(cache, plain, 4)


def test_rows_come_and_go(dtype):
    """Serving: rows are reset and refilled while others decode; each ends as if alone."""
    data = build(WIDE.but(B=3, T=500, dtype=dtype))
    cache = new_cache(data)
    run(data, cache, 0, 300, stops=np.array([300, 123, 0]))
    cache.reset([1])
    run(data, cache, 0, 400, stops=np.array([0, 400, 311]))
    for t in range(20):
        step = data.at(t=slice(0, 1))
        for n, x in data.stored.items():
            step.stored[n] = np.stack([x[b, at + t] for b, at in enumerate((300, 400, 311))])[:, None]
        run(step, cache)
    for b, n in enumerate((320, 420, 331)):
        one = data.at(rows=[b])
        alone = new_cache(one)
        run_pieces(one.at(t=slice(0, n)), alone, range(n - 20, n))
        assert_same_memory(cache.select([b]), alone, 4)


@only_on_cuda
def test_sync_after_eager_calls_changes_nothing():
    data, cache = split(WIDE, 100)
    before = np.asarray(cache.tokens_seen).tolist()
    assert cache.sync() is None
    assert np.asarray(cache.tokens_seen).tolist() == before == [100, 100]
    run(data, cache, 100, 163, stops=tensor(np.array([63, 2])))        # a device alone knows
    cache.sync()
    assert np.asarray(cache.tokens_seen).tolist() == [163, 102]
    assert len(cache.window_positions(1)) == 102
