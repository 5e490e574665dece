import pytest
import torch

from cadre.errors import UsageError
from cadre.infer.chat import Conversation
from cadre.infer.sampling import Sampling


@pytest.fixture
def talk(model, tokenizer):
    return Conversation(model, tokenizer, Sampling(0.0), max_new_tokens=6, seed=0)


def spoken_ids(monkeypatch, model):
    """Every batch of ids that the model reads from now on."""
    read = []
    hidden = model.hidden

    def noting(ids, cache=None):
        read.append(ids[0].tolist())
        return hidden(ids, cache)

    monkeypatch.setattr(model, "hidden", noting)
    return read


@torch.inference_mode()
def greedy(model, ids, count):
    ids = list(ids)
    for _ in range(count):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids[-count:]


def test_a_turn_continues_the_whole_transcript(model, tokenizer, talk):
    """The second answer must be what the model says after everything before it, read anew."""
    first, second = "Who answered?", "And then?"
    list(talk.reply(first))
    said = greedy(model, tokenizer.encode(first + "\n").ids, 6)
    assert "\n" not in tokenizer.decode(said).strip()  # else the answer is shorter and this test another
    transcript = tokenizer.encode(first + "\n").ids + said + tokenizer.encode("\n" + second + "\n").ids
    answer = tokenizer.decode(greedy(model, transcript, 6))
    assert "".join(talk.reply(second)) == answer.lstrip().partition("\n")[0].rstrip("\ufffd")


def test_a_turn_costs_its_own_tokens(model, tokenizer, talk, monkeypatch):
    list(talk.reply("The people of the union " * 3))
    read = spoken_ids(monkeypatch, model)
    list(talk.reply("yes"))
    longest = max(len(ids) for ids in read)
    assert longest <= len(tokenizer.encode("\nyes\n").ids) + 1  # and the last token of the answer before


def test_an_answer_is_one_line_and_blank_lines_are_none(model, tokenizer, talk, monkeypatch):
    script = iter(tokenizer.encode("\n\n  yes, we\ndo.").ids)
    monkeypatch.setattr(talk.decoder, "stream", lambda *_: script)
    assert "".join(talk.reply("Will you?")) == "yes, we"
    assert not talk.line_open
    assert next(script, None) is not None


def test_stopping_to_listen_leaves_the_conversation_whole(model, tokenizer, talk):
    answer = talk.reply("Who answered?")
    next(answer)
    answer.close()
    heard = talk.decoder.length
    assert talk.line_open
    list(talk.reply("Go on"))
    assert talk.decoder.length > heard


def test_reset_forgets(talk):
    first = list(talk.reply("Who answered?"))
    list(talk.reply("And then?"))
    talk.reset()
    assert list(talk.reply("Who answered?")) == first


def test_a_line_without_room_for_an_answer_is_refused_and_forgotten(talk):
    with pytest.raises(UsageError, match="of the model's context of 64 are left: /reset"):
        talk.reply("the union " * 40)
    assert talk.decoder.length == 0
    assert list(talk.reply("yes"))
