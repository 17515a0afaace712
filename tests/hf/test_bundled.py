"""The bundled model through transformers and through the NumPy runner."""

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from lola.eval import tasks
from lola.models import BUNDLED, Llama
from lola.torch import load_lolcats


@pytest.fixture(scope="module", params=list(BUNDLED))
def name(request):
    if not (BUNDLED[request.param][1] / "adapter.json").is_file():
        pytest.fail(f"the bundled model {request.param} is missing")
    return request.param


def prompt(model, task, length):
    sample = tasks.make_sample(task, length, seed=3)
    return model.tokenizer.encode(sample.prompt), sample


@pytest.mark.parametrize("task", ["niah_single_2"])
def test_logits_at_4096(name, task):
    model = load_lolcats(name, dtype=torch.float32)
    runner = Llama.from_pretrained(name, model.model.layers[0].self_attn.config)
    ids = np.asarray(prompt(runner, task, 4096)[0])[None]
    wanted = runner(ids)
    got = model(torch.from_numpy(ids)).logits.numpy()
    # In units of the logits' RMS, as everywhere: a pair whose score ties with another's within rounding may be kept here
    # and folded there.
    assert np.abs(got - wanted).max() < 1e-3 * np.sqrt((wanted**2).mean())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_text(name, dtype):
    model = load_lolcats(name, dtype=dtype)
    runner = Llama.from_pretrained(name, model.model.layers[0].self_attn.config)
    ids, sample = prompt(runner, "niah_single_1", 1536)
    ids = np.asarray(ids)
    wanted = runner.generate(ids, 16)
    out = model.generate(torch.from_numpy(ids)[None], max_new_tokens=16)[0, len(ids) :].numpy()
    np.testing.assert_array_equal(out[: len(wanted)], wanted)
    assert AutoTokenizer.from_pretrained(BUNDLED[name][0]).decode(out[: len(wanted)]) == runner.tokenizer.decode(wanted)


def test_its_cache_is_as_large_as_the_runners(name):
    model = load_lolcats(name, dtype=torch.float32)
    runner = Llama.from_pretrained(name, model.model.layers[0].self_attn.config)
    ids = torch.arange(200)[None] % 90 + 30
    cache, other = model(ids).past_key_values, runner.new_cache()
    runner(ids.numpy(), other)
    assert sum(layer.cache.nbytes for layer in cache.layers) == other.nbytes
