"""Cadre trains and runs DeepSeek-style language models: mixture of experts and multi-head latent attention."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cadre.hub.load import load
    from cadre.hub.save import save
    from cadre.infer.generate import generate
    from cadre.model.config import ModelConfig
    from cadre.model.transformer import Transformer
    from cadre.plan.count import count

__version__ = version("cadre-lm")
__all__ = ["ModelConfig", "Transformer", "count", "generate", "load", "save"]

_HOMES = {
    "ModelConfig": "cadre.model.config",
    "Transformer": "cadre.model.transformer",
    "count": "cadre.plan.count",
    "generate": "cadre.infer.generate",
    "load": "cadre.hub.load",
    "save": "cadre.hub.save",
}


def __dir__() -> list[str]:
    """What completion in a notebook offers, imported or not."""
    return __all__


def __getattr__(name: str) -> Any:
    """Import on first use, so that `cadre --help` and `cadre.count` need no torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'cadre' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
