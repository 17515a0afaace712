"""The text that haystacks are cut from, and the words that keys are made of.

Both ship with the package and are in the public domain: the King James Bible (4.1 MB of ASCII, one chapter a line,
compressed in ``data/kjv.txt.gz``) and a list of common English adjectives and nouns (``data/words.txt``).

The Bible is cut by place into four parts that never overlap, so that a model trained on one is tested on text that it
has not seen:

========= =================================== =============================================
split     bytes                               for
========= =================================== =============================================
``train`` all but the last 700,000            training
``valid`` the 100,000 before the last 600,000 choosing between training runs
``eval``  the first half of the last 600,000  every reported figure
``other`` the second half of the last 600,000 the same figures again, on other text and seeds
========= =================================== =============================================

Needs NumPy only.
"""

from __future__ import annotations

import functools
import gzip
from pathlib import Path

import numpy as np

__all__ = ["SPLITS", "Text", "bundled", "key_words"]

SPLITS = ("train", "valid", "eval", "other")

_DATA = Path(__file__).parent / "data"
_HELD_OUT = 600_000
_VALID = 100_000


class Text:
    """A text as single-spaced words, with the byte offsets of words and sentences.

    Parameters
    ----------
    text : str
        Any text with at least one word. Runs of white space become one space. A sentence ends at a word that closes
        with ``.``, ``?`` or ``!`` (quotes and brackets after it included).

    Attributes
    ----------
    string : str
        The text, words joined by single spaces.
    words : ndarray of int64, (number of words + 1,)
        Character offset of each word, then ``len(string) + 1``: words i .. j-1 are
        ``string[words[i] : words[j] - 1]``.
    sentences : ndarray of int64, (number of sentences,)
        Index of each sentence's first word; the first is 0.

    Examples
    --------
    >>> text = Text("To be, or not.  That is\\nthe question.")
    >>> text.cut(4, 7)
    'That is the'
    >>> text.sentences.tolist()
    [0, 4]
    """

    def __init__(self, text: str):
        words = text.split()
        if not words:
            raise ValueError("text must hold at least one word; it is empty")
        self.string = " ".join(words)
        self.words = np.cumsum([0] + [len(word) + 1 for word in words])
        ends = np.array([word.rstrip("\"')]")[-1:] in (".", "?", "!") for word in words])
        self.sentences = np.flatnonzero(np.concatenate(([True], ends[:-1])))
        self._repeated: dict[int, Text] = {}

    def __len__(self) -> int:
        """Number of words."""
        return len(self.words) - 1

    def cut(self, first: int, last: int) -> str:
        """Words ``first`` to ``last - 1``, joined by spaces; the empty string if there are none."""
        return self.string[self.words[first] : self.words[last] - 1] if last > first else ""

    def repeated(self, times: int) -> Text:
        """The text ``times`` times over, for haystacks longer than what is left of it; kept for the next call."""
        if times not in self._repeated:
            copy = Text.__new__(Text)
            copy.string = " ".join([self.string] * times)
            shift = np.arange(times)[:, None]
            copy.words = np.append((self.words[:-1] + shift * self.words[-1]).ravel(), times * self.words[-1])
            copy.sentences = (self.sentences + shift * len(self)).ravel()
            copy._repeated = {}
            self._repeated[times] = copy
        return self._repeated[times]


@functools.lru_cache(maxsize=None)
def bundled(split: str) -> Text:
    """One part of the bundled text (see the table above), read once and kept.

    Raises ``ValueError`` for a split that is not one of ``SPLITS``.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}; it is {split!r}")
    string = gzip.decompress((_DATA / "kjv.txt.gz").read_bytes()).decode("ascii")
    end = len(string)
    first, last = {
        "train": (0, end - _HELD_OUT - _VALID),
        "valid": (end - _HELD_OUT - _VALID, end - _HELD_OUT),
        "eval": (end - _HELD_OUT, end - _HELD_OUT // 2),
        "other": (end - _HELD_OUT // 2, end),
    }[split]
    # A cut inside a word would leave half of it in each part: move both ends to the next space.
    first = first and string.index(" ", first)
    last = last if last == end else string.index(" ", last)
    return Text(string[first:last])


@functools.lru_cache(maxsize=None)
def key_words() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The adjectives and the nouns of which keys like ``amber-lantern`` are made; nouns are a multiple of 8."""
    lines = (_DATA / "words.txt").read_text("ascii").splitlines()
    return tuple(lines[1].split()), tuple(lines[2].split())
