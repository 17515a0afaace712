"""Runs a model over the needle tasks with softmax attention, with its linear base, and with LoLA, side by side.

The comparison is made of these rows, so that each step from the base to LoLA is seen by itself:

============ ========================================================================================================
softmax      the teacher: softmax attention over all tokens
base         linearised, ``sparse`` = 0: once with the mixing that it was trained with, once with LoLA's
window       the base with a longer window, of at least as many bytes as LoLA's cache
cache_only   LoLA whose hidden state ranks the pairs, but is not read
lola         LoLA
============ ========================================================================================================

Samples run side by side on threads of their own, each with single-threaded BLAS and kernels: one sample's matrices are too
small to be worth splitting. Prompts of one task may begin alike (the noise before a needle is the same in all);
such a beginning is run once and its cache copied. By the contract's first invariant the copies hold what they would have held.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import itertools
import math
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path

import numpy as np

import lola

from ..models.folder import Adapter, locate
from ..models.llama import Llama, ModelCache
from ..models.tokenizer import ByteTokenizer
from . import tasks as _tasks

__all__ = ["ATTENTIONS", "Comparison", "Needle", "Setup", "evaluate", "make_setups", "wilson"]

ATTENTIONS = ("softmax", "base", "window", "cache_only", "lola")

# A beginning is worth a copy of the cache from so many tokens on.
_WORTH_SHARING = 64
# Answers that are decoded together: a step of one row takes as long to fetch the weights as one of many.
_TOGETHER = 8


@dataclass(frozen=True)
class Setup:
    """One way to attend: a row of the comparison. ``config`` is None for softmax."""

    attention: str
    config: lola.Config | None = None

    @property
    def mixing(self) -> str | None:
        return None if self.config is None else self.config.mixing


def wilson(accuracy: float, samples: int) -> tuple[float, float]:
    """The 95 % Wilson score interval of a mean of ``samples`` values between 0 and 1.

    Exact in its meaning for right and wrong answers; where answers can be partly right, it is wider than need be.

    >>> wilson(1.0, 40)
    (0.9123..., 1.0)
    """
    if samples < 1:
        raise ValueError(f"samples must be at least 1; it is {samples}")
    z2 = 1.959963984540054**2
    middle = (accuracy + z2 / (2 * samples)) / (1 + z2 / samples)
    half = math.sqrt(z2 * (accuracy * (1 - accuracy) + z2 / (4 * samples)) / samples) / (1 + z2 / samples)
    return max(0.0, middle - half), min(1.0, middle + half)


# -------------------------------------------------------------------------------------------------------- the comparison


class Comparison:
    """Softmax, base and LoLA on some tasks and lengths, checked and read, ready to run.

    Arguments and errors are those of ``evaluate``.

    Attributes
    ----------
    setups : list of Setup
        The rows of each table.
    trained : str or None
        The mixing that the base was trained with; None without an adapter.
    threads : int
        Samples that run at the same time.
    device : str
        Where LoLA's attention runs and its caches lie.

    Examples
    --------
    >>> comparison = Comparison("needle", ["niah_single_1"], samples=10)  # doctest: +SKIP
    >>> comparison.needle().lola_answer  # doctest: +SKIP
    ' 2366034.'
    >>> rows = comparison.run()  # doctest: +SKIP
    """

    def __init__(
        self,
        model: str | os.PathLike = "needle",
        tasks: Sequence[str] = ("niah_single_1", "niah_single_2"),
        lengths: Sequence[int] = (4096,),
        *,
        attentions: Sequence[str] = ATTENTIONS,
        sparse: int = 256,
        window: int | None = None,
        chunk: int | None = None,
        mixing: str | None = None,
        score: str = "self_recall",
        sparse_per: str = "query_head",
        samples: int = 40,
        seed: int = 42,
        split: str = "eval",
        adapter: str | os.PathLike | None = None,
        device: str = "cpu",
        threads: int | None = None,
        dtype: str = "float16",
    ):
        _some_of("tasks", tasks, _tasks.TASKS)
        _some_of("attentions", attentions, ATTENTIONS)
        if isinstance(lengths, (int, str)) or not lengths:
            raise TypeError(f"lengths must be a sequence of at least one length; it is {lengths!r}")
        for length in lengths:
            _at_least("lengths", length, 1)
        _at_least("samples", samples, 1)
        _at_least("seed", seed, 0)
        if threads is not None:
            _at_least("threads", threads, 1)
        _one_of("split", split, _tasks.SPLITS)
        device = lola._lola.device(device)
        _one_of("dtype", dtype, ("float16", "float32"))
        if score == "external":
            raise ValueError("score must be one that LoLA computes; 'external' takes scores from a caller")

        self.model, self.tasks, self.lengths = str(model), list(tasks), list(lengths)
        self.samples, self.seed, self.split = samples, seed, split
        self.threads, self.device = threads or processors(), device
        self._student = None
        self.setups, self.trained = [Setup("softmax")], None
        read = functools.partial(Llama.from_pretrained, model, cache_dtype=dtype, device=device)
        if locate(model, adapter)[1] is not None:
            self._student = read(lola.Config(), adapter=adapter)
            self.trained = self._student.adapter.mixing
            config = dict(sparse=sparse, window=window, chunk=chunk, mixing=mixing, score=score, sparse_per=sparse_per, seed=seed)
            self.setups = make_setups(self._student.adapter, self._cache_bytes, **config)
        self._lola = self.setups[-1].config
        self.setups = [setup for setup in self.setups if setup.attention in attentions]
        if not self.setups:
            raise ValueError(f"attentions must be ('softmax',): {model} has no adapter")
        self._teacher = read() if self.setups[0].config is None else None
        self._anyone = self._teacher or self._student

        encode = self._anyone.tokenizer.encode
        # A byte model's lengths are counted without encoding, which is much faster.
        count = None if isinstance(self._anyone.tokenizer, ByteTokenizer) else encode
        self._prompts = {}
        for length, task in itertools.product(self.lengths, self.tasks):
            chosen = _tasks.fixed_samples(task, length, samples, seed, split, encode=count)
            self._prompts[length, task] = [(sample, np.array(encode(sample.prompt))) for sample in chosen]

    def _model_of(self, setup: Setup) -> Llama:
        return self._teacher if setup.config is None else self._student.with_attention(setup.config)

    def _cache_bytes(self, config: lola.Config) -> int:
        return self._student.with_attention(config).new_cache().nbytes

    def full_bytes(self, length: int) -> int:
        """Bytes of the full KV cache in float16 at a length."""
        g = self._anyone.geometry
        return 2 * 2 * length * g.layers * g.kv_heads * g.head_dim

    def lola_bytes(self) -> dict[str, int]:
        """Bytes of LoLA's cache in float16 for both ``sparse_per``; empty without an adapter."""
        if self._student is None:
            return {}
        half = self._student.with_cache_dtype("float16")
        sharings = ("query_head", "kv_head")
        return {per: half.with_attention(replace_config(self._lola, sparse_per=per)).new_cache().nbytes for per in sharings}

    def run(
        self,
        on_row: Callable[[dict], None] | None = None,
        on_sample: Callable[[int, int], None] | None = None,
    ) -> list[dict]:
        """Answer every sample with every attention; the result of ``evaluate``."""
        cells = []
        units: queue.SimpleQueue = queue.SimpleQueue()
        with _single_threaded() as single:
            # Where BLAS cannot be held to one thread, it is left to use them all, and samples run one after the other.
            workers = self.threads if single else 1
            for (length, task), prompts in self._prompts.items():
                slices = _slices([prompt for _, prompt in prompts], workers)
                for setup in self.setups:
                    cells.append(_Cell(setup, task, length, self.samples))
                    for part in slices:
                        units.put((cells[-1], self._model_of(setup), [prompts[i] for i in part]))
            rows: list[dict] = []
            for done, (cell, graded) in enumerate(_pooled(units, workers), 1):
                cell.add(graded)
                if on_sample is not None:
                    on_sample(done, len(cells) * self.samples)
                while len(rows) < len(cells) and len(cells[len(rows)].scores) == self.samples:
                    rows.append(self._row(cells[len(rows)], workers))
                    if on_row is not None:
                        on_row(rows[-1])
        return rows

    def _row(self, cell: _Cell, workers: int) -> dict:
        accuracy = math.fsum(cell.scores) / cell.samples
        low, high = wilson(accuracy, cell.samples)
        config = cell.setup.config
        return {
            "model": self.model,
            "attention": cell.setup.attention,
            "mixing": cell.setup.mixing,
            "task": cell.task,
            "length": cell.length,
            "sparse": None if config is None else config.sparse,
            "window": None if config is None else config.window,
            "samples": cell.samples,
            "accuracy": accuracy,
            "low": low,
            "high": high,
            "cache_bytes": cell.cache_bytes,
            "tokens_per_second": cell.tokens / cell.seconds * workers,
            "seed": self.seed,
            "weights_hash": self._model_of(cell.setup).weights_hash,
            # Softmax attention is the CPU's wherever LoLA's is.
            "device": "cpu" if config is None else self.device,
        }

    def needle(self) -> Needle:
        """The first sample, answered by the base as it was trained and by LoLA, with a look into LoLA's caches.

        Raises ValueError without an adapter, and if ``attentions`` left one of the two out.
        """
        base, full = (next((s for s in self.setups if s.attention == name), None) for name in ("base", "lola"))
        if base is None or full is None:
            raise ValueError(f"a needle takes base and lola; there are {', '.join(s.attention for s in self.setups)}")
        task = self.tasks[0]
        sample, prompt = self._prompts[self.lengths[0], task][0]
        found = {}
        with _single_threaded() as single:
            units: queue.SimpleQueue = queue.SimpleQueue()
            for setup in (base, full):
                units.put((setup, self._model_of(setup), [(sample, prompt)]))
            for setup, graded in _pooled(units, min(2, self.threads) if single else 1):
                found[setup] = graded

        # The values' places in tokens: what comes before an end is encoded by itself, which is exact for bytes.
        encode = self._anyone.tokenizer.encode
        spans = [[len(encode(sample.prompt[:end])) for end in value] for value in sample.values]
        wanted = np.concatenate([np.arange(*span) for span in spans])
        layers = found[full].cache.layers
        heads = range(self._anyone.geometry.heads)
        held = np.array([[np.isin(wanted, layer.sparse_positions(0, head)) for head in heads] for layer in layers])
        return Needle(
            sample=sample,
            base=base,
            lola=full,
            base_answer=found[base].answer,
            lola_answer=found[full].answer,
            base_right=found[base].score == 1,
            lola_right=found[full].score == 1,
            whole=held.all(axis=-1),
            part=held.any(axis=-1),
            in_window=bool(np.isin(wanted, layers[0].window_positions(0)).any()),
        )


