"""Chat templates: the Jinja text that a model brings along turns messages into the text that it was trained on."""

from __future__ import annotations

import datetime
import functools
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mod_star.errors import InputError

if TYPE_CHECKING:
    import jinja2

Message = Mapping[str, Any]
"""One turn of a chat: `role` (system, user, assistant) and `content`, both text; templates may know more."""


def render_chat(
    template: str, messages: Sequence[Message], tokens: Mapping[str, str], add_generation_prompt: bool = True
) -> str:
    """The text of a chat as the template writes it: up to where the assistant's next turn begins.

    The template runs in Jinja's immutable sandbox, with what templates made for Hugging Face's `transformers` rely on:
    blocks leave no white space behind, `raise_exception`, `strftime_now`, `tojson`, `break` and `continue`.

    Args:
        template: Jinja source.
        messages: The turns so far.
        tokens: Spelling of the special tokens that templates name, such as `bos_token`.
        add_generation_prompt: False: only up to the end of the last message.

    Raises:
        InputError: A message has no role or content, or the template doesn't compile or fails; with the reason.
    """
    if not messages:
        raise InputError("messages: must hold at least one message")
    for index, message in enumerate(messages):
        for key in ("role", "content"):
            value = message.get(key) if isinstance(message, Mapping) else None
            if not isinstance(value, str):
                raise InputError(f"messages[{index}].{key} = {value!r}: must be text")
    compiled = _compiled(template)
    try:
        # Templates ask whether tools and documents are none, not only whether they are defined.
        return compiled.render(
            messages=[dict(each) for each in messages],
            add_generation_prompt=add_generation_prompt,
            tools=None,
            documents=None,
            **tokens,
        )
    except Exception as error:  # a template can raise anything
        raise InputError(f"chat template: fails on these messages ({_one_line(error)})") from None


def check_template(template: str) -> None:
    """Raises InputError if a template doesn't compile."""
    _compiled(template)


@functools.lru_cache(maxsize=8)
def _compiled(template: str) -> jinja2.Template:
    try:
        return _environment().from_string(template)
    except Exception as error:  # jinja2's own errors, and Python's where a template nests too deep
        line = getattr(error, "lineno", None)
        place = "" if line is None else f"line {line}: "
        raise InputError(f"chat template: does not compile ({place}{_one_line(error)})") from None


@functools.cache
def _environment() -> jinja2.Environment:
    import jinja2
    from jinja2 import ext, nodes
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(ext.Extension):
        """{% generation %}: marks what the assistant said, for training; here it is just its body."""

        tags = frozenset(("generation",))  # type: ignore[assignment]

        def parse(self, parser: Any) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        # Jinja's own escapes what HTML would take for markup.
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
