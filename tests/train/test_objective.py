"""What is minimised, against the same written out with full logits."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cadre.model.transformer import Transformer
from cadre.train.balance import Balance
from cadre.train.balance_losses import SequenceLoss
from cadre.train.objective import MicroBatch, collect_loads, losses
from cadre.train.recipe import BalanceSection
from tests.shapes import FAMILIES, SPARSE, small

MTP_WEIGHT, SEQUENCE_WEIGHT = 0.3, 0.05


def balancing(model: Transformer, **changes) -> Balance:
    return Balance(model, BalanceSection(**{"bias_speed": 0.1, "sequence_weight": SEQUENCE_WEIGHT, **changes}))


def build(kind: str = "deepseek_v3", **changes) -> Transformer:
    return Transformer(small(kind, initializer_range=0.2, **changes)).initialize(1).train()


def random_ids(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(31, (rows, columns), generator=torch.Generator().manual_seed(seed))


def random_documents(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    ends = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) < 0.25
    return ends.cumsum(1) + 100 * torch.arange(rows)[:, None]


def written_out(model: Transformer, ids: torch.Tensor, documents: torch.Tensor | None, length: int):
    """Nats of each head by V3 report, equations 21 to 24: position t of module k predicts token t + k + 1 (k from 1), if what
    stands before that is of its document: the token between two, which counts to the second, is the first's to predict."""
    inside = None if documents is None else documents[:, :length]
    hidden = model.hidden(ids[:, :length], document_BT=inside)
    stages = [hidden]
    for k in range(1, len(model.mtp) + 1):
        following = torch.stack([ids[:, t + k] for t in range(length)], dim=1)
        stages.append(model.mtp_hidden(stages[-1], following, k - 1, document_BT=inside))
    result = []
    for k, stage in enumerate(stages):
        log_p = F.log_softmax(model.lm_head(stage), dim=-1)
        total = torch.zeros(())
        for b in range(len(ids)):
            for t in range(length):
                within = k == 0 or documents is None or documents[b, t] == documents[b, t + k]
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
    balance = balancing(model)
    got = losses(model, MicroBatch(ids, documents), balance, mtp_weight=MTP_WEIGHT)
    balance.record()
    main, *mtp = written_out(model, ids, documents, length)
    torch.testing.assert_close(got.main, main.detach())
    torch.testing.assert_close(got.mtp, [loss.detach() for loss in mtp])
    even = torch.stack([SequenceLoss(1.0)(recorded) for recorded in balance.recorded(length)])
    assert list(got.balance) == ["balance_loss"]
    torch.testing.assert_close(got.balance["balance_loss"], even.mean().detach())
    total = main + SEQUENCE_WEIGHT * even.sum()
    if modules:
        total = total + MTP_WEIGHT * torch.stack(mtp).mean()
    expected = gradients(model, total)
    for name, gradient in gradients(model, got.total).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6, msg=name)


def test_modules_learn_where_a_document_ends():
    """Token 4 lies between two documents and counts to the second: module 1 predicts it from position 2 of the first, and
    nothing from position 3, whose target is the second's first word."""
    model, ids = build(num_nextn_predict_layers=1), random_ids(1, 10)
    documents = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1, 1, 1]])
    stage = model.mtp_hidden(
        model.hidden(ids[:, :8], document_BT=documents[:, :8]), ids[:, 1:9], 0, document_BT=documents[:, :8]
    )
    nats = -F.log_softmax(model.lm_head(stage), dim=-1)[0, torch.arange(8), ids[0, 2:]]
    got = losses(model, MicroBatch(ids, documents), balancing(model), mtp_weight=MTP_WEIGHT).mtp[0]
    torch.testing.assert_close(got, (nats.sum() - nats[3]).detach() / 8)


def test_modules_neither_look_nor_reach_across_documents():
    model, length = build(num_nextn_predict_layers=2), 8
    ids = random_ids(1, length + 3)
    documents = torch.tensor([[0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1]])
    before = losses(model, MicroBatch(ids, documents), balancing(model), mtp_weight=MTP_WEIGHT)
    assert all(loss > 0 for loss in before.mtp)
    # Module 1 reads tokens up to t + 1 and predicts t + 2. Within the first document of five, t = 2 is its last.
    torch.manual_seed(0)
    embedded = []
    original = model.embed
    model.embed = lambda ids: embedded.append(original(ids).detach().requires_grad_()) or embedded[-1]
    hidden = model.hidden(ids[:, :length], document_BT=documents[:, :length])
    stage = model.mtp_hidden(hidden, ids[:, 1 : length + 1], 0, document_BT=documents[:, :length])
    first, second = torch.autograd.grad(stage[0, 2].sum(), embedded)
    assert first[0, 3:].abs().sum() == 0 and first[0, :3].abs().sum() > 0
    assert second[0, 3:].abs().sum() == 0 and second[0, 2].abs().sum() > 0
    from_second, _ = torch.autograd.grad(
        model.mtp_hidden(model.hidden(ids[:, :length], document_BT=documents[:, :length]), ids[:, 1 : length + 1], 0,
                             document_BT=documents[:, :length])[0, 6].sum(), embedded[2:])  # fmt: skip
    assert from_second[0, :5].abs().sum() == 0 and from_second[0, 5:].abs().sum() > 0


