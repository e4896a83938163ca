"""Chat templates. The expected texts are what transformers 5.24 (`render_jinja_template`) makes of them."""

from __future__ import annotations

import datetime
from typing import Any

import pytest

from mod_star.errors import InputError
from mod_star.tokenization.chat import check_template, render_chat

ASK = [{"role": "user", "content": "2 < 3?"}]
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}

CHATML = """{% for message in messages %}
    {% if loop.first and message['role'] != 'system' %}
{{ '<|im_start|>system\\nYou help.<|im_end|>\\n' }}
    {% endif %}
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{% endfor %}
{% if add_generation_prompt %}
{{ '<|im_start|>assistant\\n' }}
{% endif %}"""


def test_blocks_leave_no_white_space() -> None:
    messages = [*ASK, {"role": "assistant", "content": " yes\n"}, {"role": "user", "content": "é 🙂"}]
    assert render_chat(CHATML, messages, {}) == (
        "<|im_start|>system\nYou help.<|im_end|>\n"
        "\n<|im_start|>user\n2 < 3?<|im_end|>\n"
        "\n<|im_start|>assistant\n yes\n<|im_end|>\n"
        "\n<|im_start|>user\né 🙂<|im_end|>\n"
        "\n<|im_start|>assistant\n\n"
    )


def test_what_templates_rely_on() -> None:
    template = (
        "{{ bos_token }}{% set ns = namespace(n=0) %}{% for m in messages %}{% if m.role == 'skip' %}{% continue %}"
        "{% endif %}{% set ns.n = ns.n + 1 %}{% generation %}[{{ m.content | tojson }}]{% endgeneration %}{% endfor %}"
        "{{ ns.n }}{{ strftime_now('%Y') }}{{ tools }}{{ eos_token }}"
    )
    text = render_chat(template, [*ASK, {"role": "skip", "content": ""}, {"role": "user", "content": 'é"&'}], TOKENS)
    assert text == f'<s>["2 < 3?"]["é\\"&"]2{datetime.datetime.now().year}None</s>'


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{% for %}", "does not compile (line 1: Expected an expression, got 'end of statement block')"),
        ("a\n{{ x", "does not compile (line 2: "),
        ("{{ raise_exception('roles must\nalternate') }}", "fails on these messages (roles must alternate)"),
        ("{{ messages[7].content.x }}", "fails on these messages (list object has no element 7)"),
        ("{{ 1 / 0 }}", "fails on these messages (division by zero)"),
        ("{{ messages.append(1) }}", "fails on these messages (access to attribute 'append'"),
        ("{{ ''.__class__.__mro__ }}", "fails on these messages (access to attribute '__class__'"),
        ("{{ range(10**9) | list }}", "fails on these messages (Range too big."),
    ],
)
def test_bad_templates_name_the_reason(template: str, reason: str) -> None:
    with pytest.raises(InputError) as error:
        render_chat(template, ASK, {})
    assert str(error.value).startswith(f"chat template: {reason}")
    assert "\n" not in str(error.value)


def test_compiling_alone() -> None:
    check_template(CHATML)
    with pytest.raises(InputError, match="does not compile"):
        check_template("{{ x | nothing }}")


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "messages: must hold at least one message"),
        ([{"role": "user"}], "messages[0].content = None: must be text"),
        ([*ASK, {"role": 3, "content": ""}], "messages[1].role = 3: must be text"),
        (["hello"], "messages[0].role = None: must be text"),
    ],
)
def test_bad_messages(messages: Any, message: str) -> None:
    with pytest.raises(InputError) as error:
        render_chat("", messages, {})
    assert str(error.value) == message
