"""LoLA attention in float64 NumPy: the oracle that every backend is tested against.

It says the method plainly, one step per function, and shares no code with the fast backends:

    features   phi(x) of the four feature maps
    score      the self-recall error of pairs against a state
    select     the highest scores, a tie keeps the earlier pair
    fold       add pairs to a state
    attend     one softmax over exact pairs and the state
    attention  the time line: which pairs are exact, cached or folded at each position

Source of the method: LoLA, arXiv 2505.23666 (Eq. 10, 12-14), on LoLCATs, arXiv 2410.10254, with the
feature map of Hedgehog, arXiv 2402.04347.  Symbols:

    B T       batch rows, tokens             W C     window, chunk (W a multiple of C)
    Hq Hkv    query heads, KV heads          lambda  `sparse`, the size of a sparse cache
    D Dv F    key, value, feature size       S       pairs of a set
    Hs        sets of pairs per row: Hkv or Hq; query head h reads set h // (Hq / Hs)

The steps take any leading batch axes and compute in float64 whatever they are given; float16 and bfloat16
inputs count at their stored value.  With a 16-bit cache, features are rounded to bfloat16 after the clamp.
Results are float64.  `config` and `feature_map` are read by their attributes, so a namespace will do:

>>> from types import SimpleNamespace
>>> rng = np.random.default_rng(0)
>>> q = rng.normal(size=(1, 100, 4, 8))
>>> k, v = rng.normal(size=(2, 1, 100, 2, 8))
>>> config = SimpleNamespace(window=16, chunk=8, sparse=5)
>>> elu = SimpleNamespace(name="elu_plus_one")
>>> cache = Cache(config, batch=1, heads=4, kv_heads=2, head_dim=8, value_dim=8, feature_dim=8)
>>> out = attention(q, k, v, cache=cache, feature_map=elu)
>>> out.shape, cache.tokens_seen.tolist(), cache.window_positions(0)[[0, -1]].tolist()
((1, 100, 4, 8), [100], [80, 99])
>>> len(cache.sparse_positions(0, head=3)), cache.folded[0].tolist()      # 80 pairs left the window
(5, [75, 75, 75, 75])

Backends rank in float32 and may order a near-tie differently.  `attention(..., history=f)` therefore follows
rankings taken elsewhere, `trace=[]` records every ranking with its float64 scores on that history, and
`margin` says by how much a recorded ranking is right or wrong.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

__all__ = ["Cache", "Ranking", "attend", "attention", "features", "fold", "margin", "random_score",
           "round_to_bfloat16", "score", "select", "self_recall_error"]

_DEFAULTS = dict(window=64, chunk=64, sparse=256, mixing=None, score="self_recall", sparse_per="query_head",
                 scale=None, seed=0)
_MIXINGS = ("paper", "gated", "lolcats", "cache_only")
_SCORES = ("self_recall", "value_norm", "key_norm", "recency", "random", "attention", "external")


# ---------------------------------------------------------------------------------------------- the five steps

def features(x, feature_map, side, heads, sixteen_bit=None):
    """phi(x) >= 0 for each query head: x (..., T, Hx, D) -> (..., T, Hq, F) float64.

    `side` is "q" or "k" and picks the map's weights; head h reads x's head h // (Hq / Hx).

        hedgehog        [softmax(xW), softmax(-xW)], at least 1e-12       W (Hq, D, F/2)
        hedgehog_exp    [exp(xW - max), exp(-xW + min)], at least 1e-12   W (Hq, D, F/2)
        elu_plus_one    x + 1 where x > 0, else exp(x)                    F = D
        relu            max(xW, 1e-12)                                    W (Hq, D, F), or none: F = D

    With `sixteen_bit` (default: whether x is) the result is rounded to bfloat16.

    >>> from types import SimpleNamespace
    >>> elu = SimpleNamespace(name="elu_plus_one")
    >>> features(np.array([[[-1.0, 0.0, 2.0]]]), elu, "q", heads=1).round(3).tolist()
    [[[0.368, 1.0, 3.0]]]
    """
    if sixteen_bit is None:
        sixteen_bit = np.asarray(x).dtype.itemsize == 2
    x = _for_each_head(_float64(x), heads)
    name = feature_map.name
    w = {"q": getattr(feature_map, "w_q", None), "k": getattr(feature_map, "w_k", None)}[side]
    if w is not None:
        x = np.einsum("...hd,hdf->...hf", x, _float64(w))
    if name == "hedgehog":
        phi = np.maximum(np.concatenate([_softmax(x), _softmax(-x)], axis=-1), 1e-12)
    elif name == "hedgehog_exp":
        low, high = x.min(axis=-1, keepdims=True), x.max(axis=-1, keepdims=True)
        phi = np.maximum(np.concatenate([np.exp(x - high), np.exp(low - x)], axis=-1), 1e-12)
    elif name == "elu_plus_one":
        phi = np.where(x > 0, x + 1, np.exp(np.minimum(x, 0)))
    elif name == "relu":
        phi = np.maximum(x, 1e-12)
    else:
        raise ValueError(f"feature_map.name must be a known map, not {name!r}")
    return round_to_bfloat16(phi) if sixteen_bit else phi


def score(fk, v, H, s):
    """The self-recall error (Eq. 10): how badly the state (H, s) returns a pair's own value.

        SRE(k, v | H, s) = || phi(k)^T H / (phi(k)^T s) - v ||^2,   ||v||^2 where phi(k)^T s = 0

    fk (..., S, Hq, F), v (..., S, Hs, Dv), H (..., Hq, F, Dv), s (..., Hq, F) -> (..., S, Hq).

    >>> one = np.ones((1, 1, 1))
    >>> score(one, 3 * one, 5 * one, np.ones((1, 1))).item(), score(one, 3 * one, 0 * one, np.zeros((1, 1))).item()
    (4.0, 9.0)
    """
    fk, H, s = _float64(fk), _float64(H), _float64(s)
    v = _for_each_head(_float64(v), fk.shape[-2])
    recalled = np.einsum("...shf,...hfe->...she", fk, H)
    weight = np.einsum("...shf,...hf->...sh", fk, s)[..., None]
    recalled = np.where(weight > 0, recalled / np.where(weight > 0, weight, 1), 0)
    return np.square(recalled - v).sum(axis=-1)


self_recall_error = score


def select(scores, keep, count=None):
    """The `keep` highest of each set's scores (Eq. 12); a tie keeps the earlier pair; +0 and -0 are equal.

    scores (..., S, Hs); count (..., Hs): only that many leading pairs are valid (default: all).
    Returns int64 indices in ascending order, (kept, dropped) of shapes (..., Hs, min(keep, S)) and
    (..., Hs, S - min(keep, S)), padded at the end with -1 where fewer are valid.

    >>> kept, dropped = select(np.array([[1.0], [7.0], [7.0], [7.0]]), keep=2)
    >>> kept.tolist(), dropped.tolist()
    ([[1, 2]], [[0, 3]])
    """
    scores = np.moveaxis(np.asarray(scores), -2, -1)                  # (..., Hs, S)
    size = scores.shape[-1]
    keep = min(keep, size)
    count = np.full(scores.shape[:-1], size) if count is None else np.asarray(count)
    kept = np.full(scores.shape[:-1] + (keep,), -1, np.int64)
    dropped = np.full(scores.shape[:-1] + (size - keep,), -1, np.int64)
    for at in np.ndindex(scores.shape[:-1]):
        valid = scores[at][:count[at]]
        order = np.argsort(-valid, kind="stable")                     # stable: ties in order of position
        high, low = np.sort(order[:keep]), np.sort(order[keep:])
        kept[at][:len(high)], dropped[at][:len(low)] = high, low
    return kept, dropped


def fold(fk, v, H, s, count=None):
    """Add pairs to the state, in place (Eq. 13): H += sum_i phi(k_i) v_i^T, s += sum_i phi(k_i).

    fk (..., S, Hq, F), v (..., S, Hs, Dv), H (..., Hq, F, Dv), s (..., Hq, F); count (..., Hs) as in `select`.
    """
    fk, v = _float64(fk), _float64(v)
    heads = fk.shape[-2]
    if count is not None:
        valid = _valid(count, v.shape[-3])[..., None]
        fk, v = np.where(_for_each_head(valid, heads), fk, 0), np.where(valid, v, 0)
    H += np.einsum("...shf,...she->...hfe", fk, _for_each_head(v, heads))
    s += fk.sum(axis=-3)


def attend(q, k, v, fq=None, H=None, s=None, gate=None, mixing="paper", scale=None, causal=False, count=None,
           return_weights=False):
    """Queries over exact pairs and a state, in one normalisation (Eq. 14 and its variants, see `_shares`).

    q (..., T, Hq, D), k (..., S, Hs, D), v (..., S, Hs, Dv) -> (..., T, Hq, Dv).  The state is
    fq (..., T, Hq, F), H (..., Hq, F, Dv), s (..., Hq, F), or absent.  `causal` is bottom-right: query i sees pairs
    <= S - T + i.  `count` (..., Hs) as in `select`.  A query that sees nothing gets zeros.
    `return_weights` adds each pair's share of the output, (..., T, Hq, S).

    >>> q = k = np.zeros((2, 1, 4))
    >>> attend(q, k, np.array([[[1.0]], [[3.0]]]), causal=True).ravel().tolist()
    [1.0, 2.0]
    """
    q, k, v = _float64(q), _float64(k), _float64(v)
    (T, heads, D), S = q.shape[-3:], k.shape[-3]
    scale = D ** -0.5 if scale is None else scale
    visible = np.ones((T, 1, S), bool)
    if causal:
        visible &= np.arange(S) <= S - T + np.arange(T)[:, None, None]
    if count is not None:
        valid = _valid(count, S)                                      # (..., S, Hs)
        k, v = np.where(valid[..., None], k, 0), np.where(valid[..., None], v, 0)
        valid = _for_each_head(valid[..., None], heads)[..., 0]
        visible = visible & np.moveaxis(valid, -1, -2)[..., None, :, :]
    a = scale * np.einsum("...thd,...shd->...ths", q, _for_each_head(k, heads))
    a = np.where(visible, a, -np.inf)
    z = np.zeros(a.shape[:-1])
    if H is not None:
        fq = _float64(fq)
        z = np.einsum("...thf,...hf->...th", fq, _float64(s))
    pairs, state = _shares(a, z, gate, mixing)
    out = np.einsum("...ths,...she->...the", pairs, _for_each_head(v, heads))
    if H is not None:
        out += state[..., None] * np.einsum("...thf,...hfe->...the", fq, _float64(H))
    return (out, pairs) if return_weights else out


def _shares(a, z, gate, mixing):
    """Normalise logits a (..., T, Hq, S), minus infinity where unseen, with z = phi(q)^T s (..., T, Hq).

    Returns w and c such that out = w v + c N, with N = phi(q)^T H:

        paper       (exp(a) v + N) / (sum exp(a) + z)
        gated       (g exp(a) v + (1-g) N) / (g sum exp(a) + (1-g) z)
        lolcats     (g exp(a - m) v + N) / (g sum exp(a - m) + z),  m = max a
        cache_only  exp(a) v / sum exp(a)

    "paper" and "gated" see the state as one more pair, of value N/z and logit l = log z (+ log((1-g)/g)),
    and take an ordinary softmax, so no logit overflows.
    """
    gate = None if gate is None else _float64(gate)
    top = a.max(axis=-1, initial=-np.inf)
    if mixing == "lolcats":
        e = gate[:, None] * np.exp(a - np.where(np.isfinite(top), top, 0)[..., None])
        total = e.sum(axis=-1) + z
        total = np.where(total > 0, total, 1)
        return e / total[..., None], 1 / total
    if mixing == "cache_only":
        z = np.zeros_like(z)
    z_or_1 = np.where(z > 0, z, 1)
    logit = np.log(z_or_1)
    if mixing == "gated":
        logit = logit + np.log1p(-gate) - np.log(gate)
    logit = np.where(z > 0, logit, -np.inf)
    top = np.maximum(top, logit)
    top = np.where(np.isfinite(top), top, 0)
    e, one_more = np.exp(a - top[..., None]), np.exp(logit - top)
    total = e.sum(axis=-1) + one_more
    total = np.where(total > 0, total, 1)
    return e / total[..., None], one_more / (total * z_or_1)


# ------------------------------------------------------------------------------------------------- the memories

class Pairs(NamedTuple):
    """Pairs held exactly, earliest first.  Each set has its own pairs, hence the axis Hs beside S; what depends on
    the query head as well has Hq instead: entry [i, h] belongs to pair i of head h's set."""

    position: np.ndarray      # (S, Hs) int64
    key: np.ndarray           # (S, Hs, D)
    value: np.ndarray         # (S, Hs, Dv)
    feature: np.ndarray       # (S, Hq, F), phi(key)
    external: np.ndarray      # (S, Hq), the caller's score, else 0
    received: np.ndarray      # (S, Hq), softmax share received so far
    score: np.ndarray         # (S, Hs), at the last ranking, NaN before the first


