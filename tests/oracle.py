"""Data, runs and the error measure shared by the tests.

A `Case` names sizes and settings, `build` draws its data, `record` runs `lola` chunk by chunk and notes what each
sparse cache held, `replay` follows these rankings through the float64 oracle, and `bound` is section 8 of the
contract: max |difference| in units of the reference's RMS.  This module needs no compiled code to import.

`place` is where lola runs and what arrays it is given: the CPU and NumPy's, unless tests/cuda says otherwise. `run`,
`kernels` and `host` hide it from the tests, which see NumPy arrays on every backend.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import math
import pathlib
import sys
from types import SimpleNamespace
from typing import NamedTuple

import ml_dtypes
import numpy as np


def _reference():
    """lola.reference; by its path where the extension that `import lola` needs is not built."""
    try:
        from lola import reference
        return reference
    except ImportError:
        path = pathlib.Path(__file__).parent.parent / "lola" / "reference.py"
        spec = importlib.util.spec_from_file_location("lola_reference", path)
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        return module


reference = _reference()

DTYPES = {"float32": np.dtype(np.float32), "float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
MIXINGS = ("paper", "gated", "lolcats", "cache_only")
SCORES = ("self_recall", "value_norm", "key_norm", "recency", "random", "external")
MAPS = ("hedgehog", "hedgehog_exp", "elu_plus_one", "relu", "relu_w", "given")
SIDES = ("q", "k", "v", "q_features", "k_features", "scores")       # arrays with axes (B, T, heads, ...)


@dataclasses.dataclass(frozen=True)
class Case:
    B: int = 2
    T: int = 45
    Hq: int = 4
    Hkv: int = 2
    D: int = 8
    Dv: int = 6
    F: int = 12               # of the maps that are free to choose it; even
    window: int = 8
    chunk: int = 4
    sparse: int = 5
    mixing: str | None = "paper"
    score: str = "self_recall"
    sparse_per: str = "query_head"
    scale: float | None = None
    map: str = "hedgehog"
    dtype: str = "float32"
    seed: int = 0
    logit: float | None = None   # the largest |logit|; None: unit normal q and k

    def but(self, **changes):
        return dataclasses.replace(self, **changes)

    @property
    def feature_dim(self):
        return self.D if self.map in ("elu_plus_one", "relu") else self.F

    @property
    def gated(self):
        return self.mixing in ("gated", "lolcats")

    @property
    def sets(self):
        return self.Hq if self.sparse_per == "query_head" else self.Hkv

    @property
    def config(self):
        names = ("window", "chunk", "sparse", "mixing", "score", "sparse_per", "scale", "seed")
        return {name: getattr(self, name) for name in names}

    @property
    def sizes(self):
        return dict(heads=self.Hq, kv_heads=self.Hkv, head_dim=self.D, value_dim=self.Dv,
                    feature_dim=self.feature_dim, dtype=self.dtype)


@dataclasses.dataclass
class Data:
    """`arrays` as drawn (float32) and `stored` in the case's dtype; features and scores stay float32."""

    case: Case
    arrays: dict
    stored: dict
    weights: dict             # w_q, w_k of the feature map
    gate: np.ndarray | None

    @property
    def name(self):
        return "relu" if self.case.map == "relu_w" else self.case.map

    def at(self, rows=slice(None), t=slice(None)):
        """Some rows and tokens."""
        pick = lambda arrays: {name: x[rows][:, t] for name, x in arrays.items()}
        new = dataclasses.replace(self, arrays=pick(self.arrays), stored=pick(self.stored))
        B, T = new.stored["q"].shape[:2]
        new.case = self.case.but(B=B, T=T)
        return new

    def of_heads(self, q_heads, kv_heads):
        """Some heads, in this order."""
        pick = lambda arrays: {n: np.ascontiguousarray(x[:, :, kv_heads if n in ("k", "v") else q_heads])
                               for n, x in arrays.items()}
        case = self.case.but(Hq=len(q_heads), Hkv=len(kv_heads))
        return Data(case, pick(self.arrays), pick(self.stored), {n: w[q_heads] for n, w in self.weights.items()},
                    None if self.gate is None else self.gate[q_heads])


