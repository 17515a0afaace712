"""The loop that trains feature maps, gates, LoRA weights and the bundled model, and the memory that a run takes. Needs torch alone.

    fit                         AdamW over tensors, with progress and checkpoints that resume exactly
    falling, warmed             how rates change over a run
    reset_peak, peak_memory     the most memory that this process, or a GPU, had in use
    Allocations                 the same counted, operator by operator
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import sys
import time
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class _From(torch.utils.data.Dataset):
    def __init__(self, batches: Any, first: int):
        self.batches, self.first = batches, first

    def __len__(self) -> int:
        return len(self.batches) - self.first

    def __getitem__(self, item: int) -> Any:
        return self.batches[item + self.first]


# --- the loop -------------------------------------------------------------------------------------------------------------


class Unfinished(RuntimeError):
    """The time given to a run is over; its checkpoint is written."""


@dataclass
class Fitted:
    """What `fit` returns: every step's losses, lines of the log (step, mean losses, seconds), and the time all runs took."""

    losses: list[list[float]]
    log: list[tuple[int, list[float], float]]
    seconds: float


class _Progress:
    """A tqdm bar where standard error is a terminal and tqdm is installed, else a line now and then on standard output."""

    def __init__(self, name: str, first: int, steps: int):
        self.name, self.steps, self.bar = name, steps, None
        if sys.stderr.isatty():
            with contextlib.suppress(ImportError):
                from tqdm.auto import tqdm

                self.bar = tqdm(total=steps, initial=first, desc=name, dynamic_ncols=True)

    def step(self) -> None:
        if self.bar is not None:
            self.bar.update()

    def say(self, step: int, what: str, losses: list[float], seconds: float) -> None:
        if self.bar is not None:
            self.bar.set_postfix_str(f"{what}loss {losses}")
        else:
            print(f"{self.name}: step {step}/{self.steps}, {what}loss {losses}, {seconds} s", flush=True)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


