"""Runs as models of EleutherAI's lm-evaluation-harness (https://github.com/EleutherAI/lm-evaluation-harness).

    mod-star harness --model mod_star --model_args run=runs/smollm2 --tasks arc_easy,gsm8k --batch_size 16

is `lm_eval` with `mod_star` among its models: version 0.4 has no way to find models of other packages by itself. In
Python, `register()` does it: then `lm_eval.simple_evaluate(model="mod_star", model_args="run=runs/smollm2")`.

Needs the extra: `pip install "mod-star[harness]"`. `lm_eval` is imported by `register` and by nothing else.
"""

from __future__ import annotations

import functools
import importlib
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from mod_star.config import MeshConfig
from mod_star.decoding import GenerationConfig, Generator, Sampling
from mod_star.decoding.text import complete_many
from mod_star.distributed.sharding import make_small_mesh
from mod_star.errors import InputError, require
from mod_star.evaluation.scoring import ScoringConfig, require_shareable, score_rolling, score_stream, shares_of
from mod_star.inspection.calibration import chosen_think
from mod_star.inspection.routing_calibration import with_causal_rule
from mod_star.runs.directory import load_run
from mod_star.tokenization.tokenizers import begin

Request = tuple[tuple[str, str], list[int], list[int]]
"""Context and continuation as text, and their token ids."""

LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""Names of the most new tokens in generation_kwargs; the first that is there counts."""
DRAWS = ("do_sample", "temperature", "top_k", "top_p", "min_p")
ONE_VALUE: dict[str, float] = {
    "num_beams": 1, "num_beam_groups": 1, "num_return_sequences": 1, "n": 1, "best_of": 1, "diversity_penalty": 0,
    "repetition_penalty": 1, "encoder_repetition_penalty": 1, "presence_penalty": 0, "frequency_penalty": 0,
    "no_repeat_ngram_size": 0, "encoder_no_repeat_ngram_size": 0, "penalty_alpha": 0, "min_length": 0,
    "min_new_tokens": 0, "min_tokens": 0,
}  # fmt: skip
"""Options of transformers and vLLM whose value that changes nothing is taken; we have nothing for the others."""
OF_DRAWS: dict[str, float] = {"typical_p": 1, "epsilon_cutoff": 0, "eta_cutoff": 0}
"""The same of options that only draws ask for: where nothing is drawn any value changes nothing."""
WITHOUT_EFFECT = ("use_cache", "pad_token_id", "length_penalty", "early_stopping")
"""Options that change no text of a single beam."""
_log = logging.getLogger(__name__)


@functools.cache
def register() -> type:
    """Makes `mod_star` a model of lm_eval. Returns its class: `HarnessModel` as a subclass of lm_eval's `TemplateLM`.

    Raises:
      InputError: lm_eval is not installed.
    """
    try:
        model, registry = (importlib.import_module(f"lm_eval.api.{name}") for name in ("model", "registry"))
    except ModuleNotFoundError as error:
        missing = (error.name or "lm_eval").partition(".")[0]
        raise InputError(f"{missing} is not installed: pip install 'mod-star[harness]'") from None
    adapter = type("ModStarLM", (HarnessModel, model.TemplateLM), {"__doc__": HarnessModel.__doc__})
    registry.register_model("mod_star")(adapter)
    return adapter


class HarnessModel:
    """A run as the harness sees it. The arguments are what `--model_args` gives, `batch_size` apart.

    Args:
      run: directory of the run.
      step: of the checkpoint; the newest by default.
      think: never, always, or auto (above the threshold of `mod-star calibrate`): before scored and generated tokens.
      think_temperature: of the draws of thought tokens; 0: greedy.
      max_length: most tokens of a text; by default the model's context, and never more.
      max_gen_toks: most new tokens where a task doesn't say.
      overlap: tokens before it that each token of a long text sees at least, see `rolling_windows`.
      seed: of draws.
      mesh_data: copies of the model, each with its own texts; 0: as many as there are devices left for.
      mesh_fsdp: devices that the parameters of a copy are cut up among; they have their own texts too.
      mesh_tensor: devices that every matrix product is cut up among.
      batch_size: texts at a time, a multiple of mesh_data x mesh_fsdp; auto: 8, or the next such multiple.
      max_batch_size: is ignored.
      device: is ignored; JAX chooses it, see `JAX_PLATFORMS`.

    Raises:
      InputError: an argument is out of its range; the run can't be loaded, or can't think; the mesh doesn't fit.
    """

    cache_hook: Any
    """The harness's, to keep results as they come (`--use_cache`)."""

    def __init__(
        self,
        run: str,
        step: int | None = None,
        think: str = "never",
        think_temperature: float = 0.0,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        overlap: int = 1,
        seed: int = 0,
        mesh_data: int = 1,
        mesh_fsdp: int = 1,
        mesh_tensor: int = 1,
        batch_size: int | str = 8,
        capacity: float | None = None,
        causal_rule: str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
    ) -> None:
        super().__init__()
        del max_batch_size, device
        mesh = make_small_mesh(MeshConfig(mesh_data, mesh_fsdp, mesh_tensor))
        is_auto, shares = str(batch_size).startswith("auto"), shares_of(mesh)
        size = -(-8 // shares) * shares if is_auto else batch_size
        allowed = "must be a positive integer or auto"
        require(str(size).isdecimal() and int(size) >= 1, "batch_size", batch_size, allowed)
        require_shareable("batch_size", int(size), mesh)
        require(isinstance(seed, int) and 0 <= seed < 2**32, "seed", seed, "must lie in [0, 2^32)")
        self._batch_size, self._seed, self._overlap, self._max_gen_toks = int(size), seed, overlap, max_gen_toks
        loaded = load_run(run, step, "step", mesh, capacity)
        loaded = with_causal_rule(loaded, Path(run), causal_rule, "causal_rule", _log.warning)
        self._model = loaded.model
        self.tokenizer = self._model.tokenizer
        self._think = chosen_think(loaded, Path(run), think, think_temperature, "think", _log.warning)
        context = self._model.decoder.config.context
        self._max_length = context if max_length is None else max_length
        require(2 <= self._max_length <= context, "max_length", max_length, f"must lie in [2, {context}], the context")
        require(1 <= overlap <= self._max_length, "overlap", overlap, f"must lie in [1, {self._max_length}]")
        self._generator: Generator | None = None

    @property
    def eot_token_id(self) -> int:
        """Id that ends a text."""
        return self.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """Id that a text without a prefix is predicted from."""
        return self.tokenizer.bos_id

    @property
    def batch_size(self) -> int:
        """Texts at a time; for the harness's report."""
        return self._batch_size

    @property
    def max_length(self) -> int:
        """Most tokens of a text."""
        return self._max_length

    @property
    def max_gen_toks(self) -> int:
        """Most new tokens where a task doesn't say."""
        return self._max_gen_toks

    @property
    def tokenizer_name(self) -> str:
        """Tells this tokenizer from others in the harness's cache of requests."""
        return self.tokenizer.fingerprint.replace(" ", "-")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids; with bos first where the model's texts begin with it, unless `add_special_tokens` is False."""
        return self.tokenizer.encode(string) if add_special_tokens is False else begin(self.tokenizer, string)

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Ids of a context (the harness's word) and of its continuation. White space goes with the continuation."""
        if context.strip():
            ids: tuple[list[int], list[int]] = super()._encode_pair(context, continuation)  # type: ignore[misc]
            return ids
        # The harness takes as many tokens off the whole text as the empty context has: bos, which is missing.
        after = self.tok_encode(context + continuation, add_special_tokens=False)
        return [self.prefix_token_id], after[1:] if after[:1] == [self.prefix_token_id] else after

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The source of the template, for the harness's report."""
        if chat_template is False or chat_template is None:
            return None
        if isinstance(chat_template, str):
            raise InputError(f"apply_chat_template = {chat_template!r}: must be without a name: a run has one template")
        return self.tokenizer.chat_template

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Messages as the prompt for the next turn; without that prompt, as one that goes on with the last message.

        Raises:
          InputError: there is no template, or it fails; or the last message is not the assistant's.
        """
        if add_generation_prompt:
            return self.tokenizer.apply_chat(chat_history)
        last = chat_history[-1] if chat_history else {}
        if last.get("role") != "assistant":
            raise InputError("chat: the last message must be the assistant's to go on with it")
        return self.tokenizer.apply_chat(chat_history[:-1]) + last["content"]

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation in nats, and whether greedy decoding gives it. Cuts long prefixes."""
        window = self._max_length
        self._tell_of_cuts(len(before) + len(after) - 1 for _, before, after in requests)
        pairs = [(before[-max(1, window + 1 - len(after)) :], after) for _, before, after in requests]
        results: dict[int, tuple[float, bool]] = {}
        with _Bar("log-likelihoods", len(pairs), disable_tqdm) as bar:
            for index, scored in score_stream(self._model, pairs, self._scoring):
                results[index] = (sum(scored.log_probs), all(scored.is_greedy))
                self.cache_hook.add_partial("loglikelihood", requests[index][0], results[index])
                bar.show(len(results))
        return [results[index] for index in range(len(pairs))]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts in nats, each token given what fits before it into the model's context."""
        texts = [self.tok_encode(request.args[0], add_special_tokens=False) for request in requests]
        with _Bar("windows of long texts", None, disable_tqdm) as bar:
            scores = score_rolling(
                self._model, texts, self.prefix_token_id, self._scoring, window=self._max_length,
                overlap=self._overlap, progress=bar.show,
            )  # fmt: skip
        results = [sum(scored.log_probs) for scored in scores]
        for request, result in zip(requests, results, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, result)
        return results

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """What the model goes on with, up to a stop string, an end token or the limit. Cuts long prompts."""
        groups: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(index)
        options = [generation_options(requests[indices[0]].args[1], self._max_gen_toks) for indices in groups.values()]
        for _, new_tokens, _ in options:  # of all of them, before hours go into the first
            allowed = f"must be below the longest text, {self._max_length} tokens"
            require(new_tokens < self._max_length, "max_gen_toks", new_tokens, allowed)
        results = [""] * len(requests)
        done = 0
        with _Bar("texts", len(requests), disable_tqdm) as bar:
            for indices, (stop, new_tokens, sampling) in zip(groups.values(), options, strict=True):
                request_options = requests[indices[0]].args[1]
                room = self._max_length - new_tokens
                prompts = [requests[index].args[0] for index in indices]
                encoded = [self.tok_encode(prompt) for prompt in prompts]
                self._tell_of_cuts(len(ids) + new_tokens for ids in encoded)
                config = GenerationConfig(
                    new_tokens, sampling, tuple(stop), self._think, seed=self._seed, rows=self._batch_size
                )
                completions = complete_many(self._get_generator(), prompts, config, [ids[-room:] for ids in encoded])
                for number, (completion,) in completions:
                    results[indices[number]] = completion.text
                    self.cache_hook.add_partial("generate_until", (prompts[number], request_options), completion.text)
                    done += 1
                    bar.show(done)
        return results

    @property
    def _scoring(self) -> ScoringConfig:
        """What all scoring has in common."""
        return ScoringConfig(self._think, self._batch_size, self._seed)

    def _get_generator(self) -> Generator:
        if self._generator is None:
            self._generator = Generator(self._model)
        return self._generator

    def _tell_of_cuts(self, lengths: Any) -> None:
        if cut := sum(length > self._max_length for length in lengths):
            _log.warning("%d of the texts are longer than %d tokens: cut from the left", cut, self._max_length)


def generation_options(options: Mapping[str, Any], max_gen_toks: int) -> tuple[list[str], int, Sampling]:
    """Stop strings, most new tokens and way of drawing from a task's `generation_kwargs`.

    do_sample false is greedy whatever the temperature; without do_sample a temperature above 0 samples; with it the
    temperature is 1 if none is given. An option that is None is not given.

    Raises:
      InputError: an option that is not known, or its value is out of its range or asks for what we don't have.
    """
    options = {name: value for name, value in options.items() if value is not None}
    known = ("until", *LENGTHS, *DRAWS)
    fixed = {name: value for name, value in (ONE_VALUE | OF_DRAWS).items() if name in options}
    if odd := [name for name in options if name not in (*known, *fixed, *WITHOUT_EFFECT)]:
        raise InputError(f"generation_kwargs.{odd[0]} = {options[odd[0]]!r}: unknown; there are {', '.join(known)}")
    until = options.get("until") or []
    stop = [until] if isinstance(until, str) else list(until)
    fine = all(isinstance(text, str) and text for text in stop)
    require(fine, "generation_kwargs.until", until, "must be texts that are not empty")
    named = next((name for name in LENGTHS if name in options), "max_gen_toks")
    length = options.get(named, max_gen_toks)
    fine = isinstance(length, int) and not isinstance(length, bool) and length >= 1
    require(fine, f"generation_kwargs.{named}", length, "must be a positive integer")
    do_sample = options.get("do_sample")
    require(do_sample in (None, True, False), "generation_kwargs.do_sample", do_sample, "must be true or false")
    for name in DRAWS[1:]:
        _require_number(name, options.get(name, 0))
    temperature = float(options.get("temperature", 1.0 if do_sample else 0.0))
    greedy = (do_sample is not None and not do_sample) or temperature == 0
    for name, value in fixed.items():
        _require_number(name, options[name])
        if not (greedy and name in OF_DRAWS):
            require(options[name] == value, f"generation_kwargs.{name}", options[name], f"must be {value}")
    if greedy:
        return stop, length, Sampling(temperature=0)
    top_k = int(options.get("top_k", 0))
    top_k = 0 if top_k == -1 else top_k  # as vLLM calls all tokens
    top_p, min_p = float(options.get("top_p", 1.0)), float(options.get("min_p", 0.0))
    return stop, length, Sampling(temperature, top_k, top_p, min_p)


def _require_number(name: str, value: Any) -> None:
    fine = isinstance(value, int | float) and not isinstance(value, bool)
    require(fine, f"generation_kwargs.{name}", value, "must be a number")


class _Bar(Progress):
    """A progress bar on stderr, where the harness has its own."""

    def __init__(self, what: str, total: int | None, hidden: bool) -> None:
        super().__init__(*Progress.get_default_columns(), console=Console(stderr=True), disable=hidden)
        self._shown = self.add_task(what, total=total)

    def show(self, done: int, total: int | None = None) -> None:
        """Shows how much is done, and of how much if that has become known."""
        self.update(self._shown, completed=done, total=total)