@dataclass(frozen=True)
class Needle:
    """One sample, what the base and LoLA answer, and which heads have it in their sparse caches.

    ``whole`` (layers, heads) bool: the head's sparse cache holds every token of the asked values; ``part``: at least one.
    ``in_window``: the needle is so near the end that the window holds tokens of it.
    """

    sample: _tasks.Sample
    base: Setup
    lola: Setup
    base_answer: str
    lola_answer: str
    base_right: bool
    lola_right: bool
    whole: np.ndarray
    part: np.ndarray
    in_window: bool


def evaluate(
    model: str | os.PathLike = "needle",
    tasks: Sequence[str] = ("niah_single_1", "niah_single_2"),
    lengths: Sequence[int] = (4096,),
    *,
    on_row: Callable[[dict], None] | None = None,
    on_sample: Callable[[int, int], None] | None = None,
    **options,
) -> list[dict]:
    """Accuracy, cache size and speed of each attention on each task and length.

    Parameters
    ----------
    model : str or path
        A bundled model's name or a folder; see ``lola.models.Llama.from_pretrained``. Without an adapter only "softmax" runs.
    tasks : sequence of str
        Names in ``lola.eval.TASKS``.
    lengths : sequence of int
        Tokens of a prompt and its answer together.
    on_row : callable, optional
        Called with each row as soon as it and all before it are complete.
    on_sample : callable, optional
        Called with (samples done, samples in all) after each sample.
    attentions : sequence of str
        Which rows to run, of ``ATTENTIONS``; by default all.
    sparse, window, chunk, mixing, score, sparse_per
        LoLA's ``lola.Config``. Window and chunk are by default the adapter's, the mixing "gated".
    samples : int
        How many of the fixed list; 40 by default.
    seed : int
        Draws the list of samples, and the "random" score; 42 by default.
    split : {"eval", "other", "valid", "train"}
        Which part of the text; see ``lola.eval.text``.
    adapter : path, optional
        Folder of another adapter.
    device : str
        Where LoLA's attention runs and its caches lie: "cpu", "cuda" or "cuda:1" and so on. All else, softmax attention
        included, runs on the CPU, in NumPy; queries, keys, values and outputs are copied there and back.
    threads : int, optional
        Samples that run at the same time; by default as many as there are processors for this process.
    dtype : {"float16", "float32"}
        Of keys and values in the caches, softmax's too.

    Returns
    -------
    list of dict
        A row for each length, task and attention, with the keys model, attention, mixing, task, length, sparse, window, samples,
        accuracy, low, high (95 % interval), cache_bytes (of one sequence), tokens_per_second (prompt and answer tokens that
        went through the model, all threads together), seed, weights_hash, device. What softmax lacks is None; its device is "cpu".

    Raises
    ------
    ValueError, TypeError, FileNotFoundError
        For a wrong argument; the message names it and what it may be.
    RuntimeError
        For a device that cannot be used; the message says why.
    """
    return Comparison(model, tasks, lengths, **options).run(on_row, on_sample)


