"""A context that plain transformers code has read is one like any other; what is none is refused by name."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest
import torch
from transformers import DynamicCache, StaticCache

from kvlink import pack, unpack
from kvlink.agent.context import Look
from kvlink.agent.receiver import Receiver
from kvlink.agent.receiver_service import ReceiverService
from kvlink.agent.sender import Sender
from kvlink.errors import ContextError, IdentityError, RecipeError, UnsupportedCacheError
from kvlink.model.loading import LanguageModel, load, wrap
from kvlink.model.template import Turn
from kvlink.recipe import Recipe
from kvlink.transport.api import Ask
from kvlink.transport.client import ReceiverClient
from kvlink.transport.server import Server
from tests.model.test_template import CHAT
from tests.sweep.families import make

TEXT = (
    "Jand Faris was born in Nibo. Rom Tecil was born in Naklo. Jand Faris plays the cello every evening. "
    "Rom Tecil paints the harbour of Naklo."
)
QUESTION = "What instrument does Jand Faris play?"
TRANSFER = bytes(16)


def prefilled(lm: LanguageModel, ids: list[int]) -> DynamicCache:
    """What transformers code has after reading `ids`."""
    with torch.no_grad():
        return lm.model(
            torch.tensor([ids]), use_cache=True, past_key_values=DynamicCache(config=lm.model.config)
        ).past_key_values


@pytest.mark.parametrize("recipe", ["raw", "q2c+draft@0.25 int8", "text"])
@pytest.mark.parametrize("turns", [(), (Turn("user", "Hello."), Turn("assistant", "Go on."))])
def test_an_adopted_context_packs_the_bytes_of_one_that_was_read(tiny, recipe, turns):
    sender = Sender(tiny)
    read = sender.read(TEXT, turns)
    context = sender.adopt(prefilled(tiny, read.ids), read.ids, turns)
    assert (context.text, context.prompt, context.digest) == (TEXT, read.prompt, read.digest)
    frames = [sender.pack(one, QUESTION, recipe, transfer_id=TRANSFER).frames for one in (context, read)]
    assert frames[0] == frames[1]


@pytest.mark.parametrize("name", ["qwen2", "gemma2-sliding", "gemma3-sliding", "gpt-neox"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_family_s_own_cache_is_taken(random_lm, name, dtype):
    lm = random_lm(name, dtype)
    ids = lm.context_ids(TEXT)
    for count in (1, 2, len(ids)):
        assert Sender(lm).adopt(prefilled(lm, ids[:count]), torch.tensor([ids[:count]])).ids == ids[:count]


@pytest.mark.parametrize("name", ["falcon (ALiBi)", "opt", "gptj", "mpt"])
def test_models_with_other_positions_too(tiny, name):
    lm = wrap(name, make(name), tiny.tokenizer)
    ids = lm.context_ids(TEXT)
    assert Sender(lm).adopt(prefilled(lm, ids), ids).text == TEXT


def test_a_text_without_the_template_is_taken_as_it_is(tiny):
    """Its question continues it, at both ends; it can be sent as text too."""
    sender, receiver = Sender(tiny), Receiver(tiny)
    ids = tiny.tokenizer(TEXT)["input_ids"]
    context = sender.adopt(prefilled(tiny, ids), ids)
    assert (context.text, context.prompt.before, context.prompt.after) == (TEXT, b"", b"")
    own = sender.answer(context, QUESTION).token_ids
    asked = tiny.tokenizer(f"{TEXT}\nQuestion: {QUESTION}\nAnswer:", return_tensors="pt")
    plain = tiny.model.generate(**asked, max_new_tokens=8, do_sample=False)[0, asked["input_ids"].shape[1] :]
    assert list(own) == plain.tolist()[: len(own)]
    for recipe in ("raw", "text", "q2c+draft@0.5 lossless"):
        assert (
            receiver.answer(unpack(receiver, pack(sender, context, QUESTION, recipe)), QUESTION).token_ids
            == own
        )


@pytest.fixture(scope="module")
def chat(checkpoint, tmp_path_factory) -> LanguageModel:
    folder = tmp_path_factory.mktemp("adopted") / "chat"
    shutil.copytree(checkpoint("qwen2", "float32"), folder)
    (folder / "chat_template.jinja").write_text(CHAT)
    return load(str(folder))


def test_a_conversation_goes_on_with_its_next_turn(chat):
    """What the model answers is what it answers to the whole conversation, written by the chat template."""
    said = [{"role": "user", "content": TEXT}, {"role": "assistant", "content": "Noted."}]
    written = chat.tokenizer.apply_chat_template(said, tokenize=False)
    ids = chat.tokenizer(written, add_special_tokens=False)["input_ids"]
    sender, receiver = Sender(chat), Receiver(chat)
    context = sender.adopt(prefilled(chat, ids), ids)
    assert context.prompt.template_id.endswith("/continued")
    whole = chat.tokenizer.apply_chat_template(
        [*said, {"role": "user", "content": QUESTION}], tokenize=False, add_generation_prompt=True
    )
    asked = chat.tokenizer(whole, add_special_tokens=False, return_tensors="pt")
    plain = chat.model.generate(**asked, max_new_tokens=8, do_sample=False)[0, asked["input_ids"].shape[1] :]
    held = unpack(receiver, pack(sender, context, QUESTION, "raw"))
    inputs = receiver.generate_inputs(held, QUESTION)
    assert [*ids, *inputs["input_ids"][0].tolist()] == asked["input_ids"][0].tolist()
    assert list(receiver.answer(held, QUESTION, max_new_tokens=8).token_ids) == plain.tolist()


async def test_an_adopted_conversation_goes_on_at_another_agent(chat):
    """The receiver learns from the manifest how its question is asked."""
    sender = Sender(chat)
    said = chat.tokenizer.apply_chat_template(
        [{"role": "user", "content": TEXT}, {"role": "assistant", "content": "Noted."}], tokenize=False
    )
    ids = chat.tokenizer(said, add_special_tokens=False)["input_ids"]
    context = sender.adopt(prefilled(chat, ids), ids)
    server = Server("127.0.0.1:0", receiver=ReceiverService(Receiver(chat)))
    async with ReceiverClient(f"127.0.0.1:{await server.start()}") as client:
        statuses = [one async for one in client.push(sender.pack(context, QUESTION, "raw").frames)]
        asked = Ask(statuses[-1].cache_id, QUESTION, max_new_tokens=8)
        tokens = [i async for piece in client.generate(asked) for i in piece.token_ids]
    await server.stop(0)
    assert tuple(tokens) == sender.answer(context, QUESTION, max_new_tokens=8).token_ids


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"template_id": "plain/1/continued/continued"},
            "prompt template: here plain/1/continued, at the peer",
        ),
        ({"template_id": "chat/0123/continued"}, "prompt template: here plain/1/continued, at the peer"),
        ({"template_id": "plain/1/continued"}, "prompt: before the context"),
        (
            {"template_id": "plain/1/continued", "turns": (Turn("user", "x"),)},
            "has its earlier turns in itself",
        ),
    ],
)
def test_a_prompt_that_says_otherwise_is_refused(tiny, change, message):
    sender = Sender(tiny)
    context = sender.read(TEXT)
    context.prompt = replace(context.prompt, **change)
    frames = Sender.pack_once(sender, context, TRANSFER, Recipe.parse("raw"), Look()).frames
    with pytest.raises((IdentityError, ContextError), match=message):
        Receiver(tiny).receive(frames)


@pytest.mark.parametrize("name", ["qwen2", "gemma2-sliding"])
def test_what_generate_has_read_and_written_is_a_context_too(random_lm, name):
    lm = random_lm(name)
    made = lm.model.generate(
        torch.tensor([lm.context_ids(TEXT)]), max_new_tokens=6, do_sample=False, return_dict_in_generate=True
    )
    with pytest.raises(ContextError, match="has not read the last token that it made"):
        Sender(lm).adopt(made.past_key_values, made.sequences)
    context = Sender(lm).adopt(made.past_key_values, made.sequences[:, :-1])
    again = Sender(lm).adopt(prefilled(lm, context.ids), context.ids)
    assert Sender(lm).answer(context, QUESTION).token_ids == Sender(lm).answer(again, QUESTION).token_ids


def test_ids_that_no_text_gives_have_no_text(tiny):
    ids = list(range(300, 340))
    sender = Sender(tiny)
    context = sender.adopt(prefilled(tiny, ids), ids)
    assert not context.text
    with pytest.raises(RecipeError, match="no text"):
        sender.pack(context, QUESTION, "text")
    transfer = sender.pack(context, QUESTION, "raw")
    assert len(sender.explain(context, QUESTION, transfer).tokens) == len(ids)


def test_turns_that_the_ids_do_not_have_are_refused(tiny):
    ids = tiny.context_ids(TEXT)
    with pytest.raises(ContextError, match="1 earlier turns"):
        Sender(tiny).adopt(prefilled(tiny, ids), ids, (Turn("user", "Hello."),))


def other_numbers(lm: LanguageModel, ids: list[int]) -> DynamicCache:
    cache = prefilled(lm, ids)
    cache.layers[-1].values[:, :, -1] += 1
    return cache


def not_finite(lm: LanguageModel, ids: list[int]) -> DynamicCache:
    cache = prefilled(lm, ids)
    cache.layers[1].keys[0, 0, 3, 0] = float("nan")
    return cache


def two(lm: LanguageModel, ids: list[int]) -> DynamicCache:
    cache = prefilled(lm, ids)
    cache.batch_repeat_interleave(2)
    return cache


def fewer_layers(lm: LanguageModel, ids: list[int]) -> DynamicCache:
    cache = prefilled(lm, ids)
    del cache.layers[-1]
    return cache


def shifted(lm: LanguageModel, ids: list[int]) -> DynamicCache:
    """Read behind a padding token, as in a batch."""
    cache = prefilled(lm, [0, *ids])
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys[:, :, 1:], layer.values[:, :, 1:]
    return cache


WRONG = {
    "one token fewer": (lambda lm, ids: prefilled(lm, ids[:-1]), ContextError, "the cache is of .* tokens, there are"),
    "one token more": (lambda lm, ids: prefilled(lm, [*ids, 7]), ContextError, "the cache is of .* tokens, there are"),
    "other ids": (lambda lm, ids: prefilled(lm, [*ids[:9], 7, *ids[10:]]), ContextError, "position 9"),
    "the same ids in another order": (lambda lm, ids: prefilled(lm, ids[::-1]), ContextError, "position"),
    "behind padding": (shifted, ContextError, "not this model's of these token ids"),
    "numbers of a later layer": (other_numbers, ContextError, "the last token differs"),
    "half precision": (
        lambda lm, ids: prefilled(lm, ids).__class__(
            [(x.keys.half(), x.values.half()) for x in prefilled(lm, ids).layers]
        ),
        ContextError,
        "float16",
    ),
    "not a number": (not_finite, ContextError, "not finite"),
    "a batch": (two, UnsupportedCacheError, "a batch of 2"),
    "a layer fewer": (fewer_layers, ContextError, "4 layers, the cache 3"),
    "nothing read": (lambda lm, _: DynamicCache(config=lm.model.config), UnsupportedCacheError, "layer 0"),
    "no cache": (lambda *_: None, UnsupportedCacheError, "NoneType"),
    "a static cache": (lambda lm, _: StaticCache(lm.model.config, max_cache_len=8), UnsupportedCacheError, "StaticCache"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_is_not_this_model_s_cache_is_refused(random_lm, case):
    lm = random_lm("qwen2")
    make_cache, error, message = WRONG[case]
    ids = lm.context_ids(TEXT)
    with pytest.raises(error, match=message):
        Sender(lm).adopt(make_cache(lm, ids), ids)


def test_another_model_s_cache_of_the_same_shape_is_refused(random_lm):
    ids = random_lm("qwen2").context_ids(TEXT)
    with pytest.raises(ContextError, match="not this model's"):
        Sender(random_lm("qwen2")).adopt(prefilled(random_lm("qwen2", seed=1), ids), ids)


def test_a_cache_without_the_model_s_windows_is_refused(random_lm):
    lm = random_lm("gemma2-sliding")
    ids = lm.context_ids(TEXT)
    with torch.no_grad():
        cache = lm.model(torch.tensor([ids]), past_key_values=DynamicCache(), use_cache=True).past_key_values
    with pytest.raises(ContextError, match="config=model.config"):
        Sender(lm).adopt(cache, ids)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([], "no token ids"),
        ([5, -1], "token id -1 is not"),
        ([5, 10**6], "token id 1000000 is not"),
        ([5.5], "integers"),
        ("text", "integers"),
        (5, "integers"),
        (torch.zeros(2, 3, dtype=torch.long), "integers"),
        (torch.tensor([1.5]), "integers"),
        ([5] * 600, "window 512"),
    ],
)
def test_what_are_no_token_ids_is_refused(random_lm, ids, message):
    with pytest.raises(ContextError, match=message):
        Sender(random_lm("qwen2")).adopt(None, ids)
