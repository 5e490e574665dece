"""A run of a second: a recipe of every part (latent attention, experts, a multi-token prediction module) on made-up text."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

_TEXT = "the people of a nation and its house were here to see what old law had made for them in peace"

RECIPE = """
[model]
hidden_size = 32
num_hidden_layers = 2
num_attention_heads = 2
kv_lora_rank = 16
qk_nope_head_dim = 8
qk_rope_head_dim = 8
v_head_dim = 8
intermediate_size = 48
first_k_dense_replace = 1
n_routed_experts = 4
n_shared_experts = 1
num_experts_per_tok = 2
moe_intermediate_size = 16
num_nextn_predict_layers = 1
max_position_embeddings = 64

[data]
source = {source}
vocab_size = 300
seq_len = 16
held_out = 0.1

[train]
steps = 12
batch = 4
dtype = "float32"
log_every = 3

[optimizer]
lr = 0.003

[schedule]
warmup_steps = 3

[eval]
every = 6
tokens = 200
prompts = ["The"]

[checkpoint]
every = 4
"""


def write_corpus(folder: Path, documents: int = 12, seed: int = 0) -> Path:
    """A folder of text files of some hundred words each."""
    folder.mkdir()
    rng = random.Random(seed)
    for number in range(documents):
        sentences = (" ".join(rng.choices(_TEXT.split(), k=9)).capitalize() + ".\n" for _ in range(30))
        (folder / f"{number:02}.txt").write_text("".join(sentences), encoding="utf-8")
    return folder


def write_chats(file: Path, conversations: int = 40, seed: int = 0) -> Path:
    """JSON lines of conversations, each of one to three questions and answers, some told first how to behave."""
    rng = random.Random(seed)

    def message(role: str, words: int) -> dict[str, str]:
        return {"role": role, "content": " ".join(rng.choices(_TEXT.split(), k=words)).capitalize() + "."}

    with file.open("w", encoding="utf-8") as lines:
        for _ in range(conversations):
            messages = [message("system", 4)] if rng.random() < 0.3 else []
            for _ in range(rng.randint(1, 3)):
                messages += [message("user", 6), message("assistant", rng.randint(1, 20))]
            lines.write(json.dumps({"messages": messages}) + "\n")
    return file


def write_recipe(folder: Path, **sections: dict[str, Any]) -> Path:
    """The recipe as a file that names its corpus beside it, with `section={key: value}` replaced or added."""
    corpus = folder / "corpus"
    if not corpus.exists():
        write_corpus(corpus)
    lines = RECIPE.format(source=json.dumps(str(corpus))).splitlines()
    for section, values in sections.items():
        start = lines.index(f"[{section}]") + 1 if f"[{section}]" in lines else len(lines) + 1
        if start > len(lines):
            lines.append(f"[{section}]")
        stop = next((i for i in range(start, len(lines)) if lines[i].startswith("[")), len(lines))
        kept = [line for line in lines[start:stop] if line.partition(" =")[0] not in values]
        lines[start:stop] = [f"{key} = {json.dumps(value)}" for key, value in values.items()] + kept
    path = folder / "tiny.toml"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path
