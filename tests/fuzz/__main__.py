"""`python -m tests.fuzz --seconds N [TARGET …]`: N seconds in all, shared by the targets.

Each target runs in a process of its own, guided by coverage (atheris, libFuzzer), with 1 GB of memory and
20 seconds for one input at most. What breaks a target is kept as `fuzz-TARGET-…` in the working directory.
The last line is a JSON object: inputs tried by target, and what broke.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path


def fuzz_one(name: str, arguments: list[str]) -> None:
    """Run one target in this process, until libFuzzer ends it."""
    import atheris

    with atheris.instrument_imports(
        include=["kvlink.wire", "kvlink.compress", "kvlink.recipe", "kvlink.profile"]
    ):
        from tests.fuzz import targets
    atheris.Setup([sys.argv[0], *arguments], targets.TARGETS[name])
    atheris.Fuzz()


def run(names: list[str], seconds: int) -> dict[str, object]:
    """Inputs tried by target, and the ends of the logs of those that broke."""
    from tests.fuzz import targets

    names = names or list(targets.TARGETS)
    each = max(1, seconds // len(names))
    tried: dict[str, int] = {}
    broken: dict[str, str] = {}
    for name in names:
        with tempfile.TemporaryDirectory() as corpus:
            for number, seed in enumerate(targets.seeds(name)):
                (Path(corpus) / f"{number}").write_bytes(seed)
            command = [
                sys.executable, "-m", "tests.fuzz", "--one", name, corpus, f"-max_total_time={each}",
                "-rss_limit_mb=1000", "-timeout=20", "-max_len=65536", "-seed=1", f"-artifact_prefix=fuzz-{name}-",
            ]  # fmt: skip
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        found = re.search(r"Done (\d+) runs", done.stderr)
        tried[name] = int(found[1]) if found else 0
        if done.returncode or not found:
            broken[name] = done.stderr[-1500:]
        print(f"{name:28} {tried[name]:9,} inputs{'  BROKEN' if name in broken else ''}", flush=True)
    return {"inputs": tried, "broken": broken}


def main() -> None:
    if sys.argv[1:2] == ["--one"]:
        fuzz_one(sys.argv[2], sys.argv[3:])
        return
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--seconds", type=int, default=120)
    parser.add_argument("target", nargs="*")
    told = parser.parse_args()
    try:
        import atheris  # noqa: F401
    except ImportError:
        sys.exit("there is no atheris for this machine: `pip install atheris` needs Linux on x86-64")
    found = run(told.target, told.seconds)
    print(json.dumps(found))
    sys.exit(bool(found["broken"]))


if __name__ == "__main__":
    main()
