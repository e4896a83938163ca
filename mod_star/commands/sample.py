"""`mod-star sample`: generates text with a trained model."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from mod_star.commands import keep_compiled_programs, parse_options
from mod_star.errors import InputError, require

if TYPE_CHECKING:
    from mod_star.decoding import Completion, Sampling, Think
    from mod_star.training.run_dir import LoadedRun

DEFAULT_NEW_TOKENS = 200
OF_THINKING = ("entropies", "thoughts", "thought_texts", "mixing_weights")


@dataclass(frozen=True)
class SampleOptions:
    """Generates text with the model in RUN. Routed blocks decide causally, token by token, which tokens they compute.

    Examples:
      mod-star sample runs/first --prompt 'The import statement'
      mod-star sample runs/first --prompt Lists --prompt Strings --new-tokens 50 --temperature 0
      mod-star sample runs/first --prompt-file questions.txt --stop $'\\n' --json > answers.jsonl
      mod-star sample runs/thinking --prompt 'Q: 2 + 3 = ?' --think always

    The text goes to stdout, a line about it to stderr. Thoughts are shown dimmed and as ⟨thought⟩ before the token they
    led to, but only in a terminal.
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
    think: Literal["never", "always", "auto"] = "never"
    """Before which tokens a model that has learned to think thinks. auto: where it is unsure, by mod-star calibrate."""
    think_temperature: float = 0.0
    """Temperature of the thoughts; 0: always their most probable token."""
    show_thoughts: bool = False
    """Write thoughts into the text where it isn't a terminal, too."""
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
    from mod_star.decoding import Sampling, Think
    from mod_star.training.run_dir import load_run

    sampling = Sampling(options.temperature, options.top_k, options.top_p)
    Think("always", temperature=options.think_temperature)  # an error of this option is told first of all
    prompts = options.prompt or ("",) if options.prompt_file is None else _read_prompts(options.prompt_file)
    keep_compiled_programs()
    loaded = load_run(options.run, options.step)
    _sample(loaded, prompts, sampling, _think(loaded, options), options)


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


def _think(loaded: LoadedRun, options: SampleOptions) -> Think:
    """When to think. Raises InputError if the model hasn't learned to, or isn't calibrated."""
    from mod_star.calibration import read_calibration
    from mod_star.decoding import Think

    if options.think == "never":
        return Think()
    objective = loaded.config.train.objective
    can_think = "thinking" in loaded.params
    require(can_think, "--think", options.think, f"{options.run} can't, its train.objective is {objective}")
    if options.think == "always":
        return Think("always", temperature=options.think_temperature)
    calibration = read_calibration(options.run)
    if calibration is None:
        raise InputError(f"--think = 'auto': needs a threshold, run mod-star calibrate {options.run} first")
    if calibration.step != loaded.step:
        note = f"the threshold was calibrated at step {calibration.step}, this is step {loaded.step}"
        print(f"note: {note}: mod-star calibrate {options.run} renews it", file=sys.stderr)
    return Think("auto", calibration.threshold, calibration.share, options.think_temperature)


def _sample(
    loaded: LoadedRun, prompts: Sequence[str], sampling: Sampling, think: Think, options: SampleOptions
) -> None:
    import jax
    from rich.console import Console

    from mod_star.decoding import Generator, complete, encode_prompts

    decoder, tokenizer = loaded.decoder, loaded.tokenizer
    if options.headroom is not None:
        decoder = decoder.clone(routing=dataclasses.replace(decoder.routing, headroom=options.headroom))
    key, thinking = jax.random.key(options.seed), loaded.config.thinking
    generator = Generator(decoder, loaded.params, tokenizer.end_ids, key, thinking)
    encoded = encode_prompts(tokenizer, prompts)
    new_tokens = options.new_tokens
    if new_tokens is None:
        new_tokens = max(1, min(DEFAULT_NEW_TOKENS, decoder.config.context - max(map(len, encoded))))
    notes = Console(stderr=True, highlight=False, markup=False, soft_wrap=True, quiet=options.json)
    with notes.status("compiling"):
        generator.warm_up(encoded, new_tokens, sampling, think)
    began = time.perf_counter()
    bursts = complete(
        generator, tokenizer, prompts, new_tokens, sampling, seed=options.seed, stop=options.stop, think=think
    )
    show_thoughts = options.show_thoughts or sys.stdout.isatty()
    if len(prompts) == 1 and not options.json:
        completions = _stream(prompts[0], bursts, show_thoughts)
    else:
        with notes.status(f"generating from {len(prompts)} prompts"):
            *_, completions = bursts
    seconds = time.perf_counter() - began
    if options.json:
        for completion in completions:
            print(json.dumps(_record(completion, think)))
        return
    if len(prompts) > 1:
        for number, completion in enumerate(completions):
            _write("\n" * bool(number))
            _write(completion.prompt, dim=True)
            _Growing(show_thoughts).write(completion)
            _write("\n")
    sys.stdout.flush()
    notes.print(summary(completions, seconds), style="dim")


def _record(completion: Completion, think: Think) -> dict[str, Any]:
    """A completion as --json shows it."""
    left_out = {"starts", *(OF_THINKING if think.when == "never" else ())}
    return {name: value for name, value in dataclasses.asdict(completion).items() if name not in left_out}


def _stream(prompt: str, bursts: Iterator[list[Completion]], show_thoughts: bool) -> list[Completion]:
    """Writes one prompt and its text as it comes, and returns the last burst."""
    _write(prompt, dim=True)
    growing = _Growing(show_thoughts)
    completions: list[Completion] = []
    for completions in bursts:
        growing.write(completions[0])
        sys.stdout.flush()
    _write("\n")
    return completions


class _Growing:
    """Writes a text as it grows, a thought before the token that it led to if they are to be shown."""

    def __init__(self, show_thoughts: bool) -> None:
        self._show_thoughts = show_thoughts
        self._characters = self._tokens = 0  # written

    def write(self, completion: Completion) -> None:
        """Writes what is new."""
        from mod_star.terminal import visible

        if self._show_thoughts:
            thoughts = zip(completion.starts, completion.thought_texts, strict=False)  # no thoughts at all if never
            for start, thought in list(thoughts)[self._tokens :]:
                if start >= len(completion.text):  # nothing is shown of the token yet
                    break
                self._tokens += 1
                if thought is not None:
                    self._write_up_to(start, completion.text)
                    _write(f"⟨{visible(thought)}⟩", dim=True)
        self._write_up_to(len(completion.text), completion.text)

    def _write_up_to(self, end: int, text: str) -> None:
        _write(text[self._characters : end])
        self._characters = end


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
    if any(completion.entropies for completion in completions):
        thoughts = [thought for completion in completions for thought in completion.thoughts]
        parts.append(f"a thought before {sum(thought is not None for thought in thoughts) / tokens:.1%} of them")
    shares = [completion.routed_fraction for completion in completions]
    if shares[0]:
        means = (sum(block) / len(block) for block in zip(*shares, strict=True))
        parts.append(f"routed blocks computed {', '.join(f'{mean:.1%}' for mean in means)} of the tokens")
    if overflow := sum(completion.overflow for completion in completions):
        parts.append(f"{overflow} times a token passed by because a block's cache was full: raise --headroom")
    return " · ".join(parts)