def make_setups(adapter: Adapter, cache_bytes: Callable[[lola.Config], int], **options) -> list[Setup]:
    """The rows of the comparison for an adapter, LoLA last.

    Parameters
    ----------
    adapter : Adapter
        Tells what the base was trained with.
    cache_bytes : callable
        From a ``lola.Config`` to the bytes of a sequence's cache.
    **options
        Fields of LoLA's ``lola.Config``; those left out, or None, are the adapter's window and chunk, "gated", and ``Config``'s own
        defaults.
    """
    options = {name: value for name, value in options.items() if value is not None}
    config = lola.Config(**{"window": adapter.window, "chunk": adapter.chunk, "mixing": "gated", **options})
    base = replace_config(config, sparse=0)
    setups = [Setup("softmax"), Setup("base", replace_config(base, mixing=adapter.mixing))]
    if config.mixing != adapter.mixing:
        setups.append(Setup("base", base))
    setups.append(Setup("window", replace_config(base, window=matching_window(base, cache_bytes(config), cache_bytes))))
    if config.mixing != "cache_only":
        setups.append(Setup("cache_only", replace_config(config, mixing="cache_only")))
    return [*setups, Setup("lola", config)]


def replace_config(config: lola.Config, **changes) -> lola.Config:
    """A copy of a ``lola.Config`` with some fields changed."""
    names = ("window", "chunk", "sparse", "mixing", "score", "sparse_per", "scale", "seed")
    return lola.Config(**{name: getattr(config, name) for name in names} | changes)


