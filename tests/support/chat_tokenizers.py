"""Tokenizers with chat templates of the forms that published models have, small and made on the spot."""

from __future__ import annotations

import json
from pathlib import Path

import tokenizers

from mod_star.tokenization import HuggingFaceTokenizer, train_bpe

CHATML = (
    "{% for m in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou help.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# As Llama 2 and Mistral: no header before an answer, an answer begins with a space, bos spelled out.
INST = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] | trim + eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported') }}{% endif %}{% endfor %}"
)
# As Gemma: another name for the assistant, content trimmed, generation tags for good measure.
TURNS = (
    "{{ bos_token }}{% for m in messages %}{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' }}{% generation %}{{ m['content'] | trim }}{% endgeneration %}"
    "{{ '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
# As Qwen3: the thoughts of earlier answers are left out, the last one has some even if they are empty.
THINKS = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' and loop.last and '<think>' not in m['content'] %}"
    "{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ m['content'] if loop.last else m['content'].split('</think>')[-1].lstrip('\n') }}{{ '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# As Phi: without a prompt for an answer, eos ends the whole.
WHOLE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' }}{% endfor %}"
    "{{ '<|im_start|>assistant\n' if add_generation_prompt else eos_token }}"
)
# As a base model's own: words for roles, no token that ends a turn; the answer's first token could join the prompt's.
PLAIN = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
TEXT = "user assistant: the answer is here. Why is the sky blue? [INST] hello [/INST] yes no\n" * 4
SPECIAL = ["<|im_start|>", "<|im_end|>", "<start_of_turn>", "<end_of_turn>", "<s>", "</s>"]


def write_chat_tokenizer(
    directory: Path, template: str | None, eos: str = "<|im_end|>", bos: str | None = None
) -> Path:
    """A directory with a byte-level BPE tokenizer of a few hundred ids, as a Hugging Face model has it."""
    directory.mkdir(parents=True, exist_ok=True)
    file = directory / "tokenizer.json"
    train_bpe([TEXT], 330, file)
    made = tokenizers.Tokenizer.from_file(str(file))
    made.add_special_tokens(SPECIAL)
    made.save(str(file))
    config = {"eos_token": eos, "bos_token": bos, "add_bos_token": bos is not None}
    if template is not None:
        config["chat_template"] = template
    (directory / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return directory


def chat_tokenizer(
    directory: Path, template: str | None, eos: str = "<|im_end|>", bos: str | None = None
) -> HuggingFaceTokenizer:
    """The same, read."""
    return HuggingFaceTokenizer(write_chat_tokenizer(directory, template, eos, bos))
