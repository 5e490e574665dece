import math
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models

from cadre.data.sources import Document
from cadre.data.tokenizer import train_tokenizer
from cadre.errors import UsageError
from cadre.hub.tokenizer import EOS
from cadre.model import scoring
from cadre.model.scoring import Score, document_start, score_documents, score_each, token_nats
from cadre.model.transformer import Transformer
from tests.shapes import FAMILIES, small

TEXT = "The naïve café served 你好 and 😀 to 3 guests.\nThen the people of the union answered: yes, we do.\n"
FIRST = 1


def Text(text):
    return Document("text", text)


def lively(family, **changes):
    return Transformer(small(family, initializer_range=0.3, **changes)).initialize(0)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([TEXT * 20], 280)


@pytest.fixture(scope="module")
def model():
    return lively("deepseek_v3", vocab_size=300, eos_token_id=FIRST)


@torch.inference_mode()
def brute_force(model, ids, context, stride):
    """Each token by itself, from the tokens its window shows it."""
    inputs = [FIRST, *ids]
    nats = []
    for place, token in enumerate(ids):
        start = 0
        while place >= start + context:  # the first window that reaches the position
            start += stride
        logits = model(torch.tensor([inputs[start : place + 1]]))[0, -1]
        nats.append(-float(logits.log_softmax(-1)[token]))
    return torch.tensor(nats)


@given(
    family=st.sampled_from(FAMILIES),
    length=st.integers(1, 40),
    context=st.integers(1, 16),
    stride_share=st.floats(0, 1),
    batch=st.integers(1, 4),
)
def test_sliding_equals_brute_force(family, length, context, stride_share, batch):
    model = lively(family)
    ids = torch.randint(model.config.vocab_size, (length,), generator=torch.Generator().manual_seed(length)).tolist()
    stride = max(1, math.ceil(stride_share * context))
    with patch.object(scoring, "_TOGETHER", batch):
        nats = token_nats(model, ids, first=FIRST, context=context, stride=stride)
    torch.testing.assert_close(nats, brute_force(model, ids, context, stride), atol=1e-4, rtol=1e-4)


def test_the_default_stride_is_half_the_context():
    model = lively("llama")
    ids = torch.arange(30)
    nats = token_nats(model, ids, first=FIRST, context=10)
    assert torch.equal(nats, token_nats(model, ids, first=FIRST, context=10, stride=5))
    assert not torch.equal(nats, token_nats(model, ids, first=FIRST, context=10, stride=10))


def test_a_context_that_holds_the_document_is_one_pass():
    model = lively("deepseek_v2")
    ids = torch.randint(31, (20,), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        logits = model(torch.cat((torch.tensor([FIRST]), ids[:-1]))[None])[0]
    expected = torch.nn.functional.cross_entropy(logits, ids, reduction="none")
    torch.testing.assert_close(token_nats(model, ids, first=FIRST, context=64), expected, atol=1e-5, rtol=1e-5)


@given(lengths=st.lists(st.integers(1, 300), min_size=1, max_size=6), batch=st.integers(1, 5))
def test_documents_do_not_touch_each_other(model, tokenizer, lengths, batch):
    documents = [Text((TEXT * 4)[shift : shift + length]) for shift, length in enumerate(lengths)]
    with patch.object(scoring, "_TOGETHER", batch):
        scores = list(score_each(model, tokenizer, documents, context=16))
    for document, score in zip(documents, scores, strict=True):
        ids = tokenizer.encode(document.text).ids
        alone = token_nats(model, ids, first=FIRST, context=16)
        assert math.isclose(score.nats, float(alone.double().sum()), rel_tol=1e-4)
        assert (score.tokens, score.bytes) == (len(ids), len(document.text.encode()))


def test_many_documents_come_back_in_order_and_once(model, tokenizer, monkeypatch):
    """More than one group is tokenised at a time."""
    documents = [Text(TEXT[: 3 + n % 50]) for n in range(60)]
    whole = list(score_each(model, tokenizer, documents, context=32))
    monkeypatch.setattr("cadre.model.scoring._GROUP_CHARACTERS", 200)
    seen = []
    grouped = list(score_each(model, tokenizer, iter(documents), context=32, progress=seen.append))
    assert [(s.tokens, s.bytes) for s in grouped] == [(s.tokens, s.bytes) for s in whole]
    assert all(math.isclose(a.nats, b.nats, rel_tol=1e-4) for a, b in zip(grouped, whole, strict=True))
    assert sum(seen) == sum(s.tokens for s in whole)


def test_logits_of_a_chunk_of_rows_at_a_time_are_all_logits(model, tokenizer, monkeypatch):
    documents = [Text(TEXT * 3)]
    whole = score_documents(model, tokenizer, documents, context=64)
    monkeypatch.setattr("cadre.model.scoring._CHUNK_ELEMENTS", 1)
    assert whole.tokens > 64  # the rows of a chunk
    widest = []
    head = model.lm_head.forward
    monkeypatch.setattr(model.lm_head, "forward", lambda x: widest.append(len(x)) or head(x))
    chunked = score_documents(model, tokenizer, documents, context=64)
    assert max(widest) == 64
    assert math.isclose(chunked.nats, whole.nats, rel_tol=1e-5)


def test_a_uniform_model_scores_the_same_bits_per_token_with_any_tokenizer():
    """Bytes are counted on the text, so bits per byte follow from tokens and vocabulary alone."""
    for vocab_size in (260, 300):
        tokenizer = train_tokenizer([TEXT * 20], vocab_size)
        model = Transformer(small("llama", vocab_size=512, eos_token_id=1)).initialize(0)
        model.lm_head.weight.data.zero_()
        score = score_documents(model, tokenizer, [Text(TEXT), Text("née")], context=32)
        assert score.bytes == len(TEXT.encode()) + 4
        assert math.isclose(score.bits_per_byte, score.tokens * 9 / score.bytes, rel_tol=1e-5)


def test_special_tokens_written_out_are_text(model, tokenizer):
    score = score_documents(model, tokenizer, [Text("a<|eos|>b")], context=16)
    assert score.tokens > 3
    assert not tokenizer.encode_special_tokens


def test_scores_add_up():
    total = Score(3.0, 2, 5) + Score(1.0, 4, 3)
    assert total == Score(4.0, 6, 8)
    assert math.isclose(total.bits_per_byte, 4 / math.log(2) / 8)


def test_a_document_starts_where_training_starts_it(tokenizer):
    from tokenizers import processors

    config = small("llama")
    for ids, start in (
        ({"bos_token_id": 0, "eos_token_id": 1}, 1),
        ({"bos_token_id": 0, "eos_token_id": [2, 3]}, 2),
        ({"bos_token_id": 4}, 4),
    ):
        assert document_start(config.model_copy(update=ids), tokenizer) == start
    with pytest.raises(UsageError, match="eos_token_id or bos_token_id"):
        document_start(config, tokenizer)
    own = train_tokenizer([TEXT], 260)
    own.post_processor = processors.TemplateProcessing(single="<|bos|> $A", special_tokens=[("<|bos|>", 0)])
    assert document_start(config.model_copy(update={"eos_token_id": 1}), own) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"context": 0}, "context is 0; it must be from 1 to 64"),
        ({"context": 65}, "context is 65; it must be from 1 to 64"),
        ({"context": 8, "stride": 0}, "stride is 0; it must be from 1 to the context"),
        ({"context": 8, "stride": 9}, "stride is 9"),
    ],
)
def test_values_out_of_range_are_refused(model, options, message):
    with pytest.raises(UsageError, match=message):
        token_nats(model, [1, 2], first=FIRST, **options)


