"""The NumPy Llama: against a float64 statement of itself, any cutting and padding, strict loading, and errors."""

import json
import threading

import checkpoints
import numpy as np
import pytest
from checkpoints import SMALL

import lola
from lola import reference
from lola.models import BUNDLED, Llama
from lola.models.safetensors import SafeTensors, write

CONFIG = dict(window=16, chunk=8, sparse=12)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("llama")
    checkpoints.save(path)
    checkpoints.save_adapter(path)
    return path


@pytest.fixture(scope="module")
def soft(folder):
    return Llama.from_pretrained(folder)


@pytest.fixture(scope="module")
def lolas(folder):
    return Llama.from_pretrained(folder, lola.Config(**CONFIG))


@pytest.fixture(params=["softmax", "lola"])
def model(request, soft, lolas):
    return {"softmax": soft, "lola": lolas}[request.param]


@pytest.fixture
def ids(rng):
    return rng.integers(0, 256, (2, 100))


# ------------------------------------------------------------------------------------------------- the float64 statement


class _Map:
    def __init__(self, name, w_q, w_k):
        self.name, self.w_q, self.w_k = name, w_q, w_k


def oracle(folder, ids, config=None, sizes=SMALL, theta=10000.0, eps=1e-5):
    """Logits (T, vocabulary) of one row, layer by layer in float64, with the adapter where a config is given."""
    w = {name: array.astype(np.float64) for name, array in SafeTensors(folder / "model.safetensors").items()}
    maps = SafeTensors(folder / "feature_maps.safetensors") if config is not None else {}
    spec = json.loads((folder / "adapter.json").read_text()) if config is not None else None
    if config is not None and spec["lora"]["r"]:
        lora = SafeTensors(folder / "lora.safetensors")
        for name in lora:
            if ".lora_A." in name:
                target = name.removeprefix("base_model.model.").replace(".lora_A.default", "")
                low, high = lora[name].astype(np.float64), lora[name.replace(".lora_A.", ".lora_B.")].astype(np.float64)
                w[target] = w[target] + spec["lora"]["alpha"] / spec["lora"]["r"] * high @ low
    T, D, half = len(ids), sizes["head_dim"], sizes["head_dim"] // 2

    def norm(x, name):
        return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + eps) * w[name]

    angles = np.arange(T)[:, None] * theta ** (-np.arange(half) / half)
    cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]

    def turn(x):
        a, b = x[..., :half], x[..., half:]
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)

    x = w["model.embed_tokens.weight"][ids]
    for i in range(sizes["layers"]):
        at = f"model.layers.{i}."
        h = norm(x, at + "input_layernorm.weight")
        q, k, v = ((h @ w[f"{at}self_attn.{n}_proj.weight"].T).reshape(T, -1, D) for n in "qkv")
        q, k = turn(q), turn(k)
        if config is None:
            out = reference.attend(q, k, v, causal=True)
        else:
            name = {"softmax_dim": "hedgehog", "exp_dim": "hedgehog_exp"}[spec["feature_map"]]
            feature_map = _Map(name, *(maps[f"{at}self_attn.feature_map_{side}.mlp.layer"] for side in "qk"))
            gate = 1 / (1 + np.exp(-maps[f"{at}self_attn.window_factors"].ravel().astype(np.float64)))
            out = reference.attention(q[None], k[None], v[None], config=config, feature_map=feature_map, gate=gate)[0]
        x = x + out.reshape(T, -1) @ w[f"{at}self_attn.o_proj.weight"].T
        h = norm(x, at + "post_attention_layernorm.weight")
        g, u = h @ w[f"{at}mlp.gate_proj.weight"].T, h @ w[f"{at}mlp.up_proj.weight"].T
        x = x + (g / (1 + np.exp(-g)) * u) @ w[f"{at}mlp.down_proj.weight"].T
    return norm(x, "model.norm.weight") @ w["lm_head.weight"].T


def close(got, wanted, bound=1e-4):
    return np.abs(got - wanted).max() < bound * np.abs(wanted).max()


def test_softmax_against_float64(folder, soft, ids):
    assert close(soft(ids)[1], oracle(folder, ids[1]))


