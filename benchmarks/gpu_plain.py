"""LoLA in PyTorch on the GPU: `plain_torch.py` as it is, and its chunk as one compiled function under a CUDA graph.

The compiled peer is what one gets from torch without kernels of one's own: once window and sparse cache are full, every chunk
runs the same static shapes, so all of it (rank, fold, take, attend) is one torch.compile, captured once and replayed.
"""

from __future__ import annotations

import math

import torch

import plain_torch


class PlainLola(plain_torch.PlainLola):
    """Eager, as on the CPU."""

    def __init__(self, *arguments, capture=None, **more):
        super().__init__(*arguments, **more)

    def clear(self):
        """Back to an empty memory."""
        self.seen = self.cached = self.folded = 0
        self.H.zero_(), self.s.zero_()


class CompiledLola(PlainLola):
    """The same with full chunks compiled; what comes before the sparse cache is full, and after the last full chunk, is eager."""

    def __init__(self, *arguments, capture, **more):
        super().__init__(*arguments, **more)
        g, device, dtype = self.g, self.H.device, self.keys.dtype
        batch = len(self.H)
        self.clock = torch.zeros(1, dtype=torch.int64, device=device)       # position of the first token that leaves
        self.inputs = tuple(torch.zeros(batch, h, g.chunk, g.head_dim, dtype=dtype, device=device)
                            for h in (g.heads, self.sets, self.sets))
        self.out = torch.empty_like(self.inputs[0])
        self.steady = torch.compile(self._steady, fullgraph=True, dynamic=False)
        self.capture, self.replay = capture, None

    @torch.inference_mode()
    def __call__(self, q, k, v):
        g, outs, lo, tokens = self.g, [], 0, q.shape[1]
        wide = self.sets // g.kv_heads
        while lo < tokens:
            n = min(tokens - lo, g.chunk - self.seen % g.chunk)
            part = [x[:, lo : lo + n] for x in (q, k, v)]
            if n == g.chunk and self.folded and self.cached == g.sparse:
                for x, source in zip(self.inputs, part):
                    source = source.transpose(1, 2)
                    x.copy_(source if x is self.inputs[0] else source.repeat_interleave(wide, 1) if wide > 1 else source)
                self.clock.fill_(self.seen - g.window - g.chunk)
                self._replay()
                outs.append(self.out.transpose(1, 2).clone())
                self.seen += n
                if self.held is not None:
                    self.held.append(self.positions.clone())
            else:
                outs.append(super().__call__(*part))
            lo += n
        return torch.cat(outs, 1)

    def _replay(self):
        if self.replay is None:
            # Compiling and capturing run the step; the memory is put back afterwards.
            state = (self.keys, self.values, self.features, self.positions, self.H, self.s)
            kept = [x.clone() for x in state]
            self.replay = self.capture(lambda: self.steady(*self.inputs))
            for x, before in zip(state, kept):
                x.copy_(before)
        self.replay()

    def _steady(self, q, k, v):
        """A chunk from beginning to end, in place: q (B, Hq, C, D), k and v (B, S, C, D)."""
        g = self.g
        L, W, C, r = g.sparse, g.window, g.chunk, g.heads // self.sets
        batch = len(q)
        # The chunk that leaves the window, and the ranking of all pairs.
        new = (self.clock + torch.arange(C, device=q.device)).expand(batch, self.sets, C)
        positions = torch.cat([self.positions, new], -1)
        keys, values = self.keys[:, :, : L + C].clone(), self.values[:, :, : L + C].clone()
        features = torch.cat([self.features[:, :, :L], self._phi(keys[:, :, L:].repeat_interleave(r, 1), self.w_k)], 2)
        wide = values.float().repeat_interleave(r, 1)
        weight = features @ self.s[..., None]
        recalled = torch.where(weight > 0, features @ self.H / weight.clamp(min=1e-38), 0.0)
        scores = (recalled - wide).square().sum(-1).view(batch, self.sets, r, L + C).sum(2)
        order = scores.sort(dim=-1, descending=True, stable=True).indices
        keep, drop = order[..., :L].sort(-1).values, order[..., L:]
        gone = self._take(features, drop)
        self.H += gone.transpose(2, 3) @ self._take(wide, drop)
        self.s += gone.sum(2)
        self.positions.copy_(self._take(positions, keep))
        self.features[:, :, :L] = self._take(features, keep)
        for memory, old, incoming in ((self.keys, keys, k), (self.values, values, v)):
            window = memory[:, :, L + C : L + C + W].clone()
            memory[:, :, :L] = self._take(old, keep)
            memory[:, :, L : L + W] = window
            memory[:, :, L + W :] = incoming
        # Attention of the chunk over all of it.
        grouped = q.reshape(batch, self.sets, r * C, g.head_dim)
        a = (grouped @ self.keys.transpose(2, 3)).float() * g.head_dim**-0.5
        a = a.view(batch, self.sets, r, C, L + W + C)
        ahead = torch.ones(C, C, dtype=torch.bool, device=q.device).triu(1)
        ahead = torch.cat([ahead.new_zeros(C, L + W), ahead], -1)
        a = a.masked_fill(ahead, -math.inf).view(batch, g.heads, C, -1)
        phi = self._phi(q, self.w_q)
        z = phi @ self.s[..., None]
        p = torch.cat([a, z.log() + self.odds], -1).softmax(-1)
        exact = p[..., :-1].to(v.dtype).reshape(batch, self.sets, r * C, -1) @ self.values
        self.out.copy_(exact.view(batch, g.heads, C, -1) + p[..., -1:] / z * (phi @ self.H))
