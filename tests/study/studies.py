"""A study of a second a run: dense against experts with a module of multi-token prediction, on made-up text."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

from cadre.study import worker
from tests.runs import write_corpus

STUDY = """
title = "Tiny"
question = "Does it work?"
held = "active_flops"
tolerance = 0.05
seeds = [0, 1]
evaluations = 5

[budget]
tokens = {tokens}

[sweep]
factors = [1.0, 3.0]
share = 0.5

[quick]
minutes = 1000
factors = [1.0]

[decode]
contexts = [8]
batches = [1, 2]

[recipe.model]
hidden_size = 32
num_hidden_layers = 2
num_attention_heads = 2
kv_lora_rank = 16
qk_nope_head_dim = 8
qk_rope_head_dim = 8
v_head_dim = 8
intermediate_size = 48
first_k_dense_replace = 2

[recipe.data]
source = {source}
vocab_size = 300
seq_len = 16
held_out = 0.1

[recipe.train]
steps = 1
batch = 4
dtype = "float32"

[recipe.optimizer]
lr = 0.003

[recipe.eval]
tokens = 200

[arms.dense]

[arms.experts]
solve = {{ active_flops = "moe_intermediate_size" }}
[arms.experts.model]
first_k_dense_replace = 1
n_routed_experts = 4
num_experts_per_tok = 2
num_nextn_predict_layers = 1
[arms.experts.train]
mtp_share = 0.25
"""


def study_text(source: str | Path = "sotu", tokens: int = 40 * 64) -> str:
    return STUDY.format(source=json.dumps(str(source)), tokens=tokens)


def write_study(folder: Path, *replace: tuple[str, str], tokens: int = 40 * 64) -> Path:
    """The study as a file beside its corpus, with each `replace` (what, by what) made."""
    if not (folder / "corpus").exists():
        write_corpus(folder / "corpus")
    text = study_text(folder / "corpus", tokens)
    for what, by in replace:
        assert what in text
        text = text.replace(what, by)
    path = folder / "tiny.toml"
    path.write_text(text, encoding="utf-8")
    return path


class InProcess:
    """Stands in for `subprocess.Popen`: runs the worker here and now, for the speed of tests."""

    def __init__(self, command: list[str], **_: Any) -> None:
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            self.status = worker.main(command[3:])
        self.stdout = io.StringIO(said.getvalue())

    def wait(self, timeout: float | None = None) -> int:
        return self.status


class Notes:
    """A watch that keeps what it is told."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.moves: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    def moving(self, text: str) -> None:
        self.moves.append(text)
