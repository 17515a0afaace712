"""load_lolcats: three parts under LoLCATs' names, strictly; and `lola convert`."""

import json

import checkpoints
import hf_models as hf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import lola
from lola.cli import main
from lola.models import Llama
from lola.torch import LoraLinear, linearize, load_lolcats, merge_lora

CONFIG = lola.Config(window=16, chunk=8, sparse=12)


@pytest.fixture
def parts(tmp_path):
    """Base, maps and LoRA as the NumPy model reads them."""
    checkpoints.save(tmp_path / "base", eos_token_id=None)
    checkpoints.save_adapter(tmp_path / "adapter")
    return tmp_path / "base", tmp_path / "adapter"


def numpy_logits(parts, ids, config=CONFIG):
    return torch.from_numpy(Llama.from_pretrained(parts[0], config, adapter=parts[1])(ids.numpy()))


@pytest.mark.parametrize("merge", [True, False])
@pytest.mark.parametrize("feature_map", ["softmax_dim", "exp_dim"])
@pytest.mark.parametrize("mixing", ["gated", "lolcats", "paper"])
def test_same_as_the_numpy_model(parts, merge, feature_map, mixing):
    checkpoints.save_adapter(parts[1], feature_map=feature_map)
    config = lola.Config(window=16, chunk=8, sparse=12, mixing=mixing)
    model = load_lolcats(*parts, config=config, merge=merge)
    ids = hf.prompts(2, 100)
    wanted = numpy_logits(parts, ids, config)
    assert hf.difference(model(ids).logits, wanted) < 1e-4 * wanted.abs().max()
    assert any(isinstance(module, LoraLinear) for module in model.modules()) != merge


def test_lora_apart_and_merged(parts, tmp_path):
    model, ids = load_lolcats(*parts, config=CONFIG, merge=False), hf.prompts()
    apart = model(ids).logits
    with pytest.raises(ValueError, match="merge_lora"):
        model.save_pretrained(tmp_path / "saved")
    assert merge_lora(model) is model
    assert hf.difference(model(ids).logits, apart) < 1e-4
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "saved")(ids).logits, model(ids).logits)


def test_the_adapter_says_how_it_was_trained(parts):
    checkpoints.save_adapter(parts[1], window=24, chunk=12, alpha=7, rank=3)
    config = load_lolcats(*parts).model.layers[0].self_attn.config
    assert (config.window, config.chunk, config.sparse, config.mixing) == (24, 12, 256, None)
    model = load_lolcats(*parts, config=CONFIG)
    assert hf.difference(model(hf.prompts()).logits, numpy_logits(parts, hf.prompts())) < 1e-3
    other = load_lolcats(*parts, config=CONFIG, alpha=1)
    assert hf.difference(model(hf.prompts()).logits, other(hf.prompts()).logits) > 1e-3


def test_linearize_will_not_forget_the_lora(parts):
    with pytest.raises(ValueError, match="load_lolcats"):
        linearize(LlamaForCausalLM.from_pretrained(parts[0]), CONFIG, parts[1])
    linearize(LlamaForCausalLM.from_pretrained(parts[0]), CONFIG, load_file(parts[1] / "feature_maps.safetensors"))


# --- files like those of the release --------------------------------------------------------------------------------------


RELEASE = dict(
    vocab_size=50, hidden_size=4096, intermediate_size=8, num_hidden_layers=2, num_attention_heads=32, num_key_value_heads=8, head_dim=128,
    bos_token_id=None, eos_token_id=None,
)  # fmt: skip


