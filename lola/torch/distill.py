"""Trains feature maps, gates and LoRA weights for any Llama, Mistral, Qwen2 or Qwen3 of Hugging Face, as LoLCATs does it.

    transfer       attention transfer: maps and gates that imitate each softmax head (LoLCATs, arXiv 2410.10254, stage 1)
    finetune       LoRA on the language-model loss of the linearised model (stage 2), the sparse cache at work
    Distilled      what they return; `save` writes the folder that `lola.torch.load_lolcats` and `lola.models` read
    Rows           batches of equal rows of one long text
    new_maps, new_lora, split_maps, split_lora, write_adapter     the weights, under LoLCATs' and PEFT's names
    count_memory   the peak memory of one step, counted without computing it

Both train with the sparse cache and mixing of any lola.Config (LoLA, arXiv 2505.23666), through `lola.torch.hybrid`. What must
be in memory at once is linear in the length of a row: one layer's attention at a time in transfer, one layer's activations and
each layer's input in finetuning. As one command:

    python -m lola.torch.distill --model meta-llama/Llama-3.1-8B --text text.txt --out adapter
    python -m lola.torch.distill --model needle --text needle-tasks --out adapter      # the bundled adapter's data and recipe
    python -m lola.torch.distill --dry-run                                             # memory of one 8B-shaped step

(The second takes seven minutes of an H200. What it trained there recalls needles as well as the shipped adapter or better:
`benchmarks/results/needle_distill_h200.json`. The shipped one comes from `lola.models.train_needle`, the same recipe with a
gradient that leaves out the largest logit, see `hybrid.mix`.) And in a script:

>>> model = transformers.AutoModelForCausalLM.from_pretrained("folder")                               # doctest: +SKIP
>>> data = Rows(ids, length=1024, rows=8, steps=1000)                                                 # doctest: +SKIP
>>> maps = transfer(model, lola.Config(sparse=0, mixing="lolcats"), data, folder="run", resume=True)  # doctest: +SKIP
>>> configs = [lola.Config(sparse=32), lola.Config(sparse=0, mixing="lolcats")]                       # doctest: +SKIP
>>> finetune(model, configs, maps, data, folder="run", resume=True).save("adapter")                   # doctest: +SKIP
>>> model = lola.torch.load_lolcats("folder", "adapter")                                              # doctest: +SKIP

A run that is killed goes on from its last checkpoint: every batch is a function of the step's number, and checkpoints hold
weights, optimizer and random states, so on a CPU the losses and weights are those of an undisturbed run, bit for bit. (Some
sums on a GPU depend on the order in which its threads arrive.)
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lola

from . import hybrid
from .loop import Allocations, Unfinished, falling, fit, peak_memory, reset_peak, warmed

QKVO = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
_ERROR = 1000  # LoLCATs multiplies the mean square of attention transfer by it
_NAMES = {"hedgehog": "softmax_dim", "hedgehog_exp": "exp_dim"}  # LoLCATs' names of the maps that an adapter can hold
_LOGITS = 1024  # tokens whose logits are in memory at once
_ROWS = "lola_rows"  # the attention implementation while training: no masks, as there is no padding


# --- data -----------------------------------------------------------------------------------------------------------------


class Rows:
    """Batches of a long text: item `step` is a LongTensor (rows, length + 1) of tokens.

    The text is cut into rows of `length` tokens, each with the first token of the next one as its last target. Every epoch
    takes them in another order, which depends on the seed alone.

    Args:
        tokens: (N,) integers.
        length: Tokens of a row.
        rows: Rows of a batch.
        steps: Number of batches; they may go through the text several times.
        seed: Of the order.

    Raises:
        ValueError: A text shorter than one row.

    >>> data = Rows(torch.arange(100), length=10, rows=2, steps=3)
    >>> len(data), data[0].shape, bool((data[2] == data[2][:, :1] + torch.arange(11)).all())
    (3, torch.Size([2, 11]), True)
    """

    def __init__(self, tokens: Any, length: int, rows: int, steps: int, seed: int = 0):
        self.tokens = torch.as_tensor(tokens).flatten()
        for name, value in (("length", length), ("rows", rows), ("steps", steps)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.length, self.rows, self.steps, self.seed = length, rows, steps, seed
        self.count = (len(self.tokens) - 1) // length
        if self.count < 1:
            raise ValueError(f"tokens must be more than one row of {length}, got {len(self.tokens)}")
        self._order: tuple[int, Tensor] = (-1, torch.empty(0))

    def __len__(self) -> int:
        return self.steps

    def _row(self, number: int) -> Tensor:
        epoch, at = divmod(number, self.count)
        if self._order[0] != epoch:
            generator = torch.Generator().manual_seed((self.seed << 20) + epoch)
            self._order = epoch, torch.randperm(self.count, generator=generator)
        first = int(self._order[1][at]) * self.length
        return self.tokens[first : first + self.length + 1].long()

    def __getitem__(self, step: int) -> Tensor:
        if not 0 <= step < self.steps:
            raise IndexError(step)
        return torch.stack([self._row(step * self.rows + i) for i in range(self.rows)])


# --- weights that are trained, and the adapter that holds them ----------------------------------------------------------------


def new_maps(layers: Iterable[int], heads: int, head_dim: int, columns: int, seed: int, device: Any = None) -> dict[str, Tensor]:
    """Untrained maps under LoLCATs' names: normal weights (heads, head_dim, columns) of deviation head_dim ** -0.5, gates of 0.1."""
    generator = torch.Generator().manual_seed(seed)
    out = {}
    for i in layers:
        at = f"model.layers.{i}.self_attn."
        for side in "qk":
            w = torch.empty(heads, head_dim, columns, device="cpu").normal_(0, head_dim**-0.5, generator=generator)
            out[f"{at}feature_map_{side}.mlp.layer"] = w.to(device)
        out[at + "window_factors"] = torch.full((1, heads, 1, 1), -2.197, device=device)
    return out


