"""How `mod-star sample` writes text: as it grows, thoughts before the tokens that they led to, prompts dimmed."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from mod_star.views.terminal import visible

if TYPE_CHECKING:
    from mod_star.decoding import Completion, Think

OF_ANSWERS = ("gaps", "end_gap", "end_log_prob", "confidences", "certainties")
OF_THINKING = ("entropies", "thoughts", "thought_texts", "mixing_weights")


def write_stream(prompt: str, bursts: Iterator[list[Completion]], show_thoughts: bool) -> list[Completion]:
    """Writes one prompt and its text as it comes, and returns the last burst."""
    write(prompt, dim=True)
    growing = Growing(show_thoughts)
    completions: list[Completion] = []
    for completions in bursts:
        growing.write(completions[0])
        sys.stdout.flush()
    write("\n")
    return completions


def write_completions(completions: Sequence[Completion], show_thoughts: bool) -> None:
    """Writes several prompts and their texts, one under the other."""
    for number, completion in enumerate(completions):
        write("\n" * bool(number))
        write(completion.prompt, dim=True)
        Growing(show_thoughts).write(completion)
        write("\n")


def completion_record(completion: Completion, think: Think) -> dict[str, Any]:
    """A completion as --json shows it."""
    left_out = {"starts", *OF_ANSWERS, *(OF_THINKING if think.when == "never" else ())}
    return {name: value for name, value in dataclasses.asdict(completion).items() if name not in left_out}


class Growing:
    """Writes a text as it grows, a thought before the token that it led to if they are to be shown."""

    def __init__(self, show_thoughts: bool) -> None:
        self._show_thoughts = show_thoughts
        self._characters = self._tokens = 0  # written

    def write(self, completion: Completion) -> None:
        """Writes what is new."""
        if self._show_thoughts:
            thoughts = zip(completion.starts, completion.thought_texts, strict=False)  # no thoughts at all if never
            for start, thought in list(thoughts)[self._tokens :]:
                if start >= len(completion.text):  # nothing is shown of the token yet
                    break
                self._tokens += 1
                if thought is not None:
                    self._write_up_to(start, completion.text)
                    write(f"⟨{visible(thought)}⟩", dim=True)
        self._write_up_to(len(completion.text), completion.text)

    def _write_up_to(self, end: int, text: str) -> None:
        write(text[self._characters : end])
        self._characters = end


def write(text: str, dim: bool = False) -> None:
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
        parts.append(
            f"{overflow} times a token passed by because a block had no room for it: see --headroom and --decoded-rows"
        )
    return " · ".join(parts)
