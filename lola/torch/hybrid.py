"""LoLA in differentiable PyTorch, to train feature maps, gates and LoRA weights with (arXiv 2505.23666, Eq. 10, 12-14).

    attention            whole sequences as `lola.attention` computes them, with a gradient; memory linear in their length
    plan, states, attend the same in three steps on (B, H, T, .) tensors: what is kept, what is folded, what the queries read
    features, mix        feature maps; the two memories in one output
    softmax_attention    the teacher, by scaled_dot_product_attention

The choice of what the sparse cache keeps is not differentiated; everything else is. Nothing here is fast at decoding: that is
what `lola.torch.attention` is for, and both compute the same.

Symbols as in `lola.reference`: B rows, T tokens, Hq and Hkv heads, D and Dv key and value size, F features, N chunks of C
positions, W window. Needs torch alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import lola

MIXINGS = ("paper", "gated", "lolcats", "cache_only")
SCORES = ("self_recall", "value_norm", "key_norm", "recency")
FEATURE_MAPS = ("hedgehog", "hedgehog_exp", "elu_plus_one", "relu")
SEGMENT = 512


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """Causal softmax attention: q (B, Hq, T, D), k and v (B, Hkv, T, .) of one dtype -> (B, Hq, T, Dv)."""
    group = q.shape[1] // k.shape[1]
    return F.scaled_dot_product_attention(q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1), is_causal=True, scale=scale)


# --- the steps: fq, fk and repeated k, v are (B, H, T, .) with H = Hq ------------------------------------------------------


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def hedgehog(x: Tensor, w: Tensor) -> Tensor:
    """phi(x) = [softmax(x W), softmax(-x W)], at least 1e-12; x (B, H, T, D), w (H, D, F/2) -> (B, H, T, F), float32."""
    y = torch.einsum("bhtd,hdf->bhtf", _wide(x), _wide(w))
    return torch.cat((y.softmax(-1), (-y).softmax(-1)), -1).clamp_min(1e-12)


def features(x: Tensor, w: Tensor | None, feature_map: str = "hedgehog") -> Tensor:
    """phi(x) of one of the four maps (section 5 of the contract): x (B, H, T, D), w (H, D, .) or None -> (B, H, T, F)."""
    if feature_map == "hedgehog":
        return hedgehog(x, w)
    y = _wide(x) if w is None else torch.einsum("bhtd,hdf->bhtf", _wide(x), _wide(w))
    if feature_map == "hedgehog_exp":
        return torch.cat(((y - y.amax(-1, keepdim=True)).exp(), (y.amin(-1, keepdim=True) - y).exp()), -1).clamp_min(1e-12)
    return F.elu(y) + 1 if feature_map == "elu_plus_one" else y.clamp_min(1e-12)


def take(x: Tensor, index: Tensor) -> Tensor:
    """x (B, H, T, D) at index (B, H, ...) -> (B, H, ..., D)."""
    flat = index.flatten(2)
    return x.gather(2, flat[..., None].expand(-1, -1, -1, x.shape[-1])).unflatten(2, index.shape[2:])


def self_recall(f: Tensor, v: Tensor, hidden: Tensor, norm: Tensor) -> Tensor:
    """|| phi(k)^T H / (phi(k)^T s) - v ||^2, and ||v||^2 where nothing is folded; f (B, H, E, F), v (B, H, E, D) -> (B, H, E)."""
    z = (f * norm[:, :, None]).sum(-1, keepdim=True)
    recalled = torch.where(z > 0, (f @ hidden) / z.clamp_min(1e-30), 0.0)
    return (recalled - v).square().sum(-1)


@dataclass
class Plan:
    """What each chunk's queries find outside the window: (B, H, N, .) places in k and v, of which the first ``kept[n]`` in the
    sparse cache are valid; ``folded[n]`` of ``fold`` enter the state when chunk n begins. ``last`` is the last chunk's cache."""

    sparse: Tensor
    kept: Tensor
    fold: Tensor
    folded: Tensor
    last: Tensor | None = None


