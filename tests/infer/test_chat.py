import pytest
import torch

from cadre.errors import UsageError
from cadre.hub.template import CHAT_TEMPLATE, ChatTemplate
from cadre.infer.chat import Conversation, transcript
from cadre.infer.sampling import Sampling


@pytest.fixture
def talk(model, tokenizer):
    return Conversation(model, tokenizer, Sampling(0.0), max_new_tokens=6, seed=0)


def tokens_read(monkeypatch, talk):
    """How many tokens each pass reads from now on."""
    read = []
    hidden = talk.engine.runner.hidden

    def noting(batch):
        read.append(len(batch.ids_T))
        return hidden(batch)

    monkeypatch.setattr(talk.engine.runner, "hidden", noting)
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


def test_a_turn_costs_its_own_tokens(tokenizer, talk, monkeypatch):
    list(talk.reply("The people of the union " * 3))
    read = tokens_read(monkeypatch, talk)
    list(talk.reply("yes"))
    assert len(talk.ids) > 40
    assert max(read) <= len(tokenizer.encode("\nyes\n").ids) + talk.engine.pool.page_size


def test_an_answer_is_one_line_and_blank_lines_are_none(tokenizer, talk, monkeypatch):
    script = iter(tokenizer.encode("\n\n  yes, we\ndo.").ids)
    monkeypatch.setattr(talk, "_tokens", lambda: script)
    assert "".join(talk.reply("Will you?")) == "yes, we"
    assert not talk.line_open
    assert next(script, None) is not None


def test_stopping_to_listen_leaves_the_conversation_whole(model, tokenizer, talk):
    answer = talk.reply("Who answered?")
    next(answer)
    answer.close()
    heard = list(talk.ids)
    assert talk.line_open
    said = "".join(talk.reply("Go on"))
    transcript = heard + tokenizer.encode("\nGo on\n").ids
    assert said == tokenizer.decode(greedy(model, transcript, 6)).lstrip().partition("\n")[0].rstrip("\ufffd")


@pytest.mark.parametrize("moment", ["the forward pass", "keeping the book", "giving out"])
def test_an_interruption_loses_no_more_than_the_token_in_work(model, tokenizer, talk, monkeypatch, moment):
    talk.engine.runner.native = None
    target, name = {
        "the forward pass": (model.layers[1].mlp, "forward"),
        "keeping the book": (talk.engine.scheduler, "advance"),
        "giving out": (talk.engine, "_tell"),
    }[moment]
    whole = list(talk.reply("Who answered? " * 4))
    talk.reset()
    answer = talk.reply("Who answered? " * 4)
    heard = [next(answer), next(answer)]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(target, name, interrupt)
        list(answer)
    assert heard == whole[:2]
    transcript = talk.ids + tokenizer.encode("\nGo on\n").ids
    said = "".join(talk.reply("Go on"))
    assert said == tokenizer.decode(greedy(model, transcript, 6)).lstrip().partition("\n")[0].rstrip("\ufffd")
    talk.engine.clear()
    talk.engine.pool.check([])


def interrupt(*_, **__):
    raise KeyboardInterrupt


def test_answers_of_one_seed_draw_their_own_numbers(model, tokenizer):
    def answers(seed):
        talk = Conversation(model, tokenizer, Sampling(3.0), max_new_tokens=6, seed=seed)
        told = []
        for _ in range(3):
            talk.reset()  # the same transcript each time
            told.append("".join(talk.reply("yes")))
        return told

    assert answers(1) == answers(1) != answers(2)
    assert len(set(answers(1))) == 3


def test_reset_forgets(talk):
    first = list(talk.reply("Who answered?"))
    list(talk.reply("And then?"))
    talk.reset()
    assert list(talk.reply("Who answered?")) == first


def test_a_line_without_room_for_an_answer_is_refused_and_forgotten(talk):
    with pytest.raises(UsageError, match="of the model's context of 64 are left: /reset"):
        talk.reply("the union " * 40)
    assert talk.ids == []
    assert list(talk.reply("yes"))


TEMPLATE = ChatTemplate(CHAT_TEMPLATE, {"eos_token": "<|eos|>"})


def test_messages_are_written_by_the_template(model, tokenizer):
    """The second answer is the model's to the whole conversation, the first answer in it."""
    talk = Conversation(model, tokenizer, Sampling(0.0), max_new_tokens=6, render=TEMPLATE.render)
    first = "".join(talk.reply("Who answered?"))
    second = "".join(talk.reply("And then?"))
    messages = [
        {"role": "user", "content": "Who answered?"},
        {"role": "assistant", "content": first},
        {"role": "user", "content": "And then?"},
    ]
    ids = tokenizer.encode(TEMPLATE.render(messages), add_special_tokens=False).ids
    assert tokenizer.token_to_id("<|assistant|>") == ids[-1]
    answer = greedy(model, ids, 6)
    said = answer[: answer.index(1)] if 1 in answer else answer
    assert second == tokenizer.decode(said).rstrip("\ufffd")
    assert talk.messages == [*messages, {"role": "assistant", "content": second}]


def test_an_answer_cut_short_is_what_was_said(model, tokenizer):
    talk = Conversation(model, tokenizer, Sampling(0.0), max_new_tokens=6, render=TEMPLATE.render)
    answer = talk.reply("Who answered? " * 2)
    heard = next(answer)
    answer.close()
    assert [message["content"] for message in talk.messages] == ["Who answered? " * 2, heard]
    talk.reply("unheard").close()  # nothing of it was begun
    assert len(talk.messages) == 2
    talk.reset()
    assert talk.messages == []


def test_a_conversation_beyond_the_context_and_one_that_the_template_refuses(model, tokenizer):
    talk = Conversation(model, tokenizer, Sampling(0.0), max_new_tokens=6, render=TEMPLATE.render)
    with pytest.raises(UsageError, match="and the model's context is 64: /reset starts anew"):
        talk.reply("the union " * 40)
    assert talk.messages == []
    talk = Conversation(model, tokenizer, Sampling(0.0), 6, render=ChatTemplate("{{ raise_exception('no') }}", {}).render)
    with pytest.raises(UsageError, match="refuses these messages: no"):
        talk.reply("yes")


def test_a_transcript_has_a_line_for_each_message():
    assert transcript([{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]) == "hi\nyes\n"
