"""The wheel: carries the embedded model, the types and the data, and works where nothing else is."""

from __future__ import annotations

import os
import site
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel, built offline from a copy of what git would package."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        (source / name).write_bytes((ROOT / name).read_bytes())
    for path in (ROOT / "kvlink").rglob("*"):
        if path.is_file() and "__pycache__" not in path.parts:
            target = source / path.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-q"]
    subprocess.run([*command, "-w", str(out), str(source)], check=True)
    (found,) = out.glob("*.whl")
    return found


def test_the_wheel_carries_model_types_and_data_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        embedded = [i.file_size for i in archive.infolist() if i.filename.startswith("kvlink/model/tiny/")]
    for name in (
        "py.typed",
        "model/tiny/model.safetensors",
        "model/tiny/tokenizer.json",
        "eval/prose.json",
        "page/templates/story.html",
    ):
        assert f"kvlink/{name}" in names
    assert sum(embedded) <= 12_000_000
    assert not [n for n in names if n.startswith(("tests", "scripts", "services"))]


def test_the_wheel_works_in_an_empty_environment(wheel, tmp_path):
    """A fresh environment holds the wheel; its dependencies are lent, the working tree is not."""
    folder = tmp_path / "empty"
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "--no-index", "-q"]
    subprocess.run([*pip, str(wheel)], check=True)
    packages = next((folder / "lib").glob("python*/site-packages"))
    lent = [p for p in site.getsitepackages() if Path(p).name == "site-packages"]
    (packages / "lent.pth").write_text("\n".join(lent) + "\n")
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    code = (
        "import kvlink, pathlib;"
        "s = kvlink.Sender(); c = s.read('Mira Dosh was born in Tavik.');"
        "h = kvlink.unpack(kvlink.Receiver(), kvlink.pack(s, c, 'Where was Mira Dosh born?', 'raw'));"
        "print(pathlib.Path(kvlink.__file__).is_relative_to(" + repr(str(folder)) + "), h.cache.tokens)"
    )
    run = subprocess.run(
        [str(python), "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert run.stdout.split()[0:1] == ["True"], run.stderr
    version = subprocess.run(
        [str(folder / "bin" / "kvlink"), "--version"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert version.stdout.startswith("kvlink ")
