"""Adaptive-compute language models in JAX and Flax: networks that decide where to spend their computation.

Mixture-of-Depths (arXiv 2404.02258) decides which tokens each block computes, Quiet-STaR (arXiv 2403.09629) where to
think before predicting, CoT-decoding (arXiv 2402.10200) which path to trust. What is named here is the public
interface. It is imported when it is first used, so that `import mod_star` takes no time. At the command line:
`mod-star --help`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

if TYPE_CHECKING:
    from mod_star import presets as presets
    from mod_star.config import (
        DataConfig,
        LoraConfig,
        ModelConfig,
        OptimizerConfig,
        RoutingConfig,
        RunConfig,
        ThinkingConfig,
        TrainConfig,
    )
    from mod_star.decoding import Completion, GenerationConfig, Generator, Sampling, Think, complete
    from mod_star.decoding.answers import LastNumber, LastOption, Phrase
    from mod_star.decoding.cot import cot_decode, self_consistency
    from mod_star.errors import InputError
    from mod_star.loaded_model import Model
    from mod_star.model import Decoder
    from mod_star.model.parts import Part, Parts
    from mod_star.runs.directory import LoadedRun, load_run
    from mod_star.training.train import train

_PLACES = {
    "mod_star.config": (
        "DataConfig", "LoraConfig", "ModelConfig", "OptimizerConfig", "RoutingConfig", "RunConfig", "ThinkingConfig",
        "TrainConfig",
    ),
    "mod_star.decoding": ("Completion", "GenerationConfig", "Generator", "Sampling", "Think", "complete"),
    "mod_star.decoding.answers": ("LastNumber", "LastOption", "Phrase"),
    "mod_star.decoding.cot": ("cot_decode", "self_consistency"),
    "mod_star.errors": ("InputError",),
    "mod_star.loaded_model": ("Model",),
    "mod_star.model": ("Decoder",),
    "mod_star.model.parts": ("Part", "Parts"),
    "mod_star.runs.directory": ("LoadedRun", "load_run"),
    "mod_star.training.train": ("train",),
}  # fmt: skip
_MODULE_OF = {name: module for module, names in _PLACES.items() for name in names}

__all__ = [
    "Completion",
    "DataConfig",
    "Decoder",
    "GenerationConfig",
    "Generator",
    "InputError",
    "LastNumber",
    "LastOption",
    "LoadedRun",
    "LoraConfig",
    "Model",
    "ModelConfig",
    "OptimizerConfig",
    "Part",
    "Parts",
    "Phrase",
    "RoutingConfig",
    "RunConfig",
    "Sampling",
    "Think",
    "ThinkingConfig",
    "TrainConfig",
    "complete",
    "cot_decode",
    "load_run",
    "presets",
    "self_consistency",
    "train",
]


def __getattr__(name: str) -> Any:
    """Imports what is named in `__all__` when it is first used."""
    if name == "presets":
        return importlib.import_module("mod_star.presets")
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'mod_star' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULE_OF[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
