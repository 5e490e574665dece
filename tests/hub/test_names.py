import torch
from hypothesis import given, settings
from tests.shapes import configs

from cadre.hub.names import duplicates, fused_pieces, hollow, pieces, skeleton


@settings(max_examples=60, deadline=None)
@given(configs())
def test_pieces_cover_the_model_exactly_once(config):
    model = skeleton(config)
    table = pieces(config, model)
    names = [piece.disk for piece in table]
    assert len(set(names)) == len(names)
    assert not {*duplicates(config), *hollow(config)} & set(names)
    covered = {name: torch.zeros(tensor.shape, dtype=torch.int) for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        del covered["lm_head.weight"]
    for piece in table:
        part = covered[piece.state][piece.index]
        assert tuple(part.shape) == piece.shape
        part += 1
    assert all((count == 1).all() for count in covered.values())


@settings(max_examples=30, deadline=None)
@given(configs())
def test_fused_pieces_are_the_experts_whole(config):
    model = skeleton(config)
    fused = {piece.state: piece for piece in fused_pieces(config, model)}
    split = {piece.state for piece in pieces(config, model) if ".experts." in piece.disk}
    assert fused.keys() == split
    assert all(piece.shape == tuple(model.state_dict()[state].shape) for state, piece in fused.items())


def test_gate_lies_before_up(config):
    table = {piece.disk: piece for piece in pieces(config(), skeleton(config()))}
    gate, up = (table[f"model.layers.1.mlp.experts.4.{part}_proj.weight"] for part in ("gate", "up"))
    assert gate.state == up.state == "layers.1.mlp.experts.gate_up_proj"
    assert (gate.index, up.index) == ((4, slice(0, 24)), (4, slice(24, 48)))
    assert table["model.layers.1.mlp.experts.4.down_proj.weight"].index == (4,)


def test_published_names_of_a_module(config):
    names = {piece.disk for piece in pieces(config(num_nextn_predict_layers=1), skeleton(config(num_nextn_predict_layers=1)))}
    of_module = {name.removeprefix("model.layers.2.") for name in names if name.startswith("model.layers.2.")}
    assert {"enorm.weight", "hnorm.weight", "eh_proj.weight", "shared_head.norm.weight", "input_layernorm.weight",
            "self_attn.kv_b_proj.weight", "mlp.gate.e_score_correction_bias",
            "mlp.experts.0.gate_proj.weight"} <= of_module  # fmt: skip
    assert duplicates(config(num_nextn_predict_layers=1)) == {
        "model.layers.2.embed_tokens.weight": "embed_tokens.weight",
        "model.layers.2.shared_head.head.weight": "lm_head.weight",
    }


def test_tied_head_copies_the_embedding(config):
    tied = duplicates(config(num_nextn_predict_layers=1, tie_word_embeddings=True))
    assert set(tied.values()) == {"embed_tokens.weight"}
