"""`mod-star train`: trains a model, or goes on with one."""

from __future__ import annotations

import itertools
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from mod_star.commands import keep_compiled_programs, parse_options
from mod_star.config import RunConfig
from mod_star.errors import InputError
from mod_star.presets import PRESETS


@dataclass(frozen=True)
class TrainOptions:
    """Trains a Mixture-of-Depths language model, and keeps everything about it in the directory RUN.

    Examples:
      mod-star train runs/first --preset tiny
      mod-star train runs/mine --data.source 'notes/*.txt' --model.width 384 --train.steps 2000
      mod-star train runs/dense --data.source 'notes/*.txt' --routing.every 0 --train.flops 1e15

    Interrupt it with Ctrl-C or SIGTERM: it finishes the step, saves, and the same command goes on from there, as if it
    had never stopped. Every field below is part of the run: another value means another directory.
    """

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Directory of the run: new or empty, or an interrupted run of the same configuration."""
    config: Annotated[RunConfig, tyro.conf.arg(name=""), tyro.conf.FlagConversionOff]
    """What to train."""
    preset: Literal["tiny", "small", "base"] = "small"
    """Where the fields below start: seconds, to try it out; minutes on a CPU; 100M parameters for an accelerator."""
    resume_from: int | None = None
    """Step of an older checkpoint to go on from, should the newest be damaged; later ones are deleted."""
    quiet: bool = False
    """Print nothing but errors."""


def run(argv: Sequence[str]) -> None:
    """Runs the command. Errors are `mod_star.cli`'s to show."""
    start = TrainOptions(run=tyro.MISSING, config=PRESETS[_preset(argv)]())
    options = parse_options(TrainOptions, argv, "mod-star train", start)
    # Only now, when the command line is known to be good: JAX takes seconds to import.
    from mod_star.training.interrupt import Interrupted
    from mod_star.training.loop import TrainingError, train

    keep_compiled_programs()
    try:
        train(options.config, options.run, resume_from=options.resume_from, quiet=options.quiet)
    except Interrupted as stopped:
        print(f"{stopped}. Go on with: {_command_to_go_on(argv)}", file=sys.stderr)
        sys.exit(128 + stopped.signal)
    except TrainingError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


def _command_to_go_on(argv: Sequence[str]) -> str:
    """This command, without --resume-from: going on must not go back."""
    words, skip = ["mod-star", "train"], False
    for word in argv:
        name, equals, _ = word.replace("_", "-").partition("=")
        if name == "--resume-from" or skip:
            skip = not skip and not equals
        else:
            words.append(word)
    return shlex.join(words)


def _preset(argv: Sequence[str]) -> str:
    """The preset's name; it must be known first, for the other options' defaults depend on it."""
    name: str = TrainOptions.preset
    for option, value in itertools.pairwise([*argv, ""]):
        if option == "--preset":
            name = value
        elif option.startswith("--preset="):
            name = option.partition("=")[2]
    if name not in PRESETS:
        raise InputError(f"--preset = {name!r}: must be one of {', '.join(PRESETS)}")
    return name
