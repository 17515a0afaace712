"""LolaCacheLayer: what transformers does to caches."""

import copy
import pickle

import hf_models as hf
import numpy as np
import pytest
import torch
from transformers import DynamicCache

from lola.torch import LolaCacheLayer
from lola.torch.cache import lola_mask, rows_of_mask


@pytest.fixture(scope="module")
def model():
    return hf.linear()


def read(model, ids, cache=None):
    return model(ids, past_key_values=DynamicCache() if cache is None else cache).past_key_values


def test_lengths(model):
    cache = DynamicCache()
    assert cache.get_seq_length() == 0
    ids, mask = hf.padded(hf.prompts(), [60, 22])
    model(ids, attention_mask=mask, past_key_values=cache)
    layer = cache.layers[2]
    assert (cache.get_seq_length(), layer.get_max_length(), layer.get_mask_sizes(3)) == (60, -1, (63, 0))
    assert layer.cache.tokens_seen.tolist() == [60, 22]
    assert not layer.is_croppable and not cache.is_compileable
    assert "tokens_seen=[60, 22]" in repr(layer)


def test_its_size_does_not_depend_on_the_tokens(model):
    assert len({read(model, hf.prompts(tokens=n)).layers[0].cache.nbytes for n in (1, 60, 300)}) == 1


def continues_as(model, cache, ids, first):
    """The cache continues these texts, (B, T), from `first` on, as one pass over them does."""
    got = model(ids[:, first:], past_key_values=cache).logits
    assert hf.difference(got, model(ids).logits[:, first:]) < 1e-5


def test_reorder(model):
    ids = hf.prompts(3)
    cache = read(model, ids[:, :50])
    addresses = [x.data_ptr() for x in cache.layers[0]._buffers]
    cache.reorder_cache(torch.tensor([2, 0, 0]))
    assert addresses == [x.data_ptr() for x in cache.layers[0]._buffers]
    continues_as(model, cache, torch.cat([ids[[2, 0, 0], :50], ids[:, 50:]], 1), 50)


def test_repeat_and_select(model):
    ids = hf.prompts(2)
    cache = read(model, ids[:, :50])
    cache.batch_repeat_interleave(3)
    continues_as(model, copy.deepcopy(cache), ids.repeat_interleave(3, 0), 50)
    twin = copy.deepcopy(cache)
    cache.batch_select_indices(torch.tensor([5, 1]))
    continues_as(model, cache, ids[[1, 0]], 50)
    twin.batch_select_indices(torch.tensor([False, True, False, True, False, False]))
    continues_as(model, twin, ids, 50)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))])
def test_copies_go_on_by_themselves(model, copied):
    ids = hf.prompts()
    cache = read(model, ids[:, :50])
    twin = copied(cache)
    continues_as(model, cache, ids, 50)
    assert twin.get_seq_length() == 50
    continues_as(model, twin, ids, 50)
    assert isinstance(copied(DynamicCache(config=model.config)), DynamicCache)


def test_one_prompt_for_many(model):
    """Prompt caching as transformers' documentation does it."""
    prefix, cache = hf.prompts(1, 50), DynamicCache()
    model(prefix, past_key_values=cache)
    for seed in (1, 2):
        ids = torch.cat([prefix, hf.prompts(1, 9, seed)], 1)
        assert torch.equal(hf.answer(model, ids, past_key_values=copy.deepcopy(cache)), hf.answer(model, ids))


def test_reset(model):
    ids = hf.prompts()
    cache = read(model, ids)
    cache.reset()
    assert cache.get_seq_length() == 0
    continues_as(model, cache, ids, 0)
    cache.reset()
    continues_as(model, cache, hf.prompts(3), 0)  # another number of rows


def test_crop_within_a_chunk(model):
    """Window 8 and chunk 4: with 51 tokens read, the chunk began at 48."""
    ids = hf.prompts()
    cache = read(model, ids[:, :51])
    cache.crop(0)
    cache.crop(-3)
    assert cache.get_seq_length() == 48
    continues_as(model, cache, ids, 48)


