"""The task generators: wording, lengths, spans, splits, determinism, scoring."""

import hashlib
import re

import pytest

from lola.eval import tasks, text
from lola.eval.tasks import NOISE, TASKS, fixed_samples, make_sample, score

NAMES = list(TASKS)


def context(sample):
    """The prompt between the introduction and the question."""
    begin = "following text.\n\n" if sample.task == "vt" else "afterwards.\n"
    end = "\nQuestion:" if sample.task == "vt" else "\nWhat "
    return sample.prompt[sample.prompt.index(begin) + len(begin) : sample.prompt.rindex(end)]


def test_wording_of_one_needle():
    sample = make_sample("niah_single_1", 1024, seed=1)
    key = re.search(r"numbers for ([a-z]+-[a-z]+) is: (\d{7})\.", sample.prompt)
    lines = sample.prompt.split("\n")
    assert lines[0] == (
        "A special magic number is hidden within the following text. Make sure to memorize it. "
        "I will quiz you about the number afterwards."
    )
    assert lines[-1] == (
        f"What is the special magic number for {key[1]} mentioned in the provided text? "
        f"The special magic number for {key[1]} mentioned in the provided text is"
    )
    rest = [line for line in lines[1:-1] if line != NOISE]
    assert rest == [f"One of the special magic numbers for {key[1]} is: {key[2]}."]
    assert sample.references == (key[2],) and sample.answer == f" {key[2]}.\n"


def test_wording_of_several():
    sample = make_sample("niah_multiquery", 1024, seed=1)
    keys = re.findall(r"numbers for ([a-z]+-[a-z]+) is: (\d{7})\.", sample.prompt)
    asked = re.search(r"What are all the special magic numbers for (.*) mentioned in the provided text\?", sample.prompt)[1]
    assert re.fullmatch(r"(\S+), (\S+), (\S+), and (\S+)", asked)
    assert dict(keys) == dict(zip(asked.replace("and ", "").split(", "), sample.references))
    assert sample.prompt.startswith("Some special magic numbers are hidden within the following text.")
    assert sample.prompt.endswith(f"The special magic numbers for {asked} mentioned in the provided text are")
    many = make_sample("niah_multivalue", 1024, seed=1)
    assert tuple(re.findall(r"is: (\d{7})\.", many.prompt)) == many.references
    assert make_sample("niah_single_3", 1024, seed=1).prompt.count("uuid") == 5


def test_wording_of_vt():
    sample = make_sample("vt", 1024, seed=1)
    lines = [line for line in context(sample).split("\n") if line != NOISE]
    a, b, c, d, e = sample.references
    value = sample.prompt[slice(*sample.values[0])]
    assert lines == [f"VAR {a} = {value}", f"VAR {b} = VAR {a} ", f"VAR {c} = VAR {b} ", f"VAR {d} = VAR {c} ", f"VAR {e} = VAR {d} "]
    assert sample.prompt.endswith(f"5 variables are assigned the value {value}, they are: ")
    assert len(sample.answer) <= sample.generate == 30


@pytest.mark.parametrize("length", [1024, 1025, 4096, 8192])
@pytest.mark.parametrize("task", NAMES)
def test_length_is_the_largest_that_fits(task, length):
    for sample in fixed_samples(task, length, 10):
        assert sample.length == len(sample.prompt.encode()) + sample.generate <= length
        unit = {"noise": len(NOISE) + 1, "needles": 75, "text": 25}[TASKS[task].haystack]
        assert length - sample.length < unit


@pytest.mark.parametrize("task", NAMES)
def test_other_tokenizers_count_their_own_tokens(task):
    by_byte = make_sample(task, 1024, seed=5)
    assert make_sample(task, 1024, seed=5, encode=str.encode) == by_byte
    words = make_sample(task, 1024, seed=5, encode=str.split)
    assert words.length == len(words.prompt.split()) + words.generate <= 1024
    assert len(words.prompt) > 2 * len(by_byte.prompt)


@pytest.mark.parametrize("task", NAMES)
def test_spans(task):
    for sample in fixed_samples(task, 2048, 20, seed=3):
        assert len(sample.needles) == len(sample.values) == max(len(sample.references), 1)
        for (begin, end), (first, last) in zip(sample.needles, sample.values):
            assert begin < first < last <= end
            needle, value = sample.prompt[begin:end], sample.prompt[first:last]
            if task == "vt":
                assert needle.startswith("VAR ") and needle.endswith(value)
            else:
                assert needle.startswith("One of the special magic") and needle.endswith(f"is: {value}.")
                assert value in sample.references
        assert sample.depth == sample.needles[0][0] / len(sample.prompt)


def test_depths_cover_the_haystack():
    for task in ("niah_single_1", "niah_single_2", "niah_multikey_2"):
        depths = [sample.depth for sample in fixed_samples(task, 4096)]
        assert min(depths) < 0.1 and max(depths) > 0.85 and 0.4 < sum(depths) / 200 < 0.55


