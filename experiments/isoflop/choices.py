"""What a model's routers chose: by entropy of the prediction, by kind of token, by difficulty of the question.

    python -m experiments.isoflop.choices runs/isoflop/MoD-16-0 --out runs/isoflop/choices

Reads GSM8K questions with their worked solutions, one document per sequence. Under the causal rule each token is
decided upon by itself, so that a question's share is free. Under top-k a document's share is fixed, and its tokens
compete. Writes choices.md and choices.png. Intervals are bootstrapped over documents.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich.console import Console

from experiments.isoflop.choices_report import Document, Seen, report
from experiments.isoflop.run import TEMPLATE
from mod_star.commands import keep_compiled_programs, parse_options
from mod_star.errors import InputError, require
from mod_star.model.routing import RoutingMode
from mod_star.model.transformer import logits_of
from mod_star.runs.directory import LoadedRun, load_run
from mod_star.tokenization.tokenizers import StreamDecoder, Tokenizer, begin
from mod_star.training.objectives.next_token import forward

MARK = "####"
"""What stands before a GSM8K solution's answer."""
BATCH = 8


@dataclass(frozen=True)
class Options:
    """Shows what the routers of the model in RUN chose on GSM8K."""

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Directory of the run."""
    data: Path = Path("data/gsm8k_test.jsonl")
    """Questions with worked solutions, which the model was not trained on."""
    documents: int = 1319
    """How many to read, from the first on; those longer than the model's context are left out."""
    out: Path = Path("runs/isoflop/choices")
    """Where tables and the picture go."""


def read_document(tokenizer: Tokenizer, record: dict[str, str]) -> Document:
    """Tokens and what they are."""
    text = TEMPLATE.format(**record)
    ids = begin(tokenizer, text)
    prompt, mark = text.index(record["answer"]), text.rindex(MARK) + len(MARK)
    stream, starts = StreamDecoder(tokenizer), [0]
    for token in ids:
        shown = "" if token == tokenizer.bos_id else stream.push(token)
        starts.append(starts[-1] + len(shown))
    kinds = ["answer" if first >= mark else kind_of(text[first:end]) for first, end in itertools.pairwise(starts)]
    return Document(ids, kinds, sum(end <= prompt for end in starts[1:]), record["answer"].count("<<"))


def kind_of(piece: str) -> str:
    """Digits, white space, signs, words or others, of a token's text."""
    bare = piece.strip()
    if piece and not bare:
        return "white space"
    if bare and all(character in "0123456789" for character in bare):
        return "digits"
    if bare.isalpha():
        return "words"
    return "signs" if bare and not any(character.isalnum() for character in bare) else "others"


def look(run: LoadedRun, documents: Sequence[Document], mode: RoutingMode) -> Iterator[Seen]:
    """Runs documents through a model, each as one sequence, padded to the context.

    Raises:
      InputError: the model is dense.
    """
    if run.config.routing.every == 0:
        raise InputError("routing.every = 0: this is a dense model, without routed blocks")
    context = run.config.model.context

    @jax.jit
    def program(params: Any, batch: Any) -> tuple[jax.Array, jax.Array]:
        output: Any = forward(run.decoder, params, batch, jax.random.key(run.config.train.seed), mode)
        logp = jax.nn.log_softmax(jax.vmap(lambda hidden: logits_of(params, hidden))(output.hidden))
        return output.trace.selected, -jnp.sum(jnp.exp(logp) * logp, -1)

    for first in range(0, len(documents), BATCH):
        rows = documents[first : first + BATCH]
        tokens, segments = np.zeros((2, BATCH, context), np.int32)
        for row, document in enumerate(rows):
            tokens[row, : len(document.ids)] = document.ids
            segments[row, : len(document.ids)] = 1
        positions = np.broadcast_to(np.arange(context, dtype=np.int32), tokens.shape)
        batch = {"tokens": tokens, "positions": positions, "segment_ids": segments}
        selected, entropy = jax.device_get(program(run.params, batch))
        for row, document in enumerate(rows):
            n = len(document.ids)
            yield Seen(document, selected[row, :, :n], entropy[row, :n])


def main() -> None:
    """Looks at the documents under both routings, and reports."""
    options = parse_options(Options, sys.argv[1:], "python -m experiments.isoflop.choices")
    require(options.documents >= 1, "--documents", options.documents, "must be at least 1")
    run = load_run(options.run)
    keep_compiled_programs()
    with options.data.open(encoding="utf-8") as file:
        records = [json.loads(line) for line in file][: options.documents]
    read = [read_document(run.tokenizer, record) for record in records]
    documents = [document for document in read if len(document.ids) <= run.config.model.context]
    console = Console(highlight=False, soft_wrap=True)
    console.print(f"{len(documents)} documents; {len(read) - len(documents)} are longer than the context, left out")
    report({mode: list(look(run, documents, mode)) for mode in get_args(RoutingMode)}, options.out, console)


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"error: {error}")
