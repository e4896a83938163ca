"""The subcommands of `mod-star`, one module each, and how they read their options.

A command module has a function `run(argv)`. It reads its options with `parse_options`, and imports JAX after that, so
that help and mistyped options are answered at once. Import `parse_options`, `on_working_copy` and
`keep_compiled_programs` from here, for a new command.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import inspect
import io
import os
import platform
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro
from tyro.constructors import ConstructorRegistry, StructConstructorSpec, StructFieldSpec, StructTypeInfo

from mod_star.config_checks import Range, field_ranges
from mod_star.errors import InputError, require
from mod_star.home import cache_root

Options = TypeVar("Options")

LEAST_COLUMNS = 40
"""Of help."""


def parse_options(kind: type[Options], argv: Sequence[str], prog: str, default: Any = None) -> Options:
    """Reads a dataclass from a command line: its docstring is the help, its fields the options.

    Underscores and hyphens are the same in option names. `--help` prints and exits; it shows the ranges of fields that
    state one (`mod_star.config_checks`).

    Args:
      kind: the dataclass.
      argv: what follows the subcommand's name.
      prog: how the user calls it, such as "mod-star train".
      default: an instance whose values are the defaults; None: the dataclass's own. A bool that is False by default
        becomes a flag; annotate with `tyro.conf.FlagConversionOff` for an option that takes True or False.

    Raises:
      InputError: an option is unknown, mistyped or missing; one line that names it.
    """
    errors = io.StringIO()
    # tyro draws boxes as wide as the terminal; without line breaks they are easy to make one line of.
    with contextlib.redirect_stderr(errors), _environment(COLUMNS=_columns(_wants_help(argv))):
        try:
            return tyro.cli(
                kind,
                args=list(argv),
                prog=prog,
                description=inspect.getdoc(kind),
                default=default,
                config=(tyro.conf.FlagCreatePairsOff,),
                registry=_ranges_in_help() if _wants_help(argv) else None,
            )
        except SystemExit as stop:
            if not stop.code:
                raise
    raise InputError(f"{_one_line(errors.getvalue())}; see {prog} --help")


def _ranges_in_help() -> ConstructorRegistry:
    """tyro's rules for a dataclass, with the range of a field before its default: "(at least 1; default: 256)"."""
    registry, seen = ConstructorRegistry(), object()

    @registry.struct_rule
    def with_ranges(info: StructTypeInfo) -> StructConstructorSpec | None:
        if not dataclasses.is_dataclass(info.type) or seen in info.markers:
            return None  # and tyro goes on to its own rules
        spec = ConstructorRegistry.get_struct_spec(dataclasses.replace(info, markers=(*info.markers, seen)))
        if not isinstance(spec, StructConstructorSpec):
            return None
        ranges = field_ranges(info.type)
        fields = (_with_range(field, ranges[field.name]) if field.name in ranges else field for field in spec.fields)
        return dataclasses.replace(spec, fields=tuple(fields))

    return registry


def _with_range(field: StructFieldSpec, allowed: Range) -> StructFieldSpec:
    """The field, whose help ends with its range and its default."""
    hint = tyro.conf.arg(help_behavior_hint=lambda default: f"({allowed.text}; default: {default})")
    shown: Any = Annotated[field.type, hint]
    return dataclasses.replace(field, type=shown)


@contextlib.contextmanager
def on_working_copy(options: Options) -> Iterator[Options]:
    """Yields the options with RUN (the field `run`), if it is in a bucket, replaced by its working copy here.

    What the command writes there is brought back when it ends, also by an error or an interruption. Errors as for
    `mod_star.runs.buckets.working_copy`; OSError: the bucket can't be written.
    """
    from mod_star.runs.buckets import bring_back, working_copy

    run = working_copy(options.run)  # type: ignore[attr-defined]
    try:
        yield dataclasses.replace(options, run=run)  # type: ignore[type-var]
    finally:
        bring_back(run)


def require_writable(option: str, path: Path) -> None:
    """Raises InputError, which names the option, unless a file can be written there; its directory may be absent."""
    place = next(parent for parent in path.absolute().parents if parent.exists())
    require(place.is_dir() and os.access(place, os.W_OK), option, str(path), f"{place} is not a writable directory")


def keep_compiled_programs() -> None:
    """Makes JAX keep compiled programs in the user's cache directory, so that resuming or sampling again starts fast.

    `JAX_COMPILATION_CACHE_DIR` names another directory, `JAX_ENABLE_COMPILATION_CACHE=false` turns it off. Call it
    before the first compilation.
    """
    import jax

    if os.environ.get("JAX_COMPILATION_CACHE_DIR"):  # JAX reads it itself
        return
    root = cache_root()
    if root is None:
        return
    # A program compiled for one processor may not run on another that shares the home directory.
    processor = hashlib.sha256(_processor().encode()).hexdigest()[:12]
    directory = root / "mod_star" / f"jax-{jax.__version__}-{processor}"
    with contextlib.suppress(OSError):  # no cache, then
        directory.mkdir(parents=True, exist_ok=True)
        jax.config.update("jax_compilation_cache_dir", str(directory))
        if not os.environ.get("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"):
            # JAX keeps those that took a second, which leaves out all that a prompt of a new length takes.
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def _processor() -> str:
    """What the machine's processor is and can do."""
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
        headings = ("model name", "flags", "Features", "CPU part")
        return "".join(sorted({line for line in file if line.startswith(headings)}))
    return f"{platform.machine()} {platform.processor()}"


def _columns(helping: bool) -> str | None:
    """What COLUMNS is to be; None: what it is. tyro takes minutes over help in boxes of a column or two."""
    if not helping:
        return "10000"
    columns = os.environ.get("COLUMNS", "")
    return str(LEAST_COLUMNS) if columns.isdecimal() and 0 < int(columns) < LEAST_COLUMNS else None


def _wants_help(argv: Sequence[str]) -> bool:
    return "--help" in argv or "-h" in argv


@contextlib.contextmanager
def _environment(**values: str | None) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update({name: value for name, value in values.items() if value is not None})
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _one_line(box: str) -> str:
    """What tyro's error box says before its first rule, and the option it suggests."""
    # A frame of │ and ─ around it all or, where the terminal isn't known to have those, two lines of hyphens.
    lines = [re.sub(r"\x1b\[[0-9;]*m", "", line).strip("│╭╮╰╯ ") for line in box.splitlines()]
    body = [line for number, line in enumerate(lines) if number and not (number == 1 and set(line) == {"-"})]
    end = next((i for i, line in enumerate(body) if set(line) <= {"─", "-"}), len(body))
    message = " ".join(body[:end]).rstrip(".")
    for pattern, better in (
        (r"^Error parsing (config(\.\w+)?: )?", ""),
        (r"^Unrecognized options: ([^,]*).*", r"unknown option \1"),
        (r"^Missing from [^:]*: (\S+).*", r"\1 is missing"),
        (r"^Missing value", "missing value"),
    ):
        message = re.sub(pattern, better, message)
    if "Perhaps you meant:" in body:
        suggestion = body[body.index("Perhaps you meant:") + 1].split()[0]
        message += f"; perhaps you meant {suggestion}"
    return message
