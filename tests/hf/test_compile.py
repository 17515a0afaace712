"""torch.compile of whole models: the same logits, and never a graph break."""

import hf_models as hf
import pytest
import torch

import lola
from lola.torch import ops


@pytest.fixture
def compiled(request):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    return lambda model: torch.compile(model, fullgraph=True, backend=request.param)


def same(model, fast, ids):
    wanted = model(ids).logits
    assert hf.difference(fast(ids, use_cache=False).logits, wanted) < 1e-4
    # The cache is made inside the graph.
    out = fast(ids[:, :40])
    logits, cache = [out.logits], out.past_key_values
    assert cache.get_seq_length() == 40
    for i in range(40, 45):
        logits.append(fast(ids[:, i : i + 1], past_key_values=cache).logits)
    cache.reorder_cache(torch.tensor([0, 1]))
    logits.append(model(ids[:, 45:], past_key_values=cache).logits)  # eager again
    assert hf.difference(torch.cat(logits, 1), wanted) < 1e-4
    assert (cache.layers[0].cache.tokens_seen == 60).all()
    # And the other way round.
    cache = model(ids[:, :40]).past_key_values
    assert hf.difference(fast(ids[:, 40:41], past_key_values=cache).logits, wanted[:, 40:41]) < 1e-4
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.parametrize("compiled, family", [("eager", "qwen3"), ("aot_eager", "llama")], indirect=["compiled"])
def test_model(compiled, family):
    model = hf.linear(family, num_hidden_layers=2)
    same(model, compiled(model), hf.prompts())


@pytest.mark.parametrize("compiled", ["inductor"], indirect=True)
def test_inductor(compiled, monkeypatch):
    """The compiler that users get. It must never clone a memory: adopting a clone is for backends that cannot do otherwise.
    And a map must be made once, not at every step."""
    model = hf.linear(num_hidden_layers=1)
    made = []
    monkeypatch.setattr(ops, "adopt", None)
    monkeypatch.setitem(ops._MAPS, "hedgehog", lambda *weights: made.append(1) or lola.Hedgehog(*weights))
    same(model, compiled(model), hf.prompts())
    assert len(made) == 1


@pytest.mark.parametrize("compiled", ["eager"], indirect=True)
def test_padding(compiled):
    model = hf.linear(num_hidden_layers=2)
    fast = compiled(model)
    for holes in ([], [30, 44]):
        ids, mask = hf.padded(hf.prompts(), [60, 22])
        mask[0, holes] = 0
        options = dict(attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0))
        real = mask.bool()
        assert hf.difference(fast(ids, **options).logits[real], model(ids, **options).logits[real]) < 1e-4


@pytest.mark.parametrize("compiled", ["eager"], indirect=True)
def test_generate(compiled):
    model = hf.linear(num_hidden_layers=1)
    ids = hf.prompts()
    wanted = hf.answer(model, ids)
    model.forward = compiled(model.forward)
    assert torch.equal(hf.answer(model, ids), wanted)
