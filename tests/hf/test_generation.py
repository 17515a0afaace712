"""generate, pipelines and batches while tokens are being folded, against runs that share nothing of the same machinery."""

import json

import checkpoints
import hf_models as hf
import pytest
import torch
from tokenizers import Tokenizer
from transformers import DynamicCache, GenerationConfig, PreTrainedTokenizerFast, pipeline

from lola.torch import LolaCacheLayer


@pytest.fixture(scope="module")
def model():
    return hf.linear()


@pytest.fixture(scope="module", params=["llama", "qwen3", "hybrid"])
def any_model(request):
    return hf.linear(layers=[1, 2]) if request.param == "hybrid" else hf.linear(request.param)


def test_something_is_folded(model):
    cache = model(hf.prompts()).past_key_values
    assert all(isinstance(layer, LolaCacheLayer) for layer in cache.layers)
    assert (cache.layers[0].cache.folded > 20).all()


def test_greedy_equals_whole_forward_passes(any_model):
    """Without a cache every step reads the text from its beginning."""
    ids = hf.prompts()
    assert torch.equal(hf.answer(any_model, ids), hf.answer(any_model, ids, use_cache=False))


def test_beams_equal_whole_forward_passes(any_model):
    ids, mask = hf.padded(hf.prompts(), [60, 31])
    options = dict(num_beams=4, attention_mask=mask, num_return_sequences=2)
    assert torch.equal(hf.answer(any_model, ids, **options), hf.answer(any_model, ids, use_cache=False, **options))


def test_sampling_equals_whole_forward_passes(model):
    texts = []
    for use_cache in (True, False):
        torch.manual_seed(7)
        texts.append(hf.answer(model, hf.prompts(), do_sample=True, temperature=2.0, top_k=40, use_cache=use_cache, num_return_sequences=3))
    assert torch.equal(*texts) and not torch.equal(texts[0][0], texts[0][1])


def test_a_padded_batch_generates_what_each_row_does(any_model):
    lengths = [60, 13, 41, 1]
    ids, mask = hf.padded(hf.prompts(4), lengths)
    together = hf.answer(any_model, ids, attention_mask=mask)
    for b, length in enumerate(lengths):
        assert torch.equal(together[b], hf.answer(any_model, ids[b : b + 1, 60 - length :])[0])


def test_right_padding_leaves_real_tokens_alone(model):
    """As lm-eval scores: shorter rows are padded on the right, without a mask or with one."""
    ids = hf.prompts()
    short = ids[:1, :33]
    wanted = model(short).logits[0]
    ids[0, 33:] = 0
    mask = torch.ones_like(ids)
    mask[0, 33:] = 0
    for options in ({}, dict(attention_mask=mask), dict(attention_mask=mask, use_cache=False)):
        assert hf.difference(model(ids, **options).logits[0, :33], wanted) < 1e-5
    cache = model(ids, attention_mask=mask).past_key_values
    assert cache.layers[0].cache.tokens_seen.tolist() == [33, 60]


@pytest.mark.parametrize("size", [1, 7, 64])
def test_chunked_prefill(any_model, size):
    ids, mask = hf.padded(hf.prompts(), [60, 31])
    assert torch.equal(
        hf.answer(any_model, ids, attention_mask=mask), hf.answer(any_model, ids, attention_mask=mask, prefill_chunk_size=size)
    )


def test_turns_equal_one_text(model):
    ids, cache = hf.prompts(tokens=90), DynamicCache(config=model.config)
    wanted = model(ids).logits
    for first, last in ((0, 40), (40, 41), (41, 73), (73, 90)):
        got = model(ids[:, first:last], past_key_values=cache).logits
        assert hf.difference(got, wanted[:, first:last]) < 1e-5


def test_stopping_rows(model):
    """Rows that ended are fed padding, which the others must not see."""
    ids = hf.prompts(3)
    alone = [hf.answer(model, ids[b : b + 1], 20)[0] for b in range(3)]
    stop = int(alone[1][3])
    together = hf.answer(model, ids, 20, eos_token_id=stop)
    for b in range(3):
        ends = (alone[b] == stop).nonzero()
        length = int(ends[0]) + 1 if len(ends) else 20
        assert torch.equal(together[b, :length], alone[b][:length])


def test_a_static_cache_becomes_lola(model):
    ids = hf.prompts()
    assert torch.equal(hf.answer(model, ids), hf.answer(model, ids, cache_implementation="static"))


def test_logits_and_cache_of_generate(model):
    out = model.generate(
        hf.prompts(), generation_config=GenerationConfig(max_new_tokens=5, return_dict_in_generate=True, output_logits=True)
    )
    assert len(out.logits) == 5 and out.past_key_values.get_seq_length() == 64


@pytest.mark.parametrize("assistant", ["lola", "softmax", "prompt lookup"])
def test_speculative_decoding(model, assistant):
    """The text is that of the model alone, however wrong its assistant."""
    ids = hf.prompts(1)
    ids[0, 40:60] = ids[0, 10:30]
    options = {
        "lola": dict(assistant_model=hf.linear(seed=5, num_hidden_layers=1)),
        "softmax": dict(assistant_model=hf.soft(seed=5, num_hidden_layers=1)),
        "prompt lookup": dict(prompt_lookup_num_tokens=4),
    }[assistant]
    assert torch.equal(hf.answer(model, ids, 40, **options), hf.answer(model, ids, 40))
    if assistant == "lola":  # an assistant that is right now and then
        assert torch.equal(hf.answer(model, ids, 40, assistant_model=hf.linear()), hf.answer(model, ids, 40))
        soft = hf.soft()
        assert torch.equal(hf.answer(soft, ids, 40, assistant_model=hf.linear(config=hf.NOTHING_FOLDED)), hf.answer(soft, ids, 40))


def tokenizer():
    bytes_ = Tokenizer.from_str(json.dumps(checkpoints.tokenizer()))
    return PreTrainedTokenizerFast(tokenizer_object=bytes_, pad_token="Ā", padding_side="left")


def test_pipeline():
    model = hf.linear(vocab_size=256)
    run = pipeline("text-generation", model=model, tokenizer=tokenizer())
    texts = ["The sky is blue and the grass is green.", "Yes", "A longer text than the others, so that both of them are padded."]
    options = dict(max_new_tokens=8, do_sample=False, return_full_text=False)
    alone = [run(text, **options)[0]["generated_text"] for text in texts]
    batch = [out[0]["generated_text"] for out in run(texts, batch_size=3, **options)]
    assert alone == batch and all(len(text) > 0 for text in alone)
