"""`mod-star thoughts`, and `thoughts_of` behind it: what is shown is what the model thought."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoding_models import make_generator
from fork_server import succeed
from thinking_models import thinking_params

from mod_star.cli import main
from mod_star.config import ModelConfig, RoutingConfig, RunConfig, ThinkingConfig
from mod_star.decoding import GenerationConfig, Sampling, Think
from mod_star.errors import InputError
from mod_star.inspection.thoughts import thoughts_of
from mod_star.model import Decoder
from mod_star.model.routing import causal_slots
from mod_star.runs.directory import LoadedRun, load_run
from mod_star.tokenization import ByteTokenizer
from mod_star.views.thoughts import Floats, TextThoughts

TEXT = "The é of\ntokens, and a few more words."
TOKENS = 1 + len(TEXT.encode())


@pytest.fixture(autouse=True)
def no_cache_of_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process the setting would stay for all other tests."""
    monkeypatch.setattr("mod_star.commands.thoughts.keep_compiled_programs", lambda: None)


@pytest.fixture(scope="module")
def loaded(random_params: Any) -> LoadedRun:
    """A small model of bytes that thinks at random, so that thoughts matter; with room for all that it routes."""
    model = ModelConfig(vocab_size=320, width=16, layers=2, heads=2, mlp_width=24, context=64, tie_embeddings=False)
    routing = RoutingConfig(capacity=0.25, predictor_width=8, headroom=4.0)
    config = RunConfig(model=model, routing=routing, thinking=ThinkingConfig(thought_length=3, n_true=2))
    params = thinking_params(config, random_params(model, routing))
    return LoadedRun(config, ByteTokenizer(), Decoder(model, routing), params, 3)


@pytest.fixture(scope="module")
def thoughts(loaded: LoadedRun) -> TextThoughts:
    return thoughts_of(loaded, TEXT)


def numbers(values: Floats) -> np.ndarray[Any, Any]:
    """With nan for none."""
    return np.array(values, float)


@pytest.mark.nightly
def test_base_predictions_are_those_of_the_network(loaded: LoadedRun, thoughts: TextThoughts) -> None:
    ids = jnp.array([256, *TEXT.encode()])
    slots = causal_slots(loaded.config.routing, loaded.config.model.context)
    run: Any = jax.jit(lambda params: loaded.decoder.apply({"params": params}, ids, mode="causal", slots=slots))
    logits = jnp.dot(run(loaded.params).hidden, loaded.params["head"].T)
    log_p = np.asarray(jax.nn.log_softmax(logits))
    expected = log_p[np.arange(TOKENS - 1), np.asarray(ids[1:])]
    assert thoughts.base_log_probs[0] is thoughts.entropies[0] is None
    np.testing.assert_allclose(numbers(thoughts.base_log_probs)[1:], expected, atol=1e-5)
    np.testing.assert_allclose(numbers(thoughts.entropies)[1:], -np.sum(np.exp(log_p) * log_p, -1)[:-1], atol=1e-5)
    assert len(thoughts.tokens) == TOKENS and thoughts.tokens[:2] == ["<bos>", "T"]


@pytest.mark.nightly
def test_thoughts_are_those_of_generating_the_same_text(loaded: LoadedRun) -> None:
    generator = make_generator(loaded.decoder, loaded.params, thinking=loaded.config.thinking)
    prompt = [256, *b"The "]
    new = TOKENS - len(prompt)  # as many tokens as `thoughts` has compiled for
    (result,) = generator.generate([prompt], GenerationConfig(new, Sampling(1.0), seed=0, think=Think("always")))

    class Echo:
        """Any text is the generated one."""

        bos_id = 256
        encode = staticmethod(lambda text: [*prompt[1:], *result.tokens])

        def __getattr__(self, name: str) -> Any:
            return getattr(loaded.tokenizer, name)

    tokenizer: Any = Echo()
    found = thoughts_of(replace(loaded, tokenizer=tokenizer), "")
    made = [loaded.tokenizer.decode(thought) for thought in result.thoughts if thought is not None]
    assert found.thoughts[len(prompt) :] == made
    assert len(set(made)) > 3 and all(len(pieces) == 3 for pieces in found.thought_tokens[1:])
    np.testing.assert_allclose(numbers(found.talk_log_probs)[len(prompt) :], result.log_probs, atol=1e-4)
    np.testing.assert_allclose(numbers(found.entropies)[len(prompt) :], result.entropies, atol=1e-4)
    np.testing.assert_allclose(numbers(found.weights)[len(prompt) :], np.array(result.mixing_weights, float), atol=1e-4)


