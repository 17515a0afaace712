"""Bytes as tokens, and tokenizer.json files of other kinds."""

import json
import sys

import pytest
from checkpoints import tokenizer as byte_tokenizer

from lola.models.tokenizer import ByteTokenizer, load


def save(folder, spec):
    (folder / "tokenizer.json").write_text(spec if isinstance(spec, str) else json.dumps(spec))
    return folder


TEXTS = ["", "plain\nlines ", "é ü 漢字 🙂", "".join(map(chr, range(256)))]


@pytest.mark.parametrize("text", TEXTS)
def test_bytes(tmp_path, text):
    tokenizer = load(save(tmp_path, byte_tokenizer()))
    assert isinstance(tokenizer, ByteTokenizer)
    ids = tokenizer.encode(text)
    assert ids == list(text.encode())
    assert tokenizer.decode(ids) == text
    assert tokenizer.newlines == [10]


def test_ids_need_not_be_the_bytes(tmp_path):
    spec = byte_tokenizer()
    spec["model"]["vocab"] = {letter: byte + 3 for letter, byte in spec["model"]["vocab"].items()}
    tokenizer = load(save(tmp_path, spec))
    assert tokenizer.encode("A\n") == [68, 13] and tokenizer.newlines == [13]
    assert tokenizer.decode([68, 0, 13]) == "A\n"


def test_a_byte_marked_as_special_is_a_byte(tmp_path):
    spec = byte_tokenizer()
    letter = next(letter for letter, byte in spec["model"]["vocab"].items() if byte == 0)
    spec["added_tokens"] = [{"id": 0, "content": letter, "special": True}]
    assert isinstance(load(save(tmp_path, spec)), ByteTokenizer)


def test_same_ids_as_the_tokenizers_package(tmp_path):
    package = pytest.importorskip("tokenizers")
    theirs = package.Tokenizer.from_file(str(save(tmp_path, byte_tokenizer()) / "tokenizer.json"))
    ours = load(tmp_path)
    for text in TEXTS:
        assert ours.encode(text) == theirs.encode(text).ids


def merged():
    spec = byte_tokenizer()
    spec["model"]["vocab"]["he"] = 256
    spec["model"]["merges"] = ["h e"]
    return spec


def test_merges_go_through_the_package(tmp_path):
    pytest.importorskip("tokenizers")
    tokenizer = load(save(tmp_path, merged()))
    ids = tokenizer.encode("the\n")
    assert ids == [ord("t"), 256, 10]
    assert tokenizer.decode(ids) == "the\n" and tokenizer.newlines == [10]


def test_merges_without_the_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ModuleNotFoundError, match="pip install tokenizers"):
        load(save(tmp_path, merged()))


def test_absent(tmp_path):
    with pytest.raises(FileNotFoundError, match="no tokenizer.json"):
        load(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"model": {}}'])
def test_no_tokenizer(tmp_path, text):
    with pytest.raises(ValueError, match="is no tokenizer"):
        load(save(tmp_path, text))


def test_ids_must_differ():
    with pytest.raises(ValueError, match="256 different"):
        ByteTokenizer([0] * 256)
