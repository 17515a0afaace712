"""The benchmarks: the work they count, the gate before each speed, and that they run.

Proved here: useful FLOP and bytes are those of a count pair by pair; LoLA in plain PyTorch is LoLA; a wrong result prints no
speed and ends in exit status 1; every section runs, and what it wrote can be shown again.
"""

import dataclasses
import gc
import json
import pathlib
import shutil
import sys

import lola
import numpy as np
import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "benchmarks"))

import run as benchmark                                               # noqa: E402
import sections                                                       # noqa: E402
import workload                                                       # noqa: E402

from oracle import reference                                          # noqa: E402

SMALL = workload.Geometry(heads=4, kv_heads=2, head_dim=16, feature_dim=16, window=16, chunk=8, sparse=24)
TINY = dataclasses.replace(
    sections.QUICK, budget=0.01, layer=SMALL, single=SMALL.but(kv_heads=4), head_dims=(16,), attention_tokens=128,
    softmax_tokens=(128,), plain_tokens=128, context=128, cold=0.001, scaling=(128, 256), scaling_layer=SMALL, sparse=(8, 24))

needs_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="the ceilings take a C compiler")


@pytest.mark.parametrize("score", ["self_recall", "external"])
@pytest.mark.parametrize("sparse", [0, 4, 24])
@pytest.mark.parametrize("tokens", [5, 24, 150])
def test_useful_work_is_that_of_the_oracle(score, sparse, tokens):
    g = SMALL.but(score=score, sparse=sparse)
    layer, data = workload.new_layer(g), workload.new_tokens(g, tokens).scored()
    cache = reference.Cache(g.config, heads=g.heads, kv_heads=g.kv_heads, head_dim=g.head_dim, value_dim=g.head_dim,
                            feature_dim=g.feature_dim)
    trace, pairs, reads = [], 0, 0
    for t in range(tokens):
        q, k, v = data.part(t, t + 1).stored
        reference.attention(q, k, v, cache=cache, feature_map=layer.map, gate=layer.gate, trace=trace,
                            scores=data.part(t, t + 1).scores if score == "external" else None)
        pairs += len(cache.window_positions(0)) + len(cache.sparse_positions(0, 0))
        reads += int(cache.folded[0, 0] > 0)
    D, F, H, folded = g.head_dim, g.feature_dim, g.heads, int(cache.folded[0, 0])
    ranked = sum(len(r.positions) for r in trace if r.set == 0) if score == "self_recall" and sparse else 0
    projected = folded + (len(cache.sparse_positions(0, 0)) if ranked else 0)
    work = workload.prefill_work(g, tokens)
    assert work.attend == H * (4 * D * pairs + 2 * F * (D + 1) * reads)
    assert work.score == H * 2 * F * (D + 1) * ranked
    assert work.fold == H * folded * (2 * F * D + F)
    assert work.features == H * D * F * (reads + projected)


@pytest.mark.parametrize("per", ["kv_head", "query_head"])
@pytest.mark.parametrize("position", [0, 9, 15, 47, 100])
def test_compulsory_bytes_are_those_of_the_memories(per, position):
    g = SMALL.but(sparse_per=per)
    layer, data = workload.new_layer(g), workload.new_tokens(g, position + 1)
    cache = layer.new_cache()
    layer.attention(*data.stored, cache=cache)
    window = len(cache.window_positions(0)) * g.kv_heads
    cached = len(cache.sparse_positions(0, 0)) * g.sets
    expected = 4 * (2 * g.head_dim * (window + cached) + cache.hidden.size + cache.normalizer.size + layer.w_q.size)
    assert workload.decode_bytes(g, position) == expected


@pytest.mark.parametrize("per", ["kv_head", "query_head"])
@pytest.mark.parametrize("cut", [200, 8, 3, 1])
def test_plain_torch_is_lola(per, cut):
    torch = pytest.importorskip("torch")
    from plain_torch import PlainLola

    g = SMALL.but(sparse_per=per)
    layer, data = workload.new_layer(g), workload.new_tokens(g, 200)
    peer = PlainLola(g, *map(torch.from_numpy, (layer.w_q, layer.w_k, layer.gate)))
    peer.held = []
    parts = [data.part(lo, lo + cut).drawn for lo in range(0, 200, cut)]
    out = np.concatenate([peer(*map(torch.from_numpy, map(np.ascontiguousarray, part))).numpy() for part in parts], axis=1)
    workload.require(workload.check_plain(layer, data, out, peer.held))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_checks_find_what_is_wrong(dtype):
    if not workload.has_dtype(dtype):
        pytest.skip("bfloat16 arrays take ml_dtypes")
    g = SMALL.but(dtype=dtype)
    layer, data = workload.new_layer(g), workload.new_tokens(g, 200)
    cache = layer.new_cache()
    out = layer.attention(*data.stored, cache=cache)
    workload.require(workload.check_prefix(layer, data, out) + workload.check_end(layer, data, cache, out[:, -8:]))
    for t, check in ((20, lambda wrong: workload.check_prefix(layer, data, wrong)),
                     (199, lambda wrong: workload.check_end(layer, data, cache, wrong[:, -8:]))):
        wrong = out.copy()
        wrong[0, t, 3, 5] += np.asarray(0.5, wrong.dtype)
        with pytest.raises(workload.CheckFailed, match="above the bound"):
            workload.require(check(wrong))