# "recency" ranks without rounding, so that both sides keep the same pairs; "self_recall" has its own tests.
@pytest.mark.parametrize("mixing", ["paper", "gated", "lolcats", "cache_only"])
@pytest.mark.parametrize("feature_map", ["softmax_dim", "exp_dim"])
@pytest.mark.parametrize("sparse_per", ["query_head", "kv_head"])
def test_lola_against_float64(tmp_path, ids, mixing, feature_map, sparse_per):
    checkpoints.save(tmp_path)
    checkpoints.save_adapter(tmp_path, feature_map=feature_map)
    config = lola.Config(**CONFIG, mixing=mixing, score="recency", sparse_per=sparse_per)
    model = Llama.from_pretrained(tmp_path, config)
    cache = model.new_cache(2)
    assert close(model(ids, cache)[0], oracle(tmp_path, ids[0], config))
    assert (cache.layers[0].folded > 0).all()


def test_lola_self_recall_against_float64(folder, lolas, ids):
    assert close(lolas(ids)[0], oracle(folder, ids[0], lolas.attention), 1e-3)


def test_nothing_folded_is_the_merged_model_with_softmax(folder, ids):
    model = Llama.from_pretrained(folder, lola.Config(window=16, chunk=8, sparse=1000))
    assert close(model(ids)[0], oracle(folder, ids[0], lola.Config(window=1024, chunk=8, sparse=0, mixing="paper")))


def test_adapter_without_lora(tmp_path, ids):
    checkpoints.save(tmp_path)
    checkpoints.save_adapter(tmp_path, rank=0)
    config = lola.Config(**CONFIG, score="recency")
    assert close(Llama.from_pretrained(tmp_path, config)(ids)[0], oracle(tmp_path, ids[0], config))


def test_lora_on_the_mlp(tmp_path, ids):
    checkpoints.save(tmp_path)
    checkpoints.save_adapter(tmp_path)
    path = tmp_path / "lora.safetensors"
    lora = {name: array.copy() for name, array in SafeTensors(path).items()}
    rng = np.random.default_rng(3)
    at = "base_model.model.model.layers.1.mlp.down_proj.lora_"
    lora[f"{at}A.default.weight"] = rng.standard_normal((2, SMALL["mlp"])).astype(np.float32)
    lora[f"{at}B.default.weight"] = rng.standard_normal((SMALL["width"], 2)).astype(np.float32)
    write(path, lora)
    config = lola.Config(**CONFIG, score="recency")
    assert close(Llama.from_pretrained(tmp_path, config)(ids)[0], oracle(tmp_path, ids[0], config))


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_other_dtypes_of_weights(tmp_path, ids, dtype):
    checkpoints.save(tmp_path, dtype=dtype)
    assert close(Llama.from_pretrained(tmp_path)(ids)[0], oracle(tmp_path, ids[0]))


@pytest.mark.parametrize("attention", ["softmax", "lola"])
def test_float16_caches(folder, ids, attention):
    attention = "softmax" if attention == "softmax" else lola.Config(**CONFIG, score="recency")
    full, half = (Llama.from_pretrained(folder, attention, cache_dtype=dtype) for dtype in ("float32", "float16"))
    caches = [model.new_cache(2) for model in (full, half)]
    wanted, got = full(ids, caches[0]), half(ids, caches[1])
    assert close(got, wanted, 2e-2) and not np.array_equal(got, wanted)
    assert caches[1].nbytes < caches[0].nbytes
    assert half.with_cache_dtype("float32").new_cache().nbytes == full.new_cache().nbytes


# ------------------------------------------------------------------------------------------------- cutting and padding


@pytest.mark.parametrize("cuts", [[0, 100], [0, 1, 2, 3, 50, 99, 100], list(range(101)), [0, 0, 40, 40, 100]])
def test_any_cutting(model, ids, cuts):
    whole = model(ids)
    cache = model.new_cache(2)
    parts = [model(ids[:, a:b], cache) for a, b in zip(cuts, cuts[1:])]
    assert close(np.concatenate(parts, axis=1), whole)
    assert cache.tokens_seen.tolist() == [100, 100]


