"""What it takes to add a selection method, and a codec: two patches that are kept, applied to a copy, and used.

A method is its module and a line of the table; a codec its two modules, its line of the table, its message.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
pytestmark = pytest.mark.skipif(
    shutil.which("git") is None, reason="patches are applied by git, which is not here"
)

TOUCHED = {
    "selection": {"kvlink/selection.py", "kvlink/compress/selections/even.py"},
    "codec": {
        "kvlink/codecs/__init__.py", "kvlink/codecs/cast.py", "kvlink/compress/codecs/cast.py",
        "proto/kvlink/v1/wire.proto",
    },
}  # fmt: skip

USED = """
import io, sys
from kvlink import Receiver, Recipe, Sender

recipe = sys.argv[1]
assert str(Recipe.parse(str(Recipe.parse(recipe)))) == str(Recipe.parse(recipe))
sender = Sender()
text = "Nam Breasi works for Tor Welan. " * 8
transfer = sender.pack(sender.read(text), "For whom does Nam Breasi work?", recipe)
out = io.BytesIO()
transfer.write(out)
out.seek(0)
receiver = Receiver(sender.lm)
held = receiver.read_file(out)
print(transfer.receipt.recipe, transfer.receipt.kept_tokens, held.cache.layers[0].positions[0].tolist())
question = "For whom does Nam Breasi work?"
print(receiver.answer(held, question).text == sender.answer(sender.read(text), question).text)
"""


def patched(name: str, folder: Path) -> Path:
    """A copy of the package with a patch in it, and its generated messages made again."""
    for part in ("kvlink", "proto", "scripts"):
        shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
    command = ["git", "apply", "--whitespace=nowarn", str(HERE / f"{name}.patch")]
    subprocess.run(
        command, cwd=folder, check=True, env={**os.environ, "GIT_CEILING_DIRECTORIES": str(folder.parent)}
    )
    if name == "codec":
        subprocess.run(
            [sys.executable, "scripts/generate_proto.py"], cwd=folder, check=True, capture_output=True
        )
    return folder


def use(folder: Path, recipe: str) -> list[str]:
    environment = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", USED, recipe]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize("name", TOUCHED)
def test_a_patch_touches_what_the_docs_say(name):
    text = (HERE / f"{name}.patch").read_text()
    assert set(re.findall(r"^\+\+\+ b/(\S+)$", text, re.MULTILINE)) == TOUCHED[name]


def test_a_selection_method_is_its_module_and_a_line_of_the_table(tmp_path):
    told, _ = use(patched("selection", tmp_path), "even@0.5 raw sinks=0 recent=0")
    assert told.startswith("even@0.5")
    positions = [int(place) for place in re.findall(r"\d+", told[told.index("[") :])]
    assert all(place % 2 == 0 for place in positions)


def test_a_codec_is_its_modules_a_line_of_the_table_and_a_message(tmp_path):
    told, same = use(patched("codec", tmp_path), "cast=1")
    assert "cast=1.0" in told
    assert same == "True", "it answers as the sender does"