def new_lora(shapes: Mapping[str, tuple[int, int]], rank: int, seed: int, device: Any = None) -> dict[str, Tensor]:
    """LoRA weights that change nothing yet, under PEFT's names, for linear layers by name and shape (outputs, inputs)."""
    generator = torch.Generator().manual_seed(seed)
    out = {}
    for part, (rows, columns) in shapes.items():
        a = torch.empty(rank, columns, device="cpu").uniform_(-1, 1, generator=generator) * columns**-0.5
        out[f"base_model.model.{part}.lora_A.default.weight"] = a.to(device)
        out[f"base_model.model.{part}.lora_B.default.weight"] = torch.zeros(rows, rank, device=device)
    return out


def split_maps(maps: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The parts "maps" and "gates"."""
    gates = {name: tensor for name, tensor in maps.items() if name.endswith("window_factors")}
    return {"maps": {name: tensor for name, tensor in maps.items() if name not in gates}, "gates": gates}


def split_lora(lora: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The parts "lora" and "lora_qk", the LoRA of q and k, which move the features."""
    qk = {name: tensor for name, tensor in lora.items() if ".q_proj." in name or ".k_proj." in name}
    return {"lora": {name: tensor for name, tensor in lora.items() if name not in qk}, "lora_qk": qk}


def write_adapter(folder: str | os.PathLike, maps: Mapping, lora: Mapping, spec: Mapping, lora_dtype: Any = torch.float32) -> None:
    """Writes adapter.json, feature_maps.safetensors and, unless `lora` is empty, lora.safetensors."""
    from safetensors.torch import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({k: t.detach().float().contiguous() for k, t in maps.items()}, folder / "feature_maps.safetensors", {"format": "pt"})
    if lora:
        save_file({k: t.detach().to(lora_dtype).contiguous() for k, t in lora.items()}, folder / "lora.safetensors", {"format": "pt"})
    (folder / "adapter.json").write_text(json.dumps(spec, indent=1) + "\n")


@dataclass
class Distilled:
    """What `transfer` and `finetune` return.

    Attributes:
        maps: Feature maps and window factors under LoLCATs' names, float32 on the CPU.
        lora: LoRA weights under PEFT's names, likewise; {} after `transfer`.
        spec: What adapter.json says: feature map, window, chunk, mixing, LoRA's r and alpha.
        losses: Of each step: 1000 x the mean square error, averaged over layers; or the language-model loss.
        seconds: All runs together.
        peak_bytes: Peak memory of the last run: torch.cuda.max_memory_allocated, or the process's resident peak.
    """

    maps: dict[str, Tensor]
    lora: dict[str, Tensor]
    spec: dict[str, Any]
    losses: list[float] = field(default_factory=list, repr=False)
    seconds: float = 0.0
    peak_bytes: int = 0

    def save(self, folder: str | os.PathLike) -> None:
        """Writes the folder that `lola.torch.load_lolcats(base, folder)` reads, and `lola.models.Llama` as an adapter."""
        write_adapter(folder, self.maps, self.lora, self.spec)


def _cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().float().cpu().clone() for name, tensor in tensors.items()}


# --- attention transfer -------------------------------------------------------------------------------------------------------


class _Teacher(nn.Module):
    """A layer's softmax attention, which on its way teaches the LoLA attention made of it."""

    def __init__(self, student: nn.Module):
        super().__init__()
        self.student, self.share, self.error = student, 1.0, None

    def forward(self, hidden_states: Tensor, position_embeddings: Any, attention_mask: Any = None, **kwargs: Any) -> tuple[Tensor, None]:
        student = self.student
        q, k, v = student.project(hidden_states, position_embeddings)
        heads = hybrid.softmax_attention(*(x.transpose(1, 2) for x in (q, k, v)), student.config.scale).transpose(1, 2)
        # One layer's graph at a time: it is gone before the next layer begins.
        with torch.enable_grad(), torch.autocast(q.device.type, enabled=False):
            error = _ERROR * (student.differentiable(q, k, v) - heads.to(torch.promote_types(heads.dtype, torch.float32))).square().mean()
            (error * self.share).backward()
        error = error.detach() * self.share
        self.error = error if self.error is None else self.error + error
        return student.o_proj(heads.flatten(2)), None


