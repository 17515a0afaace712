"""The bundled model: its sizes, its cache, and that it does what it is there for."""

import json

import numpy as np
import pytest

import lola
from lola.eval import Comparison, evaluate
from lola.models import BUNDLED, Llama


@pytest.fixture(scope="module", params=list(BUNDLED))
def name(request):
    return request.param


def test_it_is_small_and_complete(name):
    folder, adapter = BUNDLED[name]
    model = Llama.from_pretrained(name, lola.Config())
    g = model.geometry
    assert (g.layers, g.width, g.heads, g.kv_heads, g.head_dim, g.mlp, g.vocabulary) == (6, 256, 4, 2, 64, 704, 256)
    assert model.folder == folder and model.adapter.folder == adapter
    assert (model.adapter.window, model.adapter.chunk, model.adapter.mixing) == (64, 64, "lolcats")
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < 16e6
    text = "In the beginning\n"
    assert model.tokenizer.decode(model.tokenizer.encode(text)) == text and model.tokenizer.newlines == [10]


@pytest.mark.parametrize("per, sets", [("query_head", 4), ("kv_head", 2)])
def test_bytes_of_a_cache(name, per, sets):
    model = Llama.from_pretrained(name, lola.Config(sparse_per=per), cache_dtype="float16")
    cache = model.new_cache()
    model.read(np.zeros((1, 700), np.int64), cache)
    pair = (64 + 64) * 2  # a key and a value in float16
    window = 2 * (64 + 64) * pair
    sparse = sets * (256 * (pair + 8 + 4) + 8)  # with position and score, and how many there are
    state = 4 * (64 * 64 + 64) * 4 + 4 * 8  # H, s, and how many were folded
    assert cache.nbytes == 6 * (window + sparse + state + 3 * 8)
    full = 6 * 4096 * 2 * pair
    comparison = Comparison(name, lengths=[4096], samples=1)
    assert comparison.full_bytes(4096) == full and comparison.lola_bytes()[per] == cache.nbytes
    assert full / cache.nbytes > {"query_head": 4.5, "kv_head": 6.3}[per]


def test_logits_of_transformers(name):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    folder = BUNDLED[name][0]
    theirs = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = np.frombuffer(b"And God said, Let there be light: and there was light.\n" * 40, np.uint8)[None].astype(np.int64)
    with torch.no_grad():
        wanted = theirs(torch.tensor(ids)).logits.numpy()
    assert np.abs(Llama.from_pretrained(name)(ids) - wanted).max() < 1e-4 * np.abs(wanted).max()


def test_tokens_of_transformers(name):
    transformers = pytest.importorskip("transformers")
    folder = BUNDLED[name][0]
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    text = "A needle: 1234567, \u00e9.\n"
    assert theirs(text)["input_ids"] == Llama.from_pretrained(name).tokenizer.encode(text)


def test_configuration_says_where_lines_end(name):
    assert json.loads((BUNDLED[name][0] / "config.json").read_text())["eos_token_id"] == 10
    assert Llama.from_pretrained(name).geometry.eos == (10,)


def test_the_base_forgets_and_lola_remembers():
    """A glance; the figures are those of 200 samples in the model card."""
    rows = evaluate("needle", ["niah_single_1", "niah_single_2"], attentions=["softmax", "base", "lola"], samples=4)
    found = {(row["task"], row["attention"], row["mixing"]): row["accuracy"] for row in rows}
    for task in ("niah_single_1", "niah_single_2"):
        assert found[task, "softmax", None] == 1
        assert found[task, "base", "gated"] == found[task, "base", "lolcats"] == 0
        assert found[task, "lola", "gated"] >= 0.75


def test_the_state_carries_the_answer_where_the_base_was_trained():
    """At 1024 bytes, sparse = 0: the window of 64 does not hold the needle, so under "lolcats" the state answers (142 of 200)."""
    rows = evaluate("needle", ["niah_single_1"], lengths=[1024], attentions=["base"], samples=8)
    found = {row["mixing"]: row["accuracy"] for row in rows}
    assert found["lolcats"] >= 0.375 and found["gated"] == 0
