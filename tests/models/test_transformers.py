"""The NumPy Llama against transformers' on random weights."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from lola.models import Llama  # noqa: E402

LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64)
CASES = {
    "one kv head per head": dict(num_key_value_heads=4),
    "groups": dict(num_key_value_heads=2),
    "one kv head": dict(num_key_value_heads=1),
    "tied head": dict(num_key_value_heads=2, tie_word_embeddings=True),
    "wide heads": dict(num_key_value_heads=2, head_dim=24),
    "linear rope": dict(rope_scaling=dict(rope_type="linear", factor=3.0)),
    "llama3 rope": dict(num_key_value_heads=2, rope_scaling=LLAMA3),
    "a longer vocabulary": dict(vocab_size=600),
    "large theta": dict(rope_theta=2e5, rms_norm_eps=1e-4),
}


@pytest.fixture(scope="module", params=list(CASES))
def pair(request, tmp_path_factory):
    """A model of transformers and ours, read from what it saved."""
    torch.manual_seed(0)
    sizes = dict(vocab_size=99, hidden_size=64, intermediate_size=112, num_hidden_layers=3, num_attention_heads=4, max_position_embeddings=2048)
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**sizes, **CASES[request.param]}))
    for parameter in theirs.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    folder = tmp_path_factory.mktemp("llama")
    theirs.eval().save_pretrained(folder, max_shard_size="100KB" if request.param == "groups" else "1GB")
    return theirs, Llama.from_pretrained(folder)


def logits(theirs, ids):
    with torch.no_grad():
        return theirs(torch.tensor(ids)).logits.numpy()


def test_logits(pair):
    theirs, ours = pair
    ids = np.random.default_rng(0).integers(0, 99, (2, 600))
    wanted = logits(theirs, ids)
    got = ours(ids)
    assert got.dtype == np.float32 and got.shape == wanted.shape
    assert np.abs(got - wanted).max() < 1e-4 * np.abs(wanted).max()


def test_greedy_text(pair):
    theirs, ours = pair
    ids = np.random.default_rng(1).integers(0, 99, (1, 30))
    wanted = theirs.generate(torch.tensor(ids), max_new_tokens=20, do_sample=False, eos_token_id=None).numpy()[0, 30:]
    np.testing.assert_array_equal(ours.generate(ids[0], 20, stop=()), wanted)


def test_old_layout_of_the_configuration(tmp_path):
    """Before transformers 5, config.json had rope_theta and rope_scaling instead of rope_parameters."""
    import json

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=99, hidden_size=64, intermediate_size=112, num_hidden_layers=2, num_attention_heads=4, rope_theta=5e5, rope_scaling=LLAMA3
    )
    theirs = transformers.LlamaForCausalLM(config).eval()
    theirs.save_pretrained(tmp_path)
    spec = json.loads((tmp_path / "config.json").read_text())
    spec.pop("rope_parameters", None)
    spec |= {"rope_theta": 5e5, "rope_scaling": {**LLAMA3, "type": "llama3"}}
    (tmp_path / "config.json").write_text(json.dumps(spec))
    ids = np.arange(99)[None].repeat(3, axis=1)
    wanted = logits(theirs, ids)
    assert np.abs(Llama.from_pretrained(tmp_path)(ids) - wanted).max() < 1e-4 * np.abs(wanted).max()
