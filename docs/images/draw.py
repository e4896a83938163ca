"""Draws the pictures of docs/explanation/architecture.md: what happens in which order, and in which module.

python docs/images/draw.py
"""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from pathlib import Path

HERE = Path(__file__).parent
WIDTH, LEFT, BOX, LINE, GAP = 560, 70, 474, 19, 26
BLUE, GREY = "#0072b2", "#5b6470"


@dataclass(frozen=True)
class Stage:
    """One box: what is done, in which modules of the package, and lines that say how."""

    title: str
    modules: str
    lines: tuple[str, ...]
    repeated: str = ""
    """What it is done for, if more than once; drawn at the left."""


PICTURES = {
    "training_step": (
        "One training step",
        (
            Stage("Batch", "data/pipeline.py", ("tokens, targets, weights, document ids: B × S",)),
            Stage(
                "Blocks, one sequence at a time under vmap",
                "model/transformer.py  model/blocks.py",
                ("full block: x + f(x) for all S tokens", "routed block: score, keep the top C, gather them,",
                 "x + g(r)·f(x) for these; the others pass by"),
                "each group",
            ),
            Stage(
                "Loss and gradient, chunk by chunk",
                "model/cross_entropy.py  training/objectives/next_token.py",
                ("at most B × train.loss_chunk × V logits at a time",
                 "and the predictor's loss: would top-k select?"),
                "each chunk",
            ),
            Stage("Update", "training/optimizer.py", ("clip, AdamW; nothing changes if a number is not finite",)),
            Stage("New state and metrics", "training/step.py", ("a pure function (state, batch) → (state, metrics)",)),
        ),
    ),
    "decode_step": (
        "One decode step",
        (
            Stage("Token of each row", "decoding/generate.py", ("the last one that was chosen: B rows",)),
            Stage(
                "Full block",
                "decoding/step.py  decoding/caches.py",
                ("reads the prompt's and the row's keys and values,", "appends its own to the cache"),
                "each group",
            ),
            Stage(
                "Routed block",
                "decoding/step.py  model/rows.py",
                ("the causal rule decides from the token alone",
                 "yes, and a slot is left: compute, append to the cache",
                 "no: pass by, read no weights at batch 1", "no slot left: pass by, count as overflow"),
                "each group",
            ),
            Stage("Choose", "decoding/sampling.py", ("the most probable token, or a draw",)),
            Stage("Until every row has ended", "decoding/generate.py", ("one lax.while_loop over a documented state",)),
        ),
    ),
    "thought": (
        "One thought at one place",
        (
            Stage("Text", "model/transformer.py", ("keys and values of the text, computed once, shared by all",)),
            Stage(
                "Sample",
                "thinking/sample.py",
                ("from <start>: t tokens, each against the text up to",
                 "the place and the thought so far; no gradients"),
                "each thought",
            ),
            Stage(
                "Score",
                "thinking/score.py",
                ("<start> thought <end> continuation in one pass,", "with gradients"),
                "each thought",
            ),
            Stage(
                "Mix",
                "thinking/mixing.py",
                ("(1 − w) · hidden without + w · hidden with the thought",),
                "n_true tokens",
            ),
            Stage(
                "Learn",
                "thinking/objective.py",
                ("NLL without thoughts + NLL after them + REINFORCE:", "reward less the other thoughts' of the place"),
            ),
        ),
    ),
}  # fmt: skip


def picture(title: str, stages: tuple[Stage, ...]) -> str:
    """The SVG of a column of boxes."""
    parts, y = [], 46
    for number, stage in enumerate(stages):
        height = 34 + LINE * (1 + len(stage.lines))
        parts.append(
            f'<rect x="{LEFT}" y="{y}" width="{BOX}" height="{height}" rx="6" fill="#f3f7fa" stroke="{BLUE}"/>'
            f'<text x="{LEFT + 14}" y="{y + 24}" class="b">{escape(stage.title)}</text>'
            f'<text x="{LEFT + 14}" y="{y + 24 + LINE}" class="m">{escape(stage.modules)}</text>'
        )
        for index, line in enumerate(stage.lines):
            parts.append(f'<text x="{LEFT + 14}" y="{y + 26 + LINE * (2 + index)}">{escape(line)}</text>')
        if stage.repeated:
            middle = y + height / 2
            parts.append(
                f'<text class="r" text-anchor="middle" transform="translate({LEFT - 26} {middle}) rotate(-90)">'
                f"{escape(stage.repeated)}</text>"
                f'<path d="M{LEFT - 8} {y + 6} h-8 v{height - 12} h8" fill="none" stroke="{GREY}"/>'
            )
        y += height
        if number < len(stages) - 1:
            x = LEFT + BOX / 2
            parts.append(
                f'<path d="M{x} {y} v{GAP - 8} m-5 -2 l5 9 l5 -9" fill="none" stroke="{BLUE}" stroke-width="1.5"/>'
            )
            y += GAP
    style = (
        "text{font:15px sans-serif;fill:#1b1f24}"
        f".m{{font:13px monospace;fill:{BLUE}}}.r{{font:13px sans-serif;fill:{GREY}}}"
        ".b{font-weight:bold}.t{font:bold 18px sans-serif}"
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y + 16}" width="{WIDTH}" role="img">'
        f"<title>{escape(title)}</title><style>{style}</style>"
        f'<rect width="100%" height="100%" fill="#ffffff"/><text class="t" x="{LEFT}" y="30">{escape(title)}</text>'
        f"{''.join(parts)}</svg>\n"
    )


if __name__ == "__main__":
    for name, (heading, column) in PICTURES.items():
        (HERE / f"{name}.svg").write_text(picture(heading, column), encoding="utf-8")
