"""Continuing one prompt, from Python: an engine of its own for each call, with a cache just large enough."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from cadre.errors import RunError, UsageError, encodable
from cadre.infer.engine import Engine, Output, Request
from cadre.infer.pages import bytes_for, cache_dtype
from cadre.infer.sampling import Sampling
from cadre.model.config import ModelConfig
from cadre.model.scoring import document_start
from cadre.model.transformer import Transformer

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_PAGE_SIZE = 16


def generate_ids(
    model: Transformer,
    ids: Sequence[int],
    *,
    max_new_tokens: int = 100,
    temperature: float = 0.8,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int | None = None,
) -> list[int]:
    """Continue token ids (at least one); returns the new ids, without the end-of-text token that ended them.

    As `generate` in all else.
    """
    request = Request("", tuple(ids), max_new_tokens, Sampling(temperature, top_p, top_k, seed=seed))
    return [token.id for output in _outputs(_engine(model, None, request)) for token in output.tokens]


def stream(
    model: Transformer,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    max_new_tokens: int = 100,
    temperature: float = 0.8,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int | None = None,
    stop: str | Sequence[str] = (),
) -> Iterator[str]:
    """As `generate`, piece by piece: each piece of text as soon as it is certain. The pieces hold whole characters only and
    no part of a stop string; joined they are what `generate` returns. Errors are raised at the call, not at the first piece.
    """
    sampling = Sampling(temperature, top_p, top_k, seed=seed)
    return pieces(prepare(model, tokenizer, prompt, max_new_tokens, sampling, (stop,) if isinstance(stop, str) else stop))


def prepare(
    model: Transformer,
    tokenizer: Tokenizer,
    prompt: str,
    max_new_tokens: int,
    sampling: Sampling,
    stop: Sequence[str] = (),
    speculate: int = 0,
) -> Engine:
    """An engine that holds one request, the continuation of a prompt, and nothing else."""
    if tokenizer is None:
        raise UsageError("this model has no tokenizer: text needs one; generate_ids continues token ids")
    ids = tuple(encode_prompt(model.config, tokenizer, prompt))
    return _engine(model, tokenizer, Request("", ids, max_new_tokens, sampling, stop=tuple(stop)), speculate)


def pieces(engine: Engine) -> Iterator[str]:
    """The text of an engine's requests as it comes."""
    return (output.text for output in _outputs(engine) if output.text)


def generate(
    model: Transformer,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    max_new_tokens: int = 100,
    temperature: float = 0.8,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int | None = None,
    stop: str | Sequence[str] = (),
) -> str:
    """The model's continuation of a prompt: the new text, without the prompt.

    The prompt is encoded as the tokenizer does it, its own beginning-of-text token and special tokens written out
    included; an empty prompt is the start of a document. Generation ends at the config's end-of-text token, before the
    first of the `stop` strings, after `max_new_tokens`, or when prompt and continuation fill the model's context. For
    temperature, top_p and top_k see `Sampling`. The same seed gives the same text on the same machine; without one each
    call draws anew. Puts the model in eval mode.

    Raises `UsageError` for a prompt longer than the context and values out of range, `RunError` if the model's logits are
    not finite.
    """
    return "".join(
        stream(
            model,
            tokenizer,
            prompt,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            seed=seed,
            stop=stop,
        )
    )


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


def _engine(model: Transformer, tokenizer: Tokenizer | None, request: Request, speculate: int = 0) -> Engine:
    """An engine for one request, which it holds. Raises `UsageError` as `Engine.add`."""
    config = model.config
    longest = min(len(request.prompt_ids) + max(0, request.max_new_tokens) + speculate, config.max_position_embeddings)
    layers = config.num_hidden_layers + min(speculate, len(model.mtp))
    engine = Engine(
        model,
        tokenizer,
        cache_bytes=bytes_for(config, max(1, longest), cache_dtype(model), _PAGE_SIZE, layers),
        page_size=_PAGE_SIZE,
        max_batch=1,
        prefix_sharing=False,
        speculate=speculate,
    )
    engine.add(request)
    return engine


def _outputs(engine: Engine) -> Iterator[Output]:
    while engine.busy:
        for output in engine.step():
            yield checked(output)


def checked(output: Output) -> Output:
    """Raises `RunError` if the model's logits were not finite."""
    if output.finish == "error":
        raise RunError("the model's logits are not finite: its weights are damaged or its training diverged")
    return output
