"""`mod-star sample`: generates text with a trained model."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from mod_star.commands import keep_compiled_programs, parse_options
from mod_star.errors import InputError, require

if TYPE_CHECKING:
    from mod_star.decoding import Completion, Sampling
    from mod_star.training.run_dir import LoadedRun

DEFAULT_NEW_TOKENS = 200


@dataclass(frozen=True)
class SampleOptions:
    """Generates text with the model in RUN. Routed blocks decide causally, token by token, which tokens they compute.

    Examples:
      mod-star sample runs/first --prompt 'The import statement'
      mod-star sample runs/first --prompt Lists --prompt Strings --new-tokens 50 --temperature 0
      mod-star sample runs/first --prompt-file questions.txt --stop $'\\n' --json > answers.jsonl

    The text goes to stdout, a line about it to stderr.
    """

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Directory of the run."""
    prompt: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="TEXT")] = ()
    """A text to go on from; several times for a batch of several. None: from nothing."""
    prompt_file: Path | None = None
    """A file of prompts, one a line, in UTF-8; blank lines don't count. FILE.jsonl: a JSON string per line."""
    new_tokens: int | None = None
    """Tokens to generate at the most. If not given 200, or as many as the context has room for."""
    temperature: float = 0.8
    """Below 1 sharpens the model's distribution, above 1 flattens it; 0: always the most probable token."""
    top_k: int = 0
    """Draw among the k most probable tokens only; 0: all."""
    top_p: float = 1.0
    """Draw among the most probable tokens that together have this probability; 1: all."""
    seed: int = 0
    """The same seed draws the same text."""
    stop: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="TEXT")] = ()
    """A string to end at, left out of the text; several times for several."""
    step: int | None = None
    """Step of the checkpoint to load. The newest if not given."""
    headroom: float | None = None
    """Slots of a routed block, as a multiple of its capacity, if not as in training (routing.headroom)."""
    json: bool = False
    """One JSON object per prompt and line: prompt, text, tokens, log_probs, finished (end, length, stop), ..."""


def run(argv: Sequence[str]) -> None:
    """Runs the command. Errors are `mod_star.cli`'s to show."""
    options = parse_options(SampleOptions, argv, "mod-star sample")
    require(0 <= options.seed < 2**32, "--seed", options.seed, "must lie in [0, 2^32)")
    require(all(options.stop), "--stop", "", "must not be empty")
    if options.prompt and options.prompt_file is not None:
        raise InputError("--prompt-file: give prompts either so or with --prompt, not both")

    # Only now, when the command line is known to be good: JAX takes seconds to import.
    from mod_star.decoding import Sampling
    from mod_star.training.run_dir import load_run

    sampling = Sampling(options.temperature, options.top_k, options.top_p)
    prompts = options.prompt or ("",) if options.prompt_file is None else _read_prompts(options.prompt_file)
    keep_compiled_programs()
    _sample(load_run(options.run, options.step), prompts, sampling, options)


def _read_prompts(path: Path) -> tuple[str, ...]:
    from mod_star.data.sources import read_text

    prompts = []
    for number, line in enumerate(read_text(str(path)).split("\n"), start=1):
        if not line.strip():
            continue
        if path.suffix.lower() != ".jsonl":
            prompts.append(line)
            continue
        try:
            prompt = json.loads(line)
        except ValueError as error:
            raise InputError(f"{path}, line {number}: not valid JSON ({error})") from None
        if not isinstance(prompt, str):
            raise InputError(f"{path}, line {number}: must be a JSON string")
        prompts.append(prompt)
    return tuple(prompts)


def _sample(loaded: LoadedRun, prompts: Sequence[str], sampling: Sampling, options: SampleOptions) -> None:
    import jax
    from rich.console import Console

    from mod_star.decoding import Generator, complete, encode_prompts

    decoder, tokenizer = loaded.decoder, loaded.tokenizer
    if options.headroom is not None:
        decoder = decoder.clone(routing=dataclasses.replace(decoder.routing, headroom=options.headroom))
    generator = Generator(decoder, loaded.params, (tokenizer.eos_id,), jax.random.key(options.seed))
    encoded = encode_prompts(tokenizer, prompts)
    new_tokens = options.new_tokens
    if new_tokens is None:
        new_tokens = max(1, min(DEFAULT_NEW_TOKENS, decoder.config.context - max(map(len, encoded))))
    notes = Console(stderr=True, highlight=False, markup=False, soft_wrap=True, quiet=options.json)
    with notes.status("compiling"):
        generator.warm_up(encoded, new_tokens, sampling)
    began = time.perf_counter()
    bursts = complete(generator, tokenizer, prompts, new_tokens, sampling, seed=options.seed, stop=options.stop)
    if len(prompts) == 1 and not options.json:
        completions = _stream(prompts[0], bursts)
    else:
        with notes.status(f"generating from {len(prompts)} prompts"):
            *_, completions = bursts
    seconds = time.perf_counter() - began
    if options.json:
        for completion in completions:
            print(json.dumps(dataclasses.asdict(completion)))
        return
    if len(prompts) > 1:
        for number, completion in enumerate(completions):
            _write("\n" * bool(number))
            _write(completion.prompt, dim=True)
            _write(f"{completion.text}\n")
    sys.stdout.flush()
    notes.print(summary(completions, seconds), style="dim")


def _stream(prompt: str, bursts: Iterator[list[Completion]]) -> list[Completion]:
    """Writes one prompt and its text as it comes, and returns the last burst."""
    _write(prompt, dim=True)
    shown = 0
    completions: list[Completion] = []
    for completions in bursts:
        text = completions[0].text
        _write(text[shown:])
        sys.stdout.flush()
        shown = len(text)
    _write("\n")
    return completions


def _write(text: str, dim: bool = False) -> None:
    """Writes to stdout; on a terminal without the control characters that a model may come up with."""
    if sys.stdout.isatty():
        text = "".join(c if c.isprintable() or c in "\n\t" else "·" for c in text)
        text = f"\x1b[2m{text}\x1b[22m" if dim and text else text
    sys.stdout.write(text)


def summary(completions: Sequence[Completion], seconds: float) -> str:
    """One line about a batch: how much was generated and how fast, and what routed blocks computed."""
    tokens = sum(len(completion.tokens) for completion in completions)
    parts = [f"{tokens} tokens", f"{tokens / seconds:,.0f} tokens/s"]
    shares = [completion.routed_fraction for completion in completions]
    if shares[0]:
        means = (sum(block) / len(block) for block in zip(*shares, strict=True))
        parts.append(f"routed blocks computed {', '.join(f'{mean:.1%}' for mean in means)} of the tokens")
    if overflow := sum(completion.overflow for completion in completions):
        parts.append(f"{overflow} times a token passed by because a block's cache was full: raise --headroom")
    return " · ".join(parts)
