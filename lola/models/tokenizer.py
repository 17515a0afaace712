"""Text to token ids and back, as a folder's ``tokenizer.json`` says.

A byte-level vocabulary without merges, where each of the 256 bytes is a token (the bundled model's), is read here.
Any other kind goes through the `tokenizers` package if it is installed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path

__all__ = ["ByteTokenizer", "load"]


def _byte_letters() -> list[str]:
    """The letter that byte-level BPE writes for each byte: itself where printable, else the next one from U+0100 on."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    spare = iter(range(256, 512))
    return [chr(byte if byte in printable else next(spare)) for byte in range(256)]


class ByteTokenizer:
    """Each byte of the UTF-8 text is one token.

    Parameters
    ----------
    ids : sequence of 256 int
        The token id of each byte.

    Examples
    --------
    >>> tokenizer = ByteTokenizer(range(256))
    >>> tokenizer.encode("hé")
    [104, 195, 169]
    >>> tokenizer.decode([104, 195])
    'h\N{REPLACEMENT CHARACTER}'
    """

    def __init__(self, ids: Sequence[int]):
        self._ids = [int(i) for i in ids]
        if len(set(self._ids)) != 256:
            raise ValueError(f"ids must be 256 different token ids, one for each byte; there are {len(set(self._ids))}")
        self._bytes = {token: bytes([byte]) for byte, token in enumerate(self._ids)}

    def encode(self, text: str) -> list[int]:
        """The text's token ids."""
        return [self._ids[byte] for byte in text.encode()]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids; ids of no byte are left out, broken UTF-8 becomes U+FFFD."""
        return b"".join(self._bytes.get(int(i), b"") for i in ids).decode("utf-8", "replace")

    @property
    def newlines(self) -> list[int]:
        """The tokens that end a line."""
        return [self._ids[10]]


class _HuggingFace:
    """The same three names over a ``tokenizers.Tokenizer``."""

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text).ids

    def decode(self, ids: Iterable[int]) -> str:
        return self._tokenizer.decode([int(i) for i in ids])

    @cached_property
    def newlines(self) -> list[int]:
        vocabulary = self._tokenizer.get_vocab()
        # A newline as such, as byte-level BPE writes it, and as sentencepiece falls back to it.
        return sorted(i for token, i in vocabulary.items() if "\n" in token or "\u010a" in token or token == "<0x0A>")


def _adds_nothing(spec: dict) -> bool:
    """Whether a byte-level tokenizer.json does no more than write bytes; a byte that is marked as special is a byte still."""
    before = spec.get("pre_tokenizer") or {}
    return (
        not spec.get("normalizer")
        and not spec.get("post_processor")
        and before.get("type") == "ByteLevel"
        and not before.get("add_prefix_space", True)
        and all(spec["model"]["vocab"].get(token.get("content")) == token.get("id") for token in spec.get("added_tokens") or ())
    )


def load(folder: str | os.PathLike):
    """The tokenizer of a folder: an object with ``encode(text)``, ``decode(ids)`` and ``newlines``.

    Raises
    ------
    FileNotFoundError
        If the folder has no ``tokenizer.json``.
    ValueError
        If the file is not a tokenizer.
    ModuleNotFoundError
        If the vocabulary is not one of bytes and the `tokenizers` package is not installed.
    """
    path = Path(folder) / "tokenizer.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no {path.name}; without it the model takes token ids, but no text")
    try:
        spec = json.loads(path.read_text("utf-8"))
        model = spec["model"]
        vocabulary, merges = model["vocab"], model.get("merges")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} is no tokenizer: {error!r}") from None
    letters = _byte_letters()
    if isinstance(vocabulary, dict) and set(vocabulary) == set(letters) and not merges and _adds_nothing(spec):
        return ByteTokenizer([vocabulary[letter] for letter in letters])
    try:
        from tokenizers import Tokenizer
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            f"{path} has merges or special tokens; reading it takes the tokenizers package (pip install tokenizers)", name="tokenizers"
        ) from None
    return _HuggingFace(Tokenizer.from_file(str(path)))
