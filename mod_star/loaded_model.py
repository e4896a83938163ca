"""A trained model in memory, with all that generation, scoring and evaluation need of it."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path

import jax
from jax.sharding import Mesh

from mod_star.config import ThinkingConfig
from mod_star.model import Decoder
from mod_star.model.transformer import StackedParams
from mod_star.tokenization.tokenizers import Tokenizer


@dataclass(frozen=True)
class Model:
    """A trained model with what belongs to it. Holds references and computes nothing."""

    decoder: Decoder
    """The network."""
    params: StackedParams
    """Its parameters as trained: groups stacked. Weights of matrix products may be in 8 bits."""
    tokenizer: Tokenizer
    """The one that it was trained with. Its `end_ids` end what the model generates."""
    thinking: ThinkingConfig | None = None
    """Length and kind of thoughts, for a model that can think; `params` then has the entry "thinking"."""
    mesh: Mesh | None = None
    """Where `params` lie, if on several devices."""
    routing_key: jax.Array | None = None
    """For stochastic routing; None: `jax.random.key(0)`."""

    @property
    def can_think(self) -> bool:
        """Whether it has learned to think."""
        return self.thinking is not None and "thinking" in self.params

    @property
    def routing_key_in_force(self) -> jax.Array | None:
        """The key that stochastic routing draws from; None where routing draws nothing."""
        routing = self.decoder.routing
        if routing.every == 0 or routing.selection != "stochastic":
            return None
        return jax.random.key(0) if self.routing_key is None else self.routing_key

    @staticmethod
    def load(
        path: str | Path,
        step: int | None = None,
        mesh: Mesh | None = None,
        capacity: float | None = None,
        weights: str | None = None,
    ) -> Model:
        """Loads the model of a run.

        Args:
          path: directory of the run; it may be in a bucket (gs://).
          step: of the checkpoint; None: the newest.
          mesh: devices that the parameters are to lie on; None: a single one.
          capacity: one of the run's `routing.budgets` to use the model at; None: its `routing.capacity`.
          weights: int8: quantise the weights of matrix products, see `mod_star.model.int8`; None: as they are stored.

        Raises:
          InputError: as for `mod_star.load_run`, which also gives the run's configuration.
        """
        # By name: a run's directory gives a `Model`, so that module imports this one.
        directory = importlib.import_module("mod_star.runs.directory")
        model: Model = directory.load_run(path, step, "step", mesh, capacity, weights).model
        return model