def build(case):
    rng = np.random.default_rng(case.seed + 1)
    normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
    B, T, Hq, Hkv, D, Dv, F = (getattr(case, n) for n in ("B", "T", "Hq", "Hkv", "D", "Dv", "feature_dim"))
    arrays = dict(q=normal(B, T, Hq, D), k=normal(B, T, Hkv, D), v=normal(B, T, Hkv, Dv))
    if case.logit is not None and arrays["q"].size:
        largest = np.abs(np.einsum("bthd,bshd->bhts", arrays["q"], np.repeat(arrays["k"], Hq // Hkv, 2))).max()
        arrays["q"] = arrays["q"] * np.float32(case.logit / (largest * (case.scale or D ** -0.5)))
    weights = {}
    if case.map in ("hedgehog", "hedgehog_exp"):
        weights = {n: normal(Hq, D, F // 2) / np.float32(math.sqrt(D)) for n in ("w_q", "w_k")}
    elif case.map == "relu_w":
        weights = {n: normal(Hq, D, F) / np.float32(math.sqrt(D)) for n in ("w_q", "w_k")}
    elif case.map == "given":
        arrays.update({n: np.exp(normal(B, T, Hq, F)) for n in ("q_features", "k_features")})
    if case.score == "external":
        # Small integers: sums over a group are exact and ties are many.
        arrays["scores"] = rng.integers(-2, 9, size=(B, T, Hq)).astype(np.float32)
    gate = rng.uniform(0.05, 0.95, size=Hq).astype(np.float32) if case.gated else None
    return Data(case, arrays, store(arrays, case.dtype), weights, gate)


def store(arrays, dtype):
    return {n: x.astype(DTYPES[dtype]) if n in ("q", "k", "v") else x for n, x in arrays.items()}


# ------------------------------------------------------------------------------------------------------ running

class Cpu:
    """lola on the CPU, with NumPy arrays."""

    device = "cpu"

    def give(self, x):
        """A NumPy array as lola is to be given it."""
        return x

    def take(self, x):
        """An array of lola's as NumPy array."""
        return np.asarray(x)

    def attention(self, q, k, v, **more):
        import lola
        return lola.attention(q, k, v, **more)

    def step(self, name, *arguments, **more):
        import lola
        return getattr(lola.kernels, name)(*arguments, **more)


CPU = place = Cpu()


def host(x):
    """x as NumPy array, wherever it lies."""
    return x if isinstance(x, np.ndarray) else place.take(x)


class _Kernels:
    """lola.kernels, with NumPy arrays in and out."""

    def __getattr__(self, name):
        return functools.partial(place.step, name)


kernels = _Kernels()


def lola_map(data):
    import lola
    if data.case.map == "given":
        return None
    kind = {"hedgehog": lola.Hedgehog, "hedgehog_exp": lola.HedgehogExp, "elu_plus_one": lola.EluPlusOne,
            "relu": lola.Relu}[data.name]
    return kind(**data.weights)


def oracle_map(data):
    return None if data.case.map == "given" else SimpleNamespace(name=data.name, **data.weights)


def new_cache(data, batch=None):
    import lola
    case = data.case
    return lola.Cache(lola.Config(**case.config), batch=case.B if batch is None else batch, device=place.device,
                      **case.sizes)


def load(path):
    import lola
    return lola.Cache.load(path).to(place.device)


def options(data):
    """The keyword arguments of lola.attention that come from the data."""
    made = {n: data.stored[n] for n in ("q_features", "k_features", "scores") if n in data.stored}
    if data.case.map != "given":
        made["feature_map"] = lola_map(data)
    if data.gate is not None:
        made["gate"] = data.gate
    return made


def run(data, cache, lo=0, hi=None, **more):
    """lola.attention over tokens lo .. hi, where the cache is."""
    part = data.at(t=slice(lo, hi))
    where = CPU if cache.device == "cpu" else place
    give = lambda x: where.give(x) if isinstance(x, np.ndarray) else x
    given = {name: give(x) for name, x in {**{n: part.stored[n] for n in "qkv"}, **options(part)}.items()}
    return where.take(where.attention(**given, cache=cache, **more))


def run_pieces(data, cache, cuts):
    """Outputs of the calls between `cuts`, joined."""
    cuts = sorted({0, data.case.T, *cuts})
    if len(cuts) == 1:
        return run(data, cache)
    return np.concatenate([run(data, cache, lo, hi) for lo, hi in zip(cuts, cuts[1:])], axis=1)


class Record(NamedTuple):
    out: np.ndarray
    cache: object
    held: dict                # (row, set, chunk) -> positions in the sparse cache during that chunk

    def history(self, row, set, chunk, candidates):
        return self.held[row, set, chunk]


def record(data, before=lambda cache, chunk: cache):
    """Run one call per chunk and note each sparse cache; by invariant 1 it is the history of every other cut too.
    `before` each chunk may replace the cache."""
    case, cache, held = data.case, new_cache(data), {}
    outs = [run(data, cache, 0, 0)]
    for n, lo in enumerate(range(0, case.T, case.chunk)):
        cache = before(cache, n)
        outs.append(run(data, cache, lo, lo + case.chunk))
        for b in range(case.B):
            for i in range(case.sets):
                held[b, i, n] = cache.sparse_positions(b, i * case.Hq // case.sets)
    return Record(np.concatenate(outs, axis=1), cache, held)


def oracle(data, history=None, trace=None, unrounded=False, features=None, cache=None, **more):
    """The oracle on the same data: on the stored values, or as they were before rounding.

    `features`, a pair, replaces the oracle's own: a float32 feature may lie at a rounding boundary of bfloat16, so with
    16-bit caches both sides are given the same operands; `test_kernels` judges the features themselves.
    """
    case, arrays = data.case, data.arrays if unrounded else data.stored
    if cache is None:
        cache = oracle_cache(data)
    given = {n: arrays[n] for n in ("q_features", "k_features", "scores") if n in arrays}
    if features is not None:
        given["q_features"], given["k_features"] = features
    elif case.map != "given":
        given["feature_map"] = oracle_map(data)
    return reference.attention(arrays["q"], arrays["k"], arrays["v"], cache=cache, gate=data.gate, history=history,
                               trace=trace, **given, **more)


def oracle_cache(data, batch=None):
    case = data.case
    return reference.Cache(SimpleNamespace(**case.config), batch=case.B if batch is None else batch, **case.sizes)


def lola_features(data):
    """The features as lola computes them, float32."""
    if data.case.map == "given":
        return data.stored["q_features"], data.stored["k_features"]
    m = lola_map(data)
    return tuple(np.asarray(kernels.features(data.stored[x], m, x, data.case.Hq)) for x in "qk")


class Replay(NamedTuple):
    record: Record
    exact: np.ndarray         # the oracle along the same history, float64
    trace: list
    bound: float
    cache: object             # the oracle's


def replay(data, recorded=None, own_features=None):
    """Record lola on the data, then follow its history through the oracle."""
    recorded = recorded or record(data)
    if own_features is None:
        own_features = data.case.dtype == "float32" and data.case.logit is None
    features = None if own_features else lola_features(data)
    trace, cache = [], oracle_cache(data)
    exact = oracle(data, recorded.history, trace, features=features, cache=cache)
    return Replay(recorded, exact, trace, bound(data, exact, recorded.history), cache)


# -------------------------------------------------------------------------------------------- the error measure

def rms(x):
    return float(np.sqrt(np.square(x).mean())) if x.size else 0.0


def error(got, exact):
    """max |difference| in units of the reference's RMS."""
    got = np.asarray(got).astype(np.float64)
    assert got.shape == exact.shape
    assert np.isfinite(got).all()
    largest = float(np.abs(got - exact).max(initial=0))
    return largest / rms(exact) if largest else 0.0


def float32_bound(q, k, scale=None):
    """e = 2e-5 * max(1, A / 16), A = max over (causal) pairs of scale * sum_d |q_d k_d|; q (B, T, Hq, D)."""
    q, k = np.abs(np.asarray(q).astype(np.float64)), np.abs(np.asarray(k).astype(np.float64))
    T, S = q.shape[1], k.shape[1]
    a = np.einsum("bthd,bshd->bhts", q, np.repeat(k, q.shape[2] // k.shape[2], axis=2))
    a = np.tril(a, S - T) * (q.shape[-1] ** -0.5 if scale is None else scale)
    return 2e-5 * max(1.0, a.max(initial=0) / 16)


def rounding_bound(exact, unrounded, dtype):
    """16-bit: twice the error of rounding the oracle's inputs and output.

    `exact` is the oracle on rounded inputs, `unrounded` before rounding.  The output's rounding alone counts as well:
    in a result of few elements it may cancel against the inputs' by chance, and no backend can avoid it.
    """
    rounded = exact.astype(DTYPES[dtype]).astype(np.float64)
    largest = max(np.abs(rounded - x).max(initial=0) for x in (unrounded, exact))
    return 2 * float(largest) / rms(exact) if largest else 0.0


def bound(data, exact, history=None):
    case = data.case
    if case.dtype == "float32":
        return float32_bound(data.stored["q"], data.stored["k"], case.scale)
    return rounding_bound(exact, oracle(data, history, unrounded=True), case.dtype)


def assert_close(got, exact, bound):
    assert error(got, exact) <= bound


# -------------------------------------------------------------------------------------------- looking at caches

def contents(cache, heads):
    """What a cache's properties say, as arrays."""
    rows = range(len(cache.tokens_seen))
    said = {name: np.array(host(getattr(cache, name))) for name in ("tokens_seen", "hidden", "normalizer", "folded")}
    for b in rows:
        said[f"window {b}"] = np.array(cache.window_positions(b))
        for h in range(heads):
            said[f"sparse {b} {h}"] = np.array(cache.sparse_positions(b, h))
            said[f"scores {b} {h}"] = np.array(cache.sparse_scores(b, h))
    return said


def assert_same_memory(a, b, heads):
    """Bit for bit."""
    a, b = contents(a, heads), contents(b, heads)
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)        # NaN equals NaN


def assert_same_bits(a, b):
    a, b = np.ascontiguousarray(a), np.ascontiguousarray(b)
    assert a.shape == b.shape and a.dtype == b.dtype
    assert a.tobytes() == b.tobytes()


def snapshot(cache):
    """Every byte of a cache."""
    parts = cache.buffers()
    parts = parts.items() if hasattr(parts, "items") else enumerate(parts)
    return {name: host(x).tobytes() for name, x in parts}


# ---------------------------------------------------------------------------------------------- closed formulas

def naive(q, k, v, fq, fk, window, chunk, mixing, gate=None, scale=None, cached=lambda b, h, t: ()):
    """Section 4 as it is written, one query at a time and nothing stabilised: the pairs a query sees exactly are its
    window and `cached(b, h, t)`, the state is the sum over all others.  Moderate logits only."""
    q, k, v, fq, fk = (np.asarray(x).astype(np.float64) for x in (q, k, v, fq, fk))
    B, T, Hq, D = q.shape
    k, v = (np.repeat(x, Hq // k.shape[2], axis=2) for x in (k, v))
    scale = D ** -0.5 if scale is None else scale
    out = np.zeros(q.shape[:3] + v.shape[3:])
    for b, t, h in np.ndindex(B, T, Hq):
        exact = set(range(max(0, t // chunk * chunk - window), t + 1)) | set(map(int, cached(b, h, t)))
        rest = [i for i in range(t) if i not in exact]
        exact = sorted(exact)
        a = scale * k[b, exact, h] @ q[b, t, h]
        N = sum((fq[b, t, h] @ fk[b, i, h] * v[b, i, h] for i in rest), np.zeros(v.shape[3]))
        z = sum(fq[b, t, h] @ fk[b, i, h] for i in rest)
        g = 0.5 if gate is None else float(gate[h])
        softmax, linear = {"paper": (np.exp(a), 1), "gated": (g * np.exp(a), 1 - g),
                           "lolcats": (g * np.exp(a - a.max()), 1), "cache_only": (np.exp(a), 0)}[mixing]
        out[b, t, h] = (softmax @ v[b, exact, h] + linear * N) / (softmax.sum() + linear * z)
    return out


def causal_softmax(q, k, v, scale=None):
    q, k, v = (np.asarray(x).astype(np.float64) for x in (q, k, v))
    k, v = (np.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    a = np.einsum("bthd,bshd->bhts", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    a = np.where(np.tri(*a.shape[2:], dtype=bool), a, -np.inf)
    e = np.exp(a - a.max(axis=-1, keepdims=True))
    return np.einsum("bhts,bshd->bthd", e / e.sum(axis=-1, keepdims=True), v)
