"""LoLA in plain PyTorch: what one writes without kernels, and the peer that the kernels are measured against.

Chunk by chunk, vectorised over rows, heads and the tokens of a chunk; eager tensor operations alone. Its outputs pass the
same check against `lola.reference` as the kernels' (see `workload.check_peer`).

Symbols: B rows, Hq query and Hkv KV heads, S sets of pairs (Hq or Hkv), r = Hq / S, W window, C chunk, L sparse cache,
D, Dv, F sizes of keys, values and features.
"""

from __future__ import annotations

import math

import torch


class PlainLola:
    """One layer's memory and its attention, mixing "gated", feature map Hedgehog; every row at the same position.

    The exact pairs of a set lie in one array (B, S, L + W + C, .), so that attention is one softmax over one slice of it:
    the sparse cache right-aligned in the first L places, the window behind it, the current chunk last. Features of cached
    keys are kept.
    """

    def __init__(self, geometry, w_q, w_k, gate, batch: int = 1, dtype=torch.float32):
        g = self.g = geometry
        self.w_q, self.w_k = w_q.to(dtype), w_k.to(dtype)
        odds = torch.log1p(-gate) - torch.log(gate)
        self.odds = odds.float()[None, :, None, None]
        self.sets = g.kv_heads if g.sparse_per == "kv_head" else g.heads
        places = g.sparse + g.window + g.chunk
        device = w_q.device
        self.keys = torch.zeros(batch, self.sets, places, g.head_dim, dtype=dtype, device=device)
        self.values = torch.zeros_like(self.keys)
        self.features = torch.zeros(batch, g.heads, g.sparse + g.chunk, g.feature_dim, device=device)
        self.positions = torch.zeros(batch, self.sets, g.sparse, dtype=torch.int64, device=device)
        self.H = torch.zeros(batch, g.heads, g.feature_dim, g.head_dim, device=device)
        self.s = torch.zeros(batch, g.heads, g.feature_dim, device=device)
        self.seen = self.cached = self.folded = 0
        self.held: list[torch.Tensor] | None = None   # each chunk's cached positions (B, S, .), where one wants to know

    @torch.inference_mode()
    def __call__(self, q, k, v):
        """q (B, T, Hq, D), k and v (B, T, Hkv, D), contiguous -> (B, T, Hq, D)."""
        g = self.g
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        k, v = (x.repeat_interleave(self.sets // g.kv_heads, 1) for x in (k, v))
        outs = []
        done, tokens = 0, q.shape[2]
        while done < tokens:
            offset = self.seen % g.chunk
            if offset == 0:
                self._begin_chunk()
            n = min(tokens - done, g.chunk - offset)
            place = g.sparse + g.window + offset
            self.keys[:, :, place : place + n] = k[:, :, done : done + n]
            self.values[:, :, place : place + n] = v[:, :, done : done + n]
            outs.append(self._attend(q[:, :, done : done + n], place + n))
            self.seen += n
            done += n
        return torch.cat(outs, 2).transpose(1, 2)

    def _phi(self, x, w):
        """[softmax(xW), softmax(-xW)]: x (B, Hq, n, D) -> (B, Hq, n, F) float32."""
        x = (x @ w).float()
        phi = torch.cat([x.softmax(-1), (-x).softmax(-1)], -1).clamp_(min=1e-12)
        return phi if self.keys.dtype == torch.float32 else phi.bfloat16().float()

    def _attend(self, q, end):
        """Queries that are the last n tokens before place `end`."""
        g = self.g
        batch, _, n, _ = q.shape
        r = g.heads // self.sets
        begin = g.sparse + max(0, g.window - self.seen // g.chunk * g.chunk)      # the window may not be full yet
        begin -= self.cached                                                      # else the two touch
        keys, values = self.keys[:, :, begin:end], self.values[:, :, begin:end]
        grouped = q.reshape(batch, self.sets, r * n, g.head_dim)
        a = (grouped @ keys.transpose(2, 3)).float().mul_(g.head_dim**-0.5).view(batch, self.sets, r, n, -1)
        if n > 1:
            ahead = torch.ones(n, n, dtype=torch.bool, device=q.device).triu_(1)
            a[..., -n:].masked_fill_(ahead, -math.inf)
        a = a.view(batch, g.heads, n, -1)
        if not self.folded:
            p = a.softmax(-1).to(values.dtype).view(batch, self.sets, r * n, -1)
            return (p @ values).view(batch, g.heads, n, -1)
        # The state is one more pair, of value N / z and logit log z + log((1 - g) / g).
        phi = self._phi(q, self.w_q)
        z = phi @ self.s[..., None]
        p = torch.cat([a, z.log() + self.odds], -1).softmax(-1)
        exact = p[..., :-1].to(values.dtype).reshape(batch, self.sets, r * n, -1) @ values
        return (exact.view(batch, g.heads, n, -1) + p[..., -1:] / z * (phi @ self.H)).to(q.dtype)

    def _begin_chunk(self):
        """A chunk leaves the window for the sparse cache, or for the state."""
        g = self.g
        L, W, C = g.sparse, g.window, g.chunk
        leaving = self.seen - W - C
        if leaving >= 0:
            count = self.cached
            new = torch.arange(leaving, leaving + C, device=self.H.device).expand(*self.positions.shape[:2], C)
            positions = torch.cat([self.positions[:, :, L - count :], new], -1)
            keys, values = (x[:, :, L - count : L + C].clone() for x in (self.keys, self.values))
            for_each = keys[:, :, count:].repeat_interleave(g.heads // self.sets, 1)
            features = torch.cat([self.features[:, :, L - count : L], self._phi(for_each, self.w_k)], 2)
            if count + C > L:
                keep = self._rank_and_fold(features, values)
                positions, keys, values, features = (self._take(x, keep) for x in (positions, keys, values, features))
            n = self.cached = positions.shape[2]
            self.positions[:, :, L - n :] = positions
            self.keys[:, :, L - n : L], self.values[:, :, L - n : L] = keys, values
            self.features[:, :, L - n : L] = features
        if self.seen:
            self.keys[:, :, L : L + W] = self.keys[:, :, L + C : L + C + W].clone()
            self.values[:, :, L : L + W] = self.values[:, :, L + C : L + C + W].clone()
        if self.held is not None:
            self.held.append(self.positions[:, :, L - self.cached :].clone())

    def _rank_and_fold(self, features, values):
        """Scores all pairs, folds the lowest, and returns the places of those that stay, (B, S, L), ascending."""
        g = self.g
        values = values.float().repeat_interleave(g.heads // self.sets, 1)
        weight = features @ self.s[..., None]
        recalled = torch.where(weight > 0, features @ self.H / weight.clamp(min=1e-38), 0.0)
        scores = (recalled - values).square_().sum(-1)
        scores = scores.view(len(scores), self.sets, -1, scores.shape[-1]).sum(2)
        order = scores.sort(dim=-1, descending=True, stable=True).indices
        keep, drop = order[..., : g.sparse].sort(-1).values, order[..., g.sparse :]
        gone = self._take(features, drop)
        self.H += gone.transpose(2, 3) @ self._take(values, drop)
        self.s += gone.sum(2)
        self.folded += drop.shape[-1]
        return keep

    def _take(self, x, places):
        """x (B, S or Hq, n, ...) at places (B, S, m) of each set."""
        places = places.repeat_interleave(x.shape[1] // self.sets, 1)
        if x.dim() == 4:
            places = places[..., None].expand(*places.shape, x.shape[-1])
        return x.gather(2, places)
