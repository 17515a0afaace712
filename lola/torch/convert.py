"""`lola convert`: a LoLCATs checkpoint as a folder that AutoModelForCausalLM reads."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

import lola

from .lolcats import load_lolcats


def convert(
    base: str | os.PathLike,
    distill: str | os.PathLike | None,
    output: str | os.PathLike,
    lora: str | os.PathLike | None = None,
    *,
    config: dict[str, Any] | None = None,
    feature_map: str | None = None,
    alpha: float | None = None,
    dtype: str | None = None,
) -> Any:
    """Writes what `load_lolcats` reads, LoRA merged, as config.json, safetensors and, where the base has one, its tokenizer.

    Args:
        base, distill, lora, feature_map, alpha: As `load_lolcats`, files and folders.
        output: A folder; it must be new or empty.
        config: Fields of lola.Config that differ from the checkpoint's own.
        dtype: "float32", "float16" or "bfloat16"; default: as the base is stored.

    Returns:
        The model.

    Raises:
        FileExistsError: There is something in `output`.
        FileNotFoundError, TypeError, ValueError: As `load_lolcats`.

    >>> convert("needle", None, "needle-lola")  # doctest: +SKIP
    """
    from lola.models import BUNDLED

    from .models import configure

    output = Path(output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise FileExistsError(f"{output} is not empty: name a new folder")
    kind = None if dtype is None else getattr(torch, dtype)
    model = load_lolcats(base, distill, lora, feature_map=feature_map, alpha=alpha, dtype=kind)
    if config:
        configure(model, dataclasses.replace(lola.Config(**model.config.lola["config"]), **config))
    model.save_pretrained(output)
    folder = BUNDLED[base][0] if distill is None and base in BUNDLED else base
    try:
        AutoTokenizer.from_pretrained(folder).save_pretrained(output)
    except (OSError, ValueError):
        pass  # a base without a tokenizer
    return model


def size(model: Any) -> str:
    """Parameters and bytes, in words."""
    tensors: list[Tensor] = [*model.parameters()]
    return f"{sum(x.numel() for x in tensors) / 1e6:.1f} M parameters, {sum(x.numel() * x.element_size() for x in tensors) / 1e6:.1f} MB"
