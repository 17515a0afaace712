"""LoLCATs checkpoints (arXiv 2410.10254): a base model, distilled feature maps and window factors, LoRA weights."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lola

from . import layer as _layer

# What training wrappers put before, and PEFT's adapter name inside, the names of tensors.
_MAP = re.compile(r"(?:^|\.)layers\.(\d+)\.self_attn\.(feature_map_[qk]\.mlp\.layer|window_factors)$")
_LORA = re.compile(r"(?:^|\.)layers\.(\d+)\.((?:self_attn|mlp)\.\w+_proj)\.lora_([AB])(?:\.\w+)?\.weight$")
_NESTED = ("model_state_dict", "state_dict")
_KINDS = {"softmax_dim": "hedgehog", "exp_dim": "hedgehog_exp"}
_CLASSES = {"hedgehog": lola.Hedgehog, "hedgehog_exp": lola.HedgehogExp}
# The published checkpoints: terraced windows of 64; LoRA r = 8, alpha = 16.
_WINDOW = 64
_ALPHA_PER_RANK = 2.0


def load_lolcats(
    base: Any,
    distill: Any = None,
    lora: Any = None,
    *,
    config: lola.Config | None = None,
    feature_map: str | None = None,
    alpha: float | None = None,
    merge: bool = True,
    dtype: Any = None,
) -> Any:
    """A linearised model from the three parts of a LoLCATs checkpoint: softmax base, distilled maps, LoRA weights.

    Strict: every layer must find its maps, every tensor that is found must have its place, and the error names those that do
    not. Prefixes ("base_model.model.", "module.", ...) and a `model_state_dict` around the tensors do not matter. Pickles
    are read as tensors alone (`weights_only`).

    Args:
        base: A Llama, Mistral, Qwen2 or Qwen3 causal LM of transformers, which is changed in place; a folder or hub name of
            one; or "needle" or "needle-8k", the bundled model, which needs nothing else.
        distill: Feature maps and window factors: a file, .safetensors or pickled (.pt, .bin); a folder with `model.pt` or
            `feature_maps.safetensors`; or a dict of tensors. An `adapter.json` beside them says how they were trained.
        lora: LoRA weights in the same forms; default: those beside `distill`, if its adapter.json speaks of any. Maps and
            factors among them replace the distilled ones, as finetuning may have trained them on.
        config: A lola.Config; default: the adapter's window and chunk, else 64 and 64, and 256 sparse pairs.
        feature_map: "hedgehog" (softmax_dim) or "hedgehog_exp" (exp_dim); default: the adapter's, else "hedgehog".
        alpha: LoRA's; default: the adapter's, else 2 r, as published. The weights are W + alpha / r * B A.
        merge: Add LoRA into the weights; False: keep it apart, as `LoraLinear` modules, until `merge_lora`.
        dtype: Of a base that is read here; default: as stored.

    Returns:
        The model, a LolaLlamaForCausalLM for a Llama, ready for `generate` and `save_pretrained`.

    Raises:
        FileNotFoundError: A file is absent.
        TypeError: Another kind of model, or a file of other things than tensors.
        ValueError: A tensor that is missing, unknown, given twice or of another shape. The model is then as it was.

    >>> model = load_lolcats("needle")
    >>> model = load_lolcats("meta-llama/Llama-3.1-8B", "distill/model.pt", "ft-lora/model.pt")  # doctest: +SKIP
    """
    from .models import decoder_layers, linearize

    if isinstance(base, str) and distill is None:
        from lola.models import BUNDLED

        if base not in BUNDLED:
            raise ValueError(f"distill must be given, the feature maps of {base!r}; only {', '.join(BUNDLED)} come with theirs")
        base, distill = BUNDLED[base]
    if distill is None:
        raise ValueError("distill must be given: a file, a folder or a dict of feature maps and window factors")
    spec = _adapter(distill)
    tensors = read_tensors(distill, ("feature_maps.safetensors", "model.safetensors", "model.pt", "pytorch_model.bin"))
    if lora is None and (spec.get("lora") or {}).get("r"):
        lora = distill
    more = {} if lora is None else read_tensors(lora, ("lora.safetensors", "adapter_model.safetensors", "model.pt", "adapter_model.bin"))
    if alpha is None:
        told = _adapter(lora).get("lora") if lora is not None else None
        alpha = (told or spec.get("lora") or {}).get("alpha")
    if config is None:
        config = lola.Config(window=spec.get("window", _WINDOW), chunk=spec.get("chunk", _WINDOW), sparse=256)
    feature_map = feature_map or spec.get("feature_map")

    if isinstance(base, (str, os.PathLike)):
        from transformers import AutoModelForCausalLM

        base = AutoModelForCausalLM.from_pretrained(base, dtype="auto" if dtype is None else dtype)
    maps = {name: x for name, x in more.items() if _MAP.search(name)}
    pairs = _lora_pairs({name: x for name, x in more.items() if name not in maps}, decoder_layers(base))
    if lora is not None and not pairs:
        raise ValueError("lora holds no LoRA weights")
    place = {_MAP.search(name).group(0): x for name, x in maps.items()}
    kept = {name: x for name, x in tensors.items() if (found := _MAP.search(name)) is None or found.group(0) not in place}
    linearize(base, config, {**kept, **maps}, feature_map=feature_map)
    for i, projection, a, b in pairs:
        owner = decoder_layers(base)[i].get_submodule(projection.split(".")[0])
        name = projection.split(".")[1]
        setattr(owner, name, LoraLinear(getattr(owner, name), a, b, alpha if alpha is not None else _ALPHA_PER_RANK * a.shape[0]))
    return merge_lora(base) if merge else base


# --- LoRA -------------------------------------------------------------------------------------------------------------


class LoraLinear(nn.Module):
    """y = x W^T + alpha / r * (x A^T) B^T: a linear layer and LoRA weights (arXiv 2106.09685) beside it.

    Args:
        base: The linear layer, W (outputs, inputs).
        a, b: (r, inputs) and (outputs, r) floats.
        alpha: LoRA's.
        train: Weights to be trained, in float32 whatever the base's dtype.
    """

    def __init__(self, base: nn.Linear, a: Tensor, b: Tensor, alpha: float, train: bool = False):
        super().__init__()
        like, dtype = base.weight, torch.float32 if train and base.weight.dtype != torch.float64 else base.weight.dtype
        self.base, self.scale = base, alpha / a.shape[0]
        self.lora_a, self.lora_b = (nn.Parameter(x.detach().to(like.device, dtype), requires_grad=False) for x in (a, b))
        # Merged from these, not from weights that were rounded to the base's dtype before.
        self._exact = None if train else (a.detach(), b.detach())
        self.in_features, self.out_features = base.in_features, base.out_features

    @property
    def weight(self) -> Tensor:
        return self.base.weight

    def forward(self, x: Tensor) -> Tensor:
        a, b = (w.to(x.dtype) for w in (self.lora_a, self.lora_b))  # in training they are float32
        return self.base(x) + nn.functional.linear(nn.functional.linear(x, a), b) * self.scale

    def merged(self) -> nn.Linear:
        """The linear layer with the weights W + alpha / r * B A, in place."""
        a, b = (x.detach().to(self.base.weight.device, torch.float32) for x in self._exact or (self.lora_a, self.lora_b))
        with torch.no_grad():
            self.base.weight.copy_(self.base.weight.float().addmm(b, a, alpha=self.scale))
        return self.base


def merge_lora(model: nn.Module) -> nn.Module:
    """Adds LoRA weights that `load_lolcats(merge=False)` kept apart into the model's own. Returns the model."""
    for parent in list(model.modules()):
        for name, module in list(parent.named_children()):
            if isinstance(module, LoraLinear):
                setattr(parent, name, module.merged())
    return model