@needs_compiler
def test_every_section_runs(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(sections, "QUICK", TINY)
    file = tmp_path / "figures.json"
    assert benchmark.main(["--quick", "--threads", "2", "--json", str(file)]) == 0
    printed = capsys.readouterr().out
    data = json.loads(file.read_text())
    assert data["passed"] and all(check["passed"] for check in data["checks"])
    assert {figure["section"] for figure in data["figures"]} == set(sections.SECTIONS)
    assert all(figure["repeats"] >= 3 and figure["min"] <= figure["median"] <= figure["max"] for figure in data["figures"])
    assert data["versions"]["lola"] == lola.__version__ and data["device"]["isa"] in lola._lola.available_isas()
    names = {"C1", "C2", "C6"} | ({"C3", "C4", "C5"} if data["versions"]["torch"] else set())
    assert {goal["name"] for goal in data["goals"]} == names
    assert benchmark.main(["--show", str(file)]) == 0
    shown = capsys.readouterr().out
    assert printed[printed.index("\ngoals"):].splitlines()[:8] == shown[shown.index("\ngoals"):].splitlines()[:8]


@needs_compiler
def test_a_failed_check_prints_no_speed(monkeypatch, tmp_path):
    monkeypatch.setattr(sections, "QUICK", TINY)
    right = workload.Layer.attention
    monkeypatch.setattr(workload.Layer, "attention", lambda self, *args, **more: right(self, *args, **more) * np.float32(1.001))
    file = tmp_path / "figures.json"
    assert benchmark.main(["--quick", "--threads", "1", "--only", "scaling,update", "--json", str(file)]) == 1
    data = json.loads(file.read_text())
    assert not data["passed"] and not data["figures"] and not data["goals"]
    assert all("CHECK FAILED" in skipped["why"] for skipped in data["skipped"])


# ---------------------------------------------------------------------------------------------- the sections of a GPU

@pytest.fixture
def stub(monkeypatch):
    """A plan of tiny sizes, and the CPU in the place of the GPU: eager calls for graphs, made-up ceilings."""
    torch = pytest.importorskip("torch")
    if not workload.has_dtype("bfloat16"):
        pytest.skip("bfloat16 arrays take ml_dtypes")
    import time

    import gpu
    import gpu_sections

    class Stub(gpu.Gpu):
        device, cache_bytes = "cpu", 1 << 14

        def __init__(self):
            self.properties, self.memo = None, {}

        def describe(self):
            device = dict(kind="cuda", name="a stub", capability="0.0", multiprocessors=1, memory_bytes=1 << 30, cache_bytes=1 << 14)
            return {"device": device, "versions": {"lola": lola.__version__, "torch": torch.__version__}, "blas": []}

        def timed(self, run):
            begin = time.perf_counter()
            value = run()
            return time.perf_counter() - begin, value

        def capture(self, run, warm=2):
            [run() for _ in range(warm)]
            return run

        def replays(self, replay, count, before=lambda i: None):
            return np.array([self.timed(lambda: (before(i), replay()))[0] for i in range(count)])

        def kernel_seconds(self, run, times=3):
            seconds = self.timed(run)[0]
            return {"attend": seconds / 2, "scan": seconds / 3, "features": seconds / 6}

        def softmax_backends(self):
            return {"math": torch.nn.attention.SDPBackend.MATH}

        def memory_used(self):
            return Tensors()

        copy_bandwidth, gemm_flops = (lambda self: 1e10), (lambda self: 1e11)
        settle = free = lambda self: None

        def pinned_copy_seconds(self, to_device, to_host):
            return lambda: 1e-3

    def held():
        tensors = [x for x in gc.get_objects() if type(x) in (torch.Tensor, torch.nn.Parameter)]
        return sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}.values())

    before = held()

    class Tensors:
        """What all tensors hold at the end, beside those of other tests."""

        def __enter__(self):
            return self

        def __exit__(self, *error):
            self.peak = held() - before

    small = SMALL.but(dtype="bfloat16")
    whole = gpu_sections.Llama(2, 32, 48, 97, 128, 2e6, 2.0**30, (64, 8), few=3, rounds=3)
    plan = dataclasses.replace(
        gpu_sections.QUICK, repeats=3, budget=0.01, layer=small, batches=(1, 3), contexts=(64, 128), least=2, prefill=(128, 256),
        crossover=(64, 128), phases=128, judged=256, stack=(2, 128, 32, 48), sparse=(8, 24), update_tokens=128, numpy_tokens=128,
        plain_tokens=(128,), host_calls=3, llama=whole)
    monkeypatch.setattr(gpu_sections, "QUICK", plan)
    monkeypatch.setattr(torch, "compile", lambda run, **_: run)
    monkeypatch.setattr(benchmark, "backend_of", lambda options: Stub())
    return gpu_sections