@pytest.mark.parametrize("segment", [1, 2, 7, 64])
def test_any_segment(model, ids, segment, monkeypatch):
    whole, last = model(ids), model.last_logits(ids)
    monkeypatch.setattr("lola.models.llama.SEGMENT", segment)
    assert close(model(ids), whole)
    assert close(model.last_logits(ids), last)


def test_last_logits(model, ids):
    whole = model(ids)
    for T in (1, 2, 100):
        cache = model.new_cache(2)
        got = model.last_logits(ids[:, :T], cache)
        assert got.shape == (2, 256) and close(got, whole[:, T - 1])
        if T < 100:
            assert close(model(ids[:, T:], cache), whole[:, T:])


def test_read(model, ids):
    cache = model.new_cache(2)
    assert model.read(ids[:, :90], cache) is None
    assert close(model(ids[:, 90:], cache), model(ids)[:, 90:])


def test_padding_on_either_side(model, ids):
    starts, stops = np.array([30, 0]), np.array([100, 55])
    cache = model.new_cache(2)
    got = model(ids, cache, starts=starts, stops=stops)
    for b in range(2):
        alone = model(ids[b : b + 1, starts[b] : stops[b]])
        assert close(got[b, starts[b] : stops[b]], alone[0])
    # The rows go on from different positions.
    more = model(ids[:, :20], cache)
    for b in range(2):
        alone = model(np.concatenate([ids[b, starts[b] : stops[b]], ids[b, :20]])[None])
        assert close(more[b], alone[0, -20:])


def test_idle_rows(model, ids):
    cache = model.new_cache(2)
    model(ids[:, :50], cache)
    got = model(ids[:, 50:60], cache, starts=np.array([0, 10]))
    assert cache.tokens_seen.tolist() == [60, 50]
    assert close(got[0], model(ids[:1, :60])[0, 50:])
    assert close(model(ids[:, :1], cache)[1], model(np.append(ids[1, :50], ids[1, 0])[None])[0, -1:])


def test_rows_are_independent(model, ids):
    np.testing.assert_allclose(model(ids)[1], model(ids[1:])[0], rtol=0, atol=1e-4 * np.abs(model(ids)).max())


def test_no_tokens(model):
    assert model(np.zeros((2, 0), np.int64)).shape == (2, 0, 256)


def test_a_copy_goes_on_by_itself(model, ids):
    cache = model.new_cache(2)
    model(ids[:, :60], cache)
    other = cache.copy()
    one = model(ids[:, 60:], cache)
    model(ids[:, :7], other)
    assert cache.tokens_seen.tolist() == [100, 100] and other.tokens_seen.tolist() == [67, 67]
    assert close(one, model(ids)[:, 60:])
    assert close(model(ids[:, 7:9], other), model(np.concatenate([ids[:, :60], ids[:, :9]], axis=1))[:, -2:])


def test_stack(model, ids):
    caches = [model.new_cache(n) for n in (1, 2)]
    model(ids[:1, :70], caches[0])
    model(ids[:, :30], caches[1], starts=np.array([0, 5]))
    stacked = type(caches[0]).stack(caches)
    assert stacked.tokens_seen.tolist() == [70, 30, 25]
    assert stacked.nbytes == sum(cache.nbytes for cache in caches)
    got = model(np.concatenate([ids[:, 60:75], ids[:1, 60:75]]), stacked)
    for row, (b, start, stop) in enumerate([(0, 0, 70), (0, 0, 30), (1, 5, 30)]):
        alone = model(np.append(ids[b, start:stop], ids[[0, 1, 0][row], 60:75])[None])
        assert close(got[row], alone[0, -15:])
    assert [cache.tokens_seen.tolist() for cache in caches] == [[70], [30, 25]]


def test_size_of_the_caches(soft, lolas, ids):
    cache = soft.new_cache(2)
    assert cache.nbytes == 0
    soft(ids, cache)
    assert cache.nbytes == 2 * 2 * 100 * 2 * 2 * 8 * 4  # rows, layers, tokens, k and v, heads, head_dim, bytes
    cache = lolas.new_cache(2)
    before = cache.nbytes
    lolas(ids, cache)
    assert cache.nbytes == before == sum(layer.nbytes for layer in cache.layers)


