"""GGUF files back to models: what was written is what is read, and what is no such file is refused in a line."""

import json
import shutil

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from cadre.data.tokenizer import train_tokenizer
from cadre.errors import UsageError
from cadre.hub.gguf import write_gguf
from cadre.hub.gguf_read import read_gguf, tokenizer_files
from cadre.hub.gguf_tokenizer import _DEEPSEEK_V3, _QWEN2, tokenizer_keys, tokenizer_of
from cadre.hub.save import save
from cadre.hub.template import CHAT_TEMPLATE
from cadre.hub.tokenizer import LLAMA3_SPLIT, load_tokenizer

gguf = pytest.importorskip("gguf")

TEXT = "We the people of the United States, in order to form a more perfect union, don't wait: 1789.\n\n  Größe 你好 <|eos|>"
YARN = dict(rope_type="yarn", rope_theta=1e4, factor=4.0, original_max_position_embeddings=64, beta_fast=16.0, beta_slow=2.0)


@pytest.mark.parametrize(
    "kind, changes",
    [
        ("deepseek_v3", {}),
        ("deepseek_v3", dict(q_lora_rank=None, n_group=2, topk_group=1, norm_topk_prob=False, tie_word_embeddings=True)),
        ("deepseek_v3", dict(first_k_dense_replace=2)),
        ("deepseek_v3", dict(rope_parameters=dict(**YARN, mscale=0.7, mscale_all_dim=0.7))),
        ("deepseek_v2", dict(n_shared_experts=2)),
        ("glm4_moe", dict(rope_parameters=dict(rope_theta=5e5, partial_rotary_factor=0.5))),
        ("glm4_moe", dict(use_qk_norm=True, attention_bias=True)),
        ("llama", dict(head_dim=16, attention_bias=True)),
        ("llama", dict(tie_word_embeddings=True, rope_parameters=dict(rope_type="linear", rope_theta=1e4, factor=2.0))),
        ("llama", dict(rope_parameters=YARN)),
        ("qwen3_moe", dict(first_k_dense_replace=0, norm_topk_prob=True)),
        ("qwen3_moe", dict(first_k_dense_replace=0, norm_topk_prob=True, rope_parameters=YARN)),
        ("mixtral", dict(head_dim=16)),
        ("olmoe", dict(num_key_value_heads=4)),
        ("qwen2", dict(tie_word_embeddings=True)),
        ("qwen3", dict(rope_parameters=dict(rope_type="linear", rope_theta=1e4, factor=2.0))),
    ],
)
def test_there_and_back(build, tmp_path, kind, changes):
    model = build(kind, rms_norm_eps=2**-17, **changes)
    save(model, tmp_path / "model")
    write_gguf(tmp_path / "model", tmp_path / "model.gguf")
    read = read_gguf(tmp_path / "model.gguf")
    unsaid = {"initializer_range"} | ({"routed_scaling_factor"} if not model.config.has_experts else set())
    assert read.model.config.model_dump(exclude=unsaid) == model.config.model_dump(exclude=unsaid)
    here, there = model.state_dict(), read.model.state_dict()
    assert here.keys() == there.keys() and all(torch.equal(value, there[name]) for name, value in here.items())
    assert read.tokenizer is None and read.chat_template is None


def test_a_share_of_a_head_that_no_quotient_says(build, tmp_path):
    """int(52 * (30 / 52)) is 29."""
    save(build("glm4_moe", head_dim=52, rope_parameters=dict(rope_theta=1e4, partial_rotary_factor=0.58)), tmp_path / "model")
    write_gguf(tmp_path / "model", tmp_path / "model.gguf")
    assert read_gguf(tmp_path / "model.gguf").model.config.rotary_dim == 30


@pytest.mark.parametrize("dtype, kept", [("f32", torch.float32), ("f16", torch.float16), ("bf16", torch.bfloat16)])
def test_dtype_is_kept(build, tmp_path, dtype, kept):
    save(build(), tmp_path / "model")
    write_gguf(tmp_path / "model", tmp_path / "model.gguf", dtype)
    assert read_gguf(tmp_path / "model.gguf").model.lm_head.weight.dtype == kept
    assert read_gguf(tmp_path / "model.gguf", torch.float32).model.lm_head.weight.dtype == torch.float32


def test_fewer_bits(build, tmp_path):
    model = build(hidden_size=64)
    save(model, tmp_path / "model")
    write_gguf(tmp_path / "model", tmp_path / "model.gguf", "q8_0")
    back = read_gguf(tmp_path / "model.gguf").model
    assert back.lm_head.weight.dtype == torch.bfloat16
    assert (back.lm_head.weight.float() - model.lm_head.weight).abs().max() < 0.02 * model.lm_head.weight.abs().max()


