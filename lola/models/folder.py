"""What a model's folder says: sizes, rotary embedding, adapter, and the tensors, each of which must be accounted for."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
from pathlib import Path

import numpy as np

from .safetensors import SafeTensors

__all__ = ["BUNDLED", "MAPS", "Adapter", "Geometry", "StrictTensors", "locate", "read_json", "rope_frequencies"]

_HERE = Path(__file__).parent
# Bundled models: the name, its folder, and its adapter's folder.
BUNDLED = {name: (_HERE / "needle", _HERE / "needle" / name) for name in ("needle", "needle-8k")}

# Feature maps in LoLCATs' names, and their classes in lola.
MAPS = {"softmax_dim": "Hedgehog", "exp_dim": "HedgehogExp"}


@dataclasses.dataclass(frozen=True)
class Geometry:
    """The sizes in a ``config.json``.

    ``rope`` holds the rotary parameters in one layout: ``rope_type``, ``rope_theta`` and the type's own.
    """

    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    vocabulary: int
    eps: float
    tied: bool
    rope: dict
    eos: tuple[int, ...]

    @classmethod
    def from_config(cls, config: dict, where: str | os.PathLike = "config.json") -> Geometry:
        """From the JSON object; ``where`` is the name to use in errors.

        Raises ``ValueError`` for a model that is not a Llama, for a missing or impossible size, and for a part that is
        not supported, and names the key.
        """

        def refuse(key, wanted):
            raise ValueError(f"{where}: {key} must be {wanted}; it is {config.get(key)!r}")

        def size(key, default=None):
            value = config.get(key)
            value = default if value is None else value
            if type(value) is not int or value < 1:
                raise ValueError(f"{where}: {key} must be a positive integer; it is {value!r}")
            return value

        if not isinstance(config, dict):
            raise ValueError(f"{where} must hold a JSON object")
        if config.get("model_type") != "llama":
            refuse("model_type", "'llama', the one architecture that is supported")
        if config.get("hidden_act", "silu") not in ("silu", "swish"):
            refuse("hidden_act", "'silu'")
        for key in ("attention_bias", "mlp_bias"):
            if config.get(key):
                refuse(key, "false: biases are not supported")
        if config.get("quantization_config"):
            refuse("quantization_config", "absent: only plain float weights are supported")
        heads = size("num_attention_heads")
        kv_heads = size("num_key_value_heads", heads)
        if heads % kv_heads:
            refuse("num_key_value_heads", f"a divisor of num_attention_heads, {heads}")
        width = size("hidden_size")
        head_dim = size("head_dim", width // heads)
        if head_dim % 2:
            refuse("head_dim", "even")
        eos = config.get("eos_token_id")
        eps = config.get("rms_norm_eps", 1e-6)
        if not isinstance(eps, (int, float)) or not eps >= 0:
            refuse("rms_norm_eps", "a number >= 0")
        return cls(
            layers=size("num_hidden_layers"),
            width=width,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            mlp=size("intermediate_size"),
            vocabulary=size("vocab_size"),
            eps=float(eps),
            tied=bool(config.get("tie_word_embeddings", False)),
            rope=_rope_parameters(config, where),
            eos=() if eos is None else tuple(eos) if isinstance(eos, list) else (eos,),
        )


def _rope_parameters(config: dict, where) -> dict:
    """The rotary parameters, from ``rope_parameters`` (transformers 5) or ``rope_theta`` and ``rope_scaling`` (before)."""
    rope = config.get("rope_parameters") or {"rope_theta": config.get("rope_theta"), **(config.get("rope_scaling") or {})}
    theta = rope.get("rope_theta") or config.get("rope_theta") or 10000.0
    rope = {**rope, "rope_theta": float(theta), "rope_type": rope.get("rope_type") or rope.get("type") or "default"}
    needed = {"default": (), "linear": ("factor",)}
    needed["llama3"] = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    if rope["rope_type"] not in needed:
        raise ValueError(f"{where}: rope_type must be one of {', '.join(needed)}; it is {rope['rope_type']!r}")
    for key in needed[rope["rope_type"]]:
        if not isinstance(rope.get(key), (int, float)) or not rope[key] > 0:
            raise ValueError(f"{where}: the {rope['rope_type']} rope needs {key}, a number above 0; it is {rope.get(key)!r}")
    if rope.get("partial_rotary_factor", 1) != 1:
        raise ValueError(f"{where}: partial_rotary_factor must be 1; it is {rope['partial_rotary_factor']!r}")
    return rope


def rope_frequencies(rope: dict, head_dim: int) -> np.ndarray:
    """The angle per position of each pair of dimensions: (D/2,) float32.

    theta^(-2i/D), divided by ``factor`` ("linear"), or divided only where the wavelength is long ("llama3": below
    ``high_freq_factor`` turns within the original context the division sets in, at ``low_freq_factor`` it is complete).
    """
    frequencies = np.float32(1) / np.float32(rope["rope_theta"]) ** (np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim))
    if rope["rope_type"] == "linear":
        frequencies = frequencies / np.float32(rope["factor"])
    elif rope["rope_type"] == "llama3":
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        turns = rope["original_max_position_embeddings"] * frequencies / (2 * math.pi)
        kept = np.clip((turns - low) / (high - low), 0, 1) if high != low else turns >= high
        frequencies = frequencies * (kept + (1 - kept) / rope["factor"])
    return frequencies.astype(np.float32)


@dataclasses.dataclass(frozen=True)
class Adapter:
    """What a linearisation adds to a model: the numbers in ``adapter.json`` and the folder they are in.

    ``mixing``, ``window`` and ``chunk`` are those it was trained with; ``rank`` and ``alpha`` are LoRA's (rank 0: none).
    """

    folder: Path
    feature_map: str
    window: int
    chunk: int
    mixing: str
    rank: int
    alpha: float

    @classmethod
    def from_folder(cls, folder: str | os.PathLike) -> Adapter:
        """Reads ``adapter.json``; raises FileNotFoundError if it is absent, ValueError if a key is missing or wrong."""
        path = Path(folder) / "adapter.json"
        spec = read_json(path)
        lora = spec.get("lora") or {"r": 0, "alpha": 0}
        mixings = ("paper", "gated", "lolcats", "cache_only")
        if spec.get("feature_map") not in MAPS:
            raise ValueError(f"{path}: feature_map must be one of {', '.join(MAPS)}; it is {spec.get('feature_map')!r}")
        if spec.get("mixing") not in mixings:
            raise ValueError(f"{path}: mixing must be one of {', '.join(mixings)}; it is {spec.get('mixing')!r}")
        for key in ("window", "chunk"):
            if type(spec.get(key)) is not int or spec[key] < 1:
                raise ValueError(f"{path}: {key} must be a positive integer; it is {spec.get(key)!r}")
        if not isinstance(lora, dict) or type(lora.get("r")) is not int or not isinstance(lora.get("alpha"), (int, float)):
            raise ValueError(f"{path}: lora must hold the integer r and the number alpha; it is {lora!r}")
        return cls(Path(folder), spec["feature_map"], spec["window"], spec["chunk"], spec["mixing"], lora["r"], float(lora["alpha"]))


def read_json(path: Path) -> dict:
    if not path.is_file():
        raise FileNotFoundError(f"{path.parent} has no {path.name}")
    try:
        value = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object")
    return value


class StrictTensors:
    """Takes tensors out of a file by name and shape; in the end every one must have been taken or be explained."""

    def __init__(self, tensors: SafeTensors, what: str | os.PathLike):
        self.tensors, self.what = tensors, what
        self.taken: dict[str, str] = {}  # a line about each, with the hash of its bytes

    @classmethod
    def from_file(cls, path: Path) -> StrictTensors:
        if not path.is_file():
            raise FileNotFoundError(f"{path.parent} has no {path.name}")
        return cls(SafeTensors(path), path)

    def __contains__(self, name):
        return name in self.tensors

    def take(self, name: str, *shape: int) -> np.ndarray:
        """As float32. Raises ValueError if it is absent, of another shape, or not of floats."""
        if name not in self.tensors:
            raise ValueError(f"{self.what} lacks the tensor {name!r}")
        if self.tensors.shape(name) != shape:
            raise ValueError(f"{self.tensors.file(name)}: {name!r} must have shape {shape}; it has {self.tensors.shape(name)}")
        array = self.tensors[name]
        if array.dtype.kind != "f":
            raise ValueError(f"{self.tensors.file(name)}: {name!r} must hold floats; it holds {self.tensors.dtype(name)}")
        digest = hashlib.sha256(self.tensors.raw(name)).hexdigest()
        self.taken[name] = f"{name} {self.tensors.dtype(name)} {shape} {digest}\n"
        return array.astype(np.float32)

    def finish(self, explained=lambda name: False):
        for name in self.tensors:
            if name not in self.taken and not explained(name):
                raise ValueError(f"{self.tensors.file(name)} holds the tensor {name!r}, for which this model has no place")


def locate(name: str | os.PathLike, adapter: str | os.PathLike | None = None) -> tuple[Path, Path | None]:
    """The folder of a model and the folder of its adapter, if it has one.

    Raises FileNotFoundError, naming the bundled models, if ``name`` is neither one of them nor a folder.
    """
    folder, own = BUNDLED.get(name, (Path(name), Path(name))) if isinstance(name, str) else (Path(name), Path(name))
    if not folder.is_dir():
        raise FileNotFoundError(f"model must be one of {', '.join(BUNDLED)}, or a folder with config.json; there is no {str(name)!r}")
    if adapter is not None:
        if not Path(adapter).is_dir():
            raise FileNotFoundError(f"adapter must be a folder with adapter.json; there is no {str(adapter)!r}")
        own = Path(adapter)
    return folder, (own if adapter is not None or (own / "adapter.json").is_file() else None)
