"""Token ids of a generated text that goes on with words of ours, such as "So the answer is"."""

from __future__ import annotations

from collections.abc import Sequence

from mod_star.decoding.text import Completion
from mod_star.tokenization.tokenizers import Tokenizer


def ids_continued(
    tokenizer: Tokenizer, prompt: Sequence[int], completion: Completion, words: str, blank: bool = True
) -> list[int]:
    """Ids of a prompt, its text and the words.

    Args:
      tokenizer: the model's.
      prompt: token ids.
      completion: the text. What is left of a token that a stop string has cut is encoded anew.
      words: what stands after it.
      blank: put a blank before the words unless white space is there.
    """
    tokens = completion.tokens
    if completion.finished == "stop":
        tokens = _without_stop(tokenizer, prompt, completion)
    text = tokenizer.decode(tokens)
    between = " " if blank and text and not text[-1].isspace() else ""
    return [*prompt, *tokens, *ids_following(tokenizer, tokens, between + words)]


def ids_following(tokenizer: Tokenizer, before: Sequence[int], text: str) -> list[int]:
    """Ids that add nothing but `text` to the text of `before`."""
    ids = tokenizer.encode(text)
    if tokenizer.decode([*before, *ids]) != tokenizer.decode(before) + text:
        # A tokenizer that puts a blank before every text by itself: it then stands before the line's end.
        return tokenizer.encode("\n" + text)[len(tokenizer.encode("\n")) :]
    return ids


def _without_stop(tokenizer: Tokenizer, prompt: Sequence[int], completion: Completion) -> list[int]:
    """Ids of a text that a stop string has cut: its tokens up to the one that is cut, and the rest of that one anew."""
    start = max(start for start in completion.starts if start <= len(completion.text))
    whole = completion.tokens[: completion.starts.index(start)]
    return [*whole, *ids_following(tokenizer, [*prompt, *whole], completion.text[start:])]