# ------------------------------------------------------------------------------------------------------------ generation


def slowly(model, ids, count):
    """Greedy continuation without a cache."""
    ids = list(ids)
    for _ in range(count):
        ids.append(int(model(np.array([ids]))[0, -1].argmax()))
    return ids[-count:]


def test_generate(model, ids):
    got = model.generate(ids[0, :40], 12)
    assert got.dtype == np.int64 and got.tolist() == slowly(model, ids[0, :40], 12)


def test_generate_rows_of_different_length(model, ids):
    prompts = [ids[0, :40], ids[1, :7], ids[1, :1]]
    got = model.generate(prompts, 12)
    assert [row.tolist() for row in got] == [slowly(model, prompt, 12) for prompt in prompts]


@pytest.mark.parametrize("form", ["array", "lists", "unsigned"])
def test_generate_forms(model, ids, form):
    prompts = {"array": ids[:, :9], "lists": ids[:, :9].tolist(), "unsigned": ids[:, :9].astype(np.uint8)}[form]
    assert [row.tolist() for row in model.generate(prompts, 3)] == [slowly(model, row, 3) for row in ids[:, :9]]


def test_generate_one_list(model, ids):
    assert model.generate(ids[0, :9].tolist(), 3).tolist() == slowly(model, ids[0, :9], 3)


def test_stop(model, ids):
    free = [slowly(model, ids[b, :30], 12) for b in range(2)]
    stop = free[0][4]
    wanted = [row[: row.index(stop)] if stop in row else row for row in free]
    for given in (stop, [stop], {stop, 1000}, np.int64(stop)):
        assert [row.tolist() for row in model.generate(ids[:, :30], 12, stop=given)] == wanted


def test_stop_of_the_configuration(tmp_path, ids):
    model = Llama.from_pretrained(checkpoints.save(tmp_path))
    free = model.generate(ids[0, :30], 12)
    ending = Llama.from_pretrained(checkpoints.save(tmp_path, eos_token_id=[int(free[3]), 7]))
    first = free.tolist().index(free[3])
    assert ending.generate(ids[0, :30], 12).tolist() == free[:first].tolist()
    assert ending.generate(ids[0, :30], 12, stop=()).tolist() == free.tolist()


def test_second_turn(model, ids):
    cache = model.new_cache(2)
    first = model.generate(ids[:, :30], 6, cache=cache)
    assert cache.tokens_seen.tolist() == [35, 35]
    prompts = [np.append(row[-1], new) for row, new in zip(first, ids[:, 60:70])]
    second = model.generate(prompts, 6, cache=cache)
    for b in range(2):
        assert second[b].tolist() == slowly(model, [*ids[b, :30], *first[b], *ids[b, 60:70]], 6)


def test_generate_nothing(model, ids):
    cache = model.new_cache()
    assert model.generate(ids[0], 0, cache=cache).shape == (0,)
    assert cache.tokens_seen.tolist() == [100]


# --------------------------------------------------------------------------------------------------------------- loading


def edit(folder, file="model.safetensors", **changes):
    """Rewrites a file with some tensors changed, or left out where None."""
    tensors = {name: array.copy() for name, array in SafeTensors(folder / file).items()}
    for name, array in changes.items():
        tensors.pop(name, None)
        if array is not None:
            tensors[name] = array
    write(folder / file, tensors)


@pytest.fixture
def fresh(tmp_path):
    checkpoints.save(tmp_path)
    return checkpoints.save_adapter(tmp_path)