def trained(patterns, ignore_merges=False, own=False, digits=False, normalizer=None):
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    splits = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in patterns]
    splits += [pre_tokenizers.Digits(individual_digits=True)] if digits else []
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=own)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=330, initial_alphabet=alphabet, special_tokens=["<|bos|>", "<|eos|>"], show_progress=False
    )
    tokenizer.train_from_iterator([TEXT] * 3, trainer)
    return tokenizer


@pytest.mark.parametrize(
    "tokenizer",
    [
        trained([LLAMA3_SPLIT], ignore_merges=True),
        trained([LLAMA3_SPLIT]),
        trained([], own=True),
        trained(_DEEPSEEK_V3),
        trained([], own=True, digits=True),
        trained([_QWEN2], normalizer=normalizers.NFC()),
    ],
    ids=["llama-bpe", "smaug-bpe", "gpt-2", "deepseek-v3", "smollm", "qwen2"],
)
def test_tokenizers_there_and_back(build, tmp_path, tokenizer, request):
    save(build(vocab_size=340, bos_token_id=0, eos_token_id=1), tmp_path / "model", tokenizer)
    write_gguf(tmp_path / "model", tmp_path / "model.gguf")
    assert gguf.GGUFReader(tmp_path / "model.gguf").fields["tokenizer.ggml.pre"].contents() == request.node.callspec.id
    back = read_gguf(tmp_path / "model.gguf").tokenizer
    for text in (TEXT, TEXT.upper(), "", "a\r\n\t b 12345 ''' 😀 e\u0301"):
        assert back.encode(text).ids == tokenizer.encode(text).ids
        assert back.decode(back.encode(text).ids) == tokenizer.decode(tokenizer.encode(text).ids)
    assert back.get_added_tokens_decoder()[1].special


def test_qwens_own_tokenizer_is_one_of_them(build, tmp_path):
    from transformers import Qwen2Tokenizer

    whole = trained([_QWEN2])
    merges = [tuple(pair) for pair in json.loads(whole.to_str())["model"]["merges"]]
    Qwen2Tokenizer(vocab=whole.get_vocab(), merges=merges).save_pretrained(tmp_path / "theirs")
    keys = tokenizer_keys(load_tokenizer(tmp_path / "theirs"), build("qwen3_moe", vocab_size=340).config, tmp_path)
    assert keys["tokenizer.ggml.pre"] == "qwen2"


def test_what_begins_a_text_and_the_chat_template(build, tmp_path):
    tokenizer = train_tokenizer([TEXT] * 3, 300)
    tokenizer.post_processor = processors.TemplateProcessing(single="<|bos|> $A", special_tokens=[("<|bos|>", 0)])
    save(build(vocab_size=310, bos_token_id=0, eos_token_id=1), tmp_path / "model", tokenizer)
    write_gguf(tmp_path / "model", tmp_path / "model.gguf")
    read = read_gguf(tmp_path / "model.gguf")
    assert read.tokenizer.encode("people").ids == tokenizer.encode("people").ids and read.tokenizer.encode("").ids == [0]
    assert read.chat_template == CHAT_TEMPLATE


@pytest.mark.parametrize("ignore_merges, begins", [(True, [0]), (False, [])], ids=["llama-bpe", "smaug-bpe"])
def test_what_begins_a_text_where_the_file_does_not_say(build, tmp_path, ignore_merges, begins):
    keys = tokenizer_keys(trained([LLAMA3_SPLIT], ignore_merges), build(vocab_size=340, bos_token_id=0).config, tmp_path)
    assert tokenizer_of(keys).encode("").ids == []
    del keys["tokenizer.ggml.add_bos_token"]
    assert tokenizer_of(keys).encode("").ids == begins


def test_a_second_token_that_ends_a_text(build, tmp_path):
    save(build(vocab_size=310, bos_token_id=0, eos_token_id=[1, 3]), tmp_path / "model", train_tokenizer([TEXT] * 3, 300))
    write_gguf(tmp_path / "model", tmp_path / "model.gguf")
    read = read_gguf(tmp_path / "model.gguf")
    assert read.model.config.eos_token_id == [1, 3]
    with tokenizer_files(read) as folder:
        assert json.loads((folder / "tokenizer_config.json").read_text())["eos_token"] == "<|eos|>"


GPT2 = {
    "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2", "tokenizer.ggml.tokens": ["a", "b", "ab"],
    "tokenizer.ggml.token_type": [1, 1, 1], "tokenizer.ggml.merges": ["a b"],
}  # fmt: skip