def matching_window(base: lola.Config, wanted: int, cache_bytes: Callable[[lola.Config], int]) -> int:
    """The shortest window, a multiple of the chunk, with which ``base`` takes at least ``wanted`` bytes."""
    window, first = base.window, cache_bytes(base)
    # Bytes grow evenly with the window, but for what the cache rounds up; so jump close, then step.
    step = cache_bytes(replace_config(base, window=window + base.chunk)) - first
    window += max(0, (wanted - first) // step - 1) * base.chunk
    while cache_bytes(replace_config(base, window=window)) < wanted:
        window += base.chunk
    return window


def _some_of(name, values, known):
    if isinstance(values, str) or not values:
        raise TypeError(f"{name} must be a sequence of at least one of {', '.join(known)}; it is {values!r}")
    for value in values:
        _one_of(name, value, known)


def _one_of(name, value, known):
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}; it is {value!r}")


def _at_least(name, value, least):
    if not isinstance(value, (int, np.integer)) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} must be an integer, {least} or more; it is {value!r}")


# --------------------------------------------------------------------------------------------------- samples on threads


@dataclass(frozen=True)
class _Graded:
    """One answered sample; ``tokens`` went through the model for it, in ``seconds``."""

    answer: str
    score: float
    cache: ModelCache
    tokens: int
    seconds: float


