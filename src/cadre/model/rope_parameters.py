"""The numbers of rotary position embedding, as a config holds them."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict


class RopeParameters(BaseModel):
    """Rotary position embedding, in transformers 5's spelling. `yarn` is arXiv 2309.00071; `llama3` Meta's variant."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    rope_type: Literal["default", "linear", "yarn", "llama3"] = "default"
    rope_theta: float = 10000.0
    partial_rotary_factor: float = 1.0
    factor: float = 1.0
    original_max_position_embeddings: int | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    attention_factor: float | None = None
    truncate: bool = True
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0


# Which of the fields above each scaling reads; rope_theta and partial_rotary_factor always count. Latent attention's
# softmax scale follows mscale_all_dim under any scaling, in transformers as here.
ROPE_READS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor", "mscale_all_dim"),
    "yarn": ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "mscale", "mscale_all_dim",
             "attention_factor", "truncate"),
    "llama3": ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor", "mscale_all_dim"),
}  # fmt: skip
