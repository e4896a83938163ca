"""How a record (a JSON object, a row of a dataset) becomes the text of one document.

A template is written like a format string, `"Q: {question}\\nA: {answer}"`, over the fields of the record:
`{question[stem]}` and `{choices[0][text]}` reach inside, `{answer:g}` formats a number, `{{` and `}}` are braces.
`\\n`, `\\t` and `\\\\` may be written out, as on a command line. Attributes, conversions and computed formats are
refused: a template reads data, nothing else.
"""

from __future__ import annotations

import re
import string
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mod_star.errors import InputError
from mod_star.tokenization.unicode_text import unicode_text

_FIELD = re.compile(r"([^\[\].]+)((?:\[[^\[\]]+\])*)")
_ESCAPES = {"n": "\n", "t": "\t", "\\": "\\"}


class Template:
    """A compiled template; without a template, the record's field "text" (or the record itself if it is a string)."""

    def __init__(self, template: str | None, option: str = "data.template") -> None:
        """Args:
            template: The template, or None.
            option: What errors call it.

        Raises:
            InputError: The template is malformed or names no field.
        """
        self._template, self._option = template, option
        # One entry per piece: literal text, then the path of a field (empty: none) and its number format.
        self._pieces: list[tuple[str, tuple[str, ...], str]] = _parse(
            "{text}" if template is None else template, option
        )

    @property
    def beginning(self) -> str:
        """The text before the first field."""
        pieces = iter(self._pieces)
        text = ""
        for literal, path, _ in pieces:
            text += literal
            if path:
                break
        return text

    @property
    def fields(self) -> frozenset[str]:
        """The fields of a record that a template names; empty without one."""
        return frozenset() if self._template is None else frozenset(path[0] for _, path, _ in self._pieces if path)

    @property
    def is_one_field(self) -> bool:
        """Whether a template names one field and holds nothing else."""
        return self._template is not None and len(self._pieces) == 1 and not self._pieces[0][0] + self._pieces[0][2]

    def value(self, record: Mapping[str, Any]) -> Any:
        """What stands in the record where a template `is_one_field`; None: nothing."""
        value: Any = record
        for key in self._pieces[0][1]:
            value, _ = _entry(value, key)
        return value

    def render(self, record: Any, where: str) -> str:
        """The text of one record.

        Args:
            record: A mapping, possibly of mappings and lists; strings may be UTF-8 bytes.
            where: Names the record in errors, such as "train.jsonl, line 7".

        Raises:
            InputError: A field is missing, or is no text or number.
        """
        if self._template is None and isinstance(record, (str, bytes)):
            return unicode_text(record, where)
        if not isinstance(record, Mapping):
            raise InputError(f"{where}: a record must be an object with fields, not {_kind(record)}")
        text = "".join(
            literal + (self._field(record, path, number_format, where) if path else "")
            for literal, path, number_format in self._pieces
        )
        return unicode_text(text, where)

    def _field(self, record: Mapping[str, Any], path: tuple[str, ...], number_format: str, where: str) -> str:
        """The value at `path`, as text."""
        value: Any = record
        for depth, key in enumerate(path):
            entry, present = _entry(value, key)
            if not present:
                template = (
                    f"{self._option} is not set, so the field is" if self._template is None else f"{self._option} names"
                )
                raise InputError(f"{where}: {template} {_show(path[: depth + 1])!r}, the record has {_contents(value)}")
            value = entry
        value = value.item() if isinstance(value, np.generic) and not isinstance(value, (str, bytes)) else value
        if isinstance(value, bytes):
            value = unicode_text(value, where)
        if not isinstance(value, (str, bool, int, float)):
            raise InputError(f"{where}: {_show(path)!r} is {_kind(value)} ({_contents(value)}), not text or a number")
        try:
            return format(value, number_format)
        except ValueError as error:
            raise InputError(
                f"{where}: {self._option} formats {_show(path)!r} with {number_format!r}: {error}"
            ) from None


def unescape(text: str) -> str:
    """`text` with `\\n`, `\\t` and `\\\\` that are written out as what they mean."""
    return re.sub(r"\\([nt\\])", lambda match: _ESCAPES[match[1]], text)


def _parse(template: str, option: str) -> list[tuple[str, tuple[str, ...], str]]:
    """Splits a template into (literal, path, number format); raises InputError if it is malformed."""

    def malformed(reason: str) -> InputError:
        hint = "write {question}, or {question[stem]} to reach inside; {{ and }} are braces"
        return InputError(f"{option} = {template!r}: {reason}; {hint}")

    try:
        parsed = list(string.Formatter().parse(unescape(template)))
    except ValueError as error:
        raise malformed(str(error).lower()) from None
    pieces: list[tuple[str, tuple[str, ...], str]] = []
    for literal, field, number_format, conversion in parsed:
        if field is None:
            pieces.append((literal, (), ""))
            continue
        match = _FIELD.fullmatch(field)
        if match is None:
            raise malformed(f"{{{field}}} is not a field name followed by [keys]")
        if conversion or "{" in (number_format or ""):
            raise malformed(f"{{{field}}} may have a plain number format, but no conversion and no nested field")
        pieces.append((literal, (match[1], *re.findall(r"\[([^\[\]]+)\]", match[2])), number_format or ""))
    if not any(path for _, path, _ in pieces):
        raise malformed("it names no field, so that all documents would be equal")
    return pieces


def _entry(value: Any, key: str) -> tuple[Any, bool]:
    """The entry of a mapping or list, and whether there is one."""
    if isinstance(value, Mapping):
        return value.get(key), key in value
    if _is_list(value) and key.isdecimal() and int(key) < len(value):
        return value[int(key)], True
    return None, False


def _is_list(value: Any) -> bool:
    if isinstance(value, np.ndarray):
        return value.ndim > 0
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))


def _show(path: Sequence[str]) -> str:
    return path[0] + "".join(f"[{key}]" for key in path[1:])


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    return "an object" if isinstance(value, Mapping) else "a list" if _is_list(value) else f"a {type(value).__name__}"


def _contents(value: Any) -> str:
    """What a template could have named instead."""
    if isinstance(value, Mapping):
        names = [str(key) for key in value]
        return f"fields {', '.join(names[:12])}{', ...' if len(names) > 12 else ''}" if names else "no fields"
    return f"{len(value)} entries" if _is_list(value) else "nothing inside"
