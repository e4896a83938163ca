"""The configuration of a generation, for every decoding: how many tokens, how they are drawn, where they end."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mod_star.decoding.sampling import BRANCHING, GREEDY, Sampling
from mod_star.decoding.think import NEVER, Think
from mod_star.decodings import Beam, Cot, Decoding, Greedy, SelfConsistency
from mod_star.errors import require


@dataclass(frozen=True)
class GenerationConfig:
    """How texts are generated: `complete`, `cot_decode`, `self_consistency`, `beam_search` and evaluation share it.

    None stands for what the decoding calls for, where that differs between them.

    Raises:
      InputError: a number is out of its range, or a stop string is empty.
    """

    new_tokens: int
    """The most tokens to generate in each row."""
    sampling: Sampling | None = None
    """How tokens are drawn. None: at temperature 1; for self-consistency 0.7. CoT-decoding and beam search choose
    tokens by a rule of their own and take none."""
    stop: tuple[str, ...] = ()
    """Strings that end a text, wherever their first and last character fall within tokens."""
    think: Think = NEVER
    """When to think before a token."""
    branches: int | None = None
    """Rows per prompt, which share its keys/values: branches, samples or beams. None: 1; for CoT-decoding and
    self-consistency 10, for beam search 4."""
    seed: int = 0
    """Of the draws. A row's draws depend on the seed and the row's number."""
    rows: int | None = None
    """The most rows of a batch, for any number of prompts. None: all prompts are one batch."""
    burst: int | None = None
    """Tokens per row between two looks at what is finished. None: 8 for `complete`, 16 in batches of `rows`, and for
    CoT-decoding and self-consistency 32 if there are stop strings."""

    branch_range: tuple[int, int] | None = None
    """Generate only branches [first, end) of the `branches` per prompt. They draw what they draw among all; with
    branches that start with tokens of their own it cannot be. None: all."""
    confidence: bool = False
    """Measure the confidence in each token, see `mod_star.decoding.confidence`; else `Generated` has none."""

    def __post_init__(self) -> None:
        require(not isinstance(self.stop, str), "stop", self.stop, "must be a tuple of texts")
        require(all(self.stop), "stop", tuple(self.stop), "must not be an empty string")
        require(self.branches is None or self.branches >= 1, "branches", self.branches, "must be at least 1")
        require(self.burst is None or self.burst >= 1, "burst", self.burst, "must be at least 1")
        require(self.rows is None or self.rows >= 1, "rows", self.rows, "must be at least 1")

        if self.branch_range is not None:
            fine = 0 <= self.branch_range[0] < self.branch_range[1] <= (self.branches or 1)
            require(fine, "branch_range", self.branch_range, f"must be a part of the {self.branches or 1} branches")
            fine = self.sampling is None or not self.sampling.branch
            require(fine, "branch_range", self.branch_range, "must be None for CoT-decoding")

    @property
    def numbers_of_branches(self) -> range:
        """The branches of a prompt that are generated; one if their number is left to the decoding."""
        return range(self.branches or 1) if self.branch_range is None else range(*self.branch_range)

    @property
    def rows_per_prompt(self) -> int:
        """How many these are."""
        return len(self.numbers_of_branches)

    @property
    def drawn(self) -> Sampling:
        """`sampling`, at temperature 1 if that is left to the decoding."""
        return Sampling() if self.sampling is None else self.sampling


def config_of(decoding: Decoding, new_tokens: int, **rest: Any) -> GenerationConfig:
    """The configuration that a decoding of the command line comes to.

    Args:
      decoding: says how tokens are chosen, and the rows per prompt.
      new_tokens: the most tokens of a row.
      **rest: the other fields of `GenerationConfig`.

    Raises:
      InputError: as for `GenerationConfig` and `Sampling`.
    """
    sampling: Sampling | None
    match decoding:
        case Greedy():
            sampling, branches = GREEDY, 1
        case Beam():
            sampling, branches = None, decoding.branches
        case Cot():
            sampling, branches = BRANCHING, decoding.branches
        case _:
            sampling = Sampling(decoding.temperature, decoding.top_k, decoding.top_p, decoding.min_p)
            branches = decoding.branches if isinstance(decoding, SelfConsistency) else 1
    return GenerationConfig(new_tokens, sampling, branches=branches, **rest)
