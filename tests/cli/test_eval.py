"""lola.eval.evaluate and what it is made of, on small random models."""

import math
import queue
import threading

import checkpoints
import numpy as np
import pytest

import lola
from lola.eval import ATTENTIONS, Comparison, evaluate, fixed_samples, run, wilson
from lola.models import Llama

KEYS = [
    "model", "attention", "mixing", "task", "length", "sparse", "window", "samples", "accuracy", "low", "high", "cache_bytes",
    "tokens_per_second", "seed", "weights_hash", "device",
]  # fmt: skip
FAST = dict(lengths=[640], samples=3, sparse=24)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("llama")
    checkpoints.save(path)
    return checkpoints.save_adapter(path)


@pytest.fixture(autouse=True)
def short_answers(monkeypatch):
    """Random weights seldom end a line: 6 tokens will do."""
    answers = run._answers
    monkeypatch.setattr(run, "_answers", lambda model, prompts, limits, *rest: answers(model, prompts, [6] * len(limits), *rest))


@pytest.mark.parametrize(
    "accuracy, samples, low, high",
    [(1, 40, 0.9124, 1), (0, 40, 0, 0.0876), (0.5, 10, 0.2366, 0.7634), (0.9, 200, 0.8506, 0.9343), (1, 1, 0.2065, 1)],
)
def test_wilson(accuracy, samples, low, high):
    assert wilson(accuracy, samples) == pytest.approx((low, high), abs=5e-5)


def test_wilson_of_nothing():
    with pytest.raises(ValueError, match="samples must be at least 1"):
        wilson(0.5, 0)


def test_rows(folder):
    rows = evaluate(folder, ["niah_single_1", "niah_multikey_2"], **FAST)
    assert all(list(row) == KEYS for row in rows)
    assert [row["task"] for row in rows] == ["niah_single_1"] * 6 + ["niah_multikey_2"] * 6
    first = rows[:6]
    assert [row["attention"] for row in first] == ["softmax", "base", "base", "window", "cache_only", "lola"]
    assert [row["mixing"] for row in first] == [None, "lolcats", "gated", "gated", "cache_only", "gated"]
    assert [row["sparse"] for row in first] == [None, 0, 0, 0, 24, 24]
    assert [row["window"] for row in first][:3] == [None, 16, 16]
    for row in rows:
        assert row["model"] == str(folder) and row["length"] == 640 and row["samples"] == 3 and row["seed"] == 42
        assert row["device"] == "cpu"
        assert 0 <= row["low"] <= row["accuracy"] <= row["high"] <= 1
        assert row["tokens_per_second"] > 0 and row["cache_bytes"] > 0
    assert len({row["weights_hash"] for row in rows[1:6]}) == 1
    assert rows[0]["weights_hash"] != rows[1]["weights_hash"]


def test_bytes_are_what_the_caches_hold(folder):
    rows = {(row["attention"], row["mixing"]): row for row in evaluate(folder, ["niah_single_1"], **FAST)}
    config = lola.Config(window=16, chunk=8, sparse=24, mixing="gated")
    one = Llama.from_pretrained(folder, config, cache_dtype="float16").new_cache()
    assert rows["lola", "gated"]["cache_bytes"] == rows["cache_only", "cache_only"]["cache_bytes"] == one.nbytes
    # The longer window has as many bytes, and one chunk less would have fewer.
    window = rows["window", "gated"]
    shorter = Llama.from_pretrained(folder, run.replace_config(config, sparse=0, window=window["window"] - 8), cache_dtype="float16")
    assert shorter.new_cache().nbytes < one.nbytes <= window["cache_bytes"]
    # Softmax keeps every token of the longest prompt.
    longest = max(len(sample.prompt) for sample in fixed_samples("niah_single_1", 640, 3))
    assert rows["softmax", None]["cache_bytes"] == longest * 2 * 2 * 2 * 8 * 2


def test_answers_do_not_depend_on_threads(folder):
    one, many = (evaluate(folder, ["niah_single_2"], threads=threads, **FAST) for threads in (1, 3))
    for a, b in zip(one, many):
        assert {**a, "tokens_per_second": 0} == {**b, "tokens_per_second": 0}


def test_callbacks(folder):
    rows, seen = [], []
    result = evaluate(folder, ["niah_single_1"], on_row=rows.append, on_sample=lambda *at: seen.append(at), **FAST)
    assert rows == result
    assert seen == [(n, 18) for n in range(1, 19)]


def test_some_attentions(folder):
    rows = evaluate(folder, ["niah_single_1"], attentions=["lola", "softmax"], **FAST)
    assert [row["attention"] for row in rows] == ["softmax", "lola"]