def fit(
    name: str,
    parts: Mapping[str, Mapping[str, Tensor]],
    rates: Mapping[str, float],
    batches: Any,
    loss: Callable[[int, Any], Tensor],
    factor: Callable[[float, int], float],
    *,
    folder: str | os.PathLike | None = None,
    resume: bool = False,
    recipe: Any = None,
    betas: tuple[float, float] = (0.9, 0.999),
    decay: float = 0.0,
    clip: float = 1.0,
    seconds: float = math.inf,
    save_seconds: float = 120,
    save_steps: int | None = None,
    workers: int = 0,
    describe: Callable[[Any], str] | None = None,
) -> Fitted:
    """AdamW over tensors, with progress and checkpoints that resume exactly.

    Args:
        name: Of the run, in what is printed and as `NAME.ckpt`.
        parts: Tensors by part and name.
        rates: Learning rate of each part that is trained; the others are left alone.
        batches: `len()` and `[step]`; a tensor or a tuple of tensors, which must depend on nothing but the step.
        loss: Called with the step and its batch, on the parts' device; runs the backward pass and returns the losses to
            report, (n,).
        factor: Of the rates, from the share of steps done and the step.
        folder: For the checkpoint; None: none is written.
        resume: Go on from the checkpoint if there is one; else one that is there raises.
        recipe: Anything that JSON can say: a checkpoint of another recipe is refused.
        betas, decay, clip: AdamW's, and the largest norm of a step's gradient.
        seconds: Stop with a checkpoint and `Unfinished` after this time.
        save_seconds, save_steps: Write a checkpoint that often. One is always written at the end.
        workers: Processes that make batches ahead.
        describe: What to print about a batch.

    Raises:
        FileExistsError: There is a checkpoint and `resume` is False.
        ValueError: The checkpoint is another run's.
        RuntimeError: A loss is not finite.
        Unfinished: The time is over.
    """
    trained = {part: dict(parts[part]) for part in rates}
    flat = [tensor for tensors in trained.values() for tensor in tensors.values()]
    if not flat:
        raise ValueError("parts must hold tensors to train")
    device = flat[0].device
    path = None if folder is None else Path(folder) / f"{name}.ckpt"
    if path is not None and path.exists() and not resume:
        raise FileExistsError(f"{path} is the checkpoint of an earlier run: pass resume=True (--resume) to go on from it, or remove it")
    recipe = json.loads(json.dumps([len(batches), dict(rates), list(betas), decay, clip, recipe]))
    required = [tensor.requires_grad for tensor in flat]
    for tensor in flat:
        tensor.requires_grad_()
    groups = [{"params": list(tensors.values()), "lr": 0.0, "base": rates[part]} for part, tensors in trained.items()]
    optimizer = torch.optim.AdamW(groups, betas=betas, weight_decay=decay, fused=device.type == "cuda")
    first, spent, means, losses, random = 0, 0.0, None, [], None
    if path is not None and path.exists():
        saved = torch.load(path, map_location="cpu", weights_only=True)
        _same_run(saved, recipe, trained, path)
        first, spent, losses, random = saved["step"], saved["seconds"], saved["losses"], saved["random"]
        means = None if saved["means"] is None else saved["means"].to(device)
        with torch.no_grad():
            for part, tensors in saved["parts"].items():
                for key, tensor in tensors.items():
                    trained[part][key].copy_(tensor)
        optimizer.load_state_dict(saved["optimizer"])
        print(f"{name}: from step {first}", flush=True)

    pending: list[Tensor] = []  # losses that are still where they were made

    def settle() -> None:
        if pending:
            losses.extend(torch.stack(pending).tolist())
            pending.clear()

    def save(step: int) -> None:
        settle()
        state = {
            "step": step, "seconds": spent + time.time() - begin, "recipe": recipe, "losses": losses, "means": means,
            "parts": {part: {key: tensor.detach() for key, tensor in tensors.items()} for part, tensors in trained.items()},
            "optimizer": optimizer.state_dict(), "random": _random_states(device),
        }  # fmt: skip
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(state, path.with_suffix(".tmp"))
        path.with_suffix(".tmp").replace(path)  # so that there is always a whole one

    begin = last = said = time.time()
    steps, log = len(batches), []
    progress = _Progress(name, first, steps)
    try:
        loader = torch.utils.data.DataLoader(
            _From(batches, first), batch_size=None, num_workers=workers, pin_memory=device.type == "cuda",
            **({"prefetch_factor": 8} if workers else {}),
        )  # fmt: skip
        each = iter(loader) if first < steps else iter(())  # draws a number itself
        if random is not None:
            _set_random_states(random, device)
        for step, batch in enumerate(each, first):
            batch = _to(batch, device)
            for group in optimizer.param_groups:
                group["lr"] = group["base"] * factor(step / steps, step)
            values = loss(step, batch)
            torch.nn.utils.clip_grad_norm_(flat, clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            pending.append(values)
            means = values if means is None else means.lerp(values, 0.02)
            progress.step()
            now = time.time()
            if (step + 1) % max(1, min(250, steps // 4)) == 0 or step + 1 == steps or now - said > 60:
                said = now
                log.append((step + 1, [round(x, 4) for x in means.tolist()], round(spent + now - begin, 1)))
                progress.say(step + 1, f"{describe(batch)}, " if describe else "", *log[-1][1:])
                if not all(map(math.isfinite, means.tolist())):
                    raise RuntimeError(f"{name}: the loss is not finite")
            over = now - begin > seconds
            due = over or now - last > save_seconds or step + 1 == steps or (save_steps is not None and (step + 1) % save_steps == 0)
            if path is not None and due:
                save(step + 1)
                last = time.time()
            if over and step + 1 < steps:
                raise Unfinished(f"{name}: {step + 1} of {steps} steps done; run the stage again to go on")
        del each, loader
        settle()
    finally:
        progress.close()
        optimizer.zero_grad(set_to_none=True)
        for tensor, was in zip(flat, required):
            tensor.requires_grad_(was)
    return Fitted(losses, log, round(spent + time.time() - begin, 1))


def _same_run(saved: dict, recipe: Any, trained: dict, path: Path) -> None:
    shapes = {part: {key: tuple(x.shape) for key, x in tensors.items()} for part, tensors in trained.items()}
    if {part: {key: tuple(x.shape) for key, x in tensors.items()} for part, tensors in saved.get("parts", {}).items()} != shapes:
        raise ValueError(f"{path} is the checkpoint of a run that trains other tensors: take another folder, or remove it")
    if saved.get("recipe") != recipe:
        raise ValueError(
            f"{path} is the checkpoint of another recipe: take another folder, or remove it. It was {saved.get('recipe')}, "
            f"and is {recipe} now"
        )


def _random_states(device: torch.device) -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def _set_random_states(states: dict[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)


def _to(batch: Any, device: torch.device) -> Any:
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    return tuple(x.to(device, non_blocking=True) for x in batch)


def falling(done: float, step: int) -> float:
    """From 1 to 0 over the run: the factor of transfer's rates."""
    return 1 - done


def warmed(done: float, step: int) -> float:
    """The same after 50 steps that begin low: the factor of finetuning's rates."""
    return min(1.0, (step + 1) / 50) * (1 - done)


# --- memory --------------------------------------------------------------------------------------------------------------


def reset_peak(device: torch.device) -> None:
    """Begins `peak_memory` anew, where the system can."""
    if device.type == "cuda":
        for i in range(torch.cuda.device_count()):
            torch.cuda.reset_peak_memory_stats(i)
        return
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def peak_memory(device: torch.device) -> int:
    """Bytes: torch.cuda.max_memory_allocated of the fullest GPU, or the process's resident peak."""
    if device.type == "cuda":
        return max(torch.cuda.max_memory_allocated(i) for i in range(torch.cuda.device_count()))
    with contextlib.suppress(OSError):
        if found := re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text()):
            return int(found.group(1)) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class Allocations(TorchDispatchMode):
    """Counts the bytes of the tensors that operators return and that are still in use; `peak` is the most there ever were.

    What an operator needs within itself is not seen. Works on fake tensors too, which compute nothing and take no memory.

    >>> with Allocations() as seen:
    ...     for _ in range(3):
    ...         x = torch.zeros(1000) + 1
    >>> seen.peak      # the old x, the zeros and the new x
    12000
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: weakref.WeakSet = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor):
                storage = x.untyped_storage()
                if storage not in self._known:
                    self._known.add(storage)
                    size = storage.nbytes()
                    self.now += size
                    weakref.finalize(storage, self._forget, size)
        self.peak = max(self.peak, self.now)
        return out

    def _forget(self, size: int) -> None:
        self.now -= size
