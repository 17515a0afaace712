"""What is measured: geometries, random data, the work that an ideal implementation does, and the check before each speed.

Work is counted from the contract alone (which pair is seen by which query, what is ranked, what is folded), not from any
implementation, so that a figure in GFLOP/s or GB/s means useful work.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np

import lola
from lola import reference

try:
    import ml_dtypes
except ImportError:
    ml_dtypes = None


class CheckFailed(Exception):
    """What was to be timed computes something else than `lola.reference`."""


# ------------------------------------------------------------------------------------------------------ geometry, data


@dataclass(frozen=True)
class Geometry:
    """One attention layer and its memories."""

    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    feature_dim: int = 128
    window: int = 64
    chunk: int = 64
    sparse: int = 256
    sparse_per: str = "kv_head"
    score: str = "self_recall"
    mixing: str = "gated"
    dtype: str = "float32"

    def but(self, **changes) -> Geometry:
        return dataclasses.replace(self, **changes)

    @property
    def config(self) -> lola.Config:
        names = ("window", "chunk", "sparse", "sparse_per", "score", "mixing")
        return lola.Config(**{name: getattr(self, name) for name in names})

    @property
    def sets(self) -> int:
        return self.kv_heads if self.sparse_per == "kv_head" else self.heads

    @property
    def itemsize(self) -> int:
        return 4 if self.dtype == "float32" else 2

    def __str__(self) -> str:
        return (
            f"{self.heads}/{self.kv_heads} heads, D {self.head_dim}, F {self.feature_dim}, W {self.window}, "
            f"lambda {self.sparse}, {self.sparse_per}, {self.dtype}"
        )


def has_dtype(dtype: str) -> bool:
    """Whether NumPy arrays of the dtype can be had here; bfloat16 takes the package ml_dtypes."""
    return dtype == "float32" or ml_dtypes is not None


def stored(x: np.ndarray, dtype: str) -> np.ndarray:
    """x in the dtype of a case."""
    return x if dtype == "float32" else x.astype(ml_dtypes.bfloat16)


@dataclass
class Layer:
    """Random weights of a layer: a Hedgehog feature map and the gates."""

    geometry: Geometry
    w_q: np.ndarray
    w_k: np.ndarray
    gate: np.ndarray
    device: str = "cpu"

    def __post_init__(self):
        self.map = lola.Hedgehog(self.w_q, self.w_k)

    def new_cache(self, batch: int = 1) -> lola.Cache:
        g = self.geometry
        return lola.Cache(
            g.config, batch=batch, heads=g.heads, kv_heads=g.kv_heads, head_dim=g.head_dim, feature_dim=g.feature_dim,
            dtype=g.dtype, device=self.device,
        )  # fmt: skip

    def attention(self, q, k, v, **more):
        return lola.attention(q, k, v, feature_map=self.map, gate=self.gate, **more)

    def features(self, x, side: str, heads: list[int]) -> np.ndarray:
        """phi(x) of some query heads, x (1, T, heads of x, D) NumPy, by the kernels of the layer's device."""
        part = lola.Hedgehog(self.w_q[heads], self.w_k[heads])
        where = {} if self.device == "cpu" else {"device": self.device}
        return np.asarray(lola.kernels.features(np.ascontiguousarray(x), part, side, len(heads), **where))


