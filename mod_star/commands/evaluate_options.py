"""Options of `mod-star evaluate`, and which of them go together."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from mod_star.config import MeshConfig
from mod_star.decodings import (
    FIELDS,
    Decoding,
    DecodingName,
    chosen_decoding,
    decodings_with,
    require_decoding,
)
from mod_star.errors import InputError, require

Append = tyro.conf.UseAppendAction


@dataclass(frozen=True)
class EvaluateOptions:
    """Asks the model in RUN the questions of a task, and says how many it answers rightly, with 95 % intervals.

    Examples:
      mod-star evaluate runs/smollm2 --chat --task gsm8k --data gsm8k_test.jsonl --decoding cot --limit 200
      mod-star evaluate runs/smollm2 --task csqa --data csqa_dev.jsonl --protocol choice
      mod-star evaluate runs/first --task gsm8k --data test.jsonl --few-shot 4 --few-shot-data train.jsonl
      mod-star evaluate runs/first --task gsm8k --data test.jsonl --few-shot 5 --few-shot-data train.jsonl
      --prompt-template 'Question: {question}\nAnswer:' --answer-rule gsm8k-strict
      mod-star evaluate runs/first --data items.jsonl --question '{q}' --answer '{a}' --kind choice --choices yes no

    Protocols: generate lets the model write, finds the answer in the text (what follows "the answer is", or else the
    last number, the last of the choices) and compares it with the gold answer. choice takes the choice with the largest
    log-likelihood, plain and per character. expected is that of the Quiet-STaR paper: the probability of the gold
    answer among digits or choices, and whether it is the argmax.

    cot counts, from one generation, aggregated answer and best path by Δ and by both log-probability rankings, and
    greedy decoding, its first branch; self-consistency counts its first sample, too. --confidence adds the rankings by
    DeepConf's confidences and self-certainty, and self-consistency with votes that each ranking weighs. A second table
    says of each ranking how often the right one of two branches has the larger score.

    OUT gets records.jsonl, a line per question as they are done, and results.json. Interrupted, the same command goes
    on.
    """

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Directory of the run."""
    data: Path
    """File of questions: .jsonl, .json, .csv, .tsv or .parquet; but for Parquet also with .gz, .bz2 or .zst."""
    task: Literal["gsm8k", "csqa", "multiarith", "coin_flip"] | None = None
    """What the file holds, in the form in which the task is published; or else --question, --answer and --kind."""
    question: str | None = None
    """Template of a question over the fields of a record, such as '{question}'."""
    answer: str | None = None
    """Template of the gold answer: a text that gives a number, one of the choices, or at most a sentence."""
    kind: Literal["number", "choice", "text"] | None = None
    """What the answers are."""
    choices: tuple[str, ...] = ()
    """For --kind choice: words, or templates such as '{options[0]}'."""
    item_id: str | None = None
    """Template of a question's id; if not given the number of its line."""
    out: Path | None = None
    """Directory for records and results. If not given RUN/evaluations/TASK-PROTOCOL, with the decoding for generate."""
    limit: int | None = None
    """Only this many questions, drawn by --seed."""
    seed: int = 0
    """Draws the questions, the examples and what is sampled while generating."""
    protocol: Literal["generate", "choice", "expected"] = "generate"
    """How answers are judged, see above."""
    decoding: DecodingName | None = None
    """How answers are generated; if not given greedy."""
    branches: int | None = None
    """Branches of cot, samples of self-consistency, width of beam. If not given 10, for beam 4."""
    new_tokens: int | None = None
    """Most tokens of an answer; if not given 256, or as many as the context has room for. Branches that are cut there
    are dropped."""
    temperature: float | None = None
    """Temperature of the draws. If not given 0.8, for self-consistency 0.7."""
    top_k: int | None = None
    """Draw among the k most probable tokens only; 0: all."""
    top_p: float | None = None
    """Draw among the most probable tokens that together have this probability; 1: all."""
    min_p: float | None = None
    """Draw among the tokens that are at least this many times as probable as the most probable one; 0: all. Restricts
    last, after --temperature, --top-k and --top-p."""
    stop: Annotated[tuple[str, ...], Append, tyro.conf.arg(metavar="TEXT")] = ()
    """A string that ends an answer; several times for several. If not given what the next question would begin with:
    the text before it in --prompt-template ("\\nQ:"), or else, after examples, a blank line; with --chat nothing."""
    length_penalty: float | None = None
    """Beam search ranks by log-probability over length to this power. 1 if not given, as in transformers and vLLM; 0:
    the log-probability itself."""
    answer_rule: Literal["gsm8k-strict", "gsm8k-flexible"] | None = None
    """Find and compare numbers as lm-evaluation-harness does for GSM8K; examples are then shown as published, up to
    "#### 18". If not given by our own rules."""
    continuation: str | None = None
    """Ask for the answer by continuing each text with this, such as 'So the answer is'."""
    skip_first: bool = False
    """cot: leave the branched token out of Δ where it is part of the answer."""
    confidence: bool = False
    """cot and self-consistency: measure how sure the model is along every branch, and count those rankings too."""
    p_true: bool = False
    """--confidence: also ask the model in a second question whether each branch is right."""
    vote_temperature: float | None = None
    """Weigh a branch by exp(score / temperature) where answers are added up. If not given by the score, or by the
    probability."""
    keep: float | None = None
    """Share of the branches with an answer, the highest ranked ones, that count where answers are added up. If not
    given 1."""
    early_stop: int | None = None
    """self-consistency: count what stopping samples early would have saved and cost, after this many whole ones; see
    mod-star sample. All samples are generated to their end for it. Above 0 with --confidence."""
    window: int | None = None
    """Tokens over which the confidence in a group is a mean. If not given 32."""
    choice_texts: bool = False
    """--protocol choice: score what choices stand for ("bank"), not their labels ("A")."""
    prompt_template: str | None = None
    """Template of a prompt; if not given 'Q: {question}\\nA:', with --chat '{question}'."""
    chat: bool = False
    """Ask as a user's message in the chat template that the tokenizer comes with."""
    step_by_step: bool = False
    """End prompts with "Let's think step by step."."""
    few_shot: int = 0
    """Answered questions before each question, drawn by --seed."""
    few_shot_data: Path | None = None
    """Where they are from: a file like --data. A .txt file stands before every question as it is. If not given,
    questions of --data that are not asked."""
    think: Literal["never", "always", "auto"] = "never"
    """Before which tokens a model that has learned to think thinks. auto: where it is unsure, by mod-star calibrate."""
    think_temperature: float = 0.0
    """Temperature of the thoughts; 0: always their most probable token."""
    batch_size: int = 8
    """Questions at a time, a multiple of mesh.data x mesh.fsdp. Changes speed and memory, not what is asked."""
    step: int | None = None
    """Step of the checkpoint to load. The newest if not given."""
    capacity: float | None = None
    """One of the model's routing.budgets to use it at. Its routing.capacity if not given."""
    causal_rule: Literal["threshold"] | None = None
    """threshold: routed blocks compute a token if its router score is above the threshold that mod-star calibrate
    chose for the capacity. If not given by the rule that was trained (routing.causal_rule)."""
    budget_over: Literal["batch"] | None = None
    """batch: the questions of a batch share the slots of routed blocks, so that hard ones can take more than easy ones;
    for the protocols choice and expected. If not given each text has slots of its own."""
    headroom: float | None = None
    """Slots of a routed block, as a multiple of its capacity, if not as in training (routing.headroom)."""
    decoded_rows: Literal["all", "fixed"] | None = None
    """Rows that a routed block computes for a token of a batch, if not as in training (routing.decoded_rows). fixed: a
    number that does not depend on data, for GPUs; where more are routed, some pass by."""
    weights: Literal["int8"] | None = None
    """int8: quantise the weights of matrix products when loading, embedding and LM head included, with a scale for
    each output and 64 inputs. Decoding reads and holds 27 % of float32 then. If not given in the model's own type."""
    mesh: MeshConfig = field(default_factory=lambda: MeshConfig(data=1))
    """Devices to use, for a model that is too large for one or for many questions; a single one if not given."""