# Those that ask the same of a batch however it is cut.
EVERY = dict(sequence_weight=0.05, global_weight=0.04, z_weight=0.03)


@settings(max_examples=8)
@example("deepseek_v3", 4, 16, True, "sign", 0)
@example("deepseek_v3", 4, 7, False, "proportional", 1)
@example("deepseek_v2", 1, 3, False, "sign", 2)
@given(st.sampled_from(["deepseek_v3", "deepseek_v2"]), st.sampled_from([1, 2, 4, 8]), st.integers(1, 16), st.booleans(),
       st.sampled_from(["sign", "proportional"]), st.integers(0, 99))  # fmt: skip
def test_micro_batches_add_up_to_their_batch(kind, micro, rows, separate, rule, seed):
    """One batch of 16 and its micro-batches: losses, loads, gradients and bias steps, the modules trained on `rows`."""
    ids = random_ids(16, 9, seed)
    documents = random_documents(*ids.shape, seed) if separate else None
    results = []
    for size in (16, micro):
        model = build(kind, num_nextn_predict_layers=2, n_routed_experts=6, n_group=2, topk_group=1)
        balance = balancing(model, bias_update=rule, **EVERY)
        balance.reset()
        parts = [(ids[i : i + size], None if documents is None else documents[i : i + size], min(max(rows - i, 0), size))
                 for i in range(0, 16, size)]  # fmt: skip
        for part, inside, here in parts if size < 16 else []:
            collect_loads(model, MicroBatch(part, inside, here), balance)
        sums = {}
        for part, inside, here in parts:
            got = losses(model, MicroBatch(part, inside, here), balance, mtp_weight=MTP_WEIGHT, mtp_share=rows / 16)
            (got.total * (size / 16)).backward()
            named = {"main": got.main, "total": got.total.detach(), **got.balance, **dict(enumerate(got.mtp))}
            sums = {key: sums.get(key, 0) + value * (size / 16) for key, value in named.items()}
        balance.update()
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        biases = {index: layer.gate.e_score_correction_bias for index, layer in balance.layers}
        results.append((sums, gradients, biases, balance.load_LE, balance.metrics()["logit_scale"]))
    whole, cut = results
    assert list(whole[0]) == ["main", "total", "balance_loss", "global_balance_loss", "router_z_loss", 0, 1]
    for key, value in whole[0].items():
        torch.testing.assert_close(cut[0][key], value, rtol=1e-5, atol=1e-5, msg=str(key))
    for name, gradient in whole[1].items():
        torch.testing.assert_close(cut[1][name], gradient, rtol=1e-4, atol=1e-5, msg=name)
    assert torch.equal(cut[3], whole[3]) and whole[3].sum() == (16 + 2 * rows) * 6 * 2
    for index, bias in whole[2].items():
        assert bias is None or (torch.equal(cut[2][index], bias) and bias.abs().max() > 0)
    assert cut[4] == pytest.approx(whole[4], abs=2e-4)


def test_the_batch_wise_loss_is_the_mean_over_what_is_computed_at_once():
    """It alone depends on how a batch is cut: every micro-batch is to be even by itself."""
    model, ids = build(), random_ids(8, 9)
    at_once, by_sequence = balancing(model, batch_weight=1.0, sequence_weight=0), balancing(model)
    whole = float(losses(model, MicroBatch(ids), at_once, mtp_weight=0).balance["batch_balance_loss"])
    cut = [losses(model, MicroBatch(row[None]), at_once, mtp_weight=0).balance["batch_balance_loss"] for row in ids]
    sequences = losses(model, MicroBatch(ids), by_sequence, mtp_weight=0).balance["balance_loss"]
    assert float(sum(cut)) / 8 == pytest.approx(float(sequences), rel=1e-5)
    assert whole < float(sequences)


