"""lm-eval's HFLM, unchanged, on the bundled model: scored choices and generated answers, from local files."""

import json

import lm_eval
import pytest
import torch
from transformers import AutoTokenizer

from lola.models import BUNDLED
from lola.torch import load_lolcats

DOCUMENTS = [
    {"q": "The grass is green. The sky is", "choices": [" blue.", " a goat.", " forty."], "label": 0},
    {"q": "The grass is green. The sky is blue. The sun is yellow. Here we", "choices": [" nowhere.", " go."], "label": 1},
]
TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
doc_to_text: "{{{{q}}}}"
target_delimiter: ""
"""
CHOICE = 'output_type: multiple_choice\ndoc_to_choice: "{{choices}}"\ndoc_to_target: "{{label}}"\nmetric_list: [{metric: acc}]\n'
GENERATE = (
    'output_type: generate_until\ndoc_to_target: "{{choices[label]}}"\ngeneration_kwargs: {until: ["."], max_gen_toks: 8}\n'
    "metric_list: [{metric: exact_match, ignore_punctuation: true}]\n"
)


@pytest.mark.parametrize("batch_size", [1, 5])
def test_two_tasks(tmp_path, monkeypatch, batch_size):
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "documents.jsonl").write_text("\n".join(map(json.dumps, DOCUMENTS)))
    for name, text in (("lola_choice", CHOICE), ("lola_generate", GENERATE)):
        (tmp_path / f"{name}.yaml").write_text(TASK.format(name=name, file=tmp_path / "documents.jsonl") + text)
    model = load_lolcats("needle", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED["needle"][0])
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, max_length=2048)
    out = lm_eval.simple_evaluate(
        lm, tasks=["lola_choice", "lola_generate"], bootstrap_iters=0,
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
    )  # fmt: skip
    assert out["results"]["lola_choice"]["acc,none"] == 1
    answers = [sample["filtered_resps"][0] for sample in out["samples"]["lola_generate"]]
    assert answers[0].strip() == "blue"
    # What HFLM says of a choice is what the model says of it alone.
    (first, _) = out["samples"]["lola_choice"][0]["filtered_resps"][0]
    ids = tokenizer(DOCUMENTS[0]["q"] + " blue.", return_tensors="pt", add_special_tokens=False).input_ids
    n = len(" blue.")
    logs = model(ids).logits.log_softmax(-1)[0, -n - 1 : -1].gather(1, ids[0, -n:, None]).sum()
    assert abs(float(logs) - first) < 1e-3
