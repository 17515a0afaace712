"""linearize, LolaAttention, and models that are saved and read again."""

import json

import hf_models as hf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

import lola
from lola.torch import LolaAttention, LolaLlamaConfig, LolaLlamaForCausalLM, configure, linearize


@pytest.mark.parametrize("family", hf.FAMILIES)
@pytest.mark.parametrize("layers", [None, [1]])
def test_save_and_read(family, layers, tmp_path):
    model = hf.linear(family, layers=layers)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is type(model) and "Lola" in type(again).__name__
    ids = hf.prompts()
    assert torch.equal(again(ids).logits, model(ids).logits)
    assert torch.equal(hf.answer(again, ids), hf.answer(model, ids))
    said = json.loads((tmp_path / "config.json").read_text())
    assert said["lola"]["layers"] == (layers or [0, 1, 2]) and said["model_type"].startswith("lola_")
    assert AutoConfig.from_pretrained(tmp_path).lola == said["lola"]
    assert (tmp_path / "model.safetensors").is_file()
    names = load_file(tmp_path / "model.safetensors").keys()
    assert "model.layers.1.self_attn.feature_map_q.mlp.layer" in names and "model.layers.1.self_attn.window_factors" in names


def test_maps_stay_float32(tmp_path):
    model = hf.linear()
    wanted = model.model.layers[0].self_attn.feature_map_q.mlp.layer.clone()
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert again.dtype == torch.bfloat16
    assert torch.equal(again.model.layers[0].self_attn.feature_map_q.mlp.layer, wanted)
    again(hf.prompts())


@pytest.mark.parametrize(
    "change, message", [("remove", "lacks.*feature_map_k"), ("add", "no place for.*stray"), ("shape", "window_factors|mismatch")]
)
def test_reading_is_strict(change, message, tmp_path):
    hf.linear().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    if change == "remove":
        del tensors["model.layers.2.self_attn.feature_map_k.mlp.layer"]
    elif change == "add":
        tensors["model.layers.0.stray"] = torch.zeros(1)
    else:
        tensors["model.layers.0.self_attn.window_factors"] = torch.zeros(1, 5, 1, 1)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises((ValueError, RuntimeError), match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_untrained_maps_are_refused():
    model = hf.soft()
    with pytest.raises(ValueError, match="trained feature maps.*load_lolcats"):
        linearize(model, hf.FOLDING)
    assert type(model).__name__ == "LlamaForCausalLM"


@pytest.mark.parametrize("name", ["hedgehog", "hedgehog_exp", "relu", "elu_plus_one"])
def test_untrained_maps_on_request(name, tmp_path):
    model = linearize(hf.soft(), hf.FOLDING, allow_untrained=True, feature_map=name, feature_dim=None if name == "elu_plus_one" else 12)
    ids = hf.prompts()
    logits = model(ids).logits
    assert logits.isfinite().all() and model.config.lola["feature_map"] == name
    model.save_pretrained(tmp_path)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits, logits)


def test_other_models_are_left_alone():
    soft = hf.soft()
    other = type(soft)(soft.config)  # of the same configuration object
    linearize(other, hf.FOLDING, hf.maps(other))
    assert soft.config._attn_implementation == "sdpa" and not hasattr(soft.config, "lola")
    assert all(module.config is other.config for module in other.modules() if type(getattr(module, "config", None)) is LolaLlamaConfig)
    soft(hf.prompts())


def test_weights_are_shared_not_copied():
    model = hf.soft()
    before = {name: x.data_ptr() for name, x in model.named_parameters()}
    linearize(model, hf.FOLDING, hf.maps(model))
    after = {name: x.data_ptr() for name, x in model.named_parameters()}
    assert before.items() <= after.items()


def test_layers_by_number():
    model = hf.linear(layers=[-1, 0, 2])
    kinds = [isinstance(layer.self_attn, LolaAttention) for layer in model.model.layers]
    assert kinds == [True, False, True] and model.config.lola["layers"] == [0, 2]
    for layers in ([3], [-4], []):
        with pytest.raises(ValueError, match="layers must be"):
            hf.linear(layers=layers)


def test_a_sliding_window_is_refused():
    model = hf.soft("mistral", sliding_window=16)
    with pytest.raises(ValueError, match="sliding window of 16"):
        linearize(model, hf.FOLDING, hf.maps(model))
    assert type(model).__name__ == "MistralForCausalLM"
    model = hf.soft("qwen2", use_sliding_window=True, sliding_window=16, max_window_layers=2)
    linearize(model, hf.FOLDING, hf.maps(model), layers=[0, 1])  # layer 2 slides
    ids, mask = hf.padded(hf.prompts(), [60, 22])
    alone = hf.answer(model, ids[1:, 38:])
    assert torch.equal(hf.answer(model, ids, attention_mask=mask)[1:], alone)


