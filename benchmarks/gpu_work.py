"""What is measured on the GPU: data that is drawn there, layers that decode in one graph, and the checks at full size.

`workload.py` counts the work and checks what is small. What takes all tokens of a long sequence (the state summed afresh,
every ranking) is done here in float64 on the device, from the contract's sections 2 to 4; features are the kernels' own,
which `workload.check_features` judges against `lola.reference`.
"""

from __future__ import annotations

import numpy as np
import torch

import lola
import workload
from lola import reference
from workload import Check, Geometry, Layer, Tokens


def dtype_of(geometry: Geometry) -> torch.dtype:
    return getattr(torch, geometry.dtype)


class Draw:
    """Random queries, keys and values (B, T, heads, D) on the device: `drawn`, float32, and `stored`, in the cache's dtype."""

    def __init__(self, geometry: Geometry, drawn: tuple, stored: tuple | None = None):
        self.geometry, self.drawn = geometry, drawn
        self.stored = stored or tuple(x.to(dtype_of(geometry)) for x in drawn)

    @classmethod
    def new(cls, geometry: Geometry, tokens: int, device: str, batch: int = 1, seed: int = 0) -> Draw:
        g = geometry
        random = torch.Generator(device).manual_seed(seed)
        shapes = ((batch, tokens, h, g.head_dim) for h in (g.heads, g.kv_heads, g.kv_heads))
        return cls(g, tuple(torch.randn(*shape, device=device, generator=random) for shape in shapes))

    @property
    def count(self) -> int:
        return self.stored[0].shape[1]

    def part(self, lo: int, hi: int) -> Draw:
        return Draw(self.geometry, *(tuple(x[:, lo:hi] for x in arrays) for arrays in (self.drawn, self.stored)))

    def first(self, n: int) -> Draw:
        return self.part(0, n)

    def on_host(self, n: int) -> Tokens:
        """The first tokens of the first row, for `workload`'s checks."""
        return Tokens(*(tuple(to_numpy(x[:1, :n]) for x in arrays) for arrays in (self.drawn, self.stored)))

    def then(self, others: list[Draw], row: int) -> Draw:
        """The tokens of the first row here and of row `row` of the others, one after the other."""
        drawn = tuple(torch.cat([own[:1], *(x[row : row + 1] for x in parts)], 1)
                      for own, *parts in zip(self.drawn, *(other.drawn for other in others)))
        return Draw(self.geometry, drawn)


def to_numpy(x: torch.Tensor) -> np.ndarray:
    """The same bits; bfloat16 as ml_dtypes'."""
    x = x.detach().contiguous().cpu()
    return x.view(torch.int16).numpy().view(workload.ml_dtypes.bfloat16) if x.dtype == torch.bfloat16 else x.numpy()


def numpy_of(x) -> np.ndarray:
    """A cache's view, wherever it lies, as NumPy array."""
    return x if isinstance(x, np.ndarray) else x.numpy()


def device_view(x) -> torch.Tensor:
    return torch.from_numpy(x) if isinstance(x, np.ndarray) else torch.from_dlpack(x)


# ---------------------------------------------------------------------------------------------------------- checks


