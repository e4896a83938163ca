"""From a question to the text that the model is given: templates, examples before the question, chat."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mod_star.data.files import holds_records, read_text
from mod_star.data.templates import Template
from mod_star.errors import InputError, require
from mod_star.evaluation.tasks import CustomTask, Item, Task, load_task
from mod_star.tokenization.tokenizers import Tokenizer, begin

PLAIN, CHAT = "Q: {question}\nA:", "{question}"
STEP_BY_STEP = "Let's think step by step."
"""Kojima et al. 2022 (arXiv 2205.11916)."""


@dataclass(frozen=True)
class Prompts:
    """How prompts are made.

    Raises:
      InputError: the template is malformed or names another field than question, or the tokenizer has no chat template.
    """

    tokenizer: Tokenizer
    template: str | None = None
    """Of the question; None: "Q: {question}\\nA:", in a chat "{question}"."""
    chat: bool = False
    """As a message of the tokenizer's chat template."""
    step_by_step: bool = False
    """Ends with "Let's think step by step.": where the answer begins, in a chat where the user's message ends."""
    examples: tuple[Item, ...] = ()
    """Questions with their solutions, before the question."""
    preamble: str = ""
    """Text before everything else (in a chat, in the user's first message)."""

    @property
    def stop(self) -> tuple[str, ...]:
        """The strings that end a generated text if nobody names others: what the next question would begin with.

        That is the first line of the template's own text before the question ("\nQ:"). Where there are no words before
        the question, it is the blank line after every example, unless their own texts hold one. In a chat, and for
        questions alone, nothing: the model's end tokens end a text.
        """
        if self.chat:
            return ()
        lines = [line.rstrip() for line in self._compiled.beginning.split("\n") if line.strip()]
        if lines and any(character.isalnum() for character in lines[0]):
            return (f"\n{lines[0]}",)
        separated = self.examples and not any("\n\n" in example.solution.strip() for example in self.examples)
        return ("\n\n",) if separated else ()

    def __post_init__(self) -> None:
        if self.chat and not self.tokenizer.chat_template:
            raise InputError("--chat: the model's tokenizer has no chat template; leave --chat out")
        self._ask("question")

    def text(self, item: Item) -> str:
        """The prompt of one question."""
        if self.chat:
            messages = []
            for example in self.examples:
                messages += [_message("user", self._ask(example.question)), _message("assistant", example.solution)]
            messages.append(_message("user", self._ask(item.question)))
            messages[0]["content"] = self.preamble + messages[0]["content"]
            return self.tokenizer.apply_chat(messages)
        questions = [self._ask(example.question) for example in self.examples]
        solved = [example.solution for example in self.examples]
        shown = [f"{joined(before, after)}\n\n" for before, after in zip(questions, solved, strict=True)]
        return self.preamble + "".join(shown) + self._ask(item.question)

    def encode(self, item: Item) -> list[int]:
        """The prompt's token ids, as `begin` makes them: bos comes first where it is wanted and not spelled out."""
        return begin(self.tokenizer, self.text(item))

    @property
    def _compiled(self) -> Template:
        default = CHAT if self.chat else PLAIN
        return Template(default if self.template is None else self.template, "--prompt-template")

    def _ask(self, question: str) -> str:
        put = self._compiled.render({"question": question}, "prompt")
        if not self.step_by_step:
            return put
        return f"{put}\n{STEP_BY_STEP}" if self.chat else joined(put, STEP_BY_STEP)


def joined(prompt: str, answer: str) -> str:
    """The answer after its prompt, a blank between them unless white space is there."""
    return prompt + (answer if not prompt or prompt[-1].isspace() else f" {answer}")


def subset(items: Sequence[Item], limit: int | None, seed: int) -> tuple[Item, ...]:
    """`limit` items drawn by `seed`, in the order of the file; all of them if there are no more.

    The items of a smaller limit are among those of a larger one, given the same file and seed.
    """
    require(limit is None or limit > 0, "--limit", limit, "must be positive")
    order = _shuffled(len(items), f"items {seed}")
    return tuple(items[i] for i in sorted(order[: len(items) if limit is None else limit]))


def few_shot(
    count: int, source: str | Path | None, task: Task, items: Sequence[Item], how: str | CustomTask, seed: int
) -> tuple[tuple[Item, ...], str, str]:
    """The examples before every question.

    Args:
      count: how many.
      source: a file of questions in the task's format, or a text that is put before every prompt as it is (which one,
        its name says, see `mod_star.data.files`); None: questions of the task that are not asked.
      task: the task.
      items: its items that are evaluated.
      how: how the task's files are read.
      seed: of the draw.

    Returns:
      The examples, the text, and a digest of the file (or "").

    Raises:
      InputError: too few questions are there, or an option is without use.
    """
    require(count >= 0, "--few-shot", count, "must not be negative")
    if source is not None and not holds_records(str(source)):
        require(count == 0, "--few-shot", count, f"must be 0: the text of {source} stands before each prompt as it is")
        text = read_text(str(source))
        return (), text, hashlib.sha256(text.encode()).hexdigest()
    if source is not None:
        require(count > 0, "--few-shot", count, "must be positive with --few-shot-data")
        other = load_task(how, source)
        pool, digest, name = other.items, other.sha256, str(source)
        questions = {item.question for item in items}
        pool = tuple(item for item in pool if item.question not in questions)  # nobody may be told the answer
    else:
        ids = {item.id for item in items}
        pool, digest, name = tuple(item for item in task.items if item.id not in ids), "", task.path
    allowed = f"there are only {len(pool)} questions in {name} that are not asked; see --few-shot-data"
    require(count <= len(pool), "--few-shot", count, allowed)
    return tuple(pool[i] for i in _shuffled(len(pool), f"examples {seed}")[:count]), "", digest


def _shuffled(count: int, seed: str) -> list[int]:
    """Indices in an order that depends on the seed alone: Python keeps `Random.random` the same across versions."""
    rng = random.Random(seed)
    draws = [rng.random() for _ in range(count)]
    return sorted(range(count), key=draws.__getitem__)


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}