def _join(*parts):
    return Pairs(*(np.concatenate(field) for field in zip(*parts)))


def _take(pairs, index):
    """The pairs at index (n, Hs) of each set."""
    def pick(x):
        i = np.repeat(index, x.shape[1] // index.shape[1], axis=1)
        return np.take_along_axis(x, i.reshape(i.shape + (1,) * (x.ndim - 2)), axis=0)

    return Pairs(*map(pick, pairs))


@dataclass
class _Row:
    """The memory of one batch row."""

    id: int                   # seeds the "random" score; travels with the row
    sparse: Pairs             # G_n
    window: Pairs
    H: np.ndarray             # (Hq, F, Dv)
    s: np.ndarray             # (Hq, F)
    seen: int = 0             # tokens so far
    chunk: int = -1           # the last chunk begun
    folded: int = 0           # pairs folded by each head


class Cache:
    """What a sequence is remembered by: window, sparse cache and hidden state of each row (section 2 of the contract).

    >>> from types import SimpleNamespace
    >>> cache = Cache(SimpleNamespace(window=2, chunk=1, sparse=1), batch=2, heads=2, kv_heads=1, head_dim=1,
    ...               value_dim=1, feature_dim=1)
    >>> ones, elu = np.ones((2, 4, 1, 1)), SimpleNamespace(name="elu_plus_one")
    >>> _ = attention(np.ones((2, 4, 2, 1)), ones, ones, cache=cache, feature_map=elu, stops=[4, 0])
    >>> cache.tokens_seen.tolist(), cache.window_positions(0).tolist(), cache.sparse_positions(0, 0).tolist()
    ([4, 0], [1, 2, 3], [0])
    """

    def __init__(self, config, batch=1, *, heads, kv_heads, head_dim, value_dim, feature_dim, dtype="float32"):
        self.config = config
        self.heads, self.kv_heads = heads, kv_heads
        self.head_dim, self.value_dim, self.feature_dim = head_dim, value_dim, feature_dim
        self.dtype = dtype
        per = _setting(config, "sparse_per")
        if per not in ("query_head", "kv_head"):
            raise ValueError(f"config.sparse_per must be 'query_head' or 'kv_head', not {per!r}")
        if heads % kv_heads:
            raise ValueError(f"heads must be a multiple of kv_heads, {kv_heads}, not {heads}")
        if _setting(config, "window") % _setting(config, "chunk"):
            raise ValueError("config.window must be a multiple of config.chunk")
        self.sets = heads if per == "query_head" else kv_heads
        self.rows = [self._new_row(b) for b in range(batch)]

    def _new_row(self, b):
        Hq, Hs, F, Dv = self.heads, self.sets, self.feature_dim, self.value_dim
        nothing = Pairs(np.zeros((0, Hs), np.int64), np.zeros((0, Hs, self.head_dim)), np.zeros((0, Hs, Dv)),
                        np.zeros((0, Hq, F)), np.zeros((0, Hq)), np.zeros((0, Hq)), np.zeros((0, Hs)))
        return _Row(b, nothing, nothing, np.zeros((Hq, F, Dv)), np.zeros((Hq, F)))

    @property
    def batch(self):
        return len(self.rows)

    @property
    def tokens_seen(self):
        """(B,) int64."""
        return np.array([row.seen for row in self.rows], np.int64)

    @property
    def hidden(self):
        """H, (B, Hq, F, Dv)."""
        return np.array([row.H for row in self.rows]).reshape(-1, self.heads, self.feature_dim, self.value_dim)

    @property
    def normalizer(self):
        """s, (B, Hq, F)."""
        return np.array([row.s for row in self.rows]).reshape(-1, self.heads, self.feature_dim)

    @property
    def folded(self):
        """How many pairs each row and head has folded, (B, Hq)."""
        return np.array([[row.folded] * self.heads for row in self.rows], np.int64).reshape(-1, self.heads)

    def _set(self, head):
        return head // (self.heads // self.sets)

    def sparse_positions(self, row, head):
        """Positions in the sparse cache that query head `head` reads, ascending."""
        return self.rows[row].sparse.position[:, self._set(head)].copy()

    def sparse_scores(self, row, head):
        """Their scores at the last ranking; NaN if never ranked."""
        return self.rows[row].sparse.score[:, self._set(head)].copy()

    def window_positions(self, row):
        """Positions in the window, ascending."""
        return self.rows[row].window.position[:, 0].copy()

    def copy(self):
        return self.select(range(self.batch))

    def select(self, rows):
        """A new cache of these rows, in this order; a row may be named several times."""
        other = copy.copy(self)
        other.rows = [copy.deepcopy(self.rows[b]) for b in rows]
        return other

    def repeat(self, n):
        """A new cache with each row n times: a, a, b, b, ..."""
        return self.select([b for b in range(self.batch) for _ in range(n)])

    def reset(self, rows=None):
        """Empty these rows (default: all)."""
        for b in range(self.batch) if rows is None else rows:
            self.rows[b] = self._new_row(b)


# ------------------------------------------------------------------------------------------------- the time line

def attention(q, k, v, *, cache=None, config=None, feature_map=None, q_features=None, k_features=None, gate=None,
              scores=None, starts=None, stops=None, cu_seqlens=None, history=None, trace=None):
    """LoLA attention of tokens that continue `cache`: q (B, T, Hq, D), k (B, T, Hkv, D), v (B, T, Hkv, Dv) -> out
    (B, T, Hq, Dv) float64.  Without a cache, `config` starts an empty one that is dropped afterwards.

    Features come from `feature_map` or as q_features, k_features (B, T, Hq, F).  gate (Hq,) in (0, 1);
    scores (B, T, Hq) for score="external".  Of a call's offsets j, starts[b] <= j < stops[b] enter row b.
    cu_seqlens (N+1,) cuts one packed row (1, total, H, D) into sequences; sequence i appends to cache row i.

    `trace`, a list, receives a `Ranking` for each set at each ranking.  `history`, a function
    (row, set, chunk, positions) -> kept positions, replaces the oracle's own choice.
    """
    q, k, v = np.asarray(q), np.asarray(k), np.asarray(v)
    if cache is None:
        cache = Cache(config, len(q) if cu_seqlens is None else len(cu_seqlens) - 1, heads=q.shape[2],
                      kv_heads=k.shape[2], head_dim=q.shape[3], value_dim=v.shape[3],
                      feature_dim=_feature_dim(q, feature_map, q_features), dtype=k.dtype.name)
    config = cache.config
    mixing = _setting(config, "mixing") or ("paper" if gate is None else "gated")
    _check(cache, q, k, v, feature_map, q_features, k_features, gate, scores, mixing)
    out = np.zeros(q.shape[:3] + (cache.value_dim,))
    for b, source, start, stop in _spans(cache, q, starts, stops, cu_seqlens):
        span = source, slice(start, stop)
        fq, fk, external = (None if x is None else np.asarray(x)[span] for x in (q_features, k_features, scores))
        fq = _features_of(cache, q[span], feature_map, fq, "q")
        pairs = _entering(cache, cache.rows[b].seen, k[span], v[span], feature_map, fk, external)
        out[span] = _advance(cache, b, _float64(q[span]), fq, pairs, gate, mixing, history, trace)
    return out


def _advance(cache, b, q, fq, pairs, gate, mixing, history, trace):
    """Run row b over its entering tokens, chunk by chunk: q (n, Hq, D), fq (n, Hq, F), pairs of n -> (n, Hq, Dv).

    Chunk n holds positions nC .. (n+1)C - 1.  Its queries see the window from max(0, nC - W) to themselves, the
    sparse cache G_n and the state of everything else, so one `attend`, causal at its end, serves the whole chunk.
    """
    row, C = cache.rows[b], _setting(cache.config, "chunk")
    out = np.zeros(q.shape[:2] + (cache.value_dim,))
    done = 0
    while done < len(q):
        chunk = row.seen // C
        if chunk > row.chunk:
            _begin_chunk(cache, b, chunk, history, trace)
        n = min(len(q) - done, (chunk + 1) * C - row.seen)
        now = slice(done, done + n)
        row.window = _join(row.window, Pairs(*(field[now] for field in pairs)))
        seen = _join(row.sparse, row.window)
        out[now], weights = attend(q[now], seen.key, seen.value, fq[now], row.H, row.s, gate, mixing,
                                   _setting(cache.config, "scale"), causal=True, return_weights=True)
        seen.received[...] += weights.sum(axis=0).T
        cached = len(row.sparse.position)
        row.sparse.received[...], row.window.received[...] = seen.received[:cached], seen.received[cached:]
        row.seen += n
        done += n
    return out


def _begin_chunk(cache, b, chunk, history, trace):
    """The first token of chunk n arrives: positions nC-W-C .. nC-W-1 leave the window (Eq. 12 and 13).

        E = G_{n-1} + the pairs that leave;  |E| <= lambda: G_n = E, nothing is folded;
        else every pair of E is scored against (H_{n-1}, s_{n-1}), the lambda highest are G_n, the rest is folded.
    """
    row, config = cache.rows[b], cache.config
    C, W, sparse = (_setting(config, name) for name in ("chunk", "window", "sparse"))
    row.chunk = chunk
    if chunk * C - W - C < 0:
        return
    E = _join(row.sparse, Pairs(*(field[:C] for field in row.window)))
    row.window = Pairs(*(field[C:] for field in row.window))
    if len(E.position) <= sparse:
        row.sparse = E
        return
    E = E._replace(score=_ranked_by(cache, row, E))
    kept, dropped = select(E.score, sparse)
    if history is not None:
        kept, dropped = _follow(history, b, chunk, E.position, sparse)
    if trace is not None:
        norms = np.square(E.value).sum(axis=-1)
        trace += [Ranking(b, i, chunk, E.position[:, i], E.score[:, i], norms[:, i], E.position[kept[i], i])
                  for i in range(cache.sets)]
    gone = _take(E, dropped.T)
    fold(gone.feature, gone.value, row.H, row.s)
    row.folded += dropped.shape[1]
    row.sparse = _take(E, kept.T)


def _ranked_by(cache, row, pairs):
    """The configured score of each pair, (S, Hs); a set shared by several query heads sums over them."""
    name = _setting(cache.config, "score")
    for_each = _for_each_head
    if name == "self_recall":
        scores = score(pairs.feature, pairs.value, row.H, row.s)
    elif name == "value_norm":
        scores = for_each(np.square(pairs.value), cache.heads).sum(axis=-1)
    elif name == "key_norm":
        scores = -for_each(np.square(pairs.key), cache.heads).sum(axis=-1)
    elif name == "recency":
        return pairs.position.astype(np.float64)
    elif name == "random":
        position = for_each(pairs.position[..., None], cache.heads)[..., 0]
        scores = random_score(_setting(cache.config, "seed"), row.id, np.arange(cache.heads), position)
        scores = scores.astype(np.float64)
    elif name == "attention":
        scores = pairs.received
    elif name == "external":
        scores = pairs.external
    else:
        raise ValueError(f"config.score must be one of {_SCORES}, not {name!r}")
    return scores.reshape(len(scores), cache.sets, -1).sum(axis=-1)


def random_score(seed, row_id, head, position):
    """The "random" score, float32 in [0, 1): a splitmix64 hash, so that every backend draws the same bits.

    >>> random_score(0, 0, 0, np.arange(3)).tolist()
    [0.12964558601379395, 0.16526895761489868, 0.3105962872505188]
    """
    def mix(x):
        x = x + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))

    with np.errstate(over="ignore"):                                  # 64-bit wrap-around is meant
        h = mix(np.uint64(seed % 2 ** 64))
        for part in (row_id, head, position):
            h = mix(h ^ np.asarray(part).astype(np.uint64))
    return ((h >> np.uint64(40)).astype(np.float64) * 2.0 ** -24).astype(np.float32)


