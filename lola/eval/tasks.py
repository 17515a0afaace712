"""Needle-in-a-haystack tasks in the format of RULER (Hsieh et al. 2024, arXiv 2404.06654), for any tokenizer.

``make_sample`` writes one prompt of a wanted length, ``fixed_samples`` a fixed list of them, ``score`` grades an answer.
The wording, the needles, the depths and the scoring are RULER's. Four things differ, all said here:

* haystack text is the bundled one (:mod:`lola.eval.text`), read from a random sentence on, where RULER always
  begins at its essays' first word;
* keys are pairs from the bundled word list; one key in eight (by place in the list) is kept for ``eval`` and ``other``,
  one for ``valid``, the rest for ``train``, so that no key that a model is tested with was trained on;
* distractor keys never repeat, and a needle before the first or after the last sentence brings no stray space;
* the random numbers are PCG64's raw output, which NumPy keeps fixed, so a sample is the same everywhere and always.

vt is written without RULER's worked example in front. Needs NumPy only.

Examples
--------
>>> sample = make_sample("niah_single_1", 1024, seed=1)
>>> sample.prompt[:51], len(sample.prompt) <= 1024 - 128
('A special magic number is hidden within the followi', True)
>>> score("niah_single_1", sample.answer, sample.references)
1.0
"""

from __future__ import annotations

import uuid
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np

from .text import SPLITS, Text, bundled, key_words

__all__ = ["TASKS", "Sample", "Task", "fixed_samples", "make_sample", "score"]

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
NEEDLE = "One of the special magic {kind} for {key} is: {value}."
# RULER's 40 even steps of 0 .. 100 %, rounded to whole per cent.
DEPTHS = tuple(int(d) for d in np.round(np.linspace(0, 100, 40)))

ASK = (
    "Some special magic {kind} are hidden within the following text. Make sure to memorize it. I will quiz you about the "
    "{kind} afterwards.\n",
    "\nWhat are all the special magic {kind} for {query} mentioned in the provided text?"
    " The special magic {kind} for {query} mentioned in the provided text are",
)
ASK_ONE = (
    "A special magic {kind} is hidden within the following text. Make sure to memorize it. I will quiz you about the "
    "{kind} afterwards.\n",
    "\nWhat is the special magic {kind} for {query} mentioned in the provided text?"
    " The special magic {kind} for {query} mentioned in the provided text is",
)
ASK_VT = (
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n",
    "\nQuestion: Find all variables that are assigned the value {query} in the text above."
    " Answer: According to the chain(s) of variable assignment in the text above, 5 variables are assigned the value"
    " {query}, they are: ",
)


@dataclass(frozen=True)
class Task:
    """What one task hides and asks.

    ``haystack`` is "noise" (one unit of five short sentences a line), "text" (running text) or "needles" (one distractor
    needle a line). ``keys`` needles with ``values`` values each are hidden and ``queries`` of the keys asked for; for vt,
    ``values`` is the length of the chain. ``kind`` is "numbers" (7 digits) or "uuids". ``generate`` is the number of tokens
    that the answer may take; it counts towards a sample's length.
    """

    name: str
    description: str
    haystack: str
    kind: str = "numbers"
    keys: int = 1
    values: int = 1
    queries: int = 1
    generate: int = 128


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("niah_single_1", "one number hidden among lines of noise", "noise"),
        Task("niah_single_2", "one number hidden in running text", "text"),
        Task("niah_single_3", "one uuid hidden in running text", "text", kind="uuids"),
        Task("niah_multikey_1", "four numbers in running text, one of them asked for", "text", keys=4),
        Task("niah_multikey_2", "nothing but needles, one of them asked for", "needles"),
        Task("niah_multivalue", "four numbers for one key in running text, all asked for", "text", values=4),
        Task("niah_multiquery", "four numbers in running text, all asked for", "text", keys=4, queries=4),
        Task("vt", "a chain of five variables among lines of noise", "noise", values=5, generate=30),
    )
}