def transfer(
    model: Any,
    config: lola.Config | Sequence[lola.Config] | None = None,
    data: Any = None,
    *,
    feature_map: str = "hedgehog",
    feature_dim: int | None = None,
    maps: Any = None,
    rates: Mapping[str, float] | None = None,
    betas: tuple[float, float] = (0.9, 0.999),
    rows_at_once: int | None = None,
    segment: int = hybrid.SEGMENT,
    precision: str | None = None,
    seed: int = 0,
    folder: str | os.PathLike | None = None,
    resume: bool = False,
    **loop: Any,
) -> Distilled:
    """Attention transfer (LoLCATs, arXiv 2410.10254, stage 1): feature maps and gates that imitate each softmax head.

    Every layer sees what it sees in the softmax model, whose heads come from scaled_dot_product_attention, and learns
    1000 x the mean square difference of its LoLA heads from them. The model itself is not changed.

    Args:
        model: A LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM or Qwen3ForCausalLM, of any float dtype; over several
            devices by `device_map` too.
        config: A lola.Config, or several that the steps use in turn; default: lola.Config(sparse=0, mixing="lolcats"), as
            LoLCATs trains. Its window and chunk must be those of all.
        data: Batches, `len()` and `[step]`: LongTensors (rows, length + 1), or tuples that begin with one; no padding. See `Rows`.
        feature_map: "hedgehog" or "hedgehog_exp".
        feature_dim: F, default D, or that of `maps`.
        maps: Maps to begin with instead of random ones: a dict of tensors, a file or folder, or a `Distilled`.
        rates: Learning rates of the parts "maps" and "gates"; default 1e-2 each; a part without one stays as it is.
        betas: AdamW's.
        rows_at_once: Rows of a batch that are in memory together; default: all. Gradients add up.
        segment: Tokens that the student computes at once: see `lola.torch.hybrid.attention`.
        precision: "bf16" (autocast; what is trained stays float32) or "fp32"; default "bf16" on CUDA.
        seed: Of the random maps.
        folder: For the checkpoint transfer.ckpt; None: none.
        resume: Go on from it.
        **loop: `seconds`, `save_seconds`, `save_steps`, `workers`: see `fit`.

    Returns:
        A `Distilled` without LoRA.

    Raises:
        TypeError: Another kind of model, configuration or data.
        ValueError: What the student cannot do: the scores "random", "attention" and "external"; layers with a sliding window;
            a model that is LoLA already. And as `fit`.
    """
    run = _Transfer(model, config, feature_map, feature_dim, maps, rates, rows_at_once, segment, precision, seed)
    _check_data(data)
    with run:
        return run.fit("transfer", data, falling, betas, folder, resume, loop)


class _Run:
    """What the two kinds of training have in common: parts, rates, and a model that is as it was after `with`."""

    lora: dict[str, Tensor] = {}

    def __init__(self, model: Any, config: Any, rows_at_once: int | None, precision: str | None):
        from transformers.masking_utils import AttentionMaskInterface

        AttentionMaskInterface.register(_ROWS, lambda *args, **kwargs: None)
        self.model, self.configs = model, _configs(config)
        if rows_at_once is not None and rows_at_once < 1:
            raise ValueError(f"rows_at_once must be at least 1, got {rows_at_once}")
        self.rows_at_once = rows_at_once
        self.device = model.get_input_embeddings().weight.device
        precision = precision or ("bf16" if self.device.type == "cuda" else "fp32")
        if precision not in ("bf16", "fp32"):
            raise ValueError(f"precision must be 'bf16' or 'fp32', got {precision!r}")
        self.precision = precision

    def autocast(self) -> Any:
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.precision == "bf16")

    def __enter__(self) -> _Run:
        self._required = [(x, x.requires_grad) for x in self.model.parameters()]
        for x, _ in self._required:
            x.requires_grad_(False)
        self._masks, self.model.config._attn_implementation = self.model.config._attn_implementation, _ROWS
        self._precision = torch.get_float32_matmul_precision()
        if self.device.type == "cuda":
            torch.set_float32_matmul_precision("high")
        return self

    def __exit__(self, *error: Any) -> None:
        torch.set_float32_matmul_precision(self._precision)
        self.model.config._attn_implementation = self._masks
        for x, was in self._required:
            x.requires_grad_(was)

    def pieces(self, rows: int) -> list[slice]:
        size = self.rows_at_once or rows
        return [slice(first, min(first + size, rows)) for first in range(0, rows, size)]

    def fit(self, name: str, data: Any, factor: Any, betas: Any, folder: Any, resume: bool, loop: dict) -> Distilled:
        reset_peak(self.device)
        recipe = {
            "configs": [asdict(config) for config in self.configs], "spec": self.spec, "segment": self.segment, "precision": self.precision,
            "rows_at_once": self.rows_at_once, **self.more,
        }  # fmt: skip
        with torch.enable_grad():
            fitted = fit(
                name, self.parts, self.rates, data, self.loss, factor, folder=folder, resume=resume, recipe=recipe, betas=betas,
                describe=lambda batch: f"{ids_of(batch).shape[0]} x {ids_of(batch).shape[1] - 1} tokens", **loop,
            )  # fmt: skip
        losses = [values[0] for values in fitted.losses]
        return Distilled(_cpu(self.maps), _cpu(self.lora), self.spec, losses, fitted.seconds, peak_memory(self.device))