# ---------------------------------------------------------------------------------------- rankings of a backend

class Ranking(NamedTuple):
    """One set's ranking at the start of a chunk, with float64 scores."""

    row: int
    set: int                  # a query head, or a KV head with sparse_per="kv_head"
    chunk: int
    positions: np.ndarray     # (S,), E in ascending order
    scores: np.ndarray        # (S,)
    norms: np.ndarray         # (S,), ||v||^2
    kept: np.ndarray          # (lambda,), ascending positions


def margin(ranking):
    """By how much the ranking is right: the lowest kept score minus the highest dropped one, in units of
    max(|score|, ||v||^2) of the two.  Negative where a dropped pair scores higher; infinite where nothing competes.

    >>> three = np.arange(3)
    >>> margin(Ranking(0, 0, 9, three, np.array([4.0, 1.0, 2.0]), np.ones(3), kept=three[:1]))
    0.5
    >>> margin(Ranking(0, 0, 9, three, np.array([4.0, 1.0, 2.0]), np.ones(3), kept=three[1:2]))
    -0.75
    """
    kept = np.isin(ranking.positions, ranking.kept)
    if kept.all() or not kept.any():
        return np.inf
    low = np.flatnonzero(kept)[np.argmin(ranking.scores[kept])]
    high = np.flatnonzero(~kept)[np.argmax(ranking.scores[~kept])]
    both = [low, high]
    unit = max(np.abs(ranking.scores[both]).max(), ranking.norms[both].max())
    return float((ranking.scores[low] - ranking.scores[high]) / unit) if unit > 0 else 0.0