def changed(build, tmp_path, kind, keys=None, tensors=None, **model):
    """A file of a model with other keys or tensors."""
    save(build(kind, **model), tmp_path / "model")
    write_gguf(tmp_path / "model", tmp_path / "model.gguf")
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    values = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    values |= keys or {}
    writer = gguf.GGUFWriter(tmp_path / "changed.gguf", values["general.architecture"])
    for name, value in values.items():
        if value is not None and name != "general.architecture":
            adds = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
            add = adds.get(type(value), writer.add_array)
            add(name, value)
    held = {tensor.name: tensor.data for tensor in reader.tensors} | (tensors or {})
    for name, value in held.items():
        if value is not None:
            writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tmp_path / "changed.gguf"


@pytest.mark.parametrize(
    "kind, keys, tensors, says",
    [
        ("llama", {"general.architecture": "gpt2"}, {}, "general.architecture is 'gpt2'"),
        ("llama", {"llama.block_count": None}, {}, r"has no llama\.block_count"),
        ("llama", {"llama.expert_count": 8}, {}, r"has no llama\.expert_used_count"),
        ("mixtral", {}, {"blk.0.ffn_gate_exps.weight": None}, r"lacks the tensor blk\.0\.ffn_gate_exps\.weight"),
        ("llama", {}, {"rope_freqs.weight": torch.ones(6).numpy()}, r"rope_freqs\.weight: holds how"),
        ("llama", {}, {"blk.0.attn_q.weight": None}, r"lacks the tensor blk\.0\.attn_q\.weight"),
        ("llama", {}, {"blk.0.other.weight": torch.ones(6).numpy()}, r"blk\.0\.other\.weight, which Cadre's llama has not"),
        ("llama", {}, {"output_norm.weight": torch.full((48,), float("nan")).numpy()}, "values that are not finite"),
        ("llama", {"llama.feed_forward_length": 44}, {}, r"ffn_gate\.weight has shape \[40, 48\]; its keys want \[44, 48\]"),
        ("llama", {"tokenizer.ggml.model": "llama"}, {}, "its tokenizer is llama None; Cadre knows gpt2 llama-bpe"),
        ("llama", {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2"}, {}, r"has no tokenizer\.ggml\.tokens"),
        ("llama", {**GPT2, "tokenizer.ggml.token_type": None}, {}, r"has no tokenizer\.ggml\.token_type"),
        ("llama", {**GPT2, "tokenizer.ggml.merges": ["no such"]}, {}, r"tokenizer\.ggml\.merges do not fit"),
        ("llama", {**GPT2, "tokenizer.ggml.token_type": [1]}, {}, "its keys contradict each other"),
        ("llama", {}, {"token_embd.weight": None}, r"has no token_embd\.weight"),
        ("llama", {"llama.attention.head_count": [4, 4]}, {}, r"llama\.attention\.head_count: differs from layer to layer"),
        ("llama", {"llama.attention.head_count": "four"}, {}, "its keys contradict each other"),
        ("deepseek_v3", {"deepseek2.attention.key_length_mla": None}, {}, "older layout"),
        ("deepseek_v3", {"deepseek2.expert_used_count": 9}, {}, "num_experts_per_tok is 9"),
        ("glm4_moe", {"glm4moe.nextn_predict_layers": 1}, {}, "modules of multi-token prediction are not read"),
    ],
)  # fmt: skip
def test_what_is_refused(build, tmp_path, kind, keys, tensors, says):
    file = changed(build, tmp_path, kind, keys, tensors)
    with pytest.raises(UsageError, match=says) as caught:
        read_gguf(file)
    assert str(file) in str(caught.value) and "\n" not in str(caught.value)


def test_files_that_are_none(build, tmp_path):
    save(build(), tmp_path / "model")
    write_gguf(tmp_path / "model", tmp_path / "model.gguf")
    whole = (tmp_path / "model.gguf").read_bytes()
    for content in (b"", b"GGUF", b"no such file" * 10, whole[:100], whole[: len(whole) // 2], whole[:-4000]):
        (tmp_path / "broken.gguf").write_bytes(content)
        with pytest.raises(UsageError, match=r"broken\.gguf: ") as caught:
            read_gguf(tmp_path / "broken.gguf")
        assert "\n" not in str(caught.value)
    shutil.rmtree(tmp_path / "model")
    with pytest.raises(UsageError, match=r"absent\.gguf: cannot be read"):
        read_gguf(tmp_path / "absent.gguf")