def test_crop_beyond_a_chunk_says_why(model):
    cache = read(model, hf.prompts(tokens=51))
    with pytest.raises(ValueError, match="chunk"):
        cache.crop(-4)
    assert cache.layers[0].seen == 51
    cache.layers[0].crop(60)
    cache.layers[0].crop(49)
    assert cache.layers[0].seen == 49
    ids, mask = hf.padded(hf.prompts(), [60, 22])
    ragged = model(ids, attention_mask=mask).past_key_values
    with pytest.raises(ValueError, match="different length"):
        ragged.crop(-1)


@pytest.mark.parametrize("back", [1, 4, 9, 30, 40])
def test_crop_while_recording(model, back):
    """Speculative decoding takes back what it read since the last crop, across chunks; further back than that it cannot."""
    ids = hf.prompts()
    cache = read(model, ids[:, :20])
    cache.activate_past_recording()
    for first, last in ((20, 37), (37, 38), (38, 50)):
        read(model, ids[:, first:last], cache)
    if back > 30:
        with pytest.raises(ValueError, match="chunk"):
            cache.crop(-back)
        return
    cache.crop(-back)
    assert cache.get_seq_length() == 50 - back and not cache.layers[0]._calls
    continues_as(model, cache, ids, 50 - back)


@pytest.mark.parametrize("back", [1, 4, 7, 12, 18, 26, 30])
def test_crop_over_padding_while_recording(model, back):
    """Columns count as transformers counts them, padding between the tokens included."""
    ids, mask = hf.prompts(), torch.ones(2, 60, dtype=torch.long)
    mask[:, [2, 22, 23, 33, 44, 49]] = 0
    cache = DynamicCache()
    options = dict(position_ids=(mask.cumsum(1) - 1).clamp(min=0), attention_mask=mask)

    def part(first, last):
        return ids[:, first:last], dict(attention_mask=mask[:, :last], position_ids=options["position_ids"][:, first:last], past_key_values=cache)

    for first, last in ((0, 20), (20, 37), (37, 38), (38, 50)):
        one, more = part(first, last)
        model(one, **more)
        cache.activate_past_recording()
    cache.crop(-back)
    assert cache.get_seq_length() == 50 - back and cache.layers[0].cache.tokens_seen[0] == mask[0, : 50 - back].sum()
    one, more = part(50 - back, 60)
    real = mask[0, 50 - back :].bool()
    assert hf.difference(model(one, **more).logits[:, real], model(ids, **options).logits[:, 50 - back :][:, real]) < 1e-5


def test_crop_over_padding_that_nobody_recorded(model):
    ids, mask = hf.prompts(), torch.ones(2, 60, dtype=torch.long)
    mask[:, [0, 1, 2, 3, 4, 57]] = 0
    cache = read(model, ids[:, :9])
    model(ids, attention_mask=torch.cat([mask[:, :9], mask], 1), past_key_values=cache)  # 9 and 54 tokens
    read(model, ids[:, :1], cache)
    copies = [copy.deepcopy(cache) for _ in range(3)]
    for back, tokens in ((1, 63), (3, 61), (4, 61)):
        cache = copies.pop()
        cache.crop(-back)
        assert cache.get_seq_length() == 70 - back and cache.layers[1].cache.tokens_seen.tolist() == [tokens] * 2
    cache.crop(-1)
    assert cache.layers[1].cache.tokens_seen.tolist() == [60] * 2
    read(model, ids[:, :9], cache)
    with pytest.raises(ValueError, match="call with padding"):
        cache.crop(-66)
    with pytest.raises(ValueError, match="got 60"):  # no padding where there was some before
        cache.crop(-9)
    mask = torch.cat([torch.ones(2, 74, dtype=torch.long), torch.tensor([[0, 1], [1, 0]])], 1)
    model(ids[:, :2], attention_mask=mask, past_key_values=cache)
    with pytest.raises(ValueError, match="different numbers of tokens"):
        cache.crop(-1)


