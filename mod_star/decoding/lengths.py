"""Sizes that shapes are rounded up to, so that few programs are compiled: for prompts, for new tokens and for rows."""

from __future__ import annotations

PROMPT = 64
"""The least that prompts are padded to."""
ROOM = 128
"""The least room for new tokens. A decoding step reads all of it, but weights are most of what it reads."""
ROOM_OF_MANY = 32
"""For collections of prompts, room is rounded up to a multiple of this: they need one program and run many steps."""

FEW_ROWS = 4
"""Rows of a batch that may have many empty slots."""
SLOTS_OF_FEW = 128
"""The least slots of such a batch, for prompts and for new tokens."""


def rounded_up(count: int, least: int, most: int) -> int:
    """The next of `least` times 1, 2, 3, 4, 6, 8, 12, 16, ...: at most half of a larger count is padding.

    Args:
      count: at least 1, at most `most`.
      least: the smallest size.
      most: the largest size; every size above it becomes this one.
    """
    size = least
    while size < count:
        middle = size // 2 * 3
        size = middle if size > least and count <= middle else size * 2
    return min(size, most)


def coarse(slots: int, rows: int, most: int) -> int:
    """How many slots a decoding step has for that many tokens: more where there are few rows.

    Every number of slots is a program of its own, which takes seconds to compile. A step of few rows spends its time
    on reading weights, and hardly any on empty slots: there the number is a power of two, at least 128.

    Args:
      slots: that are needed.
      rows: of the batch.
      most: the largest size, at least `slots`.
    """
    if rows > FEW_ROWS:
        return slots
    size = SLOTS_OF_FEW
    while size < slots:
        size *= 2
    return min(size, most)
