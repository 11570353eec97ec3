"""The script that trains the embedded model makes a model that kvlink loads."""

from __future__ import annotations

import importlib
import os
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from kvlink.agent.receiver import Receiver
from kvlink.agent.sender import Sender
from kvlink.eval.passages import make_passage
from kvlink.model.loading import load

ROOT = Path(__file__).resolve().parent.parent


def test_a_few_steps_make_a_model_that_loads_and_the_same_seed_makes_the_same(tmp_path):
    weights = []
    for name in ("one", "two"):
        out = tmp_path / name
        command = [sys.executable, str(ROOT / "scripts" / "train_tiny.py"), "--out", str(out)]
        subprocess.run(
            [*command, "--steps", "2", "--tokens", "600", "--device", "cpu"],
            check=True,
            capture_output=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        lm = load(str(out))
        weights.append(lm.fingerprint)
    assert weights[0] == weights[1]
    assert lm.dtype == "bfloat16"
    sender, receiver = Sender(lm), Receiver(lm)
    context = sender.read("Mira Dosh was born in Tavik.")
    held = receiver.receive(sender.pack(context, "Where was Mira Dosh born?", "raw").frames)
    own = sender.answer(context, "Where was Mira Dosh born?")
    assert receiver.answer(held, "Where was Mira Dosh born?").token_ids == own.token_ids


def test_training_cuts_text_into_the_tokens_that_kvlink_reads(tiny, monkeypatch):
    """One space too few before a question once made a trained model misread it."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    train = importlib.import_module("train_tiny")
    train.use_tokenizer(tiny.tokenizer.backend_tokenizer)
    rng = random.Random(3)
    for _ in range(10):
        passage = make_passage(rng, 20)
        for question in passage.questions:
            alone = replace(passage, questions=(replace(question, paraphrases=()),))
            trained = train.encode_sample(alone, 1, rng).ids
            read = tiny.context_ids(passage.text) + tiny.question_ids(question.text, 10)
            assert trained[: len(read)] == read
            assert tiny.tokenizer.decode(trained[len(read) : -1]) == " " + question.answer
            assert trained[-1] == tiny.tokenizer.eos_token_id
