"""The safetensors reader: every dtype, shards, and files that are damaged in every part."""

import json

import numpy as np
import pytest

from lola.models.safetensors import SafeTensors, open_folder, write

DTYPES = ["f8", "f4", "f2", "i8", "i4", "i2", "i1", "u8", "u4", "u2", "u1", "?"]


def raw(path, header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


@pytest.mark.parametrize("dtype", DTYPES)
def test_round_trip(tmp_path, dtype):
    array = np.arange(6).reshape(2, 3).astype(dtype)
    write(tmp_path / "a.safetensors", {"x": array, "empty": array[:0], "scalar": array[1, 2]})
    tensors = SafeTensors(tmp_path / "a.safetensors")
    assert set(tensors) == {"x", "empty", "scalar"}
    assert tensors["x"].dtype == array.dtype
    np.testing.assert_array_equal(tensors["x"], array)
    assert tensors["empty"].shape == (0, 3) and tensors["scalar"].shape == ()
    assert tensors.shape("x") == (2, 3) and tensors.raw("x").tobytes() == array.tobytes()
    assert not tensors["x"].flags.writeable


def test_other_layouts_are_written_in_c_order(tmp_path):
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    write(tmp_path / "a.safetensors", {"f": np.asfortranarray(array), "big": array.astype(">f4")})
    tensors = SafeTensors(tmp_path / "a.safetensors")
    np.testing.assert_array_equal(tensors["f"], array)
    np.testing.assert_array_equal(tensors["big"], array)


def test_bfloat16_is_widened_exactly(tmp_path):
    bits = np.array([0x3F80, 0xC020, 0x7F80, 0x0001], np.uint16)
    header = {"x": {"dtype": "BF16", "shape": [4], "data_offsets": [0, 8]}}
    tensors = SafeTensors(raw(tmp_path / "a.safetensors", header, bits.tobytes()))
    assert tensors["x"].dtype == np.float32 and tensors.dtype("x") == "BF16"
    np.testing.assert_array_equal(tensors["x"], np.array([1, -2.5, np.inf, 2.0**-133], np.float32))


def test_written_by_the_safetensors_package(tmp_path):
    package = pytest.importorskip("safetensors.numpy")
    rng = np.random.default_rng(0)
    arrays = {"a": rng.standard_normal((3, 5)).astype(np.float16), "b": np.arange(7)}
    package.save_file(arrays, tmp_path / "theirs.safetensors", metadata={"format": "np"})
    write(tmp_path / "ours.safetensors", arrays)
    ours, theirs = SafeTensors(tmp_path / "theirs.safetensors"), package.load_file(tmp_path / "ours.safetensors")
    for name, array in arrays.items():
        np.testing.assert_array_equal(ours[name], array)
        np.testing.assert_array_equal(theirs[name], array)


def test_unknown_dtype_is_not_written(tmp_path):
    with pytest.raises(TypeError, match="'x'.*complex128"):
        write(tmp_path / "a.safetensors", {"x": np.ones(2, complex)})
    assert not (tmp_path / "a.safetensors").exists()


GOOD = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    "header, data, message",
    [
        (b"{", b"", "not JSON"),
        (b"\xff\xff", b"", "not JSON"),
        (b"[1]", b"", "a JSON list"),
        (b'{"x": 1, "x": 2}', b"", "a name occurs twice"),
        ({"x": 5}, b"", "'x' must have dtype, shape and data_offsets"),
        ({"x": {"dtype": "F32", "shape": [2]}}, bytes(8), "'x' must have"),
        ({"x": {**GOOD, "shape": [-2]}}, bytes(8), "'x' must have"),
        ({"x": {**GOOD, "shape": [2.0]}}, bytes(8), "'x' must have"),
        ({"x": {**GOOD, "data_offsets": [0, 8, 9]}}, bytes(8), "'x' must have"),
        ({"x": {**GOOD, "dtype": "F8_E4M3"}}, bytes(8), "'x' has dtype F8_E4M3"),
        ({"x": {**GOOD, "shape": [3]}}, bytes(8), "takes 12 bytes; data_offsets give 8"),
        ({"x": {**GOOD, "shape": [2**62, 2**62]}}, bytes(8), "data_offsets give 8"),
        ({"x": GOOD}, bytes(4), "the tensors take 8 bytes, the file holds 4"),
        ({"x": GOOD}, bytes(12), "the tensors take 8 bytes, the file holds 12"),
        ({"x": GOOD, "y": GOOD}, bytes(8), "begins at byte 0 of the data; the one before it ends at 8"),
        ({"x": {**GOOD, "data_offsets": [4, 12]}}, bytes(12), "begins at byte 4"),
    ],
)
def test_damaged_files(tmp_path, header, data, message):
    path = raw(tmp_path / "bad.safetensors", header, data)
    with pytest.raises(ValueError, match=message) as error:
        SafeTensors(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("content", [b"", b"1234567", (10**6).to_bytes(8, "little") + b"{}", b"\xff" * 64])
def test_no_header(tmp_path, content):
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="no safetensors file"):
        SafeTensors(path)


def test_absent_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        SafeTensors(tmp_path / "none.safetensors")


@pytest.fixture
def shards(tmp_path):
    write(tmp_path / "one.safetensors", {"a": np.ones(2, np.float32)})
    write(tmp_path / "two.safetensors", {"b": np.zeros(3, np.float16)})
    index(tmp_path, a="one.safetensors", b="two.safetensors")
    return tmp_path


def index(folder, **places):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


def test_shards(shards):
    tensors = open_folder(shards)
    assert len(tensors) == 2 and tensors["b"].shape == (3,)
    assert tensors.file("b").name == "two.safetensors"


@pytest.mark.parametrize(
    "places, error, message",
    [
        (dict(a="one.safetensors", b="three.safetensors"), FileNotFoundError, "three.safetensors"),
        (dict(a="../one.safetensors"), ValueError, "its own folder"),
        (dict(a="one.safetensors", b="two.safetensors", c="two.safetensors"), ValueError, "'c' is only in it"),
        (dict(a="one.safetensors", c="two.safetensors"), ValueError, "'b' is only in"),
        (dict(a="two.safetensors", b="one.safetensors"), ValueError, "places tensor 'a' in two"),
    ],
)
def test_wrong_index(shards, places, error, message):
    index(shards, **places)
    with pytest.raises(error, match=message):
        open_folder(shards)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": []}}'])
def test_index_that_is_none(shards, text):
    (shards / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match="must be JSON with a weight_map"):
        open_folder(shards)


def test_one_name_in_two_files(tmp_path):
    for name in "ab":
        write(tmp_path / name, {"x": np.ones(1)})
    with pytest.raises(ValueError, match="'x' is in .* and again in"):
        SafeTensors(tmp_path / "a", tmp_path / "b")


def test_folder_without_weights(tmp_path):
    with pytest.raises(FileNotFoundError, match="neither model.safetensors nor"):
        open_folder(tmp_path)
