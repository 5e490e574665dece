"""A file of prompts, and the file of what came of them."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from cadre.errors import UsageError, read_error, write_error
from cadre.files import kind_of, replace_file, require_local, require_regular

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from tokenizers import Tokenizer

    from cadre.infer.engine import Engine, Request
    from cadre.infer.generate import Completion

# The fields of an answer beside those of the line that asked.
_OURS = {"index", "text", "finish_reason", "tokens", "logprobs"}


def read_prompts(path: Path) -> list[dict[str, Any]]:
    """What each line asks: blank lines ask nothing. Raises `UsageError`."""
    lines = _lines(path)
    if path.suffix not in (".txt", ".jsonl"):
        raise UsageError(f"{path}: must end in .txt (a prompt a line) or .jsonl (objects with a field prompt)")
    if path.suffix == ".txt":
        asked = [{"prompt": line} for _, line in lines]
    else:
        asked = [_read_object(line, f"{path}, line {number}") for number, line in lines]
        for (number, _), each in zip(lines, asked, strict=True):
            if not isinstance(each.get("prompt"), str):
                raise UsageError(f'{path}, line {number}: needs a field prompt that is a text, such as {{"prompt": "Once"}}')
            for name in sorted(_OURS & each.keys()):
                raise UsageError(f"{path}, line {number}: has a field {name}, which answers get: give it another name")
    if not asked:
        raise UsageError(f"{path}: holds no prompt")
    return asked


def read_answers(out: Path, asked: Sequence[Mapping[str, Any]], prompts: Path) -> dict[int, str]:
    """The lines, with their ends, that a command before this one left, by the place of their prompt. Raises `UsageError` for a
    file that is no beginning of this one."""
    if out.resolve() == prompts.resolve():
        raise UsageError(f"{out}: is the file of prompts; give --out another name")
    require_local(out)
    if kind_of(out) is None:
        return {}
    lines = _lines(out, errors="replace")  # the last may end within a character
    answered: dict[int, str] = {}
    for number, line in lines:
        try:
            found = _read_object(line, f"{out}, line {number}")
        except UsageError:
            if number == lines[-1][0]:
                break  # half written when the machine went down
            raise
        place = found.get("index")
        if not isinstance(place, int) or not 0 <= place < len(asked) or found.get("prompt") != asked[place]["prompt"]:
            raise UsageError(
                f"{out}, line {number}: is no answer to a prompt of {prompts}: give --out another name, or delete it"
            )
        answered[place] = line + "\n"
    return answered


def answer_all(
    engine: Engine,
    requests: Sequence[Request],
    asked: Sequence[Mapping[str, Any]],
    answered: dict[int, str],
    out: Path,
    tokenizer: Tokenizer,
) -> None:
    """Each answer is appended as soon as it is there; once all are, the file is put into the prompts' order."""
    from rich.console import Console

    from cadre.cli.progress import moving_line
    from cadre.infer.generate import complete
    from cadre.units import clock, duration

    begin, before, rate = time.monotonic(), len(answered), 0.0
    if before:
        typer.echo(
            f"note: {out} has {before:,} of {len(asked):,} answers already, which stay: delete it to begin anew", err=True
        )
    try:
        # Rewritten first: without the line that an end of power left half written.
        out.parent.mkdir(parents=True, exist_ok=True)
        replace_file(out, "".join(answered.values()).encode())
        with out.open("a", encoding="utf-8") as file, moving_line(Console(stderr=True)) as show:
            show(f"0 of {len(requests):,} prompts")
            for completion in complete(engine, requests):
                answer = told(asked[completion.index], completion, tokenizer, requests[0].sampling.logprobs is not None)
                line = json.dumps({"index": completion.index, **answer}, ensure_ascii=False) + "\n"
                file.write(line)
                file.flush()
                answered[completion.index] = line
                done, seconds = len(answered) - before, time.monotonic() - begin
                rate = engine.stats.generated_tokens / seconds
                left = clock(seconds / done * (len(requests) - done))
                show(f"{len(answered):,} of {len(asked):,} prompts  {rate:,.0f} tokens/s  left {left}")
        replace_file(out, "".join(answered[place] for place in sorted(answered)).encode())
    except OSError as error:
        raise write_error(f"{out}: cannot be written", error) from None
    except KeyboardInterrupt:
        typer.echo(f"{len(answered):,} of {len(asked):,} answers are in {out}; the same command goes on", err=True)
        raise
    typer.echo(f"{out}: {len(answered):,} answers, {engine.stats.generated_tokens:,} tokens in "
               f"{duration(time.monotonic() - begin)} ({rate:,.0f} tokens/s)")  # fmt: skip


def told(asked: Mapping[str, Any], completion: Completion, tokenizer: Tokenizer, logprobs: bool) -> dict[str, Any]:
    """What was asked, with the answer."""
    answer = {**asked, "text": completion.text, "finish_reason": completion.finish, "tokens": len(completion.tokens)}
    if logprobs:

        def text(token: int) -> str:
            return tokenizer.decode([token], skip_special_tokens=False)

        answer["logprobs"] = [
            {"id": token.id, "text": text(token.id), "logprob": token.logprob}
            | ({"top": [{"id": i, "text": text(i), "logprob": value} for i, value in token.top]} if token.top else {})
            for token in completion.tokens
        ]
    return answer


def _lines(path: Path, errors: str = "strict") -> list[tuple[int, str]]:
    """The lines that are not blank, without their ends, and their numbers from 1."""
    require_regular(path)
    try:
        text = path.read_text(encoding="utf-8-sig", errors=errors)
    except OSError as error:
        raise read_error(path, error) from None
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: is not UTF-8 (byte {error.start})") from None
    return [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]


def _read_object(line: str, where: str) -> dict[str, Any]:
    try:
        found = json.loads(line)
        json.dumps(found, ensure_ascii=False).encode()  # half a surrogate pair could not be written down
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{where}: is not valid JSON ({error})") from None
    if not isinstance(found, dict):
        raise UsageError(f"{where}: holds {type(found).__name__}, not a JSON object")
    return found
