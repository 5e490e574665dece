"""What a model's modules of multi-token prediction do for it: how often they are right, and what drafting by them is worth."""

from __future__ import annotations

import statistics
import sys
import time
from pathlib import Path

import torch

from cadre.data.shards import Tokens
from cadre.errors import RunError, UsageError
from cadre.hub.load import load
from cadre.infer.engine import Engine
from cadre.infer.generate import checked
from cadre.infer.request import Request
from cadre.infer.sampling import Sampling
from cadre.infer.speculate import Payoff
from cadre.kernels.limits import default_device
from cadre.model.transformer import Transformer

# Stretches of held-out text on which a module is asked whether it is right.
_WINDOWS = 32
# Texts that are continued one at a time, each once plainly and once with drafts, so many times over.
_TEXTS, _TURNS = 4, 3


def acceptance(model: Transformer, held_out: Tokens, length: int) -> list[float]:
    """Of each module of multi-token prediction, at how many of the held-out positions its first choice is the one the main
    model makes there a step later: what greedy speculation accepts, given the true text."""
    depth = len(model.mtp)
    size = length + 1 + depth
    count = min(_WINDOWS, len(held_out) // size)
    agreed = [0] * depth
    total = 0
    model.eval()
    with torch.no_grad():
        for window in range(count):
            ids = torch.from_numpy(held_out.tokens(window * size, (window + 1) * size).astype("int64"))
            ids_BT = ids[None].to(model.embed_tokens.weight.device)
            hidden = model.hidden(ids_BT[:, :length])
            main_T = model.lm_head(hidden)[0].argmax(-1)
            for stage in range(depth):
                hidden = model.mtp_hidden(hidden, ids_BT[:, stage + 1 : length + stage + 1], stage)
                draft_T = model.lm_head(hidden)[0].argmax(-1)
                agreed[stage] += int((draft_T[: length - stage - 1] == main_T[stage + 1 :]).sum())
            total += length
    # A module one deeper has one position less to compare in every window.
    return [a / max(1, total - count * (stage + 1)) for stage, a in enumerate(agreed)]


def drafting_rates(directory: Path, held_out: Tokens, length: int) -> dict[str, float] | None:
    """Tokens/s of the model in `directory` that continues held-out text greedily, one text at a time: `plain`, and `drafted` by
    as many tokens as it has modules, whether that pays or not; from the first new token on, medians, in turn. None where there
    is too little text or memory, or the model's logits are not finite."""
    model, _ = load(directory, device=default_device())
    begin, new = length // 2, length // 2 - len(model.mtp)
    texts = [held_out.tokens(at, at + begin).tolist() for at in range(0, min(len(held_out), _TEXTS * begin) - begin + 1, begin)]
    if not texts or new < 2:
        return None
    rates: dict[int, list[float]] = {0: [], len(model.mtp): []}
    try:
        for _ in range(_TURNS):
            for drafts, found in rates.items():
                found.append(_rate(model, texts, new, drafts))
    except (UsageError, RunError):  # no room for their caches; logits that are not finite
        return None
    plain, drafted = (statistics.median(found) for found in rates.values())
    return {"plain": plain, "drafted": drafted}


def _rate(model: Transformer, texts: list[list[int]], new: int, drafts: int) -> float:
    """Tokens/s of the texts' continuations, one after the other, their prompts' reading left out."""
    always = Payoff(trial=sys.maxsize, period=sys.maxsize)
    engine = Engine(model, max_batch=1, prefix_sharing=False, speculate=drafts, payoff=always)
    seconds, made = 0.0, 0
    for number, text in enumerate(texts):
        engine.add(Request(str(number), tuple(text), new, Sampling(0.0), ignore_eos=True))
        while not _step(engine):
            pass
        start = time.perf_counter()
        while engine.busy:
            made += _step(engine)
        seconds += time.perf_counter() - start
    return made / seconds


def _step(engine: Engine) -> int:
    """New tokens. Raises `RunError` if the model's logits are not finite."""
    return sum(len(checked(output).tokens) for output in engine.step())
