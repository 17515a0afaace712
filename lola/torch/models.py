"""Causal language models of transformers with LoLA in the place of some or all of their attention."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.cache_utils import Cache

import lola

from . import lolcats
from .cache import NAME, layer_of
from .layer import LolaAttention


class LolaLlamaConfig(LlamaConfig):
    """A LlamaConfig and `lola`, a dict: `config`, the fields of a lola.Config; `layers`, the numbers of the layers that
    attend by LoLA; `feature_map` and `feature_dim`; `gate`, whether there are window factors."""

    model_type = "lola_llama"
    lola: dict | None = None


class LolaMistralConfig(MistralConfig):
    """A MistralConfig and `lola`: see LolaLlamaConfig."""

    model_type = "lola_mistral"
    lola: dict | None = None


class LolaQwen2Config(Qwen2Config):
    """A Qwen2Config and `lola`: see LolaLlamaConfig."""

    model_type = "lola_qwen2"
    lola: dict | None = None


class LolaQwen3Config(Qwen3Config):
    """A Qwen3Config and `lola`: see LolaLlamaConfig."""

    model_type = "lola_qwen3"
    lola: dict | None = None


class _LolaModel:
    """What the models have in common: attention as `config.lola` says, and strict loading."""

    # The maps are small, and the rounding of their weights would be that of every feature.
    _keep_in_fp32_modules_strict = ["feature_map_q", "feature_map_k", "window_factors"]

    def __init__(self, config: Any):
        super().__init__(config)
        said = config.lola
        if said is None:
            raise ValueError(f"{type(config).__name__} must have lola=: lola.torch.linearize makes such a model from a trained one")
        for i in said["layers"]:
            layer = decoder_layers(self)[i]
            layer.self_attn = LolaAttention.from_softmax(
                layer.self_attn,
                lola.Config(**said["config"]),
                said["feature_map"],
                said["gate"],
                feature_dim=said["feature_dim"],
            )
        _choose_masks(self)

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """As in transformers, but a missing or unknown tensor is a ValueError: an untrained map makes fluent nonsense."""
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        explanations = {
            "missing_keys": "lacks", "mismatched_keys": "has other shapes for", "unexpected_keys": "has no place for"
        }  # fmt: skip
        for what, explanation in explanations.items():
            if info.get(what):
                raise ValueError(f"{args[0] if args else cls.__name__} {explanation} {', '.join(map(str, sorted(info[what])))}")
        return (model, info) if output_loading_info else model

    def _prepare_cache_for_generation(self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        # So that what generate asks of a cache before the first token, recording for speculative decoding, reaches our layers.
        result = super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        if isinstance(cache := model_kwargs.get("past_key_values"), Cache):
            for i in self.config.lola["layers"]:
                layer_of(cache, i)
            if getattr(generation_config, "is_assistant", False):
                cache.activate_past_recording()
        return result

    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; LoRA weights that were kept apart must be merged before, by `lola.torch.merge_lora`."""
        if any(isinstance(module, lolcats.LoraLinear) for module in self.modules()):
            raise ValueError("the model has LoRA weights apart from its own: call lola.torch.merge_lora(model) before saving it")
        return super().save_pretrained(*args, **kwargs)


class LolaLlamaForCausalLM(_LolaModel, LlamaForCausalLM):
    """A Llama whose attention is LoLA, made by `linearize` and read by `from_pretrained`.

    >>> model = AutoModelForCausalLM.from_pretrained("folder")  # doctest: +SKIP
    """

    config_class = LolaLlamaConfig
    config: LolaLlamaConfig


class LolaMistralForCausalLM(_LolaModel, MistralForCausalLM):
    """A Mistral whose attention is LoLA."""

    config_class = LolaMistralConfig
    config: LolaMistralConfig


class LolaQwen2ForCausalLM(_LolaModel, Qwen2ForCausalLM):
    """A Qwen2 whose attention is LoLA."""

    config_class = LolaQwen2Config
    config: LolaQwen2Config


class LolaQwen3ForCausalLM(_LolaModel, Qwen3ForCausalLM):
    """A Qwen3 whose attention is LoLA."""

    config_class = LolaQwen3Config
    config: LolaQwen3Config


_FAMILIES = {
    LlamaForCausalLM: LolaLlamaForCausalLM,
    MistralForCausalLM: LolaMistralForCausalLM,
    Qwen2ForCausalLM: LolaQwen2ForCausalLM,
    Qwen3ForCausalLM: LolaQwen3ForCausalLM,
}
for _model in _FAMILIES.values():
    AutoConfig.register(_model.config_class.model_type, _model.config_class)
    AutoModelForCausalLM.register(_model.config_class, _model)


def decoder_layers(model: Any) -> nn.ModuleList:
    """The decoder layers of a causal language model of transformers."""
    layers = getattr(model.get_decoder() if hasattr(model, "get_decoder") else model, "layers", None)
    if layers is None or not all(hasattr(layer, "self_attn") for layer in layers):
        raise TypeError(f"model must be a causal language model with decoder layers that have self_attn, got {type(model).__name__}")
    return layers


