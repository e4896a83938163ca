"""The adapter for lm-evaluation-harness: a real `lm_eval` in a process of its own against our own scoring.

What needs lm_eval is skipped where it is not installed (`pip install "mod-star[harness]"`).
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mod_star.cli import main
from mod_star.decoding import GenerationConfig, Generator, Sampling
from mod_star.decoding.text import complete
from mod_star.errors import InputError
from mod_star.evaluation import harness
from mod_star.evaluation.harness import HarnessModel, generation_options
from mod_star.evaluation.scoring import ScoringConfig, rolling_windows, score
from mod_star.runs.directory import LoadedRun, load_run

ROOT = Path(__file__).parents[2]
INSTALLED = importlib.util.find_spec("lm_eval") is not None
QUESTIONS: list[dict[str, Any]] = [
    {"question": "Which is a fruit?", "choices": ["apple", "a stone", "é"], "gold": 0},
    {"question": "And which is not? " * 12, "choices": ["plum", "rain"], "gold": 1},  # longer than the context
]
TEXTS: list[dict[str, Any]] = [{"text": "A short one."}, {"text": "def f(x):\n    return x + 1\n" * 12}]
TASKS: dict[str, tuple[list[dict[str, Any]], str]] = {
    "ours_choice": (
        QUESTIONS,
        'output_type: multiple_choice\ndoc_to_text: "Q: {{question}}\\nA:"\ndoc_to_choice: "{{choices}}"\n'
        'doc_to_target: "{{gold}}"\nmetric_list:\n  - metric: acc\n',
    ),
    "ours_rolling": (
        TEXTS,
        'output_type: loglikelihood_rolling\ndoc_to_text: ""\ndoc_to_target: "{{text}}"\n'
        "metric_list:\n  - metric: bits_per_byte\n",
    ),
    "ours_generate": (
        QUESTIONS,
        'output_type: generate_until\ndoc_to_text: "{{question}}"\ndoc_to_target: "{{choices[0]}}"\n'
        'generation_kwargs:\n  until: ["e"]\n  max_gen_toks: 12\n  do_sample: false\n'
        "metric_list:\n  - metric: exact_match\n",
    ),
}


class Hook:
    """What the harness's cache is told."""

    def __init__(self) -> None:
        self.kept: list[tuple[Any, ...]] = []

    def add_partial(self, *what: Any) -> None:
        self.kept.append(what)


def model(run: Path, **arguments: Any) -> HarnessModel:
    made = HarnessModel(str(run), **arguments)
    made.cache_hook = Hook()
    return made


@pytest.fixture(scope="module")
def loaded(trained_run: Path) -> LoadedRun:
    return load_run(trained_run)


