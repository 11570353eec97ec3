"""The rooms hold: imports go down only, and what each room must not know stays out of it."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import kvlink
from kvlink import errors

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "kvlink"

LEVELS = {
    "_release": 0, "bounds": 0, "defaults": 0, "errors": 0, "files": 0, "observe": 0, "quoting": 0, "codecs": 0,
    "recipe": 0, "selection": 0, "payload": 0,
    "receipt": 0, "cache": 0, "sketch": 0, "profile": 0, "texts": 0, "tracing": 0, "v1": 0,
    "compress": 1, "wire": 1,
    "model": 2, "transport": 2, "plan": 2,
    "agent": 3,
    "__init__": 4, "__main__": 4, "cli": 4, "show": 4, "page": 4, "terminal": 4, "eval": 4,
}  # fmt: skip
SAME_LEVEL = {
    ("cli", "show"),
    ("cli", "terminal"),
    ("show", "terminal"),
    ("cli", "eval"),
    ("cli", "page"),
    ("__main__", "cli"),
    ("codecs", "payload"),
    ("codecs", "errors"),
    ("recipe", "codecs"),
    ("recipe", "selection"),
    ("selection", "codecs"),
    ("payload", "errors"),
    ("profile", "payload"),
    ("receipt", "sketch"),
}

FORBIDDEN = {
    "bounds": {"torch", "grpc", "google", "asyncio", "transformers", "numpy", "kvlink"},
    "quoting": {"torch", "grpc", "google", "asyncio", "transformers", "numpy", "rich"},
    "tracing": {"torch", "grpc", "google", "asyncio", "transformers", "numpy"},
    "texts": {"torch", "grpc", "google", "asyncio", "transformers", "numpy"},
    "files": {"torch", "grpc", "google", "asyncio", "transformers", "numpy", "json"},
    "errors": {"torch", "grpc", "google", "asyncio", "transformers", "numpy"},
    "codecs": {"torch", "grpc", "google", "asyncio", "transformers", "numpy", "kvlink.recipe"},
    "recipe": {"torch", "grpc", "google", "asyncio", "transformers", "numpy"},
    "selection": {"torch", "grpc", "google", "asyncio", "transformers", "numpy", "kvlink.recipe"},
    "payload": {"torch", "grpc", "google", "asyncio", "transformers", "numpy"},
    "receipt": {"torch", "grpc", "google", "asyncio", "transformers", "numpy"},
    "sketch": {"torch", "grpc", "google", "asyncio", "transformers", "numpy"},
    "profile": {"transformers", "grpc", "google"},
    "cache": {"transformers", "grpc", "google"},
    "compress": {"grpc", "google", "transformers", "kvlink.wire", "kvlink.model", "kvlink.v1"},
    "wire": {"torch", "grpc", "asyncio", "transformers", "time", "socket", "kvlink.compress", "kvlink.cache"},
    "model": {"grpc", "google", "kvlink.compress", "kvlink.wire", "kvlink.v1"},
    "transport": {"torch", "transformers", "kvlink.compress", "kvlink.model", "kvlink.cache"},
    "plan": {"torch", "grpc", "google", "transformers"},
    "agent": {"grpc", "google", "kvlink.v1"},
    "eval": {"grpc", "google", "kvlink.v1"},
    "cli": {"grpc", "google", "kvlink.v1"},
    "terminal": {"torch", "grpc", "google", "kvlink.v1", "asyncio"},
    "show": {"torch", "grpc", "google", "kvlink.v1"},
    "page": {"torch", "transformers", "grpc", "google", "kvlink.v1", "kvlink.model", "kvlink.agent"},
}  # fmt: skip
PROTOBUF_ROOMS = {"wire", "transport"}


def modules() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py") if "v1" not in path.parts)


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    """Dotted names that a module imports, those inside functions and type checks included."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_down_only(path):
    room = room_of(path)
    for name in imports(path):
        if not name.startswith("kvlink.") or name.split(".")[1] not in LEVELS:
            continue
        target = name.split(".")[1]
        below = LEVELS[target] < LEVELS[room] or LEVELS[target] == 0
        assert below or target == room or (room, target) in SAME_LEVEL, f"{room} imports {name}"


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_rooms_do_not_know_what_they_must_not(path):
    room = room_of(path)
    for name in imports(path):
        for forbidden in FORBIDDEN.get(room, ()):
            assert name != forbidden and not name.startswith(forbidden + "."), f"{room} imports {name}"
        if name.startswith("kvlink.v1"):
            assert room in PROTOBUF_ROOMS