def _follow(history, b, chunk, positions, sparse):
    """`select`'s answer as told by `history`: (kept, dropped) indices into positions (S, Hs)."""
    kept, dropped = [], []
    for i, candidates in enumerate(positions.T):
        chosen = np.asarray(history(b, i, chunk, candidates.copy()), np.int64).reshape(-1)
        mask = np.isin(candidates, chosen)
        if len(chosen) != sparse or mask.sum() != sparse:
            raise ValueError(f"history of row {b}, set {i}, chunk {chunk} must keep {sparse} of {candidates.tolist()}, "
                             f"not {chosen.tolist()}")
        kept.append(np.flatnonzero(mask))
        dropped.append(np.flatnonzero(~mask))
    return np.array(kept, np.int64), np.array(dropped, np.int64)


# ------------------------------------------------------------------------------------------------- small things

def round_to_bfloat16(x):
    """x rounded to float32, then to the nearest bfloat16 (ties to even), as float64.

    >>> round_to_bfloat16(np.array([1 + 2.0 ** -8, 1 + 3 * 2.0 ** -8, 1e-12])).tolist()
    [1.0, 1.015625, 1.0018652574217413e-12]
    """
    bits = np.asarray(x, np.float32).view(np.uint32)
    bits = (bits + (0x7FFF + ((bits >> 16) & 1))) & 0xFFFF0000
    return bits.astype(np.uint32).view(np.float32).astype(np.float64)