@pytest.mark.parametrize("mixing, wanted", [
    ("lolcats", [None, "lolcats", "lolcats", "cache_only", "lolcats"]),
    ("cache_only", [None, "lolcats", "cache_only", "cache_only", "cache_only"]),
])  # fmt: skip
def test_rows_that_would_repeat_are_left_out(folder, mixing, wanted):
    comparison = Comparison(folder, ["niah_single_1"], mixing=mixing, **FAST)
    assert [setup.mixing for setup in comparison.setups] == wanted


def test_options_reach_the_configuration(folder):
    options = dict(sparse=7, window=32, chunk=16, mixing="paper", score="recency", sparse_per="kv_head", seed=5)
    full = Comparison(folder, ["niah_single_1"], lengths=[640], samples=1, **options).setups[-1]
    assert full.attention == "lola" and full.config == lola.Config(**options)


def test_without_an_adapter(tmp_path):
    checkpoints.save(tmp_path)
    comparison = Comparison(tmp_path, ["niah_single_1"], **FAST)
    assert comparison.trained is None and comparison.lola_bytes() == {}
    assert [row["attention"] for row in comparison.run()] == ["softmax"]
    with pytest.raises(ValueError, match="base and lola"):
        comparison.needle()
    with pytest.raises(ValueError, match="has no adapter"):
        Comparison(tmp_path, ["niah_single_1"], attentions=["lola"], **FAST)


def test_savings(folder):
    comparison = Comparison(folder, ["niah_single_1"], dtype="float32", **FAST)
    assert comparison.full_bytes(4096) == 4096 * 2 * 2 * 2 * 8 * 2
    sizes = comparison.lola_bytes()
    assert set(sizes) == {"query_head", "kv_head"} and sizes["kv_head"] < sizes["query_head"]
    config = lola.Config(window=16, chunk=8, sparse=24, sparse_per="kv_head")
    assert sizes["kv_head"] == Llama.from_pretrained(folder, config, cache_dtype="float16").new_cache().nbytes


def test_needle(folder):
    comparison = Comparison(folder, ["niah_single_1"], **FAST)
    shown = comparison.needle()
    sample = fixed_samples("niah_single_1", 640, 1)[0]
    assert shown.sample == sample
    assert shown.whole.shape == shown.part.shape == (2, 4)
    assert not (shown.whole & ~shown.part).any()
    model = Llama.from_pretrained(folder, shown.lola.config, cache_dtype="float16")
    prompt, cache = model.tokenizer.encode(sample.prompt), model.new_cache()
    answer = model.decode(model.last_logits(np.array([prompt]), cache), 6, [10], cache.copy())[0]
    assert shown.lola_answer == model.tokenizer.decode(answer)
    begin, end = sample.values[0]
    for layer, head in np.ndindex(2, 4):
        held = set(cache.layers[layer].sparse_positions(0, head)) & set(range(begin, end))
        assert shown.part[layer, head] == bool(held) and shown.whole[layer, head] == (len(held) == end - begin)


# ------------------------------------------------------------------------------------------- beginnings that are shared


class Counted:
    """A model that counts the tokens it reads."""

    def __init__(self, model):
        self.model, self.tokens = model, 0
        self.tokenizer, self.geometry, self.new_cache, self.decode = model.tokenizer, model.geometry, model.new_cache, model.decode

    def read(self, ids, cache):
        self.tokens += ids.size
        self.model.read(ids, cache)

    def last_logits(self, ids, cache):
        self.tokens += ids.size
        return self.model.last_logits(ids, cache)


@pytest.mark.parametrize("attention", ["softmax", "lola"])
def test_shared_beginnings_change_nothing(folder, rng, attention):
    config = lola.Config(window=16, chunk=8, sparse=24)
    model = Llama.from_pretrained(folder, config if attention == "lola" else "softmax")
    trunk = rng.integers(32, 127, 900)
    prompts = [np.concatenate([trunk[:n], rng.integers(32, 127, 40)]) for n in (900, 300, 650, 301, 0, 850, 20, 300)]
    prompts += [prompts[0].copy(), trunk[:500], np.array([65])]
    wanted = [model.generate(prompt, 6, [10]).tolist() for prompt in prompts]
    counted = Counted(model)
    got, tokens = {}, 0
    for i, answer, cache, ran in run._answers(counted, prompts, [6] * len(prompts)):
        got[i] = answer.tolist()
        assert cache.tokens_seen.tolist() == [len(prompts[i])]
        tokens += ran - len(answer)
    assert [got[i] for i in range(len(prompts))] == wanted
    assert tokens == counted.tokens < 0.5 * sum(map(len, prompts))


