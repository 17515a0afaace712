"""The benchmarks: the work they count, the gate before each speed, and that they run.

Proved here: useful FLOP and bytes are those of a count pair by pair; LoLA in plain PyTorch is LoLA; a wrong result prints no
speed and ends in exit status 1; every section runs, and what it wrote can be shown again.
"""

import dataclasses
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


@pytest.mark.parametrize("wrong", [["--only", "prefil"], ["--threads", "0"], ["--repeats", "2"], ["--device", "tpu"]])
def test_wrong_options_are_refused(wrong, capsys):
    with pytest.raises(SystemExit):
        benchmark.arguments(wrong)
    assert "error" in capsys.readouterr().err
