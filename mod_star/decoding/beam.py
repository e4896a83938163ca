"""Beam search: the most probable texts, as far as a beam of a few candidates finds them.

The beams of a prompt are branches that share its keys/values; what is generated moves with `reorder`. Without stop
strings the whole search is one program; with them the host looks at the text after every token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

from mod_star.decoding import beam_rules
from mod_star.decoding.beam_rules import Hypothesis, Rules, Search
from mod_star.decoding.generate import Generator
from mod_star.decoding.generation_config import GenerationConfig
from mod_star.decoding.state import DecodeState
from mod_star.decoding.text import Completion, StopWatch, completion_of, encode_prompts
from mod_star.decoding.think import NEVER, Think
from mod_star.decodings import Beam
from mod_star.distributed.sharding import use_mesh
from mod_star.errors import require


class BeamSearch:
    """Beam search with one model. Compiles once per (number of prompts, prompt length, room), all rounded up as for the
    generator, and for all generators of equal networks.

    In each step every beam may end, which makes it a candidate for the W best ended texts, and the W most probable
    continuations that don't end go on. A continuation that completes a stop string ends there, too: of the 2W most
    probable ones those that do are ended texts, the best W of the others go on. Ended texts and those that the limit
    cut are ranked together. The search is over as soon as no beam can overtake the W-th best ended text of its prompt.

    Args:
      generator: the model.
      beams: W, per prompt.
      length_penalty: texts are ranked by log-probability over length to this power, the end token and the tokens of a
        stop string counted; 0: by log-probability, 1: by its mean per token.
      think: when to think; probabilities are then the mixed ones.

    Raises:
      InputError: no beam or more than the vocabulary has tokens, or a negative or infinite length penalty.
    """

    def __init__(
        self,
        generator: Generator,
        beams: int = Beam.branches,
        length_penalty: float = Beam.length_penalty,
        think: Think = NEVER,
    ) -> None:
        check_beams(beams, length_penalty)
        V = generator.decoder.config.vocab_size
        require(beams <= V, "beams", beams, f"must be at most the vocabulary, {V}")
        generator.require_thinking(think)
        self._generator, self._width = generator, beams
        self._data = np.float32(think.threshold or 0.0), generator.routing_key
        ends = tuple(end for end in generator.end_ids if 0 <= end < V)
        self._rules = Rules(generator.decoder, generator.thinking, replace(think, threshold=0.0), ends, length_penalty)

    def search(
        self, prompts: Sequence[Sequence[int]], new_tokens: int, watches: Sequence[StopWatch] = (), seed: int = 0
    ) -> list[list[Hypothesis]]:
        """The best texts of each prompt, best first: W of them, or fewer if there aren't more.

        Args:
          prompts: token ids.
          new_tokens: the most tokens of a text.
          watches: one for each prompt, to end texts at stop strings; none: there are no stop strings.
          seed: of the thoughts' draws.

        Raises:
          InputError: as for `Generator.start`.
        """
        W = self._width
        state = self._generator.start(prompts, GenerationConfig(new_tokens, branches=W, seed=seed))
        with use_mesh(self._generator.mesh):
            if watches:
                search = self._run_watched(state, watches)
            else:
                search = beam_rules.run_search(self._rules, W, self._generator.params, state, *self._data)
        return self._rules.hypotheses(search, new_tokens)

    def _run_watched(self, state: DecodeState, watches: Sequence[StopWatch]) -> Search:
        """The search token by token, so that the host can tell which texts have come to a stop string."""
        W, params, rules = self._width, self._generator.params, self._rules
        threshold, routing_key = self._data
        count = min(2 * W, W * rules.decoder.config.vocab_size)
        watched = [[watch] * W for watch in watches]
        search = beam_rules.begin(rules, W, state)
        while bool(beam_rules.is_unfinished(rules, search)):
            search, candidates = beam_rules.propose(rules, count, params, search, threshold)
            totals, beams, tokens = jax.device_get(
                (candidates.totals_QxK, candidates.beams_QxK, candidates.tokens_QxK)
            )  # fmt: skip
            stopped_QxK = np.zeros(totals.shape, bool)
            picks_QxW = np.full((totals.shape[0], W), -1, np.int32)  # none of prompts that only fill up the batch
            for q, of_prompt in enumerate(watched):
                going_on: list[StopWatch] = []
                for k in np.flatnonzero(totals[q] > -math.inf):
                    after = of_prompt[beams[q, k]].after(int(tokens[q, k]))
                    stopped_QxK[q, k] = after.stopped
                    if not after.stopped and len(going_on) < W:
                        picks_QxW[q, len(going_on)] = k
                        going_on.append(after)
                watched[q] = going_on + of_prompt[:1] * (W - len(going_on))
            if stopped_QxK.any():
                search = beam_rules.end_stopped(rules, search, candidates, jnp.asarray(stopped_QxK))
            search = beam_rules.go_on(rules, params, search, candidates, jnp.asarray(picks_QxW), routing_key)
        return search


def check_beams(beams: int, length_penalty: float) -> None:
    """Raises InputError for a beam search that can't be."""
    require(beams >= 1, "beams", beams, "must be at least 1")
    possible = length_penalty >= 0 and math.isfinite(length_penalty)
    require(possible, "length_penalty", length_penalty, "must be at least 0 and finite")


def beam_search(
    generator: Generator,
    prompts: Sequence[str],
    config: GenerationConfig,
    *,
    length_penalty: float = Beam.length_penalty,
    encoded: Sequence[Sequence[int]] | None = None,
) -> list[list[Completion]]:
    """Beam search from text to text, all prompts in one batch; see `BeamSearch`.

    Args:
      generator: the model.
      prompts: the texts to go on from.
      config: at most so many tokens of a text, `branches` beams (4 if not given), when to think, and stop strings. What
        a text has said up to a stop string is its score, the stop string included. Its `sampling` is left out.
      length_penalty: see `BeamSearch`.
      encoded: the prompts' token ids, if they are not what `encode_prompts` makes of them.

    Returns:
      For each prompt the best texts, best first, without what routed blocks and thoughts were.

    Raises:
      InputError: a way of sampling, a batch size, a range of branches or confidence is asked for, or as for
        `BeamSearch` and `Generator.start`.
    """
    require(config.sampling is None, "sampling", config.sampling, "must be left out: beam search draws nothing")
    require(config.rows is None, "rows", config.rows, "must be left out: beam search runs all prompts in one batch")
    require(not config.confidence, "confidence", True, "must be False: beam search measures none")
    require(config.branch_range is None, "branch_range", config.branch_range, "must be None for beam search")
    tokenizer, beams = generator.tokenizer, Beam.branches if config.branches is None else config.branches
    ids = encode_prompts(tokenizer, prompts) if encoded is None else encoded
    watches = [StopWatch(tokenizer, prompt, config.stop) for prompt in prompts] if config.stop else []
    search = BeamSearch(generator, beams, length_penalty, config.think)
    return [
        [completion_of(tokenizer, prompt, each.generated(), config.new_tokens, config.stop) for each in hypotheses]
        for prompt, hypotheses in zip(prompts, search.search(ids, config.new_tokens, watches, config.seed), strict=True)
    ]