def test_wrong_arguments():
    model, maps = hf.soft(), hf.maps(hf.soft())
    with pytest.raises(TypeError, match="config must be a lola.Config"):
        linearize(model, 5, maps)
    with pytest.raises(TypeError, match="LlamaForCausalLM.*GPT2"):
        linearize(GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=9)), maps=maps)
    with pytest.raises(ValueError, match="lack layer 2"):
        linearize(model, maps={0: maps[0], 1: maps[1]})
    with pytest.raises(TypeError, match=r"maps\[1\]"):
        linearize(model, maps={**maps, 1: "map"})
    with pytest.raises(ValueError, match="feature_map must have weights"):
        linearize(model, maps={**maps, 1: lola.Hedgehog(np.ones((4, 9, 6)), np.ones((4, 9, 6)))})
    with pytest.raises(ValueError, match="one kind and size"):
        linearize(model, maps={**maps, 1: lola.Hedgehog(np.ones((4, 8, 2)), np.ones((4, 8, 2)))})
    with pytest.raises(ValueError, match="gate must be 4 numbers"):
        linearize(model, maps={**maps, 1: (maps[1][0], [0.1, 0.2, 0.3, 1.0])})
    assert type(model).__name__ == "LlamaForCausalLM" and hf.difference(model(hf.prompts()).logits, hf.soft()(hf.prompts()).logits) == 0
    linearize(model, maps=maps)
    with pytest.raises(ValueError, match="linearised before"):
        linearize(model, maps=maps)
    with pytest.raises(ValueError, match="lola.torch.linearize"):
        LolaLlamaForCausalLM(LolaLlamaConfig(**hf.SIZES))


def test_a_mixing_without_a_gate():
    model = hf.soft()
    maps = {i: fmap for i, (fmap, _) in hf.maps(model).items()}
    linearize(model, lola.Config(window=8, chunk=4, sparse=6, mixing="paper"), maps)
    assert model.model.layers[0].self_attn.window_factors is None
    model(hf.prompts())
    with pytest.raises(ValueError, match="no window factors"):
        configure(model, hf.FOLDING.__class__(mixing="gated"))


def test_configure(tmp_path):
    model, ids = hf.linear(config=hf.NOTHING_FOLDED), hf.prompts()
    configure(model, hf.FOLDING)
    assert torch.equal(model(ids).logits, hf.linear()(ids).logits)
    model.save_pretrained(tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).model.layers[0].self_attn.config == hf.FOLDING


def test_a_layer_alone():
    """LolaAttention without a model around it: (B, T, width) in and out."""
    model = hf.soft()
    softmax = model.model.layers[0].self_attn
    layer = LolaAttention.from_softmax(softmax, hf.NOTHING_FOLDED, *hf.maps(model)[0])
    x = torch.randn(2, 30, 32)
    places = model.model.rotary_emb(x, torch.arange(30)[None])
    mask = torch.full((30, 30), torch.finfo(torch.float32).min).triu(1)[None, None]
    got, weights = layer(x, places)
    assert weights is None and hf.difference(got, softmax(x, position_embeddings=places, attention_mask=mask)[0]) < 1e-5
    padded = torch.ones(2, 30)
    padded[1, :7] = 0
    half, _ = layer(x, places, padded)
    assert hf.difference(half[0], got[0]) < 1e-6 and (half[1, :7] == layer.o_proj(torch.zeros(32))).all()
    with pytest.raises(TypeError, match="LlamaAttention.*got Linear"):
        LolaAttention.from_softmax(torch.nn.Linear(2, 2))


def test_an_attention_scale_of_its_own():
    model = hf.soft()
    for layer in model.model.layers:
        layer.self_attn.scaling = 0.7
    wanted = model(hf.prompts()).logits
    linearize(model, hf.NOTHING_FOLDED, hf.maps(model))
    assert hf.difference(model(hf.prompts()).logits, wanted) < 1e-4


def test_weights_that_change_are_seen():
    model, ids = hf.linear(), hf.prompts()
    before = model(ids).logits
    model.model.layers[1].self_attn.feature_map_q.mlp.layer.mul_(3)
    after = model(ids).logits
    assert hf.difference(before, after) > 1e-3
    model.model.layers[1].self_attn.window_factors.add_(1)
    assert hf.difference(model(ids).logits, after) > 1e-3
