"""A whole Llama on the GPU through transformers: LoLA beside softmax attention over the full cache, in one decoding loop.

The model has random weights, which both share: what they say is noise, what they cost is not.
"""

from __future__ import annotations

import copy
import math
import time
from typing import TYPE_CHECKING

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import DynamicLayer

import gpu_work
import lola.torch
import workload
from gpu_work import Draw
from harness import Report, alternate
from workload import Check, Geometry, Layer

if TYPE_CHECKING:
    from gpu_sections import Llama

GB, GIB = 1e9, float(1 << 30)
PEER_STEPS = 16      # in a round; LoLA's is a chunk, one update
BUDGET = 30          # seconds for a group of runs that take turns


def measure(backend, report: Report, geometry: Geometry, size: Llama):
    # Outside of inference mode, as models are loaded: what is made of parameters that count no writes is never kept.
    with torch.no_grad():
        models = Models(backend, geometry, size)
    with torch.inference_mode():
        _measure(backend, report, models, geometry, size)


def _measure(backend, report: Report, models: Models, geometry: Geometry, size: Llama):
    where = f"{size.layers} layers of width {size.width}, MLP {size.inner}, {geometry}"
    print(f"\n {where}")
    report.checked(models.checks())
    _card(backend, report, models, where)
    where += f", {size.context // 1024}K tokens"
    ours = Loop(models, models.lola, DynamicCache, Recorder(models))
    ours.begin(report, "LoLA", where)
    ours.recorder.stop()  # while time is taken
    single, peers, ratios = ours.copy(), {}, []
    for name, new_cache in (("SDPA", DynamicCache), ("SDPA, room ahead", models.cache_with_room)):
        for loop in (ours, single):
            loop.offload()  # counts as nobody's memory
        peer = Loop(models, models.softmax, new_cache)
        peer.begin(report, name, where)
        single.prefetch()
        runs = {"LoLA": lambda: single.seconds(geometry.chunk), name: lambda peer=peer: peer.seconds(PEER_STEPS)}
        values = alternate(backend, runs, size.rounds, BUDGET)
        for label, seconds in values.items():
            report.figure(f"{label}, 1 row", where, "tokens/s", 1 / seconds, f"in turn with {name}" if label == "LoLA" else "")
        ratios.append(report.figure(f"LoLA over {name}, 1 row", where, "x", values[name] / values["LoLA"]))
        single.offload()
        peers[name] = peer.largest_batch(report, name, where)
        del peer, runs
        backend.free()
    single.prefetch()
    _captured(backend, report, models, single, where)
    del single
    ours.prefetch()
    ours.recorder.start()
    rate = ours.largest_batch(report, "LoLA", where)
    what = f"whole model, {size.context // 1024}K tokens of context, tokens/s over softmax attention's"
    report.goal("H1", f"{what}, 1 row", 1, 1, min(ratios), "x")
    report.goal("H2", f"{what}, the most rows in {size.memory / GB:.0f} GB", 5, 5, rate / max(peers.values()), "x")


def _card(backend, report, models: Models, where: str):
    (prompt, new), card = models.size.card_tokens, models.size.card / GIB
    backend.free()
    with backend.memory_used() as used:
        loop = Loop(models, models.lola, DynamicCache)
        loop.prefill(prompt)
        loop.steps(new)
    peak = report.figure(f"LoLA, {prompt} tokens read and {new} written, peak memory", where, "GiB", [used.peak / GIB])
    report.goal("H3", f"whole model, {prompt} tokens read and {new} written, GiB of the device", card, card, peak, "GiB", most=True)


def _captured(backend, report, models: Models, loop: Loop, where: str):
    """The whole step, the choice of the token included, as one graph; its tokens are those of the eager loop."""
    eager, token, same = loop.copy(), loop.token.clone(), []
    position = torch.full((1, 1), int(loop.cache.layers[0].cache.tokens_seen[0]), device=token.device)

    def step():
        logits = models.lola(token, position_ids=position, past_key_values=loop.cache, logits_to_keep=1).logits
        token.copy_(logits[:, -1:].argmax(-1))
        position.add_(1)

    replay = backend.capture(step, warm=1)
    eager.steps(1)
    for _ in range(models.geometry.chunk + 1):
        same.append(torch.equal(token, eager.token))
        replay()
        eager.steps(1)
    report.checked([Check(f"tokens of {len(same)} replays that are not the eager loop's", same.count(False), 0)])
    report.figure("LoLA, 1 row, the step as a CUDA graph", where, "tokens/s", 1 / backend.replays(replay, models.geometry.chunk))


# ------------------------------------------------------------------------------------------------------------ the models