@pytest.mark.parametrize(
    "file, name, array, message",
    [
        ("model", "model.norm.weight", None, "lacks the tensor 'model.norm.weight'"),
        ("model", "model.layers.1.mlp.up_proj.weight", None, "lacks the tensor 'model.layers.1.mlp.up_proj.weight'"),
        ("model", "model.layers.2.mlp.up_proj.weight", np.ones(3), "holds the tensor 'model.layers.2.mlp.up_proj.weight', for which"),
        ("model", "lm_head.weight", np.ones((256, 31), np.float32), r"'lm_head.weight' must have shape \(256, 32\); it has \(256, 31\)"),
        ("model", "model.norm.weight", np.ones(32, np.int64), "'model.norm.weight' must hold floats; it holds I64"),
        ("feature_maps", "model.layers.0.self_attn.window_factors", None, "feature_maps.safetensors lacks the tensor"),
        ("feature_maps", "model.layers.0.self_attn.window_factors", np.ones((1, 3, 1, 1)), r"must have shape \(1, 4, 1, 1\)"),
        ("feature_maps", "model.layers.1.self_attn.feature_map_q.mlp.layer", np.ones((4, 8)), "must have shape"),
        ("feature_maps", "model.layers.1.self_attn.feature_map_k.mlp.layer", np.ones((4, 8, 5)), r"must have shape \(4, 8, 4\)"),
        ("feature_maps", "other", np.ones(3), "holds the tensor 'other'"),
        ("lora", "base_model.model.model.layers.0.self_attn.q_proj.lora_B.default.weight", None, "lora.safetensors lacks the tensor"),
        ("lora", "base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight", np.ones((3, 32)), r"must have shape \(2, 32\)"),
        ("lora", "base_model.model.model.layers.9.self_attn.q_proj.lora_A.default.weight", np.ones((2, 32)), "holds the tensor"),
    ],
)
def test_strict(fresh, file, name, array, message):
    edit(fresh, f"{file}.safetensors", **{name: array})
    with pytest.raises(ValueError, match=message) as error:
        Llama.from_pretrained(fresh, lola.Config(**CONFIG))
    assert str(fresh) in str(error.value)


def test_explained_tensors(fresh):
    edit(fresh, **{"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)})
    assert Llama.from_pretrained(fresh).geometry.layers == 2


def test_tied_head(tmp_path, ids):
    checkpoints.save(tmp_path, tie_word_embeddings=True)
    repeated = Llama.from_pretrained(tmp_path)
    edit(tmp_path, **{"lm_head.weight": None})
    tied = Llama.from_pretrained(tmp_path)
    np.testing.assert_array_equal(tied(ids), repeated(ids))
    assert tied.weights_hash == repeated.weights_hash


def config_with(folder, **changes):
    spec = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({name: value for name, value in spec.items() if value is not ...}))


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(model_type="mistral"), "model_type must be 'llama'.*'mistral'"),
        (dict(model_type=...), "model_type must be 'llama'"),
        (dict(hidden_act="gelu"), "hidden_act must be 'silu'"),
        (dict(attention_bias=True), "attention_bias must be false"),
        (dict(mlp_bias=True), "mlp_bias must be false"),
        (dict(quantization_config={"bits": 4}), "quantization_config must be absent"),
        (dict(num_key_value_heads=3), "num_key_value_heads must be a divisor of num_attention_heads, 4"),
        (dict(hidden_size=...), "hidden_size must be a positive integer; it is None"),
        (dict(num_hidden_layers=0), "num_hidden_layers must be a positive integer"),
        (dict(vocab_size="256"), "vocab_size must be a positive integer"),
        (dict(head_dim=7), "head_dim must be even"),
        (dict(rms_norm_eps=-1), "rms_norm_eps must be a number"),
        (dict(rope_parameters={"rope_type": "yarn", "factor": 2}), "rope_type must be one of default, linear, llama3; it is 'yarn'"),
        (dict(rope_parameters={"rope_type": "linear"}), "needs factor"),
        (dict(rope_parameters=..., rope_scaling={"type": "llama3", "factor": 8}), "needs low_freq_factor"),
        (dict(rope_parameters={"rope_type": "default", "partial_rotary_factor": 0.5}), "partial_rotary_factor must be 1"),
    ],
)
def test_unsupported_configurations(fresh, changes, message):
    config_with(fresh, **changes)
    with pytest.raises(ValueError, match=message) as error:
        Llama.from_pretrained(fresh)
    assert "config.json" in str(error.value)


