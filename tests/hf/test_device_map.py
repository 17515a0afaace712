"""Models that accelerate spreads over devices or keeps on a disk."""

import accelerate
import hf_models as hf
import pytest
import torch
from transformers import AutoModelForCausalLM


@pytest.fixture
def saved(tmp_path):
    model = hf.linear()
    model.save_pretrained(tmp_path / "model")
    return model, tmp_path


def same(model, other):
    ids, mask = hf.padded(hf.prompts(), [60, 22])
    assert torch.equal(hf.answer(model, ids, attention_mask=mask), hf.answer(other, ids, attention_mask=mask))
    assert torch.equal(hf.answer(model, ids, num_beams=2), hf.answer(other, ids, num_beams=2))
    cache = other(ids).past_key_values
    for layer, memory in zip(other.model.layers, cache.layers):
        where = getattr(layer.self_attn, "_hf_hook", None)
        device = torch.device(getattr(where, "execution_device", None) or "cpu")
        assert memory._buffers[0].device == device


def test_layers_on_disk(saved):
    """Weights come from the disk for the time of a layer; feature maps and gates with them."""
    model, folder = saved
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "disk"}
    places |= {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    other = AutoModelForCausalLM.from_pretrained(folder / "model", device_map=places, offload_folder=folder / "offloaded")
    assert other.model.layers[1].self_attn.feature_map_q.mlp.layer.is_meta and other.model.layers[2].self_attn.window_factors.is_meta
    same(model, other)


def test_everything_offloaded(saved):
    model, _ = saved
    other = accelerate.cpu_offload(hf.linear(), execution_device="cpu")
    assert all(parameter.is_meta for parameter in other.parameters())
    same(model, other)


def test_no_device_is_asked_for_twice(saved):
    """The memory of a layer is made where its keys are, whatever the rest of the model does."""
    model, folder = saved
    other = AutoModelForCausalLM.from_pretrained(folder / "model", device_map={"": "cpu"})
    same(model, other)