def release(layers=2, dtype=torch.bfloat16):
    """Tensors of the names, shapes and dtype of hazyresearch/lolcats-llama-3.1-8b-distill and -ft-lora."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return (torch.randn(*shape, generator=generator) * 0.02).to(dtype)

    distill, lora = {}, {}
    for i in range(layers):
        name = f"model.layers.{i}.self_attn"
        distill |= {f"{name}.feature_map_{side}.mlp.layer": draw(32, 128, 64) for side in "qk"}
        distill[f"{name}.window_factors"] = draw(1, 32, 1, 1) - 2.2
        for projection, outputs in (("q", 4096), ("k", 1024), ("v", 1024), ("o", 4096)):
            at = f"base_model.model.{name}.{projection}_proj.lora_"
            lora |= {f"{at}A.default.weight": draw(8, 4096), f"{at}B.default.weight": draw(outputs, 8)}
    return distill, lora


def test_files_like_the_8b_release(tmp_path):
    distill, lora = release()
    for name, tensors in (("distill", distill), ("lora", {"model_state_dict": lora})):
        (tmp_path / name).mkdir()
        torch.save(tensors, tmp_path / name / "model.pt")
        (tmp_path / name / "config.json").write_text("{}")
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(**RELEASE)).to(torch.bfloat16)
    before = base.model.layers[1].self_attn.v_proj.weight.clone()
    model = load_lolcats(base, tmp_path / "distill", tmp_path / "lora" / "model.pt")
    assert model is base
    layer = model.model.layers[1].self_attn
    assert (layer.config.window, layer.config.chunk, layer.config.sparse) == (64, 64, 256)
    assert (layer.feature_map, layer.feature_dim) == ("hedgehog", 128)
    assert torch.equal(layer.feature_map_k.mlp.layer, distill["model.layers.1.self_attn.feature_map_k.mlp.layer"].float())
    assert torch.equal(layer.window_factors, distill["model.layers.1.self_attn.window_factors"].float())
    a, b = (lora[f"base_model.model.model.layers.1.self_attn.v_proj.lora_{side}.default.weight"].float() for side in "AB")
    assert torch.equal(layer.v_proj.weight, (before.float() + 2 * b @ a).bfloat16())
    assert model(torch.arange(9)[None]).logits.isfinite().all()


# --- strictness, on small tensors -----------------------------------------------------------------------------------------


def small_release(prefix="", middle=".default"):
    generator = torch.Generator().manual_seed(3)
    distill, lora = {}, {}
    for i in range(3):
        name = f"{prefix}model.layers.{i}.self_attn"
        distill |= {f"{name}.feature_map_{side}.mlp.layer": torch.randn(4, 8, 4, generator=generator) for side in "qk"}
        distill[f"{name}.window_factors"] = torch.randn(1, 4, 1, 1, generator=generator)
        for projection, outputs in (("q", 32), ("k", 16), ("v", 16), ("o", 32)):
            at = f"{prefix}{name}.{projection}_proj.lora_"
            for side, shape in (("A", (2, 32)), ("B", (outputs, 2))):
                lora[f"{at}{side}{middle}.weight"] = torch.randn(*shape, generator=generator)
    return distill, lora


def test_prefixes_and_wrapping_do_not_matter(tmp_path):
    ids = hf.prompts()
    wanted = load_lolcats(hf.soft(), *small_release(), config=hf.FOLDING)(ids).logits
    forms = [("base_model.model.", ".default", None), ("module.", "", "state_dict"), ("_orig_mod.model.", ".other", "model_state_dict")]
    for i, (prefix, middle, wrap) in enumerate(forms):
        distill, lora = small_release(prefix, middle)
        torch.save(distill if wrap is None else {wrap: distill, "epoch": 3}, tmp_path / f"{i}.pt")
        assert torch.equal(load_lolcats(hf.soft(), tmp_path / f"{i}.pt", lora, config=hf.FOLDING)(ids).logits, wanted)


def test_finetuned_factors_replace_the_distilled_ones():
    distill, lora = small_release()
    name = "model.layers.1.self_attn.window_factors"
    lora["base_model.model." + name] = torch.full((1, 4, 1, 1), 0.25)
    model = load_lolcats(hf.soft(), distill, lora, config=hf.FOLDING)
    assert (model.model.layers[1].self_attn.window_factors == 0.25).all()
    assert torch.equal(model.model.layers[0].self_attn.window_factors, distill["model.layers.0.self_attn.window_factors"])


def _without(name):
    return lambda distill, lora: (distill if name in distill else lora).pop(name)


def _with(which, name, *shape):
    return lambda distill, lora: (distill if which == "distill" else lora).__setitem__(name, torch.zeros(shape))


@pytest.mark.parametrize(
    "change, message",
    [
        (_without("model.layers.1.self_attn.feature_map_k.mlp.layer"), "lack layers.1.self_attn.feature_map_k"),
        (_without("model.layers.2.self_attn.window_factors"), "lack layers.2.self_attn.window_factors"),
        (_without("model.layers.0.self_attn.q_proj.lora_A.default.weight"), "lacks layers.0.self_attn.q_proj.lora_A"),
        (_with("distill", "model.layers.0.self_attn.extra", 3), "hold the tensor 'model.layers.0.self_attn.extra'"),
        (_with("distill", "model.layers.3.self_attn.window_factors", 1, 4, 1, 1), "hold layer 3"),
        (_with("distill", "model.layers.0.self_attn.window_factors", 1, 5, 1, 1), r"must have shape \(1, 4, 1, 1\)"),
        (_with("distill", "model.layers.0.self_attn.feature_map_q.mlp.layer", 4, 9, 4), r"must have shape \(4, 8, F/2\)"),
        (_with("distill", "module.model.layers.0.self_attn.window_factors", 1, 4, 1, 1), "twice"),
        (_with("lora", "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight", 2, 32), "twice"),
        (_with("lora", "model.layers.0.self_attn.q_proj.lora_A.default.weight", 2, 31), "must have shapes"),
        (_with("lora", "model.layers.0.mlp.gate_proj.stray", 2, 31), "'model.layers.0.mlp.gate_proj.stray'"),
        (_with("lora", "model.layers.7.self_attn.q_proj.lora_A.default.weight", 2, 32), "lacks layers.7"),
        (lambda distill, lora: lora.clear(), "no LoRA weights"),
    ],
)
def test_strict(change, message):
    model, (distill, lora) = hf.soft(), small_release()
    change(distill, lora)
    with pytest.raises(ValueError, match=message):
        load_lolcats(model, distill, lora, config=hf.FOLDING)
    assert type(model) is LlamaForCausalLM
    assert hf.difference(model(hf.prompts()).logits, hf.soft()(hf.prompts()).logits) == 0


class _Evil:
    def __reduce__(self):
        return pytest.fail, ("the pickle was run",)


def test_pickles_are_tensors_alone(tmp_path):
    torch.save({"x": _Evil()}, tmp_path / "model.pt")
    with pytest.raises(ValueError, match="tensors alone"):
        load_lolcats(hf.soft(), tmp_path)
    torch.save({"x": 3}, tmp_path / "model.pt")
    with pytest.raises(TypeError, match="tensors by name"):
        load_lolcats(hf.soft(), tmp_path)
    (tmp_path / "model.pt").write_bytes(b"no pickle")
    with pytest.raises(ValueError, match="could not be read"):
        load_lolcats(hf.soft(), tmp_path)
    (tmp_path / "model.pt").unlink()
    with pytest.raises(FileNotFoundError, match="has none of"):
        load_lolcats(hf.soft(), tmp_path)
    with pytest.raises(FileNotFoundError, match="there is no"):
        load_lolcats(hf.soft(), tmp_path / "absent.pt")
    with pytest.raises(ValueError, match="distill must be given"):
        load_lolcats("another")


# --- lola convert ---------------------------------------------------------------------------------------------------------


def test_convert(parts, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["convert", *map(str, parts), "--output", str(out), "--sparse", "12", "--window", "16", "--chunk", "8"]) == 0
    assert "Config(window=16, chunk=8, sparse=12" in capsys.readouterr().out
    model, ids = AutoModelForCausalLM.from_pretrained(out), hf.prompts(2, 100)
    wanted = numpy_logits(parts, ids)
    assert hf.difference(model(ids).logits, wanted) < 1e-4 * wanted.abs().max()
    assert json.loads((out / "config.json").read_text())["architectures"] == ["LolaLlamaForCausalLM"]
    assert (out / "tokenizer.json").is_file()
    assert np.all([path.suffix in (".json", ".safetensors", ".jinja") for path in out.iterdir()])
    assert main(["convert", *map(str, parts), "--output", str(out)]) == 2
    assert "is not empty" in capsys.readouterr().err


def test_convert_files(parts, tmp_path):
    checkpoints.save_adapter(parts[1], rank=2, alpha=4)
    files = [str(parts[1] / name) for name in ("feature_maps.safetensors", "lora.safetensors")]
    out = tmp_path / "out"
    options = ["--dtype", "bfloat16", "--mixing", "lolcats", "--feature-map", "softmax_dim", "--sparse-per", "kv_head"]
    assert main(["convert", str(parts[0]), files[0], "--lora", files[1], "--output", str(out), *options]) == 0
    model = AutoModelForCausalLM.from_pretrained(out)
    config = model.model.layers[0].self_attn.config
    assert model.dtype == torch.bfloat16 and (config.mixing, config.sparse_per) == ("lolcats", "kv_head")
