"""Templates: both ends own the prompt; chat models use their own."""

from __future__ import annotations

import shutil

import pytest

import kvlink
from kvlink.errors import ConfigError, ContextError, IdentityError, ModelError
from kvlink.model.generate import answer
from kvlink.model.loading import load
from kvlink.model.prefill import prefill
from kvlink.model.template import Turn, template_for

CHAT = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture
def chat_folder(checkpoint, tmp_path):
    def make(template: str = CHAT):
        folder = tmp_path / "chat"
        shutil.copytree(checkpoint("qwen2", "bfloat16"), folder)
        (folder / "chat_template.jinja").write_text(template)
        return str(folder)

    return make


def test_the_plain_template_is_context_question_answer(tiny):
    prompt = tiny.template.prompt()
    assert (prompt.template_id, prompt.before, prompt.after) == ("plain/1", b"Context: ", b"\n")
    assert tiny.template.ask("Who?") == "Question: Who?\nAnswer:"


def test_context_and_question_are_cut_into_the_same_tokens_as_one_text(tiny):
    text, question = "Mira Dosh was born in Tavik.", "Where was Mira Dosh born?"
    split = tiny.context_ids(text) + tiny.question_ids(question, 20)
    whole = tiny.tokenizer(f"Context: {text}\nQuestion: {question}\nAnswer:")["input_ids"]
    assert split == whole


def test_a_chat_model_uses_its_own_template(chat_folder):
    lm = load(chat_folder())
    prompt = lm.template.prompt()
    assert prompt.template_id.startswith("chat/")
    assert prompt.before.decode() == "<|user|>Context: "
    assert prompt.after.decode() == "\n\n"
    assert lm.template.ask("Who?") == "Question: Who?<|end|>\n<|assistant|>"


def test_earlier_turns_stand_before_the_context(chat_folder):
    lm = load(chat_folder())
    turns = (Turn("user", "Hello."), Turn("assistant", "Go on."))
    before = lm.template.prompt(turns).before.decode()
    assert before == "<|user|>Hello.<|end|>\n<|assistant|>Go on.<|end|>\n<|user|>Context: "
    ids = lm.context_ids("Tavik is a town.", lm.template.prompt(turns))
    assert len(ids) > len(lm.context_ids("Tavik is a town."))
    assert answer(lm, prefill(lm, ids), "What is Tavik?", max_new_tokens=3).token_ids


def test_another_chat_template_is_another_fingerprint(chat_folder, checkpoint):
    chat = load(chat_folder()).fingerprint
    plain = load(str(checkpoint("qwen2", "bfloat16"))).fingerprint
    assert chat.template != plain.template
    assert chat.weights == plain.weights


def test_a_template_that_writes_the_day_is_the_same_every_day(chat_folder):
    """Here it writes the microsecond. What it wrote is compared with each transfer, and the refusal says why."""
    folder = chat_folder("{{ strftime_now('%f') }} " + CHAT)
    first, second = load(folder), load(folder)
    assert first.template.before != second.template.before
    assert first.fingerprint == second.fingerprint
    assert first.template.dated
    sender = kvlink.Sender(first)
    data = kvlink.pack(sender, sender.read("Tavik is a town."), "What is Tavik?", kvlink.Recipe.parse("text"))
    with pytest.raises(IdentityError, match="it writes the day: read the context again today"):
        kvlink.unpack(kvlink.Receiver(second), data)


def test_other_texts_of_a_template_are_others(chat_folder, tmp_path):
    """Though they write the same prompt for this conversation."""
    first = load(chat_folder()).fingerprint
    (tmp_path / "chat" / "chat_template.jinja").write_text(CHAT + "{% if tools %}{{ tools }}{% endif %}")
    assert load(str(tmp_path / "chat")).fingerprint.template != first.template


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('no') }}", "cannot render"),
        ("always the same", "does not keep the text"),
        ("{% for m in messages %}{{ m.content | upper }}{% endfor %}", "does not keep the text"),
    ],
)
def test_chat_templates_that_cannot_serve_are_refused(chat_folder, template, message):
    with pytest.raises(ModelError, match=message):
        load(chat_folder(template))


THINKING = (
    CHAT
    + "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}{{ date_string }}"
)


def test_template_options_are_written_and_are_part_of_the_identity(chat_folder):
    folder = chat_folder(THINKING)
    plain, quiet = (
        load(folder),
        load(folder, template_options='{"enable_thinking": false, "date_string": "today"}'),
    )
    assert quiet.template.ask("Who?").endswith("<|assistant|><think></think>today")
    assert plain.template.ask("Who?").endswith("<|assistant|>")
    assert quiet.fingerprint.template != plain.fingerprint.template
    assert quiet.fingerprint.tokenizer == plain.fingerprint.tokenizer
    other = load(folder, template_options='{"date_string": "today", "enable_thinking": false}')
    assert other.fingerprint == quiet.fingerprint, "whatever their order"
    turns = (Turn("user", "Hello."),)
    assert "<think>" not in quiet.template.prompt(turns).before.decode()


@pytest.mark.parametrize(
    "text",
    [
        "{", "[]", "1", '"x"', "enable_thinking=false", '{"enable_thinking": {}}', '{"messages": 1}', '{"a b": 1}',
        '{"tokenize": true}', '{"add_generation_prompt": false}', '{"strftime_now": 1}', '{"no_such_option": 1}',
        '{"enable_thinking": "' + "x" * 5000 + '"}', "[" * 3000,
    ],
)  # fmt: skip
def test_what_is_no_template_option_is_refused(chat_folder, text):
    with pytest.raises(ConfigError, match=r"option|JSON"):
        load(chat_folder(THINKING), template_options=text)


def test_a_model_without_a_chat_template_takes_no_options():
    with pytest.raises(ConfigError, match="no chat template that could take enable_thinking"):
        load(template_options='{"enable_thinking": false}')


def test_roles_are_checked():
    with pytest.raises(ContextError, match="role must be one of"):
        Turn("tool", "x")


def test_a_tokenizer_without_a_chat_template_gets_the_plain_one(tiny):
    assert template_for(tiny.tokenizer).template_id == "plain/1"


@pytest.mark.parametrize(
    "made", [Turn, lambda role, content: (role, content), lambda r, c: {"role": r, "content": c}]
)
def test_earlier_turns_are_taken_as_people_have_them(tiny, made):
    turns = [made("user", "Hello."), made("assistant", "Go on.")]
    read = kvlink.Sender(tiny).cut("Tavik is a town.", turns)
    assert read.prompt.turns == (Turn("user", "Hello."), Turn("assistant", "Go on."))


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        ([{"role": "user", "content": "x", "tool_calls": []}], "turn 0: .*role, content, tool_calls"),
        ([("user", "x"), {"role": "user"}], "turn 1: .*got role"),
        ([{"role": "user", "content": [{"type": "text", "text": "x"}]}], "content is a text"),
        ([("user", None)], "content is a text"),
        ([("tool", "x")], "role must be one of"),
        ([("user",)], "turn 0: expected"),
        ("user: x", "turn 0: expected"),
        ({"role": "user", "content": "x"}, "turn 0: expected"),
        ([None], "turn 0: expected"),
    ],
)
def test_what_is_no_turn_is_refused(tiny, turns, message):
    with pytest.raises(ContextError, match=message):
        kvlink.Sender(tiny).cut("Tavik is a town.", turns)