def new_layer(geometry: Geometry, seed: int = 0, device: str = "cpu") -> Layer:
    rng = np.random.default_rng((seed, 1))
    g = geometry
    shape = (g.heads, g.head_dim, g.feature_dim // 2)
    w_q, w_k = (rng.standard_normal(shape, np.float32) / np.float32(g.head_dim**0.5) for _ in range(2))
    return Layer(g, w_q, w_k, rng.uniform(0.1, 0.9, g.heads).astype(np.float32), device)


@dataclass
class Tokens:
    """Random queries, keys and values of one row, (1, T, heads, D): as drawn (float32) and as stored."""

    drawn: tuple[np.ndarray, np.ndarray, np.ndarray]
    stored: tuple[np.ndarray, np.ndarray, np.ndarray]
    scores: np.ndarray | None = None    # (1, T, Hq), where the caller scores

    @property
    def count(self) -> int:
        return self.drawn[0].shape[1]

    def first(self, n: int) -> Tokens:
        return self.part(0, n)

    def part(self, lo: int, hi: int) -> Tokens:
        def cut(arrays):
            return tuple(x[:, lo:hi] for x in arrays)

        return Tokens(cut(self.drawn), cut(self.stored), None if self.scores is None else self.scores[:, lo:hi])

    def scored(self, seed: int = 0) -> Tokens:
        """The same with random scores from the caller, for score "external"."""
        rng = np.random.default_rng((seed, 3))
        shape = self.drawn[0].shape[:3]
        return dataclasses.replace(self, scores=rng.random(shape, np.float32))


def new_tokens(geometry: Geometry, count: int, seed: int = 0) -> Tokens:
    rng = np.random.default_rng((seed, 2))
    g = geometry
    drawn = tuple(rng.standard_normal((1, count, h, g.head_dim), np.float32) for h in (g.heads, g.kv_heads, g.kv_heads))
    return Tokens(drawn, tuple(stored(x, g.dtype) for x in drawn))


def joined(parts: list[Tokens]) -> Tokens:
    def join(name):
        return tuple(np.concatenate(arrays, 1) for arrays in zip(*(getattr(part, name) for part in parts)))

    return Tokens(join("drawn"), join("stored"))


# ---------------------------------------------------------------------------------------------------------- useful work


@dataclass(frozen=True)
class Work:
    """FLOP of a prefill from an empty cache, all query heads together, a multiply-add counted as 2."""

    attend: float      # q k, p v and phi(q) H of every query: what attention itself takes
    features: float    # projections: of queries that read a state, of pairs that are scored or folded
    score: float       # phi(k) H of every pair in every ranking
    fold: float

    @property
    def total(self) -> float:
        return self.attend + self.features + self.score + self.fold


def prefill_work(geometry: Geometry, tokens: int) -> Work:
    """The useful FLOP of `tokens` tokens (CONTRACT, section 2: who sees what).

    With scores from the caller nothing is scored against the state, and only pairs that are folded take features.
    """
    g = geometry
    D, F, C, W, L = g.head_dim, g.feature_dim, g.chunk, g.window, g.sparse
    ranks = g.score == "self_recall"
    attend = features = score = fold = 0.0
    cached = folded = 0
    for first in range(0, tokens, C):
        if first - W - C >= 0:
            if cached + C > L:
                dropped = cached + C - L
                if ranks and L:
                    score += 2 * F * (D + 1) * (cached + C)
                    # Each pair is projected once, when it is first ranked; those cached before the first ranking as well.
                    features += D * F * (C if folded else cached + C)
                else:
                    features += D * F * dropped
                fold += 2 * F * D * dropped + F * dropped
                folded += dropped
                cached = L
            else:
                cached += C
        n = min(C, tokens - first)
        pairs = n * (min(first, W) + cached) + n * (n + 1) / 2
        attend += 4 * D * pairs
        if folded:
            attend += 2 * F * (D + 1) * n
            features += D * F * n
    return Work(*(g.heads * x for x in (attend, features, score, fold)))


def decode_bytes(geometry: Geometry, position: int) -> float:
    """Bytes that a step at `position` must read for one row and layer: window, sparse cache, state, and phi's weights."""
    g = geometry
    first = position // g.chunk * g.chunk
    window = position + 1 - max(0, first - g.window)
    cached = min(g.sparse, max(0, first - g.window)) * g.sets
    pairs = 2 * g.head_dim * g.itemsize * (window * g.kv_heads + cached)
    state = 4 * g.heads * g.feature_dim * (g.head_dim + 1)
    weights = 4 * g.heads * g.head_dim * (g.feature_dim // 2)
    return float(pairs + state + weights)


def softmax_flop(heads: int, head_dim: int, tokens: int) -> float:
    """Causal softmax attention over the whole prefix."""
    return 4.0 * head_dim * heads * tokens * (tokens + 1) / 2


# ------------------------------------------------------------------------------------------------------------ the check
#
# Heads are independent (groups of them with "kv_head"), so the oracle runs the query heads of some KV heads only, but what
# it is compared with is the very output of the call that is then timed, at full size.


@dataclass(frozen=True)
class Check:
    """One comparison that came before a speed; `error` is in units of the reference's RMS."""

    what: str
    error: float
    bound: float

    @property
    def passed(self) -> bool:
        return self.error <= self.bound


def _rms(x) -> float:
    return float(np.sqrt(np.square(x).mean()))


def error(got, exact) -> float:
    """max |difference| in units of the reference's RMS; infinite where something is not finite."""
    got = np.asarray(got).astype(np.float64)
    return float(np.abs(got - exact).max() / _rms(exact)) if np.isfinite(got).all() else np.inf


def _bound(geometry: Geometry, q, k, exact, unrounded) -> float:
    """The contract's: e in float32; in 16 bits twice the error of rounding the oracle's inputs and output."""
    if geometry.dtype == "float32":
        r = q.shape[2] // k.shape[2]
        a = max(
            float((np.abs(q[0, :, h].astype(np.float64)) @ np.abs(k[0, :, h // r].astype(np.float64)).T).max())
            for h in range(q.shape[2])
        )
        return 2e-5 * max(1.0, a * geometry.head_dim**-0.5 / 16)
    rounded = stored(exact.astype(np.float32), geometry.dtype).astype(np.float64)
    return 2 * max(np.abs(rounded - unrounded).max(), np.abs(rounded - exact).max()) / _rms(exact)


def some_heads(geometry: Geometry) -> tuple[list[int], list[int]]:
    """The first and the last KV head and their query heads."""
    kv = sorted({0, geometry.kv_heads - 1})
    r = geometry.heads // geometry.kv_heads
    return [h * r + i for h in kv for i in range(r)], kv


def prefix_length(geometry: Geometry, tokens: int) -> int:
    """So many first tokens that the window and the sparse cache fill and several rankings follow."""
    g = geometry
    return min(tokens, g.window + g.sparse + 5 * g.chunk + g.chunk // 2 + 1)


def _oracle(layer: Layer, tokens: Tokens, history, sub, unrounded=False, trace=None):
    """`reference.attention` on some heads along a history of rankings."""
    q_heads, kv_heads = sub
    g = layer.geometry
    # Features near a rounding boundary of bfloat16 may fall to either side, so in 16 bits the oracle is given the kernels'
    # (which `check_features` judges).
    q, k, v = (x[:, :, heads] for x, heads in zip(tokens.drawn if unrounded else tokens.stored, (q_heads, kv_heads, kv_heads)))
    fmap = SimpleNamespace(name="hedgehog", w_q=layer.w_q[q_heads], w_k=layer.w_k[q_heads])
    cache = reference.Cache(
        g.config,
        heads=len(q_heads),
        kv_heads=len(kv_heads),
        head_dim=g.head_dim,
        value_dim=g.head_dim,
        feature_dim=g.feature_dim,
        dtype=g.dtype,
    )
    own = {"feature_map": fmap}
    if g.dtype != "float32" and not unrounded:
        own = {f"{side}_features": layer.features(x, side, q_heads) for side, x in (("q", q), ("k", k))}
    if tokens.scores is not None:
        own["scores"] = tokens.scores[:, :, q_heads]
    return reference.attention(q, k, v, cache=cache, gate=layer.gate[q_heads], history=history, trace=trace, **own)


def follow_prefix(layer: Layer, tokens: Tokens, what: str = "prefix") -> tuple[Callable, list[Check]]:
    """The first tokens of a call from an empty cache: a function that checks its outputs, and checks of the rankings behind
    them, judged in float64 on the kernels' own history.

    A ranking is right where the lowest score kept is at most 1e-5 (in units of the score or of the value's square) below the
    highest dropped.
    """
    g = layer.geometry
    n = prefix_length(g, tokens.count)
    start = tokens.first(n)
    cache, held = layer.new_cache(), []
    for lo in range(0, n, g.chunk):
        part = start.part(lo, lo + g.chunk)
        layer.attention(*part.stored, cache=cache, scores=part.scores)
        held.append([cache.sparse_positions(0, s * g.heads // g.sets) for s in range(g.sets)])
    sub = some_heads(g)
    sets = sub[1] if g.sparse_per == "kv_head" else sub[0]
    trace: list = []

    def history(row, i, chunk, positions):
        return held[chunk][sets[i]]

    exact = _oracle(layer, start, history, sub, trace=trace)
    unrounded = exact if g.dtype == "float32" else _oracle(layer, start, history, sub, unrounded=True)
    q, k, _ = start.stored
    bound = _bound(g, q[:, :, sub[0]], k[:, :, sub[1]], exact, unrounded)
    checks = []
    if trace:
        wrong = max(0.0, -min(reference.margin(ranking) for ranking in trace))
        checks.append(Check(f"{what}, {len(trace)} rankings in float64", wrong, 1e-5))

    def check(out, what=what):
        m = min(n, out.shape[1])
        return Check(f"{what}, first {m} tokens", error(out[:, :m, sub[0]], exact[:, :m]), bound)

    return check, checks


def check_prefix(layer: Layer, tokens: Tokens, out, what: str = "prefix") -> list[Check]:
    """The first outputs of a call from an empty cache, and the rankings behind them, against the oracle."""
    check, checks = follow_prefix(layer, tokens, what)
    return [check(out), *checks]


def check_end(layer: Layer, tokens: Tokens, cache: lola.Cache, out, what: str = "end") -> list[Check]:
    """The outputs of the last tokens (no more than their chunk) of any length, in closed form.

    A query sees its window and the sparse cache, whose positions the cache tells; all other positions are in the state, which
    is summed afresh in float64. This is invariant 4 of the contract together with its section 4.
    """
    g = layer.geometry
    (q_heads, kv_heads), T = some_heads(g), tokens.count
    r, n = g.heads // g.kv_heads, out.shape[1]
    window = np.arange(max(0, (T - 1) // g.chunk * g.chunk - g.window), T)
    assert (T - n) // g.chunk == (T - 1) // g.chunk and (cache.window_positions(0) == window).all()

    def closed(arrays, own_features):
        q, k, v = arrays
        outs = []
        for h in q_heads:
            fmap = SimpleNamespace(name="hedgehog", w_q=layer.w_q[h : h + 1], w_k=layer.w_k[h : h + 1])
            kv = h // r
            phi = []
            for side, x in (("q", q[:, T - n :, h : h + 1]), ("k", k[:, :, kv : kv + 1])):
                if own_features:
                    phi.append(layer.features(x, side, [h])[0].astype(float))
                else:
                    phi.append(reference.features(x[0], fmap, side, 1, sixteen_bit=g.dtype != "float32"))
            fq, fk = phi
            exact = np.concatenate([cache.sparse_positions(0, h), window])
            rest = np.ones(T, bool)
            rest[exact] = False
            values = v[0, :, kv].astype(np.float64)
            H, s = fk[rest, 0].T @ values[rest], fk[rest, 0].sum(axis=0)
            outs.append(
                reference.attend(
                    q[0, T - n :, h : h + 1], k[0, exact, kv : kv + 1], values[exact][:, None], fq, H[None], s[None],
                    gate=layer.gate[h : h + 1], mixing=g.mixing, causal=True,
                )
            )
        return np.concatenate(outs, axis=1)[None]

    exact = closed(tokens.stored, g.dtype != "float32")
    unrounded = exact if g.dtype == "float32" else closed(tokens.drawn, False)
    q, k, _ = tokens.stored
    folded = int(cache.folded[0, 0])
    bound = _bound(g, q[:, T - n :, q_heads], k[:, :, kv_heads], exact, unrounded)
    return [Check(f"{what}, last {n} of {T} tokens, {folded} pairs in the state", error(out[:, :, q_heads], exact), bound)]


def check_features(layer: Layer, tokens: Tokens) -> list[Check]:
    """The features, to float32's or bfloat16's rounding, of a few tokens."""
    g = layer.geometry
    fmap = SimpleNamespace(name="hedgehog", w_q=layer.w_q, w_k=layer.w_k)
    worst = 0.0
    for side, x in zip("qk", tokens.first(16).stored):
        exact = reference.features(x, fmap, side, g.heads, sixteen_bit=False)
        got = layer.features(x, side, list(range(g.heads))).astype(np.float64)
        worst = max(worst, float((np.abs(got - exact) / exact).max()))
    return [Check("features, relative", worst, 1e-5 if g.dtype == "float32" else 2.0**-8 + 1e-5)]


def check_plain(layer: Layer, tokens: Tokens, out, held) -> list[Check]:
    """`PlainLola`'s first outputs along its own rankings (which are judged as the kernels' are)."""
    g = layer.geometry
    n = out.shape[1]
    sub = some_heads(g)
    sets = sub[1] if g.sparse_per == "kv_head" else sub[0]
    trace: list = []

    def history(row, i, chunk, positions):
        return held[chunk][0, sets[i]].cpu().numpy()

    start = tokens.first(n)
    exact = _oracle(layer, start, history, sub, trace=trace)
    q, k, _ = start.stored
    wrong = max(0.0, -min(reference.margin(ranking) for ranking in trace))
    return [
        Check(f"plain PyTorch, first {n} tokens", error(out[:, :, sub[0]], exact), _bound(g, q, k, exact, exact)),
        Check(f"plain PyTorch, {len(trace)} rankings in float64", wrong, 1e-5),
    ]


def check_softmax(geometry: Geometry, tokens: Tokens, out, what: str) -> list[Check]:
    """A peer's causal softmax attention, at some queries, the last among them.

    `out` (1, n, Hq, D) belongs to the last n tokens. In 16 bits a peer may round its weights too, which no bound of the
    contract is for, so it has four times the bound.
    """
    (q_heads, kv_heads), T, n = some_heads(geometry), tokens.count, out.shape[1]
    r = geometry.heads // geometry.kv_heads
    at = np.unique(np.linspace(0, n - 1, 9).astype(int))
    factor = 1 if geometry.dtype == "float32" else 4

    def exact(arrays):
        q, k, v = arrays
        outs = np.empty((1, len(at), len(q_heads), geometry.head_dim))
        for i, t in enumerate(at + T - n):
            for j, h in enumerate(q_heads):
                outs[0, i, j] = reference.attend(
                    q[0, t : t + 1, h : h + 1], k[0, : t + 1, h // r : h // r + 1], v[0, : t + 1, h // r : h // r + 1]
                )[0, 0]
        return outs

    right = exact(tokens.stored)
    unrounded = right if geometry.dtype == "float32" else exact(tokens.drawn)
    bound = factor * _bound(geometry, tokens.stored[0][:, at + T - n][:, :, q_heads], tokens.stored[1][:, :, kv_heads], right, unrounded)
    return [Check(f"{what}, {len(at)} of {n} queries over {T} tokens", error(np.asarray(out)[:, at][:, :, q_heads], right), bound)]


def require(checks: list[Check]) -> list[Check]:
    """The checks, or CheckFailed where one did not pass."""
    for check in checks:
        if not check.passed:
            raise CheckFailed(f"{check.what}: error {check.error:.2e} above the bound {check.bound:.2e}")
    return checks
