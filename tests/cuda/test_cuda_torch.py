"""lola.torch on the device: the operator under torch.compile, models of transformers, a decode step as a CUDA graph, training.

Proved here: the operator runs on torch's current stream, waits for nothing and gives torch's own memory; no compiler breaks its
graph or clones a memory; models answer as on the CPU and as without a cache; each layer's memory lies where its layer does.
"""

import pathlib
import sys

import numpy as np
import pytest

import lola
from places import DEVICE, ON_CUDA, only_on_cuda

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "hf"))

import hf_models as hf                                                # noqa: E402
from transformers import AutoModelForCausalLM, DynamicCache           # noqa: E402

from lola.eval import tasks                                           # noqa: E402
from lola.models import Llama                                         # noqa: E402
from lola.torch import attention, distill, linearize, load_lolcats, ops, prepare  # noqa: E402

# What is kept does not hang on the last bit, so that two devices keep the same.
RECENCY = lola.Config(window=8, chunk=4, sparse=6, score="recency")
CONFIG = lola.Config(window=8, chunk=4, sparse=5)
COMPILERS = ["eager", "aot_eager", "inductor"]


@pytest.fixture(autouse=True)
def no_gradients():
    torch.manual_seed(0)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with torch.no_grad():
        yield


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    fmap = lola.Hedgehog(draw(4, 16, 8), draw(4, 16, 8))
    return *(x.to(DEVICE) for x in (draw(2, 45, 4, 16), draw(2, 45, 2, 16), draw(2, 45, 2, 16))), fmap, torch.full((4,), 0.3, device=DEVICE)


def new_cache():
    return lola.Cache(CONFIG, batch=2, heads=4, kv_heads=2, head_dim=16, feature_dim=16, device=DEVICE)


def shaped_as_llama(dtype=torch.bfloat16, **config):
    """Heads of 128 in groups of four, where the kernels for Llama run."""
    model = hf.soft(hidden_size=512, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=1, head_dim=128, initializer_range=0.05)
    config = lola.Config(**{**dict(window=64, chunk=64, sparse=96, sparse_per="kv_head"), **config})
    return linearize(model.to(DEVICE, dtype), config, distill.new_maps(range(2), 4, 128, 64, 0))


# ----------------------------------------------------------------------------------- the operator

@pytest.mark.parametrize("backend", COMPILERS)
def test_traced_with_a_cache(data, backend, monkeypatch):
    """Prefill, single steps and padded rows, each in one graph, on the memory itself, and an eager call behind them."""
    q, k, v, fmap, gate = data
    cache, other = new_cache(), new_cache()
    prepare(cache, fmap)
    if backend != "aot_eager":                               # which hands on clones of what an operator mutates
        monkeypatch.setattr(ops, "adopt", None)

    @torch.compile(fullgraph=True, backend=backend)
    def traced(q, k, v, **options):
        return attention(q * 2, k, v, feature_map=fmap, gate=gate, **options) + 1

    starts, stops = (torch.tensor(x, device=DEVICE) for x in ([3, 0], [9, 5]))
    for place, options in ((slice(0, 30), {}), (slice(30, 31), {}), (slice(31, 32), {}), (slice(32, 41), dict(starts=starts, stops=stops))):
        part = [x[:, place] for x in (q, k, v)]
        got = traced(*part, cache=cache, **options)
        wanted = attention(part[0] * 2, *part[1:], cache=other, feature_map=fmap, gate=gate, **options)
        assert got.device == q.device and torch.allclose(got - 1, wanted, atol=1e-5)
    last = [x[:, 41:] for x in (q, k, v)]
    assert torch.equal(*(attention(*last, cache=c, feature_map=fmap, gate=gate) for c in (cache, other)))
    for c in (cache, other):
        c.sync()
    assert cache.tokens_seen.tolist() == other.tokens_seen.tolist() == [42, 41]
    assert not torch._dynamo.utils.counters["graph_break"]


@only_on_cuda
@pytest.mark.parametrize("backend", [None, "eager", "inductor"])
def test_on_the_current_stream_without_waiting(data, backend):
    q, k, v, fmap, gate = data
    cache = new_cache()
    prepare(cache, fmap)

    def step(q, k, v):
        return attention(q * 2, k, v, cache=cache, feature_map=fmap, gate=gate) + 1

    run = step if backend is None else torch.compile(step, fullgraph=True, backend=backend)
    parts = [[x[:, t : t + 1].contiguous() for x in (q, k, v)] for t in range(3)]
    run(*parts[0])
    wanted = run(*parts[1])
    cache.crop(1)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(2_000_000_000)                     # a second: the host may be busy with other tests
        late = [x + 0 for x in parts[1]]                     # there only after the sleep
        before = torch.cuda.memory_allocated()
        got = run(*late)
        assert not side.query()                              # the call came back before its work was done
        assert torch.cuda.memory_allocated() - before >= got.numel() * got.element_size()
    side.synchronize()
    assert torch.equal(got, wanted)