@torch.no_grad()
def plan(fk: Tensor, v: Tensor, chunk: int, window: int, sparse: int) -> Plan:
    """The scan over a whole sequence's chunks: which pairs leave the window into the sparse cache, and which are folded.

    Eq. 10, 12-13 with a set for each query head; fk (B, H, T, F), v (B, H, T, D), T a multiple of ``chunk``.
    """
    b, h, t, _ = fk.shape
    hidden, norm = fk.new_zeros(b, h, fk.shape[-1], v.shape[-1]), fk.new_zeros(b, h, fk.shape[-1])
    return _scan(fk, None, v, chunk, t // chunk, window // chunk + 1, sparse, 0, hidden, norm)


@torch.no_grad()
def _scan(
    f: Tensor, k: Tensor | None, v: Tensor, chunk: int, n: int, skip: int, sparse: int, cached: int, hidden: Tensor, norm: Tensor,
    score: str = "self_recall", group: int = 1,
) -> Plan:  # fmt: skip
    """The plan of n chunks. The first ``cached`` pairs of f, k and v are the sparse cache as it was before them, the pairs after
    them leave the window, a chunk of them with each chunk from ``skip`` on; (hidden, norm) is the state before. ``group`` heads
    share one set."""
    b, h = f.shape[:2]
    long = {"dtype": torch.long, "device": f.device}
    out = Plan(torch.zeros(b, h, n, sparse, **long), torch.zeros(n, **long), torch.zeros(b, h, n, chunk, **long), torch.zeros(n, **long))
    cache = torch.arange(cached, device=f.device).expand(b, h, -1)
    kept, folded = [0] * n, [0] * n
    for i in range(skip, n):
        leaving = torch.arange(cached + (i - skip) * chunk, cached + (i - skip + 1) * chunk, device=f.device).expand(b, h, -1)
        pool = torch.cat((cache, leaving), -1)
        if pool.shape[-1] <= sparse:
            cache = pool
        else:
            part, value = take(f, pool), take(v, pool)
            if score == "self_recall":
                scores = self_recall(part, value, hidden, norm)
            elif score == "recency":
                scores = pool
            else:
                scores = value.square().sum(-1) if score == "value_norm" else -take(k, pool).square().sum(-1)
            if group > 1:
                scores = scores.unflatten(1, (-1, group)).sum(2).repeat_interleave(group, 1)
            # The pool is in order of position and the sort is stable, so a tie keeps the earlier position.
            order = scores.sort(dim=-1, descending=True, stable=True).indices
            cache = pool.gather(-1, order[..., :sparse].sort(-1).values)
            drop = order[..., sparse:]
            part, value = take(part, drop), take(value, drop)
            hidden = hidden + part.transpose(-1, -2) @ value
            norm = norm + part.sum(2)
            folded[i] = drop.shape[-1]
            out.fold[:, :, i, : folded[i]] = pool.gather(-1, drop)
        kept[i] = cache.shape[-1]
        out.sparse[:, :, i, : kept[i]] = cache
    out.kept, out.folded, out.last = torch.tensor(kept, **long), torch.tensor(folded, **long), cache
    return out


def states(fk: Tensor, v: Tensor, chunk: int, window: int, made: Plan | None) -> tuple[Tensor, Tensor]:
    """Hidden state (B, H, N, F, D) and normaliser (B, H, N, F) that each chunk's queries meet, of a whole sequence."""
    n = fk.shape[2] // chunk
    return _states(fk, v, chunk, n, min(window // chunk + 1, n), made)


def _states(f: Tensor, v: Tensor, chunk: int, n: int, skip: int, made: Plan | None) -> tuple[Tensor, Tensor]:
    """The same of n chunks, from an empty state; f and v hold at least what leaves, as in `_scan`."""
    if made is None:
        leave = (n - skip) * chunk
        f, value = (x[:, :, :leave].unflatten(2, (n - skip, chunk)) for x in (f, v))
        hidden = (f.transpose(-1, -2) @ value).cumsum(2)
        norm = f.sum(3).cumsum(2)
        return F.pad(hidden, (0, 0, 0, 0, skip, 0)), F.pad(norm, (0, 0, skip, 0))
    real = torch.arange(chunk, device=f.device) < made.folded[:, None]
    f = take(f, made.fold) * real[:, :, None]
    return (f.transpose(-1, -2) @ take(v, made.fold)).cumsum(2), f.sum(3).cumsum(2)


def mix(logits: Tensor, values: Tensor, numerator: Tensor, z: Tensor, gate: Tensor | None, mixing: str, through_max: bool = True) -> Tensor:
    """The two memories in one output (section 4 of the contract).

    Args:
        logits, values: (..., Q, S) and (..., S, D), minus infinity where a query does not see a pair.
        numerator, z: What it reads of the state, (..., Q, D) and (..., Q, 1).
        gate: Between 0 and 1, to broadcast with z; None with "paper" and "cache_only".
        mixing: "paper", "gated", "lolcats" or "cache_only".
        through_max: "lolcats" depends on the largest logit, as the state is not scaled by it. False leaves that out of the
            gradient, which was how the bundled adapters were trained.
    """
    top = logits.amax(-1, keepdim=True)
    if mixing == "lolcats":
        weight = gate * (logits - (top if through_max else top.detach())).exp()
        return (weight @ values + numerator) / (weight.sum(-1, keepdim=True) + z)
    if mixing == "cache_only":
        return logits.softmax(-1) @ values
    bias = torch.log((1 - gate) / gate) if mixing == "gated" else 0.0
    some = z > 0
    safe = torch.where(some, z, 1.0)
    state = torch.where(some, safe.log() + bias, -torch.inf)
    top = torch.maximum(top, state).detach()
    weight, state = (logits - top).exp(), (state - top).exp()
    return (weight @ values + state * numerator / safe) / (weight.sum(-1, keepdim=True) + state)


def attend(
    q: Tensor, k: Tensor, v: Tensor, fq: Tensor, fk: Tensor, gate: Tensor | None, mixing: str, chunk: int, window: int,
    made: Plan | None = None, through_max: bool = True,
) -> Tensor:  # fmt: skip
    """All queries of whole sequences, in parallel over chunks. gate (Hq,) in (0, 1). Returns (B, Hq, T, D), float32."""
    group = q.shape[1] // k.shape[1]
    q, k, v = _wide(q), _wide(k).repeat_interleave(group, 1), _wide(v).repeat_interleave(group, 1)
    logits, values = _exact(q, k, v, chunk, window, 0, 0, made, q.shape[-1] ** -0.5)
    return _read(logits, values, fq, *states(fk, v, chunk, window, made), gate, mixing, through_max)


def _exact(
    q: Tensor, k: Tensor, v: Tensor, chunk: int, window: int, cached: int, first: int, made: Plan | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Logits (B, H, N, C, S) and values (B, H, N, S, D) of what N chunks of queries (B, H, N * C, D) see exactly.

    k and v hold ``cached`` pairs, then ``first`` chunks before those of the queries, then theirs.
    """
    n = q.shape[2] // chunk
    q = q.unflatten(2, (n, chunk)) * scale
    before = first * chunk - window  # tokens that no query's window reaches, or minus those that are not there
    near_k, near_v = (x[:, :, cached + max(before, 0) :] for x in (k, v))
    if before < 0:
        near_k, near_v = (F.pad(x, (0, 0, -before, 0)) for x in (near_k, near_v))
    near_k, near_v = (x.unfold(2, window + chunk, chunk) for x in (near_k, near_v))  # (B, H, N, D, W + C)
    # Entry j of chunk i is position i C - W + j: it exists, and is not after the query.
    entry = torch.arange(window + chunk, device=q.device)
    exists = entry >= window - chunk * torch.arange(first, first + n, device=q.device)[:, None]
    causal = entry <= window + torch.arange(chunk, device=q.device)[:, None]
    logits = (q @ near_k).masked_fill(~(exists[:, None] & causal), -torch.inf)
    values = near_v.transpose(-1, -2)
    if made is not None:
        empty = torch.arange(made.sparse.shape[-1], device=q.device) >= made.kept[:, None]
        far = (q @ take(k, made.sparse).transpose(-1, -2)).masked_fill(empty[:, None], -torch.inf)
        logits, values = torch.cat((far, logits), -1), torch.cat((take(v, made.sparse), values), -2)
    return logits, values


def _read(logits, values, fq, hidden, norm, gate, mixing: str, through_max: bool) -> Tensor:
    fq = fq.unflatten(2, logits.shape[2:4])
    gate = None if gate is None else gate[:, None, None, None]
    return mix(logits, values, fq @ hidden, fq @ norm[..., None], gate, mixing, through_max).flatten(2, 3)


# --- whole sequences, segment by segment -----------------------------------------------------------------------------------


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    config: lola.Config | None = None,
    feature_map: str = "hedgehog",
    w_q: Tensor | None = None,
    w_k: Tensor | None = None,
    gate: Tensor | None = None,
    segment: int = SEGMENT,
    through_max: bool = True,
) -> Tensor:
    """`lola.attention` of whole sequences, with a gradient in q, k, v, the maps' weights and the gate.

    The sequence is computed in segments, and what lasts (sparse cache, hidden state) is handed from one to the next. Where a
    gradient is recorded, a segment keeps only that and is computed once more on the way back: beside q, k, v and the output,
    memory grows by F * Dv + sparse * (D + Dv) floats per query head and segment, not by what happens inside. Time is linear
    in T. What the sparse cache keeps is chosen once, on the way forward.

    Args:
        q: (B, T, Hq, D), after the position embedding; float32, bfloat16 or float16; float64 to check gradients.
        k, v: (B, T, Hkv, D) and (B, T, Hkv, Dv).
        config: A lola.Config, default lola.Config(); `score` "self_recall", "value_norm", "key_norm" or "recency".
        feature_map: "hedgehog", "hedgehog_exp", "elu_plus_one" or "relu".
        w_q, w_k: Their weights, (Hq, D, F/2), or (Hq, D, F) or None for "relu".
        gate: (Hq,) between 0 and 1.
        segment: Tokens of a segment, made whole chunks and at least window + chunk.
        through_max: See `mix`.

    Returns:
        (B, T, Hq, Dv), float32 (float64 for float64). Features and sums are float32 whatever the inputs; unlike in the
        kernels, features of 16-bit inputs are not rounded to bfloat16.

    Raises:
        TypeError: Another kind of config, or integers.
        ValueError: A shape that does not fit; "gated" or "lolcats" without a gate; a map without weights; the scores "random",
            "attention" and "external".

    >>> q, k, v = torch.randn(3, 1, 300, 4, 16)
    >>> w = torch.randn(4, 16, 8, requires_grad=True)
    >>> config = lola.Config(window=32, chunk=16, sparse=8)
    >>> attention(q, k, v, config=config, w_q=w, w_k=w).square().mean().backward()
    >>> w.grad.shape
    torch.Size([4, 16, 8])
    """
    config = lola.Config() if config is None else config
    mixing = _check(q, k, v, config, feature_map, w_q, w_k, gate)
    if mixing in ("paper", "cache_only"):
        gate = None
    chunk, window, sparse = config.chunk, config.window, config.sparse
    lag = window // chunk + 1
    tokens, group = q.shape[1], q.shape[2] // k.shape[2]
    scale = q.shape[3] ** -0.5 if config.scale is None else config.scale
    size = chunk * max(-(-segment // chunk), lag)
    # What is added at the end comes after every query, so none sees it.
    more = -tokens % chunk
    q, k, v = ((F.pad(x, (0, 0, 0, 0, 0, more)) if more else x).transpose(1, 2) for x in (q, k, v))
    inputs = [x for x in (q, k, v, w_q, w_k, gate) if x is not None]
    recorded = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    sets = group if config.sparse_per == "kv_head" else 1

    def local(cached, before, now):
        """What a segment sees of keys or values: cached ones, the last ``lag`` chunks, its own, for each query head."""
        parts = [now] if before is None else [before[:, :, -lag * chunk :], now]
        parts = [_wide(x).repeat_interleave(group, 1) for x in parts]
        return torch.cat(parts if cached is None else [cached, *parts], 2)

    def choose(k_before, v_before, k, v, memory, n, skip):
        with torch.no_grad():
            cached = 0 if memory[0] is None else memory[0].shape[2]
            leave = cached + (n - skip) * chunk
            key, value = local(memory[0], k_before, k)[:, :, :leave], local(memory[1], v_before, v)[:, :, :leave]
            f, (hidden, norm) = features(key, w_k, feature_map), memory[2:]
            if hidden is None:
                hidden, norm = f.new_zeros(*f.shape[:2], f.shape[-1], value.shape[-1]), f.new_zeros(*f.shape[:2], f.shape[-1])
            return _scan(f, key, value, chunk, n, skip, sparse, cached, hidden, norm, config.score, sets)

    # Every tensor is an argument of its own: what stands in a tuple, an outer checkpoint would keep.
    def compute(q, k_before, v_before, k, v, kept_k, kept_v, kept_hidden, kept_norm, w_q, w_k, gate, n, skip, *made):
        made = Plan(*made) if made else None
        cached = 0 if kept_k is None else kept_k.shape[2]
        key, value = local(kept_k, k_before, k), local(kept_v, v_before, v)
        logits, values = _exact(_wide(q), key, value, chunk, window, cached, 0 if k_before is None else lag, made, scale)
        # At least one pair, for places that stand for none.
        f = features(key[:, :, : max(cached + (n - skip) * chunk, 1)], w_k, feature_map)
        hidden, norm = _states(f, value, chunk, n, skip, made)
        if kept_hidden is not None:
            hidden, norm = hidden + kept_hidden[:, :, None], norm + kept_norm[:, :, None]
        out = _read(logits, values, features(q, w_q, feature_map), hidden, norm, gate, mixing, through_max)
        last = key.new_zeros(*key.shape[:2], 0, dtype=torch.long) if made is None else made.last
        return out, take(key, last), take(value, last), hidden[:, :, -1], norm[:, :, -1]

    outs, before, memory = [], (None, None), (None,) * 4
    with torch.autocast(q.device.type, enabled=False):
        # Pieces by one split each, whose gradient is one concatenation: slices would each fill a whole tensor with zeros.
        for q_now, *now in zip(*(x.split(size, 2) for x in (q, k, v))):
            n = q_now.shape[2] // chunk
            skip = min(lag, n) if memory[0] is None else 0
            made = vars(choose(*before, *now, memory, n, skip)).values() if sparse else ()
            arguments = (q_now, *before, *now, *memory, w_q, w_k, gate, n, skip, *made)
            if recorded:
                out, *memory = checkpoint(compute, *arguments, use_reentrant=False, preserve_rng_state=False)
            else:
                out, *memory = compute(*arguments)
            outs.append(out)
            before = now
        return torch.cat(outs, 2)[:, :, :tokens].transpose(1, 2)


def _check(q, k, v, config, feature_map, w_q, w_k, gate) -> str:
    """Raises for what `attention` cannot do; returns the mixing."""
    if not isinstance(config, lola.Config):
        raise TypeError(f"config must be a lola.Config, got {type(config).__name__}")
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor) or not x.is_floating_point():
            raise TypeError(f"{name} must be a tensor of floats, got {x.dtype if isinstance(x, Tensor) else type(x).__name__}")
        if x.ndim != 4 or not x.shape[1]:
            raise ValueError(f"{name} must be (B, T, H, D) with at least one token, got {tuple(x.shape)}")
    if k.shape[:2] != q.shape[:2] or v.shape[:3] != k.shape[:3] or k.shape[3] != q.shape[3] or q.shape[2] % k.shape[2]:
        shapes = ", ".join(str(tuple(x.shape)) for x in (q, k, v))
        raise ValueError(f"q, k and v must be (B, T, Hq, D), (B, T, Hkv, D) and (B, T, Hkv, Dv) with Hq a multiple of Hkv, got {shapes}")
    check_config(config)
    if feature_map not in FEATURE_MAPS:
        raise ValueError(f"feature_map must be one of {', '.join(map(repr, FEATURE_MAPS))}, got {feature_map!r}")
    for name, w in (("w_q", w_q), ("w_k", w_k)):
        if w is None and feature_map.startswith("hedgehog"):
            raise ValueError(f"{name} must be given with feature_map {feature_map!r}")
        if w is not None and (w.ndim != 3 or w.shape[:2] != (q.shape[2], q.shape[3])):
            raise ValueError(f"{name} must be ({q.shape[2]}, {q.shape[3]}, ...), got {tuple(w.shape)}")
    mixing = config.mixing or ("paper" if gate is None else "gated")
    if gate is None and mixing in ("gated", "lolcats"):
        raise ValueError(f"gate must be given with mixing {mixing!r}")
    if gate is not None and gate.shape != (q.shape[2],):
        raise ValueError(f"gate must be ({q.shape[2]},), got {tuple(gate.shape)}")
    return mixing


def check_config(config: lola.Config) -> None:
    """Raises ValueError for a configuration that the kernels run and this module does not."""
    if config.score not in SCORES and config.sparse:
        raise ValueError(f"config.score must be one of {', '.join(map(repr, SCORES))} to train with, got {config.score!r}")
