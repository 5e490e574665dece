"""GGUF files: what is in them, read by the gguf package. llama.cpp itself reads them in tests/slow."""

import json
import sys

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers

from cadre.data.tokenizer import train_tokenizer
from cadre.errors import RunError, UsageError
from cadre.hub.gguf import write_gguf
from cadre.hub.save import save
from cadre.model.rope import RotaryTable
from cadre.model.rope_parameters import RopeParameters

gguf = pytest.importorskip("gguf")

TEXT = "We the people of the United States, in order to form a more perfect union, don't wait: 1789."


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([TEXT] * 3, 300)


def read(path):
    """Keys and tensors (as torch, in torch's order of dimensions) of a GGUF file."""
    reader = gguf.GGUFReader(path)
    keys = {name: field.contents() for name, field in reader.fields.items()}
    tensors = {t.name: torch.tensor(gguf.quants.dequantize(t.data, t.tensor_type)) for t in reader.tensors}
    return keys, tensors, {t.name: t.tensor_type.name for t in reader.tensors}


@pytest.fixture
def written(build, tokenizer, tmp_path):
    def write(kind="deepseek_v3", dtype=None, stored=None, **changes):
        model = build(kind, **{"vocab_size": 310, "bos_token_id": 0, "eos_token_id": 1, **changes})
        save(model, tmp_path / "model", tokenizer, dtype=stored)
        write_gguf(tmp_path / "model", tmp_path / "model.gguf", dtype)
        return model, *read(tmp_path / "model.gguf")

    return write


