"""Small random models, and LoLA models of them."""

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import lola
import lola.torch

SIZES = dict(
    vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=512, bos_token_id=1, eos_token_id=None, pad_token_id=0, initializer_range=0.3,
)  # fmt: skip
FAMILIES = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "llama3 rope": (
        LlamaConfig,
        LlamaForCausalLM,
        dict(
            rope_parameters=dict(
                rope_type="llama3", rope_theta=1e4, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                original_max_position_embeddings=64,
            )
        ),
    ),  # fmt: skip
    "mistral": (MistralConfig, MistralForCausalLM, dict(sliding_window=None, head_dim=12)),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, dict(head_dim=16)),
}
FOLDING = lola.Config(window=8, chunk=4, sparse=6)
NOTHING_FOLDED = lola.Config(window=8, chunk=4, sparse=400)


def soft(family="llama", seed=0, **changes):
    """A softmax model. Norms and biases are random too, so that none of them can be forgotten unseen."""
    config_class, model_class, extra = FAMILIES[family]
    torch.manual_seed(seed)
    model = model_class(config_class(**{**SIZES, **extra, **changes})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def maps(model, seed=1):
    """Random feature maps and gates for each layer of a model."""
    config, made = model.config, {}
    torch.manual_seed(seed)
    heads = config.num_attention_heads
    for i in range(config.num_hidden_layers):
        w_q, w_k = torch.randn(2, heads, config.head_dim if hasattr(config, "head_dim") else config.hidden_size // heads, 6) / 3
        made[i] = (lola.Hedgehog(w_q, w_k), torch.rand(heads) * 0.8 + 0.1)
    return made


def linear(family="llama", config=FOLDING, layers=None, seed=0, **changes):
    """The same weights with LoLA attention."""
    model = soft(family, seed, **changes)
    return lola.torch.linearize(model, config, maps(model), layers=layers)


def prompts(rows=2, tokens=60, seed=0):
    torch.manual_seed(seed)
    return torch.randint(2, 97, (rows, tokens))


def padded(ids, lengths):
    """Left padding so that row b has lengths[b] tokens, the last ones of ids; ids and mask."""
    mask = torch.ones_like(ids)
    for b, length in enumerate(lengths):
        mask[b, : ids.shape[1] - length] = 0
    return ids * mask, mask


def answer(model, ids, new=20, **options):
    """The new tokens of generate, (B, new); greedy unless told otherwise."""
    options = {"do_sample": False, "attention_mask": torch.ones_like(ids), **options}
    return model.generate(ids, max_new_tokens=new, **options)[:, ids.shape[1] :]


def difference(a, b):
    return (a.float() - b.float()).abs().max().item()
