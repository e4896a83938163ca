"""`mod-star evaluate`: asks a model the questions of a task and counts right answers."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mod_star.commands import keep_compiled_programs, on_working_copy, parse_options, require_writable
from mod_star.commands.evaluate_options import EvaluateOptions, checked, flag
from mod_star.commands.evaluate_report import report
from mod_star.decodings import WINDOW, Decoding
from mod_star.errors import require
from mod_star.runs.buckets import bring_back, checkpoints_of, copied_from

if TYPE_CHECKING:
    from mod_star.evaluation.generation import GeneratedAnswer
    from mod_star.evaluation.prompts import Prompts
    from mod_star.evaluation.protocols import Numbered, ProtocolOf, Subject
    from mod_star.evaluation.records import Records
    from mod_star.evaluation.tasks import CustomTask, Item

DEFAULT_NEW_TOKENS = 256
WITHOUT_INFLUENCE = ("out", "batch_size", "mesh")
"""Options that records don't depend on."""
ANSWER_RULES = 3
"""Raised when our own rules change what is found in a text: records of two of them are not mixed."""
SECONDS_BETWEEN_COPIES = 60.0
"""Of the records of a run in a bucket, from its working copy to there."""


def run(argv: Sequence[str]) -> None:
    """Runs the command. Errors are `mod_star.cli`'s to show."""
    with on_working_copy(parse_options(EvaluateOptions, argv, "mod-star evaluate")) as options:
        _run(options)


def _run(options: EvaluateOptions) -> None:
    decoding = checked(options)

    # Only now, when the command line is known to be good: JAX takes seconds to import.
    from rich.console import Console

    from mod_star.commands.sample import chosen_think, with_chosen_rule, with_options_of_routing
    from mod_star.distributed.sharding import make_small_mesh
    from mod_star.evaluation.generation import GeneratedAnswer
    from mod_star.evaluation.prompts import Prompts, few_shot, subset
    from mod_star.evaluation.protocols import Subject
    from mod_star.evaluation.records import open_records, require_evaluation
    from mod_star.evaluation.scoring import require_shareable
    from mod_star.evaluation.tasks import load_task
    from mod_star.model.pooled import require_poolable
    from mod_star.runs.directory import load_run
    from mod_star.runs.integrity import params_digest

    how = _task(options)
    task = load_task(how, options.data)
    items = subset(task.items, options.limit, options.seed)
    examples, preamble, examples_digest = few_shot(
        options.few_shot, options.few_shot_data, task, items, how, options.seed
    )
    if options.answer_rule is not None:
        examples = tuple(dataclasses.replace(each, solution=each.published or each.solution) for each in examples)
    out = options.out or options.run / "evaluations" / f"{task.name}-{options.decoding or options.protocol}"
    mesh = make_small_mesh(options.mesh)
    require_shareable("--batch-size", options.batch_size, mesh)
    loaded = load_run(options.run, options.step, mesh=mesh, capacity=options.capacity, weights=options.weights)
    loaded = with_chosen_rule(loaded, options)
    prompts = Prompts(
        loaded.tokenizer, options.prompt_template, options.chat, options.step_by_step, examples, preamble
    )  # fmt: skip
    protocol = _protocol(options, decoding, prompts, items, loaded.decoder.config.context)
    config = _config(options, loaded.step) | {"data_sha256": task.sha256, "few_shot_sha256": examples_digest}
    config["checkpoint_sha256"] = params_digest(checkpoints_of(options.run), loaded.step)
    think = chosen_think(loaded, options)
    if think.threshold is not None:
        config["think_threshold"] = think.threshold  # another calibration is another evaluation
        config |= {} if think.by == "entropy" else {"think_by": think.by}
    if options.causal_rule is not None:
        config["routing thresholds"] = loaded.params["groups"]["routed"]["predictor"]["threshold"].tolist()
    if isinstance(protocol, GeneratedAnswer):
        config |= {"stop strings": list(protocol.stop), "most new tokens": protocol.new_tokens}
        config |= {"answer rules": ANSWER_RULES} if options.answer_rule is None else {}
    require_evaluation(out, config)
    require_writable("--out", out / "records.jsonl")
    decoder = with_options_of_routing(loaded.decoder, options)
    if options.budget_over is not None:
        require_poolable(decoder.routing, "--budget-over", options.budget_over)
        allowed = "must be left out on several devices, each of which has questions of its own"
        require(mesh is None, "--budget-over", options.budget_over, allowed)
        decoder = decoder.clone(budget_over=options.budget_over)
    subject = Subject(dataclasses.replace(loaded.model, decoder=decoder), prompts, think, donate=True)
    protocol.check(subject, items)
    keep_compiled_programs()
    console = Console(highlight=False)
    if isinstance(protocol, GeneratedAnswer):
        for note in _notes(options, protocol, examples):
            print(f"note: {note}", file=sys.stderr)
    with open_records(out, config) as records:
        todo = [(number, item) for number, item in enumerate(items) if item.id not in records.by_id]
        if len(todo) < len(items):
            console.print(f"{len(items) - len(todo)} of {len(items)} questions are done already", markup=False)
        _ask(subject, protocol, todo, len(items), records, options.run)
        overflow = sum(record.get("overflow", 0) for record in records.by_id.values())
        if options.budget_over is not None and overflow:
            again = "all slots of a batch were taken: raise --headroom"
            print(f"note: {overflow} times a token passed by because {again}", file=sys.stderr)
        report(task, protocol, config, records, out, console)


