"""The decodings by name, each with its own fields: what `mod-star sample` and `mod-star evaluate` offer.

Every default of a decoding stands here once; the library takes its own from here. Imports no JAX.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from mod_star.errors import InputError, require

WINDOW = 32
"""Tokens over which the confidence in a path is a moving average, see `mod_star.decoding.confidence`."""
STOPPED = "stopped"
"""What the reason begins with why a sample that stopped early does not count."""
DecodingName = Literal["greedy", "temperature", "self-consistency", "beam", "cot"]


@dataclass(frozen=True)
class Greedy:
    """Takes the most probable token each time."""


@dataclass(frozen=True)
class Temperature:
    """Draws every token."""

    temperature: float = 0.8
    """Divides the logits; 0: greedy."""
    top_k: int = 0
    """Draw among the k most probable tokens only; 0: all."""
    top_p: float = 1.0
    """Draw among the most probable tokens that together have this probability; 1: all."""
    min_p: float = 0.0
    """Draw among the tokens that are at least this many times as probable as the most probable one; 0: all."""


@dataclass(frozen=True)
class SelfConsistency:
    """Draws several texts and answers with the majority (Wang et al., arXiv 2203.11171)."""

    temperature: float = 0.7
    """As for `Temperature`, but above 0: samples must differ."""
    top_k: int = 0
    """As for `Temperature`."""
    top_p: float = 1.0
    """As for `Temperature`."""
    min_p: float = 0.0
    """As for `Temperature`."""
    branches: int = 10
    """Samples of each prompt."""
    answer: str = "number"
    """What is looked for, see `mod_star.decoding.answers.make_finder`."""
    continuation: str | None = None
    """Ask for the answer with these words; None: it is in the text."""
    ranking: str | None = None
    """As for `Cot`, what votes are weighed by; None: all votes are equal."""
    vote_temperature: float | None = None
    """As for `Cot`."""
    keep: float = 1.0
    """As for `Cot`."""
    window: int = WINDOW
    """As for `Cot`."""
    early_stop: int | None = None
    """Samples that are generated to their end, see `mod_star.decoding.early_stop`: the others stop early. None: none
    does."""

    def __post_init__(self) -> None:
        if self.early_stop is not None:
            fine = 0 <= self.early_stop < self.branches
            require(fine, "--early-stop", self.early_stop, f"must lie in [0, {self.branches - 1}] (--branches minus 1)")
        require(self.temperature > 0, "--temperature", self.temperature, "must be above 0: samples must differ")
        _require_branches(self.branches)
        _require_vote(self.vote_temperature, self.keep, self.window)


@dataclass(frozen=True)
class Beam:
    """Searches for the most probable texts."""

    branches: int = 4
    """Beams of each prompt."""
    length_penalty: float = 1.0
    """Texts are ranked by log-probability over length to this power. The default is that of transformers, vLLM and
    fairseq: the mean log-probability of the tokens."""

    def __post_init__(self) -> None:
        _require_branches(self.branches)


@dataclass(frozen=True)
class Cot:
    """CoT-decoding (Wang and Zhou, arXiv 2402.10200): branches on the most probable first tokens and goes on greedily;
    the answer that the model is surest of counts."""

    branches: int = 10
    """How many first tokens to branch on."""
    answer: str = "number"
    """As for `SelfConsistency`."""
    continuation: str | None = None
    """As for `SelfConsistency`."""
    ranking: str = "delta"
    """What branches are ranked by, see `mod_star.decoding.rankings.make_ranking`."""
    aggregate: bool = False
    """Whether the answer with the largest sum over branches counts, instead of that of the best branch."""
    skip_first: bool = False
    """Leave the branched token out of Δ where it is part of the answer."""
    vote_temperature: float | None = None
    """Weigh a branch by exp(score / temperature), as CISC does (Taubenfeld et al., arXiv 2502.06233); None: by what
    belongs to the ranking, mostly the score itself."""
    keep: float = 1.0
    """Share of the branches with an answer, the highest ranked ones, that count at all."""
    window: int = WINDOW
    """Tokens of a group of DeepConf's rankings."""

    def __post_init__(self) -> None:
        _require_branches(self.branches)
        _require_vote(self.vote_temperature, self.keep, self.window)


Decoding = Greedy | Temperature | SelfConsistency | Beam | Cot

DECODINGS: dict[DecodingName, type[Decoding]] = {
    "greedy": Greedy,
    "temperature": Temperature,
    "self-consistency": SelfConsistency,
    "beam": Beam,
    "cot": Cot,
}


FIELDS = tuple(dict.fromkeys(each.name for kind in DECODINGS.values() for each in fields(kind)))
"""Every field of a decoding, in the order in which a mistake is reported."""


def name_of(decoding: Decoding) -> DecodingName:
    """What the command line calls a decoding."""
    return next(name for name, kind in DECODINGS.items() if type(decoding) is kind)


def decodings_with(field: str) -> list[DecodingName]:
    """The decodings that have a field of this name."""
    return [name for name, kind in DECODINGS.items() if field in {each.name for each in fields(kind)}]


def chosen_decoding(name: DecodingName, options: Mapping[str, Any]) -> Decoding:
    """The decoding that a command line asks for.

    Args:
      name: of the decoding.
      options: the values of the command's options, by field; None or False: not given.

    Raises:
      InputError: an option is given that this decoding doesn't have, or its value is out of range.
    """
    fields = {field: value for field, value in options.items() if value is not None and value is not False}
    for field in fields:
        require_decoding(name, field, decodings_with(field))
    return DECODINGS[name](**fields)


def require_decoding(name: DecodingName, field: str, allowed: list[DecodingName]) -> None:
    """Raises InputError if an option is given that goes with other decodings only."""
    if name not in allowed:
        option = "--" + field.replace("_", "-")
        raise InputError(f"{option}: cannot be combined with --decoding {name}, only with {', '.join(allowed)}")


def _require_vote(temperature: float | None, keep: float, window: int) -> None:
    fine = temperature is None or 1e-6 <= temperature < float("inf")
    require(fine, "--vote-temperature", temperature, "must be at least 1e-6 and finite")
    require(0 < keep <= 1, "--keep", keep, "must lie in (0, 1]")
    require(window >= 1, "--window", window, "must be at least 1")


def _require_branches(branches: int) -> None:
    require(branches >= 1, "--branches", branches, "must be at least 1")