def test_every_section_of_a_gpu_runs(stub, tmp_path, capsys):
    file = tmp_path / "figures.json"
    every = ",".join(stub.SECTIONS)
    assert benchmark.main(["--device", "cuda", "--quick", "--only", every, "--json", str(file)]) == 0
    data = json.loads(file.read_text())
    assert data["passed"] and not data["skipped"] and all(check["passed"] for check in data["checks"])
    assert {figure["section"] for figure in data["figures"]} == set(stub.SECTIONS)
    assert {goal["name"] for goal in data["goals"]} >= {"G3", "G5", "G6", "G7", "G8", "NumPy", "H1", "H2", "H3"}
    assert [goal["figure"] for goal in data["goals"] if goal["name"] == "G7"] == [100, 100]
    assert {curve["name"] for curve in data["curves"]} == {"prefill", "update"}
    assert benchmark.main(["--show", str(file)]) == 0
    assert "a stub, 1 multiprocessors" in capsys.readouterr().out


def test_a_failed_check_prints_no_speed_of_a_gpu(stub, monkeypatch, tmp_path):
    right = lola.attention

    def wrong(*arguments, **more):
        out = right(*arguments, **more)
        out *= 1.2
        return out

    monkeypatch.setattr(lola, "attention", wrong)
    file = tmp_path / "figures.json"
    every = ",".join(name for name in stub.SECTIONS if name != "rankings")
    assert benchmark.main(["--device", "cuda", "--quick", "--only", every, "--json", str(file)]) == 1
    data = json.loads(file.read_text())
    assert not data["passed"] and not data["figures"] and not data["goals"]
    assert all("CHECK FAILED" in skipped["why"] for skipped in data["skipped"])


@pytest.mark.parametrize("per", ["kv_head", "query_head"])
def test_rankings_are_judged_by_the_oracles_rule(stub, per, monkeypatch):
    """All of them hold; and a cache that keeps the wrong pairs is found out."""
    import gpu_work

    g = SMALL.but(dtype="bfloat16", sparse_per=per)
    layer, data = workload.new_layer(g), gpu_work.Draw.new(g, 200, "cpu")
    count, wrong, worst = gpu_work.judge_rankings(layer, data, layer.new_cache())
    begin = (199 // 8) * 8 - g.window
    assert count == g.sets * (begin // 8 - 3) and wrong == 0 and worst >= -1e-5
    other = workload.new_layer(g.but(score="value_norm"))
    assert gpu_work.judge_rankings(other, data, other.new_cache())[1] > 0


def test_decode_bytes_of_a_batch(stub):
    import gpu_work

    g = stub.FULL.layer
    weights = g.heads * g.head_dim * g.feature_dim
    at = 32 * 1024 + 31                                       # in the middle of a chunk
    row = 4096 * (g.window + 32) + 4096 * g.sparse + 32 * (128 * 128 + 128) * 4
    assert gpu_work.decode_bytes(g, at, 16) == 16 * row + weights
    each = g.but(sparse_per="query_head")
    assert gpu_work.decode_bytes(each, at, 1) - gpu_work.decode_bytes(g, at, 1) == 3 * 4096 * g.sparse


def test_the_crossover_lies_between_lengths(stub):
    assert stub.crossover({1000: 0.5, 2000: 0.9, 4000: 1.2}) == pytest.approx(2000 * 2 ** (np.log(1 / 0.9) / np.log(1.2 / 0.9)))
    assert stub.crossover({1000: 2.0, 2000: 0.5, 4000: 0.9}) == np.inf and stub.crossover({1000: 1.5, 2000: 3}) == 1000


def test_without_a_gpu_the_reason_is_said(capsys):
    pytest.importorskip("torch")
    if lola.cuda_available():
        pytest.skip("there is a GPU")
    assert benchmark.main(["--device", "cuda", "--quick"]) == 2
    assert "GPU" in capsys.readouterr().err


@pytest.mark.parametrize("wrong", [["--only", "prefil"], ["--threads", "0"], ["--repeats", "2"], ["--device", "tpu"]])
def test_wrong_options_are_refused(wrong, capsys):
    with pytest.raises(SystemExit):
        benchmark.arguments(wrong)
    assert "error" in capsys.readouterr().err
