"""What ``lola eval`` writes: one needle, what each row is, the table, and how much smaller the cache is."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Sequence

from .run import Needle, Setup
from .tasks import TASKS

__all__ = ["Progress", "explain", "needle", "row", "savings", "title"]

_HEAD = ("attention", "mixing", "window", "sparse", "accuracy", "95 % interval", "cache/seq", "tokens/s")
_WIDTHS = (11, 10, 6, 6, 8, 13, 10, 8)


def megabytes(count: int) -> str:
    """Bytes as MB (10^6) with three digits.

    >>> megabytes(12_582_912), megabytes(466_944)
    ('12.6 MB', '0.467 MB')
    """
    return f"{count / 1e6:#.3g} MB"


def _line(*cells: str) -> str:
    left, right = cells[:2], cells[2:]
    return "  ".join([c.ljust(w) for c, w in zip(left, _WIDTHS)] + [c.rjust(w) for c, w in zip(right, _WIDTHS[2:])])


def title(task: str, length: int, samples: int) -> str:
    """The lines above a table."""
    return f"{task} at {length} tokens, {samples} samples: {TASKS[task].description}\n\n{_line(*_HEAD)}"


def row(values: dict) -> str:
    """One row of ``evaluate`` as a line of the table."""
    whole = lambda n: "all" if n is None else str(n)  # noqa: E731
    return _line(
        values["attention"],
        values["mixing"] or "-",
        whole(values["window"]),
        "-" if values["sparse"] is None else str(values["sparse"]),
        f"{values['accuracy']:.3f}",
        f"{values['low']:.3f} - {values['high']:.3f}",
        megabytes(values["cache_bytes"]),
        f"{values['tokens_per_second']:,.0f}",
    )


def explain(setups: Sequence[Setup], trained: str | None) -> str:
    """A line on what each row of the table is; ``trained`` is the base's own mixing."""
    meaning = {
        "softmax": "the teacher: softmax attention over every token, the full KV cache",
        "window": "that base with a longer window, as many bytes as LoLA's cache",
        "cache_only": "LoLA with its hidden state unread (it still ranks what to keep)",
        "lola": "LoLA: window, sparse cache of what the state recalls worst, hidden state",
    }
    lines = []
    for setup in setups:
        text = meaning.get(setup.attention)
        if text is None:
            how = "mixed as it was trained" if setup.mixing == trained else "mixed as LoLA mixes"
            text = f"the linearised model, no sparse cache, {how}"
        lines.append(f"{setup.attention:<11}  {setup.mixing or '-':<10}  {text}")
    return "\n".join(lines)


def needle(shown: Needle, length: int) -> str:
    """The needle, both answers, and where LoLA kept it."""
    sample = shown.sample
    what = "value" if len(sample.references) == 1 else "values"
    question = sample.prompt[sample.prompt.rindex("\n") + 1 :]
    question = question[: question.find("?") + 1] or question.strip()
    cached = f"{shown.lola.config.sparse} pairs cached"
    layers, heads = shown.whole.shape
    kept = (
        f"{shown.whole.sum()} of {layers * heads} heads ({layers} layers x {heads}), which have the whole {what} in their sparse caches; "
        f"{shown.part.sum()} have a part"
    )
    if shown.in_window:
        kept += "; it is so near the end that the window holds some of it, too"
    lines = [f"One needle of {sample.task} at {length} tokens, {sample.depth:.0%} into the prompt:", ""]
    for name, text in (
        *(("hidden", sample.prompt[begin:end]) for begin, end in sample.needles),
        ("asked", question),
        ("base", f"{_answer(shown.base_answer)}  ({_verdict(shown.base_right)}; no sparse cache, {shown.base.mixing} mixing)"),
        ("LoLA", f"{_answer(shown.lola_answer)}  ({_verdict(shown.lola_right)}; {cached}, {shown.lola.mixing} mixing)"),
        ("kept by", kept),
    ):
        lines += textwrap.wrap(text, 98, initial_indent=f"  {name:<9}", subsequent_indent=" " * 11)
    return "\n".join(lines)


def _answer(text: str) -> str:
    text = text.strip()
    # A model that knows no answer may write anything, control characters too.
    shown = repr(text if len(text) <= 40 else text[:37])[1:-1]
    return f'"{shown if len(shown) <= 40 else shown[:37] + "..."}"'


def _verdict(right: bool) -> str:
    return "right" if right else "wrong"


def savings(length: int, full: int, by_sharing: dict[str, int]) -> str:
    """How much smaller than the full KV cache LoLA's is, both in float16, for each ``sparse_per``."""
    lines = [f"Cache at {length} tokens in float16: full KV cache {megabytes(full)}"]
    for name, size in by_sharing.items():
        ratio = f"{full / size:.1f}x smaller" if size < full else f"{size / full:.1f}x larger"
        lines.append(f"  LoLA, one sparse set per {name.replace('_', ' '):<11} {megabytes(size):>9}, {ratio}  (--sparse-per {name})")
    return "\n".join(lines)


class Progress:
    """A progress bar on standard error if that is a terminal, else nothing; tqdm's if it is installed.

    ``update(done, total)`` moves it, ``write(text)`` prints to standard output without tearing it, ``close()`` takes it away.
    """

    def __init__(self, label: str):
        self.label = label
        self.shown = sys.stderr.isatty()
        self.bar = None
        self.last = (0, 0)
        self.tqdm = None
        if self.shown:
            try:
                from tqdm.auto import tqdm
            except ModuleNotFoundError:
                return
            self.tqdm = tqdm

    def update(self, done: int, total: int) -> None:
        if not self.shown:
            return
        if self.tqdm is None:
            self.last = done, total
            filled = 30 * done // total
            sys.stderr.write(f"\r{self.label} [{'#' * filled}{'.' * (30 - filled)}] {done}/{total}")
            sys.stderr.flush()
            return
        if self.bar is None:
            self.bar = self.tqdm(total=total, desc=self.label, leave=False, dynamic_ncols=True)
        self.bar.update(done - self.bar.n)

    def _clear(self):
        if self.bar is not None:
            self.bar.clear()
        elif self.last[1]:
            sys.stderr.write("\r\033[K")
            sys.stderr.flush()

    def write(self, text: str) -> None:
        self._clear()
        print(text, flush=True)
        if self.bar is not None:
            self.bar.refresh()
        elif self.last[1]:
            self.update(*self.last)

    def close(self) -> None:
        self._clear()
        if self.bar is not None:
            self.bar.close()
        self.bar, self.last = None, (0, 0)
