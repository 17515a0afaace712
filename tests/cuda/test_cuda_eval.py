"""The bundled model with LoLA's attention on the device and all else in NumPy: the CPU's logits and the CPU's table.

Rounding differs, so a pair at the margin may be kept in the place of another, and an answer that was a toss-up may change.
Scores that do not depend on rounding keep the same pairs, and then logits agree as far as attention does.
"""

import numpy as np
import pytest

import lola
from lola.eval import Comparison, text
from lola.models import Llama
from places import DEVICE

ARRAYS = "numpy"
TOKENS = 1500


@pytest.fixture(scope="module")
def ids():
    one = Llama.from_pretrained("needle")
    return np.array(one.tokenizer.encode(text.bundled("eval").string[: TOKENS + 40]))[None]


@pytest.mark.parametrize("score, dtype, bound", [
    ("recency", "float32", 1e-4), ("recency", "float16", 5e-3), ("self_recall", "float32", 2e-2), ("self_recall", "float16", 2e-2)])
def test_logits(ids, score, dtype, bound):
    """After a prompt, and of the tokens behind it one by one; two rows, of which one stands still."""
    config = lola.Config(window=64, chunk=64, sparse=256, mixing="gated", score=score)
    models = [Llama.from_pretrained("needle", config, cache_dtype=dtype, device=device) for device in ("cpu", DEVICE)]
    caches = [model.new_cache(2) for model in models]
    assert caches[1].layers[0].device.startswith(DEVICE)
    both = ids.repeat(2, 0)
    starts = np.array([0, 300])
    outs = [[model.last_logits(both[:, :TOKENS], cache, starts=starts)] for model, cache in zip(models, caches)]
    for t in range(TOKENS, TOKENS + 40):
        for model, cache, out in zip(models, caches, outs):
            out.append(model(both[:, t:t + 1], cache, stops=np.array([1, t % 2]))[:1, 0])
    here, there = (np.concatenate(out).astype(np.float64) for out in outs)
    assert np.sqrt(np.mean((here - there) ** 2)) <= bound * here.std()
    assert (here.argmax(-1) == there.argmax(-1)).mean() >= 0.95
    assert caches[0].tokens_seen.tolist() == caches[1].tokens_seen.tolist() and caches[0].nbytes == caches[1].nbytes


def test_the_cpus_table():
    options = dict(tasks=["niah_single_1"], lengths=[1536], samples=8, attentions=["softmax", "base", "cache_only", "lola"])
    here, there = (Comparison("needle", device=device, **options) for device in ("cpu", DEVICE))
    needles = here.needle(), there.needle()
    assert needles[0].lola_answer == needles[1].lola_answer and needles[0].lola_right
    assert (needles[0].whole == needles[1].whole).mean() >= 0.9
    for mine, theirs in zip(here.run(), there.run(), strict=True):
        assert mine["device"] == "cpu" and theirs["device"].startswith("cpu" if theirs["attention"] == "softmax" else DEVICE)
        assert abs(mine["accuracy"] - theirs["accuracy"]) <= (0.26 if theirs["attention"] == "base" else 0)
        for row in (mine, theirs):
            for name in ("device", "tokens_per_second", "accuracy", "low", "high"):
                del row[name]
        assert mine == theirs