@dataclass(frozen=True)
class Sample:
    """One prompt with what is known about it.

    Attributes
    ----------
    task : str
        Name of the task.
    prompt : str
        Everything the model reads, up to and including the words that begin the answer.
    answer : str
        A perfect answer as it would follow the prompt, newline included.
    references : tuple of str
        The strings to be found in an answer.
    needles : tuple of (int, int)
        Character span in the prompt of each needle that is asked for, in the order of the text.
    values : tuple of (int, int)
        Character span of the value within each of ``needles``.
    depth : float
        Where the first of ``needles`` begins, as a share of the prompt.
    length : int
        Tokens of the prompt plus ``generate``; at most the length that was asked for.
    generate : int
        Tokens that the answer may take.
    """

    task: str
    prompt: str
    answer: str
    references: tuple[str, ...]
    needles: tuple[tuple[int, int], ...]
    values: tuple[tuple[int, int], ...]
    depth: float
    length: int
    generate: int


class Draw:
    """Random numbers out of PCG64's raw 64-bit words, whose stream NumPy guarantees (Generator's it does not)."""

    def __init__(self, *entropy: int):
        self._source = np.random.PCG64(np.random.SeedSequence(entropy))
        self._words: list[int] = []

    def below(self, n: int) -> int:
        """An integer in 0 .. n-1 (multiply and shift: biased by n / 2**64 at most)."""
        if not self._words:
            self._words = self._source.random_raw(64).tolist()
        return self._words.pop() * n >> 64

    def distinct(self, n: int, count: int) -> list[int]:
        """``count`` different integers in 0 .. n-1, sorted (repeats only where count > n)."""
        taken: set[int] = set()
        while len(taken) < min(n, count):
            taken.add(self.below(n))
        return sorted(list(taken) + [self.below(n) for _ in range(count - len(taken))])

    def shuffled(self, items: Sequence) -> list:
        items = list(items)
        for i in range(len(items) - 1, 0, -1):
            j = self.below(i + 1)
            items[i], items[j] = items[j], items[i]
        return items

    def number(self) -> str:
        return str(1_000_000 + self.below(9_000_000))

    def uuid(self) -> str:
        return str(uuid.UUID(int=self.below(1 << 32) << 96 | self.below(1 << 48) << 48 | self.below(1 << 48), version=4))

    def value(self, kind: str) -> str:
        return self.uuid() if kind == "uuids" else self.number()

    def key(self, split: str, taken: set[str]) -> str:
        """A key of the split that is not in ``taken``; it is added there."""
        adjectives, nouns = key_words()
        while True:
            a = self.below(len(adjectives))
            residue = {"train": self.below(6), "valid": 6}.get(split, 7)
            key = f"{adjectives[a]}-{nouns[8 * self.below(len(nouns) // 8) + (residue - a) % 8]}"
            if key not in taken:
                taken.add(key)
                return key


def largest(fits: Callable[[int], bool], low: int, guess: int) -> int:
    """The largest n >= low with fits(n), where fits goes from true to false once; fits(low) is taken to hold."""
    high = max(guess, low + 1)
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


