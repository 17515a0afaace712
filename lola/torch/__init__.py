"""LoLA for PyTorch and Hugging Face transformers.

    attention, prepare              lola.attention on torch tensors, under torch.compile too
    LolaAttention                   attention of a Llama, Mistral or Qwen layer
    linearize, configure            a model of transformers with LoLA in the place of softmax attention
    load_lolcats, merge_lora        the same from a LoLCATs checkpoint, or the bundled model
    distill, hybrid                 training of feature maps, gates and LoRA; LoLA with a gradient (modules, imported on first use)
    LolaCacheLayer                  what `past_key_values` holds of such a layer
    LolaLlamaConfig, LolaLlamaForCausalLM, ...   the classes that AutoModelForCausalLM finds

Needs torch; all but `attention`, `prepare` and `hybrid` need transformers too. Both come with `pip install lola[torch]`.
"""

from __future__ import annotations

import importlib
from typing import Any

try:
    from .ops import attention, prepare
except ModuleNotFoundError as error:
    if error.name != "torch":
        raise
    raise ModuleNotFoundError("lola.torch needs PyTorch: pip install lola[torch]", name="torch") from error

_TRANSFORMERS: ModuleNotFoundError | None = None
try:
    from .cache import LolaCacheLayer
    from .layer import LolaAttention
    from .lolcats import LoraLinear, load_lolcats, merge_lora
    from .models import (
        LolaLlamaConfig,
        LolaLlamaForCausalLM,
        LolaMistralConfig,
        LolaMistralForCausalLM,
        LolaQwen2Config,
        LolaQwen2ForCausalLM,
        LolaQwen3Config,
        LolaQwen3ForCausalLM,
        configure,
        linearize,
    )
except ModuleNotFoundError as error:
    if error.name != "transformers":
        raise
    _TRANSFORMERS = error

__all__ = [
    "LolaAttention",
    "LolaCacheLayer",
    "LolaLlamaConfig",
    "LolaLlamaForCausalLM",
    "LolaMistralConfig",
    "LolaMistralForCausalLM",
    "LolaQwen2Config",
    "LolaQwen2ForCausalLM",
    "LolaQwen3Config",
    "LolaQwen3ForCausalLM",
    "LoraLinear",
    "attention",
    "configure",
    "distill",
    "hybrid",
    "linearize",
    "load_lolcats",
    "merge_lora",
    "prepare",
]


def __getattr__(name: str) -> Any:
    if name in ("distill", "hybrid"):
        return importlib.import_module(f".{name}", __name__)
    if _TRANSFORMERS is not None and name in __all__:
        raise ModuleNotFoundError(f"lola.torch.{name} needs transformers: pip install lola[torch]", name="transformers") from _TRANSFORMERS
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
