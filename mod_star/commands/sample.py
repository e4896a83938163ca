"""`mod-star sample`: generates text with a trained model."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol

import tyro

from mod_star.commands import keep_compiled_programs, on_working_copy, parse_options
from mod_star.config import MeshConfig
from mod_star.decodings import (
    DECODINGS,
    FIELDS,
    WINDOW,
    Decoding,
    DecodingName,
    chosen_decoding,
    decodings_with,
    require_decoding,
)
from mod_star.errors import InputError, require
from mod_star.views.sample import completion_record, summary, write_completions, write_stream

if TYPE_CHECKING:
    from mod_star.commands.sample_branches import Answering, BeamTexts
    from mod_star.decoding import Think
    from mod_star.model import Decoder
    from mod_star.runs.directory import LoadedRun

DEFAULT_NEW_TOKENS = 200


@dataclass(frozen=True)
class SampleOptions:
    """Generates text with the model in RUN. Routed blocks decide causally, token by token, which tokens they compute.

    Examples:
      mod-star sample runs/first --prompt 'The import statement'
      mod-star sample runs/first --prompt Lists --prompt Strings --new-tokens 50 --temperature 0
      mod-star sample runs/first --prompt-file questions.txt --stop $'\\n' --json > answers.jsonl
      mod-star sample runs/thinking --prompt 'Q: 2 + 3 = ?' --think always
      mod-star sample runs/smollm2 --chat --prompt 'What is 17 + 25?' --decoding cot --branches 10 --show-branches

    Decodings: greedy takes the most probable token each time, temperature draws (with --top-k, --top-p,
    --min-p, in this order), beam searches for the most probable text. self-consistency draws several texts and answers
    with the majority. cot branches on the most probable first tokens, goes on greedily, and answers with the branch
    whose answer has the largest margin over what else the model could have said (Δ). The last two write the text that
    won, or with --show-branches a table of all.

    The text goes to stdout, a line about it to stderr. Thoughts are shown dimmed and as ⟨thought⟩ before the token they
    led to, but only in a terminal.
    """

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Directory of the run."""
    prompt: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="TEXT")] = ()
    """A text to go on from; several times for a batch of several. None: from nothing."""
    prompt_file: Path | None = None
    """A file of prompts, one a line, in UTF-8; blank lines do not count. FILE.jsonl: a JSON string per line;
    FILE.json: a list of strings."""
    new_tokens: int | None = None
    """The most tokens to generate. If not given 200, or as many as the context has room for."""
    chat: bool = False
    """Put each prompt to the model as a user's message, by the chat template that its tokenizer comes with."""
    decoding: DecodingName = "temperature"
    """How the text is chosen, see above."""
    temperature: float | None = None
    """Below 1 sharpens the model's distribution, above 1 flattens it; 0: always the most probable token. 0.8 if not
    given, for self-consistency 0.7."""
    top_k: int = 0
    """Draw among the k most probable tokens only; 0: all."""
    top_p: float = 1.0
    """Draw among the most probable tokens that together have this probability; 1: all."""
    min_p: float = 0.0
    """Draw among the tokens that are at least this many times as probable as the most probable one; 0: all."""
    branches: int | None = None
    """Branches of cot, samples of self-consistency, beams of beam, for each prompt. 10 if not given, for beam 4."""
    show_branches: bool = False
    """Write a table of all branches instead of the text that won."""
    answer: str | None = None
    """What cot and self-consistency look for: number, yes-no, even-odd, letters (A to E), text (any words, as a
    continuation gives them), gsm8k-strict or gsm8k-flexible (numbers by the rules of lm-evaluation-harness), options
    with commas between them, such as red,green, or FILE.py:NAME, a function of your own from a text to the start and
    end of its answer, or None. What follows "the answer is" in a branch is its answer, or else the
    last one. number if not given."""
    continuation: str | None = None
    """Continue every branch with this, such as 'So the answer is', and take the answer that the model gives then, at
    the last place in the branch where it stands. 'So the answer is' if not given with --answer text, else none."""
    ranking: str | None = None
    """What cot ranks branches by: delta, log-prob, normalised-log-prob, mean-confidence, lowest-group, bottom-groups,
    tail-confidence, self-certainty (how sure the model is along the whole branch), p-true (what it says when asked), or
    FILE.py:NAME, a function of your own from a branch to a number. delta if not given: how sure it is of the answer.
    With self-consistency, what votes are weighed by; if not given all are equal."""
    vote_temperature: float | None = None
    """Weigh a branch by exp(score / temperature), where answers are added up. If not given by what belongs to the
    ranking: the score itself, or the probability."""
    keep: float = 1.0
    """Share of the branches with an answer, the highest ranked ones, that count at all."""
    early_stop: int | None = None
    """self-consistency: after this many samples the others stop where their confidence in a group of tokens falls below
    the threshold that the first ones set: --keep is the share of those that reach it. Where votes are equal, all
    samples also stop when the majority is decided; 0: only then."""
    window: int = WINDOW
    """Tokens of a group of lowest-group, bottom-groups, tail-confidence and --early-stop."""
    aggregate: bool = False
    """Write the text of cot's aggregated answer, that with the largest sum over branches; else of the best branch."""
    skip_first: bool = False
    """Leave the token that cot branched on out of Δ where it is part of the answer."""
    length_penalty: float | None = None
    """Beam search ranks by log-probability over length to this power. 1 if not given, as in transformers and vLLM; 0:
    the log-probability itself."""
    seed: int = 0
    """The same seed draws the same text."""
    stop: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="TEXT")] = ()
    """A string to end at, left out of the text; several times for several."""
    step: int | None = None
    """Step of the checkpoint to load. The newest if not given."""
    capacity: float | None = None
    """One of the model's routing.budgets to use it at. Its routing.capacity if not given."""
    causal_rule: Literal["threshold"] | None = None
    """threshold: routed blocks compute a token if its router score is above the threshold that mod-star calibrate
    chose for the capacity. If not given by the rule that was trained (routing.causal_rule)."""
    headroom: float | None = None
    """Slots of a routed block, as a multiple of its capacity, if not as in training (routing.headroom)."""
    decoded_rows: Literal["all", "fixed"] | None = None
    """Rows that a routed block computes for a token of a batch, if not as in training (routing.decoded_rows). fixed: a
    number that does not depend on data, for GPUs; where more are routed, some pass by."""
    think: Literal["never", "always", "auto"] = "never"
    """Before which tokens a model that has learned to think thinks. auto: where it is unsure, by mod-star calibrate."""
    think_temperature: float = 0.0
    """Temperature of the thoughts; 0: always their most probable token."""
    show_thoughts: bool = False
    """Write thoughts into the text where it is not a terminal, too."""
    weights: Literal["int8"] | None = None
    """int8: quantise the weights of matrix products when loading, embedding and LM head included, with a scale for
    each output and 64 inputs. Decoding reads and holds 27 % of float32 then. If not given in the model's own type."""
    mesh: MeshConfig = field(default_factory=lambda: MeshConfig(data=1))
    """Devices to use, for a model that is too large for one or for many prompts; a single one if not given."""
    json: bool = False
    """One JSON object per prompt and line: prompt, text, tokens, log_probs, finished (end, length, stop), ..."""