def test_no_text_is_refused(model, tokenizer):
    for documents in ([], [Text("")]):
        with pytest.raises(UsageError, match="nothing to score"):
            score_documents(model, tokenizer, documents, context=8)


def test_text_that_the_tokenizer_has_no_tokens_for_is_refused(model):
    words = Tokenizer(models.WordLevel({"one": 3, EOS: 1}))  # and no token for the unknown
    words.add_special_tokens([EOS])
    with pytest.raises(UsageError, match=r"^the tokenizer cannot encode the text"):
        score_documents(model, words, [Text("two")], context=8)


def test_training_after_scoring():
    fresh = lively("deepseek_v3")
    token_nats(fresh, [3, 4, 5], first=FIRST, context=8)
    fresh.train()(torch.tensor([[3, 4, 5]])).sum().backward()
    assert fresh.embed_tokens.weight.grad is not None


def test_of_a_conversation_the_answers_count(model, tokenizer):
    """Each token of an answer after all that was said before it, special tokens read as such."""
    text = "<|user|>Who answered?<|assistant|>we do<|eos|><|user|>And then?<|assistant|>yes, née<|eos|>"
    spans = [(text.index(said), text.index(said) + len(said)) for said in ("we do<|eos|>", "yes, née<|eos|>")]
    chat = Document("chat", text, answers=tuple(spans))
    encoding = tokenizer.encode(text, add_special_tokens=False)
    counted = [any(first <= start < last for first, last in spans) for start, _ in encoding.offsets]
    nats = token_nats(model, encoding.ids, first=FIRST, context=16)
    wanted = Score(
        float(nats.double()[torch.tensor(counted)].sum()), sum(counted), len("we do<|eos|>") + len("yes, née<|eos|>") + 1
    )
    assert encoding.ids.count(FIRST) == 2
    plain = Text(TEXT)
    (one,), (two,) = (list(score_each(model, tokenizer, [document], context=16)) for document in (chat, plain))
    assert (one.tokens, one.bytes) == (wanted.tokens, wanted.bytes)
    assert one.nats == pytest.approx(wanted.nats, rel=1e-5)
    begun = Document("chat", EOS + text, answers=tuple((first + len(EOS), last + len(EOS)) for first, last in spans))
    (again,) = score_each(model, tokenizer, [begun], context=16)  # the template writes itself what a document starts from
    assert (again.tokens, again.bytes, again.nats) == (one.tokens, one.bytes, one.nats)
    both = list(score_each(model, tokenizer, [plain, chat, plain], context=16))
    assert [score.tokens for score in both] == [two.tokens, one.tokens, two.tokens]
    assert both[1].nats == pytest.approx(one.nats, rel=1e-5)