class _Transfer(_Run):
    def __init__(self, model, config, feature_map, feature_dim, maps, rates, rows_at_once, segment, precision, seed):
        from . import models

        config = lola.Config(sparse=0, mixing="lolcats") if config is None else config
        super().__init__(model, config, rows_at_once, precision)
        _check_model(model)
        tensors, kind = _tensors_of(maps)
        if kind and feature_map not in (kind, "hedgehog"):
            raise ValueError(f"feature_map must be {kind!r}, as of the maps to begin with, got {feature_map!r}")
        kind = kind or feature_map
        if kind not in _NAMES:
            raise ValueError(f"feature_map must be one of {', '.join(map(repr, _NAMES))} to be trained and saved, got {kind!r}")
        if tensors is not None and feature_dim is None:
            feature_dim = next((2 * x.shape[-1] for name, x in tensors.items() if name.endswith(".feature_map_q.mlp.layer")), None)
        self.layers = models.decoder_layers(model)
        # All are made before one is replaced, so that an error leaves the model as it was.
        softmax = [layer.self_attn for layer in self.layers]
        students = [models.LolaAttention.from_softmax(x, self.configs[0], kind, True, feature_dim=feature_dim) for x in softmax]
        self.maps = {}
        for i, student in enumerate(students):
            student.segment = segment
            self.maps |= _map_parameters(i, student)
        if tensors is None:
            first = students[0].feature_map_q.mlp.layer
            tensors = new_maps(range(len(students)), *first.shape, seed)
        _copy(tensors, self.maps)
        for x in self.maps.values():
            x.requires_grad_(False)  # until the loop trains it
        self.teachers = [_Teacher(student) for student in students]
        self.parts = split_maps(self.maps)
        self.rates = _rates(rates, {"maps": 1e-2, "gates": 1e-2}, self.parts)
        self.segment, self.more = segment, {"seed": seed, "model": _shape(model)}
        self.spec = _spec(kind, self.configs[0])

    def __enter__(self) -> _Transfer:
        super().__enter__()
        self.softmax = [layer.self_attn for layer in self.layers]
        for layer, teacher in zip(self.layers, self.teachers):
            layer.self_attn = teacher
        return self

    def __exit__(self, *error: Any) -> None:
        for layer, attention in zip(self.layers, self.softmax):
            layer.self_attn = attention
        super().__exit__(*error)

    def loss(self, step: int, batch: Any) -> Tensor:
        ids = ids_of(batch).to(self.device)
        config = self.configs[step % len(self.configs)]
        for teacher in self.teachers:
            student, teacher.error = teacher.student, None
            student.config = replace(config, scale=config.scale or student.config.scale)
        decoder = self.model.get_decoder()
        for piece in self.pieces(len(ids)):
            for teacher in self.teachers:
                teacher.share = (piece.stop - piece.start) / len(ids)
            with torch.no_grad(), self.autocast():
                decoder(input_ids=ids[piece, :-1].long(), use_cache=False)
        total = self.teachers[0].error
        for teacher in self.teachers[1:]:
            total = total + teacher.error.to(total.device)
        return total[None] / len(self.teachers)


# --- LoRA ---------------------------------------------------------------------------------------------------------------------


def finetune(
    model: Any,
    config: lola.Config | Sequence[lola.Config] | None = None,
    maps: Any = None,
    data: Any = None,
    *,
    rank: int = 8,
    alpha: float = 16,
    targets: Sequence[str] = QKVO,
    rates: Mapping[str, float] | None = None,
    betas: tuple[float, float] = (0.9, 0.99),
    rows_at_once: int | None = None,
    segment: int = hybrid.SEGMENT,
    precision: str | None = None,
    seed: int = 0,
    folder: str | os.PathLike | None = None,
    resume: bool = False,
    **loop: Any,
) -> Distilled:
    """LoRA on the language-model loss of the linearised model (LoLCATs, arXiv 2410.10254, stage 2).

    The model is linearised in place, as `lola.torch.linearize` does, and gets LoRA weights beside the named projections,
    which stay there as `LoraLinear` modules after training (`lola.torch.merge_lora` adds them in). Each layer's activations
    are computed anew on the way back, and the logits of at most 1024 tokens are in memory at once.

    Args:
        model: The softmax model, as for `transfer`.
        config: A lola.Config, or several that the steps use in turn; default: lola.Config(). Training with the sparse cache at
            work, and without it under "lolcats", serves both ways of running: see the bundled model's card.
        maps: What `transfer` returned, a dict of tensors under LoLCATs' names, or a file or folder of them.
        data: As for `transfer`. A batch may be a tuple of ids and weights, both (rows, length + 1): each token's weight as a
            target, 0 for prompts, say; the loss is the weighted mean. Default: 1 each.
        rank, alpha: LoRA's.
        targets: The projections that get one, of q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj.
        rates: Learning rates of the parts "lora", "lora_qk" (of q and k; default: that of "lora"), "maps" and "gates"; default
            1e-4 for LoRA, and the maps stay as they are.
        betas, rows_at_once, segment, precision, seed, folder, resume, **loop: As for `transfer`; the checkpoint is finetune.ckpt.

    Returns:
        A `Distilled` with maps and LoRA.

    Raises:
        TypeError, ValueError: As `transfer`; maps that are missing or do not fit; an unknown target.
    """
    if maps is None:
        raise ValueError("maps must be given: what lola.torch.distill.transfer returned, tensors, a file or a folder")
    config = lola.Config() if config is None else config
    _check_data(data)
    run = _Finetune(model, config, maps, rank, alpha, targets, rates, rows_at_once, segment, precision, seed)
    with run:
        return run.fit("finetune", data, warmed, betas, folder, resume, loop)