OF_CUSTOM = ("question", "answer", "kind")
OF_GENERATE = (
    "decoding", "branches", "new_tokens", "temperature", "top_k", "top_p", "min_p", "stop", "continuation",
    "skip_first", "length_penalty", "answer_rule", "confidence", "p_true", "vote_temperature", "keep", "early_stop",
    "window",
)  # fmt: skip
OF_DECODINGS = tuple(name for name in FIELDS if name not in ("answer", "continuation", "ranking", "aggregate"))
"""What a decoding takes from the options: --answer is the gold one here, --continuation goes with every decoding, and
all rankings are counted."""


def checked(options: EvaluateOptions) -> Decoding:
    """The decoding that the options name. Raises InputError for options that do not go together."""
    require(0 <= options.seed < 2**31, "--seed", options.seed, "must lie in [0, 2^31)")
    require(options.batch_size >= 1, "--batch-size", options.batch_size, "must be at least 1")
    require(all(options.stop), "--stop", "", "must not be empty")
    fine = options.continuation is None or bool(options.continuation.strip())
    require(fine, "--continuation", options.continuation, "must not be empty")
    custom = [name for name in OF_CUSTOM if getattr(options, name) is not None]
    if options.task is not None and (custom or options.choices or options.item_id is not None):
        name = flag([*custom, *(["choices"] if options.choices else []), "item_id"][0])
        raise InputError(f"{name}: cannot be combined with --task, which names the fields of its file")
    if options.task is None and len(custom) < len(OF_CUSTOM):
        missing = next(name for name in OF_CUSTOM if name not in custom)
        raise InputError(f"{flag(missing)} is missing: give --task, or --question, --answer and --kind")
    if options.protocol != "generate":
        for name in OF_GENERATE:
            if getattr(options, name) not in (None, (), False):
                raise InputError(
                    f"{flag(name)}: cannot be combined with --protocol {options.protocol}, which generates nothing"
                )
    if options.budget_over is not None:
        allowed = "needs --protocol choice or expected: while generating, each text has slots of its own"
        require(options.protocol != "generate", "--budget-over", options.budget_over, allowed)
        require(options.think == "never", "--budget-over", options.budget_over, "cannot be combined with --think")
    require(not options.choice_texts or options.protocol == "choice", "--choice-texts", True, "needs --protocol choice")
    if options.confidence:
        require_decoding(options.decoding or "greedy", "confidence", decodings_with("window"))
    require(not options.p_true or options.confidence, "--p-true", True, "needs --confidence")
    require(not options.early_stop or options.confidence, "--early-stop", options.early_stop, "needs --confidence")
    stops = options.early_stop != 0 or options.continuation is None
    require(stops, "--early-stop", 0, "must be positive with --continuation: no vote is decided before")
    require(options.window is None or options.confidence, "--window", options.window, "needs --confidence")
    return chosen_decoding(options.decoding or "greedy", {name: getattr(options, name) for name in OF_DECODINGS})


def flag(name: str) -> str:
    """The option of a field, such as --new-tokens of new_tokens."""
    return "--" + name.replace("_", "-")