@dataclass
class _Cell:
    """One row of the result as it fills up."""

    setup: Setup
    task: str
    length: int
    samples: int
    scores: list[float] = field(default_factory=list)
    cache_bytes: int = 0
    tokens: int = 0
    seconds: float = 0.0

    def add(self, graded: _Graded) -> None:
        self.scores.append(graded.score)
        self.cache_bytes = max(self.cache_bytes, graded.cache.nbytes)
        self.tokens += graded.tokens
        self.seconds += graded.seconds


def _pooled(units: queue.SimpleQueue, workers: int) -> Iterator[tuple[object, _Graded]]:
    """Works through units (label, model, samples) on threads and yields each sample's label and grade as it is done.

    Ends the threads when the caller stops listening; an error in one of them is raised here.
    """
    results: queue.SimpleQueue = queue.SimpleQueue()
    stopped = threading.Event()

    def work():
        try:
            while not stopped.is_set():
                label, model, samples = units.get_nowait()
                for graded in _grades(model, samples, stopped.is_set):
                    results.put((label, graded))
        except queue.Empty:
            results.put(None)
        except BaseException as error:  # whatever it is, the thread that waits must hear of it
            results.put(error)

    pool = [threading.Thread(target=work, name=f"lola-eval-{i}", daemon=True) for i in range(workers)]
    for thread in pool:
        thread.start()
    try:
        running = workers
        while running:
            result = results.get()
            if result is None:
                running -= 1
            elif isinstance(result, BaseException):
                raise result
            else:
                yield result
    finally:
        stopped.set()
        for thread in pool:
            thread.join()


def _grades(model: Llama, samples: list[tuple[_tasks.Sample, np.ndarray]], stopped: Callable[[], bool]) -> Iterator[_Graded]:
    begun = time.perf_counter()
    limits = [sample.generate for sample, _ in samples]
    for i, ids, cache, tokens in _answers(model, [prompt for _, prompt in samples], limits, stopped):
        answer = model.tokenizer.decode(ids)
        grade = _tasks.score(samples[i][0].task, answer, samples[i][0].references)
        now = time.perf_counter()
        yield _Graded(answer, grade, cache, tokens, now - begun)
        begun = time.perf_counter()