class _Finetune(_Run):
    def __init__(self, model, config, maps, rank, alpha, targets, rates, rows_at_once, segment, precision, seed):
        from . import lolcats, models

        super().__init__(model, config, rows_at_once, precision)
        _check_model(model)
        if rank < 1:
            raise ValueError(f"rank must be at least 1, got {rank}")
        known = QKVO + MLP
        if not targets or not set(targets) <= set(known):
            raise ValueError(f"targets must be some of {', '.join(known)}, got {list(targets)}")
        tensors, kind = _tensors_of(maps)
        layers = self.layers = models.decoder_layers(model)
        names = [
            f"layers.{i}.{'mlp' if name in MLP else 'self_attn'}.{name}" for i in range(len(layers)) for name in targets
        ]  # fmt: skip
        found = {name: layers[int(name.split(".")[1])].get_submodule(name.split(".", 2)[2]) for name in names}
        lora = new_lora({f"model.{name}": tuple(linear.weight.shape) for name, linear in found.items()}, rank, seed)
        models.linearize(model, self.configs[0], tensors, feature_map=kind, allow_untrained=tensors is None)
        self.maps, self.lora = {}, {}
        self.attentions = [layer.self_attn for layer in layers]
        for i, attention in enumerate(self.attentions):
            self.maps |= _map_parameters(i, attention)
        for name, linear in found.items():
            at = f"base_model.model.model.{name}.lora_{{}}.default.weight"
            made = lolcats.LoraLinear(linear, lora[at.format("A")], lora[at.format("B")], alpha, train=True)
            self.lora |= {at.format("A"): made.lora_a, at.format("B"): made.lora_b}
            parent, _, child = name.split(".", 2)[2].partition(".")
            setattr(layers[int(name.split(".")[1])].get_submodule(parent), child, made)
        self.parts = {**split_lora(self.lora), **split_maps(self.maps)}
        rates = dict(rates or {"lora": 1e-4})
        if "lora" in rates:
            rates.setdefault("lora_qk", rates["lora"])
        self.rates = _rates(rates, None, self.parts)
        self.segment, self.more = segment, {"seed": seed, "model": _shape(model), "targets": list(targets)}
        name = kind or self.attentions[0].feature_map
        self.spec = {**_spec(name, _trained_as(self.configs, maps)), "lora": {"r": rank, "alpha": alpha}}

    def __enter__(self) -> _Finetune:
        super().__enter__()
        for attention in self.attentions:
            attention.segment = self.segment
        # Not transformers' own gradient checkpointing, which is for models in training mode, with dropout.
        self._forwards = [layer.__dict__.get("forward") for layer in self.layers]
        for layer in self.layers:
            layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)
        return self

    def __exit__(self, *error: Any) -> None:
        from . import models

        for layer, forward in zip(self.layers, self._forwards):
            if forward is None:
                del layer.forward
            else:  # accelerate's
                layer.forward = forward
        for attention in self.attentions:
            attention.segment = None
        models.configure(self.model, self.configs[0])
        super().__exit__(*error)

    def loss(self, step: int, batch: Any) -> Tensor:
        from .models import configure

        ids = ids_of(batch).to(self.device).long()
        weights = None if isinstance(batch, Tensor) or len(batch) < 2 else batch[1]
        weights = torch.ones_like(ids, dtype=torch.float32) if weights is None else weights.to(self.device).float()
        if weights.shape != ids.shape:
            raise ValueError(f"the weights of a batch must have the shape of its ids, {tuple(ids.shape)}, got {tuple(weights.shape)}")
        configure(self.model, self.configs[step % len(self.configs)])
        weights = weights[:, 1:] / weights[:, 1:].sum().clamp_min(1e-9)
        total = 0
        for piece in self.pieces(len(ids)):
            with self.autocast():
                x = self.model.get_decoder()(input_ids=ids[piece, :-1], use_cache=False)[0]
                error = _lm_loss(x, self.model.get_output_embeddings(), ids[piece, 1:], weights[piece])
            error.backward()
            total = total + error.detach()
        return total[None]