def test_opcheck_on_the_device(data):
    q, k, v, fmap, gate = data
    weights = [torch.from_numpy(w.copy()) for w in (fmap.w_q, fmap.w_k)]
    terms = (*ops.spec_of(CONFIG), "hedgehog", *weights)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    given = (q, k, v, ops.tensors_of(new_cache()), *terms, gate, False, None, None, None, None, None)
    torch.library.opcheck(ops._attention, given, test_utils=checks)
    torch.library.opcheck(ops._attention_once, (q, k, v, *terms, None, None, gate, False, None, None, None, None, None))


# ----------------------------------------------------------------------------------- models

@pytest.mark.parametrize("family, layers", [("llama", None), ("qwen3", None), ("mistral", [1, 2])])
def test_logits_are_the_cpus(family, layers):
    ids, mask = hf.padded(hf.prompts(3), [60, 31, 7])
    logits = []
    for device in ("cpu", DEVICE):
        model = hf.linear(family, RECENCY, layers).to(device)
        options = dict(attention_mask=mask.to(device), position_ids=(mask.cumsum(1) - 1).clamp(min=0).to(device))
        out = model(ids.to(device), **options)
        logits.append([out.logits[mask.bool().to(device)].cpu()])
        for t in range(8):
            mask_now = torch.cat([mask, torch.ones(3, t + 1, dtype=mask.dtype)], 1)
            at = (mask_now.cumsum(1) - 1)[:, -1:]
            options = dict(attention_mask=mask_now.to(device), position_ids=at.to(device))
            step = model(ids[:, t : t + 1].to(device) + 2, past_key_values=out.past_key_values, **options)
            logits[-1].append(step.logits[:, 0].cpu())
    for here, there in zip(*logits):
        assert hf.difference(here, there) < 1e-4 * max(1, here.abs().max().item())


@pytest.mark.parametrize("layers", [None, [0, 2]])
def test_generate_equals_whole_forward_passes(layers):
    model = hf.linear(layers=layers).to(DEVICE)
    ids, mask = (x.to(DEVICE) for x in hf.padded(hf.prompts(), [60, 31]))
    for options in ({}, dict(num_beams=3, num_return_sequences=2)):
        options |= dict(attention_mask=mask)
        assert torch.equal(hf.answer(model, ids, **options), hf.answer(model, ids, use_cache=False, **options))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_bundled_model_answers(dtype):
    """What the NumPy runner answers, from 1536 tokens."""
    model = load_lolcats("needle", dtype=dtype).to(DEVICE)
    runner = Llama.from_pretrained("needle", model.model.layers[0].self_attn.config)
    sample = tasks.make_sample("niah_single_1", 1536, seed=3)
    ids = np.asarray(runner.tokenizer.encode(sample.prompt))
    wanted = runner.generate(ids, 16)
    out = model.generate(torch.from_numpy(ids)[None].to(DEVICE), max_new_tokens=16)[0, len(ids) :].cpu().numpy()
    np.testing.assert_array_equal(out[: len(wanted)], wanted)


@pytest.mark.parametrize("backend", COMPILERS)
def test_a_compiled_model(backend, monkeypatch):
    """The same logits from a cache made in the graph, and from one made eagerly; no graph break."""
    model, ids = hf.linear(num_hidden_layers=2).to(DEVICE), hf.prompts().to(DEVICE)
    if backend != "aot_eager":
        monkeypatch.setattr(ops, "adopt", None)
    fast = torch.compile(model, fullgraph=True, backend=backend)
    wanted = model(ids).logits
    out = fast(ids[:, :40])
    logits, cache = [out.logits], out.past_key_values
    logits += [fast(ids[:, i : i + 1], past_key_values=cache).logits for i in range(40, 44)]
    logits.append(model(ids[:, 44:], past_key_values=cache).logits)
    assert hf.difference(torch.cat(logits, 1), wanted) < 1e-3
    cache = model(ids[:, :40]).past_key_values
    assert hf.difference(fast(ids[:, 40:41], past_key_values=cache).logits, wanted[:, 40:41]) < 1e-3
    assert cache.layers[0].cache.device.startswith(DEVICE) and not torch._dynamo.utils.counters["graph_break"]


def test_layers_that_wait_elsewhere(tmp_path):
    """Weights and maps of two layers come from the CPU for the time of a layer; its memory lies where it runs."""
    pytest.importorskip("accelerate")
    hf.linear(config=RECENCY).save_pretrained(tmp_path)
    places = {"model.embed_tokens": DEVICE, "model.layers.0": "cpu", "model.layers.1": DEVICE, "model.layers.2": "cpu"}
    places |= {"model.norm": DEVICE, "model.rotary_emb": DEVICE, "lm_head": DEVICE}
    other, model = AutoModelForCausalLM.from_pretrained(tmp_path, device_map=places), hf.linear(config=RECENCY)
    ids, mask = hf.padded(hf.prompts(), [60, 31])
    assert all(layer.cache.device.startswith(DEVICE) for layer in other(ids).past_key_values.layers)
    for options in ({}, dict(num_beams=2)):
        wanted = hf.answer(model, ids, attention_mask=mask, **options)
        assert torch.equal(hf.answer(other, ids.to(DEVICE), attention_mask=mask.to(DEVICE), **options).cpu(), wanted)