def test_the_global_loss_of_a_single_micro_batch_needs_no_loads_collected():
    model, ids = build(num_nextn_predict_layers=1), random_ids(4, 9)
    balance = balancing(model, global_weight=0.5, batch_weight=0.5, sequence_weight=0)
    for _ in range(2):
        got = losses(model, MicroBatch(ids), balance, mtp_weight=0.3).balance
        assert torch.equal(got["global_balance_loss"], got["batch_balance_loss"])
        collect_loads(model, MicroBatch(ids), balance)  # of the same single micro-batch: it changes nothing
    assert balance.load_LE.sum() == 2 * (4 * 7 * 2 * 2)  # those collected beforehand are not counted


def test_a_micro_batch_without_a_sparse_layer_has_the_same_losses_by_name():
    model, ids = build(num_nextn_predict_layers=1, first_k_dense_replace=2), random_ids(2, 8)
    got = losses(model, MicroBatch(ids, mtp_rows=0), balancing(model, **EVERY), mtp_weight=0.3, mtp_share=0.5)
    assert {key: float(value) for key, value in got.balance.items()} == dict.fromkeys(
        ["balance_loss", "global_balance_loss", "router_z_loss"], 0.0
    )


def test_without_weight_the_modules_are_only_watched():
    model = build(num_nextn_predict_layers=1)
    ids = random_ids(2, 8)
    got = losses(model, MicroBatch(ids), balancing(model, sequence_weight=0), mtp_weight=0)
    assert got.balance == {}
    assert torch.equal(got.total.detach(), got.main) and got.mtp[0] > 0
    found = gradients(model, got.total)
    assert all((found[name] == 0).all() for name in found if name.startswith("mtp."))


@pytest.mark.parametrize("kind", FAMILIES)
def test_every_family_has_its_losses(kind):
    model = build(kind)
    ids = random_ids(2, 8)
    got = losses(model, MicroBatch(ids), balancing(model), mtp_weight=MTP_WEIGHT)
    torch.testing.assert_close(got.main, written_out(model, ids, None, 7)[0].detach())
    assert (got.balance == {}) == (kind not in SPARSE) and got.mtp == []


def test_a_share_of_the_sequences_trains_the_modules():
    """The modules' loss is that of the first sequences alone; the main loss stays that of all."""
    model, ids = build(num_nextn_predict_layers=2), random_ids(4, 9)
    balance = balancing(model)
    everything = losses(model, MicroBatch(ids), balance, mtp_weight=MTP_WEIGHT)
    some = losses(model, MicroBatch(ids, mtp_rows=2), balance, mtp_weight=MTP_WEIGHT, mtp_share=0.5)
    first = losses(model, MicroBatch(ids[:2]), balance, mtp_weight=MTP_WEIGHT)
    torch.testing.assert_close(some.main, everything.main)
    torch.testing.assert_close(torch.stack(some.mtp), torch.stack(first.mtp))
    assert not torch.allclose(torch.stack(some.mtp), torch.stack(everything.mtp))


def test_weights_leave_the_mean_over_what_counts():
    """Of the main head; and what counts nothing has no part in any gradient of the head."""
    model, length = build(num_nextn_predict_layers=1), 6
    ids = random_ids(4, length + 2)
    counts = torch.rand(ids.shape, generator=torch.Generator().manual_seed(3)) < 0.4
    targets = counts[:, 1 : length + 1]
    weight = counts.float() * (targets.numel() / targets.sum())
    balance = balancing(model)
    got = losses(model, MicroBatch(ids, weight_BT=weight), balance, mtp_weight=MTP_WEIGHT)
    log_p = F.log_softmax(model.lm_head(model.hidden(ids[:, :length])), dim=-1)
    nats = -log_p.gather(2, ids[:, 1 : length + 1, None])[..., 0]
    torch.testing.assert_close(got.main, nats[targets].mean())
    parts = [MicroBatch(ids[rows], weight_BT=weight[rows]) for rows in (slice(0, 1), slice(1, 4))]
    halves = [losses(model, part, balance, mtp_weight=MTP_WEIGHT) for part in parts]
    torch.testing.assert_close(halves[0].main / 4 + halves[1].main * 3 / 4, got.main)
    torch.testing.assert_close(halves[0].mtp[0] / 4 + halves[1].mtp[0] * 3 / 4, got.mtp[0])
    ahead = counts[:, 2 : length + 2]
    module = model.mtp_hidden(model.hidden(ids[:, :length]), ids[:, 1 : length + 1], 0)
    nats = -F.log_softmax(model.lm_head(module), dim=-1).gather(2, ids[:, 2 : length + 2, None])[..., 0]
    torch.testing.assert_close(got.mtp[0], nats[ahead].sum() / targets.sum())
