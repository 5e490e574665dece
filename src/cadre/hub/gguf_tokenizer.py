"""A tokenizer as GGUF holds it: byte-level BPE whose way to split text llama.cpp knows by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from cadre.errors import UsageError
from cadre.hub.template import template_source
from cadre.hub.tokenizer import LLAMA3_SPLIT
from cadre.model.config import ModelConfig

_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5

_DEEPSEEK_V3 = (
    r"\p{N}{1,3}",
    "[一-龥\u3040-\u309f\u30a0-\u30ff]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"""
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
)
# As Llama 3's, but that every digit is one's own.
_QWEN2 = LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")
# The name of the patterns that split a text one after the other, and of whether an entry of the vocabulary is never split.
_SPLITS = {
    ((LLAMA3_SPLIT,), True): "llama-bpe",
    ((LLAMA3_SPLIT,), False): "smaug-bpe",
    (("gpt-2",), False): "gpt-2",
    (_DEEPSEEK_V3, False): "deepseek-v3",
    (("digits", "gpt-2"), False): "smollm",
    ((_QWEN2,), False): "qwen2",
}
# How text is normalised first: llama.cpp never does, so that text in another form than composed (NFC) gives other tokens there.
_NORMALIZED = {"qwen2": [{"type": "NFC"}]}


def tokenizer_keys(tokenizer: Tokenizer, config: ModelConfig, directory: Path) -> dict[str, Any]:
    """The `tokenizer.*` keys of a model in `directory`. Raises `UsageError` for a tokenizer that llama.cpp would not follow."""
    whole = json.loads(tokenizer.to_str())
    name = _SPLITS.get((_splits(whole["pre_tokenizer"]), bool(whole["model"].get("ignore_merges"))))
    plain = (
        whole["model"]["type"] == "BPE"
        and whole["model"]["merges"]
        and not whole["model"].get("byte_fallback")
        and _steps(whole["normalizer"]) == _NORMALIZED.get(name or "", [])
        and not any(token["lstrip"] or token["rstrip"] or token["single_word"] for token in whole["added_tokens"])
    )
    before = tokenizer.encode("").ids
    if name is None or not plain or before not in ([], [config.bos_token_id]):
        raise UsageError(
            f"{directory / 'tokenizer.json'}: treats text in another way (splits, normalizer, bytes, start, added tokens) than"
            f" {', '.join(_SPLITS.values())}, which llama.cpp is known to follow; its own convert_hf_to_gguf.py knows more"
        )
    template, _ = template_source(directory)
    entries, kinds = _entries(tokenizer, config.vocab_size)
    merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in whole["model"]["merges"]]
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    ids = {"bos": config.bos_token_id, "eos": ends[0], "eot": ends[1] if ends[1:] else None, "padding": config.pad_token_id}
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": name,
        "tokenizer.ggml.tokens": entries,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": merges,
        **{f"tokenizer.ggml.{key}_token_id": value for key, value in ids.items() if value is not None},
        "tokenizer.ggml.add_bos_token": bool(before),
        **({} if template is None else {"tokenizer.chat_template": template}),
    }


def tokenizer_of(keys: dict[str, Any]) -> Tokenizer | None:
    """The tokenizer that a GGUF file's keys describe, None if they describe none. Raises `UsageError` for another kind,
    `KeyError` and `IndexError` for what is not there."""
    kind, pre = keys.get("tokenizer.ggml.model", "none"), keys.get("tokenizer.ggml.pre")
    if kind in ("none", "no_vocab"):
        return None
    found = next((rule for rule, name in _SPLITS.items() if name == pre), None)
    if kind != "gpt2" or found is None:
        raise UsageError(f"its tokenizer is {kind} {pre}; Cadre knows gpt2 {', '.join(_SPLITS.values())}")
    patterns, ignore_merges = found
    tokens, kinds = keys["tokenizer.ggml.tokens"], keys["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ", 1)) for merge in keys["tokenizer.ggml.merges"]]
    used = {token: number for number, token in enumerate(tokens) if kinds[number] != _UNUSED}
    try:
        tokenizer = Tokenizer(models.BPE(used, merges, ignore_merges=ignore_merges))
    except Exception as error:  # what the library raises has no class of its own
        raise UsageError(f"tokenizer.ggml.merges do not fit tokenizer.ggml.tokens ({error})") from None
    named = {"digits": pre_tokenizers.Digits(individual_digits=True)}
    own = patterns[-1] == "gpt-2"
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            *(named.get(each) or pre_tokenizers.Split(Regex(each), "isolated") for each in patterns[: -1 if own else None]),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=own),
        ]
    )
    if pre in _NORMALIZED:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    for number, token in enumerate(tokens):
        if kinds[number] in (_CONTROL, _USER_DEFINED):
            tokenizer.add_tokens([AddedToken(token, special=kinds[number] == _CONTROL, normalized=False)])
    # Of a file that does not say llama.cpp decides by the name (src/llama-vocab.cpp).
    if keys.get("tokenizer.ggml.add_bos_token", pre == "llama-bpe") and "tokenizer.ggml.bos_token_id" in keys:
        number = keys["tokenizer.ggml.bos_token_id"]
        bos = tokens[number]
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, number)])
    return tokenizer


def _entries(tokenizer: Tokenizer, size: int) -> tuple[list[str], list[int]]:
    """Each id's entry and kind, as many as the model has embeddings."""
    entries, kinds = [f"[PAD{number}]" for number in range(size)], [_UNUSED] * size
    for entry, number in tokenizer.get_vocab(with_added_tokens=True).items():
        entries[number], kinds[number] = entry, _NORMAL
    for number, added in tokenizer.get_added_tokens_decoder().items():
        entries[number], kinds[number] = added.content, _CONTROL if added.special else _USER_DEFINED
    return entries, kinds


def _splits(pre_tokenizer: dict[str, Any] | None) -> tuple[str, ...]:
    """The patterns that a byte-level pre-tokenizer splits at; empty if it is of another kind."""
    *splits, last = _steps(pre_tokenizer) or [{"type": None}]
    if last["type"] != "ByteLevel" or last["add_prefix_space"]:
        return ()
    digits = [{"type": "Digits", "individual_digits": True}]
    if splits == digits:
        return ("digits", "gpt-2") if last["use_regex"] else ()
    isolated = [step for step in splits if step["type"] == "Split" and step["behavior"] == "Isolated" and not step["invert"]]
    patterns = [step["pattern"].get("Regex") for step in isolated]
    if len(patterns) < len(splits) or None in patterns:
        return ()
    # A line end may stand in a pattern as itself.
    patterns = [pattern.replace("\r", r"\r").replace("\n", r"\n") for pattern in patterns]
    return (*patterns, *(["gpt-2"] if last["use_regex"] else []))


def _steps(part: dict[str, Any] | None) -> list[dict[str, Any]]:
    """What a normalizer or pre-tokenizer does, one after the other."""
    if part is None:
        return []
    inner = part.get("pretokenizers", part.get("normalizers"))
    return [part] if inner is None else [step for each in inner for step in _steps(each)]