@pytest.mark.parametrize("text, message", [("{", "is not JSON"), ("[]", "must hold a JSON object")])
@pytest.mark.parametrize("file", ["config.json", "adapter.json"])
def test_broken_json(fresh, file, text, message):
    (fresh / file).write_text(text)
    with pytest.raises(ValueError, match=f"{file} {message}"):
        Llama.from_pretrained(fresh, lola.Config(**CONFIG))


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(feature_map="relu"), "feature_map must be one of softmax_dim, exp_dim; it is 'relu'"),
        (dict(mixing="sum"), "mixing must be one of"),
        (dict(window=0), "window must be a positive integer"),
        (dict(chunk=None), "chunk must be a positive integer"),
        (dict(lora={"alpha": 3}), "lora must hold"),
    ],
)
def test_wrong_adapters(fresh, changes, message):
    path = fresh / "adapter.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ValueError, match=message):
        Llama.from_pretrained(fresh, lola.Config(**CONFIG))


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "feature_maps.safetensors", "lora.safetensors"])
def test_absent_files(fresh, file):
    (fresh / file).unlink()
    with pytest.raises(FileNotFoundError, match=file):
        Llama.from_pretrained(fresh, lola.Config(**CONFIG))


def test_no_adapter(fresh):
    (fresh / "adapter.json").unlink()
    assert Llama.from_pretrained(fresh).adapter is None
    with pytest.raises(ValueError, match="no adapter.json: LoLA needs trained feature maps"):
        Llama.from_pretrained(fresh, lola.Config(**CONFIG))


def test_adapter_elsewhere(fresh, lolas, ids, tmp_path_factory):
    other = checkpoints.save_adapter(tmp_path_factory.mktemp("adapter"), seed=5)
    model = Llama.from_pretrained(fresh, lola.Config(**CONFIG), adapter=other)
    assert model.adapter.folder == other
    assert not np.allclose(model(ids), lolas(ids))
    with pytest.raises(FileNotFoundError, match="adapter must be a folder"):
        Llama.from_pretrained(fresh, lola.Config(**CONFIG), adapter=fresh / "none")