def _float64(x):
    return np.asarray(x).astype(np.float64)


def _softmax(x):
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def _for_each_head(x, heads):
    """x (..., Hs, d) -> (..., Hq, d): head h reads x's head h // (Hq / Hs)."""
    return np.repeat(x, heads // x.shape[-2], axis=-2)


def _valid(count, size):
    """count (..., Hs) -> (..., S, Hs), true for the first count pairs."""
    return np.arange(size)[:, None] < np.asarray(count)[..., None, :]


def _setting(config, name):
    return getattr(config, name, _DEFAULTS[name])


def _feature_dim(q, feature_map, q_features):
    if q_features is not None:
        return np.shape(q_features)[-1]
    w = getattr(feature_map, "w_q", None)
    if w is None:
        return q.shape[-1]
    return np.shape(w)[-1] * (2 if feature_map.name.startswith("hedgehog") else 1)


def _features_of(cache, x, feature_map, given, side):
    sixteen_bit = cache.dtype in ("float16", "bfloat16")
    if given is None:
        return features(x, feature_map, side, cache.heads, sixteen_bit)
    return round_to_bfloat16(_float64(given)) if sixteen_bit else _float64(given)


def _entering(cache, seen, k, v, feature_map, given, external):
    """The tokens that enter a row which has seen `seen`, as pairs of each set."""
    n, Hq, Hs = len(k), cache.heads, cache.sets
    position = np.repeat(np.arange(seen, seen + n)[:, None], Hs, axis=1)
    external = np.zeros((n, Hq)) if external is None else _float64(external)
    return Pairs(position, _for_each_head(_float64(k), Hs), _for_each_head(_float64(v), Hs),
                 _features_of(cache, k, feature_map, given, "k"), external, np.zeros((n, Hq)), np.full((n, Hs), np.nan))


def _spans(cache, q, starts, stops, cu_seqlens):
    """(cache row, row of the arrays, start, stop) of the tokens that enter."""
    if cu_seqlens is not None:
        cu = [int(x) for x in cu_seqlens]
        if starts is not None or stops is not None or len(q) != 1 or len(cu) != cache.batch + 1:
            raise ValueError("cu_seqlens must be (rows of the cache + 1,), for one packed row, without starts or stops")
        return [(i, 0, cu[i], cu[i + 1]) for i in range(cache.batch)]
    if len(q) != cache.batch:
        raise ValueError(f"q must have the cache's {cache.batch} rows, not {len(q)}")
    starts = [0] * len(q) if starts is None else starts
    stops = [q.shape[1]] * len(q) if stops is None else stops
    return [(b, b, int(starts[b]), int(stops[b])) for b in range(len(q))]


def _check(cache, q, k, v, feature_map, q_features, k_features, gate, scores, mixing):
    """The combinations that a backend refuses too; shapes are left to NumPy."""
    if mixing not in _MIXINGS:
        raise ValueError(f"config.mixing must be one of {_MIXINGS}, not {mixing!r}")
    if mixing in ("gated", "lolcats") and gate is None:
        raise ValueError(f"gate must be given for mixing {mixing!r}")
    if (feature_map is None) == (q_features is None) or (q_features is None) != (k_features is None):
        raise ValueError("features must come from feature_map or from q_features and k_features")
    if (_setting(cache.config, "score") == "external") != (scores is not None):
        raise ValueError("scores must be given with score='external', and only then")
    expected = {"q": (q, cache.heads, cache.head_dim), "k": (k, cache.kv_heads, cache.head_dim),
                "v": (v, cache.kv_heads, cache.value_dim)}
    for name, (x, heads, size) in expected.items():
        if x.shape != q.shape[:2] + (heads, size):
            raise ValueError(f"{name} must be {q.shape[:2] + (heads, size)}, not {x.shape}")