def linearize(
    model: Any,
    config: lola.Config | None = None,
    maps: Any = None,
    *,
    layers: Iterable[int] | None = None,
    allow_untrained: bool = False,
    feature_map: str | None = None,
    feature_dim: int | None = None,
) -> Any:
    """Replaces the softmax attention of a causal language model by LoLA, in place (LoLCATs' way, arXiv 2410.10254).

    The model's class becomes the Lola one of its kind, and its configuration a copy that says so, so that `save_pretrained`
    and `from_pretrained` keep what was done. `generate` and pipelines go on working: their caches become LoLA's.

    Args:
        model: A LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM or Qwen3ForCausalLM.
        config: A lola.Config, default lola.Config().
        maps: Trained feature maps and gates, for each layer that is replaced: a dict from layer to a lola feature map, or to
            (feature map, gate (Hq,)); a dict of tensors under LoLCATs' names; a file of these, .safetensors or .pt; or a
            folder with one. What came with LoRA weights is loaded by `load_lolcats`.
        layers: Numbers of the layers to replace, negative ones from the end; the others stay softmax. Default: all.
        allow_untrained: Take untrained maps, which make fluent nonsense once anything is folded: to try things out.
        feature_map: "hedgehog" (LoLCATs' softmax_dim; the default) or "hedgehog_exp" (exp_dim): what tensors of `maps` are
            for. Without maps, with allow_untrained, also "relu" or "elu_plus_one".
        feature_dim: F of untrained maps; default: D.

    Returns:
        The same model.

    Raises:
        TypeError: Another kind of model or of maps.
        ValueError: No trained maps; a tensor that is missing, unknown or of another shape; a layer with a sliding window; a
            model that was linearised before. The model is then as it was.

    >>> model = AutoModelForCausalLM.from_pretrained("meta-llama/Llama-3.1-8B")  # doctest: +SKIP
    >>> linearize(model, lola.Config(window=64, sparse=256), "distill/model.pt")  # doctest: +SKIP
    """
    config = lola.Config() if config is None else config
    if not isinstance(config, lola.Config):
        raise TypeError(f"config must be a lola.Config, got {type(config).__name__}")
    family = _FAMILIES.get(type(model))
    if family is None:
        if isinstance(model, _LolaModel):
            raise ValueError("model was linearised before: begin with the softmax model")
        raise TypeError(f"model must be one of {', '.join(kind.__name__ for kind in _FAMILIES)}, got {type(model).__name__}")
    found = decoder_layers(model)
    numbers = _layer_numbers(layers, len(found))
    if maps is None and not allow_untrained:
        raise ValueError(
            "linearize needs trained feature maps, without which the model would speak fluent nonsense. Pass maps=, the distilled "
            "tensors of LoLCATs (hazyresearch/lolcats-llama-3.1-8b-distill for Llama 3.1 8B; lola.torch.load_lolcats takes its LoRA "
            "too), or train your own by attention transfer; allow_untrained=True goes on without"
        )
    given, kind = lolcats.maps_by_layer(maps, model.config, numbers, feature_map)

    made = {}
    for i in numbers:
        trained, gate, size = (*given[i], None) if maps is not None else (kind, None, feature_dim)
        made[i] = LolaAttention.from_softmax(found[i].self_attn, config, trained, gate, feature_dim=size)
    shapes = {(layer.feature_map, layer.feature_dim, layer.window_factors is not None) for layer in made.values()}
    if len(shapes) > 1:
        raise ValueError(f"maps must be of one kind and size in all layers, and all with a gate or none, got {sorted(shapes)}")

    ((name, size, gated),) = shapes
    said = copy.deepcopy(model.config)
    said.__class__ = family.config_class
    said.lola = {
        "config": dataclasses.asdict(config), "layers": numbers, "feature_map": name, "feature_dim": size, "gate": gated,
    }  # fmt: skip
    said.architectures = [family.__name__]
    old = model.config
    for module in model.modules():
        # Not the old object itself: another model may have been made of it.
        if getattr(module, "config", None) is old:
            module.config = said
    for i, attention in made.items():
        found[i].self_attn = attention
    model.__class__ = family
    _choose_masks(model)
    return model


def _layer_numbers(layers: Iterable[int] | None, count: int) -> list[int]:
    if layers is None:
        return list(range(count))
    numbers = sorted({i + count if i < 0 else i for i in layers})
    if not numbers or numbers[0] < 0 or numbers[-1] >= count:
        raise ValueError(f"layers must be numbers of the model's {count} layers, at least one, got {list(layers)}")
    return numbers


def _choose_masks(model: Any) -> None:
    """Masks without a (T, T) axis where no softmax layer needs one."""
    alone = all(isinstance(layer.self_attn, LolaAttention) for layer in decoder_layers(model))
    if alone:
        model.config._attn_implementation = NAME
    elif model.config._attn_implementation in (NAME, None):
        model.config._attn_implementation = "sdpa"


def configure(model: Any, config: lola.Config) -> Any:
    """Gives all LoLA layers of a model another lola.Config, for caches begun from now on. Returns the model.

    >>> configure(model, lola.Config(window=128, chunk=64, sparse=512))  # doctest: +SKIP
    """
    if not isinstance(model, _LolaModel):
        raise TypeError(f"model must have been linearised, got {type(model).__name__}")
    layers = [layer.self_attn for layer in decoder_layers(model) if isinstance(layer.self_attn, LolaAttention)]
    for layer in layers:
        scale = layer.config.scale if config.scale is None else config.scale
        layer.config = dataclasses.replace(config, scale=scale)
    model.config.lola = {**model.config.lola, "config": dataclasses.asdict(config)}
    return model
