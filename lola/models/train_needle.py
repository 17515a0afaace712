"""Trains the bundled base model ``needle``: a byte-level Llama of 4.6 M parameters, linearised as LoLCATs does it.

    python -m lola.models.train_needle STAGE --out DIR

runs one stage, each of which takes less than ten minutes on one H100 and reads what earlier ones left in DIR:

=============== =====================================================================================================
teacher         the softmax model: King James Bible and RULER-format tasks, 256 to 8192 bytes
transfer        adapter ``needle``: feature maps and gates that imitate each attention head, at 1024 bytes only
lora            adapter ``needle``: LoRA on the language-model loss, at 1024 bytes only
transfer-8k     adapter ``needle-8k``: the same maps, transfer continued at 8192 bytes
lora-8k         adapter ``needle-8k``: its LoRA
export          the Hugging Face folder: model, tokenizer, both adapters
evaluate        accuracy of teacher, bases and LoLA on the fixed samples, as JSON
=============== =====================================================================================================

Every random number comes from a fixed seed and the step's number, so a stage that was interrupted goes on where its last
checkpoint was (start it again), and a second run sees the same data. Sums on a GPU are not reproducible to the last bit, so
neither are the weights.

The attention is ``lola.torch.hybrid``'s, LoLA (arXiv 2505.23666, Eq. 10, 12-14) in differentiable PyTorch, the training loop
``lola.torch.loop``'s; ``lola.torch.distill`` trains adapters like these for any Llama of Hugging Face. ``Decoder`` decodes batches of
samples on a GPU.

Needs torch and safetensors. ``--tiny`` runs everything on a toy size within a minute on a CPU.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import lola
from lola.eval import tasks
from lola.eval.text import bundled
from lola.torch import distill, loop
from lola.torch.hybrid import attend, hedgehog, mix, plan, self_recall, softmax_attention, states, take

# ---------------------------------------------------------------------------------------------------------------- sizes


@dataclass(frozen=True)
class Size:
    """The architecture and how much training it gets; the defaults are the released model."""

    layers: int = 6
    width: int = 256
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    mlp: int = 704
    theta: float = 2e5
    eps: float = 1e-5
    features: int = 64
    chunk: int = 64
    window: int = 64
    bytes_per_step: int = 131_072
    # (bytes of a row, share), one list for each phase of the teacher's training, and the phase's steps
    teacher: tuple = (
        (900, ((256, 1),)),
        (1300, ((256, 1), (512, 1))),
        (1600, ((512, 1), (1024, 1))),
        (1500, ((1024, 1), (2048, 1))),
        (1300, ((1024, 1), (2048, 1), (4096, 2))),
        (2600, ((1024, 1), (2048, 2), (4096, 3), (8192, 4))),
    )
    short: int = 1024
    long: int = 8192
    sparse: int = 256
    scale_steps: float = 1.0  # of the adapters' stages


TINY = Size(
    layers=2, width=32, heads=4, kv_heads=2, head_dim=16, mlp=48, features=16, chunk=16, window=16, bytes_per_step=2048,
    teacher=((4, ((256, 1),)), (4, ((512, 1), (1024, 1)))), short=512, long=1024, sparse=24, scale_steps=0.005,
)  # fmt: skip

SEED = 1611
TEACHER_MIX = {
    "text": 13, "niah_single_1": 9, "niah_single_2": 9, "niah_single_3": 10, "niah_multikey_1": 11, "niah_multikey_2": 8,
    "niah_multivalue": 5, "niah_multiquery": 6, "vt": 6, "quiz": 10, "recall": 13,
}  # fmt: skip
# Adapters learn from whole prompts: lists that are all needle are more than any sparse cache can hold.
ADAPTER_MIX = {
    "text": 16, "niah_single_1": 14, "niah_single_2": 14, "niah_single_3": 14, "niah_multikey_1": 14, "niah_multikey_2": 6,
    "niah_multivalue": 6, "niah_multiquery": 6, "vt": 4, "quiz": 6,
}  # fmt: skip
EVALUATED = ("niah_single_1", "niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multikey_2", "niah_multivalue", "niah_multiquery")


@dataclass(frozen=True)
class Stage:
    """One stage of an adapter.

    ``lora`` lists the projections that get one; ``rates`` has the learning rate of each part: "maps", "gates", "lora_qk" (the
    LoRA of q and k, which move the features) and "lora" (the rest of it).
    """

    seed: int  # of the data
    steps: int
    batch: tuple[int, int]  # rows, bytes
    rates: dict
    lora: tuple[str, ...] = ()
    rank: int = 16
    alpha: int = 32
    lm: float = 0.3
    answer: float = 1.0
    # Attention of successive steps, in turn: (mixing, sparse)
    attention: tuple = (("lolcats", 0),)


QKVO = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
# Steps of LoRA training take turns: LoLA's own attention, with the share of pairs that its cache holds at 4096 bytes, and
# the base's, so that both work.
STAGES = {
    "transfer": Stage(1, 700, (32, 1024), {"maps": 1e-2, "gates": 1e-2}),
    "lora": Stage(
        50, 800, (32, 1024), {"lora": 5e-4, "lora_qk": 2e-4, "gates": 3e-3}, QKVO + MLP, attention=(("gated", 32), ("gated", 64), ("lolcats", 0))
    ),
    "transfer-8k": Stage(3, 500, (4, 8192), {"maps": 1e-2, "gates": 1e-2}),
    "lora-8k": Stage(51, 200, (4, 8192), {"lora": 5e-4, "lora_qk": 2e-4, "gates": 3e-3}, QKVO + MLP, attention=(("gated", 256), ("lolcats", 0))),
}

# ----------------------------------------------------------------------------------------------------------------- data


def _ask(key: str, kind: str) -> str:
    return tasks.ASK_ONE[1].format(kind=kind[:-1], query=key)


def _recall(draw: tasks.Draw, length: int) -> list[tuple[str, bool]]:
    """A list of keys and values, then one statement after another until the row is full. Pieces (string, is answer).

    Prompts hold one or two answers in a thousand bytes, from which a model learns to find *a* needle long before it learns
    to find *the* needle; here nearly every line depends on its key.
    """
    short = length < 400 or draw.below(4) == 0
    taken: set[str] = set()
    pairs: list[tuple[str, str]] = []
    lines: list[str] = []
    room = length * (30 + draw.below(30)) // 100
    while room > 0 or len(pairs) < 2:
        name = short and draw.below(4) == 0  # so that letters are copied as readily as digits
        value = "".join(chr(65 + draw.below(26)) for _ in range(5)) if name else draw.number()
        pairs.append((draw.key("train", taken), value))
        key, value = pairs[-1]
        lines.append(f"for {key} is: {value}." if short else tasks.NEEDLE.format(kind="numbers", key=key, value=value))
        room -= len(lines[-1]) + 1
    pieces = [("\n".join(lines) + "\n", False)]
    used = len(pieces[0][0])
    again = draw.below(3) == 0  # the same words once more, or the question's
    order: list[int] = []
    while used <= length:
        order = order or draw.shuffled(range(len(pairs)))
        at = order.pop()
        key, value = pairs[at]
        if again:
            question, answer = lines[at][: -len(value) - 2], f" {value}.\n"
        else:
            question, answer = f"The special magic number for {key} mentioned in the provided text is", f" {value}.\n"
        pieces += [(question, False), (answer, True)]
        used += len(question) + len(answer)
    return pieces


def _chain(draw: tasks.Draw, length: int) -> list[tuple[str, bool]]:
    """Variable tracking without its haystack, for rows that are too short for one."""
    names = ["".join(chr(65 + draw.below(26)) for _ in range(5)) for _ in range(5)]
    query = str(10_000 + draw.below(90_000))
    lines = [f"VAR {name} = {value}" for name, value in zip(names, [query, *(f"VAR {name} " for name in names)])]
    before, after = (part.format(query=query) for part in tasks.ASK_VT)
    return [(before + "\n".join(lines) + after, False), (" ".join(names) + "\n", True)]


def _quiz(draw: tasks.Draw, length: int) -> list[tuple[str, bool]]:
    """Several needles in one haystack, then several questions in a row, each with its answer."""
    kind = "uuids" if draw.below(4) == 0 else "numbers"
    ask, needle = (195, 92) if kind == "uuids" else (165, 68)  # bytes at most, nearly
    most = (length * 3 // 4 - 150) // (ask + needle)
    if most < 1:
        raise ValueError("too short")
    count = 1 + draw.below(min(8, most))
    taken: set[str] = set()
    keys = [draw.key("train", taken) for _ in range(count)]
    values = [draw.value(kind) for _ in keys]
    needles = [tasks.NEEDLE.format(kind=kind, key=k, value=v) for k, v in zip(keys, values)]
    haystack = tasks.Haystack(("noise", "text", "needles")[draw.below(3)], needles, draw, "train", taken, None)
    before = tasks.ASK[0].format(kind=kind)
    asked = [(_ask(keys[i], kind), f" {values[i]}.") for i in draw.shuffled(range(count))]
    frame = len(before) + 1 + sum(len(q) + len(a) for q, a in asked)

    def fits(units: int) -> bool:
        return frame + haystack.size(units) <= length

    if not fits(haystack.least):
        raise ValueError("too short")
    units = tasks.largest(fits, haystack.least, haystack.guess(length - frame))
    pieces = [(before + haystack.build(units), False)]
    for i, (question, answer) in enumerate(asked):
        # The newline that ends an answer also begins the next question.
        pieces += [(question[1:] if i else question, False), (answer + "\n", True)]
    return pieces


def make_row(length: int, seed: tuple[int, ...], mix: dict) -> tuple[np.ndarray, np.ndarray]:
    """One training row: ``length + 1`` bytes and the weight of each in the answer loss. Text fills what is left.

    The first character of each value, where the choice among needles is made, weighs 4, the answer's others 1, the rest 0.
    """
    draw = tasks.Draw(*seed, length)
    at = draw.below(sum(mix.values()))
    for task, share in mix.items():
        at -= share
        if at < 0:
            break
    pieces: list[tuple[str, bool]] = []
    if task == "quiz" and length >= 400:
        try:
            pieces = _quiz(draw, length)
        except ValueError:
            pieces = _recall(draw, length)
    elif task == "vt" and 400 <= length < 1000:
        pieces = _chain(draw, length)
    elif task != "text":
        try:
            if task in ("quiz", "recall"):
                raise ValueError
            answer = {"niah_single_3": 39, "niah_multivalue": 44, "niah_multiquery": 44, "vt": 30}.get(task, 10)
            sample = tasks.make_sample(task, length, [*seed, 1], "train", generate=answer)
            pieces = [(sample.prompt, False), (sample.answer, True)]
        except ValueError:  # this task does not fit into so short a row
            pieces = _recall(draw, length)
    used = sum(len(string) for string, _ in pieces)
    if used <= length:
        text = bundled("train")
        first = int(text.words[draw.below(len(text) - length)])
        pieces.append((text.string[first : first + length + 1 - used], False))
    row = np.frombuffer("".join(string for string, _ in pieces).encode("ascii"), np.uint8)[: length + 1]
    weights = np.repeat([answer for _, answer in pieces], [len(string) for string, _ in pieces])[: length + 1].astype(np.uint8)
    weights[1:][row[:-1] == 32] *= 4
    return row, weights


class Batches(torch.utils.data.Dataset):
    """Item ``step`` is that step's batch: bytes and weights in the answer loss, both (rows, length + 1) of uint8."""

    def __init__(self, steps: list[tuple[int, int]], seed: int, mix: dict):
        self.steps, self.seed, self.mix = steps, seed, mix

    def __len__(self) -> int:
        return len(self.steps)

    def __getitem__(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        rows, length = self.steps[step]
        made = [make_row(length, (SEED, self.seed, step, row), self.mix) for row in range(rows)]
        return tuple(torch.from_numpy(np.stack([row[i] for row in made]).astype(np.uint8)) for i in range(2))


# ---------------------------------------------------------------------------------------------------------------- model
# The model is a dictionary of tensors under Hugging Face's names, and functions of them: a LoRA is then a sum of two
# matrices, and every layer shares one compiled graph.


def init(size: Size, device) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(SEED)
    out = {}

    def normal(name, rows, columns, std):
        out[name] = torch.empty(rows, columns).normal_(0, std, generator=generator)

    normal("model.embed_tokens.weight", 256, size.width, 1.0 / math.sqrt(size.width))
    for i in range(size.layers):
        at = f"model.layers.{i}."
        out[at + "input_layernorm.weight"] = torch.ones(size.width)
        out[at + "post_attention_layernorm.weight"] = torch.ones(size.width)
        std = size.width**-0.5
        for name, heads in (("q_proj", size.heads), ("k_proj", size.kv_heads), ("v_proj", size.kv_heads)):
            normal(at + f"self_attn.{name}.weight", heads * size.head_dim, size.width, std)
        into = std / math.sqrt(2 * size.layers)
        normal(at + "self_attn.o_proj.weight", size.width, size.heads * size.head_dim, into)
        normal(at + "mlp.gate_proj.weight", size.mlp, size.width, std)
        normal(at + "mlp.up_proj.weight", size.mlp, size.width, std)
        normal(at + "mlp.down_proj.weight", size.width, size.mlp, into * math.sqrt(size.width / size.mlp))
    out["model.norm.weight"] = torch.ones(size.width)
    normal("lm_head.weight", 256, size.width, 0.02)
    return {name: tensor.to(device) for name, tensor in out.items()}


def _linear(x, weight, dtype):
    return F.linear(x.to(dtype), weight.to(dtype))


def _norm(x, weight, eps):
    x = x.float()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def _rope(x, cos, sin):
    """x (N, H, D), cos and sin (N, D/2): halves rotated against each other, as Hugging Face's Llama does."""
    a, b = x.float().chunk(2, -1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def project(x, cos, sin, norm, wq, wk, wv, head_dim: int, eps: float, dtype, out_dtype):
    """Tokens x (N, width) to q (N, Hq, D), k and v (N, Hkv, D) in ``out_dtype``, q and k after RoPE."""
    h = _norm(x, norm, eps)
    q, k, v = (_linear(h, w, dtype).unflatten(-1, (-1, head_dim)) for w in (wq, wk, wv))
    return _rope(q, cos, sin).to(out_dtype), _rope(k, cos, sin).to(out_dtype), v.to(out_dtype)


def finish(x, heads, wo, norm, w_gate, w_up, w_down, eps: float, dtype):
    """Adds to x (N, width) the attention's output, heads (N, Hq * D) through o_proj, and then the MLP's."""
    x = x + _linear(heads, wo, dtype).float()
    h = _norm(x, norm, eps)
    h = F.silu(_linear(h, w_gate, dtype)) * _linear(h, w_up, dtype)
    return x + _linear(h, w_down, dtype).float()


def losses(x, norm, head, targets, answers, eps: float, dtype):
    """Mean cross-entropy over all bytes, and its mean weighted by ``answers``."""
    logits = _linear(_norm(x, norm, eps), head, dtype).float()
    each = F.cross_entropy(logits, targets, reduction="none")
    answers = answers.float()
    return each.mean(), (each * answers).sum() / answers.sum().clamp_min(1)


class Model:
    """The functions above over one set of weights; ``compiled`` for training on a GPU."""

    def __init__(self, size: Size, weights: dict, dtype=torch.float32, compiled: bool = False):
        self.size, self.weights, self.dtype = size, weights, dtype
        self.device = weights["lm_head.weight"].device
        wrap = (lambda f: torch.compile(f, dynamic=False)) if compiled else (lambda f: f)
        self.project, self.finish, self.losses, self.attend = wrap(project), wrap(finish), wrap(losses), wrap(attend)
        self.hedgehog = wrap(hedgehog)
        self._angles: dict = {}

    def with_weights(self, weights: dict) -> Model:
        other = object.__new__(Model)
        other.__dict__.update(self.__dict__, weights=weights)
        return other

    def angles(self, rows: int, length: int):
        """cos and sin (rows * length, D/2) for positions 0 .. length-1 in every row; kept."""
        if (rows, length) not in self._angles:
            cos, sin = self.angles_at(torch.arange(length, device=self.device))
            self._angles[rows, length] = cos.repeat(rows, 1), sin.repeat(rows, 1)
        return self._angles[rows, length]

    def angles_at(self, positions):
        d = self.size.head_dim
        frequencies = self.size.theta ** (-torch.arange(0, d, 2, device=self.device).float() / d)
        angle = positions.float()[:, None] * frequencies
        return angle.cos(), angle.sin()

    def __getitem__(self, name: str):
        return self.weights[name]

    def qkv(self, x, layer: int, cos, sin, rows: int, out_dtype=None):
        """q (B, Hq, T, D), k and v (B, Hkv, T, D) of the tokens x (B * T, width)."""
        at = f"model.layers.{layer}."
        out = self.project(
            x, cos, sin, self[at + "input_layernorm.weight"], *(self[at + f"self_attn.{p}.weight"] for p in QKVO[:3]),
            self.size.head_dim, self.size.eps, self.dtype, out_dtype or self.dtype,
        )  # fmt: skip
        return tuple(y.unflatten(0, (rows, -1)).transpose(1, 2) for y in out)

    def close(self, x, layer: int, heads):
        """The rest of a layer, given its heads' outputs (B, Hq, T, D)."""
        at = f"model.layers.{layer}."
        return self.finish(
            x, heads.transpose(1, 2).flatten(0, 1).flatten(1), self[at + "self_attn.o_proj.weight"],
            self[at + "post_attention_layernorm.weight"], *(self[at + f"mlp.{p}.weight"] for p in MLP), self.size.eps, self.dtype,
        )  # fmt: skip

    def embed(self, tokens):
        return F.embedding(tokens.flatten().long(), self["model.embed_tokens.weight"])

    def loss(self, x, targets, answers):
        return self.losses(
            x, self["model.norm.weight"], self["lm_head.weight"], targets.flatten().long(), answers.flatten(), self.size.eps, self.dtype
        )

    def logits(self, x):
        return _linear(_norm(x, self["model.norm.weight"], self.size.eps), self["lm_head.weight"], self.dtype).float()


# --------------------------------------------------------------------------------------------------------------- adapter


def new_maps(size: Size, device) -> dict[str, torch.Tensor]:
    return distill.new_maps(range(size.layers), size.heads, size.head_dim, size.features // 2, SEED + 1, device)


def new_lora(size: Size, weights: dict, stage: Stage, device) -> dict[str, torch.Tensor]:
    parts = [f"model.layers.{i}.{'mlp' if name in MLP else 'self_attn'}.{name}" for i in range(size.layers) for name in stage.lora]
    return distill.new_lora({part: tuple(weights[part + ".weight"].shape) for part in parts}, stage.rank, SEED + 2, device)


def merged(weights: dict, lora: dict, scale: float) -> dict[str, torch.Tensor]:
    """The weights with W + scale * B A in place of each W that has a LoRA."""
    out = dict(weights)
    for name in lora:
        if ".lora_A." in name:
            part = name.removeprefix("base_model.model.").split(".lora_A.")[0] + ".weight"
            out[part] = weights[part] + scale * lora[name.replace("lora_A", "lora_B")] @ lora[name]
    return out


def head_maps(maps: dict, layer: int):
    at = f"model.layers.{layer}.self_attn."
    return maps[at + "feature_map_q.mlp.layer"], maps[at + "feature_map_k.mlp.layer"], maps[at + "window_factors"].sigmoid().flatten()


def student_heads(model: Model, maps: dict, layer: int, q, k, v, mixing: str, sparse: int):
    """One layer's linearised heads (B, Hq, T, D) from its q, k, v."""
    size = model.size
    group = size.heads // size.kv_heads
    wq, wk, gate = head_maps(maps, layer)
    fq, fk = model.hedgehog(q, wq), model.hedgehog(k.repeat_interleave(group, 1), wk)
    made = plan(fk.detach(), v.detach().float().repeat_interleave(group, 1), size.chunk, size.window, sparse) if sparse else None
    return model.attend(q, k, v, fq, fk, gate, mixing, size.chunk, size.window, made, through_max=False)


# -------------------------------------------------------------------------------------------------------------- training


def train(name, out: Path, parts: dict, rates: dict, steps: list, mix_: dict, seed: int, loss, factor, seconds, decay=0.0, betas=(0.9, 0.95), workers=14):
    """Trains ``parts`` (name of part -> tensors) at ``rates``; ``loss(step, tokens, answers)`` runs the backward pass.

    Goes on from ``out/NAME.ckpt`` if there is one; writes it every two minutes and when ``seconds`` are over.
    """
    bundled("train")  # before the workers fork, so that they share it
    torch.set_float32_matmul_precision("high")
    fitted = loop.fit(
        name, parts, rates, Batches(steps, seed, mix_), lambda step, batch: loss(step, *batch), factor, folder=out, resume=True,
        decay=decay, betas=betas, seconds=seconds, workers=workers, describe=lambda batch: f"{batch[0].shape[1] - 1} bytes",
    )  # fmt: skip
    torch.set_float32_matmul_precision("highest")
    return {"steps": len(steps), "seconds": fitted.seconds, "log": fitted.log[-1:]}


def lengths_of_steps(size: Size) -> list[tuple[int, int]]:
    """(rows, bytes) of each step of the teacher's training; which length is drawn is fixed by the step."""
    draw = tasks.Draw(SEED, 99)
    out = []
    for steps, lengths in size.teacher:
        for _ in range(steps):
            at = draw.below(sum(share for _, share in lengths))
            for length, share in lengths:
                at -= share
                if at < 0:
                    break
            out.append((max(1, size.bytes_per_step // length), length))
    return out


def train_teacher(size: Size, out: Path, device, seconds: float, workers: int) -> None:
    """0.3 x language-model loss + the mean over answer bytes; AdamW 2e-3, flat to 60 %, then falling to 2 %."""
    weights = init(size, device)
    model = Model(size, weights, torch.bfloat16 if device.type == "cuda" else torch.float32, compiled=device.type == "cuda")

    def loss(step, tokens, answers):
        rows, length = tokens.shape[0], tokens.shape[1] - 1
        cos, sin = model.angles(rows, length)
        x = model.embed(tokens[:, :-1])
        for i in range(size.layers):
            x = model.close(x, i, softmax_attention(*model.qkv(x, i, cos, sin, rows)))
        lm, answer = model.loss(x, tokens[:, 1:], answers[:, 1:])
        (0.3 * lm + answer).backward()
        return torch.stack((lm, answer)).detach()

    def factor(done, step):
        return min(1.0, (step + 1) / 100) * (1.0 if done < 0.6 else 1 - 0.98 * (done - 0.6) / 0.4)

    steps = lengths_of_steps(size)
    report = train("teacher", out, {"model": weights}, {"model": 2e-3}, steps, TEACHER_MIX, 0, loss, factor, seconds, 0.01, workers=workers)
    save_file({name: tensor.half().contiguous() for name, tensor in weights.items()}, out / "model.safetensors", {"format": "pt"})
    done(out, "teacher", report)


def load_teacher(size: Size, out: Path, device) -> dict[str, torch.Tensor]:
    """The teacher as released, that is in fp16, widened to float32."""
    return {name: tensor.float().to(device) for name, tensor in load_file(out / "model.safetensors").items()}


def done(out: Path, stage: str, report: dict) -> None:
    """Adds a stage's report to DIR/stages.json and drops its checkpoint."""
    path = out / "stages.json"
    stages = json.loads(path.read_text()) if path.exists() else {}
    stages[stage] = {**report, "torch": torch.__version__, "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"}
    path.write_text(json.dumps(stages, indent=1) + "\n")
    (out / f"{stage}.ckpt").unlink(missing_ok=True)


def steps_of(size: Size, stage: Stage) -> list[tuple[int, int]]:
    rows, length = stage.batch
    scale = min(1.0, size.long / 8192)
    return [(max(1, rows // (1 if scale == 1 else 8)), int(length * scale) if length == 8192 else min(length, size.short))] * max(
        4, round(stage.steps * size.scale_steps)
    )


def train_transfer(size: Size, weights: dict, maps: dict, stage: Stage, name: str, out: Path, device, seconds, workers) -> dict:
    """Attention transfer: each head's output under "lolcats" against its softmax output, 1000 x MSE, on the teacher's own inputs."""
    gpu = device.type == "cuda"
    model = Model(size, weights, torch.bfloat16 if gpu else torch.float32, compiled=gpu)

    def loss(step, tokens, answers):
        rows, length = tokens.shape[0], tokens.shape[1] - 1
        cos, sin = model.angles(rows, length)
        mixing, sparse = stage.attention[step % len(stage.attention)]
        with torch.no_grad():
            x = model.embed(tokens[:, :-1])
        total = 0
        for i in range(size.layers):
            with torch.no_grad():
                q, k, v = model.qkv(x, i, cos, sin, rows)
                target = softmax_attention(q, k, v)
                x = model.close(x, i, target)
            error = 1000 * (student_heads(model, maps, i, q, k, v, mixing, sparse) - target.float()).square().mean()
            error.backward()
            total = total + error.detach()
        return total[None] / size.layers

    parts = distill.split_maps(maps)
    return train(name, out, parts, stage.rates, steps_of(size, stage), TEACHER_MIX, stage.seed, loss, lambda done, _: 1 - done, seconds, betas=(0.9, 0.999), workers=workers)


def train_lora(size: Size, weights: dict, maps: dict, lora: dict, stage: Stage, name: str, out: Path, device, seconds, workers) -> dict:
    """LoRA of the linearised model on ``stage.lm`` x language-model loss + ``stage.answer`` x the mean over answer bytes."""
    gpu = device.type == "cuda"
    base = Model(size, weights, torch.bfloat16 if gpu else torch.float32, compiled=gpu)

    def loss(step, tokens, answers):
        rows, length = tokens.shape[0], tokens.shape[1] - 1
        cos, sin = base.angles(rows, length)
        mixing, sparse = stage.attention[step % len(stage.attention)]
        model = base.with_weights(merged(weights, lora, stage.alpha / stage.rank))
        x = model.embed(tokens[:, :-1])
        for i in range(size.layers):
            x = model.close(x, i, student_heads(model, maps, i, *model.qkv(x, i, cos, sin, rows), mixing, sparse))
        lm, answer = model.loss(x, tokens[:, 1:], answers[:, 1:])
        (stage.lm * lm + stage.answer * answer).backward()
        return torch.stack((lm, answer)).detach()

    def factor(done, step):
        return min(1.0, (step + 1) / 50) * (1 - done)

    parts = {**distill.split_lora(lora), **distill.split_maps(maps)}
    return train(name, out, parts, stage.rates, steps_of(size, stage), ADAPTER_MIX, stage.seed, loss, factor, seconds, betas=(0.9, 0.99), workers=workers)


class _Weighted:
    """Batches with each byte's weight in the loss ``stage.lm`` x mean + ``stage.answer`` x mean over answers."""

    def __init__(self, batches: Batches, stage: Stage):
        self.batches, self.stage = batches, stage

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        tokens, answers = self.batches[step]
        answers = answers.float()
        lm, answer = self.stage.lm / answers[:, 1:].numel(), self.stage.answer / answers[:, 1:].sum().clamp_min(1)
        return tokens, lm + answer * answers


def as_distilled(steps: int | None = None, lora_steps: int | None = None) -> list[tuple]:
    """Data and arguments of ``lola.torch.distill.transfer`` and ``finetune`` for the adapter ``needle``; steps: other numbers."""
    out, size = [], Size()
    for name, given, mix_, seed in (("transfer", steps, TEACHER_MIX, SEED + 1), ("lora", lora_steps, ADAPTER_MIX, SEED + 2)):
        stage = STAGES[name]
        batches = Batches([stage.batch] * (stage.steps if given is None else given), stage.seed, mix_)
        config = [lola.Config(size.window, size.chunk, sparse, mixing) for mixing, sparse in stage.attention]
        recipe = {"config": config, "rates": stage.rates, "seed": seed}
        if stage.lora:
            batches = _Weighted(batches, stage)
            recipe |= {"rank": stage.rank, "alpha": stage.alpha, "targets": stage.lora}
        out.append((batches, recipe))
    return out


# ------------------------------------------------------------------------------------------------------------ evaluation


@dataclass(frozen=True)
class Attention:
    """One row of the tables: "softmax", or a linearised model with this mixing, window and sparse cache."""

    name: str
    mixing: str = "gated"
    window: int = 64
    sparse: int = 0


class Decoder:
    """Greedy decoding of a batch of prompts of different lengths, positions counted in each row from 0.

    Prefill runs layer by layer over the padded batch: what follows a row's end never reaches what precedes it. Then each row
    takes up the sparse cache and state of the chunk that its last token is in, and decoding goes on row by row position.
    """

    def __init__(self, model: Model, attention: Attention, maps: dict | None, slice_tokens: int = 400_000):
        self.model, self.attention, self.maps = model, attention, maps
        self.size = replace(model.size, window=attention.window)
        self.slice_tokens = slice_tokens

    @torch.no_grad()
    def generate(self, prompts: list[bytes], most: int) -> list[bytes]:
        size, model, device = self.size, self.model, self.model.device
        lengths = [len(p) for p in prompts]
        rows, longest = len(prompts), -(-max(lengths) // size.chunk) * size.chunk
        padded = np.zeros((rows, longest), np.uint8)
        for row, prompt in zip(padded, prompts):
            row[: len(prompt)] = np.frombuffer(prompt, np.uint8)
        at = torch.tensor(lengths, device=device)
        x = self._prefill(torch.from_numpy(padded).to(device), at, most)
        token = model.logits(x.unflatten(0, (rows, -1))[torch.arange(rows, device=device), at - 1]).argmax(-1)
        generated = [token]
        finished = token == 10
        for step in range(1, most):
            if bool(finished.all()):
                break
            token = self._step(token, at + step - 1, [n + step - 1 for n in lengths])
            generated.append(token)
            finished |= token == 10
        self.keys = self.values = self.memory = None
        return [bytes(row).split(b"\n")[0] for row in torch.stack(generated, 1).to(torch.uint8).cpu().numpy()]

    def _prefill(self, tokens, lengths, most: int):
        size, model = self.size, self.model
        rows, length = tokens.shape
        x = model.embed(tokens)
        cos, sin = model.angles_at(torch.arange(length, device=x.device))
        cuts = range(0, rows, max(1, self.slice_tokens // length))
        self.keys, self.values, self.memory = [], [], []
        group = size.heads // size.kv_heads
        last = (lengths - 1) // size.chunk
        for i in range(size.layers):
            parts = []
            for cut in cuts:
                piece = x.unflatten(0, (rows, -1))[cut : cut + cuts.step]
                n = piece.shape[0]
                parts.append(model.qkv(piece.flatten(0, 1), i, cos.repeat(n, 1), sin.repeat(n, 1), n))
            q, k, v = (torch.cat(list(p)) for p in zip(*parts))
            del parts
            softmax = self.attention.name == "softmax"
            if not softmax:
                wq, wk, gate = head_maps(self.maps, i)
                made = None
                if self.attention.sparse:
                    made = plan(hedgehog(k.repeat_interleave(group, 1), wk), v.repeat_interleave(group, 1), size.chunk, size.window, self.attention.sparse)
            memory = []
            new = torch.empty_like(x)
            for cut in cuts:
                at = slice(cut, cut + cuts.step)
                if softmax:
                    half = torch.float16 if x.is_cuda else torch.float32
                    heads = softmax_attention(q[at].to(half), k[at].to(half), v[at].to(half)).float()
                else:
                    kr, vr = k[at].repeat_interleave(group, 1), v[at].repeat_interleave(group, 1)
                    fq, fk = hedgehog(q[at], wq), hedgehog(kr, wk)
                    some = None if made is None else replace(made, sparse=made.sparse[at], fold=made.fold[at])
                    heads = attend(q[at], k[at], v[at], fq, fk, gate, self.attention.mixing, size.chunk, size.window, some)
                    hidden, norm = states(fk, vr, size.chunk, size.window, some)
                    here = torch.arange(hidden.shape[0], device=x.device), slice(None), last[at]
                    empty = torch.zeros(*kr.shape[:2], 0, dtype=torch.long, device=x.device)
                    memory.append((hidden[here], norm[here], empty if some is None else some.sparse[here]))
                    del kr, vr, fq, fk, hidden, norm
                tokens_at = slice(cut * length, (cut + cuts.step) * length)
                new[tokens_at] = model.close(x[tokens_at], i, heads)
                del heads
            x = new
            room = (0, 0, 0, most + size.chunk)
            self.keys.append(F.pad(k, room))
            self.values.append(F.pad(v, room))
            if not softmax:
                hidden, norm, cache = (torch.cat(list(p)) for p in zip(*memory))
                kept = torch.zeros_like(last) if made is None else made.kept[last]
                self.memory.append([hidden, norm, cache, kept])
        return x

    def _pairs(self, layer: int, index):
        """Keys and values (B, Hq, S, D) at positions index (B, Hq, S)."""
        grouped = index.unflatten(1, (self.size.kv_heads, -1)).flatten(2)
        return tuple(take(x[layer], grouped).unflatten(2, (-1, index.shape[2])).flatten(1, 2) for x in (self.keys, self.values))

    def _update(self, layer: int, positions, chunks):
        """The rows that begin a chunk: pairs that leave the window go to the sparse cache or are folded."""
        size, sparse = self.size, self.attention.sparse
        hidden, norm, cache, kept = self.memory[layer]
        lag = size.window // size.chunk + 1
        due = (positions % size.chunk == 0) & (chunks >= lag)
        leaving = ((chunks - lag).clamp_min(0) * size.chunk)[:, None, None] + torch.arange(size.chunk, device=positions.device)
        pool = torch.cat((cache, leaving.expand(-1, size.heads, -1)), -1)
        entry = torch.arange(pool.shape[-1], device=pool.device)
        real = ((entry < kept[:, None]) | (entry >= sparse))[:, None].expand_as(pool)
        k, v = self._pairs(layer, pool)
        f = hedgehog(k, head_maps(self.maps, layer)[1])
        scores = self_recall(f, v, hidden, norm).masked_fill(~real, -torch.inf)
        order = scores.sort(dim=-1, descending=True, stable=True).indices
        stay, drop = order[..., :sparse], order[..., sparse:]
        # In order of position, empty places last.
        place = torch.where(real, pool, 1 << 40).gather(-1, stay).sort(-1).values
        place = torch.where(place == 1 << 40, 0, place)
        f, v = take(f, drop) * real.gather(-1, drop)[..., None], take(v, drop)
        row = due[:, None, None]
        self.memory[layer] = [
            torch.where(row[..., None], hidden + f.transpose(-1, -2) @ v, hidden),
            torch.where(row, norm + f.sum(2), norm),
            torch.where(row, place, cache),
            torch.where(due, (kept + size.chunk).clamp_max(sparse), kept),
        ]

    def _step(self, token, positions, known: list[int]):
        size, model = self.size, self.model
        rows = len(token)
        x = model.embed(token)
        cos, sin = model.angles_at(positions)
        chunks = positions // size.chunk
        every = torch.arange(rows, device=x.device)
        update = any(p % size.chunk == 0 for p in known)
        softmax = self.attention.name == "softmax"
        for i in range(size.layers):
            q, k, v = model.qkv(x, i, cos, sin, rows)
            self.keys[i][every, :, positions] = k[:, :, 0]
            self.values[i][every, :, positions] = v[:, :, 0]
            if softmax:
                seen = torch.arange(self.keys[i].shape[2], device=x.device) <= positions[:, None]
                grouped = q.squeeze(2).unflatten(1, (size.kv_heads, -1))
                heads = F.scaled_dot_product_attention(grouped, self.keys[i], self.values[i], attn_mask=seen[:, None, None]).flatten(1, 2)[:, :, None]
            else:
                if update:
                    self._update(i, positions, chunks)
                hidden, norm, cache, kept = self.memory[i]
                near = (chunks * size.chunk - size.window)[:, None] + torch.arange(size.window + size.chunk, device=x.device)
                real = (near >= 0) & (near <= positions[:, None])
                sparse = torch.arange(cache.shape[-1], device=x.device) < kept[:, None]
                real = torch.cat((sparse, real), -1)[:, None, None]
                k, v = self._pairs(i, torch.cat((cache, near.clamp_min(0)[:, None].expand(-1, size.heads, -1)), -1))
                logits = (q @ k.transpose(-1, -2) * size.head_dim**-0.5).masked_fill(~real, -torch.inf)
                wq, _, gate = head_maps(self.maps, i)
                fq = hedgehog(q, wq)
                heads = mix(logits, v, fq @ hidden, fq @ norm[..., None], gate[:, None, None], self.attention.mixing)
            x = model.close(x, i, heads)
        return model.logits(x).argmax(-1)


def wilson(share: float, count: int) -> tuple[float, float]:
    """The 95 % interval of a share by Wilson's score method."""
    z = 1.959964
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return max(0.0, middle - half), min(1.0, middle + half)


def longer_window(size: Size) -> int:
    """The window, in whole chunks, whose KV pairs are as many as LoLA's window and its sparse cache per query head."""
    return size.window + size.sparse * size.heads // size.kv_heads // size.chunk * size.chunk


def rows_of(size: Size) -> list[Attention]:
    return [
        Attention("lola", "gated", size.window, size.sparse),
        Attention("base", "lolcats", size.window),
        Attention("base", "gated", size.window),
        Attention("cache_only", "cache_only", size.window, size.sparse),
        Attention("window", "gated", longer_window(size)),
    ]


def measure(model: Model, attention: Attention, maps, names, lengths, count: int, seed: int, split: str, label: str, batch_tokens=1_700_000) -> list[dict]:
    """Accuracy on the fixed samples, one dictionary for each task and length."""
    found = []
    for length in lengths:
        decoder = Decoder(model, attention, maps)
        samples = [sample for name in names for sample in tasks.fixed_samples(name, length, count, seed, split)]
        size = max(1, batch_tokens // length)
        scores, begin = [], time.time()
        # Long answers together, so that a batch is not kept waiting for one of them.
        order = sorted(range(len(samples)), key=lambda i: len(samples[i].answer))
        answers = [b""] * len(samples)
        for cut in range(0, len(samples), size):
            batch = order[cut : cut + size]
            for i, answer in zip(batch, decoder.generate([samples[i].prompt.encode() for i in batch], samples[batch[0]].generate)):
                answers[i] = answer
        seconds = time.time() - begin
        scores = [tasks.score(s.task, a.decode("latin-1"), s.references) for s, a in zip(samples, answers)]
        for j, name in enumerate(names):
            mean = sum(scores[j * count : (j + 1) * count]) / count
            low, high = wilson(mean, count)
            found.append({
                "model": label, "attention": attention.name, "mixing": None if attention.name == "softmax" else attention.mixing,
                "task": name, "length": length, "sparse": attention.sparse, "window": None if attention.name == "softmax" else attention.window,
                "samples": count, "seed": seed, "split": split, "accuracy": round(mean, 4), "low": round(low, 4), "high": round(high, 4),
                "example": [samples[j * count].answer, answers[j * count].decode("latin-1")],
            })  # fmt: skip
        shown = " ".join(f"{row['accuracy']:.3f}" for row in found[-len(names) :])
        print(f"{label:10s} {attention.name:10s} {attention.mixing:10s} {split} {length:5d} {shown}  {seconds:.1f} s", flush=True)
    return found


def load_adapter(folder: Path, device) -> tuple[dict, dict, float]:
    """Feature maps with gates, LoRA, and the LoRA's scale, from an adapter's folder."""
    spec = json.loads((folder / "adapter.json").read_text())["lora"]
    maps = {name: tensor.float().to(device) for name, tensor in load_file(folder / "feature_maps.safetensors").items()}
    lora = {name: tensor.float().to(device) for name, tensor in load_file(folder / "lora.safetensors").items()}
    return maps, lora, spec["alpha"] / spec["r"]


def save_adapter(folder: Path, size: Size, maps: dict, lora: dict, stage: Stage) -> None:
    spec = {"feature_map": "softmax_dim", "window": size.window, "chunk": size.chunk, "mixing": "lolcats"}
    distill.write_adapter(folder, maps, lora, {**spec, "lora": {"r": stage.rank, "alpha": stage.alpha}}, torch.float16)


def evaluate(size: Size, folder: Path, device, count: int, names, lengths, seed: int, split: str, models, save) -> None:
    """The rows of the tables for each of ``models`` ("teacher" or an adapter); ``save(rows)`` is called after each."""
    weights = {name: tensor.float().to(device) for name, tensor in load_file(folder / "model.safetensors").items()}
    found: list[dict] = []
    for label in models:
        model, maps, kinds = Model(size, weights), None, [Attention("softmax")]
        if label != "teacher":
            maps, lora, scale = load_adapter(folder / label, device)
            model, kinds = Model(size, merged(weights, lora, scale)), rows_of(size)
        for attention in kinds:
            for length in lengths:
                found += measure(model, attention, maps, names, [length], count, seed, split, label)
                save(found)


# ---------------------------------------------------------------------------------------------------------------- export


def export(size: Size, out: Path, folder: Path) -> None:
    """The Hugging Face folder: weights in fp16, configuration, byte-level tokenizer, both adapters."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.safetensors").write_bytes((out / "model.safetensors").read_bytes())
    for adapter in ("needle", "needle-8k"):
        if (out / adapter).is_dir():
            (folder / adapter).mkdir(exist_ok=True)
            for name in ("feature_maps.safetensors", "lora.safetensors", "adapter.json"):
                (folder / adapter / name).write_bytes((out / adapter / name).read_bytes())

    def write(name, value):
        (folder / name).write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", "utf-8")

    rope = {"rope_theta": size.theta, "rope_type": "default"}
    write("config.json", {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 256, "hidden_size": size.width,
        "intermediate_size": size.mlp, "num_hidden_layers": size.layers, "num_attention_heads": size.heads,
        "num_key_value_heads": size.kv_heads, "head_dim": size.head_dim, "hidden_act": "silu", "max_position_embeddings": 8192,
        "rms_norm_eps": size.eps, "rope_theta": size.theta, "rope_scaling": None, "rope_parameters": rope, "attention_bias": False,
        "mlp_bias": False, "tie_word_embeddings": False, "bos_token_id": None, "eos_token_id": 10, "pad_token_id": 0,
        "torch_dtype": "float16", "use_cache": True,
    })  # fmt: skip
    write("generation_config.json", {"do_sample": False, "eos_token_id": 10, "pad_token_id": 0})
    # A byte's printable stand-in, as in every byte-level BPE: printable Latin-1 stands for itself, the rest from U+0100 on.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    stand_in = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    write("tokenizer.json", {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [{"id": 0, "content": stand_in[0], **special}],
        "normalizer": None, "pre_tokenizer": level, "post_processor": None, "decoder": level,
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None,
            "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
            "vocab": {stand_in[byte]: byte for byte in range(256)}, "merges": [],
        },
    })  # fmt: skip
    write("tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 8192, "pad_token": stand_in[0], "eos_token": stand_in[10],
        "clean_up_tokenization_spaces": False, "add_bos_token": False,
    })  # fmt: skip


# ------------------------------------------------------------------------------------------------------------------ main


def adapter_stage(name: str, size: Size, out: Path, device, seconds: float, workers: int) -> None:
    """One of transfer, lora, transfer-8k, lora-8k, reading what came before it from ``out``."""
    stage = STAGES[name]
    weights = load_teacher(size, out, device)
    source = {"transfer": None, "lora": "transfer", "transfer-8k": "transfer", "lora-8k": "transfer-8k"}[name]
    maps = new_maps(size, device) if source is None else {k: t.to(device) for k, t in load_file(out / f"{source}.safetensors").items()}
    if name.startswith("transfer"):
        report = train_transfer(size, weights, maps, stage, name, out, device, seconds, workers)
        save_file({k: t.detach().contiguous() for k, t in maps.items()}, out / f"{name}.safetensors")
    else:
        # At 8192 bytes the LoRA goes on from the one trained at 1024.
        lora = new_lora(size, weights, stage, device) if name == "lora" else load_adapter(out / "needle", device)[1]
        report = train_lora(size, weights, maps, lora, stage, name, out, device, seconds, workers)
        save_adapter(out / ("needle-8k" if name == "lora-8k" else "needle"), size, maps, lora, stage)
    done(out, name, {**report, "recipe": asdict(stage)})


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("stage", choices=["teacher", *STAGES, "export", "evaluate"])
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoints and results of all stages")
    parser.add_argument("--folder", type=Path, help="export: where to write, evaluate: what to read (default: OUT/hf)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=540, help="stop with a checkpoint after this time")
    parser.add_argument("--workers", type=int, default=14, help="processes that write training rows")
    parser.add_argument("--samples", type=int, default=200)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--split", default="eval", choices=["eval", "other", "valid"])
    parser.add_argument("--tasks", default=",".join(EVALUATED))
    parser.add_argument("--lengths", default="1024,2048,4096,8192")
    parser.add_argument("--models", default="teacher,needle,needle-8k", help="evaluate: which of them")
    parser.add_argument("--json", type=Path, help="evaluate: file for the figures (default: OUT/evaluation.json)")
    parser.add_argument("--tiny", action="store_true", help="a toy size, to try the script")
    options = parser.parse_args(argv)
    size = TINY if options.tiny else Size()
    device = torch.device(options.device)
    options.out.mkdir(parents=True, exist_ok=True)
    folder = options.folder or options.out / "hf"
    torch.manual_seed(SEED)
    torch._dynamo.config.recompile_limit = 64
    try:
        if options.stage == "teacher":
            train_teacher(size, options.out, device, options.seconds, options.workers)
        elif options.stage in STAGES:
            adapter_stage(options.stage, size, options.out, device, options.seconds, options.workers)
    except loop.Unfinished as unfinished:
        raise SystemExit(str(unfinished)) from None
    if options.stage == "export":
        export(size, options.out, folder)
    elif options.stage == "evaluate":
        begin = time.time()
        name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"

        def save(rows):
            report = {"device": name, "torch": torch.__version__, "seconds": round(time.time() - begin, 1), "rows": rows}
            (options.json or options.out / "evaluation.json").write_text(json.dumps(report, indent=1) + "\n")

        evaluate(
            size, folder, device, options.samples, options.tasks.split(","), [int(n) for n in options.lengths.split(",")],
            options.seed, options.split, options.models.split(","), save,
        )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
