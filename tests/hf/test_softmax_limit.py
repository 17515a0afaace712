"""With a sparse cache that holds everything nothing is folded, and LoLA is the softmax model."""

import hf_models as hf
import pytest
import torch
from transformers import DynamicCache


@pytest.fixture(scope="module", params=hf.FAMILIES)
def pair(request):
    return hf.soft(request.param), hf.linear(request.param, hf.NOTHING_FOLDED)


@pytest.mark.parametrize("use_cache", [False, True])
def test_prefill(pair, use_cache):
    soft, linear = pair
    ids = hf.prompts()
    wanted = soft(ids).logits
    assert hf.difference(linear(ids, use_cache=use_cache).logits, wanted) < 1e-4
    assert wanted.abs().max() > 1


def test_decode(pair):
    soft, linear = pair
    ids, cache = hf.prompts(), DynamicCache()
    logits = [linear(part, past_key_values=cache).logits for part in ids.split([37, 1, 1, 9, 1, 1, 10], dim=1)]
    assert hf.difference(torch.cat(logits, 1), soft(ids).logits) < 1e-4
    assert cache.get_seq_length() == 60


@pytest.mark.parametrize("attn", ["lola", "sdpa", "eager"])
def test_left_padding(pair, attn):
    soft, linear = pair
    ids, mask = hf.padded(hf.prompts(3), [60, 13, 41])
    before = linear.config._attn_implementation
    linear.config._attn_implementation = attn
    try:
        got = linear(ids, attention_mask=mask).logits
        text = hf.answer(linear, ids, attention_mask=mask)
    finally:
        linear.config._attn_implementation = before
    real = mask.bool()
    assert hf.difference(got[real], soft(ids, attention_mask=mask).logits[real]) < 1e-4
    assert torch.equal(text, hf.answer(soft, ids, attention_mask=mask))


def test_beams(pair):
    soft, linear = pair
    ids, mask = hf.padded(hf.prompts(), [60, 22])
    for options in (dict(num_beams=3), dict(num_beams=4, num_return_sequences=2, length_penalty=0.5)):
        assert torch.equal(*(hf.answer(model, ids, attention_mask=mask, **options) for model in pair))


def test_second_turn(pair):
    soft, linear = pair
    first, more = hf.prompts(), hf.prompts(seed=1)[:, :17]
    texts = []
    for model in pair:
        cache = DynamicCache()
        said = model.generate(first, max_new_tokens=12, do_sample=False, past_key_values=cache)
        whole = torch.cat([said, more], 1)
        # The texts have tokens like the padding's, from which generate would make a mask of its own.
        options = dict(attention_mask=torch.ones_like(whole), past_key_values=cache)
        texts.append(model.generate(whole, max_new_tokens=12, do_sample=False, **options))
        assert cache.get_seq_length() == 60 + 12 + 17 + 12 - 1
    assert torch.equal(*texts)


def test_second_turn_of_a_padded_batch(pair):
    soft, linear = pair
    ids, mask = hf.padded(hf.prompts(), [60, 22])
    more, more_mask = hf.padded(hf.prompts(seed=1)[:, :17], [5, 17])
    texts = []
    for model in pair:
        cache = DynamicCache()
        said = model.generate(ids, attention_mask=mask, max_new_tokens=9, do_sample=False, past_key_values=cache)
        whole = torch.cat([mask, torch.ones(2, 9, dtype=mask.dtype), more_mask], 1)
        texts.append(
            model.generate(torch.cat([said, more], 1), attention_mask=whole, max_new_tokens=9, do_sample=False, past_key_values=cache)
        )
    assert torch.equal(*texts)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_hybrid(family, attn):
    """Some layers stay softmax; one mask serves both kinds."""
    soft = hf.soft(family)
    linear = hf.linear(family, hf.NOTHING_FOLDED, layers=[0, -1])
    assert linear.config._attn_implementation == "sdpa"
    linear.config._attn_implementation = attn
    ids, mask = hf.padded(hf.prompts(3), [60, 13, 41])
    real = mask.bool()
    assert hf.difference(linear(ids, attention_mask=mask).logits[real], soft(ids, attention_mask=mask).logits[real]) < 1e-4
    for options in ({}, dict(num_beams=2), dict(prefill_chunk_size=16)):
        assert torch.equal(*(hf.answer(model, ids, attention_mask=mask, **options) for model in (soft, linear)))


def test_16_bit():
    for dtype in (torch.bfloat16, torch.float16):
        soft, linear = hf.soft().to(dtype), hf.linear(config=hf.NOTHING_FOLDED).to(dtype)
        exact, ids = hf.soft(), hf.prompts()
        wanted = exact(ids).logits
        # As near to float32 as softmax attention of that dtype, about.
        assert hf.difference(linear(ids).logits, wanted) < 2 * hf.difference(soft(ids).logits, wanted)


def test_autocast():
    soft, linear = hf.soft(), hf.linear(config=hf.NOTHING_FOLDED)
    ids = hf.prompts()
    with torch.autocast("cpu", torch.bfloat16):
        soft16, linear16 = soft(ids).logits, linear(ids).logits
    assert hf.difference(linear16, soft(ids).logits) < 2 * hf.difference(soft16, soft(ids).logits)
