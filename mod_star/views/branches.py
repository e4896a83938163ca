"""A prompt's branches as a terminal shows them: a row each, the answer marked in its text, and which answer won."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Group
from rich.style import Style
from rich.table import Table
from rich.text import Text

from mod_star.decodings import STOPPED
from mod_star.views.terminal import visible

if TYPE_CHECKING:
    from mod_star.decoding import Completion
    from mod_star.decoding.answers import Span
    from mod_star.decoding.branches import Branch, Branches
    from mod_star.decoding.rankings import Ranking

DIM, WON, SPAN = Style(dim=True), Style(color="green", bold=True), Style(bold=True, reverse=True)
LONGEST_CELL = 12
LINES = 3
"""Lines that the text of a branch may take."""


def branches_table(result: Branches, ranking: Ranking, samples: bool = False, width: int = 80) -> Group:
    """The branches and, below them, which answers won and by how much; to print with rich.

    Args:
      result: of one prompt.
      ranking: what the branches are ranked by.
      samples: they are the samples of self-consistency: the majority wins.
      width: columns of the terminal.
    """
    best = None if samples else result.max_path(ranking)
    answer = result.majority_answer() if samples else result.aggregated_answer(ranking)
    columns = ("", "first", "answer", ranking.symbol, "won")
    rows = []
    for index, branch in enumerate(result.branches):
        won = ["max"] * (index == best)
        if branch.dropped is None and branch.answer == answer:
            won.append("vote" if samples else "Σ")
        score = ranking.score(branch)
        shown = "–" if branch.answer is None else visible(branch.answer)
        first = branch.first_token
        rows.append((str(index), _cut(first), _cut(shown), "–" if score is None else f"{score:.3f}", " ".join(won)))
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 2, 0, 0), pad_edge=False, show_edge=False, width=width)
    for number, column in enumerate(columns):
        table.add_column(Text(column), justify="right" if number in (0, 3) else "left", no_wrap=True)
    table.add_column("text", ratio=1, overflow="fold")
    taken = sum(max(Text(cell).cell_len for cell in cells) + 2 for cells in zip(columns, *rows, strict=True))
    room = max(20, width - taken) * LINES - 8  # lines break between words, which leaves some of them ragged
    for cells, branch in zip(rows, result.branches, strict=True):
        why = Text() if branch.dropped is None else Text(f"{branch.dropped}: ", Style(italic=True))
        text = Text.assemble(why, excerpt(branch.completion.text, branch.span, room - len(why)))
        styles = ("", "", WON if "Σ" in cells[-1] or "vote" in cells[-1] else "", "", WON)
        shown_cells = [Text(cell, style) for cell, style in zip(cells, styles, strict=True)]
        table.add_row(*shown_cells, text, style=None if branch.dropped is None else DIM)
    return Group(table, Text(), *outcome(result, ranking, samples))


def beams_table(beams: Sequence[Completion], width: int = 80) -> Table:
    """The texts that beam search found, best first; to print with rich at `width` columns."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 2, 0, 0), pad_edge=False, show_edge=False, width=width)
    for name in ("", "log p", "log p/tok", "tokens"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("text", ratio=1, overflow="fold")
    for index, beam in enumerate(beams):
        log_prob, normalised = beam.path_log_prob()
        text = excerpt(beam.text, None, max(20, width - 34) * LINES - 8)
        if beam.finished == "length":
            text.append(" (cut by the length limit)", Style(italic=True, dim=True))
        table.add_row(str(index), f"{log_prob:.3f}", f"{normalised:.3f}", str(len(beam.tokens)), text)
    return table


def excerpt(text: str, span: Span | None, room: int) -> Text:
    """A text with its answer marked, cut to about `room` characters: its beginning and what is around the answer."""
    start, end = (0, 0) if span is None else span
    pieces = [(0, len(text))]
    if len(text) > room:
        head = room // 3
        around = max(room - head - (end - start), 16)
        first, last = max(0, start - around * 2 // 3), min(len(text), end + around // 3)
        if span is None or first <= head:
            pieces = [(0, max(room, end))]
        else:  # cut between words where there is one
            blank, following = text.rfind(" ", head // 2, head), text.find(" ", first, start)
            pieces = [(0, head if blank < 0 else blank), (first if following < 0 else following + 1, last)]
    shown = Text()
    for number, (first, last) in enumerate(pieces):
        if number:
            shown.append(" … ", DIM)
        for begin, stop, style in ((first, start, ""), (start, end, SPAN), (end, last, "")):
            begin, stop = max(begin, first), min(stop, last)
            shown.append(visible(text[begin : max(begin, stop)]), style)
    if pieces[-1][1] < len(text):
        shown.append(" …", DIM)
    return shown


def outcome(result: Branches, ranking: Ranking, samples: bool = False) -> list[Text]:
    """Lines that say which answers won, and what each answer has."""
    total, dropped = len(result.branches), len(result.branches) - len(result.counting)
    what = "samples" if samples else "branches"
    stopped = [branch for branch in result.branches if (branch.dropped or "").startswith(STOPPED)]
    saving = [Text(_saving(result, stopped), DIM)] if stopped else []
    if not result.counting:
        return [Text.assemble("no answer: ", (f"all {total} {what} were dropped", WON)), *saving]
    votes = result.votes()
    lines = []
    if samples:
        answer = result.majority_answer()
        assert answer is not None
        lines.append(_line("majority", answer, f"{votes[answer]} of {len(result.counting)} votes"))
        rest = [f"{visible(other)} {count}" for other, count in votes.items() if other != answer]
    else:
        best, answer = result.max_path(ranking), result.aggregated_answer(ranking)
        assert best is not None and answer is not None
        name, sum_name, totals = ranking.symbol, ranking.total_symbol, result.totals(ranking)
        max_answer = result.branches[best].answer or ""
        lines.append(_line("max path", max_answer, f"branch {best}, {name} {ranking.of(result.branches[best]):.3f}"))
        count = f"{votes[answer]} branch{'es' * (votes[answer] > 1)}"
        lines.append(_line("aggregated", answer, f"{sum_name} {totals[answer]:.3f} of {count}"))
        others = sorted((value, other) for other, value in totals.items() if other != answer)[::-1]
        rest = [f"{visible(other)} {value:.3f}" for value, other in others]
    if rest:
        lines.append(Text(f"others     {'; '.join(rest)}", DIM))
    lines += saving
    if dropped:
        lines.append(Text(f"dropped    {dropped} of {total} {what}", DIM))
    return lines


def branches_record(result: Branches, ranking: Ranking, samples: bool) -> dict[str, Any]:
    """The same as plain data for JSON, with all numbers of all branches; None for what isn't there."""
    best = None if samples else result.max_path(ranking)
    won = result.majority_answer() if samples else result.aggregated_answer(ranking)
    outcome = {"majority": won, "votes": result.votes()} if samples else {
        "ranking": ranking.name,
        "max_path": best,
        "max_answer": result.answer(ranking),
        "aggregated_answer": won,
        "totals": result.totals(ranking),
    }  # fmt: skip
    return {
        "prompt": result.prompt,
        **outcome,
        "branches": [_branch_record(branch, ranking) for branch in result.branches],
    }


def _branch_record(branch: Branch, ranking: Ranking) -> dict[str, Any]:
    own = {ranking.name: ranking.score(branch)}  # of a ranking of the user's; the built-in ones are there anyway
    return own | {
        "first_token": branch.first_token,
        "answer": branch.answer,
        "span": branch.span,
        "delta": branch.delta,
        "log_prob": branch.log_prob,
        "normalised_log_prob": branch.normalised_log_prob,
        "dropped": branch.dropped,
        "continuation": branch.continuation,
        "confidence": None if branch.confidence is None else asdict(branch.confidence),
        "p_true": branch.p_true,
        **_completion_record(branch.completion),
    }


def beam_record(beam: Completion) -> dict[str, Any]:
    """A text that beam search found as plain data for JSON."""
    log_prob, normalised = beam.path_log_prob()
    return {"log_prob": log_prob, "normalised_log_prob": normalised, **_completion_record(beam)}


def _completion_record(completion: Completion) -> dict[str, Any]:
    """Without the prompt, which all branches share, and what it doesn't have."""
    return {name: value for name, value in asdict(completion).items() if value != [] and name != "prompt"}


def _saving(result: Branches, stopped: Sequence[Branch]) -> str:
    """How much was generated of the samples that stopped early, and what that may have saved."""
    spent = sum(len(branch.completion.tokens) for branch in stopped)
    whole = [len(each.completion.tokens) for each in result.branches if each.completion.finished is not None]
    line = f"stopped    {len(stopped)} of {len(result.branches)} samples, after {spent} tokens together"
    if not sum(whole):
        return line
    usual = sum(whole) / len(whole)
    saved = max(0.0, 1 - (sum(whole) + spent) / (usual * len(result.branches)))
    return f"{line}: {saved:.0%} saved if they were as long as the others"


def _line(name: str, answer: str, why: str) -> Text:
    return Text.assemble(f"{name:11}", (visible(answer), WON), (f"  {why}", DIM))


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST_CELL else text[: LONGEST_CELL - 1] + "…"
