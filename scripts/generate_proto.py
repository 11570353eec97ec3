"""Generate kvlink/v1 from proto/kvlink/v1.

    python scripts/generate_proto.py [OUT]

The generator's version is pinned (grpcio-tools 1.76.0): generated code refuses a runtime older
than its generator, so an old generator serves more installations.
"""

from __future__ import annotations

import sys
from pathlib import Path

from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent.parent


def main(out: Path) -> None:
    protos = sorted(str(path.relative_to(ROOT / "proto")) for path in (ROOT / "proto").rglob("*.proto"))
    arguments = ["protoc", f"-I{ROOT / 'proto'}", f"--python_out={out}", f"--pyi_out={out}"]
    if protoc.main([*arguments, *protos]) != 0:
        raise SystemExit("protoc failed")
    services = [path for path in protos if path.endswith(("receiver.proto", "sender.proto"))]
    if protoc.main(["protoc", f"-I{ROOT / 'proto'}", f"--grpc_python_out={out}", *services]) != 0:
        raise SystemExit("protoc failed")
    (out / "kvlink" / "v1" / "__init__.py").write_text(
        '"""Generated from proto/kvlink/v1; never edited."""\n'
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT)