def _lora_pairs(tensors: Mapping[str, Tensor], layers: Any) -> list[tuple[int, str, Tensor, Tensor]]:
    found: dict[tuple[int, str], dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        match = _LORA.search(name)
        if match is None:
            raise ValueError(f"lora holds the tensor {name!r}, for which there is no place")
        sides = found.setdefault((int(match.group(1)), match.group(2)), {})
        if match.group(3) in sides:
            raise ValueError(f"lora holds {match.group(0).lstrip('.')!r} twice, under several prefixes")
        sides[match.group(3)] = tensor
    pairs = []
    for (i, projection), sides in sorted(found.items()):
        where = f"layers.{i}.{projection}.lora"
        if len(sides) < 2:
            raise ValueError(f"lora lacks {where}_{'B' if 'A' in sides else 'A'}")
        try:
            weight = layers[i].get_submodule(projection).weight if i < len(layers) else None
        except AttributeError:
            weight = None
        if weight is None:
            raise ValueError(f"lora holds {where}_A, and the model has no layers.{i}.{projection}")
        a, b = sides["A"], sides["B"]
        if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1] or (b.shape[0], a.shape[1]) != tuple(weight.shape):
            raise ValueError(
                f"{where}_A and _B must have shapes (r, {weight.shape[1]}) and ({weight.shape[0]}, r), got {tuple(a.shape)} and {tuple(b.shape)}"
            )
        pairs.append((i, projection, a, b))
    return pairs


# --- feature maps -----------------------------------------------------------------------------------------------------