def _answers(
    model: Llama, prompts: list, limits: list, stopped: Callable[[], bool] = lambda: False
) -> Iterator[tuple[int, np.ndarray, ModelCache, int]]:
    """Greedy answers, each up to the end of its line: (index, new tokens, cache after the prompt, tokens run).

    Prompts are read in sorted order, in which those that begin alike are neighbours. ``kept`` holds caches of the
    beginnings that prompts still to come will go on from, the longest last. Answers are decoded some together.
    """
    order = sorted(range(len(prompts)), key=lambda i: prompts[i].tolist())
    shared = _shared([prompts[i] for i in order])
    stop = (*model.tokenizer.newlines, *model.geometry.eos)
    kept: list = []
    waiting: list = []
    for place, i in enumerate(order):
        if stopped():
            return
        ids = prompts[i]
        wanted = set(accumulate(shared[place + 1 :], min))
        while kept and kept[-1][0] > shared[place]:
            kept.pop()
        done, cache = (kept[-1][0], kept[-1][1].copy()) if kept else (0, model.new_cache())
        kept = [entry for entry in kept if entry[0] in wanted]
        begun = done
        for cut in sorted(wanted):
            # One token at least is left for the answer to begin from.
            if done + _WORTH_SHARING <= cut < len(ids):
                model.read(ids[None, done:cut], cache)
                kept.append((cut, cache.copy()))
                done = cut
        waiting.append((i, model.last_logits(ids[None, done:], cache), cache, len(ids) - begun))
        if len(waiting) == _TOGETHER or place == len(order) - 1:
            indices, logits, caches, tokens = zip(*waiting)
            answers = model.decode(np.concatenate(logits), max(limits[i] for i in indices), stop, ModelCache.stack(caches))
            for i, answer, cache, read in zip(indices, answers, caches, tokens):
                answer = answer[: limits[i]]
                yield i, answer, cache, read + len(answer)
            waiting = []


def _shared(prompts: list) -> list[int]:
    """How many tokens each prompt has in common with the one before it; 0 for the first."""
    common = [0]
    for one, two in zip(prompts, prompts[1:]):
        n = min(len(one), len(two))
        differ = np.flatnonzero(one[:n] != two[:n])
        common.append(int(differ[0]) if len(differ) else n)
    return common


def _slices(prompts: list, parts: int) -> list[list[int]]:
    """Cuts the sorted prompts into at most ``parts`` runs of neighbours that cost about the same: lists of indices."""
    order = sorted(range(len(prompts)), key=lambda i: prompts[i].tolist())
    shared = _shared([prompts[i] for i in order])
    costs = [len(prompts[i]) - common for i, common in zip(order, shared)]
    # A run begins its first prompt from scratch, so each cut costs what was shared across it; for the balance that is small.
    target = sum(costs) / parts
    slices: list[list[int]] = [[]]
    spent = 0.0
    for i, cost in zip(order, costs):
        if slices[-1] and spent + cost / 2 > target * len(slices) and len(slices) < parts:
            slices.append([])
        slices[-1].append(i)
        spent += cost
    return slices


def processors() -> int:
    """How many processors this process may run on."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on every system
        return os.cpu_count() or 1


@contextlib.contextmanager
def _single_threaded():
    """Holds Lola's kernels and BLAS to one thread each; yields whether BLAS could be held."""
    before = lola.get_num_threads()
    with contextlib.ExitStack() as stack:
        single = _hold_blas(stack)
        if single:
            lola.set_num_threads(1)
            stack.callback(lola.set_num_threads, before)
        yield single


def _hold_blas(stack: contextlib.ExitStack) -> bool:
    try:
        import threadpoolctl
    except ModuleNotFoundError:
        pass
    else:
        if threadpoolctl.threadpool_info():
            stack.enter_context(threadpoolctl.threadpool_limits(1))
            return True
    # NumPy's wheels bring their own OpenBLAS, whose names have a prefix and, with 64-bit indices, a suffix.
    folder = Path(np.__file__).parent
    for path in (*folder.parent.glob("numpy.libs/*openblas*"), *folder.glob(".dylibs/*openblas*")):
        with contextlib.suppress(OSError):
            library = ctypes.CDLL(str(path))
            for prefix in ("scipy_", ""):
                for suffix in ("64_", ""):
                    name = f"{prefix}openblas_%s_num_threads{suffix}"
                    if hasattr(library, name % "set") and hasattr(library, name % "get"):
                        threads = getattr(library, name % "get")()
                        getattr(library, name % "set")(1)
                        stack.callback(getattr(library, name % "set"), threads)
                        return True
    return any(os.environ.get(name) == "1" for name in ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS"))