@pytest.fixture(scope="module")
def samples(trained_run: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """What `mod-star harness` writes of each task, by document."""
    if not INSTALLED:
        pytest.skip("lm_eval is not installed: pip install 'mod-star[harness]'")
    path = tmp_path_factory.mktemp("harness")
    for name, (records, rest) in TASKS.items():
        data = path / f"{name}.jsonl"
        data.write_text("".join(json.dumps(record) + "\n" for record in records))
        source = (
            f"task: {name}\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {data}\ntest_split: test\n"
        )
        (path / f"{name}.yaml").write_text(source + rest)
    words = [
        sys.executable, "-m", "mod_star", "harness", "--model", "mod_star", "--model_args", f"run={trained_run}",
        "--tasks", ",".join(TASKS), "--include_path", path, "--output_path", path / "out", "--log_samples",
        "--batch_size", "2",
    ]  # fmt: skip
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(path / "cache"), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        list(map(str, words)), cwd=path, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "ours_choice" in done.stdout and "bits_per_byte" in done.stdout
    found = {}
    for name in TASKS:
        (file,) = (path / "out").rglob(f"samples_{name}_*.jsonl")
        found[name] = sorted(map(json.loads, file.read_text().splitlines()), key=lambda sample: sample["doc_id"])
    return found


@pytest.mark.slow
def test_choices_get_our_log_likelihoods(samples: dict[str, Any], loaded: LoadedRun) -> None:
    tokenizer, context = loaded.tokenizer, loaded.decoder.config.context
    for sample, record in zip(samples["ours_choice"], QUESTIONS, strict=True):
        before = [tokenizer.bos_id, *tokenizer.encode(f"Q: {record['question']}\nA:")]
        for ((value, greedy),), choice in zip(sample["resps"], record["choices"], strict=True):
            after = tokenizer.encode(f" {choice}")
            ids = before[-(context + 1 - len(after)) :]
            (expected,) = score(loaded.model, [(ids, after)])
            assert float(value) == pytest.approx(sum(expected.log_probs), abs=1e-3)
            assert str(greedy) == str(all(expected.is_greedy))


@pytest.mark.slow
def test_long_texts_get_our_log_likelihood(samples: dict[str, Any], loaded: LoadedRun) -> None:
    tokenizer, context = loaded.tokenizer, loaded.decoder.config.context
    for sample, record in zip(samples["ours_rolling"], TEXTS, strict=True):
        windows = rolling_windows(tokenizer.encode(record["text"]), tokenizer.bos_id, context)
        expected = sum(sum(each.log_probs) for each in score(loaded.model, windows))
        ((value,),) = sample["resps"]
        assert float(value if isinstance(value, str | float) else value[0]) == pytest.approx(expected, abs=2e-3)


@pytest.mark.slow
def test_texts_are_what_we_generate(samples: dict[str, Any], loaded: LoadedRun) -> None:
    room = loaded.decoder.config.context - 12
    for sample, record in zip(samples["ours_generate"], QUESTIONS, strict=True):
        ((text,),) = sample["resps"]
        assert text == generate(loaded, record["question"], room, 12, ["e"])


def generate(run: LoadedRun, prompt: str, room: int, new_tokens: int, stop: list[str]) -> str:
    generator = Generator(run.model)
    encoded = [[run.tokenizer.bos_id, *run.tokenizer.encode(prompt)][-room:]]
    *_, (last,) = complete(
        generator, [prompt], GenerationConfig(new_tokens, Sampling(temperature=0), stop=tuple(stop)), encoded=encoded
    )
    return last.text


@pytest.mark.slow
def test_results_are_kept_as_they_come(trained_run: Path, loaded: LoadedRun) -> None:
    ours = model(trained_run, batch_size="auto", max_length=20)
    requests = [SimpleNamespace(args=("ab", {"until": "e", "max_gen_toks": 5})), SimpleNamespace(args=("abc", {}))]
    texts = ours.generate_until(requests[:1], disable_tqdm=True)
    assert texts == [generate(loaded, "ab", 15, 5, ["e"])]
    pair = (("a", " b"), ours.tok_encode("a"), ours.tok_encode(" b", add_special_tokens=False))
    ((value, _),) = ours._loglikelihood_tokens([pair], disable_tqdm=True)
    (rolling,) = ours.loglikelihood_rolling([SimpleNamespace(args=("a b c" * 9,))], disable_tqdm=True)
    assert [entry[0] for entry in ours.cache_hook.kept] == ["generate_until", "loglikelihood", "loglikelihood_rolling"]
    assert [entry[2] for entry in ours.cache_hook.kept] == [texts[0], (value, False), rolling]
    with pytest.raises(InputError, match="max_gen_toks = 256: must be below the longest text, 20 tokens"):
        ours.generate_until(requests, disable_tqdm=True)
    assert len(ours.cache_hook.kept) == 3  # it was told before anything was generated


@pytest.mark.slow
def test_a_thinking_run_thinks_before_what_is_scored(thinking_run: Path) -> None:
    pair = (("a", " b"), [256, 97], [32, 98])
    plain = model(thinking_run)._loglikelihood_tokens([pair], disable_tqdm=True)
    ours = model(thinking_run, think="always")
    (expected,) = score(ours._model, [(pair[1], pair[2])], ScoringConfig(think=ours._think))
    ((value, _),) = ours._loglikelihood_tokens([pair], disable_tqdm=True)
    assert value == pytest.approx(sum(expected.log_probs), abs=1e-5)
    assert ours._think.when == "always" and expected.thought == [True, True] and value != plain[0][0]


def test_chats(trained_run: Path) -> None:
    ours = model(trained_run)
    with pytest.raises(InputError, match="no chat template"):
        ours.apply_chat_template([{"role": "user", "content": "hi"}])

    class Chatting:
        chat_template = "source"
        fingerprint = "tokenizer.json 1234"

        def apply_chat(self, messages: list[dict[str, str]]) -> str:
            return "".join(f"<{m['role']}>{m['content']}" for m in messages) + "<assistant>"

    ours.tokenizer = Chatting()  # type: ignore[assignment]
    history = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "The answer is"}]
    assert ours.apply_chat_template(history[:1]) == "<user>hi<assistant>"
    assert ours.apply_chat_template(history, add_generation_prompt=False) == "<user>hi<assistant>The answer is"
    with pytest.raises(InputError, match="must be the assistant's"):
        ours.apply_chat_template(history[:1], add_generation_prompt=False)
    assert (ours.chat_template(True), ours.chat_template(False)) == ("source", None)
    with pytest.raises(InputError, match="apply_chat_template = 'rag'"):
        ours.chat_template("rag")
    assert ours.tokenizer_name == "tokenizer.json-1234"


class Encoder:
    """How lm_eval's `TemplateLM` splits a pair."""

    def tok_encode(self, string: str) -> list[int]:
        raise NotImplementedError

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        spaces = len(context) - len(context.rstrip())
        if spaces > 0:
            continuation, context = context[-spaces:] + continuation, context[:-spaces]
        before = self.tok_encode(context)
        return before, self.tok_encode(context + continuation)[len(before) :]


@pytest.mark.parametrize("starts_with_bos", [True, False])
def test_a_context_of_white_space_leaves_the_continuation_whole(trained_run: Path, starts_with_bos: bool) -> None:
    ours: Any = type("Ours", (HarnessModel, Encoder), {})(str(trained_run))
    ours.tokenizer = SimpleNamespace(
        encode=lambda text: list(text.encode()), bos_id=256, starts_with_bos=starts_with_bos
    )  # fmt: skip
    assert ours._encode_pair("  ", "ab") == ([256], list(b"  ab"))
    assert ours._encode_pair("\n", " ab") == ([256], list(b"\n ab"))
    assert ours._encode_pair("c ", "ab") == ([256] * starts_with_bos + list(b"c"), list(b" ab"))