def maps_by_layer(
    maps: Any, model_config: Any, layers: list[int], feature_map: str | None
) -> tuple[dict[int, tuple[Any, Any]], str]:
    """(feature map, gate or None) of each of these layers from what `linearize` takes as maps; and the kind of untrained ones."""
    kind = _KINDS.get(feature_map, feature_map)
    if maps is None:
        return {}, kind or "hedgehog"
    if isinstance(maps, Mapping) and all(isinstance(key, int) for key in maps):
        return _given(maps, layers), kind or "hedgehog"
    spec = _adapter(maps)
    if (spec.get("lora") or {}).get("r") and not isinstance(maps, Mapping):
        raise ValueError(f"{maps} has LoRA weights too, without which its maps do not fit the model: use lola.torch.load_lolcats")
    kind = kind or _KINDS.get(spec.get("feature_map"), spec.get("feature_map")) or "hedgehog"
    if kind not in _CLASSES:
        raise ValueError(f"feature_map must be one of {', '.join(_CLASSES)} for these tensors, got {kind!r}")
    tensors = maps if isinstance(maps, Mapping) else read_tensors(maps, ("feature_maps.safetensors", "model.safetensors", "model.pt"))
    heads = model_config.num_attention_heads
    head_dim = getattr(model_config, "head_dim", None) or model_config.hidden_size // heads
    parts: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        match = _MAP.search(name)
        if match is None:
            raise ValueError(f"the feature maps hold the tensor {name!r}, for which there is no place")
        mine = parts.setdefault(int(match.group(1)), {})
        if match.group(2) in mine:
            raise ValueError(f"the feature maps hold {match.group(0).lstrip('.')!r} twice, under several prefixes")
        mine[match.group(2)] = tensor
    for i in parts:
        if i >= model_config.num_hidden_layers:
            raise ValueError(f"the feature maps hold layer {i}, and the model has {model_config.num_hidden_layers} layers")
    made = {}
    for i in layers:  # those of layers that stay softmax are not needed
        w_q, w_k = (_take(parts, i, f"feature_map_{side}.mlp.layer", (heads, head_dim, -1)) for side in "qk")
        factors = _take(parts, i, "window_factors", (1, heads, 1, 1))
        made[i] = (_CLASSES[kind](w_q, w_k), torch.sigmoid(factors.double()).flatten())
    return made, kind


def _take(parts: dict[int, dict[str, Tensor]], i: int, name: str, shape: tuple[int, ...]) -> Tensor:
    tensor = parts.get(i, {}).get(name)
    if tensor is None:
        raise ValueError(f"the feature maps lack layers.{i}.self_attn.{name}")
    if tensor.ndim != len(shape) or any(want not in (-1, got) for want, got in zip(shape, tensor.shape)):
        wanted = ", ".join("F/2" if n < 0 else str(n) for n in shape)
        raise ValueError(f"layers.{i}.self_attn.{name} must have shape ({wanted}), got {tuple(tensor.shape)}")
    if not tensor.is_floating_point() or not tensor.isfinite().all():
        raise ValueError(f"layers.{i}.self_attn.{name} must hold finite floats")
    return tensor.detach().cpu().float()


def _given(maps: Mapping[int, Any], layers: list[int]) -> dict[int, tuple[Any, Any]]:
    made = {}
    for i in layers:
        if i not in maps:
            raise ValueError(f"maps lack layer {i}")
        made[i] = maps[i] if isinstance(maps[i], tuple) else (maps[i], None)
        if not isinstance(made[i][0], lola._lola.FeatureMap):
            raise TypeError(f"maps[{i}] must be a lola feature map or (feature map, gate), got {type(made[i][0]).__name__}")
    return made


# --- files ------------------------------------------------------------------------------------------------------------


def _adapter(source: Any) -> dict[str, Any]:
    """adapter.json beside the tensors, or PEFT's adapter_config.json in the same words; {} where there is neither."""
    if isinstance(source, Mapping):
        return {}
    folder = Path(source) if Path(source).is_dir() else Path(source).parent
    for name in ("adapter.json", "adapter_config.json"):
        if (folder / name).is_file():
            said = json.loads((folder / name).read_text("utf-8"))
            if name == "adapter_config.json":
                return {"lora": {"r": said.get("r"), "alpha": said.get("lora_alpha")}}
            return said
    return {}


def read_tensors(source: Any, names: Iterable[str]) -> dict[str, Tensor]:
    """The tensors of a dict, of a .safetensors or pickled file, or of the first of these files in a folder.

    Raises FileNotFoundError, TypeError for a pickle of other things, and ValueError for a file that cannot be read.
    """
    if isinstance(source, Mapping):
        tensors = dict(source)
    else:
        path = Path(source)
        if path.is_dir():
            found = [path / name for name in names if (path / name).is_file()]
            if not found:
                raise FileNotFoundError(f"{path} has none of {', '.join(names)}")
            path = found[0]
        if not path.is_file():
            raise FileNotFoundError(f"there is no {path}")
        try:
            if path.suffix == ".safetensors":
                from safetensors.torch import load_file

                tensors = load_file(path)
            else:
                tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:
            raise ValueError(f"{path} could not be read as tensors alone: {error}") from error
    while isinstance(tensors, Mapping) and (inner := [key for key in _NESTED if isinstance(tensors.get(key), Mapping)]):
        tensors = tensors[inner[0]]
    if not isinstance(tensors, Mapping) or not all(isinstance(x, Tensor) for x in tensors.values()):
        raise TypeError(f"{source if not isinstance(source, Mapping) else 'the dict'} must hold tensors by name")
    return dict(tensors)
