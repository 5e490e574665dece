"""What is minimised, against the same written out with full logits."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from cadre.model.transformer import Transformer
from cadre.train.balance import Balance, sequence_balance_loss
from cadre.train.objective import losses
from tests.shapes import small

WEIGHTS = dict(mtp_weight=0.3, sequence_weight=0.05)


def build(kind: str = "deepseek_v3", **changes) -> Transformer:
    return Transformer(small(kind, initializer_range=0.2, **changes)).initialize(1).train()


def random_ids(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(31, (rows, columns), generator=torch.Generator().manual_seed(seed))


def random_documents(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    ends = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) < 0.25
    return ends.cumsum(1) + 100 * torch.arange(rows)[:, None]


def written_out(model: Transformer, ids: torch.Tensor, documents: torch.Tensor | None, length: int):
    """Nats of each head by V3 report, equations 21 to 24: position t of module k predicts token t + k + 1 (k from 1)."""
    inside = None if documents is None else documents[:, :length]
    hidden = model.hidden(ids[:, :length], document_BT=inside)
    stages = [hidden]
    for k in range(1, len(model.mtp) + 1):
        following = torch.stack([ids[:, t + k] for t in range(length)], dim=1)
        stages.append(model.further_hidden(stages[-1], following, k - 1, document_BT=inside))
    result = []
    for k, stage in enumerate(stages):
        log_p = F.log_softmax(model.lm_head(stage), dim=-1)
        total = torch.zeros(())
        for b in range(len(ids)):
            for t in range(length):
                within = k == 0 or documents is None or documents[b, t] == documents[b, t + k + 1]
                if within:
                    total = total - log_p[b, t, ids[b, t + k + 1]]
        result.append(total / (len(ids) * length))
    return result


def gradients(model: Transformer, total: torch.Tensor) -> dict[str, torch.Tensor]:
    named = dict(model.named_parameters())
    found = torch.autograd.grad(total, list(named.values()), allow_unused=True)
    return {name: torch.zeros(()) if g is None else g for name, g in zip(named, found, strict=True)}


@settings(max_examples=8)
@given(st.integers(0, 3), st.booleans(), st.integers(0, 99))
def test_each_module_predicts_exactly_one_further(modules, separate, seed):
    model, length = build(num_nextn_predict_layers=modules), 6
    ids = random_ids(2, length + 1 + modules, seed)
    documents = random_documents(*ids.shape, seed) if separate else None
    balance = Balance(model, speed=0)
    got = losses(model, ids, documents, balance, **WEIGHTS)
    main, *further = written_out(model, ids, documents, length)
    torch.testing.assert_close(got.main, main.detach())
    torch.testing.assert_close(got.further, [loss.detach() for loss in further])
    even = torch.stack([sequence_balance_loss(routes, 2) for routes in balance.read()])
    torch.testing.assert_close(got.balance, even.mean().detach())
    total = main + WEIGHTS["sequence_weight"] * even.sum()
    if modules:
        total = total + WEIGHTS["mtp_weight"] * torch.stack(further).mean()
    expected = gradients(model, total)
    for name, gradient in gradients(model, got.total).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6, msg=name)


def test_modules_neither_look_nor_reach_across_documents():
    model, length = build(num_nextn_predict_layers=2), 8
    ids = random_ids(1, length + 3)
    documents = torch.tensor([[0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1]])
    balance = Balance(model, speed=0)
    before = losses(model, ids, documents, balance, **WEIGHTS)
    assert all(loss > 0 for loss in before.further)
    # Module 1 reads tokens up to t + 1 and predicts t + 2. Within the first document of five, t = 2 is its last.
    torch.manual_seed(0)
    embedded = []
    original = model.embed
    model.embed = lambda ids: embedded.append(original(ids).detach().requires_grad_()) or embedded[-1]
    hidden = model.hidden(ids[:, :length], document_BT=documents[:, :length])
    stage = model.further_hidden(hidden, ids[:, 1 : length + 1], 0, document_BT=documents[:, :length])
    first, second = torch.autograd.grad(stage[0, 2].sum(), embedded)
    assert first[0, 3:].abs().sum() == 0 and first[0, :3].abs().sum() > 0
    assert second[0, 3:].abs().sum() == 0 and second[0, 2].abs().sum() > 0
    from_second, _ = torch.autograd.grad(
        model.further_hidden(model.hidden(ids[:, :length], document_BT=documents[:, :length]), ids[:, 1 : length + 1], 0,
                             document_BT=documents[:, :length])[0, 6].sum(), embedded[2:])  # fmt: skip
    assert from_second[0, :5].abs().sum() == 0 and from_second[0, 5:].abs().sum() > 0


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("micro", [1, 2, 3])
def test_micro_batches_add_up_to_their_batch(micro, separate):
    model, batch = build(num_nextn_predict_layers=2), 6
    ids = random_ids(batch, 12)
    documents = random_documents(*ids.shape) if separate else None
    balance = Balance(model, speed=0.1)
    whole = losses(model, ids, documents, balance, **WEIGHTS)
    expected, loads = gradients(model, whole.total), [load.clone() for load in balance.load_LE]
    balance.reset()
    model.zero_grad()
    total = 0.0
    for first in range(0, batch, micro):
        rows = slice(first, first + micro)
        part = losses(model, ids[rows], None if documents is None else documents[rows], balance, **WEIGHTS)
        (part.total * (micro / batch)).backward()
        total += float(part.total.detach()) * micro / batch
    assert total == pytest.approx(float(whole.total.detach()), abs=1e-5)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-5, atol=1e-5, msg=name)
    assert all(torch.equal(a, b) for a, b in zip(balance.load_LE, loads, strict=True))


def test_without_weight_the_modules_are_only_watched():
    model = build(num_nextn_predict_layers=1)
    ids = random_ids(2, 8)
    got = losses(model, ids, None, Balance(model, speed=0), mtp_weight=0, sequence_weight=0)
    assert got.balance is None
    assert torch.equal(got.total.detach(), got.main) and got.further[0] > 0
    found = gradients(model, got.total)
    assert all((found[name] == 0).all() for name in found if name.startswith("mtp."))


@pytest.mark.parametrize("kind", ["llama", "deepseek_v2", "glm4_moe"])
def test_every_family_has_its_losses(kind):
    model = build(kind)
    ids = random_ids(2, 8)
    got = losses(model, ids, None, Balance(model, speed=0), **WEIGHTS)
    torch.testing.assert_close(got.main, written_out(model, ids, None, 7)[0].detach())
    assert (got.balance is None) == (kind == "llama") and got.further == []


def test_a_share_of_the_sequences_trains_the_modules():
    """The modules' loss is that of the first sequences alone; the main loss stays that of all."""
    model, ids = build(num_nextn_predict_layers=2), random_ids(4, 9)
    balance = Balance(model, 0.0)
    everything = losses(model, ids, None, balance, **WEIGHTS)
    some = losses(model, ids, None, balance, mtp_rows=2, mtp_share=0.5, **WEIGHTS)
    first = losses(model, ids[:2], None, balance, **WEIGHTS)
    torch.testing.assert_close(some.main, everything.main)
    torch.testing.assert_close(torch.stack(some.further), torch.stack(first.further))
    assert not torch.allclose(torch.stack(some.further), torch.stack(everything.further))


@settings(max_examples=6)
@given(st.sampled_from([1, 2, 4]), st.integers(1, 4))
def test_micro_batches_add_up_where_a_share_trains_the_modules(micro, rows):
    model, ids = build(num_nextn_predict_layers=1), random_ids(4, 8)
    balance, weights = Balance(model, 0.0), dict(mtp_weight=0.3, sequence_weight=0.0)
    whole = losses(model, ids, None, balance, mtp_rows=rows, mtp_share=rows / 4, **weights)
    wanted = gradients(model, whole.total)
    parts = []
    for first in range(0, 4, micro):
        here = min(max(rows - first, 0), micro)
        part = losses(model, ids[first : first + micro], None, balance, mtp_rows=here, mtp_share=rows / 4, **weights)
        parts.append(gradients(model, part.total * (micro / 4)))
    for name, grad in wanted.items():
        torch.testing.assert_close(sum(part[name] for part in parts), grad, atol=1e-6, rtol=1e-4)
