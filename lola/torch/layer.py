"""Llama-like attention with LoLA in the place of softmax."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import lola

from . import hybrid, ops
from .cache import Rows, layer_of, rows_of_mask

# Attention whose forward pass is that of `LolaAttention`, projections, norms and rotary embedding included.
SUPPORTED = ("LlamaAttention", "MistralAttention", "Qwen2Attention", "Qwen3Attention")
UNTRAINED_GATE = 0.1  # LoLCATs' initial value


class _Weights(nn.Module):
    # Handed out by a forward pass: accelerate brings weights that it keeps elsewhere for the time of one.
    def __init__(self, *shape: int):
        super().__init__()
        self.layer = nn.Parameter(torch.empty(shape))

    def forward(self) -> Tensor:
        return self.layer


class FeatureWeights(nn.Module):
    """The weights of a feature map, (Hq, D, F/2) or, for "relu", (Hq, D, F), under LoLCATs' name `mlp.layer`."""

    def __init__(self, *shape: int):
        super().__init__()
        self.mlp = _Weights(*shape)

    def forward(self) -> Tensor:
        return self.mlp()


class LolaAttention(nn.Module):
    """Attention of a Llama, Mistral, Qwen2 or Qwen3 layer, computed by LoLA (arXiv 2505.23666).

    It takes the place of the layer's softmax attention with the same projections and norms; to them it adds the feature maps
    `feature_map_q.mlp.layer` and `feature_map_k.mlp.layer` and the `window_factors` (1, Hq, 1, 1), whose sigmoid is the gate:
    LoLCATs' names (arXiv 2410.10254). The kernels have no gradient, so it runs where none is recorded; a layer whose
    attribute `segment` is a number of tokens, as `lola.torch.distill` sets it, attends by `lola.torch.hybrid.attention` where
    one is.

    Args:
        config: A lola.Config.
        q_proj, k_proj, v_proj, o_proj: Projections from and to the hidden states, Hq * D and Hkv * D wide.
        head_dim: D.
        heads: Hq.
        layer_idx: Which layer of a transformers cache is its own.
        q_norm, k_norm: Norms over D of queries and keys, before the rotary embedding.
        feature_map: "hedgehog", "hedgehog_exp", "relu" or "elu_plus_one".
        feature_dim: F, default D.
        gate: Whether there are window factors.

    >>> model = transformers.AutoModelForCausalLM.from_pretrained("meta-llama/Llama-3.1-8B")  # doctest: +SKIP
    >>> layer = model.model.layers[0]  # doctest: +SKIP
    >>> layer.self_attn = LolaAttention.from_softmax(layer.self_attn, lola.Config(), maps[0], gates[0])  # doctest: +SKIP
    """

    def __init__(
        self,
        config: lola.Config,
        *,
        q_proj: nn.Module,
        k_proj: nn.Module,
        v_proj: nn.Module,
        o_proj: nn.Module,
        head_dim: int,
        heads: int,
        layer_idx: int = 0,
        q_norm: nn.Module | None = None,
        k_norm: nn.Module | None = None,
        feature_map: str = "hedgehog",
        feature_dim: int | None = None,
        gate: bool = True,
    ):
        super().__init__()
        self.head_dim, self.layer_idx, self.feature_map = head_dim, layer_idx, feature_map
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = q_proj, k_proj, v_proj, o_proj
        if q_norm is not None:
            self.q_norm, self.k_norm = q_norm, k_norm
        self.normed = q_norm is not None
        columns = feature_columns(feature_map, head_dim, feature_dim)
        self.feature_dim = head_dim if columns is None else columns * (1 if feature_map == "relu" else 2)
        self.feature_map_q = self.feature_map_k = None
        if columns is not None:
            self.feature_map_q, self.feature_map_k = (FeatureWeights(heads, head_dim, columns) for _ in "qk")
        self.window_factors = nn.Parameter(torch.empty(1, heads, 1, 1)) if gate else None
        self.config = config
        self.segment: int | None = None
        self.reset_feature_parameters()

    @property
    def config(self) -> lola.Config:
        """The lola.Config; a new one holds for caches begun after it is set."""
        return self._config

    @config.setter
    def config(self, config: lola.Config) -> None:
        if not isinstance(config, lola.Config):
            raise TypeError(f"config must be a lola.Config, got {type(config).__name__}")
        if self.window_factors is None and config.mixing in ("gated", "lolcats"):
            raise ValueError(f"mixing {config.mixing!r} needs a gate, and this layer has no window factors")
        self._config, self._spec = config, ops.spec_of(config)

    def reset_feature_parameters(self) -> None:
        """Untrained maps: each feature is one dimension; the gate is 0.1, as LoLCATs begins."""
        with torch.no_grad():
            for weights in (self.feature_map_q, self.feature_map_k):
                if weights is not None:
                    nn.init.zeros_(weights.mlp.layer)
                    weights.mlp.layer.diagonal(dim1=1, dim2=2).fill_(1)
            if self.window_factors is not None:
                self.window_factors.fill_(math.log(UNTRAINED_GATE / (1 - UNTRAINED_GATE)))

    @classmethod
    def from_softmax(
        cls,
        module: nn.Module,
        config: lola.Config | None = None,
        feature_map: Any = "hedgehog",
        gate: Any = None,
        *,
        feature_dim: int | None = None,
    ) -> LolaAttention:
        """The LoLA attention that takes the place of a softmax attention; projections and norms are shared, not copied.

        Args:
            module: Attention of a Llama, Mistral, Qwen2 or Qwen3 layer in transformers.
            config: A lola.Config, default lola.Config(). Its scale is the module's where it has none.
            feature_map: A lola.Hedgehog, HedgehogExp, EluPlusOne or Relu; or the name of one, for untrained weights.
            gate: (Hq,) floats between 0 and 1; True: untrained ones, 0.1; False: none. Default: none with mixing "paper" and
                "cache_only", which read none, and untrained ones otherwise.
            feature_dim: F of untrained weights.

        Raises:
            TypeError: Another kind of attention.
            ValueError: A feature map or gate of another shape; attention with a sliding window.
        """
        config = lola.Config() if config is None else config
        names = {base.__name__ for base in type(module).__mro__}
        if names.isdisjoint(SUPPORTED):
            raise TypeError(
                f"module must be one of {', '.join(SUPPORTED)}, got {type(module).__name__}. If its attention is Llama's, build a "
                "LolaAttention of its projections"
            )
        if window := sliding_window(module):
            raise ValueError(
                f"layer {module.layer_idx} attends to a sliding window of {window} tokens, and LoLA to all: leave this layer out, or "
                "set model.config.sliding_window = None first if it is meant to see everything"
            )
        if config.scale is None and not math.isclose(module.scaling, module.head_dim**-0.5):
            config = dataclasses.replace(config, scale=module.scaling)
        heads = module.q_proj.out_features // module.head_dim
        name, w_q, w_k = (feature_map, None, None) if isinstance(feature_map, str) else (feature_map.name, feature_map.w_q, feature_map.w_k)
        columns = feature_dim
        if w_q is not None:
            if w_q.shape[:2] != (heads, module.head_dim):
                raise ValueError(
                    f"feature_map must have weights ({heads}, {module.head_dim}, ...) for layer {module.layer_idx}, got {w_q.shape}"
                )
            columns = feature_map.feature_dim(module.head_dim)
        elif name == "relu" and not isinstance(feature_map, str):
            raise ValueError("feature_map must be a lola.Relu with weights, or lola.EluPlusOne")
        if gate is None:
            gate = config.mixing not in ("paper", "cache_only")
        made = cls(
            config, q_proj=module.q_proj, k_proj=module.k_proj, v_proj=module.v_proj, o_proj=module.o_proj, head_dim=module.head_dim,
            heads=heads, layer_idx=module.layer_idx, q_norm=getattr(module, "q_norm", None), k_norm=getattr(module, "k_norm", None),
            feature_map=name, feature_dim=columns, gate=gate is not False,
        )  # fmt: skip
        with torch.no_grad():
            if w_q is not None:
                made.feature_map_q.mlp.layer.copy_(torch.from_numpy(w_q.copy()))
                made.feature_map_k.mlp.layer.copy_(torch.from_numpy(w_k.copy()))
            if not isinstance(gate, bool):
                gate = np.asarray(gate, np.float64).ravel()
                if gate.shape != (heads,) or not ((gate > 0) & (gate < 1)).all():
                    raise ValueError(f"gate must be {heads} numbers between 0 and 1, got {gate.tolist()}")
                made.window_factors.copy_(torch.from_numpy(np.log(gate) - np.log1p(-gate)).view(1, heads, 1, 1))
        device = module.q_proj.weight.device
        for part in (made.feature_map_q, made.feature_map_k):
            if part is not None and part.mlp.layer.device != device:
                part.to(device)
        if made.window_factors is not None:
            made.window_factors.data = made.window_factors.data.to(device)
        return made.train(module.training)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """What a decoder layer calls.

        Args:
            hidden_states: (B, T, width) float32, float16 or bfloat16.
            position_embeddings: cos and sin, (B or 1, T, D) each.
            attention_mask: None or which tokens are padding: see `rows_of_mask`.
            past_key_values: A transformers cache to continue and to append to.

        Returns:
            (B, T, width), and None for the attention weights, which LoLA never forms.

        Raises:
            ValueError: While gradients are recorded, for a mask that LoLA cannot follow, and as `lola.attention`.
        """
        q, k, v = self.project(hidden_states, position_embeddings)
        if torch.is_grad_enabled() and self.segment is not None:
            if past_key_values is not None:
                raise ValueError("past_key_values must be None where gradients are recorded: pass use_cache=False")
            if rows_of_mask(attention_mask, q.shape[1], 0).starts is not None:
                raise ValueError("attention_mask must be None where gradients are recorded: train on rows without padding")
            return self.o_proj(self.differentiable(q, k, v).to(v.dtype).flatten(2)), None
        if torch.is_grad_enabled() and q.requires_grad:
            raise ValueError(
                "LoLA's kernels have no gradient: run the model under torch.no_grad() or torch.inference_mode(), or train it by "
                "lola.torch.distill"
            )
        w_q, w_k = self._map_weights()
        factors = self.window_factors
        if past_key_values is None:
            out = self._once(q, k, v, w_q, w_k, factors, rows_of_mask(attention_mask, q.shape[1], 0))
        else:
            layer = layer_of(past_key_values, self.layer_idx)
            rows = rows_of_mask(attention_mask, q.shape[1], layer.seen)
            out = layer.attend(q, k, v, self._spec, self.feature_map, w_q, w_k, self.feature_dim, factors, rows)
        return self.o_proj(out.flatten(2)), None

    def project(self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden states (B, T, width) to q (B, T, Hq, D), k and v (B, T, Hkv, D) of one dtype, q and k normed and rotated."""
        shape = (*hidden_states.shape[:2], -1, self.head_dim)
        q, k, v = (project(hidden_states).view(shape) for project in (self.q_proj, self.k_proj, self.v_proj))
        if self.normed:
            q, k = self.q_norm(q), self.k_norm(k)
        cos, sin = position_embeddings
        q, k = _rotated(q, k, cos.unsqueeze(2), sin.unsqueeze(2))
        if k.dtype != v.dtype:  # under autocast
            q, k = q.to(v.dtype), k.to(v.dtype)
        return q, k, v

    def _map_weights(self) -> tuple[Tensor | None, Tensor | None]:
        """The weights of the feature maps, read where they lie; those that accelerate keeps elsewhere come by a forward pass."""
        q, k = self.feature_map_q, self.feature_map_k
        if q is None:
            return None, None
        w_q, w_k = q.mlp.layer, k.mlp.layer
        return (q(), k()) if w_q.is_meta else (w_q, w_k)

    def differentiable(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The heads (B, T, Hq, D), float32, of what `project` returns, by `lola.torch.hybrid.attention`."""
        w_q, w_k = self._map_weights()
        gate = None if self.window_factors is None else self.window_factors.sigmoid().flatten()
        return hybrid.attention(
            q, k, v, config=self._config, feature_map=self.feature_map, w_q=w_q, w_k=w_k, gate=gate, segment=self.segment or hybrid.SEGMENT
        )  # fmt: skip

    def _once(self, q, k, v, w_q, w_k, factors, rows: Rows) -> Tensor:
        if ops.traced(q):
            spec, name, gated = self._spec, self.feature_map, factors is not None

            def attend(q, k, v, starts, stops):
                return ops._attention_once(
                    q, k, v, *spec, name, w_q, w_k, None, None, factors, gated, None, starts, stops, None, None
                )  # fmt: skip
        else:
            made = ops.feature_map_of(self.feature_map, w_q, w_k)
            gate = None if factors is None else ops.gate_of(factors)

            def attend(q, k, v, starts, stops):
                return ops.run(q, k, v, None, self._config, made, gate=gate, starts=starts, stops=stops)

        return rows.attend(q, k, v, attend)

    def extra_repr(self) -> str:
        return f"{self._config}, feature_map={self.feature_map!r}, feature_dim={self.feature_dim}"


def _rotated(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """The rotary embedding of q and k (B, T, heads, D); cos and sin (B or 1, T, 1, D)."""
    if torch.is_grad_enabled() or ops.traced(q) or not q.dtype == k.dtype == cos.dtype == sin.dtype:
        return q * cos + _turned(q) * sin, k * cos + _turned(k) * sin
    if q.shape[1] > 1:
        return _rotated_at_once(q, cos, sin), _rotated_at_once(k, cos, sin)
    # In decoding the number of operators counts, not their size.
    return torch.split_with_sizes(_rotated_at_once(torch.cat((q, k), 2), cos, sin), (q.shape[2], k.shape[2]), 2)


def _rotated_at_once(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """[a cos - b sin, b cos + a sin], in few operators and one tensor."""
    out = x * cos
    (a, b), (first, second), (sin_first, sin_second) = x.chunk(2, -1), out.chunk(2, -1), sin.chunk(2, -1)
    first.addcmul_(b, sin_first, value=-1)
    second.addcmul_(a, sin_second)
    return out


def _turned(x: Tensor) -> Tensor:
    """[a, b] -> [-b, a], the halves of the last axis: what the sines of the rotary embedding multiply."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def feature_columns(feature_map: str, head_dim: int, feature_dim: int | None) -> int | None:
    """Columns of a map's weights: F for "relu", F/2 for the Hedgehog maps, None for a map without weights; F is D by default."""
    feature_dim = head_dim if feature_dim is None else feature_dim
    if feature_map == "elu_plus_one":
        return None
    if feature_map == "relu":
        return feature_dim
    if feature_map not in ("hedgehog", "hedgehog_exp"):
        raise ValueError(f"feature_map must be 'hedgehog', 'hedgehog_exp', 'relu' or 'elu_plus_one', got {feature_map!r}")
    if feature_dim % 2:
        raise ValueError(f"feature_dim must be even for {feature_map}, got {feature_dim}")
    return feature_dim // 2


def sliding_window(module: nn.Module) -> int | None:
    """The window of an attention module of transformers, None where it attends to everything."""
    config = getattr(module, "config", None)
    if hasattr(module, "sliding_window"):  # Qwen: per layer
        return module.sliding_window
    return getattr(config, "sliding_window", None)
