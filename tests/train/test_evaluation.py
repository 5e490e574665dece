"""Which held-out text a run is scored on."""

import json
import tracemalloc

import pytest

from cadre.data.sources import Document
from cadre.model.scoring import Score
from cadre.train.evaluation import Evaluation, first_tokens
from cadre.train.parallel.group import Parallel


def test_the_least_of_a_text_is_a_letter():
    (first,) = first_tokens([Document("a", "日本語" * 100)], 1, 1.0)
    assert first.text == "日"


def test_the_beginning_of_a_conversation_has_something_of_its_first_answer():
    text = "Be brief. " * 300 + "Why?" + "So. " * 300
    chat = Document("chat", text, answers=((3004, len(text)),))
    for tokens in (1, 500, 5000):
        (first,) = first_tokens([chat], tokens, 1.0)
        assert len(first.text) == min(tokens, len(text)) and first.learned_bytes
    assert first_tokens([chat], 500, 1.0)[0].text == text[2754:3254]
    assert first_tokens([Document("chat", text, answers=())], 500, 1.0)[0].text == text[:500]


def test_the_time_of_an_evaluation_is_that_of_all_that_is_read(lab):
    """Whether or not it is scored: what is left to read is counted so too."""
    chat = [{"role": "user", "content": "Why the people? " * 30}, {"role": "assistant", "content": "So."}]
    (lab.folder / "chats.jsonl").write_text((json.dumps({"messages": chat}) + "\n") * 2 + json.dumps({"text": "Why? " * 500}))
    run = lab.start(
        "run", f"data.source={json.dumps(str(lab.folder / 'chats.jsonl'))}", "data.held_out=0.5", "eval.tokens=100000"
    )
    evaluation = Evaluation(run)
    found = evaluation.on_the_way()
    tokens = found.seconds / (evaluation.seconds_per_token / 2)
    assert tokens == pytest.approx(evaluation.held_out["tokens"], rel=0.2)


def test_the_last_evaluation_slides_by_half_and_those_on_the_way_do_not(lab, monkeypatch):
    strides = []
    monkeypatch.setattr(Parallel, "score", lambda *_, context, stride: strides.append((context, stride)) or Score(1.0, 1, 1))
    evaluation = Evaluation(lab.start("run"))
    evaluation.on_the_way()
    evaluation.last(10**9)
    assert strides == [(16, 16), (16, 8)]


def test_held_out_text_is_never_whole_in_memory(lab, monkeypatch):
    """Every process would hold it: of a large corpus gigabytes, times the processes of a machine."""
    lines = (json.dumps({"text": f"Page {number}. " + "Why? " * 10_000}) for number in range(60))
    (lab.folder / "pages.jsonl").write_text("\n".join(lines))
    pages = json.dumps(str(lab.folder / "pages.jsonl"))
    evaluation = Evaluation(lab.start("run", f"data.source={pages}", "data.held_out=0.9"))
    read = []
    monkeypatch.setattr(
        Parallel, "score", lambda *given, **_: read.append(sum(len(text.text) for text in given[3])) or Score(1.0, 1, 1)
    )
    tracemalloc.start()
    try:
        evaluation.on_the_way()
        evaluation.last(10**9)
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert read[1] == evaluation.held_out["bytes"] > 2_000_000 and most < 1_000_000


@pytest.mark.parametrize("seconds, step, read", [
    (1e-3, 9.0, 3_000), (1.0, 9.0, 200), (1e-9, 9.0, 10_000), (0.0, 0.064, 3_000), (0.0, 0.0, 10_000),
])  # fmt: skip
def test_how_much_the_last_evaluation_reads(lab, seconds, step, read):
    """A tenth of the minutes: at the rate of the evaluation before, or else of a training step."""
    evaluation = Evaluation(lab.start("run", "train.minutes=0.5", "train.steps=100"))
    evaluation.held_out["tokens"] = 10_000
    evaluation.seconds_per_token = seconds
    assert evaluation.most_tokens(step / 64) == pytest.approx(read, abs=1)