class Haystack:
    """``units`` lines or words of haystack around given needles: ``build(units)`` gives the context as one string.

    ``size(units)`` is its length in characters without building it. Everything random is drawn before, or comes from
    ``place`` afresh for each size, so a context depends on its size and the draw alone.
    """

    def __init__(self, kind: str, needles: list[str], draw: Draw, split: str, taken: set[str], text: Text | None):
        self.kind, self.needles = kind, needles
        self.place = [draw.below(1 << 64) for _ in range(2)]
        self.fixed = sum(len(needle) + 1 for needle in needles) - 1
        # Running text needs a sentence around each needle's place; lines need a place for each needle.
        self.least = 1 if kind == "text" else len(needles)
        if kind == "needles":
            self.new_line = lambda: NEEDLE.format(kind="numbers", key=draw.key(split, taken), value=draw.number())
            self.lines: list[str] = []
            self.sizes = [0]
        elif kind == "text":
            self.text = bundled(split) if text is None else text
            self.start = draw.below(len(self.text.sentences))

    def _words(self, units: int) -> tuple[Text, int]:
        """A text of at least ``units`` words from its start on (read in a circle), and the word to start from."""
        first = int(self.text.sentences[self.start])
        return self.text.repeated(-(-(first + units) // len(self.text))) if first + units > len(self.text) else self.text, first

    def _grow(self, units: int) -> None:
        while len(self.lines) < units:
            self.lines.append(self.new_line())
            self.sizes.append(self.sizes[-1] + len(self.lines[-1]) + 1)

    def guess(self, characters: int) -> int:
        return max(1, characters // {"noise": len(NOISE) + 1, "needles": 61, "text": 5}[self.kind])

    def size(self, units: int) -> int:
        if self.kind == "noise":
            return self.fixed + units * (len(NOISE) + 1)
        if self.kind == "needles":
            self._grow(units)
            return self.fixed + self.sizes[units]
        text, first = self._words(units)
        return self.fixed + int(text.words[first + units] - text.words[first])

    def build(self, units: int) -> str:
        draw = Draw(*self.place, units)
        if self.kind != "text":
            if self.kind == "needles":
                self._grow(units)
            lines = [NOISE] * units if self.kind == "noise" else self.lines[:units]
            # As RULER: each needle goes before a line of its own, so the last line is always haystack.
            for place, needle in reversed(list(zip(draw.distinct(units, len(self.needles)), self.needles))):
                lines.insert(place, needle)
            return "\n".join(lines)
        text, first = self._words(units)
        low, high = np.searchsorted(text.sentences, (first, first + units))
        pieces = []
        last = first
        for depth, needle in zip(draw.distinct(len(DEPTHS), len(self.needles)), self.needles):
            sentence = low + int((high - low) * DEPTHS[depth] / 100)
            place = int(text.sentences[sentence]) if sentence < high else first + units
            pieces += [text.cut(last, place), needle]
            last = place
        return " ".join(piece for piece in (*pieces, text.cut(last, first + units)) if piece)


def _list(items: Sequence[str]) -> str:
    """'a', 'a, and b', 'a, b, and c': as RULER joins its queries."""
    return items[0] if len(items) == 1 else ", ".join(items[:-1]) + ", and " + items[-1]


def make_sample(
    task: str,
    length: int,
    seed: int | Sequence[int],
    split: str = "eval",
    text: str | Text | None = None,
    *,
    encode: Callable[[str], Sequence] | None = None,
    generate: int | None = None,
) -> Sample:
    """One sample of ``task``, the longest haystack whose prompt and answer fit in ``length`` tokens.

    Parameters
    ----------
    task : str
        A name in ``TASKS``.
    length : int
        Tokens of the prompt and the ``generate`` tokens of the answer, together at most.
    seed : int or sequence of int
        Non-negative. The sample depends on task, length, seed, split, text, encode and generate, and on nothing else.
    split : {"eval", "other", "valid", "train"}
        Which part of the bundled text and which keys to draw from; see :mod:`lola.eval.text`.
    text : str or Text, optional
        Text for the "text" haystacks instead of the bundled one.
    encode : callable, optional
        From a string to its tokens; lengths are counted with it. By default a token is a byte of UTF-8.
    generate : int, optional
        Tokens kept for the answer; by default the task's (128, or 30 for vt), as in RULER.

    Returns
    -------
    Sample

    Raises
    ------
    ValueError
        For an unknown task or split, a seed below 0, or a length too small for the smallest haystack.

    Examples
    --------
    >>> sample = make_sample("niah_single_2", 2048, seed=7)
    >>> begin, end = sample.values[0]
    >>> sample.prompt[begin:end] == sample.references[0]
    True
    >>> sample.answer == f" {sample.references[0]}.\\n"
    True
    """
    if task not in TASKS:
        raise ValueError(f"task must be one of {', '.join(TASKS)}; it is {task!r}")
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}; it is {split!r}")
    seeds = (seed,) if isinstance(seed, (int, np.integer)) else tuple(seed)
    if any(s < 0 for s in seeds):
        raise ValueError(f"seed must not be negative; it is {seed!r}")
    spec = TASKS[task]
    generate = spec.generate if generate is None else generate
    if isinstance(text, str):
        text = Text(text)
    draw = Draw(*(int(s) for s in seeds), length, zlib.crc32(task.encode()), SPLITS.index(split))
    taken: set[str] = set()

    if task == "vt":
        while len(taken) < spec.values:
            taken.add("".join(chr(65 + draw.below(26)) for _ in range(5)))
        # A set's order changes from run to run, so the chain's order is drawn.
        names = draw.shuffled(sorted(taken))
        query = str(10_000 + draw.below(90_000))
        values = [query] + [f"VAR {name} " for name in names[:-1]]
        needles = [f"VAR {name} = {value}" for name, value in zip(names, values)]
        asked = list(zip(needles, values))
        references = tuple(names)
        answer = " ".join(names) + "\n"
        before, after = (part.format(query=query) for part in ASK_VT)
    else:
        keys = [draw.key(split, taken) for _ in range(spec.keys)]
        hidden = [
            (key, value, NEEDLE.format(kind=spec.kind, key=key, value=value))
            for key in keys
            for value in [draw.value(spec.kind) for _ in range(spec.values)]
        ]
        hidden = draw.shuffled(hidden)
        needles = [needle for _, _, needle in hidden]
        queries = draw.shuffled(keys)[: spec.queries]
        asked = [(needle, value) for key, value, needle in hidden if key in queries]
        # One key's values in the order of the text, several keys in the order of the question.
        references = tuple(value for query in queries for key, value, _ in hidden if key == query)
        answer = f" {_list(references)}.\n"
        one = spec.queries * spec.values == 1
        before, after = (
            part.format(kind=spec.kind[:-1] if one else spec.kind, query=_list(queries)) for part in (ASK_ONE if one else ASK)
        )

    haystack = Haystack(spec.haystack, needles, draw, split, taken, text)
    room = length - generate
    if encode is None and (spec.haystack != "text" or haystack.text.string.isascii()):
        frame = len(before) + len(after)  # all ASCII: characters are bytes, and sizes need no building

        def fits(units: int) -> bool:
            return frame + haystack.size(units) <= room
    else:
        count = encode or (lambda string: string.encode())

        def fits(units: int) -> bool:
            return len(count(before + haystack.build(units) + after)) <= room

    if not fits(haystack.least):
        need = len((encode or str.encode)(before + haystack.build(haystack.least) + after)) + generate
        raise ValueError(f"length must be at least {need} tokens for this sample of {task}; it is {length}")
    units = largest(fits, haystack.least, haystack.guess(max(1, room - len(before) - len(after))))
    prompt = before + haystack.build(units) + after

    spans = []
    for needle, value in asked:
        begin = prompt.index(needle, len(before))
        at = begin + needle.rindex(value)
        spans.append(((begin, begin + len(needle)), (at, at + len(value))))
    spans.sort()
    return Sample(
        task=task,
        prompt=prompt,
        answer=answer,
        references=references,
        needles=tuple(needle for needle, _ in spans),
        values=tuple(value for _, value in spans),
        depth=spans[0][0][0] / len(prompt),
        length=len((encode or str.encode)(prompt)) + generate,
        generate=generate,
    )


def fixed_samples(
    task: str,
    length: int,
    count: int = 200,
    seed: int = 42,
    split: str = "eval",
    text: str | Text | None = None,
    encode: Callable[[str], Sequence] | None = None,
) -> list[Sample]:
    """The fixed list of samples that figures are reported on: sample i depends on task, length, seed, split and i alone.

    So the first 40 of 200 are the 40 that a shorter run sees. Arguments and errors are those of ``make_sample``.

    Examples
    --------
    >>> fixed_samples("vt", 1024, 3) == fixed_samples("vt", 1024, 5)[:3]
    True
    """
    return [make_sample(task, length, (seed, i), split, text, encode=encode) for i in range(count)]


def score(task: str, answer_text: str, references: Sequence[str]) -> float:
    """Mean share of the references found in the answer's first line, upper and lower case alike.

    Parameters
    ----------
    task : str
        A name in ``TASKS`` (all are scored alike).
    answer_text : str
        What the model generated after the prompt; everything from the first newline on is ignored.
    references : sequence of str
        A sample's ``references``.

    Examples
    --------
    >>> score("niah_multivalue", " 1111111 and 2222222.\\n3333333", ["1111111", "3333333"])
    0.5
    """
    if task not in TASKS:
        raise ValueError(f"task must be one of {', '.join(TASKS)}; it is {task!r}")
    if not references:
        raise ValueError("references must hold at least one string; it is empty")
    line = answer_text.split("\n", 1)[0].lower()
    return sum(reference.lower() in line for reference in references) / len(references)