@pytest.mark.parametrize("part", ["weight", "bias"])
def test_rotary_pairs_side_by_side(written, part):
    """Scores of queries and keys turned in adjacent pairs, as llama.cpp turns them, are those of pairs half a head apart."""
    model, _, tensors, _ = written("llama", attention_bias=True)
    attention, size = model.layers[0].self_attn, model.config.head_dim
    query, key = (getattr(layer, part).detach() for layer in (attention.q_proj, attention.k_proj))
    angle = torch.rand(size // 2)

    def halves(rows):
        a, b = rows.unflatten(0, (-1, 2, size // 2)).unbind(1)
        turn = [value.reshape(-1, *[1] * (a.ndim - 2)) for value in (angle.cos(), angle.sin())]
        return torch.cat((a * turn[0] - b * turn[1], a * turn[1] + b * turn[0]), 1)

    def pairs(rows):
        a, b = rows.unflatten(0, (-1, size // 2, 2)).unbind(2)
        turn = [value.reshape(-1, *[1] * (a.ndim - 2)) for value in (angle.cos(), angle.sin())]
        return torch.stack((a * turn[0] - b * turn[1], a * turn[1] + b * turn[0]), 2).flatten(1, 2)

    ours = torch.einsum("hd...,gd...->hg...", halves(query), key.unflatten(0, (-1, size)))
    query, key = (tensors[f"blk.0.attn_{name}.{part}"] for name in "qk")
    theirs = torch.einsum("hd...,gd...->hg...", pairs(query), key.unflatten(0, (-1, size)))
    assert torch.allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("q_lora_rank", [None, 24])
def test_latent_attention(written, q_lora_rank):
    """What llama.cpp computes of the tensors, absorbed: scores of a query with latent and rotary key, values after the sum."""
    model, keys, tensors, _ = written(q_lora_rank=q_lora_rank, rms_norm_eps=1e-6)
    attention, config = model.layers[0].self_attn, model.config
    heads, nope, rope, rank = 4, config.qk_nope_head_dim, config.qk_rope_head_dim, config.kv_lora_rank
    x = torch.randn(1, 10, config.hidden_size)
    rotation = RotaryTable(config)(10, x.device)

    def norm(value, weight):
        return (
            value * (value.pow(2).mean(-1, keepdim=True) + keys["deepseek2.attention.layer_norm_rms_epsilon"]).rsqrt() * weight
        )

    def turn(value):
        pairs = torch.view_as_complex(value.unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * (rotation if value.ndim == 2 else rotation[:, None])).flatten(-2)

    block = {name.removeprefix("blk.0."): tensor for name, tensor in tensors.items() if name.startswith("blk.0.")}
    query = x[0]
    if q_lora_rank:
        query = norm(query @ block["attn_q_a.weight"].T, block["attn_q_a_norm.weight"]) @ block["attn_q_b.weight"].T
    else:
        query = query @ block["attn_q.weight"].T
    query_nope, query_rope = query.unflatten(-1, (heads, -1)).split([nope, rope], -1)
    latent, key_rope = (x[0] @ block["attn_kv_a_mqa.weight"].T).split([rank, rope], -1)
    latent = norm(latent, block["attn_kv_a_norm.weight"])
    absorbed = torch.einsum("thn,hrn->thr", query_nope, block["attn_k_b.weight"])
    score = torch.einsum("thr,sr->hts", absorbed, latent) + torch.einsum("thr,sr->hts", turn(query_rope), turn(key_rope))
    score = score / keys["deepseek2.attention.key_length_mla"] ** 0.5
    score = score.masked_fill(torch.ones(10, 10).triu(1).bool(), float("-inf"))
    summed = torch.einsum("hts,sr->thr", score.softmax(-1), latent)
    value = torch.einsum("thr,hvr->thv", summed, block["attn_v_b.weight"]).flatten(1) @ block["attn_output.weight"].T
    with torch.no_grad():
        assert (value - attention(x, rotation)[0]).abs().max() < 1e-4


def test_experts(written):
    model, keys, tensors, kinds = written(n_group=2, topk_group=1)
    mlp = model.layers[1].mlp
    assert torch.equal(
        torch.cat((tensors["blk.1.ffn_gate_exps.weight"], tensors["blk.1.ffn_up_exps.weight"]), 1), mlp.experts.gate_up_proj
    )
    assert torch.equal(tensors["blk.1.ffn_down_exps.weight"], mlp.experts.down_proj)
    assert torch.equal(tensors["blk.1.ffn_gate_inp.weight"], mlp.gate.weight)
    assert torch.equal(tensors["blk.1.exp_probs_b.bias"], mlp.gate.e_score_correction_bias)
    assert torch.equal(tensors["blk.1.ffn_down_shexp.weight"], mlp.shared_experts.down_proj.weight)
    wanted = {
        **dict(block_count=2, vocab_size=310, leading_dense_block_count=1, expert_count=6, expert_used_count=2),
        **dict(expert_shared_count=1, expert_feed_forward_length=24, expert_group_count=2, expert_group_used_count=1),
        **dict(expert_weights_scale=1.5, expert_weights_norm=True, expert_gating_func=2),
    }
    assert {name: keys[f"deepseek2.{name}"] for name in wanted} == wanted
    assert set(kinds.values()) == {"F32"}


def test_modules_are_left_out(written):
    model, keys, tensors, _ = written(num_nextn_predict_layers=1)
    assert keys["deepseek2.block_count"] == 2
    assert not [name for name in tensors if name.startswith("blk.2.")]
    assert torch.equal(tensors["output.weight"], model.lm_head.weight)


def test_tied_head(written):
    _, _, tensors, _ = written(tie_word_embeddings=True)
    assert "output.weight" not in tensors and "token_embd.weight" in tensors


@pytest.mark.parametrize("stored, kind", [(torch.float32, "F32"), (torch.bfloat16, "BF16"), (torch.float16, "F16")])
def test_dtype_is_kept(written, stored, kind):
    model, _, tensors, kinds = written(stored=stored)
    assert kinds["token_embd.weight"] == kind
    assert kinds["blk.1.ffn_gate_inp.weight"] == kinds["output_norm.weight"] == kinds["blk.1.exp_probs_b.bias"] == "F32"
    assert torch.equal(tensors["token_embd.weight"], model.embed_tokens.weight.to(stored).float())


def test_eight_bits(written):
    """Blocks of 32 along a row; other rows stay of 16 bits."""
    model, keys, tensors, kinds = written(dtype="q8_0", hidden_size=64)
    assert kinds["token_embd.weight"] == "Q8_0" and kinds["blk.1.ffn_down_exps.weight"] == "F16"  # rows of 24
    error = tensors["token_embd.weight"] - model.embed_tokens.weight
    block = model.embed_tokens.weight.unflatten(-1, (-1, 32)).abs().amax(-1)
    assert (error.unflatten(-1, (-1, 32)).abs().amax(-1) <= block / 127 * (0.5 + 127 * 2**-11)).all()  # the scale is of 16 bits
    assert keys["general.file_type"] == 7 and keys["general.quantization_version"] == 2


def test_too_large_for_16_bits(build, tmp_path):
    model = build()
    with torch.no_grad():
        model.embed_tokens.weight[3, 3] = 1e5
    save(model, tmp_path / "model")
    with pytest.raises(UsageError, match=r"token_embd\.weight holds numbers too large for f16"):
        write_gguf(tmp_path / "model", tmp_path / "model.gguf", "f16")
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


def test_tokens(written, tokenizer):
    _, keys, _, _ = written()
    tokens = keys["tokenizer.ggml.tokens"]
    assert len(tokens) == 310 == len(keys["tokenizer.ggml.token_type"])
    assert [tokens[number] for number in tokenizer.encode("people").ids] == tokenizer.encode("people").tokens
    kinds = dict(zip(tokens, keys["tokenizer.ggml.token_type"], strict=True))
    assert (kinds["<|eos|>"], kinds["e"], kinds["[PAD309]"]) == (3, 1, 5)
    assert keys["tokenizer.ggml.pre"] == "llama-bpe" and keys["tokenizer.ggml.add_bos_token"] is False
    assert (keys["tokenizer.ggml.bos_token_id"], keys["tokenizer.ggml.eos_token_id"]) == (0, 1)
    assert keys["tokenizer.ggml.merges"][0].count(" ") == 1
    assert "<|assistant|>" in keys["tokenizer.chat_template"]


@pytest.mark.parametrize(
    "kind, changes, name",
    [
        ("deepseek_v3", dict(rope_parameters=dict(rope_type="linear", rope_theta=1e4, factor=2.0)), "rope_type is linear"),
        ("deepseek_v3", dict(attention_bias=True), "attention_bias is True"),
        ("deepseek_v3", dict(n_shared_experts=0), "n_shared_experts is 0"),
        ("glm4_moe", dict(n_shared_experts=0), "n_shared_experts is 0"),
        ("deepseek_v3", dict(rms_norm_eps=1e-3), "rms_norm_eps is 0.001"),
        ("deepseek_v3", dict(num_hidden_layers=27), "num_hidden_layers is 27"),
        (
            "deepseek_v3",
            dict(rope_parameters=dict(rope_type="yarn", rope_theta=1e4, factor=2.0, original_max_position_embeddings=64)),
            "mscale None",
        ),
        ("deepseek_v2", dict(n_group=2, topk_group=1), "n_group is 2"),
        ("glm4_moe", dict(first_k_dense_replace=2), "first_k_dense_replace is 2"),
        ("qwen3_moe", {}, "first_k_dense_replace is 1"),
        ("qwen3_moe", dict(first_k_dense_replace=0, norm_topk_prob=False), "norm_topk_prob is False"),
        ("qwen3", dict(attention_bias=True), "attention_bias is True"),
        ("olmoe", dict(norm_topk_prob=True), "norm_topk_prob is True"),
        ("olmoe", dict(tie_word_embeddings=True), "tie_word_embeddings is True"),
        ("olmoe", {}, "num_key_value_heads is 2"),
        (
            "llama",
            dict(
                rope_parameters=dict(
                    rope_type="yarn", rope_theta=1e4, factor=2.0, original_max_position_embeddings=64, truncate=False
                )
            ),
            "truncate",
        ),
    ],
)
def test_what_llama_cpp_would_compute_differently(build, tmp_path, kind, changes, name):
    save(build(kind, **changes), tmp_path / "model")
    with pytest.raises(UsageError, match=name):
        write_gguf(tmp_path / "model", tmp_path / "model.gguf")
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


MERGES = models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")])


def other_tokenizers():
    unigram = Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0)], 0))
    lower = Tokenizer(MERGES)
    lower.normalizer, lower.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.ByteLevel(add_prefix_space=False)
    spaces = Tokenizer(MERGES)
    spaces.pre_tokenizer = pre_tokenizers.Whitespace()
    prefix = Tokenizer(MERGES)
    prefix.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    digits = Tokenizer(MERGES)
    digits.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    letters = Tokenizer(models.BPE({"a": 0}, []))  # llama.cpp reads no BPE without merges
    letters.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    added = [train_tokenizer([TEXT] * 3, 300) for _ in range(3)]
    for tokenizer, how in zip(added, ("lstrip", "rstrip", "single_word"), strict=True):
        tokenizer.add_tokens([AddedToken("people", **{how: True})])  # it takes spaces along, or is none within a word
    return [unigram, lower, spaces, prefix, digits, letters, Tokenizer(MERGES), *added]


@pytest.mark.parametrize("other", other_tokenizers())
def test_a_tokenizer_that_llama_cpp_would_not_follow(build, tmp_path, other):
    save(build(vocab_size=310), tmp_path / "model", other)
    with pytest.raises(UsageError, match=r"tokenizer.json: treats text in another way"):
        write_gguf(tmp_path / "model", tmp_path / "model.gguf")


def test_the_default_of_several_templates(build, tokenizer, tmp_path):
    save(build(vocab_size=310), tmp_path / "model", tokenizer)
    config = tmp_path / "model" / "tokenizer_config.json"
    named = [{"name": "tools", "template": "T"}, {"name": "default", "template": "D"}]
    config.write_text(json.dumps(json.loads(config.read_text()) | {"chat_template": named}))
    write_gguf(tmp_path / "model", tmp_path / "model.gguf")
    assert read(tmp_path / "model.gguf")[0]["tokenizer.chat_template"] == "D"
    config.write_text("{")
    with pytest.raises(UsageError, match=r"tokenizer_config\.json: cannot be read as JSON"):
        write_gguf(tmp_path / "model", tmp_path / "model.gguf")


@pytest.mark.parametrize("target", ["model/config.json/m.gguf", "x" * 250 + ".gguf"])
def test_no_place_for_a_file(build, tmp_path, target):
    save(build(), tmp_path / "model")
    with pytest.raises(RunError, match="not written"):
        write_gguf(tmp_path / "model", tmp_path / target)


def test_gpt2_splits(build, tmp_path):
    gpt2 = Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")]))
    gpt2.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    save(build(), tmp_path / "model", gpt2)
    write_gguf(tmp_path / "model", tmp_path / "model.gguf")
    assert read(tmp_path / "model.gguf")[0]["tokenizer.ggml.pre"] == "gpt-2"


def test_without_a_tokenizer(build, tmp_path):
    save(build(), tmp_path / "model")
    write_gguf(tmp_path / "model", tmp_path / "model.gguf")
    assert read(tmp_path / "model.gguf")[0]["tokenizer.ggml.model"] == "none"


def test_whole_or_not_at_all(build, tmp_path, monkeypatch):
    save(build(), tmp_path / "model")
    (tmp_path / "model.gguf").write_bytes(b"old")
    written = []

    def break_off(self, tensor):
        written.append(tensor)
        if len(written) > 5:
            raise OSError(28, "No space left on device")
        return original(self, tensor)

    original = gguf.GGUFWriter.write_tensor_data
    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", break_off)
    with pytest.raises(RunError, match="the disk is full"):
        write_gguf(tmp_path / "model", tmp_path / "model.gguf")
    assert (tmp_path / "model.gguf").read_bytes() == b"old"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["model", "model.gguf"]


def test_a_damaged_model(build, tmp_path):
    save(build(), tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"hidden_size": 52}))
    with pytest.raises(UsageError, match="has shape"):
        write_gguf(tmp_path / "model", tmp_path / "model.gguf")
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