def test_recording_is_bounded(model, monkeypatch):
    monkeypatch.setattr("lola.torch.cache.RECORDED", 10)
    ids = hf.prompts()
    cache = read(model, ids[:, :20])
    cache.activate_past_recording()
    for i in range(20, 50):
        read(model, ids[:, i : i + 1], cache)
        assert len(cache.layers[0]._calls) <= 11
    cache.crop(-5)
    continues_as(model, cache, ids, 45)


def test_a_softmax_cache_is_refused(model):
    cache = hf.soft()(hf.prompts()).past_key_values
    with pytest.raises(ValueError, match="begin with a new cache"):
        model(hf.prompts(tokens=1), past_key_values=cache)


def test_softmax_attention_is_refused(model):
    cache = read(model, hf.prompts())
    with pytest.raises(TypeError, match="LolaAttention"):
        hf.soft()(hf.prompts(tokens=1), past_key_values=cache)


def test_another_batch_is_refused(model):
    cache = read(model, hf.prompts())
    with pytest.raises(ValueError, match="q must have shape"):
        model(hf.prompts(3, 1), past_key_values=cache)
    assert cache.layers[0].seen == 60 and cache.layers[0].cache.tokens_seen.tolist() == [60, 60]


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("attn", ["lola", "sdpa", "eager"])
def test_padding_between_tokens(attn, use_cache):
    """Each row is as if its padding were not there."""
    model = hf.linear()
    model.config._attn_implementation = attn
    ids, mask = hf.prompts(), torch.ones(2, 60, dtype=torch.long)
    mask[1, [0, 1, 2, 30, 31, 44, 59]] = 0
    got = model(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0), use_cache=use_cache).logits
    for b in range(2):
        real = mask[b].bool()
        assert hf.difference(got[b, real], model(ids[b : b + 1, real]).logits[0]) < 1e-5


def test_bounds_of_rows_are_contiguous():
    """As kernels on a device take them."""
    mask = torch.ones(3, 20, dtype=torch.long)
    for padding in (slice(0, 4), slice(15, 20), slice(7, 9)):
        mask[1, padding] = 0
        rows = rows_of_mask(lola_mask(3, 20, 20, attention_mask=mask), 20, 0)
        assert rows.starts.is_contiguous() and rows.stops.is_contiguous()
        assert torch.equal(rows.valid(20), mask.bool())


@pytest.mark.parametrize("attn", ["lola", "sdpa"])
def test_packed_sequences_are_refused(attn):
    model = hf.linear()
    model.config._attn_implementation = attn
    positions = torch.cat([torch.arange(20), torch.arange(40)])[None]
    with pytest.raises(ValueError, match="batch"):
        model(hf.prompts(1), position_ids=positions, use_cache=False)


def test_masks_that_are_not_causal_are_refused(model):
    with pytest.raises(ValueError, match="later ones"):
        model(hf.prompts(), attention_mask=torch.ones(2, 1, 60, 60, dtype=torch.bool))
    causal = torch.ones(2, 1, 60, 60, dtype=torch.bool).tril()
    assert hf.difference(model(hf.prompts(), attention_mask=causal).logits, model(hf.prompts()).logits) == 0
    with pytest.raises(ValueError, match="2 or 4 axes"):
        model.model.layers[0].self_attn(torch.randn(2, 5, 32), model.model.rotary_emb(torch.randn(2), torch.arange(5)[None]), torch.ones(5))


def test_gradients_are_refused(model):
    with torch.enable_grad(), pytest.raises(ValueError, match="no_grad"):
        model(hf.prompts())


def test_a_cache_layer_alone():
    layer = LolaCacheLayer()
    assert layer.cache is None and layer.get_seq_length() == 0
    layer.crop(-3), layer.reset(), layer.reorder_cache(torch.tensor([0])), layer.offload(), layer.prefetch()
    assert np.all([not layer.is_initialized, not layer.is_croppable])