WITHOUT_GRPC = ("agent", "wire", "compress", "model")
"""Rooms from which no way leads to gRPC, however long."""


def needed(name: str) -> set[str]:
    """What importing a module of the package imports in the end, whenever a function does so; its own name too."""
    found, rest = set[str](), [name]
    while rest:
        name = rest.pop()
        path = module_file(name)
        if name in found or path is None:
            found.add(name)
            continue
        found.add(name)
        if path != PACKAGE / "__init__.py":  # its exports are made when they are asked for
            rest += imports(path)
        rest += [name.rpartition(".")[0]] if "." in name else []
    return found


def module_file(name: str) -> Path | None:
    """The file of a module of the package, None where the name is another's, or no module's."""
    place = ROOT / Path(*name.split("."))
    for path in (place.with_suffix(".py"), place / "__init__.py"):
        if name.split(".")[0] == "kvlink" and path.is_file():
            return path
    return None


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


@pytest.mark.parametrize(
    "path",
    [path for path in modules() if room_of(path) in WITHOUT_GRPC],
    ids=lambda p: str(p.relative_to(PACKAGE)),
)
def test_no_way_leads_from_the_agents_to_grpc(path):
    there = {
        name for name in needed(name_of(path)) if name.split(".")[0] in ("grpc", "grpc_status", "grpc_health")
    }
    assert not there


def test_nor_is_it_loaded_with_them():
    rooms = [name_of(path) for path in modules() if room_of(path) == "agent"]
    code = f"import sys, {', '.join(rooms)}; sys.exit('grpc' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_modules_say_what_they_are_for_and_stay_small(path):
    text = path.read_text(encoding="utf-8")
    assert ast.get_docstring(ast.parse(text)), "a module without a docstring"
    assert text.count("\n") < 510


def test_importing_the_package_is_cheap():
    code = "import sys, kvlink; sys.exit(bool({'torch', 'transformers', 'grpc', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_every_export_is_listed_and_there():
    for name in kvlink.__all__:
        assert getattr(kvlink, name) is not None
    with pytest.raises(AttributeError):
        kvlink.nonsense  # noqa: B018


def test_type_checkers_and_programs_find_the_same_names():
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    (checked,) = [node for node in tree.body if isinstance(node, ast.If)]
    imported = {node.module: {alias.name for alias in node.names} for node in checked.body}  # type: ignore[attr-defined]
    assert imported == {module: set(names) for module, names in kvlink._LAZY.items()}
    assert {*kvlink._MODULE_OF, "__version__", "pack", "unpack"} == set(kvlink.__all__)


def test_every_error_is_exported():
    own = {
        name
        for name, value in vars(errors).items()
        if isinstance(value, type) and value.__module__ == errors.__name__
    }
    assert own <= set(kvlink.__all__)


def test_the_tree_of_errors_is_drawn_as_it_is():
    drawn = errors.__doc__ or ""
    for name, value in vars(errors).items():
        if isinstance(value, type) and issubclass(value, Exception):
            assert issubclass(value, errors.KvlinkError)
            assert name in drawn, f"{name} is missing in the drawing"


def test_no_bare_builtin_error_is_raised():
    for path in modules():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
                name = getattr(node.exc.func, "id", "")
                assert name not in ("ValueError", "TypeError", "RuntimeError", "Exception", "KeyError"), path