def check_end(layer: Layer, data: Draw, cache: lola.Cache, out: torch.Tensor, what: str, row: int = 0) -> Check:
    """The outputs of a row's last tokens (no more than their chunk) at any length, in closed form.

    A query sees its window and the sparse cache, whose positions the cache tells; all other positions are in the state, which
    is summed afresh in float64. `data` is the row's whole history, (1, T, heads, D), and `out` (1, n, Hq, D).
    """
    g = layer.geometry
    (q_heads, kv_heads), T, n = workload.some_heads(g), data.count, out.shape[1]
    r = g.heads // g.kv_heads
    window = np.arange(max(0, (T - 1) // g.chunk * g.chunk - g.window), T)
    if (T - n) // g.chunk != (T - 1) // g.chunk or not np.array_equal(cache.window_positions(row), window):
        return Check(f"{what}: the window's positions", np.inf, 0.0)

    def closed(arrays):
        q, k, v = arrays
        outs = []
        for h in q_heads:
            kv = h // r
            one = lola.Hedgehog(layer.w_q[h : h + 1], layer.w_k[h : h + 1])
            fq = lola.kernels.features(q[:, T - n :, h : h + 1], one, "q", 1)
            fk = lola.kernels.features(k[:, :, kv : kv + 1], one, "k", 1)[0, :, 0]
            exact = np.concatenate([cache.sparse_positions(row, h), window])
            rest = torch.ones(T, dtype=torch.bool)
            rest[exact] = False
            rest = rest.to(fk.device)
            phi = fk[rest].double()
            H, s = phi.T @ v[0, rest, kv].double(), phi.sum(0)
            at = torch.from_numpy(exact).to(k.device)
            pairs = (x[0, at, kv : kv + 1].float().cpu().numpy() for x in (k, v))
            outs.append(
                reference.attend(
                    q[0, T - n :, h : h + 1].float().cpu().numpy(), *pairs, fq[0].cpu().numpy(), H[None].cpu().numpy(),
                    s[None].cpu().numpy(), gate=layer.gate[h : h + 1], mixing=g.mixing, causal=True,
                )
            )  # fmt: skip
        return np.concatenate(outs, axis=1)[None]

    exact = closed(data.stored)
    unrounded = exact if g.dtype == "float32" else closed(data.drawn)
    q, k = (to_numpy(x) for x in (data.stored[0][:, T - n :, q_heads], data.stored[1][:, window[0] :][:, :, kv_heads]))
    bound = workload._bound(g, q, k, exact, unrounded)
    folded = int(numpy_of(cache.folded)[row, 0])
    return Check(f"{what}, last {n} of {T} tokens, {folded} pairs in the state", workload.error(to_numpy(out)[:, :, q_heads], exact), bound)


def check_softmax(data: Draw, out: torch.Tensor, what: str) -> list[Check]:
    """`workload.check_softmax`, given no more than the heads that it looks at: `out` (1, n, Hq, D) of the last n tokens."""
    g = data.geometry
    q_heads, kv_heads = workload.some_heads(g)
    T, n = data.count, out.shape[1]
    at = np.unique(np.linspace(0, n - 1, 9).astype(int))
    r = g.heads // g.kv_heads
    factor = 1 if g.dtype == "float32" else 4

    def exact(arrays):
        """float64, on the device."""
        q, k, v = arrays
        outs = torch.empty(1, len(at), len(q_heads), g.head_dim, dtype=torch.float64)
        for i, t in enumerate(int(t) for t in at + T - n):
            for j, h in enumerate(q_heads):
                a = k[0, : t + 1, h // r].double() @ q[0, t, h].double() * g.head_dim**-0.5
                outs[0, i, j] = (a.softmax(0) @ v[0, : t + 1, h // r].double()).cpu()
        return outs.numpy()

    right = exact(data.stored)
    unrounded = right if g.dtype == "float32" else exact(data.drawn)
    q, k = (to_numpy(x) for x in (data.stored[0][:, at + T - n][:, :, q_heads], data.stored[1][:, :, kv_heads]))
    bound = factor * workload._bound(g, q, k, right, unrounded)
    return [Check(f"{what}, {len(at)} of {n} queries over {T} tokens", workload.error(to_numpy(out[:, at])[:, :, q_heads], right), bound)]


def judge_rankings(layer: Layer, data: Draw, cache: lola.Cache) -> tuple[int, int, float]:
    """Every ranking of every set while `cache`, empty at first, takes `data` chunk by chunk: (rankings, those that do not hold,
    the worst margin).

    E and what is kept are the cache's own; scores and state are summed in float64 along that history. A ranking holds where the
    lowest kept score >= the highest dropped one - 1e-5 * max(score, ||v||^2).
    """
    g = layer.geometry
    q, k, v = data.stored
    T, S, r = data.count, g.sets, g.heads // g.sets
    device = k.device
    heads = torch.arange(g.heads, device=device)
    kv_of_set = torch.arange(S, device=device) * g.kv_heads // S
    fk = lola.kernels.features(k, layer.map, "k", g.heads)[0]                # (T, Hq, F)
    values = v[0].double()
    H = torch.zeros(g.heads, g.feature_dim, g.head_dim, dtype=torch.float64, device=device)
    s = torch.zeros(g.heads, g.feature_dim, dtype=torch.float64, device=device)
    held = torch.zeros(S, T, dtype=torch.bool, device=device)
    count, wrong, worst = 0, 0, float("inf")

    def of_sets(mask):
        """Positions (S, n) of a mask with as many in each set, features (Hq, n, F) and values (S, n, D) there, float64."""
        at = mask.nonzero()[:, 1].view(S, -1)
        return at, fk[at.repeat_interleave(r, 0), heads[:, None]].double(), values[at, kv_of_set[:, None]]

    for lo in range(0, T, g.chunk):
        layer.attention(*(x[:, lo : lo + g.chunk] for x in data.stored), cache=cache)
        first = lo - g.window - g.chunk
        if first < 0:
            continue
        pairs = held.clone()
        pairs[:, first : first + g.chunk] = True
        n = int(pairs[0].sum())
        kept = torch.zeros_like(held)
        if g.sparse:
            buffers = cache.buffers()
            positions = device_view(buffers["sparse_positions"])[0][:, : min(n, g.sparse)]
            kept.scatter_(1, positions.to(device), True)
        if n <= g.sparse:
            if not torch.equal(kept, pairs):
                return count, wrong + 1, float("-inf")
            held = kept
            continue
        if bool((kept & ~pairs).any()) or not bool((kept.sum(1) == g.sparse).all()):
            return count, wrong + 1, float("-inf")                           # no selection from E at all
        if g.sparse:
            at, phi, value = of_sets(pairs)
            z = torch.einsum("hnf,hf->hn", phi, s)
            recalled = torch.where(z[..., None] > 0, phi @ H / z.clamp(min=1e-300)[..., None], 0.0)
            score = (recalled - value.repeat_interleave(r, 0)).square().sum(-1).view(S, r, n).sum(1)
            norm, chosen = value.square().sum(-1), kept.gather(1, at)
            low, i = score.masked_fill(~chosen, float("inf")).min(1)
            high, j = score.masked_fill(chosen, float("-inf")).max(1)
            norms = torch.maximum(norm.gather(1, i[:, None]), norm.gather(1, j[:, None]))[:, 0]
            margin = (low - high) / torch.maximum(torch.maximum(low.abs(), high.abs()), norms)
            count, wrong = count + S, wrong + int((margin < -1e-5).sum())
            worst = min(worst, float(margin.min()))
        _, phi, value = of_sets(pairs & ~kept)
        H += phi.transpose(1, 2) @ value.repeat_interleave(r, 0)
        s += phi.sum(1)
        held = kept
    return count, wrong, worst


def same_memory(a: lola.Cache, b: lola.Cache) -> bool:
    """Bit for bit, but for the order of sparse slots, which no contract fixes."""
    same = np.array_equal(a.tokens_seen, b.tokens_seen)
    for name in ("hidden", "normalizer", "folded"):
        same &= np.array_equal(numpy_of(getattr(a, name)), numpy_of(getattr(b, name)))
    for row in range(a.batch):
        for head in range(a.heads):
            same &= np.array_equal(a.sparse_positions(row, head), b.sparse_positions(row, head))
    return bool(same)


# -------------------------------------------------------------------------------------------------------- decoding


def decode_bytes(geometry: Geometry, position: int, batch: int) -> float:
    """Bytes that a step of `batch` rows must read: window, sparse cache and state of each, and phi's weights once, which for
    16-bit caches count as 16-bit numbers."""
    g = geometry
    weights = 4 * g.heads * g.head_dim * (g.feature_dim // 2)
    return batch * (workload.decode_bytes(g, position) - weights) + weights * g.itemsize / 4


class Decoding:
    """Layers that decode the same tokens in one graph, each with a cache and weights of its own, together more than `cold` L2
    caches and no fewer than `least`.

    All begin from copies of one row, prefilled to `context`. With `stagger` row b is b mod C tokens further, so that every
    step updates some of the rows.
    """

    def __init__(self, backend, geometry: Geometry, context: Draw, batch: int, cold: float, least: int, stagger: bool = False):
        g = self.geometry = geometry
        self.backend, self.context, self.batch, self.stagger = backend, context, batch, stagger
        self.pool = Draw.new(g, 2 * g.chunk, backend.device, batch, seed=1)
        self.bytes = decode_bytes(g, context.count + g.chunk // 2, batch)
        self.count = max(least, int(cold * backend.cache_bytes / self.bytes) + 1)
        first = workload.new_layer(g, device=backend.device)
        self.layers = [first] + [Layer(g, first.w_q, first.w_k, first.gate, backend.device) for _ in range(self.count - 1)]
        filled = first.new_cache()
        first.attention(*context.stored, cache=filled)
        filled = filled.repeat(batch)
        self.extra = None
        if stagger:
            self.extra = Draw.new(g, g.chunk, backend.device, batch, seed=2)
            self.ahead = np.arange(batch) % g.chunk
            first.attention(*self.extra.stored, cache=filled, stops=self.ahead)
        self.caches = [filled.copy() for _ in range(self.count)]
        self.gate = torch.from_numpy(first.gate).to(backend.device)
        self.inputs = tuple(x[:, :1].clone() for x in self.pool.stored)
        self.outs = [torch.full_like(self.inputs[0], float("nan")) for _ in range(self.count)]
        self.taken: list[int] = []
        self.replay = None
        self.take(0)
        self.step()                                   # binds map and gate; everything made once is made

    def take(self, i: int = 0):
        """Queues the copy of the next token into the graph's inputs."""
        at = len(self.taken) % self.pool.count
        for x, source in zip(self.inputs, self.pool.stored):
            x.copy_(source[:, at : at + 1])
        self.taken.append(at)

    def step(self):
        q, k, v = self.inputs
        for layer, cache, out in zip(self.layers, self.caches, self.outs):
            lola.attention(q, k, v, cache=cache, feature_map=layer.map, gate=self.gate, out=out)

    def chunk(self) -> tuple[np.ndarray, int]:
        """Decodes a whole chunk by replays: seconds per layer of each step, and which of them begins the aligned rows' chunk."""
        if self.replay is None:
            self.replay = self.backend.capture(self.step, warm=0)
        C = self.geometry.chunk
        begins = -(self.context.count + len(self.taken)) % C
        return self.backend.replays(self.replay, C, self.take) / self.count, begins

    def check(self) -> list[Check]:
        """The last token's outputs of the first and the last layer and row, in closed form, after all that was decoded."""
        checks = []
        for i in sorted({0, self.count - 1}):
            cache = self.caches[i]
            cache.sync()
            for b in sorted({0, self.batch - 1}):
                parts = [self.extra.part(0, int(self.ahead[b]))] if self.stagger else []
                drawn = tuple(x[:, self.taken] for x in self.pool.drawn)
                history = self.context.then([*parts, Draw(self.geometry, drawn)], b)
                what = f"decoding, layer {i + 1} of {self.count}, row {b + 1} of {self.batch}{', staggered' if self.stagger else ''}"
                checks.append(check_end(self.layers[i], history, cache, self.outs[i][b : b + 1], what, b))
        return checks

    def host_seconds(self, calls: int) -> float:
        """What one eager call costs the host while the device's queue has room."""
        import time

        q, k, v = self.inputs
        layer, cache, out, attention = self.layers[0], self.caches[0], self.outs[0], lola.attention
        feature_map, gate = layer.map, self.gate
        self.backend.settle()
        begin = time.perf_counter()
        for _ in range(calls):
            attention(q, k, v, cache=cache, feature_map=feature_map, gate=gate, out=out)
        return (time.perf_counter() - begin) / calls