def test_generation_options() -> None:
    greedy = Sampling(temperature=0)
    assert generation_options({}, 256) == ([], 256, greedy)
    assert generation_options({"until": "\n", "max_new_tokens": 7, "do_sample": False, "temperature": 1.0}, 9) == (
        ["\n"], 7, greedy,
    )  # fmt: skip
    sampled = {"until": ["a", "b"], "temperature": 0.7, "top_k": 5, "top_p": 0.9, "max_gen_toks": 3, "max_tokens": 4}
    assert generation_options(sampled, 9) == (["a", "b"], 3, Sampling(0.7, 5, 0.9))
    assert generation_options({"do_sample": True, "top_k": None}, 9)[2] == Sampling(1.0)
    assert generation_options({"do_sample": True, "temperature": 0.0}, 9)[2] == greedy
    for given, message in (
        ({"num_beams": 4}, "generation_kwargs.num_beams = 4: must be 1"),
        ({"repetition_penalty": 1.1}, r"generation_kwargs.repetition_penalty = 1.1: must be 1"),
        ({"do_sample": True, "typical_p": 0.9}, r"generation_kwargs.typical_p = 0.9: must be 1"),
        ({"do_sample": True, "min_p": 2}, r"min_p = 2.0: must lie in \[0, 1\]"),
        ({"mirostat": 2}, "generation_kwargs.mirostat = 2: unknown; there are until, "),
        ({"num_beams": "1"}, "generation_kwargs.num_beams = '1': must be a number"),
        ({"temperature": "hot"}, "generation_kwargs.temperature = 'hot': must be a number"),
        ({"do_sample": "no"}, "generation_kwargs.do_sample = 'no': must be true or false"),
        ({"do_sample": True, "top_p": 0}, r"top_p = 0.0: must lie in \(0, 1\]"),
        ({"max_new_tokens": True}, "generation_kwargs.max_new_tokens = True: must be a positive integer"),
        ({"until": [""]}, "generation_kwargs.until"),
        ({"max_gen_toks": 0}, "max_gen_toks = 0"),
        ({"temperature": -1.0}, "temperature = -1.0"),
    ):
        with pytest.raises(InputError, match=message):
            generation_options(given, 9)


def test_options_that_ask_for_what_we_do_are_taken() -> None:
    greedy = {"until": ["\n"], "do_sample": False, "num_beams": 1, "max_gen_toks": 8}  # as many tasks have it
    assert generation_options(greedy, 9) == (["\n"], 8, Sampling(temperature=0))
    as_transformers_has_it = {
        "do_sample": False, "temperature": 1.0, "top_p": 1.0, "top_k": 50, "num_beams": 1, "num_return_sequences": 1,
        "repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "min_p": 0.05, "typical_p": 0.9, "length_penalty": 2.0,
        "early_stopping": True, "use_cache": True, "pad_token_id": 0, "eos_token_id": None, "min_length": 0,
    }  # fmt: skip
    assert generation_options(as_transformers_has_it, 9) == ([], 9, Sampling(temperature=0))
    as_vllm_has_it = {"temperature": 0.6, "top_k": -1, "top_p": 0.95, "presence_penalty": 0.0, "n": 1, "min_p": 0}
    assert generation_options(as_vllm_has_it, 9)[2] == Sampling(0.6, 0, 0.95)
    assert generation_options(as_vllm_has_it | {"min_p": 0.05}, 9)[2] == Sampling(0.6, 0, 0.95, 0.05)
    assert generation_options({"temperature": None, "do_sample": True, "top_p": None}, 9)[2] == Sampling(1.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": "many"}, "batch_size = 'many': must be a positive integer or auto"),
        ({"batch_size": 0}, "batch_size = 0"),
        ({"think": "often"}, "think = 'often': must be one of never, always, auto"),
        ({"think": "always"}, "think = 'always': must be never: .* has not learned to think"),
        ({"max_length": 10_000}, r"max_length = 10000: must lie in \[2, "),
        ({"overlap": 0}, "overlap = 0"),
        ({"seed": -1}, "seed = -1"),
        ({"step": 5}, "step = 5"),
    ],
)
def test_bad_arguments_are_refused(trained_run: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        HarnessModel(str(trained_run), **arguments)


def test_auto_needs_a_calibrated_run(thinking_run: Path) -> None:
    with pytest.raises(InputError, match="mod-star calibrate"):
        HarnessModel(str(thinking_run), think="auto")


def test_without_lm_eval_one_line_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setattr(harness, "register", harness.register.__wrapped__)
    with pytest.raises(SystemExit) as stop:
        main(["harness", "--model", "mod_star"])
    assert stop.value.code == 2
    assert capsys.readouterr().err.splitlines() == ["error: lm_eval is not installed: pip install 'mod-star[harness]'"]