@pytest.mark.nightly
def test_nothing_stands_behind_the_first_token(thoughts: TextThoughts) -> None:
    assert (thoughts.thoughts[0], thoughts.thought_tokens[0]) == ("", [])
    assert thoughts.talk_log_probs[0] is thoughts.weights[0] is None
    assert np.ma.getmaskarray(thoughts.gains).tolist() == [True] + [False] * (TOKENS - 1)
    assert np.abs(thoughts.gains[1:]).max() > 0.01, "thoughts must matter for the tests to show anything"


@pytest.mark.nightly
def test_draws_follow_the_seed(loaded: LoadedRun) -> None:
    first, again, other = (thoughts_of(loaded, TEXT, 1.0, seed).thought_tokens for seed in (1, 1, 2))
    assert first == again != other


def test_models_that_cannot_think_and_long_texts_are_refused(loaded: LoadedRun, trained_run: Path) -> None:
    with pytest.raises(
        InputError, match=r"^train\.objective = 'next_token': must be quiet_star: the model has not learned to think$"
    ):
        thoughts_of(load_run(trained_run), TEXT)
    with pytest.raises(InputError, match=r"^text = 65 tokens, bos included: must be at most model\.context = 64$"):
        thoughts_of(loaded, "x" * 64)


class Page(HTMLParser):
    """Counts a page's tokens and checks that what is opened is closed."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tokens = 0
        self.open: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tokens += "data-n" in dict(attrs)
        if tag not in ("meta", "input"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.mark.slow
def test_the_command_shows_a_picture_and_writes_a_page(thinking_run: Path, tmp_path: Path) -> None:
    file, page = tmp_path / "text.txt", tmp_path / "deep" / "page.html"
    file.write_text(TEXT)
    done = succeed("thoughts", thinking_run, "--text-file", file, "--html", page)
    assert done.err == ""
    assert "\x1b" not in done.out
    assert "<bos>The \\xc3\\xa9 of↵\ntokens, and a few more words." in done.out
    assert f"of {TOKENS - 1} tokens helped" in " ".join(done.out.split())
    assert done.out.endswith(f"page: {page}\n")
    parsed = Page(page.read_text(encoding="utf-8"))
    assert (parsed.tokens, parsed.open) == (TOKENS, [])
    assert "Thoughts of run, step 3" in page.read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_page_stands_in_the_run_if_nothing_else_is_said(
    thinking_run: Path, thoughts: TextThoughts, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    written: list[Path] = []
    monkeypatch.setattr("mod_star.inspection.thoughts.thoughts_of", lambda *_: thoughts)
    monkeypatch.setattr(Path, "write_text", lambda path, *_, **__: written.append(path))
    with pytest.raises(SystemExit) as left:
        main(["thoughts", str(thinking_run), "--text", TEXT])
    assert left.value.code == 0
    assert written == [thinking_run / "thoughts.html"]
    assert capsys.readouterr().out.endswith(f"page: {thinking_run / 'thoughts.html'}\n")


def test_bad_input_is_one_line(
    capsys: pytest.CaptureFixture[str], thinking_run: Path, trained_run: Path, tmp_path: Path
) -> None:
    (tmp_path / "empty.txt").write_text("")
    before = sorted(thinking_run.rglob("*"))
    run = str(thinking_run)
    for argv, message in (
        ([run], "--text: give either --text or --text-file"),
        ([run, "--text", "a", "--text-file", "b"], "--text: give either --text or --text-file"),
        ([run, "--text", "x" * 64], "text = 65 tokens, bos included: must be at most model.context = 64"),
        ([run, "--text", "x", "--html", "a.png"], "--html = 'a.png': must be a file that ends with .html"),
        ([run, "--text", "x", "--html", str(tmp_path / "empty.txt" / "a.html")], "is not a writable directory"),
        ([run, "--text", "x", "--temperature", "-1"], "temperature = -1.0: must be 0 (greedy)"),
        ([run, "--text", "x", "--seed", "-1"], "--seed = -1: must lie in [0, 2^32)"),
        ([run, "--text-file", str(tmp_path / "empty.txt")], "empty.txt: is empty"),
        ([str(trained_run), "--text", "x"], "train.objective = 'next_token': must be quiet_star"),
        ([str(tmp_path), "--text", "x"], "is not a run"),
        ([run, "--text", "x", "--step", "5"], "5"),
    ):
        with pytest.raises(SystemExit) as left:
            main(["thoughts", *argv])
        out, err = capsys.readouterr()
        assert (left.value.code, out) == (2, "")
        assert re.fullmatch(r"error: [^\n]+\n", err), err
        assert message in err
    assert sorted(thinking_run.rglob("*")) == before
