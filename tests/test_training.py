"""The script that trains the embedded model makes a model that kvlink loads."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from kvlink.agent.receiver import Receiver
from kvlink.agent.sender import Sender
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
