"""The comparison at equal FLOPs: what its arms cost, where the least loss is, and what the routers chose."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from rich.console import Console

from experiments.isoflop.choices import kind_of, look, read_document
from experiments.isoflop.choices_report import (
    BINS,
    KINDS,
    STEPS,
    Document,
    Seen,
    beyond_kinds,
    by_entropy,
    by_kind,
    by_steps,
    entropy_edges,
    prompt_shares,
    solution_shares,
)
from experiments.isoflop.run import ARMS, SWEPT, Cell, Options, cells, config
from experiments.support.workers import train_all
from mod_star.config import to_dict
from mod_star.errors import InputError
from mod_star.flops import forward_flops
from mod_star.inspection.routes import routes_of
from mod_star.model.routing import RoutingMode
from mod_star.parts import load_parts
from mod_star.runs.directory import load_run
from mod_star.stages import plan_stages
from mod_star.tokenization import ByteTokenizer

RECORD = {"question": "Tom has 3 pens. é?", "answer": "He has 3*2=<<3*2=6>>6 pens.\nSo 6.\n#### 16"}


@pytest.mark.parametrize("width", Options().widths)
def test_mod_costs_what_dense_does_for_each_token_and_in_all(width: int) -> None:
    runs = [config(Options(), Cell(arm, width, 0)) for arm in SWEPT]
    dense, mod = (forward_flops(run.model, run.routing, run.model.context).total for run in runs)
    assert abs(mod / dense - 1) < 0.01
    assert runs[0].train == runs[1].train and runs[0].train.steps % max(Options().multiples) == 0
    assert all(plan_stages(run).flops <= max(Options().budgets) for run in runs)


def test_other_arms_cost_no_more_than_the_dense_model() -> None:
    options = Options()
    dense = plan_stages(config(options, Cell("dense", options.middle, 0)))
    for arm in ARMS:
        run = config(options, Cell(arm, options.middle, 0))
        assert 0.94 * dense.flops < plan_stages(run).flops <= dense.flops, arm
        assert (plan_stages(run).steps == dense.steps) == ARMS[arm].same_steps
        assert load_parts(run.parts).router.init(jax.random.key(0), run.model) is not None


def test_each_seed_begins_with_all_arms() -> None:
    order = list(cells(Options(seeds=(3, 4))))
    assert [cell.arm for cell in order[: len(ARMS)]] == list(ARMS) and {cell.seed for cell in order[:14]} == {3}
    assert len(order) == len(set(order)) == 2 * (len(ARMS) + 2 * 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (Options(budgets=(1e11, 1.5e11)), r"^--budgets = 150000000000\.0: must be a multiple of the smallest, 1e\+11$"),
        (Options(budgets=()), r"^--budgets = \(\): must be above 0$"),
        (Options(budgets=(1e6,)), r"^--budgets = 1000000\.0: must be at least one step's, 9\.31e\+08 at width 32$"),
        (Options(middle=40), r"^--middle = 40: must be one of --widths \(8, 16, 24, 32, 48\)$"),
    ],
)
def test_what_cannot_be_compared_is_refused(options: Options, message: str) -> None:
    with pytest.raises(InputError, match=message):
        _ = [config(options, cell) for cell in cells(options)]


def test_the_report_reads_each_budget_of_one_run(tmp_path: Path) -> None:
    from experiments.isoflop.report import report

    options = Options(out=tmp_path, widths=(16, 24, 32, 48), seeds=(0, 1))
    sizes = {16: 1000, 24: 2000, 32: 4000, 48: 8000}
    for cell in cells(options):
        if cell.seed == 1 and cell.width == 48:
            continue  # was not run
        run = config(options, cell)
        path = tmp_path / cell.name
        path.mkdir()
        steps = plan_stages(run).steps
        # The least loss is at 2,000 · √2 parameters; more steps are better, MoD is by 0.25, and causally by 0.125.
        loss = 4 + (np.log2(sizes[cell.width] / 1000) - 1.5) ** 2 - 0.25 * (cell.arm != "dense")
        records = [
            {"step": steps * k // 4, "eval_loss": loss - k / 8}
            | ({"eval_loss_causal": loss - k / 8 + 0.125} if run.routing.every else {})
            for k in (1, 2, 3, 4)
        ]
        (path / "config.json").write_text(json.dumps({"config": to_dict(run)}))
        (path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records[:3]))
        summary = {"steps": steps, "parameters": sizes[cell.width], "evaluation": records[3]}
        (path / "summary.json").write_text(json.dumps(summary))
    report(options, Console(quiet=True))
    text = (tmp_path / "results.md").read_text()
    assert "| 400G | 2,828 | 3.500 | 2,828 | 3.375 | -0.125 | fit | fit | 1 |" in text
    assert "| 100G, 48 | 60 | 8,000 | 8,000 | 1,069k | 1,062k | 6.125 | 5.875 | 6.000 | -0.125 | 1 |" in text
    assert "| stages | – | – | -0.125 | 2 |" in text and "| stochastic | -0.125 | -0.125 | -0.125 | 2 |" in text
    assert (tmp_path / "losses.png").stat().st_size > 10_000


def test_the_least_loss_is_no_vertex_where_the_sizes_do_not_enclose_it() -> None:
    from experiments.isoflop.report import Reading, minimum

    def readings(losses: list[float]) -> list[Reading]:
        cell = Cell("dense", 16, 0)
        return [Reading(1.0, cell, 2**n, 1, 1.0, loss, loss) for n, loss in enumerate(losses)]

    assert (minimum(readings([4, 3, 2, 1])).how, minimum(readings([4, 3, 2, 1])).loss) == ("edge", 1)
    assert minimum(readings([4, 3, 5])).how == "smallest"
    bent_down = minimum(readings([1, 3, 3, 1.5]))
    assert (bent_down.how, bent_down.parameters) == ("edge", 1)


def test_kinds_of_tokens() -> None:
    pieces = {" 12": "digits", "7": "digits", "\n": "white space", " pens": "words", ">>": "signs", "a1": "others"}
    assert {piece: kind_of(piece) for piece in pieces} == pieces
    assert kind_of("") == kind_of("½") == "others"
    document = read_document(ByteTokenizer(), RECORD)
    prompt = f"Q: {RECORD['question']}\nA: "
    assert len(document.ids) == len(document.kinds) == 1 + len((prompt + RECORD["answer"]).encode())
    assert document.prompt == 1 + len(prompt.encode()) and document.steps == 1
    assert document.kinds[-3:] == ["answer"] * 3 and document.kinds[-4] == "signs"
    assert document.kinds.count("digits") == 8 and document.kinds[0] == "others"


def example() -> list[Seen]:
    rng = np.random.default_rng(0)
    seen = []
    for n, steps in ((9, 1), (14, 2), (6, 4), (21, 7), (12, 7)):
        kinds = [str(kind) for kind in rng.choice(KINDS[:-1], n)]  # none of the last kind
        document = Document(list(range(n)), kinds, n // 2, steps)
        seen.append(Seen(document, rng.random((3, n)) < 0.3, rng.random(n).astype(np.float32)))
    return seen


def test_shares_are_those_of_a_count_token_by_token() -> None:
    seen = example()
    used: dict[str, list[float]] = defaultdict(list)
    before: dict[str, list[float]] = defaultdict(list)
    for each in seen:
        for n, kind in enumerate(each.document.kinds):
            blocks = [bool(each.routed_LxN[block, n]) for block in range(3)]
            used[kind].append(sum(blocks) / 3)
            if n:
                before[kind].append(sum(bool(each.routed_LxN[block, n - 1]) for block in range(3)) / 3)
    for found, counted in ((by_kind(seen), used), (by_kind(seen, following=True), before)):
        values = dict(zip(KINDS, found, strict=True))
        assert values.pop("others") is None
        assert {kind: value and value.value for kind, value in values.items()} == pytest.approx(
            {kind: sum(counted[kind]) / len(counted[kind]) for kind in values}
        )
        assert all(value and value.low <= value.value <= value.high for value in values.values())

    edges = entropy_edges(seen)
    for number, value in enumerate(by_entropy(seen, edges)):
        inside = [
            each.routed_LxN[:, n].sum() / 3
            for each in seen
            for n in range(len(each.entropy_N) - 1)
            if (number == 0 or edges[number] <= each.entropy_N[n])
            and (number == BINS - 1 or each.entropy_N[n] < edges[number + 1])
        ]
        assert value is not None and value.value == pytest.approx(sum(inside) / len(inside))

    prompts = [each.routed_LxN[:, : each.document.prompt].sum() / 3 / each.document.prompt for each in seen]
    expected = [(prompts[0] + prompts[1]) / 2, None, prompts[2], (prompts[3] + prompts[4]) / 2]
    groups = [value and value.value for value in by_steps(seen, prompt_shares(seen))]
    assert len(groups) == len(STEPS) and groups == pytest.approx(expected)
    whole = [each.routed_LxN.mean() for each in seen]
    parts = [
        (a * each.document.prompt + b * (len(each.document.ids) - each.document.prompt)) / len(each.document.ids)
        for each, a, b in zip(seen, prompt_shares(seen), solution_shares(seen), strict=True)
    ]
    assert parts == pytest.approx(whole)


def test_kinds_of_tokens_explain_what_follows_from_them() -> None:
    seen = example()
    of_kind = {kind: number for number, kind in enumerate(KINDS)}
    explained = [
        replace(each, routed_LxN=np.array([[of_kind[k] > level for k in each.document.kinds] for level in range(3)]))
        for each in seen
    ]
    assert beyond_kinds(explained) == pytest.approx([0] * len(seen), abs=1e-12)
    assert np.ptp(prompt_shares(explained)) > 0.05
    weighted = sum(value * each.document.prompt for value, each in zip(beyond_kinds(seen), seen, strict=True))
    assert weighted == pytest.approx(0) and np.ptp(beyond_kinds(seen)) > 0.05


@pytest.mark.parametrize("mode", ["causal", "top_k"])
def test_padded_batches_are_routed_as_single_texts(trained_run: Path, mode: RoutingMode) -> None:
    run = load_run(trained_run)
    texts = [("Tom?", "<<1>> #### 1"), ("How many are there of them", "9 #### 9")]
    documents = [read_document(run.tokenizer, {"question": q, "answer": a}) for q, a in texts]
    for (question, answer), seen in zip(texts, look(run, documents, mode), strict=True):
        alone = routes_of(run, f"Q: {question}\nA: {answer}", mode)
        np.testing.assert_array_equal(seen.routed_LxN, alone.routed_LxN)
        assert seen.entropy_N.shape == (len(alone.tokens),)
        assert (seen.entropy_N > 0).all() and (seen.entropy_N <= np.log(run.config.model.vocab_size) + 1e-5).all()


def test_runs_need_a_worker(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^--workers = 0: must be at least 1$"):
        train_all({}, tmp_path, 0)
