"""What was received goes on in plain transformers code."""

from __future__ import annotations

import pytest

from kvlink import pack, unpack
from kvlink.agent.receiver import Receiver
from kvlink.agent.sender import Sender
from kvlink.errors import ContextError

TEXT = (
    "Jand Faris was born in Nibo. Rom Tecil was born in Naklo. Jand Faris plays the cello every evening. "
    "Rom Tecil paints the harbour of Naklo."
)
QUESTIONS = ("What instrument does Jand Faris play?", "Where was Rom Tecil born?")
WHOLE = ("raw", "int4", "transform=1", "q2c+draft@0.25 int8 rest=int2", "text")
PRUNED = ("q2c+draft@0.25 raw", "q2c@0.5 int8 scope=head")


@pytest.fixture(scope="module")
def sender(tiny) -> Sender:
    return Sender(tiny)


@pytest.fixture(scope="module")
def receiver(tiny) -> Receiver:
    return Receiver(tiny)


@pytest.mark.parametrize("recipe", [*WHOLE, *PRUNED])
def test_plain_generate_answers_as_the_receiver_does(sender, receiver, recipe):
    held = unpack(receiver, pack(sender, sender.read(TEXT), QUESTIONS[0], recipe))
    for question in QUESTIONS:
        expected = list(receiver.answer(held, question, max_new_tokens=8).token_ids)
        inputs = receiver.generate_inputs(held, question)
        found = receiver.lm.model.generate(**inputs, max_new_tokens=8, do_sample=False)
        assert found[0, inputs["input_ids"].shape[1] :].tolist()[: len(expected)] == expected
    if recipe in WHOLE:
        assert receiver.to_dynamic_cache(held).get_seq_length() == held.cache.tokens
    else:
        with pytest.raises(ContextError, match="generate_inputs"):
            receiver.to_dynamic_cache(held)


def test_the_sender_s_own_context_too(sender):
    context = sender.read(TEXT)
    inputs = sender.generate_inputs(context, QUESTIONS[0])
    found = sender.lm.model.generate(**inputs, max_new_tokens=4, do_sample=False)
    text = sender.lm.tokenizer.decode(found[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert text.split("\n")[0].strip() == sender.answer(context, QUESTIONS[0]).text == "cello"
