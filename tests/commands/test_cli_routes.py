"""`mod-star routes`, and `routes_of` behind it: what is shown is what the model did."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fork_server import succeed

from mod_star.cli import main
from mod_star.errors import InputError
from mod_star.inspection.routes import routes_of, token_pieces
from mod_star.model import Decoder
from mod_star.model.routing import RoutingMode, causal_slots
from mod_star.runs.directory import LoadedRun, load_run
from mod_star.tokenization import ByteTokenizer, train_bpe

TEXT = "The é of\ntokens, and a few more words."
TOKENS = 1 + len(TEXT.encode())


@pytest.fixture(autouse=True)
def no_cache_of_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process the setting would stay for all other tests."""
    monkeypatch.setattr("mod_star.commands.routes.keep_compiled_programs", lambda: None)


@pytest.fixture(scope="module")
def loaded(trained_run: Path) -> LoadedRun:
    return load_run(trained_run)


@pytest.mark.parametrize("mode", ["causal", "top_k"])
def test_routes_are_those_of_the_network(loaded: LoadedRun, mode: RoutingMode) -> None:
    routes = routes_of(loaded, TEXT, mode)
    config = loaded.config
    decoder = Decoder(replace(config.model, scan=False), config.routing)
    slots = causal_slots(config.routing, config.model.context)
    ids = jnp.array([256, *TEXT.encode()])
    output: Any = jax.jit(lambda params: decoder.apply({"params": params}, ids, mode=mode, slots=slots))(loaded.params)
    np.testing.assert_array_equal(routes.routed_LxN, output.trace.selected)
    assert routes.overflow == output.trace.overflow.sum()
    assert routes.block_names == ["block 2"]
    assert len(routes.tokens) == TOKENS
    if mode == "top_k":
        assert routes.routed_LxN.sum(1).tolist() == [round(0.25 * TOKENS)]
    else:
        assert routes.routed_LxN.sum() <= slots


def test_a_stochastic_model_has_routes_too(loaded: LoadedRun) -> None:
    routing = replace(loaded.config.routing, selection="stochastic", headroom=4.0)
    config = replace(loaded.config, routing=routing)
    run = replace(loaded, config=config, decoder=Decoder(config.model, routing))
    routes = routes_of(run, TEXT)
    assert 0 < routes.routed_LxN.mean() < 0.6 and routes.overflow == 0
    np.testing.assert_array_equal(routes.routed_LxN, routes_of(run, TEXT).routed_LxN)


def test_pieces_are_the_text_where_they_can_be(tmp_path: Path) -> None:
    tokenizer = ByteTokenizer()
    assert token_pieces(tokenizer, [256, *"a é\n→".encode()]) == [
        "<bos>", "a", " ", "\\xc3", "\\xa9", "\n", "\\xe2", "\\x86", "\\x92",
    ]  # fmt: skip
    bpe = train_bpe(["the token of the tokens"] * 20, 290, tmp_path / "tokenizer.json")
    text = "the tokens of"
    assert "".join(token_pieces(bpe, bpe.encode(text))) == text


def test_dense_models_and_long_texts_are_refused(loaded: LoadedRun) -> None:
    config = replace(loaded.config, routing=replace(loaded.config.routing, every=0))
    with pytest.raises(InputError, match=r"^routing\.every = 0: this is a dense model"):
        routes_of(replace(loaded, config=config), TEXT)
    with pytest.raises(InputError, match=r"^text = 65 tokens, bos included: must be at most model\.context = 64$"):
        routes_of(loaded, "x" * 64)


def test_the_command_shows_shares_and_draws_a_picture(trained_run: Path, tmp_path: Path) -> None:
    file, png = tmp_path / "text.txt", tmp_path / "deep" / "picture.png"
    file.write_text(TEXT)
    done = succeed("routes", trained_run, "--mode", "top_k", "--text-file", file, "--png", png)
    assert done.err == ""
    assert "\x1b" not in done.out
    assert "<bos>The \\xc3\\xa9 of↵\ntokens, and a few more words." in done.out
    assert re.search(r"block 2 .*25\.\d%   10 of 40 tokens\n", done.out), done.out
    assert done.out.endswith(f"picture: {png}\n")
    assert png.read_bytes().startswith(b"\x89PNG")


def test_the_picture_stands_in_the_run_if_nothing_else_is_said(
    trained_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    drawn: list[Path] = []
    monkeypatch.setattr("mod_star.views.plots.plot_routes", lambda path, *_, **__: drawn.append(path))
    with pytest.raises(SystemExit) as left:
        main(["routes", str(trained_run), "--text", TEXT, "--step", "6"])
    assert left.value.code == 0
    assert drawn == [trained_run / "routes.png"]
    out = capsys.readouterr().out
    assert out.endswith(f"picture: {trained_run / 'routes.png'}\n")


def test_bad_input_is_one_line(capsys: pytest.CaptureFixture[str], trained_run: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    before = sorted(trained_run.rglob("*"))
    run = str(trained_run)
    for argv, message in (
        ([run], "--text: give either --text or --text-file"),
        ([run, "--text", "a", "--text-file", "b"], "--text: give either --text or --text-file"),
        ([run, "--text", "x" * 64], "text = 65 tokens, bos included: must be at most model.context = 64"),
        ([run, "--text", "x", "--mode", "greedy"], "'greedy' for argument '--mode'"),
        ([run, "--text", "x", "--png", "a.jpg"], "--png = 'a.jpg': must be a file that ends with .png"),
        ([run, "--text", "x", "--png", str(tmp_path / "empty.txt" / "a.png")], "is not a writable directory"),
        ([run, "--text-file", str(tmp_path / "empty.txt")], "empty.txt: is empty"),
        ([run, "--text-file", str(tmp_path / "latin.txt")], "latin.txt, line 1: not valid UTF-8"),
        ([run, "--text-file", str(tmp_path / "none.txt")], "none.txt: cannot be read"),
        ([str(tmp_path), "--text", "x"], "is not a run"),
        ([run, "--text", "x", "--step", "5"], "5"),
    ):
        with pytest.raises(SystemExit) as left:
            main(["routes", *argv])
        out, err = capsys.readouterr()
        assert (left.value.code, out) == (2, "")
        assert re.fullmatch(r"error: [^\n]+\n", err), err
        assert message in err
    assert sorted(trained_run.rglob("*")) == before