def run(argv: Sequence[str]) -> None:
    """Runs the command. Errors are `mod_star.cli`'s to show."""
    with on_working_copy(parse_options(SampleOptions, argv, "mod-star sample")) as options:
        _run(options)


def _run(options: SampleOptions) -> None:
    decoding = _checked(options)

    # Only now, when the command line is known to be good: JAX takes seconds to import.
    from mod_star.commands.sample_branches import ways_to_answer
    from mod_star.decoding import Think
    from mod_star.decoding.generation_config import config_of
    from mod_star.distributed.sharding import make_small_mesh
    from mod_star.runs.directory import load_run

    config_of(decoding, 1)  # an error of these options is told first of all
    Think("always", temperature=options.think_temperature)
    answering = ways_to_answer(options, decoding)
    prompts = options.prompt or ("",) if options.prompt_file is None else _read_prompts(options.prompt_file)
    keep_compiled_programs()
    mesh = make_small_mesh(options.mesh)
    # A rule of thresholds takes the place of parameters, which then must be there.
    loaded = load_run(
        options.run, options.step, mesh=mesh, capacity=options.capacity, weights=options.weights,
        on_disk=options.causal_rule is None,
    )  # fmt: skip
    loaded = with_chosen_rule(loaded, options)
    think = chosen_think(loaded, options)
    _sample(loaded, prompts, decoding, think, options, answering)


def _checked(options: SampleOptions) -> Decoding:
    """The decoding. Raises InputError for options that can't be, or not together; without JAX."""
    require(0 <= options.seed < 2**32, "--seed", options.seed, "must lie in [0, 2^32)")
    require(all(options.stop), "--stop", "", "must not be empty")
    if options.prompt and options.prompt_file is not None:
        raise InputError("--prompt-file: give either --prompt or --prompt-file")
    defaults = {each.name: each.default for each in dataclasses.fields(SampleOptions)}
    values = {name: getattr(options, name) for name in FIELDS}
    decoding = chosen_decoding(
        options.decoding, {name: value for name, value in values.items() if value != defaults[name]}
    )
    of_several_texts = decodings_with("branches")
    if options.show_branches:
        require_decoding(options.decoding, "show_branches", of_several_texts)
    if options.aggregate and options.show_branches:
        raise InputError(
            "--aggregate: cannot be combined with --show-branches, whose table shows the aggregated answer too"
        )
    if options.show_thoughts:
        others = [name for name in DECODINGS if name not in of_several_texts]
        require_decoding(options.decoding, "show_thoughts", others)
    return decoding


