"""`mod-star train`: trains a model, or goes on with one."""

from __future__ import annotations

import functools
import itertools
import shlex
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from mod_star.commands import keep_compiled_programs, parse_options
from mod_star.config import MeshConfig, ProcessesConfig, RunConfig
from mod_star.errors import InputError, require
from mod_star.presets import PRESETS
from mod_star.runs.buckets import holds_run, with_addresses, working_copy
from mod_star.runs.stored_config import read_base_config, read_config, read_starting_config


@dataclass(frozen=True)
class TrainOptions:
    """Trains a Mixture-of-Depths language model, and keeps everything about it in the directory RUN.

    Examples:
      mod-star train runs/first --preset tiny
      mod-star train runs/mine --data.source 'notes/*.txt' --model.width 384 --train.steps 2000
      mod-star train runs/dense --data.source 'notes/*.txt' --routing.every 0 --train.flops 1e15
      mod-star train runs/fine --init-from runs/mine --data.source 'mail/*.txt' --optimizer.learning-rate 3e-4
      mod-star train runs/large --preset base --mesh.fsdp 4 --mesh.tensor 2

    Interrupt it with Ctrl-C, SIGTERM or SIGHUP: it finishes the step, saves, and the same command goes on from there,
    as if it had never stopped. Every field below is part of the run: another value means another directory. Only --mesh
    and --processes are not: a run may go on with other devices. With several processes, start the same command in each.
    More --train.steps make a run longer, where the learning rate so far did not depend on their number: constant, or
    wsd before its decay. If its data has changed, a run says so and does not go on.
    """

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Directory of the run, or gs://BUCKET/NAME: new or empty, or an interrupted run of the same configuration."""
    config: Annotated[RunConfig, tyro.conf.arg(name=""), tyro.conf.FlagConversionOff]
    """What to train."""
    preset: Literal["tiny", "small", "base", "7b", "7b-mod", "7b-quiet"] = "small"
    """Where the fields below start: seconds, to try it out; minutes on a CPU; 100M parameters for an accelerator; 7B
    for a TPU slice, dense, Mixture-of-Depths or thinking (look with mod-star plan first)."""
    mesh: MeshConfig = field(default_factory=MeshConfig)
    """How to use several devices."""
    processes: ProcessesConfig = field(default_factory=ProcessesConfig)
    """How several processes find one another, where JAX cannot tell."""
    resume_from: int | None = None
    """Step of an older checkpoint to go on from, should the newest be damaged; later ones are deleted."""
    profile: str | None = None
    """Steps to trace into RUN/profile for xprof, such as 100:105 (the last one included)."""
    quiet: bool = False
    """Print nothing but errors."""
    data_changed: Literal["refuse", "accept"] = "refuse"
    """accept: go on with a run although its data has changed; what was held out may have been trained on then."""
    redraw_schedule: bool = False
    """With other --train.steps than before: go on although the learning rate so far was drawn for those."""


def run(argv: Sequence[str]) -> None:
    """Runs the command. Errors are `mod_star.cli`'s to show."""
    start = TrainOptions(run=tyro.MISSING, config=_defaults(argv))
    options = parse_options(TrainOptions, argv, "mod-star train", start)
    profile = None if options.profile is None else _steps(options.profile)
    # Only now, when the command line is known to be good: JAX takes seconds to import.
    from mod_star.distributed.processes import join_processes, leave
    from mod_star.training.interrupt import Interrupted
    from mod_star.training.train import TrainingError, train

    keep_compiled_programs()
    sys.unraisablehook = functools.partial(_show_unraisable, sys.unraisablehook)
    # Orbax's, of the writes that one which failed leaves undone.
    warnings.filterwarnings("ignore", message="coroutine .* was never awaited", category=RuntimeWarning)
    join_processes(options.processes)
    try:
        train(
            options.config, options.run, mesh=options.mesh, resume_from=options.resume_from, profile=profile,
            quiet=options.quiet, data_changed=options.data_changed, redraw_schedule=options.redraw_schedule,
        )  # fmt: skip
    except Interrupted as stopped:
        print(f"{stopped}. Go on with: {_command_to_go_on(argv)}", file=sys.stderr)
        sys.exit(128 + stopped.signal)
    except (TrainingError, InputError) as error:
        print(f"error: {with_addresses(str(error))}", file=sys.stderr)
        leave(error.exit_code)


def _steps(text: str) -> range:
    """The steps of --profile."""
    first, colon, last = text.partition(":")
    good = colon and first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last)
    require(bool(good), "--profile", text, "must be FIRST:LAST, two steps counted from 1, such as 100:105")
    return range(int(first), int(last) + 1)


def _show_unraisable(others: Callable[[Any], object], error: Any) -> None:
    """Leaves out what says nothing: tensorstore tells every write that ends after one has failed (the disk is full) to
    an event loop that is gone; and one that could not be made (too many files are open) fails again when it goes."""
    if str(error.exc_value) != "Event loop is closed" and "'_ssock'" not in str(error.exc_value):
        others(error)


def _command_to_go_on(argv: Sequence[str]) -> str:
    """This command, without --resume-from: going on must not go back; nor is what was accepted once so for ever."""
    words, skip = ["mod-star", "train"], False
    for word in argv:
        name, equals, _ = word.replace("_", "-").partition("=")
        if name in ("--resume-from", "--data-changed") or skip:
            skip = not skip and not equals
        else:
            words.append(word)
    return shlex.join(words)


def _defaults(argv: Sequence[str]) -> RunConfig:
    """Where the fields start: at a preset, or at the configuration of the run to start from."""
    preset, base = _value_of("--preset", argv), _value_of("--init-from", argv)
    if base in (None, "None"):
        preset = TrainOptions.preset if preset is None else preset
        require(preset in PRESETS, "--preset", preset, f"must be one of {', '.join(PRESETS)}")
        return PRESETS[preset]()
    if preset is not None:
        raise InputError(
            f"--preset = {preset!r}: cannot be combined with --init-from, whose fields are the defaults (here {base!r})"
        )
    return replace(_config_at_start(argv, base) or read_starting_config(working_copy(base)), init_from=base)


def _value_of(option: str, argv: Sequence[str]) -> str | None:
    """What an option is given, None if it isn't: the other options' defaults depend on it, so it must be known first.

    A missing value counts as not given; the parser says so.
    """
    value = None
    for word, following in itertools.pairwise([*argv, "-"]):
        name, equals, own = word.partition("=")
        if name.replace("_", "-") == option and (equals or not following.startswith("-")):
            value = own if equals else following
    return value


def _config_at_start(argv: Sequence[str], base: str) -> RunConfig | None:
    """The base's configuration when RUN was started from it, if RUN is there already.

    The same command must mean the same run, even if the base has changed since or is gone. Which word is RUN can't be
    told without knowing all options, but only RUN is a run that was started from this base.
    """
    for word in argv:
        if word.startswith("-") or word == base or not holds_run(word):
            continue
        path = working_copy(word)
        if (started_from := read_config(path).init_from) and Path(started_from) == Path(base):
            return read_base_config(path)
    return None
