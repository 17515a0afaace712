"""Small random Llama folders and adapters, written with NumPy alone."""

import json
from pathlib import Path

import numpy as np

from lola.models.safetensors import write

SMALL = dict(layers=2, width=32, heads=4, kv_heads=2, head_dim=8, mlp=48, vocabulary=256)


def config(layers, width, heads, kv_heads, head_dim, mlp, vocabulary, **extra):
    """A config.json as transformers writes it."""
    return {
        "model_type": "llama",
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "tie_word_embeddings": False,
        **extra,
    }


def tensors(layers, width, heads, kv_heads, head_dim, mlp, vocabulary, seed=0, dtype=np.float32):
    """Weights under their Hugging Face names, of about the size that keeps activations near 1."""
    rng = np.random.default_rng(seed)

    def matrix(outputs, inputs):
        return (rng.standard_normal((outputs, inputs)) * inputs**-0.5).astype(dtype)

    def norm():
        return (1 + 0.1 * rng.standard_normal(width)).astype(dtype)

    query, pair = heads * head_dim, kv_heads * head_dim
    out = {"model.embed_tokens.weight": rng.standard_normal((vocabulary, width)).astype(dtype)}
    for i in range(layers):
        sizes = {
            "self_attn.q_proj": (query, width), "self_attn.k_proj": (pair, width), "self_attn.v_proj": (pair, width),
            "self_attn.o_proj": (width, query), "mlp.gate_proj": (mlp, width), "mlp.up_proj": (mlp, width),
            "mlp.down_proj": (width, mlp),
        }  # fmt: skip
        out |= {f"model.layers.{i}.{name}.weight": matrix(*size) for name, size in sizes.items()}
        out |= {f"model.layers.{i}.{name}.weight": norm() for name in ("input_layernorm", "post_attention_layernorm")}
    return out | {"model.norm.weight": norm(), "lm_head.weight": matrix(vocabulary, width)}


def tokenizer():
    """A tokenizer.json whose 256 tokens are the bytes."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    model = {"type": "BPE", "vocab": {letters[byte]: byte for byte in range(256)}, "merges": []}
    return {"version": "1.0", "added_tokens": [], "normalizer": None, "pre_tokenizer": level, "decoder": level, "model": model}


def save(folder, seed=0, dtype=np.float32, sizes=SMALL, **extra):
    """Writes a model folder and returns it; ``extra`` goes into config.json."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config(**sizes, **extra)))
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer()))
    write(folder / "model.safetensors", tensors(**sizes, seed=seed, dtype=dtype))
    return folder


def save_adapter(folder, seed=1, feature_map="softmax_dim", rank=2, alpha=4, window=16, chunk=8, mixing="lolcats", sizes=SMALL):
    """Writes an adapter folder and returns it."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    heads, D, width = sizes["heads"], sizes["head_dim"], sizes["width"]
    maps, lora = {}, {}
    for i in range(sizes["layers"]):
        base = f"model.layers.{i}.self_attn."
        for side in "qk":
            maps[f"{base}feature_map_{side}.mlp.layer"] = rng.standard_normal((heads, D, D // 2)).astype(np.float32)
        maps[f"{base}window_factors"] = rng.standard_normal((1, heads, 1, 1)).astype(np.float32)
        for name in "qkvo":
            inputs, outputs = heads * D if name == "o" else width, {"q": heads * D, "o": width}.get(name, sizes["kv_heads"] * D)
            at = f"base_model.model.{base}{name}_proj.lora_"
            lora[f"{at}A.default.weight"] = (0.3 * rng.standard_normal((rank, inputs))).astype(np.float32)
            lora[f"{at}B.default.weight"] = (0.3 * rng.standard_normal((outputs, rank))).astype(np.float32)
    spec = {"feature_map": feature_map, "window": window, "chunk": chunk, "mixing": mixing, "lora": {"r": rank, "alpha": alpha}}
    (folder / "adapter.json").write_text(json.dumps(spec))
    write(folder / "feature_maps.safetensors", maps)
    if rank:
        write(folder / "lora.safetensors", lora)
    return folder