@pytest.mark.parametrize("split", ["eval", "other", "valid"])
def test_haystack_text_comes_from_its_own_part(split):
    train = text.bundled("train").string
    own = text.bundled(split)
    circle = own.string + " " + own.string
    for sample in fixed_samples("niah_single_2", 4096, 20, split=split):
        begin, end = sample.needles[0]
        inner = context(sample)
        hay = inner.replace(sample.prompt[begin:end], "|").strip("|").strip().split("|")
        assert all(part.strip() in circle for part in hay)
        assert max(hay, key=len).strip() not in train


def test_parts_do_not_overlap_and_are_the_size_they_say():
    sizes = {split: len(text.bundled(split).string) for split in text.SPLITS}
    assert abs(sizes["eval"] - 300_000) < 20 and abs(sizes["other"] - 300_000) < 20 and abs(sizes["valid"] - 100_000) < 20
    assert sum(sizes.values()) == pytest.approx(4_137_847, abs=10)
    assert text.bundled("train").string.startswith("In the beginning God created the heaven and the earth.")
    assert text.bundled("other").string.endswith("be with you all. Amen.")


def test_keys_of_one_part_are_never_used_in_another():
    used = {
        split: set(re.findall(r"for ([a-z]+-[a-z]+) is:", "".join(s.prompt for s in fixed_samples("niah_multikey_2", 8192, 50, split=split))))
        for split in ("train", "valid", "eval")
    }
    assert all(len(keys) > 2000 for keys in used.values())
    assert not used["train"] & used["eval"] and not used["train"] & used["valid"] and not used["valid"] & used["eval"]


def test_distractor_keys_do_not_repeat():
    for sample in fixed_samples("niah_multikey_2", 8192, 20):
        keys = re.findall(r"for ([a-z]+-[a-z]+) is:", sample.prompt)
        assert len(keys) == len(set(keys)) > 100


def test_own_text_short_and_not_ascii():
    for own in ("Ein Satz. Noch ein Satz, größer als der erste.", "word"):
        sample = make_sample("niah_single_2", 1024, seed=1, text=own)
        assert 1024 - len(own.encode()) < sample.length <= 1024
        assert sample.length == len(sample.prompt.encode()) + 128
        (begin, end), = sample.values
        assert sample.prompt[begin:end] == sample.references[0]


def test_a_sample_depends_on_task_length_seed_and_number_alone():
    many = fixed_samples("niah_single_2", 1024, 8)
    assert fixed_samples("niah_single_2", 1024, 3) == many[:3]
    assert len({sample.prompt for sample in many}) == 8
    assert make_sample("niah_single_2", 1024, (42, 5)) == many[5]
    for other in (fixed_samples("niah_single_2", 1024, 8, seed=43), fixed_samples("niah_single_2", 1024, 8, split="other")):
        assert not {s.prompt for s in other} & {s.prompt for s in many}


def test_samples_never_change():
    """Published figures name samples by seed: a change to this digest makes them incomparable."""
    digest = hashlib.sha256()
    for task in NAMES:
        for length in (1024, 4096):
            for sample in fixed_samples(task, length, 5) + fixed_samples(task, length, 2, seed=7, split="other"):
                digest.update(repr(sample).encode())
    assert digest.hexdigest() == "e45eeb7caab72b39dc8addb84901d5d66924fb4fa497f5a320be3eedeebb4920"


def test_errors():
    with pytest.raises(ValueError, match="task must be one of niah_single_1, .* it is 'niah'"):
        make_sample("niah", 1024, 1)
    with pytest.raises(ValueError, match="split must be one of train, valid, eval, other; it is 'test'"):
        make_sample("vt", 1024, 1, split="test")
    with pytest.raises(ValueError, match="seed must not be negative"):
        make_sample("vt", 1024, -1)
    with pytest.raises(ValueError, match="text must hold at least one word"):
        make_sample("niah_single_2", 1024, 1, text=" \n")
    for task in NAMES:
        with pytest.raises(ValueError, match="length must be at least ([0-9]+) tokens") as error:
            make_sample(task, 200, 1)
        need = int(re.search(r"at least (\d+)", str(error.value))[1])
        assert make_sample(task, need + 40, 1).length <= need + 40
    with pytest.raises(ValueError, match="references must hold"):
        score("vt", "x", [])
    with pytest.raises(ValueError, match="task must be one of"):
        score("x", "x", ["x"])


def test_score():
    assert score("niah_single_1", " 1234567.\nmore", ("1234567",)) == 1
    assert score("niah_single_1", "\n1234567", ("1234567",)) == 0
    assert score("niah_single_3", " ABCD", ("abcd",)) == 1
    assert score("niah_multivalue", " 1111111, 3333333", ("1111111", "2222222", "3333333", "4444444")) == 0.5
    for task in NAMES:
        sample = make_sample(task, 1024, 9)
        assert score(task, sample.answer, sample.references) == 1


def test_docstring_examples():
    import doctest

    assert doctest.testmod(tasks).failed == 0
    assert doctest.testmod(text).failed == 0