def test_shards(fresh, ids):
    one = Llama.from_pretrained(fresh)
    tensors = {name: array.copy() for name, array in SafeTensors(fresh / "model.safetensors").items()}
    names = list(tensors)
    places = {name: f"model-{i % 3}.safetensors" for i, name in enumerate(names)}
    for file in set(places.values()):
        write(fresh / file, {name: tensors[name] for name in names if places[name] == file})
    (fresh / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    (fresh / "model.safetensors").unlink()
    sharded = Llama.from_pretrained(fresh)
    np.testing.assert_array_equal(sharded(ids), one(ids))
    assert sharded.weights_hash == one.weights_hash


def test_weights_hash(fresh, lolas):
    again = Llama.from_pretrained(fresh, lola.Config(window=8, chunk=8, sparse=0, mixing="lolcats"))
    assert len(again.weights_hash) == 64 and again.weights_hash == lolas.weights_hash
    assert again.with_attention(lola.Config(**CONFIG)).weights_hash == again.weights_hash
    assert Llama.from_pretrained(fresh).weights_hash != again.weights_hash
    changed = SafeTensors(fresh / "feature_maps.safetensors")["model.layers.0.self_attn.window_factors"] + 1
    edit(fresh, "feature_maps.safetensors", **{"model.layers.0.self_attn.window_factors": changed})
    assert Llama.from_pretrained(fresh, lola.Config(**CONFIG)).weights_hash != again.weights_hash


def test_bundled_names():
    assert set(BUNDLED) == {"needle", "needle-8k"}
    with pytest.raises(FileNotFoundError, match="model must be one of needle, needle-8k, or a folder.*'noodle'"):
        Llama.from_pretrained("noodle")


# ------------------------------------------------------------------------------------------------------------- arguments


@pytest.mark.parametrize("attention", ["linear", None, 3, {"window": 64}])
def test_wrong_attention(folder, attention):
    with pytest.raises(TypeError, match="attention must be 'softmax' or a lola.Config"):
        Llama.from_pretrained(folder, attention)


def test_wrong_cache_dtype(folder, soft):
    for make in (lambda: Llama.from_pretrained(folder, cache_dtype="int8"), lambda: soft.with_cache_dtype("int8")):
        with pytest.raises(ValueError, match="cache_dtype must be 'float32' or 'float16'; it is 'int8'"):
            make()


def test_with_attention(soft, lolas, ids):
    config = lola.Config(window=8, chunk=8, sparse=0, mixing="lolcats")
    assert lolas.with_attention(config).new_cache().layers[0].config.window == 8
    with pytest.raises(ValueError, match="softmax attention"):
        soft.with_attention(config)
    with pytest.raises(TypeError, match="config must be a lola.Config"):
        lolas.with_attention("softmax")


def test_not_made_by_hand():
    with pytest.raises(TypeError, match="from_pretrained"):
        Llama()


@pytest.mark.parametrize(
    "ids, error, message",
    [
        (np.zeros((1, 3)), TypeError, "ids must be integers; they are float64"),
        (np.zeros(3, np.int64), ValueError, r"ids must have shape \(B, T\)"),
        (np.zeros((0, 3), np.int64), ValueError, r"ids must have shape \(B, T\) with B >= 1"),
        (np.array([[0, 256]]), ValueError, "ids must be from 0 to 255; one is 256"),
        (np.array([[-1, 3]]), ValueError, "one is -1"),
    ],
)
def test_wrong_ids(model, ids, error, message):
    cache = model.new_cache()
    with pytest.raises(error, match=message):
        model(ids, cache)
    assert cache.tokens_seen.tolist() == [0]


def test_wrong_caches(model, soft, lolas, ids):
    other = lolas if model is soft else soft
    with pytest.raises(ValueError, match="from this model's new_cache"):
        model(ids, other.new_cache(2))
    with pytest.raises(ValueError, match="the 2 rows of ids; it has 1"):
        model(ids, model.new_cache(1))
    with pytest.raises(TypeError, match="cache must come from new_cache"):
        model(ids, model.new_cache(2).layers[0])
    for batch in (0, -1, 2.0, "2"):
        with pytest.raises(ValueError, match="batch must be a positive integer"):
            model.new_cache(batch)


def test_half_done_cache(model, ids, monkeypatch):
    cache = model.new_cache(2)
    monkeypatch.setattr(model, "_mlp", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        model(ids, cache)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="interrupted"):
        model(ids, cache)


@pytest.mark.parametrize("starts, stops", [([0], None), ([0.0, 0.0], None), ([0, 101], None), ([-1, 0], None), ([5, 5], [4, 9]), (None, [101, 0])])
def test_wrong_spans(model, ids, starts, stops):
    with pytest.raises(ValueError, match="starts|stops"):
        model(ids, starts=starts, stops=stops)


@pytest.mark.parametrize(
    "ids, count, error, message",
    [
        ([], 3, TypeError, "ids must be integers"),
        ([[1, 2], []], 3, ValueError, "at least one token for each row"),
        ([[1.5]], 3, TypeError, "ids must be integers"),
        ([1, 2], -1, ValueError, "max_new_tokens must be an integer >= 0"),
        ([1, 2], 1.0, ValueError, "max_new_tokens must be an integer >= 0"),
        ([1, 300], 1, ValueError, "ids must be from 0 to 255"),
    ],
)
def test_wrong_prompts(model, ids, count, error, message):
    with pytest.raises(error, match=message):
        model.generate(ids, count)


def test_last_logits_need_a_token(model):
    with pytest.raises(ValueError, match="at least one token"):
        model.last_logits(np.zeros((1, 0), np.int64))


def test_threads_share_a_model(model, rng):
    prompts = rng.integers(0, 256, (4, 90))
    wanted = [model(prompt[None]) for prompt in prompts]
    got = [None] * 4

    def work(i):
        for _ in range(3):
            got[i] = model(prompts[i][None])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for one, two in zip(got, wanted):
        np.testing.assert_array_equal(one, two)