def test_one_tensor_at_a_time(build, tmp_path):
    """Each is asked for only when the one before it is written."""
    save(build(num_hidden_layers=4), tmp_path / "model")
    seen = []
    write_gguf(tmp_path / "model", tmp_path / "model.gguf", progress=lambda done, total: seen.append((done, total)))
    assert seen == [(number, len(seen)) for number in range(1, len(seen) + 1)]


def test_library_is_missing(build, tmp_path, monkeypatch):
    save(build(), tmp_path / "model")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UsageError, match="pip install"):
        write_gguf(tmp_path / "model", tmp_path / "model.gguf")


def test_llama3_scaling(build, tmp_path):
    scaling = dict(rope_type="llama3", rope_theta=5000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                   original_max_position_embeddings=32)  # fmt: skip
    model = build("llama", rope_parameters=scaling)
    save(model, tmp_path / "model")
    write_gguf(tmp_path / "model", tmp_path / "model.gguf")
    keys, tensors, _ = read(tmp_path / "model.gguf")
    unscaled = model.config.model_copy(update={"rope_parameters": RopeParameters(rope_theta=5000.0)})
    plain = RotaryTable(unscaled)(2, torch.device("cpu"))[1:]
    scaled = RotaryTable(model.config)(2, torch.device("cpu"))[1:]
    assert torch.allclose(plain.angle() / tensors["rope_freqs.weight"], scaled.angle(), atol=1e-6)
    assert keys["llama.rope.scaling.type"] == "none"
