"""lola.torch.attention: lola.attention, eager and traced."""

import gc
import subprocess
import sys
import weakref

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import lola
import lola.torch
from lola.torch import attention, ops, prepare

CONFIG = lola.Config(window=8, chunk=4, sparse=5)
SIZES = dict(batch=2, heads=4, kv_heads=2, head_dim=8, value_dim=6, feature_dim=12)


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    return draw(2, 45, 4, 8), draw(2, 45, 2, 8), draw(2, 45, 2, 6), lola.Hedgehog(draw(4, 8, 6), draw(4, 8, 6)), torch.full((4,), 0.3)


@pytest.fixture(params=["eager", "aot_eager"])
def backend(request):
    """"aot_eager" hands an operator clones of what it mutates, "eager" the real thing, as inductor does."""
    torch._dynamo.reset()
    return request.param


def numpy_result(q, k, v, fmap, gate, **options):
    return lola.attention(*(x.numpy() for x in (q, k, v)), feature_map=fmap, gate=gate.numpy(), **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_eager_is_lola_attention(data, dtype):
    *qkv, fmap, gate = data
    q, k, v = (x.to(dtype) for x in qkv)
    cache = lola.Cache(CONFIG, **SIZES, dtype=dtype)
    got = attention(q, k, v, cache=cache, feature_map=fmap, gate=gate)
    assert got.dtype == dtype and got.shape == (2, 45, 4, 6)
    assert torch.equal(got, lola.attention(q, k, v, config=CONFIG, feature_map=fmap, gate=gate))
    assert cache.tokens_seen.tolist() == [45, 45]


def test_views_are_read_in_place_and_out_is_written(data):
    q, k, v, fmap, gate = data
    wanted = attention(q, k, v, config=CONFIG, feature_map=fmap, gate=gate)
    heads_first = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    out = torch.empty(2, 4, 45, 6).transpose(1, 2)
    assert attention(*heads_first, config=CONFIG, feature_map=fmap, gate=gate, out=out) is out
    assert torch.equal(out, wanted)


def test_gradients(data):
    q, k, v, fmap, gate = data
    q.requires_grad_()
    wanted = attention(q.detach(), k, v, config=CONFIG, feature_map=fmap, gate=gate)
    assert torch.equal(attention(q, k, v, config=CONFIG, feature_map=fmap, gate=gate), wanted)
    with torch.enable_grad(), pytest.raises(ValueError, match="q requires grad.*no_grad"):
        attention(q, k, v, config=CONFIG, feature_map=fmap, gate=gate)


def test_errors_are_those_of_lola(data):
    q, k, v, fmap, gate = data
    with pytest.raises(TypeError, match="float64"):
        attention(q.double(), k, v, config=CONFIG, feature_map=fmap, gate=gate)
    with pytest.raises(ValueError, match="k must have shape"):
        attention(q, k[:, :3], v, config=CONFIG, feature_map=fmap, gate=gate)
    with pytest.raises(ValueError, match="device must be"):
        attention(q, k, v, config=CONFIG, feature_map=fmap, gate=gate, device="meta")
    with pytest.raises(TypeError, match="prepare takes"):
        prepare(q)


def test_inference_mode(data):
    q, k, v, fmap, gate = data
    wanted = attention(q, k, v, config=CONFIG, feature_map=fmap, gate=gate)
    with torch.inference_mode():
        assert torch.equal(attention(q + 0, k, v, config=CONFIG, feature_map=fmap, gate=gate), wanted)


def test_parameters_of_inference_mode():
    """They count no writes, so nothing that is made of them is kept; and it says so, since that is slow."""
    with torch.inference_mode():
        factors = torch.zeros(1, 4, 1, 1)
        for _ in range(2):
            with pytest.warns(UserWarning, match="outside of it"):
                assert torch.equal(ops.gate_of(factors), factors.sigmoid().flatten())
            factors += 1


def test_traced_with_a_cache(data, backend):
    """Prefill, single steps and padded rows in graphs without a break, and eager calls between them, on one memory."""
    q, k, v, fmap, gate = data
    cache, other = lola.Cache(CONFIG, **SIZES), lola.Cache(CONFIG, **SIZES)
    prepare(cache, fmap)

    @torch.compile(fullgraph=True, backend=backend)
    def traced(q, k, v, **options):
        return attention(q * 2, k, v, feature_map=fmap, gate=gate, **options) + 1

    starts, stops = torch.tensor([3, 0]), torch.tensor([9, 5])
    for place, options in ((slice(0, 30), {}), (30, {}), (31, {}), (slice(32, 41), dict(starts=starts, stops=stops)), (slice(41, 45), {})):
        part = [x[:, place if isinstance(place, slice) else slice(place, place + 1)] for x in (q, k, v)]
        got = traced(*part, cache=cache, **options)
        assert torch.allclose(got - 1, attention(part[0] * 2, *part[1:], cache=other, feature_map=fmap, gate=gate, **options), atol=1e-6)
    assert (cache.tokens_seen == other.tokens_seen).all() and cache.tokens_seen.tolist() == [42, 41]
    for one, two in zip(cache.buffers().values(), other.buffers().values()):
        np.testing.assert_array_equal(one, two)
    last = [x[:, :1] for x in (q, k, v)]
    assert torch.equal(*(attention(*last, cache=c, feature_map=fmap, gate=gate) for c in (cache, other)))


def test_traced_calls_on_one_cache_stay_in_order(data, backend):
    q, k, v, fmap, gate = data
    cache = lola.Cache(CONFIG, **SIZES)
    prepare(cache, fmap)

    def both(q, k, v):
        first = attention(q[:, :20], k[:, :20], v[:, :20], cache=cache, feature_map=fmap, gate=gate)
        return torch.cat([first, attention(q[:, 20:], k[:, 20:], v[:, 20:], cache=cache, feature_map=fmap, gate=gate)], 1)

    got = torch.compile(both, fullgraph=True, backend=backend)(q, k, v)
    np.testing.assert_allclose(got, numpy_result(q, k, v, fmap, gate, config=CONFIG), atol=1e-6)


def test_traced_without_a_cache(data, backend):
    q, k, v, fmap, gate = data
    prepare(fmap)
    traced = torch.compile(attention, fullgraph=True, backend=backend)
    other = lola.Config(window=4, chunk=4, sparse=3, mixing="lolcats", score="value_norm", sparse_per="kv_head", scale=0.25)
    for config in (CONFIG, other):
        wanted = attention(q, k, v, config=config, feature_map=fmap, gate=gate)
        assert torch.equal(traced(q, k, v, config=config, feature_map=fmap, gate=gate), wanted)
    features = torch.rand(2, 2, 45, 4, 12)
    wanted = attention(q, k, v, config=CONFIG, q_features=features[0], k_features=features[1])
    assert torch.equal(traced(q, k, v, config=CONFIG, q_features=features[0], k_features=features[1]), wanted)
    packed = [x.reshape(1, 90, *x.shape[2:]) for x in (q, k, v)]
    bounds = torch.tensor([0, 45, 90])
    wanted = attention(q, k, v, config=CONFIG, feature_map=fmap, gate=gate).reshape(1, 90, 4, 6)
    assert torch.equal(traced(*packed, config=CONFIG, feature_map=fmap, gate=gate, cu_seqlens=bounds), wanted)


def test_one_graph_for_every_cache(data):
    q, k, v, fmap, gate = data
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    prepare(fmap)

    @torch.compile(fullgraph=True, backend="eager")
    def traced(q, k, v, cache):
        return attention(q, k, v, cache=cache, feature_map=fmap, gate=gate)

    for _ in range(4):
        cache = lola.Cache(CONFIG, **SIZES)
        prepare(cache)
        traced(q, k, v, cache)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_an_unprepared_cache_still_works(data):
    q, k, v, fmap, gate = data
    torch._dynamo.reset()
    cache = lola.Cache(CONFIG, **SIZES)
    got = torch.compile(lambda q: attention(q, k, v, cache=cache, feature_map=fmap, gate=gate), backend="eager")(q)
    np.testing.assert_allclose(got, numpy_result(q, k, v, fmap, gate, config=CONFIG), atol=1e-6)


def test_opcheck(data):
    """PyTorch's own examination of an operator: schema, fake implementation, functionalisation."""
    q, k, v, fmap, gate = data
    weights = [torch.from_numpy(w.copy()) for w in (fmap.w_q, fmap.w_k)]
    cache = lola.Cache(CONFIG, **SIZES)
    spec = ops.spec_of(CONFIG)
    terms = (*spec, "hedgehog", *weights)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(
        ops._attention, (q, k, v, ops.tensors_of(cache), *terms, gate, False, None, None, None, None, None), test_utils=checks
    )
    torch.library.opcheck(ops._attention_once, (q, k, v, *terms, None, None, gate, False, None, None, None, None, None))
    torch.library.opcheck(ops._new_cache, (k, *spec, [4, 2, 8, 6, 12]), test_utils=checks)


def test_fake_tensors(data):
    _, _, _, fmap, _ = data
    with FakeTensorMode():
        q, k, v = torch.empty(3, 7, 4, 8), torch.empty(3, 7, 2, 8), torch.empty(3, 7, 2, 6)
        assert attention(q, k, v, config=CONFIG, feature_map=fmap, gate=torch.empty(4)).shape == (3, 7, 4, 6)
    fake = ops._new_cache(torch.empty(3, 1, 2, 8, device="meta"), *ops.spec_of(CONFIG), [4, 2, 8, 6, 12])
    real = ops.tensors_of(lola.Cache(CONFIG, **{**SIZES, "batch": 3}))
    assert [(x.shape, x.dtype) for x in fake] == [(x.shape, x.dtype) for x in real]


@pytest.mark.parametrize("known", [prepare, ops.tensors_of])
def test_nothing_keeps_a_cache_alive(known):
    gc.collect()
    cache = lola.Cache(CONFIG, **SIZES)
    known(cache)
    gone = weakref.ref(cache)
    before = len(ops._known)
    del cache
    gc.collect()
    assert gone() is None and len(ops._known) == before - 1


def test_tensors_keep_their_cache_alive():
    buffers = ops.tensors_of(lola.Cache(CONFIG, **SIZES))
    gc.collect()
    cache = ops.find(buffers)
    buffers[0].fill_(3)
    assert cache.tokens_seen.tolist() == [3, 3]
    assert ops.find([x.clone() for x in buffers]) is None and ops.find([x.clone() if i == 9 else x for i, x in enumerate(buffers)]) is None


def test_maps_follow_their_weights():
    w = torch.randn(2, 4, 8, 6)
    first = ops.feature_map_of("hedgehog", w[0], w[1])
    a, b = w[0].clone(), w[1].clone()
    first = ops.feature_map_of("hedgehog", a, b)
    assert ops.feature_map_of("hedgehog", a, b) is first
    a.mul_(2)
    second = ops.feature_map_of("hedgehog", a, b)
    assert second is not first and np.array_equal(second.w_q, a.numpy())
    kept = len(ops.derive.kept)
    del a, b
    gc.collect()
    assert len(ops.derive.kept) < kept


def test_import_lola_does_not_import_torch():
    code = "import sys, lola, lola.models, lola.cli; assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