def _lm_loss(x: Tensor, head: nn.Module, targets: Tensor, weights: Tensor) -> Tensor:
    """Cross-entropy of head(x) (B, T, width), weighted (B, T) and summed; the logits of _LOGITS tokens at a time."""

    def some(x: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        logits = head(x)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        return (F.cross_entropy(logits, targets.to(logits.device), reduction="none") * weights.to(logits.device)).sum()

    parts = zip(x.flatten(0, 1).split(_LOGITS), targets.flatten().split(_LOGITS), weights.flatten().split(_LOGITS))
    return sum(checkpoint(some, *part, use_reentrant=False, preserve_rng_state=False) for part in parts)


# --- what both check ------------------------------------------------------------------------------------------------------------


def ids_of(batch: Any) -> Tensor:
    """The token ids of a batch, (rows, length + 1)."""
    ids = batch if isinstance(batch, Tensor) else batch[0]
    if ids.ndim != 2 or ids.shape[1] < 2 or ids.is_floating_point():
        raise ValueError(f"a batch must hold integers (rows, length + 1), got {ids.dtype} {tuple(ids.shape)}")
    return ids


def _configs(config: Any) -> list[lola.Config]:
    configs = [config] if isinstance(config, lola.Config) else list(config) if isinstance(config, Iterable) else [config]
    if not configs or not all(isinstance(c, lola.Config) for c in configs):
        raise TypeError(f"config must be a lola.Config or several, got {config!r}")
    for c in configs:
        hybrid.check_config(c)
    if len({(c.window, c.chunk) for c in configs}) > 1:
        raise ValueError("config must have one window and chunk throughout, as an adapter has")
    return configs


def _check_model(model: Any) -> None:
    from . import models

    if isinstance(model, models._LolaModel):
        raise ValueError("model was linearised before: begin with the softmax model")
    if type(model) not in models._FAMILIES:
        kinds = ", ".join(kind.__name__ for kind in models._FAMILIES)
        raise TypeError(f"model must be one of {kinds}, got {type(model).__name__}")


def _check_data(data: Any) -> None:
    if not hasattr(data, "__len__") or not hasattr(data, "__getitem__"):
        raise TypeError(f"data must have len() and [step], as lola.torch.distill.Rows has, got {type(data).__name__}")
    if not len(data):
        raise ValueError("data must have at least one batch")


def _rates(rates: Mapping[str, float] | None, default: Any, parts: Mapping[str, Any]) -> dict[str, float]:
    rates = dict(default if rates is None else rates)
    if not rates or not set(rates) <= set(parts):
        raise ValueError(f"rates must be for some of {', '.join(parts)}, got {rates}")
    return {part: rate for part, rate in rates.items() if parts[part]}


def _tensors_of(maps: Any) -> tuple[dict[str, Tensor] | None, str | None]:
    """Maps as tensors by name, and their kind where that is known."""
    from . import lolcats

    if maps is None:
        return None, None
    if isinstance(maps, Distilled):
        tensors, name = maps.maps, maps.spec["feature_map"]
    else:
        tensors = lolcats.read_tensors(maps, ("feature_maps.safetensors", "model.safetensors", "model.pt"))
        spec = lolcats._adapter(maps)
        if (spec.get("lora") or {}).get("r"):
            raise ValueError(f"{maps} has LoRA weights too, without which its maps do not fit the model: begin with maps alone")
        name = spec.get("feature_map")
    return dict(tensors), lolcats._KINDS.get(name, name)


def _map_parameters(i: int, attention: Any) -> dict[str, Tensor]:
    at = f"model.layers.{i}.self_attn."
    maps = {f"{at}feature_map_{side}.mlp.layer": getattr(attention, f"feature_map_{side}").mlp.layer for side in "qk"}
    return {**maps, at + "window_factors": attention.window_factors}


def _copy(tensors: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> None:
    if set(tensors) != set(parameters):
        lacking, extra = sorted(set(parameters) - set(tensors)), sorted(set(tensors) - set(parameters))
        raise ValueError(f"maps must hold the model's own tensors; lacking {lacking[:3]}, without a place {extra[:3]}")
    with torch.no_grad():
        for name, parameter in parameters.items():
            if tensors[name].shape != parameter.shape:
                raise ValueError(f"{name} must have shape {tuple(parameter.shape)}, got {tuple(tensors[name].shape)}")
            parameter.copy_(tensors[name])


def _spec(feature_map: str, config: lola.Config) -> dict[str, Any]:
    name = _NAMES.get(feature_map, feature_map)
    return {"feature_map": name, "window": config.window, "chunk": config.chunk, "mixing": config.mixing or "gated"}


def _trained_as(configs: list[lola.Config], maps: Any) -> lola.Config:
    """The base's own configuration: that of the steps without a sparse cache, else of the transfer, else of the first step."""
    base = [config for config in configs if config.sparse == 0]
    if base:
        return base[0]
    return replace(configs[0], mixing=maps.spec["mixing"]) if isinstance(maps, Distilled) else configs[0]


def _shape(model: Any) -> list[int]:
    config = model.config
    return [config.num_hidden_layers, config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.vocab_size]


# --- memory -------------------------------------------------------------------------------------------------------------------------


def shape_8b() -> Any:
    """The configuration of Llama 3.1 8B."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
        head_dim=128, max_position_embeddings=131072, tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 5e5},
    )  # fmt: skip


def count_memory(
    model_config: Any = None, stage: str = "transfer", *, length: int = 1024, rows: int = 1, config: Any = None,
    segment: int = hybrid.SEGMENT, device: Any = "cpu", reckon: bool = True, **options: Any,
) -> tuple[int, int]:  # fmt: skip
    """Bytes of a model's bfloat16 weights, and the peak of one training step with them: forward, backward and AdamW.

    On CUDA the step is run on random weights and torch.cuda.max_memory_allocated read, less what was allocated before. Elsewhere
    nothing is computed or allocated: the same code runs on fake tensors, and what its operators return is counted; what the
    kernels of a GPU need within themselves comes on top.

    Args:
        model_config: Of transformers; default: that of Llama 3.1 8B.
        stage: "transfer" or "finetune".
        length, rows: Tokens of a row, rows of a step that are in memory together.
        config: As in the stage.
        device: "cuda" or "cpu".
        reckon: When counting, take a model of many layers from the counts of two and of three: every further layer adds the same.
        **options: Of the stage.

    >>> count_memory(stage="transfer", length=1024)  # doctest: +SKIP
    """
    from torch._subclasses.fake_tensor import FakeTensorMode
    from transformers import AutoModelForCausalLM

    model_config, device = copy.deepcopy(model_config) or shape_8b(), torch.device(device)
    layers = model_config.num_hidden_layers
    if reckon and device.type != "cuda" and layers > 3:
        counts = []
        for n in (2, 3):
            model_config.num_hidden_layers = n
            if getattr(model_config, "layer_types", None):
                model_config.layer_types = model_config.layer_types[:n]
            more = {"length": length, "rows": rows, "config": config, "segment": segment, "device": device, **options}
            counts.append(count_memory(model_config, stage, **more))
        return tuple(two + (layers - 2) * (three - two) for two, three in zip(*counts))
    given = {"rows_at_once": None, "segment": segment, "precision": "bf16", "seed": 0, "rates": None, **options}
    fake = contextlib.nullcontext() if device.type == "cuda" else FakeTensorMode()
    seen = contextlib.nullcontext() if device.type == "cuda" else Allocations()
    before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    with fake, seen, torch.device(device):
        model = AutoModelForCausalLM.from_config(model_config, dtype=torch.bfloat16)
        weights = sum(x.numel() * x.element_size() for x in model.parameters())
        if device.type != "cuda":
            seen.now = seen.peak = sum(x.untyped_storage().nbytes() for x in (*model.parameters(), *model.buffers()))
        reset_peak(device)
        if stage == "transfer":
            run = _Transfer(model, config, **{"feature_map": "hedgehog", "feature_dim": None, "maps": None, **given})
        elif stage == "finetune":
            config = lola.Config() if config is None else config
            run = _Finetune(model, config, **{"maps": None, "rank": 8, "alpha": 16, "targets": QKVO, **given})
        else:
            raise ValueError(f"stage must be 'transfer' or 'finetune', got {stage!r}")
        with run, torch.enable_grad():
            trained = [x.requires_grad_() for part in run.rates for x in run.parts[part].values()]
            optimizer = torch.optim.AdamW(trained, fused=True)
            run.loss(0, torch.zeros(rows, length + 1, dtype=torch.long))
            optimizer.step()
    return weights, peak_memory(device) - before if device.type == "cuda" else seen.peak


# --- the command --------------------------------------------------------------------------------------------------------------------

_EXAMPLES = """examples:
  # any Llama, Mistral, Qwen2 or Qwen3 of Hugging Face, a folder or hub name, and a text of your own
  python -m lola.torch.distill --model meta-llama/Llama-3.1-8B --text corpus.txt --out adapter --rows 8 --rows-at-once 1

  # the same after it was killed
  python -m lola.torch.distill --model meta-llama/Llama-3.1-8B --text corpus.txt --out adapter --rows 8 --rows-at-once 1 --resume

  # the bundled model's adapter, with its own data and recipe
  python -m lola.torch.distill --model needle --text needle-tasks --out adapter

  # a minute on a CPU, to try it
  python -m lola.torch.distill --model needle --text README.md --out try --steps 4 --lora-steps 4 --rows 1 --length 256

  # peak memory of one step of each stage, 8B-shaped or of --model's shape, at this length
  python -m lola.torch.distill --dry-run --length 8192

what is written to --out: adapter.json, feature_maps.safetensors and lora.safetensors, for
lola.torch.load_lolcats(MODEL, OUT) or lola convert; report.json with the losses; and, on the way, checkpoints."""


def _attention_list(text: str) -> list[tuple[str, int]]:
    out = []
    for item in text.split(","):
        mixing, _, sparse = item.partition(":")
        if mixing not in hybrid.MIXINGS or not sparse.isdigit():
            raise argparse.ArgumentTypeError(f"must be MIXING:SPARSE,... with a mixing of {', '.join(hybrid.MIXINGS)}, got {text!r}")
        out.append((mixing, int(sparse)))
    return out


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m lola.torch.distill", description=__doc__.split("\n")[0], epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--model", help="folder or hub name of a causal language model, or needle")
    parser.add_argument("--text", help="a UTF-8 file, or needle-tasks: the bundled model's own data and recipe")
    parser.add_argument("--out", type=Path, help="a new folder for the adapter")
    parser.add_argument("--resume", action="store_true", help="go on with a run that was stopped in --out")
    parser.add_argument("--dry-run", action="store_true", help="print the peak memory of one step of each stage, and do nothing else")
    data = parser.add_argument_group("data")
    data.add_argument("--length", type=int, default=1024, help="tokens of a row (default: 1024)")
    data.add_argument("--rows", type=int, default=8, help="rows of a step (default: 8)")
    data.add_argument("--rows-at-once", type=int, help="rows of a step in memory together (default: all; 1 for the least memory)")
    data.add_argument("--workers", type=int, default=0, help="processes that make batches ahead (default: 0)")
    recipe = parser.add_argument_group("recipe")
    recipe.add_argument("--steps", type=int, help="of attention transfer (default: 1000; needle-tasks: the shipped adapter's)")
    recipe.add_argument("--lora-steps", type=int, help="of finetuning (default: 1000; needle-tasks: the shipped adapter's); 0: maps alone")
    recipe.add_argument("--rate", type=float, default=1e-2, help="learning rate of maps and gates in transfer (default: 1e-2)")
    recipe.add_argument("--lora-rate", type=float, default=1e-4, help="learning rate of LoRA (default: 1e-4)")
    recipe.add_argument("--rank", type=int, default=8, help="LoRA's r (default: 8)")
    recipe.add_argument("--alpha", type=float, default=16, help="LoRA's alpha (default: 16)")
    recipe.add_argument("--targets", default=",".join(QKVO), help="projections with LoRA (default: %(default)s)")
    recipe.add_argument("--feature-map", default="hedgehog", choices=list(_NAMES), help="(default: hedgehog)")
    recipe.add_argument("--window", type=int, default=64, help="(default: 64)")
    recipe.add_argument("--chunk", type=int, default=64, help="(default: 64)")
    listed = {"type": _attention_list, "metavar": "MIXING:SPARSE,..."}
    recipe.add_argument("--attention", default="lolcats:0", help="attention of transfer, in turn (default: %(default)s)", **listed)
    recipe.add_argument(
        "--lora-attention", default="gated:32,gated:64,lolcats:0", help="attention of finetuning, in turn (default: %(default)s)", **listed
    )
    recipe.add_argument("--seed", type=int, default=0)
    machine = parser.add_argument_group("machine")
    machine.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(here: %(default)s)")
    machine.add_argument("--precision", choices=["bf16", "fp32"], help="autocast (default: bf16 on cuda)")
    machine.add_argument("--dtype", choices=["float32", "bfloat16"], help="of the frozen weights (default: as stored, float16 as float32)")
    machine.add_argument("--segment", type=int, default=hybrid.SEGMENT, help="tokens of attention computed at once (default: %(default)s)")
    machine.add_argument("--save-seconds", type=float, default=120, help="between checkpoints (default: 120)")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    parser = _parser()
    options = parser.parse_args(argv)
    try:
        if options.dry_run:
            _dry_run(options)
        elif not (options.model and options.text and options.out):
            parser.error("--model, --text and --out are needed, or --dry-run")
        else:
            _distill(options)
    except (OSError, ValueError, TypeError, Unfinished) as error:
        raise SystemExit(f"distill: {error}") from None


def _recipes(options: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments of `transfer` and `finetune`, `data` and `steps` aside."""

    def configs(attention: list[tuple[str, int]]) -> list[lola.Config]:
        return [lola.Config(options.window, options.chunk, sparse, mixing) for mixing, sparse in attention]

    both = {"rows_at_once": options.rows_at_once, "segment": options.segment, "precision": options.precision, "seed": options.seed}
    rates = {"maps": options.rate, "gates": options.rate}
    first = {"config": configs(options.attention), "feature_map": options.feature_map, "rates": rates}
    second = {
        "config": configs(options.lora_attention), "rank": options.rank, "alpha": options.alpha, "targets": options.targets.split(","),
        "rates": {"lora": options.lora_rate},
    }  # fmt: skip
    return {**first, **both}, {**second, **both}


def _dry_run(options: argparse.Namespace) -> None:
    from transformers import AutoConfig

    shape = None
    if options.model:
        shape = AutoConfig.from_pretrained(_base(options.model))
    what = "measured" if options.device.startswith("cuda") else "counted without computing; a GPU's kernels need a little more"
    name = options.model or "8B-shaped"
    rows = options.rows_at_once or options.rows
    print(f"one step, {name}, weights in bfloat16, {rows} x {options.length} tokens in memory together ({what})")
    for stage, recipe in zip(("transfer", "finetune"), _recipes(options)):
        # The step that needs most: the largest sparse cache.
        recipe["config"] = max(recipe["config"], key=lambda config: config.sparse)
        recipe = {**recipe, "rows_at_once": None, "precision": recipe["precision"] or "bf16"}
        weights, peak = count_memory(shape, stage, length=options.length, rows=rows, device=options.device, **recipe)
        print(f"{stage:9s} peak {peak / 2**30:6.2f} GiB, of which weights {weights / 2**30:.2f} GiB")


def _base(model: str) -> Any:
    from lola.models import BUNDLED

    return BUNDLED[model][0] if model in BUNDLED else model


def _load(options: argparse.Namespace) -> Any:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(_base(options.model), dtype=getattr(torch, options.dtype) if options.dtype else "auto")
    if model.dtype == torch.float16:  # whose range is too short to train in
        model.float()
    return model.to(options.device)


def _distill(options: argparse.Namespace) -> None:
    import transformers
    from transformers import AutoTokenizer

    out: Path = options.out
    said = {key: str(value) for key, value in vars(options).items() if key not in ("resume", "out", "workers", "save_seconds", "dry_run")}
    if out.exists() and any(out.iterdir()):
        if not options.resume:
            raise FileExistsError(f"{out} is not empty: name a new folder, or pass --resume to go on with the run in it")
        if not (out / "run.json").is_file():
            raise FileExistsError(f"{out} holds no run to go on with")
        before = json.loads((out / "run.json").read_text())
        if other := [key for key in said if before.get(key) != said[key]]:
            raise ValueError(f"{out} holds a run with another {', '.join(f'--{key}'.replace('_', '-') for key in other)}")
        if (out / "adapter.json").exists():
            print(f"{out} is finished")
            return
    out.mkdir(parents=True, exist_ok=True)
    (out / "run.json").write_text(json.dumps(said, indent=1) + "\n")

    first, second = _recipes(options)
    if options.text == "needle-tasks":
        from lola.models import BUNDLED, train_needle

        if options.model not in BUNDLED:
            raise ValueError("needle-tasks are bytes for the bundled model: pass --model needle, or a --text file")
        (first_data, first_recipe), (second_data, second_recipe) = train_needle.as_distilled(options.steps, options.lora_steps)
        first, second = {**first, **first_recipe}, {**second, **second_recipe}
    else:
        text = Path(options.text).read_text("utf-8")
        ids = AutoTokenizer.from_pretrained(_base(options.model))(text, add_special_tokens=False, verbose=False)["input_ids"]
        steps = [1000 if given is None else given for given in (options.steps, options.lora_steps)]
        first_data, second_data = (
            Rows(ids, options.length, options.rows, n, options.seed + i) if n else [] for i, n in enumerate(steps)
        )  # fmt: skip
        print(f"{options.text}: {len(ids)} tokens, {first_data.count} rows of {options.length}" if first_data else f"{len(ids)} tokens")

    model = _load(options)
    loop = {"folder": out, "resume": options.resume, "workers": options.workers, "save_seconds": options.save_seconds}
    report: dict[str, Any] = {"torch": torch.__version__, "transformers": transformers.__version__, "device": options.device}

    def tell(stage: str, made: Distilled) -> None:
        report[stage] = {"seconds": made.seconds, "peak_bytes": made.peak_bytes, "losses": made.losses}
        (out / "report.json").write_text(json.dumps(report) + "\n")
        how = "torch.cuda.max_memory_allocated" if options.device.startswith("cuda") else "resident"
        print(f"{stage}: {len(made.losses)} steps, loss {made.losses[0]:.4f} -> {made.losses[-1]:.4f}, {made.seconds} s, ", end="")
        print(f"peak memory {made.peak_bytes / 2**30:.2f} GiB ({how})", flush=True)

    made = transfer(model, data=first_data, **first, **loop)  # at once, if its checkpoint is that of the last step
    tell("transfer", made)
    if len(second_data):
        made = finetune(model, maps=made, data=second_data, **second, **loop)
        tell("finetune", made)
    made.save(out)
    for name in ("transfer", "finetune"):
        (out / f"{name}.ckpt").unlink(missing_ok=True)
    print(f"{out}: lola.torch.load_lolcats({str(_base(options.model))!r}, {str(out)!r}), or lola convert")


if __name__ == "__main__":
    main()
