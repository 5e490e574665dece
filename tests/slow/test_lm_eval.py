"""lm-eval's `local-completions` model against the server, beside its own `hf` model on the same directory."""

import json

import pytest
import torch
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

import cadre
from tests.serve.live import CONTEXT, Live, parts

DOCUMENTS = [
    {"text": "The naïve café", "choices": [" served 3 guests.", " answered: yes", " 😀🎉"], "gold": 0},
    {"text": "Then the people", "choices": [" of the union answered", " do", ": no"], "gold": 0},
    {"text": "yes,", "choices": [" we do.", " café", " the people of the union answered: yes, we do."], "gold": 2},
    {"text": "The", "choices": ["n", " naïve", " union"], "gold": 1},
] * 3
TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: {kind}
doc_to_text: "{{{{text}}}}"
{rest}
"""
CHOICE = """
doc_to_choice: "{{choices}}"
doc_to_target: "{{gold}}"
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
WRITE = """
doc_to_target: "{{choices[0]}}"
generation_kwargs: {until: ["e"], max_gen_toks: 12, do_sample: false, temperature: 0.0}
metric_list: [{metric: exact_match}]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lm-eval")
    (folder / "data.jsonl").write_text("".join(json.dumps(document) + "\n" for document in DOCUMENTS))
    for name, kind, rest in (("choose", "multiple_choice", CHOICE), ("write", "generate_until", WRITE)):
        task = TASK.format(name=name, data=folder / "data.jsonl", kind=kind, rest=rest)
        (folder / f"{name}.yaml").write_text(task)
    cadre.save(parts()[0], folder / "model", parts()[1])
    return folder


def evaluate(folder, kind, **arguments):
    return simple_evaluate(
        model=kind,
        model_args=arguments,
        tasks=["choose", "write"],
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        log_samples=True,
        bootstrap_iters=0,
    )


@pytest.mark.parametrize("batch", [1, 4])
def test_scores_are_those_of_the_model_itself(folder, batch):
    torch.set_num_threads(1)
    own = evaluate(
        folder,
        "hf",
        pretrained=str(folder / "model"),
        dtype="float32",
        device="cpu",
        max_length=CONTEXT,
        experts_implementation="eager",  # the others want wider experts
    )
    with Live() as server:
        served = evaluate(
            folder,
            "local-completions",
            base_url=server.url + "/v1/completions",
            model="tiny",
            tokenizer=str(folder / "model"),
            tokenizer_backend="huggingface",
            max_length=CONTEXT,
            batch_size=batch,
            num_concurrent=1,
            max_retries=1,
        )
        server.until(server.idle)
    assert served["results"]["choose"]["acc,none"] == own["results"]["choose"]["acc,none"]
    for mine, theirs in zip(served["samples"]["choose"], own["samples"]["choose"], strict=True):
        for (score, greedy), (wanted, wanted_greedy) in zip(mine["filtered_resps"], theirs["filtered_resps"], strict=True):
            assert score == pytest.approx(wanted, abs=1e-3) and greedy == wanted_greedy
    for mine, theirs in zip(served["samples"]["write"], own["samples"]["write"], strict=True):
        assert mine["filtered_resps"] == theirs["filtered_resps"]
