"""Data at the command line: conversations trained on by a real process, and files that are refused in one line."""

from __future__ import annotations

import gzip
import itertools
import json
import re
from pathlib import Path

import jax
import numpy as np
import pyarrow
import pytest
from chat_tokenizers import CHATML, write_chat_tokenizer
from fork_server import succeed

from mod_star.cli import main
from mod_star.data import held_out_batches
from mod_star.model.transformer import head_matrix
from mod_star.runs.directory import load_run
from mod_star.runs.metrics import read_metrics
from mod_star.training.objectives.next_token import forward

SMALL = (
    "--preset", "tiny", "--model.width", "8", "--model.heads", "1", "--model.layers", "1", "--model.mlp-width", "8",
    "--model.context", "32", "--routing.every", "0", "--train.batch-size", "2", "--train.steps", "2",
    "--train.eval-batches", "2", "--train.eval-every", "2", "--train.log-every", "1",
)  # fmt: skip


def chats(path: Path) -> Path:
    lines = []
    for number in range(40):
        question, answer = f"hello {number}", f"yes {number}" * (number % 3 + 1)
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        lines.append(json.dumps({"messages": messages}))
    path.write_bytes(pyarrow.Codec("zstd").compress("\n".join(lines).encode(), asbytes=True))
    return path


@pytest.mark.nightly
def test_a_model_learns_answers(tmp_path: Path) -> None:
    source = chats(tmp_path / "chats.jsonl-00001-of-00002.zst")
    tokenizer = write_chat_tokenizer(tmp_path / "model", CHATML) / "tokenizer.json"
    words = ("--data.source", source, "--data.tokenizer", tokenizer, *SMALL, "--train.accumulation", "2")
    done = succeed("train", tmp_path / "run", *words)
    assert re.fullmatch(r"note: data\.source = .*: 1 of 2 shards are read, not number 0\n", done.err), done.err
    records = read_metrics(tmp_path / "run")
    steps, evaluations = ([r for r in records if name in r] for name in ("lm_loss", "eval_loss"))
    assert len(steps) == 2 and len(evaluations) == 1
    # Near what a model knows that knows nothing, of every batch: the mean is taken over what is learned.
    assert all(5 < loss < 7 for loss in (*(r["lm_loss"] for r in steps), evaluations[0]["eval_loss"]))
    run = load_run(tmp_path / "run")
    batches = held_out_batches(run.config.data, run.tokenizer, 32, 2)
    hidden = jax.jit(lambda batch: forward(run.decoder, run.params, batch, None).hidden)
    total = count = 0.0
    for batch in itertools.islice(batches, 2):
        logits = np.asarray(hidden(batch), np.float64) @ np.asarray(head_matrix(run.params), np.float64).T
        logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
        nll = -np.take_along_axis(logits, batch["targets"][..., None], -1)[..., 0]
        said = np.isin(batch["targets"], [run.tokenizer.encode("yes")[0], *run.tokenizer.end_ids])
        assert (batch["weights"][said] == 1).any() and 0 < batch["weights"].mean() < 0.6
        total, count = total + (nll * batch["weights"]).sum(), count + batch["weights"].sum()
    assert evaluations[0]["eval_loss"] == pytest.approx(total / count, rel=1e-3)


def test_what_cannot_be_read_is_said_in_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    source, text = chats(tmp_path / "chats.jsonl.zst"), tmp_path / "a.txt"
    text.write_text("One.<|endoftext|>Two. " * 400)
    for name, content in (
        ("a.tfrecord-00000-of-00001", b"x"), ("a.pdf", b"%PDF"), ("b.txt", gzip.compress(b"x")),
        ("cut.txt.gz", b"\x1f\x8b\x08"), ("a.parquet", b"PAR1"),
    ):  # fmt: skip
        (tmp_path / name).write_bytes(content)
    for words, message in (
        ((source,), "chats.jsonl.zst, line 1: has messages, for which data.tokenizer must have a chat template"),
        ((tmp_path / "a.tfrecord-00000-of-00001",), ".tfrecord files are not read (allowed: .txt, "),
        ((tmp_path / "a.pdf",), ".pdf files are not read (allowed: .txt, "),
        ((tmp_path / "b.txt",), "b.txt: holds gzip-compressed data, must be UTF-8 text"),
        ((tmp_path / "cut.txt.gz",), "cut.txt.gz: is cut off, or no .gz file as its name says ("),
        ((tmp_path / "a.parquet",), "a.parquet: cannot be read as Parquet ("),
        ((text, "--data.separator", "<eot>"), "data.separator = '<eot>': does not occur in data.source = "),
        ((text, "--data.separator", ""), "data.separator = '': must not be empty"),
        (("python-docs", "--data.separator", "x"), "data.separator = 'x': no source is a text file"),
    ):
        with pytest.raises(SystemExit) as left:
            main(["train", str(tmp_path / "run"), *SMALL, "--data.source", *map(str, words)])
        out, err = capsys.readouterr()
        assert (left.value.code, out) == (2, "")
        assert re.fullmatch(r"error: [^\n]+\n", err) and message in err, err
    assert not (tmp_path / "run").exists()
