"""Conversations: what is learned of them, and that a prompt has the same ids in training as when the model is asked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from chat_tokenizers import CHATML, INST, PLAIN, THINKS, TURNS, WHOLE, chat_tokenizer

from mod_star.data.conversations import Conversation, conversation_of, is_conversation, tokenise
from mod_star.errors import InputError
from mod_star.tokenization import ByteTokenizer, HuggingFaceTokenizer, begin

USER, ANSWER = {"role": "user", "content": "Why is it?"}, {"role": "assistant", "content": "It is here."}
TWO = ({"role": "user", "content": "hello"}, {"role": "assistant", "content": "yes"}, USER, ANSWER)
FORMS = {
    "chatml": (CHATML, "<|im_end|>", None, "<|im_end|>"),
    "inst": (INST, "</s>", "<s>", "</s>"),
    "turns": (TURNS, "<end_of_turn>", "<s>", "<end_of_turn>"),
    "whole": (WHOLE, "</s>", None, "<|im_end|>"),
    "thinks": (THINKS, "<|im_end|>", None, "<|im_end|>"),
}


def tokenizer_of(path: Path, form: str) -> HuggingFaceTokenizer:
    template, eos, bos, _ = FORMS[form]
    return chat_tokenizer(path, template, eos, bos)


def spelled(tokenizer: HuggingFaceTokenizer, ids: Any) -> str:
    """The text of ids, special tokens included."""
    return tokenizer._tokenizer.decode([int(i) for i in ids], skip_special_tokens=False)


def learned_texts(tokenizer: HuggingFaceTokenizer, ids: Any, learned: Any) -> list[str]:
    """The text of each run of ids to learn."""
    runs: list[list[int]] = []
    for index, flag in enumerate(learned):
        if flag:
            if index == 0 or not learned[index - 1]:
                runs.append([])
            runs[-1].append(int(ids[index]))
    return [spelled(tokenizer, run) for run in runs]


@pytest.mark.parametrize("form", FORMS)
def test_answers_with_their_end_are_learned_and_nothing_else(tmp_path: Path, form: str) -> None:
    tokenizer, end = tokenizer_of(tmp_path, form), FORMS[form][3]
    ids, learned = tokenise(tokenizer, Conversation(TWO, "here"))
    assert [text.strip() for text in learned_texts(tokenizer, ids, learned)] == (
        [f"yes{end}", f"<think>\n\n</think>\n\nIt is here.{end}"]
        if form == "thinks"
        else [f"yes{end}", f"It is here.{end}"]
    )
    assert learned[-1] and not learned[0]
    # Not joined from pieces that differ from what one piece of text gives.
    text = tokenizer.apply_chat(TWO, add_generation_prompt=False)
    assert ids.tolist() == begin(tokenizer, text)[: len(ids)]


@pytest.mark.parametrize("form", [*FORMS, "plain"])
@pytest.mark.parametrize(
    "content", ["It is here.", "", " spaces ", "\nline", "é 🙂", "yes\n\nno", "[/INST] user: ", "a<|im_end|>b"]
)
def test_a_prompt_has_the_ids_that_it_has_when_the_model_is_asked(tmp_path: Path, form: str, content: str) -> None:
    tokenizer = chat_tokenizer(tmp_path, PLAIN, "</s>") if form == "plain" else tokenizer_of(tmp_path, form)
    messages = (*TWO[:3], {"role": "assistant", "content": content})
    ids, learned = tokenise(tokenizer, Conversation(messages, "here"))
    first, second = (begin(tokenizer, tokenizer.apply_chat(messages[:index])) for index in (1, 3))
    assert ids.tolist()[: len(first)] == first and not learned[: len(first)].any() and learned[len(first)]
    if form != "plain":  # there the first answer, as it is said, has other ids than in the second prompt
        assert ids.tolist()[: len(second)] == second and learned[len(second) :].all()
    answer = learned_texts(tokenizer, ids, learned)[-1]
    assert content.strip() in answer and answer.endswith(("<|im_end|>", "</s>", "<end_of_turn>"))


def test_an_answer_without_an_end_token_is_ended_by_eos(tmp_path: Path) -> None:
    tokenizer = chat_tokenizer(tmp_path, PLAIN, "</s>")
    ids, learned = tokenise(tokenizer, Conversation(TWO, "here"))
    assert learned_texts(tokenizer, ids, learned) == ["yes\n", "It is here.\n</s>"]
    # The model sees "assistant: " and says "yes"; as one text, " yes" would be one token.
    assert tokenizer.encode("assistant: yes") != [*tokenizer.encode("assistant: "), *tokenizer.encode("yes")]


def test_an_end_token_inside_an_answer_is_part_of_it(tmp_path: Path) -> None:
    for form in FORMS:
        tokenizer, end = tokenizer_of(tmp_path / form, form), FORMS[form][3]
        messages = (TWO[0], {"role": "assistant", "content": f"no{end} yes"}, *TWO[2:])
        first, _ = learned_texts(tokenizer, *tokenise(tokenizer, Conversation(messages, "here")))
        assert first.strip() == f"no{end} yes{end}"


def test_what_follows_the_last_answer_is_left_out(tmp_path: Path) -> None:
    tokenizer = tokenizer_of(tmp_path, "chatml")
    ids, _ = tokenise(tokenizer, Conversation(TWO, "here"))
    longer, _ = tokenise(tokenizer, Conversation((*TWO, USER), "here"))
    assert longer.tolist() == ids.tolist()


def test_a_message_of_weight_zero_is_seen_but_not_learned(tmp_path: Path) -> None:
    tokenizer = tokenizer_of(tmp_path, "chatml")
    messages = (TWO[0], TWO[1] | {"weight": 0}, *TWO[2:])
    ids, learned = tokenise(tokenizer, Conversation(messages, "here"))
    assert learned_texts(tokenizer, ids, learned) == ["It is here.<|im_end|>"]
    assert ids.tolist() == tokenise(tokenizer, Conversation(TWO, "here"))[0].tolist()


def test_the_space_that_a_tokenizer_puts_before_a_text_is_not_put_into_one(tmp_path: Path) -> None:
    import tokenizers
    from tokenizers import decoders, models, normalizers

    vocabulary = {
        piece: n for n, piece in enumerate(["<unk>", "<s>", "</s>", "▁", "Q", ":", "n", "o", "▁n", "▁no", "no"])
    }
    merges = [("▁", "n"), ("▁n", "o"), ("n", "o")]
    made = tokenizers.Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>"))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    made.add_special_tokens(["<s>", "</s>"])
    made.save(str(tmp_path / "tokenizer.json"))
    template = "{% for m in messages %}{{ 'Q: ' if m['role'] == 'user' else '' }}{{ m['content'] }}{% endfor %}"
    (tmp_path / "chat_template.jinja").write_text(template)
    tokenizer = HuggingFaceTokenizer(tmp_path)
    messages = ({"role": "user", "content": "no "}, {"role": "assistant", "content": "no"})
    ids, _ = tokenise(tokenizer, Conversation(messages, "here"))
    pieces = [tokenizer._tokenizer.id_to_token(i) for i in ids.tolist()]
    assert pieces == ["<s>", "▁", "Q", ":", "▁no", "▁", "no", "</s>"]


def test_share_gpt_and_fields_without_a_value() -> None:
    turns: list[dict[str, Any]] = [
        {"from": "system", "value": "s"},
        {"from": "human", "value": "q", "weight": None},
        {"from": "gpt", "value": "a"},
    ]
    assert is_conversation(turns)
    assert conversation_of({"conversations": turns, "tools": None}, turns, "here").messages == (
        {"role": "system", "content": "s"}, {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
    )  # fmt: skip
    assert not any(map(is_conversation, ["text", [], ["a"], [1], {"role": "user"}, None]))


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        (
            [{"role": "human", "content": "x"}, ANSWER],
            "messages[0]: role = 'human': must be one of system, developer, ",
        ),
        (
            [{"from": "tool", "value": "x"}, ANSWER],
            "messages[0]: from = 'tool': must be one of system, human, user, gpt,",
        ),
        ([USER, {"role": "assistant", "content": None}], "messages[1]: content = None: must be a text"),
        ([USER, {"role": "assistant", "content": [{"type": "text", "text": "x"}]}], "messages[1]: content = [{'type'"),
        ([USER, ANSWER, "x"], "messages[2]: must be an object with role and content, not 'x'"),
        ([USER, ANSWER | {"weight": 0.5}], "messages[1]: weight = 0.5: must be 0 or 1"),
        ([USER, ANSWER | {"content": "\ud800"}], "messages[1]: character 0 is an unpaired surrogate"),
        ([USER, USER], "has no message of the assistant to learn"),
        ([USER, ANSWER | {"weight": 0}], "has no message of the assistant to learn"),
        ([ANSWER, USER, ANSWER], "begins with a message of the assistant; a message of the user must come before it"),
    ],
)
def test_messages_that_are_no_good(messages: list[Any], reason: str) -> None:
    assert is_conversation(messages)
    with pytest.raises(InputError) as error:
        conversation_of({}, messages, "f.jsonl, line 3")
    assert str(error.value).startswith(f"f.jsonl, line 3: {reason}") and "\n" not in str(error.value)


def test_tools_are_not_dropped_in_silence() -> None:
    with pytest.raises(InputError, match="here: field 'tools' is not read with messages, it must be empty"):
        conversation_of({"tools": [{"name": "f"}]}, [USER, ANSWER], "here")


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (None, "has messages, for which data.tokenizer must have a chat template"),
        (INST, "chat template: fails on these messages (Only user and assistant roles are supported)"),
        # Something that stands at the end of any chat, but not where it goes on.
        (
            CHATML + "{{ '!' }}",
            "chat template: writes messages[:2] differently when messages[2] follows than when it is",
        ),
        # A prompt that answers in the data don't follow (as of DeepSeek-R1's distilled models).
        (CHATML.replace("assistant\n", "assistant\n<think>"), "chat template: writes messages[:2] differently"),
    ],
)
def test_templates_that_do_not_fit(tmp_path: Path, template: str | None, reason: str) -> None:
    conversation = Conversation(({"role": "system", "content": "s"}, *TWO), "here")
    with pytest.raises(InputError) as error:
        tokenise(chat_tokenizer(tmp_path, template), conversation)
    assert str(error.value).startswith(f"here: {reason}") and "\n" not in str(error.value)


def test_what_a_message_says_besides_its_content_must_be_written(tmp_path: Path) -> None:
    conversation = Conversation((USER, ANSWER | {"reasoning_content": "It must.", "id": "7"}), "here")
    tokenizer = chat_tokenizer(tmp_path / "without", CHATML)
    with pytest.raises(
        InputError, match=r"^here: messages\[1\]\.reasoning_content: is not written by the chat template"
    ):
        tokenise(tokenizer, conversation)
    template = CHATML.replace("m['content']", "m['reasoning_content'] | default('') + m['content']")
    tokenizer = chat_tokenizer(tmp_path / "with", template)
    assert learned_texts(tokenizer, *tokenise(tokenizer, conversation)) == ["It must.It is here.<|im_end|>"]


def test_bytes_have_no_chat_template() -> None:
    with pytest.raises(InputError, match=r"^here: has messages, for which data\.tokenizer must have a chat template"):
        tokenise(ByteTokenizer(), Conversation(TWO, "here"))
