"""Compile ``proto/*.proto`` to ``proto/*_pb2.py`` with the protoc of grpcio-tools.

Runs where images are built and tests run, never in a guest: a guest gets the compiled modules.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent


class ProtocError(Exception):
    """protoc refused a file; its own message says where."""


def outdated() -> bool:
    """Whether a compiled module is missing or older than any source."""
    newest = max(source.stat().st_mtime for source in (*HERE.glob("*.proto"), Path(__file__)))
    modules = [source.with_name(f"{source.stem}_pb2.py") for source in HERE.glob("*.proto")]
    return any(not module.exists() or module.stat().st_mtime < newest for module in modules)


def generate() -> None:
    """Compile every file; a reader of the directory sees the old modules or the new ones, never half of one.

    Raises ProtocError when a file does not compile.
    """
    import grpc_tools
    from grpc_tools import protoc

    bundled = Path(grpc_tools.__file__).parent / "_proto"  # google/protobuf/empty.proto
    sources = sorted(str(source.relative_to(HERE.parent)) for source in HERE.glob("*.proto"))
    with tempfile.TemporaryDirectory(dir=HERE, prefix=".protoc-") as scratch:
        status = protoc.main(["protoc", f"-I{HERE.parent}", f"-I{bundled}", f"--python_out={scratch}", *sources])
        if status != 0:
            raise ProtocError(f"protoc exited with status {status} on {', '.join(sources)}; its message is above")
        for module in (Path(scratch) / HERE.name).glob("*_pb2.py"):
            module.replace(HERE / module.name)


def ensure() -> None:
    """Compile only what is not up to date: a few stat calls on most days."""
    if outdated():
        generate()


if __name__ == "__main__":
    try:
        generate()
    except ProtocError as error:
        sys.exit(f"proto.generate: {error}")