def test_slices_hold_every_prompt_once(rng):
    trunk = rng.integers(0, 256, 1000)
    prompts = [np.append(trunk[: rng.integers(1000)], rng.integers(0, 256, 100)) for _ in range(40)]
    for parts in (1, 2, 3, 16, 60):
        slices = run._slices(prompts, parts)
        assert sorted(i for part in slices for i in part) == list(range(40))
        assert len(slices) <= parts and all(slices)
        order = [i for part in slices for i in part]
        assert order == sorted(range(40), key=lambda i: prompts[i].tolist())


def test_slices_cost_about_the_same(rng):
    slices = run._slices([rng.integers(0, 256, 100) for _ in range(40)], 4)
    assert [len(part) for part in slices] == [10, 10, 10, 10]


# ------------------------------------------------------------------------------------------------------ threads and BLAS


def test_an_error_on_a_thread_is_raised(folder, monkeypatch):
    def fail(*_):
        raise MemoryError("no more")

    monkeypatch.setattr(Llama, "decode", fail)
    with pytest.raises(MemoryError, match="no more"):
        evaluate(folder, ["niah_single_1"], **FAST)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("lola-eval")]


def test_threads_end_when_interrupted(folder):
    def interrupt(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(folder, ["niah_single_1"], on_sample=interrupt, **FAST)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("lola-eval")]


def test_threads_are_put_back(folder, threads):
    threads(2)
    inside = []
    evaluate(folder, ["niah_single_1"], attentions=["lola"], on_sample=lambda *_: inside.append(lola.get_num_threads()), **FAST)
    assert set(inside) == {1} and lola.get_num_threads() == 2


def test_blas_that_cannot_be_held(folder, monkeypatch):
    monkeypatch.setattr(run, "_hold_blas", lambda stack: False)
    inside = []
    rows = evaluate(folder, ["niah_single_1"], attentions=["lola"], on_sample=lambda *_: inside.append(threading.active_count()), threads=3, **FAST)
    assert rows[0]["samples"] == 3 and max(inside) <= threading.active_count() + 1


def test_pool_of_no_units():
    assert list(run._pooled(queue.SimpleQueue(), 2)) == []


# ------------------------------------------------------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    "wrong, error, message",
    [
        (dict(tasks=["niah_single_9"]), ValueError, "tasks must be one of niah_single_1, .*'niah_single_9'"),
        (dict(tasks="niah_single_1"), TypeError, "tasks must be a sequence"),
        (dict(tasks=[]), TypeError, "tasks must be a sequence of at least one"),
        (dict(attentions=["LoLA"]), ValueError, "attentions must be one of softmax, base"),
        (dict(lengths=[]), TypeError, "lengths must be a sequence"),
        (dict(lengths=640), TypeError, "lengths must be a sequence"),
        (dict(lengths=[0]), ValueError, "lengths must be an integer, 1 or more"),
        (dict(lengths=[100]), ValueError, "length must be at least"),
        (dict(samples=0), ValueError, "samples must be an integer, 1 or more; it is 0"),
        (dict(samples=2.5), ValueError, "samples must be an integer"),
        (dict(seed=-1), ValueError, "seed must be an integer, 0 or more"),
        (dict(threads=0), ValueError, "threads must be an integer, 1 or more"),
        (dict(split="test"), ValueError, "split must be one of"),
        (dict(device="tpu"), ValueError, "device must be None, 'cpu', 'cuda' or 'cuda:0' and so on, got 'tpu'"),
        (dict(dtype="int8"), ValueError, "dtype must be one of float16, float32"),
        (dict(sparse=-1), ValueError, "sparse"),
        (dict(window=12), ValueError, "window"),
        (dict(mixing="sum"), ValueError, "mixing"),
        (dict(score="best"), ValueError, "score"),
        (dict(score="external"), ValueError, "external"),
        (dict(sparse_per="layer"), ValueError, "sparse_per"),
        (dict(adapter="nowhere"), FileNotFoundError, "adapter must be a folder"),
        (dict(model="nowhere"), FileNotFoundError, "model must be one of needle, needle-8k, or a folder"),
        (dict(nothing=1), TypeError, "nothing"),
    ],
)
def test_wrong_arguments(folder, wrong, error, message):
    with pytest.raises(error, match=message):
        evaluate(**{"model": folder, "tasks": ["niah_single_1"], **FAST, **wrong})


def test_every_attention_is_known():
    assert ATTENTIONS == ("softmax", "base", "window", "cache_only", "lola")
    assert math.isclose(sum(wilson(0.5, 10)), 1)
