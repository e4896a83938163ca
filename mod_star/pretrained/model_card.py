"""The model card of an exported model: README.md with the front matter that the Hugging Face hub reads.

It holds what the run's files say. What they do not say (a licence, the language of the text, intended uses) is left
out, and the card says that it is.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mod_star import __version__
from mod_star.errors import InputError
from mod_star.flops import parameter_count
from mod_star.pretrained.families import FAMILIES
from mod_star.runs.directory import LoadedRun
from mod_star.runs.stored_config import SUMMARY_FILE
from mod_star.runs.summary import TrainSummary, read_summary
from mod_star.storage import is_address

CARD_NAME = "README.md"


def model_card(loaded: LoadedRun, family: str, name: str, dtype: str, run: Path | None = None) -> str:
    """The text of the card.

    Args:
      loaded: the run's model, dense.
      family: what `require_exportable` says it is.
      name: what the exported directory is called.
      dtype: type of the weights in the files.
      run: the run's directory, whose evaluations and whose result are told; None: they are not known.

    Returns:
      Markdown with front matter. Files and directories are named without the directories that they lie in.
    """
    parts = [_front_matter(loaded, family), f"# {name}\n", _what(loaded, family, dtype), _training(loaded, run)]
    parts += [_evaluation(loaded, run), _use(loaded, name, dtype, run)]
    return "\n".join(part for part in parts if part)


def _front_matter(loaded: LoadedRun, family: str) -> str:
    lines = ["---", "library_name: transformers", "pipeline_tag: text-generation", "tags:", "- mod_star", "- jax"]
    lines.append(f"- {family}")
    if loaded.tokenizer.chat_template is not None:
        lines.append("- conversational")
    return "\n".join([*lines, "---", ""])


def _what(loaded: LoadedRun, family: str, dtype: str) -> str:
    model = loaded.config.model
    return (
        f"A dense language model, exported by mod_star {__version__} in the form of "
        f"`{FAMILIES[family].architecture}`: {parameter_count(loaded.params):,} parameters in {dtype}, "
        f"{model.layers} layers of width {model.width}, {model.heads} query heads and {model.kv_heads or model.heads} "
        f"key heads, a vocabulary of {model.vocab_size:,}, a context of {model.context:,} tokens.\n\n"
        "It has no routed blocks and no thoughts. transformers has no network that routes tokens around blocks, so "
        "mod_star does not export Mixture-of-Depths models.\n\n"
        "The licence, the language of the text and intended uses are not recorded. The base model and the training "
        "data may have licences that apply.\n"
    )


def _training(loaded: LoadedRun, run: Path | None) -> str:
    config = loaded.config
    lines = ["## Training", ""]
    if config.init_from is not None:
        lines.append(f"- Base model: the run `{_basename(config.init_from)}`.")
    if loaded.step == 0:
        lines.append("- No training step of mod_star is in these weights.")
        return "\n".join([*lines, ""])
    lines.append(f"- Training data: {', '.join(f'`{_basename(spec)}`' for spec in config.data.source)}.")
    steps = f"{loaded.step:,} step{'' if loaded.step == 1 else 's'}"
    lines.append(f"- {steps} of {config.train.batch_size:,} × {config.model.context:,} tokens.")
    if (summary := _summary(loaded, run)) is not None:
        lines.append(f"- {summary.tokens:,} tokens, {summary.flops:.3g} floating-point operations.")
    return "\n".join([*lines, ""])


def _evaluation(loaded: LoadedRun, run: Path | None) -> str:
    lines = ["## Evaluation", ""]
    if (summary := _summary(loaded, run)) is not None:
        lines += [f"Held-out loss: {summary.evaluation['eval_loss']:.4f} nats per token.", ""]
    rows = [] if run is None else list(_measures(run, loaded.step))
    if rows:
        lines += ["| task | questions | measure | value | 95 % interval |", "|---|--:|---|--:|--:|", *rows, ""]
    return "\n".join(lines) if len(lines) > 2 else ""


def _measures(run: Path, step: int) -> Iterator[str]:
    """Rows of the evaluations that lie in the run's directory and are of this step."""
    for file in sorted(run.glob("evaluations/*/results.json")):
        try:
            results: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
            if results["config"]["step"] != step:
                continue
            for measure, estimate in results["measures"].items():
                low, high = (f"{100 * estimate[key]:.1f}" for key in ("low", "high"))
                value = f"{100 * estimate['value']:.1f} %"
                yield f"| {results['task']} | {results['items']} | {measure} | {value} | {low} to {high} |"
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{file}: cannot be read: {error!r}; delete it, or evaluate anew") from error


def _use(loaded: LoadedRun, name: str, dtype: str, run: Path | None) -> str:
    source = "RUN" if run is None else run.resolve().name
    return (
        "## Use\n\n"
        "```python\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f"tokenizer = AutoTokenizer.from_pretrained({name!r})\n"
        f"model = AutoModelForCausalLM.from_pretrained({name!r})\n"
        "```\n\n"
        "Made by:\n\n"
        "```console\n"
        f"mod-star export {source} {name} --dtype {dtype} --step {loaded.step}\n"
        "```\n"
    )


def _summary(loaded: LoadedRun, run: Path | None) -> TrainSummary | None:
    """The run's result, if it is that of the exported step."""
    if run is None or not (run / SUMMARY_FILE).is_file():
        return None
    summary = read_summary(run)
    return summary if summary.steps == loaded.step else None


def _basename(spec: str) -> str:
    """A file or directory without what it lies in, which is the user's own; addresses and names stay."""
    if spec.startswith("tfds:"):
        name = spec.removeprefix("tfds:")
        return f"tfds:{Path(name).name}" if name.startswith(("/", ".", "~")) else spec
    return spec if is_address(spec) else Path(spec).name