def _task(options: EvaluateOptions) -> str | CustomTask:
    from mod_star.evaluation.tasks import CustomTask

    if options.task is not None:
        return options.task
    assert options.question is not None and options.answer is not None and options.kind is not None
    return CustomTask(options.question, options.answer, options.kind, options.choices, options.item_id)


def _protocol(
    options: EvaluateOptions, decoding: Decoding, prompts: Prompts, items: Sequence[Item], context: int
) -> ProtocolOf:
    from mod_star.decoding.answers import KINDS
    from mod_star.decoding.confidence import ConfidenceConfig, TrueQuestion
    from mod_star.decoding.cot import tokens_after
    from mod_star.decoding.generation_config import config_of
    from mod_star.decoding.p_true import tokens_of_question
    from mod_star.evaluation.generation import GeneratedAnswer
    from mod_star.evaluation.likelihood import ChoiceLikelihood, ExpectedProbability

    if options.protocol == "choice":
        return ChoiceLikelihood(options.choice_texts, options.batch_size, options.seed)
    if options.protocol == "expected":
        return ExpectedProbability(options.batch_size, options.seed)
    config_of(decoding, 1)  # an error of these options is told now
    new_tokens = options.new_tokens
    if new_tokens is None:
        room = context - max(len(prompts.encode(item)) for item in items)
        asking = 0 if options.continuation is None else tokens_after(prompts.tokenizer, options.continuation)
        room -= max(asking, tokens_of_question(prompts.tokenizer, TrueQuestion()) if options.p_true else 0)
        new_tokens = max(1, min(DEFAULT_NEW_TOKENS, room))
    confidence = None
    if options.confidence:
        confidence = ConfidenceConfig(options.window or WINDOW, TrueQuestion() if options.p_true else None)
    return GeneratedAnswer(
        decoding, new_tokens, options.stop or prompts.stop, options.continuation, options.batch_size, options.seed,
        None if options.answer_rule is None else KINDS[options.answer_rule], confidence,
    )  # fmt: skip


def _notes(options: EvaluateOptions, protocol: GeneratedAnswer, examples: Sequence[Item]) -> list[str]:
    """What was decided for the user and changes what is found."""
    notes = []
    if not options.stop:
        ends = " or ".join(json.dumps(text, ensure_ascii=False) for text in protocol.stop)
        why = "what the next question would begin with" if protocol.stop else "no text is known to begin the next one"
        notes.append(f"texts end at {ends or 'end tokens only'} ({why}; --stop names other strings)")
    if options.new_tokens is None and protocol.new_tokens < DEFAULT_NEW_TOKENS:
        notes.append(f"texts have at most {protocol.new_tokens} new tokens, all that the context has room for")
    if options.answer_rule == "gsm8k-strict" and any("#### " not in each.solution for each in examples):
        notes.append("gsm8k-strict looks for '#### 18', and the examples do not end like that")
    return notes


def _config(options: EvaluateOptions, step: int) -> dict[str, Any]:
    """What records depend on, by option."""
    values = {name: value for name, value in dataclasses.asdict(options).items() if name not in WITHOUT_INFLUENCE}
    values |= {"step": step, "decoding": options.decoding or ("greedy" if options.protocol == "generate" else None)}
    for name in ("run", "data", "few_shot_data"):  # the same file, wherever the command was given
        values[name] = None if values[name] is None else str(Path(values[name]).absolute())
    values["run"] = copied_from(options.run) or values["run"]
    return {flag(name): value for name, value in values.items()}


def _ask(
    subject: Subject, protocol: ProtocolOf, todo: Sequence[Numbered], total: int, records: Records, run: Path
) -> None:
    """Adds the records that are missing, under a bar with the running result; to the bucket too, if `run` is in one."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    if not todo:
        return
    errors = Console(stderr=True, highlight=False)
    bar = Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=errors,
        disable=not errors.is_terminal,
    )  # fmt: skip
    scores = [float(record["scores"][protocol.headline]) for record in records.by_id.values()]
    brought = time.monotonic()
    with bar:
        line = bar.add_task(protocol.headline, total=total, completed=total - len(todo))
        for record in protocol.records(subject, todo):
            records.add(record)
            if time.monotonic() - brought > SECONDS_BETWEEN_COPIES:
                with suppress(OSError):  # if it stays so, it is said at the end
                    bring_back(run)
                brought = time.monotonic()
            scores.append(float(record["scores"][protocol.headline]))
            so_far = f"{protocol.headline}: {100 * sum(scores) / len(scores):.1f} %"
            bar.update(line, advance=1, description=so_far)
            if bar.disable and (len(scores) % 50 == 0 or len(scores) == total):
                print(f"{len(scores)} of {total}  {so_far}", file=sys.stderr, flush=True)
