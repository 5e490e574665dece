"""Speculation with the model's own multi-token prediction modules (DeepSeek-V3 report, section 2.2).

The modules guess the next tokens; the model reads the guesses together with the token that it would read anyway, and keeps
those that it would have chosen itself. Guesses are single tokens, so "would have chosen" is the sampler's own choice, drawn
with the random number that plain decoding draws: the text is the same, whatever the settings.

Letters in names: T position, D hidden.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from cadre.infer.runner import Batch, Runner, table_of
from cadre.infer.scheduler import Sequence

# So many positions that the modules have not read are never too many: those of a trial without drafts.
_MISSED = 32
# How many times as fast the other way, with or without drafts, must be to take over.
_MARGIN = 1.02


@dataclass
class Reading:
    """What the model has just read of a sequence: its hidden states [T, D] from position `start` on. wanted: how many drafts
    are asked for; the sequence then knows one token beyond the last position read."""

    sequence: Sequence
    start: int
    hidden_TD: Tensor
    wanted: int


class Drafter:
    """Keeps the modules' caches in step with the model's, and drafts.

    Module k (from 0) joins the hidden state of stage k (0: the model's own; k: of module k - 1) at position p with token
    p + k + 1, and predicts token p + k + 2. Where token p + k + 1 is itself a draft, what the module writes to its cache at p
    holds only if that draft is accepted: the next reading writes it anew. For that the sequence carries, for each stage but
    the first, the hidden state of the first position that is to be done again.

    An example with two modules: the model has read positions up to 2, and token 3 is known. Module 0 joins position 2 with
    token 3 and drafts token 4. Module 1 joins position 1 with token 3, which is final, and position 2 with the draft of
    token 4, and drafts token 5: position 2 of stage 1 is carried, and done again when token 4 is known.

    Drafts beyond the modules come from the last one fed with its own output, a position further each time.
    """

    def __init__(self, runner: Runner, drafts: int) -> None:
        self.runner = runner
        self.modules = min(drafts, len(runner.model.mtp))

    def draft(self, readings: list[Reading]) -> list[list[int]]:
        """The drafts of each reading, at most as many as it wants; writes the modules' caches."""
        drafts: list[list[int]] = [[] for _ in readings]
        self._draft_further(readings, drafts, self._draft_by_modules(readings, drafts))
        return drafts

    def _draft_by_modules(self, readings: list[Reading], drafts: list[list[int]]) -> list[tuple[int, Tensor]]:
        """Each module over what was read and what is carried, and a draft of each. Returns the last module's last position in
        each reading, and its output there."""
        inputs = [(reading.start, reading.hidden_TD) for reading in readings]
        carried = [dict(reading.sequence.carried) for reading in readings]
        for module in range(self.modules):
            if module:
                inputs = [
                    (start - 1, torch.cat((kept[module], out_TD))) if module in kept else (start, out_TD)
                    for (start, out_TD), kept in zip(inputs, carried, strict=True)
                ]
            outputs = self._pass(module, readings, inputs, drafts, module + 1)
            for reading, out_TD in zip(readings, outputs, strict=True):
                again = len(out_TD) - module - 1
                if again >= 0:
                    reading.sequence.carried[module + 1] = out_TD[again : again + 1].clone()
                else:
                    reading.sequence.carried.pop(module + 1, None)
            self._choose(readings, drafts, [out_TD[-1:] for out_TD in outputs], module)
            inputs = [(start, out_TD) for (start, _), out_TD in zip(inputs, outputs, strict=True)]
        return [(start + len(out_TD) - 1, out_TD[-1:]) for start, out_TD in inputs]

    def _draft_further(self, readings: list[Reading], drafts: list[list[int]], rows: list[tuple[int, Tensor]]) -> None:
        """Drafts beyond one a module: the last module goes on from `rows`, its last positions and outputs."""
        for number in range(self.modules, max((reading.wanted for reading in readings), default=0)):
            going = [place for place, reading in enumerate(readings) if reading.wanted > number]
            some = [readings[place] for place in going]
            steps = [(rows[place][0] + 1, rows[place][1]) for place in going]
            outputs = self._pass(self.modules - 1, some, steps, [drafts[place] for place in going], self.modules)
            for place, step, out_TD in zip(going, steps, outputs, strict=True):
                rows[place] = (step[0], out_TD)
            self._choose(some, [drafts[place] for place in going], outputs, number)

    def _pass(
        self, module: int, readings: list[Reading], inputs: list[tuple[int, Tensor]], drafts: list[list[int]], ahead: int
    ) -> list[Tensor]:
        """The outputs of one module for `inputs`, of each reading the first position and the hidden states from there on. Each
        is joined with the token `ahead` positions further: known, a draft, or, past the drafts of a reading that wants no
        more, a stand-in: no draft is made of it, and its position is done again."""
        ids: list[int] = []
        positions: list[int] = []
        for reading, (start, hidden_TD), guessed in zip(readings, inputs, drafts, strict=True):
            known, stop = reading.sequence.ids, start + len(hidden_TD)
            for position in range(start, stop):
                beyond = position + ahead - len(known)
                ids.append(known[position + ahead] if beyond < 0 else guessed[beyond] if beyond < len(guessed) else known[-1])
                positions.append(position)
        counts = [len(hidden_TD) for _, hidden_TD in inputs]
        batch = Batch(
            ids_T=torch.tensor(ids),
            position_T=torch.tensor(positions),
            count_B=counts,
            start_B=[start for start, _ in inputs],
            page_BP=table_of([reading.sequence for reading in readings]),
        )
        hidden_TD = torch.cat([hidden_TD for _, hidden_TD in inputs])
        return list(self.runner.draft_hidden(module, hidden_TD, batch).split(counts))

    def _choose(self, readings: list[Reading], drafts: list[list[int]], rows: list[Tensor], number: int) -> None:
        """Append draft `number` (from 0), the likeliest token after `rows`, for the readings that want it."""
        wanting = [place for place, reading in enumerate(readings) if reading.wanted > number]
        if wanting:
            logits = self.runner.logits(torch.cat([rows[place] for place in wanting]))
            for place, token in zip(wanting, logits.argmax(dim=-1).tolist(), strict=True):
                drafts[place].append(token)


def is_ready(sequence: Sequence) -> bool:
    """Whether the modules have read enough of a sequence to guess well what follows."""
    return sequence.missed <= max(_MISSED, len(sequence.ids) // 4)


@dataclass
class _Rates:
    """Tokens a second with (True) and without drafts, as moving averages; what runs, since how many passes, and how many of
    them counted."""

    rate: dict[bool, float] = field(default_factory=dict)
    drafting: bool = True
    passes: int = 0
    counted: int = 0


class Payoff:
    """Whether drafting pays, from what passes took: the faster way runs, the other is tried now and then. Kept apart for
    each size of batch (powers of two), since a draft costs more the more rows the pass has.

    A sequence whose prompt was read while drafting was off is not drafted, since the modules know too little of it: of passes
    with drafts only those count where most sequences are `ready`.

    trial: passes that a trial lasts, the first of which does not count (it has no drafts to read yet). period: passes of the
    faster way between trials, and the most that a trial waits for passes that count.
    """

    def __init__(self, trial: int = 12, period: int = 200) -> None:
        self.trial, self.period = trial, period
        self._of_size: dict[int, _Rates] = {}

    def drafting(self, sequences: int) -> bool:
        """Whether the next pass over so many sequences shall draft."""
        return self._size(sequences).drafting

    def record(self, sequences: int, ready: int, tokens: int, seconds: float) -> None:
        """What a pass gave and took; `ready` of its sequences could be drafted."""
        size = self._size(sequences)
        size.passes += 1
        if not size.drafting or 2 * ready > sequences:
            size.counted += 1
            if size.counted > 1 and seconds > 0:
                rate, old = tokens / seconds, size.rate.get(size.drafting)
                size.rate[size.drafting] = rate if old is None else 0.8 * old + 0.2 * rate
        if size.counted < self.trial and size.passes < self.period:
            return
        own, other = size.rate.get(size.drafting, 0.0), size.rate.get(not size.drafting)
        if other is None or other > _MARGIN * own or size.passes >= self.period:
            size.drafting, size.passes, size.counted = not size.drafting, 0, 0

    def _size(self, sequences: int) -> _Rates:
        return self._of_size.setdefault(sequences.bit_length(), _Rates())