def _read_prompts(path: Path) -> tuple[str, ...]:
    from mod_star.data.files import holds_records, read_records, read_text

    if not holds_records(str(path)):
        return tuple(line for line in read_text(str(path)).split("\n") if line.strip())
    prompts = []
    for prompt, where in read_records(str(path)):
        if not isinstance(prompt, str):
            raise InputError(f"{where}: must be a JSON string")
        prompts.append(prompt)
    return tuple(prompts)


class ThinkOptions(Protocol):
    """The options about thinking, as commands that generate have them."""

    @property
    def run(self) -> Path:
        """Directory of the run."""

    @property
    def think(self) -> Literal["never", "always", "auto"]:
        """When to think."""

    @property
    def think_temperature(self) -> float:
        """Temperature of thoughts."""


def chosen_think(loaded: LoadedRun, options: ThinkOptions) -> Think:
    """When to think. Raises InputError if the model hasn't learned to, or isn't calibrated."""
    if options.think == "never":  # what calibrates is not imported: it reads data, which takes a second
        from mod_star.decoding import Think

        return Think()
    from mod_star.inspection import calibration

    def tell(note: str) -> None:
        print(f"note: {note}", file=sys.stderr)

    return calibration.chosen_think(loaded, options.run, options.think, options.think_temperature, "--think", tell)


class RoutingOptions(Protocol):
    """The options that change how a model routes while decoding; None: as it was trained."""

    @property
    def headroom(self) -> float | None:
        """In place of routing.headroom."""

    @property
    def decoded_rows(self) -> Literal["all", "fixed"] | None:
        """In place of routing.decoded_rows."""


def with_options_of_routing(decoder: Decoder, options: RoutingOptions) -> Decoder:
    """The decoder as these options have it."""
    given = {"headroom": options.headroom, "decoded_rows": options.decoded_rows}
    changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    return decoder.clone(routing=dataclasses.replace(decoder.routing, **changes))


class RuleOptions(Protocol):
    """The options about the causal rule, as commands that use a model have them."""

    @property
    def run(self) -> Path:
        """Directory of the run."""

    @property
    def causal_rule(self) -> Literal["threshold"] | None:
        """The rule instead of the trained one."""


def with_chosen_rule(loaded: LoadedRun, options: RuleOptions) -> LoadedRun:
    """The model with the causal rule that was chosen. Raises InputError if it cannot have it, or isn't calibrated."""
    if options.causal_rule is None:  # what calibrates is not imported: Orbax and Grain take a second and 35 MB
        return loaded

    from mod_star.inspection.routing_calibration import with_causal_rule

    def tell(note: str) -> None:
        print(f"note: {note}", file=sys.stderr)

    return with_causal_rule(loaded, options.run, options.causal_rule, "--causal-rule", tell)


def _sample(
    loaded: LoadedRun,
    prompts: Sequence[str],
    decoding: Decoding,
    think: Think,
    options: SampleOptions,
    answering: Answering | BeamTexts | None,
) -> None:
    import jax
    from rich.console import Console

    from mod_star.decoding import Generator, complete, encode_prompts
    from mod_star.decoding.generation_config import config_of

    decoder, tokenizer = with_options_of_routing(loaded.decoder, options), loaded.tokenizer
    model = dataclasses.replace(loaded.model, decoder=decoder, routing_key=jax.random.key(options.seed))
    generator = Generator(model, donate=True)  # nothing else needs the parameters: the weights exist once
    texts = [tokenizer.apply_chat([{"role": "user", "content": each}]) for each in prompts] if options.chat else prompts
    encoded = encode_prompts(tokenizer, texts)
    new_tokens = options.new_tokens
    if new_tokens is None:
        spare = 0 if answering is None else answering.tokens_after(tokenizer)
        new_tokens = max(1, min(DEFAULT_NEW_TOKENS, decoder.config.context - max(map(len, encoded)) - spare))
    config = config_of(decoding, new_tokens, stop=options.stop, think=think, seed=options.seed)
    notes = Console(stderr=True, highlight=False, markup=False, soft_wrap=True, quiet=options.json)
    if answering is not None:
        answering.run(generator, prompts, encoded, config, notes)
        return
    with notes.status("compiling"):
        generator.warm_up(encoded, config)
    began = time.perf_counter()
    bursts = complete(generator, prompts, config, encoded)
    show_thoughts = options.show_thoughts or sys.stdout.isatty()
    if len(prompts) == 1 and not options.json:
        completions = write_stream(prompts[0], bursts, show_thoughts)
    else:
        with notes.status(f"generating from {len(prompts)} prompts"):
            *_, completions = bursts
    seconds = time.perf_counter() - began
    if options.json:
        for completion in completions:
            print(json.dumps(completion_record(completion, think)))
        return
    if len(prompts) > 1:
        write_completions(completions, show_thoughts)
    sys.stdout.flush()
    notes.print(summary(completions, seconds), style="dim")
