"""Decoding and reading prompts, by Cadre and by llama.cpp in turn, of one shape on random weights: tokens/s.

python benchmarks/llama_cpp_peer.py [CONFIG] [--context N]...

llama.cpp is its Python package (pip install llama-cpp-python==0.3.36, compiled for this machine) on a GGUF file that
`cadre convert` writes; its four bits are Q4_0 of `llama_model_quantize`. Each side has all cores. Cadre's rates are those of
`cadre bench decode`.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import llama_cpp
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from cadre.hub.gguf import write_gguf
from cadre.hub.save import save
from cadre.infer.bench.decode import random_model
from cadre.model.config import ModelConfig

HERE = Path(__file__).parent
STEPS, ROUNDS = 24, 3
# The pairs that hold about as many bits a weight.
PAIRS = (("bfloat16", None, "bf16"), ("bfloat16", "int8", "q8_0"), ("bfloat16", "int4", "q4_0"))


def files(config: ModelConfig, folder: Path) -> dict[str, Path]:
    """The shape as GGUF, by the name of its type."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    entries = [*alphabet, *(a + b for a in alphabet for b in alphabet)][: config.vocab_size]
    merges = [(entry[0], entry[1]) for entry in entries if len(entry) == 2]
    tokenizer = Tokenizer(models.BPE({entry: number for number, entry in enumerate(entries)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    save(random_model(config, torch.bfloat16, None), folder / "model", tokenizer)
    made = {kind: folder / f"{kind}.gguf" for kind in ("bf16", "q8_0", "q4_0")}
    for kind in ("bf16", "q8_0"):
        write_gguf(folder / "model", made[kind], kind)
    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype, options.nthread = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0, os.cpu_count()
    names = [str(made[kind]).encode() for kind in ("bf16", "q4_0")]
    if llama_cpp.llama_model_quantize(*names, ctypes.byref(options)):
        raise SystemExit("llama.cpp did not quantize its file")
    return made


def theirs(path: Path, context: int, vocabulary: int) -> tuple[float, float]:
    """(decode, prompt) tokens/s of llama.cpp at a context."""
    model = llama_cpp.Llama(
        str(path),
        n_ctx=context + STEPS + 16,
        n_threads=os.cpu_count(),
        n_threads_batch=os.cpu_count(),
        n_batch=512,
        verbose=False,
    )
    model.eval([1, 2, 3])
    model.reset()
    ids = [random.Random(0).randrange(vocabulary) for _ in range(context)]
    start = time.perf_counter()
    model.eval(ids)
    prompt = context / (time.perf_counter() - start)
    seconds = []
    for step in range(STEPS):
        start = time.perf_counter()
        model.eval([ids[step]])
        seconds.append(time.perf_counter() - start)
    model.close()
    return 1 / statistics.median(seconds[3:]), prompt


def ours(config: Path, context: int, dtype: str, quantization: str | None) -> tuple[float, float]:
    command = [sys.executable, "-m", "cadre.cli.main", "bench", "decode", "--config", str(config), "--context", str(context)]
    command += ["--dtype", dtype, "--steps", str(STEPS), "--json", *(["--quantize", quantization] if quantization else [])]
    result = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return result["decode_tokens_per_second"], result["prefill_tokens_per_second"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", type=Path, default=HERE / "1270m.json")
    parser.add_argument("--context", type=int, action="append")
    options = parser.parse_args()
    config = ModelConfig.from_file(options.config)
    with tempfile.TemporaryDirectory() as name:
        made = files(config, Path(name))
        for path in made.values():
            print(f"{path.name}: {path.stat().st_size / 2**20:,.0f} MiB")
        print("Cadre, llama.cpp, ratio of medians:  decode tokens/s          prompt tokens/s")
        for context in options.context or [512, 4096]:
            for dtype, quantization, kind in PAIRS:
                rounds = [
                    (ours(options.config, context, dtype, quantization), theirs(made[kind], context, config.vocab_size))
                    for _ in range(ROUNDS)
                ]
                (our_decode, our_prompt), (their_decode, their_prompt) = (
                    [statistics.median(values) for values in zip(*(side[who] for side in rounds), strict=True)]
                    for who in (0, 1)
                )
                line = f"{context:>8,}  {quantization or 'bf16':>5} / {kind:6}"
                for mine, other in ((our_decode, their_decode), (our_prompt, their_prompt)):
                    line += f" {mine:>10,.1f} {other:>10,.1f} {mine / other:>6.2f}"
                print(line)


if __name__ == "__main__":
    main()
