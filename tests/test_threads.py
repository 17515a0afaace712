"""Threads, processes and memory around a call.

Proved here: other Python threads run while attention computes; caches used from several threads keep their bits, and one
cache shared by threads loses no token; a forked child computes; an interrupted call commits nothing; scratch memory does
not grow with the length of the input; and nothing leaks.
"""

import gc
import os
import resource
import signal
import subprocess
import sys
import threading
import time

import lola
import numpy as np
import pytest

from oracle import Case, assert_same_bits, assert_same_memory, build, new_cache, run, run_pieces, snapshot

LONG = Case(B=1, T=4096, Hq=8, Hkv=8, D=64, Dv=64, F=64, window=64, chunk=64, sparse=256)


@pytest.fixture
def scalar():
    """The slowest instruction set, so that calls last long enough to look at."""
    before = lola._lola.isa()
    lola._lola.set_isa("scalar")
    yield
    lola._lola.set_isa(before)


def test_other_threads_run_while_attention_computes(scalar, threads):
    threads(1)
    data = build(LONG)
    cache, stamps, stop = new_cache(data), [], threading.Event()

    def count():
        while not stop.is_set():
            stamps.append(time.perf_counter())
            time.sleep(0.002)

    thread = threading.Thread(target=count)
    thread.start()
    begin = time.perf_counter()
    run(data, cache)
    end = time.perf_counter()
    stop.set()
    thread.join()
    inside = [t for t in stamps if begin + 0.1 * (end - begin) < t < end - 0.1 * (end - begin)]
    assert end - begin > 0.05 and len(inside) >= 5


def test_threads_with_caches_of_their_own(threads):
    threads(2)
    data = [build(Case(T=200, seed=i)) for i in range(4)]
    expected = [run(d, new_cache(d)) for d in data]
    got = [None] * 4

    def work(i):
        for _ in range(5):
            got[i] = run_pieces(data[i], new_cache(data[i]), range(0, 200, 7))
            got[i] = run(data[i], new_cache(data[i]))

    workers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    [w.start() for w in workers]
    [w.join() for w in workers]
    for a, b in zip(got, expected):
        assert_same_bits(a, b)


def test_threads_that_share_a_cache_lose_no_token():
    """Calls on one cache come one after the other; the tokens are all the same, so their order does not matter."""
    data = build(Case(B=1, T=400))
    for name, x in data.stored.items():
        x[:] = x[:, :1]
    cache, plain = new_cache(data), new_cache(data)
    run(data, plain)

    def work(i):
        for t in range(i * 100, i * 100 + 100, 5):
            run(data, cache, t, t + 5)
            cache.copy(), cache.sparse_positions(0, 0), cache.memory()

    workers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    [w.start() for w in workers]
    [w.join() for w in workers]
    assert_same_memory(cache, plain, 4)


def test_changing_the_number_of_threads_meanwhile(threads):
    data = build(Case(T=300))
    expected, done = run(data, new_cache(data)), threading.Event()

    def change():
        while not done.is_set():
            for n in (1, 3, 2):
                lola.set_num_threads(n)

    thread = threading.Thread(target=change)
    thread.start()
    try:
        for _ in range(10):
            assert_same_bits(run(data, new_cache(data)), expected)
    finally:
        done.set()
        thread.join()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_computes(threads):
    """With the pool already running in the parent; the child gets one of its own."""
    threads(3)
    data = build(Case(T=300))
    cache = new_cache(data)
    run(data, cache, 0, 100)
    expected = run(data, cache.copy(), 100)
    child = os.fork()
    if child == 0:
        try:
            same = run(data, cache, 100).tobytes() == expected.tobytes()
            lola.set_num_threads(2)
            same &= run_pieces(data, new_cache(data), [50]).shape == (2, 300, 4, 6)
            os._exit(0 if same else 3)
        except BaseException:
            os._exit(4)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            assert os.waitstatus_to_exitcode(status) == 0
            break
        time.sleep(0.01)
    else:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        pytest.fail("the forked child hangs")
    assert_same_bits(run(data, cache, 100), expected)


def test_an_interrupted_call_commits_nothing(scalar, threads):
    threads(2)
    data = build(LONG.but(T=16384, sparse=512))
    cache = new_cache(data)
    run(data, cache, 0, 300)
    before = snapshot(cache)
    expected = run(data, cache.copy(), 300, 400)
    timer = threading.Timer(0.15, os.kill, (os.getpid(), signal.SIGINT))
    begin = time.perf_counter()
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        run(data, cache, 300)
        time.sleep(5)                      # too fast to be interrupted: the snapshot below then differs
    assert time.perf_counter() - begin < 3
    assert snapshot(cache) == before
    assert_same_bits(run(data, cache, 300, 400), expected)


def test_scratch_does_not_grow_with_the_length():
    peaks = []
    for T in (4096, 8192):
        data = build(Case(B=1, T=T, Hq=8, Hkv=8, D=64, Dv=64, F=128, window=64, chunk=64, sparse=256))
        run(data, new_cache(data))
        peaks.append(lola._lola.scratch_peak())
    assert 0 < peaks[1] <= 1.01 * peaks[0]
    # One segment: less than the queries, keys, values and features of the whole.
    assert peaks[1] < 8192 * 8 * (3 * 64 + 2 * 128) * 4 / 2


@pytest.mark.parametrize("T", [1, 17, 200])
def test_nothing_leaks(T):
    """Repeating a call a hundred times leaves the process no larger; errors and copies included."""
    data = build(Case(B=1, T=T, Hq=8, Hkv=8, D=64, Dv=64, F=64, window=64, chunk=64, sparse=256))
    cache = new_cache(data)

    def once():
        run(data, cache)
        cache.copy().select([0]).hidden.sum()
        with pytest.raises(ValueError):
            run(data, cache, stops=np.array([T + 1]))
        cache.reset()

    for _ in range(20):
        once()
    gc.collect()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(100):
        once()
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * (1 if sys.platform == "darwin" else 1024)
    assert grown < 20 * cache.nbytes       # one leaked copy per round would be a hundred


def test_reference_counts_are_kept():
    data = build(Case(T=20, map="given", mixing="gated"))
    cache = new_cache(data)
    objects = [*data.stored.values(), data.gate, cache]
    before = [sys.getrefcount(x) for x in objects]
    for _ in range(10):
        run(data, cache)
        with pytest.raises(ValueError):
            run(data, cache, stops=np.array([1, 99]))
    gc.collect()
    assert [sys.getrefcount(x) for x in objects] == before


def test_the_number_of_threads_comes_from_the_environment():
    code = "import lola; print(lola.get_num_threads())"
    where = os.path.dirname(os.path.dirname(lola.__file__))

    def ask(value):
        environment = {**os.environ, "LOLA_NUM_THREADS": value,
                       "PYTHONPATH": where + os.pathsep + os.environ.get("PYTHONPATH", "")}
        return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=60)

    assert ask("3").stdout.strip() == "3"
    for bad in ("0", "many", "-1"):
        done = ask(bad)
        assert done.returncode != 0 and "LOLA_NUM_THREADS" in done.stderr