class Models:
    """One set of random weights, and two models of it: `softmax`, and `lola` with random feature maps."""

    def __init__(self, backend, geometry: Geometry, size: Llama):
        g, self.backend, self.geometry, self.size = geometry, backend, geometry, size
        config = LlamaConfig(
            vocab_size=size.vocabulary, hidden_size=size.width, intermediate_size=size.inner, num_hidden_layers=size.layers,
            num_attention_heads=g.heads, num_key_value_heads=g.kv_heads, head_dim=g.head_dim, max_position_embeddings=131072,
            rope_parameters={"rope_type": "default", "rope_theta": 5e5}, eos_token_id=None, bos_token_id=None,
        )  # fmt: skip
        torch.manual_seed(0)
        with torch.device(backend.device):
            self.softmax = LlamaForCausalLM._from_config(config, dtype=gpu_work.dtype_of(g)).eval()
        with torch.device("meta"):
            twin = LlamaForCausalLM._from_config(copy.deepcopy(config), dtype=gpu_work.dtype_of(g)).eval()
        twin.load_state_dict(self.softmax.state_dict(), assign=True)
        twin.model.rotary_emb = self.softmax.model.rotary_emb
        maps = lola.torch.distill.new_maps(range(size.layers), g.heads, g.head_dim, g.feature_dim // 2, 0, backend.device)
        self.lola = lola.torch.linearize(twin, g.config, maps)
        self.tokens = torch.randint(size.vocabulary, (1, max(size.context, size.card_tokens[0])), device=backend.device)

    def cache_with_room(self) -> DynamicCache:
        cache = DynamicCache()
        cache.layers = [Roomy(self.size.context + 1024) for _ in range(self.size.layers)]
        return cache

    def checks(self) -> list[Check]:
        """Logits before anything is folded, of a prefill and some steps: no further from float32's than twice what SDPA's are."""
        new, g = 8, self.geometry
        ids = self.tokens[:, : g.window + g.sparse]
        exact = copy.deepcopy(self.softmax).float()(ids, use_cache=False, logits_to_keep=new + 1).logits

        def error(model, cache):
            logits = [model(ids[:, :-new], past_key_values=cache, logits_to_keep=1).logits]
            logits += [model(one, past_key_values=cache).logits for one in ids[:, -new:].split(1, 1)]
            return workload.error(torch.cat(logits, 1).float().cpu().numpy(), exact.cpu().numpy())

        bound = 2 * error(self.softmax, DynamicCache())
        found = {"LoLA": error(self.lola, DynamicCache()), "SDPA, room ahead": error(self.softmax, self.cache_with_room())}
        del exact
        self.backend.free()
        return [Check(f"{name}, logits behind {ids.shape[1]} tokens against float32", x, bound) for name, x in found.items()]


class Recorder:
    """What the attention of some layers takes and gives, in the first and the last row of a batch, for checks in closed form."""

    def __init__(self, models: Models):
        self.models = models
        self.attentions = {i: models.lola.model.layers[i].self_attn for i in sorted({0, models.size.layers - 1})}
        self.pieces: dict[int, list] = {i: [] for i in self.attentions}
        self.outs: dict[int, torch.Tensor] = {}
        self.hooks: list = []
        self.start()

    def start(self):
        self.hooks = [self._watch(i, attention) for i, attention in self.attentions.items()]

    def stop(self):
        for attention, hook in zip(self.attentions.values(), self.hooks):
            del attention.project
            hook.remove()

    def _watch(self, i: int, attention):
        project = attention.project

        def projected(hidden, positions):
            made = project(hidden, positions)
            ends = slice(None) if len(hidden) == 1 else [0, -1]
            # Long pieces would count as memory that decoding needs.
            self.pieces[i].append([x[ends].to("cpu" if x.shape[1] > 1 else x.device) for x in (hidden, *made)])
            return made

        def attended(_, inputs):
            self.outs[i] = inputs[0][[0, -1], -1:].unflatten(-1, (-1, attention.head_dim))

        attention.project = projected
        return attention.o_proj.register_forward_pre_hook(attended)

    def fork(self):
        """The first row goes on as all rows."""
        for pieces in self.pieces.values():
            pieces[:] = [[x[:1] for x in piece] for piece in pieces]

    def checks(self, cache, batch: int) -> list[Check]:
        """The last token's outputs, over the state summed afresh from all that was read."""
        checks, g, device = [], self.models.geometry, self.models.backend.device
        for i, attention in self.attentions.items():
            memory = cache.layers[i].cache
            memory.sync()
            w_q, w_k = (side.mlp.layer.cpu().numpy() for side in (attention.feature_map_q, attention.feature_map_k))
            layer = Layer(g, w_q, w_k, attention.window_factors.sigmoid().flatten().cpu().numpy(), device)
            for row, b in {0: 0, batch - 1: -1}.items():
                hidden, *stored = (torch.cat([x[b][None].to(device) for x in xs], 1) for xs in zip(*self.pieces[i]))
                data = Draw(g, self._unrounded(attention, hidden), tuple(stored))
                what = f"layer {i + 1} of {self.models.size.layers}, row {row + 1} of {batch}"
                checks.append(gpu_work.check_end(layer, data, memory, self.outs[i][b][None], what, row))
        return checks

    def _unrounded(self, attention, hidden):
        """q, k and v as they would be without rounding behind the hidden states."""
        hidden = hidden.float()
        at = torch.arange(hidden.shape[1], device=hidden.device)[None]
        cos, sin = (x[:, :, None] for x in self.models.softmax.model.rotary_emb(hidden, at))
        q, k, v = (
            torch.nn.functional.linear(hidden, p.weight.float()).unflatten(-1, (-1, attention.head_dim))
            for p in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        half = attention.head_dim // 2
        return *(x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin for x in (q, k)), v


# ------------------------------------------------------------------------------------------------------------ the loop


class Roomy(DynamicLayer):
    """Softmax attention's full cache at its best: written in place into room that is there, read without a mask."""

    def __init__(self, room: int):
        super().__init__()
        self.room, self.count = room, 0

    def update(self, key_states, value_states, *args, **kwargs):
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            shape = (*key_states.shape[:2], self.room, key_states.shape[-1])
            self.all = [x.new_empty(shape) for x in (key_states, value_states)]
        for whole, new in zip(self.all, (key_states, value_states)):
            whole[:, :, self.count : self.count + new.shape[2]] = new
        return self._show(self.count + key_states.shape[2])

    def _show(self, count: int):
        self.count = count
        self.keys, self.values = (x[:, :, :count] for x in self.all)
        return self.keys, self.values

    def batch_repeat_interleave(self, repeats: int):
        for i in range(2):  # one after the other, as memory is short
            self.keys = self.values = None
            self.all[i] = self.all[i].repeat_interleave(repeats, 0)
        self._show(self.count)

    def batch_select_indices(self, indices):
        for i in range(2):
            self.keys = self.values = None
            self.all[i] = self.all[i][indices]
        self._show(self.count)


class Loop:
    """Greedy decoding of one model on one cache."""

    def __init__(self, models: Models, decoder, new_cache, recorder: Recorder | None = None):
        self.models, self.decoder, self.new_cache, self.recorder = models, decoder, new_cache, recorder
        self.backend = models.backend

    def copy(self) -> Loop:
        twin = copy.copy(self)
        twin.cache = copy.deepcopy(self.cache)
        return twin

    def offload(self):
        for layer in self.cache.layers:
            layer.offload()

    def prefetch(self):
        for layer in self.cache.layers:
            layer.prefetch()

    def prefill(self, tokens: int):
        self.cache, self.token = self.new_cache(), self.models.tokens[:, :tokens]
        self.steps(1)

    def steps(self, count: int):
        for _ in range(count):
            logits = self.decoder(self.token, past_key_values=self.cache, logits_to_keep=1).logits
            self.token = logits[:, -1:].argmax(-1)

    def seconds(self, count: int) -> float:
        """Of a step, by the host's clock."""
        self.backend.settle()
        begin = time.perf_counter()
        self.steps(count)
        self.backend.settle()
        return (time.perf_counter() - begin) / count

    def fork(self, rows: int):
        """The first row goes on as so many rows, each with a token of its own."""
        if len(self.token) > 1:
            self.cache.batch_select_indices(torch.tensor([0], device=self.token.device))
            self.backend.free()
        self.cache.batch_repeat_interleave(rows)
        if self.recorder:
            self.recorder.fork()
        self.token = torch.randint(self.models.size.vocabulary, (rows, 1), device=self.token.device)
        self.backend.free()

    def update(self) -> float:
        """Steps over the end of a chunk where there are chunks, a few elsewhere: their peak memory."""
        with self.backend.memory_used() as used:
            self.steps(self.models.geometry.chunk + 8 if self.recorder else 4)
        return used.peak

    def checked(self, report) -> float:
        """The same; LoLA's outputs are then compared with those over all that was read."""
        peak = self.update()
        if self.recorder:
            report.checked(self.recorder.checks(self.cache, len(self.token)))
        self.backend.free()
        return peak

    def begin(self, report: Report, name: str, where: str):
        """Prefill of one row and some steps, checked; and their peak memory."""
        self.backend.free()
        with self.backend.memory_used() as used:
            self.prefill(self.models.size.context)
            self.steps(4)
        report.figure(f"{name}, 1 row, peak memory, prefill included", where, "GB", [used.peak / GB])
        self.backend.free()
        self.one = self.checked(report)

    def largest_batch(self, report: Report, name: str, where: str) -> float:
        """Tokens per second of as many rows as fit, and their peak memory."""
        size, few = self.models.size, self.models.size.few if self.recorder else 2
        self.fork(few)
        row = (self.update() - self.one) / (few - 1)
        rows = 1 + int((size.memory - self.one) / row)
        while True:
            rows = max(1, rows)
            self.fork(rows)
            peak = self.checked(report)
            if peak <= size.memory or rows == 1:
                break
            rows -= math.ceil((peak - size.memory) / row)
        report.figure(f"{name}, {rows} rows, peak memory", where, "GB", [peak / GB])
        if self.recorder:
            self.recorder.stop()
        count = self.models.geometry.chunk if self.recorder else PEER_STEPS
        seconds = alternate(self.backend, {name: lambda: self.seconds(count)}, size.rounds, BUDGET)[name]
        return report.figure(f"{name}, {rows} rows, the most in {size.memory / GB:.0f} GB", where, "tokens/s", rows / seconds)