@only_on_cuda
def test_a_memory_is_offloaded_and_comes_back():
    model, ids = shaped_as_llama(), hf.prompts(2, 300).to(DEVICE)
    caches = [DynamicCache(), DynamicCache()]
    for cache in caches:
        model(ids[:, :280], past_key_values=cache)
    for layer in caches[1].layers:
        layer.offload()
        assert layer.cache.device == "cpu"
        layer.prefetch()
        assert layer.cache.device.startswith("cuda")
    assert torch.equal(*(model(ids[:, 280:], past_key_values=cache).logits for cache in caches))


@only_on_cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_decode_step_as_a_cuda_graph(dtype):
    """The whole model's step, its position included, over several updates: the bits of the eager steps."""
    model, ids = shaped_as_llama(dtype), hf.prompts(2, 420).to(DEVICE)
    caches = [DynamicCache(), DynamicCache()]
    for cache in caches:
        model(ids[:, :230], past_key_values=cache)
    token, at = ids[:, 230:231].clone(), torch.full((1, 1), 230, device=DEVICE)

    def step():
        logits = model(token, position_ids=at, past_key_values=caches[0]).logits
        at.add_(1)
        return logits

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        first = step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    assert torch.equal(first, model(ids[:, 230:231], past_key_values=caches[1]).logits)
    assert caches[0].get_seq_length() == 231                 # recorded is not read
    for t in range(231, 410):
        token.copy_(ids[:, t : t + 1])
        graph.replay()
        assert torch.equal(out, model(ids[:, t : t + 1], past_key_values=caches[1]).logits)
    for layer in caches[0].layers:
        layer.sync()
        assert layer.seen == 410 and layer.cache.tokens_seen.tolist() == [410, 410] and np.asarray(layer.cache.folded).min() > 0
    assert torch.equal(*(model(ids[:, 410:], past_key_values=cache).logits for cache in caches))


# ----------------------------------------------------------------------------------- training

def trained(device, tmp_path, precision="fp32", steps=6, **loop):
    text = torch.randint(2, 97, (1000,), generator=torch.Generator().manual_seed(0))
    data = distill.Rows(text, 48, 2, steps)
    base, folding = lola.Config(window=8, chunk=4, sparse=0, mixing="lolcats"), lola.Config(window=8, chunk=4, sparse=6, mixing="gated")
    both = dict(precision=precision, folder=tmp_path, **loop)
    model = hf.soft().to(device)
    maps = distill.transfer(model, base, data, feature_dim=8, **both)
    return maps, distill.finetune(model, [folding, base], maps, data, rates={"lora": 1e-2, "gates": 1e-2}, **both)


def test_training_is_the_cpus(tmp_path):
    here, there = trained("cpu", tmp_path / "cpu"), trained(DEVICE, tmp_path / "device")
    for mine, theirs in zip(here, there):
        # A device's products may be TF32.
        np.testing.assert_allclose(theirs.losses, mine.losses, rtol=2e-2)
        assert theirs.peak_bytes > 0
    rough = trained(DEVICE, tmp_path / "bf16", "bf16")
    np.testing.assert_allclose(rough[1].losses, here[1].losses, rtol=5e-2)


def test_training_goes_on_where_it_was_stopped(tmp_path):
    whole = trained(DEVICE, tmp_path / "whole")
    for _ in range(2 * 6 + 1):
        try:
            parts = trained(DEVICE, tmp_path / "parts", resume=True, seconds=0.0)
            break
        except distill.Unfinished:
            pass
    for mine, theirs in zip(whole, parts):
        # Sums on a GPU depend on the order in which its threads arrive.
        np.testing.assert_allclose(theirs.losses, mine.losses, rtol=1e-4)


@only_on_cuda
@pytest.mark.parametrize("stage", ["transfer", "finetune"])
def test_counted_memory_is_measured_memory(stage):
    """The step that is counted without being computed, beside what the device had in use: more by what its kernels need."""
    shape = distill.shape_8b()
    shape.num_hidden_layers, shape.hidden_size, shape.intermediate_size, shape.vocab_size = 2, 2048, 4096, 8192
    shape.num_attention_heads, shape.num_key_value_heads = 16, 4
    counted, measured = (distill.count_memory(shape, stage, length=2048, rows=4, device=device) for device in ("cpu", DEVICE))
    assert counted[0] == measured[0] and 0.8 < measured[1] / counted[1] < 2
