"""Continuing prompts, from Python: an engine of its own for each call, with a cache just large enough."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Any, overload

from cadre.errors import RunError, UsageError, encodable
from cadre.infer.engine import CACHE_SHARE, Engine, Output, Request
from cadre.infer.pages import bytes_for, cache_dtype
from cadre.infer.request import check
from cadre.infer.sampling import Sampling, TokenOut
from cadre.kernels.memory import free_bytes
from cadre.model.config import ModelConfig
from cadre.model.scoring import document_start
from cadre.model.transformer import Transformer

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# Of many prompts so many run at once, and as many more wait in the engine: none of its steps looks at all of them.
_AT_ONCE, _AHEAD = 64, 64


@dataclass(frozen=True)
class Completion:
    """What came of one prompt. index: its place among them. tokens: the new ones. finish: "stop" at the end-of-text token or a
    stop string, "length" otherwise."""

    index: int
    text: str
    tokens: tuple[TokenOut, ...]
    finish: str


def generate_ids(model: Transformer, ids: Sequence[int], *, max_new_tokens: int = 100, **sampling: Any) -> list[int]:
    """Continue token ids (at least one); returns the new ids, without the end-of-text token that ended them.

    `sampling`: any fields of `Sampling`. As `generate` in all else.
    """
    request = Request("0", tuple(ids), max_new_tokens, Sampling(**sampling))
    check(request, model.config)
    (completion,) = complete(engine_for(model, None, [request]), [request])
    return [token.id for token in completion.tokens]


def stream(
    model: Transformer,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    max_new_tokens: int = 100,
    stop: str | Sequence[str] = (),
    **sampling: Any,
) -> Iterator[str]:
    """As `generate` with one prompt, piece by piece: each piece of text as soon as it is certain. The pieces hold whole
    characters only and no part of a stop string; joined they are what `generate` returns. Errors are raised at the call, not
    at the first piece. `sampling`: any fields of `Sampling`.
    """
    requests = requests_for(model, tokenizer, [prompt], max_new_tokens, Sampling(**sampling), _several(stop))
    engine = engine_for(model, tokenizer, requests)
    engine.add(requests[0])
    return pieces(engine)


@overload
def generate(model: Transformer, tokenizer: Tokenizer, prompt: str, **options: Any) -> str: ...


@overload
def generate(model: Transformer, tokenizer: Tokenizer, prompt: Sequence[str], **options: Any) -> list[str]: ...


def generate(  # type: ignore[misc]  # the options by name once, not three times
    model: Transformer,
    tokenizer: Tokenizer,
    prompt: str | Sequence[str],
    *,
    max_new_tokens: int = 100,
    temperature: float = 0.8,
    top_p: float = 1.0,
    top_k: int = 0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    presence_penalty: float = 0.0,
    frequency_penalty: float = 0.0,
    seed: int | None = None,
    stop: str | Sequence[str] = (),
    json_schema: str | Mapping[str, Any] | None = None,
    regex: str | None = None,
) -> str | list[str]:
    """The model's continuation of a prompt: the new text, without the prompt. Of a list of prompts the texts in their order,
    decoded together: each is what the prompt gives alone, unless two tokens are so close that rounding decides; with a seed,
    what it gives with the seed plus its place in the list.

    A prompt is encoded as the tokenizer does it, its own beginning-of-text token and special tokens written out
    included; an empty prompt is the start of a document. Generation ends at the config's end-of-text token, before the
    first of the `stop` strings, after `max_new_tokens`, or when prompt and continuation fill the model's context. For all
    else see `Sampling`; a `json_schema` may be an object as well as its text. The same seed gives the same text on the same
    machine; without one each call draws anew. Puts the model in eval mode.

    Raises `UsageError` for a prompt longer than the context and values out of range, `RunError` if the model's logits are
    not finite.
    """
    sampling = Sampling(
        temperature,
        top_p,
        top_k,
        min_p,
        repetition_penalty,
        presence_penalty,
        frequency_penalty,
        seed=seed,
        json_schema=json.dumps(json_schema) if isinstance(json_schema, Mapping) else json_schema,
        regex=regex,
    )
    prompts = [prompt] if isinstance(prompt, str) else prompt
    requests = requests_for(model, tokenizer, prompts, max_new_tokens, sampling, _several(stop))
    texts = {each.index: each.text for each in complete(engine_for(model, tokenizer, requests), requests)}
    return texts[0] if isinstance(prompt, str) else [texts[index] for index in range(len(requests))]


def requests_for(
    model: Transformer,
    tokenizer: Tokenizer | None,
    prompts: Sequence[str],
    max_new_tokens: int,
    sampling: Sampling,
    stop: Sequence[str] = (),
) -> list[Request]:
    """A request for each prompt, named by its place and checked. Raises `UsageError`, which says which of several is wrong."""
    if tokenizer is None:
        raise UsageError("this model has no tokenizer: text needs one; generate_ids continues token ids")
    if not isinstance(prompts, Sequence):
        raise UsageError(f"the prompt is a {type(prompts).__name__}; it must be one text, or a list of them")
    requests: list[Request] = []
    for place, prompt in enumerate(prompts):
        seed = None if sampling.seed is None else (sampling.seed + place) % 2**63
        try:
            ids = tuple(encode_prompt(model.config, tokenizer, prompt))
            request = Request(str(place), ids, max_new_tokens, replace(sampling, seed=seed), stop=tuple(stop))
            check(request, model.config)
        except UsageError as error:
            if len(prompts) == 1:
                raise
            raise UsageError(f"prompt {place + 1} of {len(prompts)}: {error}") from None
        requests.append(request)
    return requests


def engine_for(model: Transformer, tokenizer: Tokenizer | None, requests: Sequence[Request], speculate: int = 0) -> Engine:
    """An engine with room for these requests, as many of them at once as half of the free memory holds."""
    config, dtype = model.config, cache_dtype(model)
    layers = config.num_hidden_layers + min(speculate, len(model.mtp))
    longest = sorted((len(each.prompt_ids) + each.max_new_tokens + speculate for each in requests), reverse=True)[:_AT_ONCE]
    each = [bytes_for(config, min(n, config.max_position_embeddings), dtype, layers=layers) for n in longest]
    room = sum(each)
    if len(each) > 1:
        room = max(each[0], min(room, int(CACHE_SHARE * free_bytes(model.embed_tokens.weight.device))))
    return Engine(
        model,
        tokenizer,
        cache_bytes=room or bytes_for(config, 1, dtype, layers=layers),
        max_batch=max(1, len(each)),
        prefix_sharing=len(each) > 1,
        speculate=speculate,
    )


def complete(engine: Engine, requests: Sequence[Request]) -> Iterator[Completion]:
    """Run requests named by their places, in an engine that holds no others; what came of each as soon as it has ended. Raises
    `UsageError` as `Engine.add`, `RunError` if the model cannot go on."""
    coming = iter(requests)
    begun: dict[str, list[Output]] = {}
    while True:
        for request in islice(coming, _AT_ONCE + _AHEAD - len(begun)):
            engine.add(request)
            begun[request.id] = []
        if not begun:
            return
        for output in engine.step():
            begun[output.id].append(checked(output))
            if output.finish is not None:
                outputs = begun.pop(output.id)
                tokens = tuple(token for each in outputs for token in each.tokens)
                yield Completion(int(output.id), "".join(each.text for each in outputs), tokens, output.finish)


def pieces(engine: Engine) -> Iterator[str]:
    """The text of an engine's requests as it comes."""
    while engine.busy:
        for output in engine.step():
            if checked(output).text:
                yield output.text


def encode_prompt(config: ModelConfig, tokenizer: Tokenizer, prompt: str) -> list[int]:
    """A prompt's ids, never none. Raises `UsageError` for text that is no Unicode (half a surrogate pair), and where the
    tokenizer has no token for a part of it."""
    if not isinstance(prompt, str):
        raise UsageError(f"the prompt is a {type(prompt).__name__}; it must be one text")
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UsageError(f"the prompt is not valid Unicode text (character {error.start})") from None
    with encodable("the prompt"):
        ids = tokenizer.encode(prompt).ids
    return ids or [document_start(config, tokenizer)]


def _several(stop: str | Sequence[str]) -> Sequence[str]:
    return (stop,) if isinstance(stop, str) else stop


def checked(output: Output) -> Output:
    """Raises `RunError` if the model could not go on."""
    if output.finish == "error":
        raise RunError(
            "the model's logits are not finite (its weights are damaged or its training diverged), or the JSON schema or regex "
            "asked for is too much work"
        )
    return output
