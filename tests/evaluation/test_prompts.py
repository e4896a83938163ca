"""Prompts: templates, examples, chat, and subsets that a seed fixes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from sentence_piece import sentence_piece

from mod_star.decoding import encode_prompts
from mod_star.errors import InputError
from mod_star.evaluation.prompts import Prompts, few_shot, subset
from mod_star.evaluation.tasks import Item, Task, load_task
from mod_star.tokenization.chat import Message
from mod_star.tokenization.tokenizers import ByteTokenizer

ITEM = Item("7", "How many?", "3", "number")
EXAMPLE = Item("1", "2 + 2?", "4", "number", solution="Two and two is 4.")
MANY = tuple(Item(str(n), f"question {n}", str(n), "number", solution=f"It is {n}.") for n in range(50))


class Chatty(ByteTokenizer):
    """Bytes with a chat template, which doesn't spell bos out."""

    chat_template = "any"  # type: ignore[assignment]

    def apply_chat(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> str:
        return "".join(f"<{message['role']}>{message['content']}" for message in messages) + "<assistant>"


def test_plain_prompts() -> None:
    tokenizer = ByteTokenizer()
    assert Prompts(tokenizer).text(ITEM) == "Q: How many?\nA:"
    assert Prompts(tokenizer, step_by_step=True).text(ITEM) == "Q: How many?\nA: Let's think step by step."
    assert Prompts(tokenizer, "{question}\\n=").text(ITEM) == "How many?\n="
    shown = Prompts(tokenizer, examples=(EXAMPLE,), preamble="Sums.\n").text(ITEM)
    assert shown == "Sums.\nQ: 2 + 2?\nA: Two and two is 4.\n\nQ: How many?\nA:"
    assert Prompts(tokenizer).encode(ITEM) == [256, *b"Q: How many?\nA:"]


@pytest.mark.parametrize(
    ("template", "few", "stop"),
    [
        (None, False, ("\nQ:",)),
        ("Question: {question}\nAnswer:", True, ("\nQuestion:",)),
        ("Question: {question}\\nAnswer:", False, ("\nQuestion:",)),
        ("\nSolve this. \nProblem: {question}\n", True, ("\nSolve this.",)),
        ("{question}\nA:", True, ("\n\n",)),
        ("### {question}\n", True, ("\n\n",)),  # "\n###" would cut "#### 18" off
        ("- {question} =", False, ()),
        ("{question}\nA:", False, ()),
    ],
)
def test_what_ends_a_text_follows_the_template(template: str | None, few: bool, stop: tuple[str, ...]) -> None:
    prompts = Prompts(ByteTokenizer(), template, examples=(EXAMPLE,) if few else ())
    assert prompts.stop == stop
    shown = replace(prompts, examples=(EXAMPLE, EXAMPLE)).text(ITEM)
    assert all(shown.count(each) >= 2 for each in stop), "it is what comes after every answer"
    assert Prompts(Chatty(), template, chat=True, examples=prompts.examples).stop == ()


def test_blank_lines_in_examples_end_nothing() -> None:
    long = replace(EXAMPLE, solution="First.\n\nThen 4.")
    assert Prompts(ByteTokenizer(), "{question}\nA:", examples=(EXAMPLE, long)).stop == ()
    assert Prompts(ByteTokenizer(), examples=(EXAMPLE, long)).stop == ("\nQ:",)


def test_no_second_blank_where_the_template_ends_in_one() -> None:
    for template, shown in (("Q: {question} A: ", "Q: 2 + 2? A: Two and two"), ("{question}\n", "2 + 2?\nTwo and two")):
        prompts = Prompts(ByteTokenizer(), template, examples=(EXAMPLE,), step_by_step=False)
        assert prompts.text(ITEM).startswith(shown)
        assert (
            replace(prompts, examples=(), step_by_step=True)
            .text(ITEM)
            .endswith(template[-1] + "Let's think step by step.")
        )


def test_chat_prompts() -> None:
    chatty = Chatty()
    assert Prompts(chatty, chat=True).text(ITEM) == "<user>How many?<assistant>"
    stepped = Prompts(chatty, "Q: {question}", chat=True, step_by_step=True)
    assert stepped.text(ITEM) == "<user>Q: How many?\nLet's think step by step.<assistant>"
    shown = Prompts(chatty, chat=True, examples=(EXAMPLE,), preamble="Sums.\n").text(ITEM)
    assert shown == "<user>Sums.\n2 + 2?<assistant>Two and two is 4.<user>How many?<assistant>"
    assert Prompts(chatty, chat=True).encode(ITEM) == [256, *b"<user>How many?<assistant>"]


def test_bos_comes_once_where_it_is_wanted() -> None:
    """<s> is 1 and <0x00> is 3."""
    ids = [259, *(3 + byte for byte in "é".encode())]
    for template, wanted, expected in (
        ("{{ messages[0]['content'] }}", True, [1]),
        ("{{ bos_token }}{{ messages[0]['content'] }}", True, [1]),
        ("{{ messages[0]['content'] }}", False, []),
        ("{{ bos_token }}{{ messages[0]['content'] }}", False, [1]),
    ):
        tokenizer = sentence_piece(starts_with_bos=wanted, chat_template=template)
        item = replace(ITEM, question="é")
        prompts = Prompts(tokenizer, chat=True)
        found = prompts.encode(item)
        assert found == [*expected, *ids]
        assert found == encode_prompts(tokenizer, [prompts.text(item)])[0], "as mod-star sample asks"
    tokenizer = sentence_piece()
    assert Prompts(tokenizer, "<s>{question}").encode(ITEM).count(1) == 1
    assert Prompts(tokenizer, "{question}").encode(replace(ITEM, question="")) == [1]
    without = sentence_piece(starts_with_bos=False)
    assert Prompts(without, "{question}").encode(replace(ITEM, question="")) == [1], "nothing else to go on from"


def test_what_prompts_refuse() -> None:
    for make, message in (
        (lambda: Prompts(ByteTokenizer(), chat=True), "--chat: the model's tokenizer has no chat template"),
        (lambda: Prompts(ByteTokenizer(), "Q: {text}"), "--prompt-template names 'text'"),
        (lambda: Prompts(ByteTokenizer(), "Q:"), "--prompt-template = 'Q:': it names no field"),
    ):
        with pytest.raises(InputError) as error:
            make()
        assert message in str(error.value)


def test_a_seed_fixes_the_subset() -> None:
    some = subset(MANY, 10, seed=3)
    assert some == subset(MANY, 10, seed=3) and len(set(some)) == 10
    assert list(some) == sorted(some, key=lambda item: int(item.id)), "in the order of the file"
    assert some != subset(MANY, 10, seed=4) and some != MANY[:10]
    assert set(some) < set(subset(MANY, 20, seed=3)), "a larger limit goes on from a smaller one"
    assert subset(MANY, None, seed=3) == subset(MANY, 99, seed=3) == MANY
    # Kept: records of earlier evaluations are of these questions.
    assert [item.id for item in subset(MANY, 5, seed=0)] == ["6", "9", "24", "29", "30"]
    with pytest.raises(InputError, match="--limit = 0: must be positive"):
        subset(MANY, 0, seed=0)


def test_examples_are_never_asked(tmp_path: Path) -> None:
    task = Task("sums", "sums.jsonl", MANY, "")
    asked = subset(MANY, 40, seed=0)
    examples, text, digest = few_shot(4, None, task, asked, "gsm8k", seed=0)
    assert len(set(examples)) == 4 and not set(examples) & set(asked)
    assert (text, digest) == ("", "")
    assert few_shot(4, None, task, asked, "gsm8k", seed=0)[0] == examples != few_shot(4, None, task, asked, "", 1)[0]

    path = tmp_path / "train.jsonl"
    records = [{"question": f"question {n}", "answer": f"so\n#### {n}"} for n in range(38, 53)]
    path.write_text("\n".join(map(json.dumps, records)))
    examples, _, digest = few_shot(3, path, task, MANY, "gsm8k", seed=0)
    assert {example.gold for example in examples} == {"50", "51", "52"}, "38 to 49 are asked"
    assert digest == load_task("gsm8k", path).sha256
    (tmp_path / "shots.txt").write_text("Q: 1?\nA: 1\n\n")
    assert few_shot(0, tmp_path / "shots.txt", task, MANY, "gsm8k", 0)[:2] == ((), "Q: 1?\nA: 1\n\n")
    for count, source, message in (
        (4, path, "--few-shot = 4: there are only 3 questions in"),
        (11, None, "--few-shot = 11: there are only 10 questions in sums.jsonl that are not asked"),
        (0, path, "--few-shot = 0: must be positive with --few-shot-data"),
        (2, tmp_path / "shots.txt", "--few-shot = 2: must be 0"),
        (-1, None, "--few-shot = -1: must not be negative"),
    ):
        with pytest.raises(InputError) as error:
            few_shot(count, source, task, asked if source is None else MANY, "gsm8k", 0)
        assert message in str(error.value)
