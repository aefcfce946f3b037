"""Compile every ``.proto`` below this directory to ``*_pb2.py`` and ``*_pb2.pyi`` beside it, with grpcio-tools' protoc.

Runs where a package is built and where a checkout is set up, never in a guest: a guest gets the compiled modules.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent


class ProtocError(Exception):
    """protoc refused a file; its own message says where."""


def sources() -> list[Path]:
    """Return every ``.proto`` file, sorted."""
    return sorted(HERE.rglob("*.proto"))


def outdated() -> bool:
    """Return whether a compiled module is missing or older than any source."""
    newest = max(source.stat().st_mtime for source in (*sources(), Path(__file__)))
    modules = [source.with_name(f"{source.stem}_pb2{suffix}") for source in sources() for suffix in (".py", ".pyi")]
    return any(not module.exists() or module.stat().st_mtime < newest for module in modules)


def generate() -> None:
    """Compile every file; a reader of the directory sees the old modules or the new ones, never half of one.

    Raises ProtocError when a file does not compile.
    """
    import grpc_tools
    from grpc_tools import protoc

    bundled = Path(grpc_tools.__file__).parent / "_proto"  # google/protobuf/empty.proto
    with (
        tempfile.TemporaryDirectory(prefix="caisson-protoc-") as scratch,
        tempfile.TemporaryDirectory(dir=HERE, prefix=".protoc-") as made,
    ):
        root = Path(scratch)
        (root / "caisson").mkdir()
        (root / "caisson/proto").symlink_to(HERE)  # imports are by the installed name, wherever the checkout is
        names = [f"caisson/proto/{source.relative_to(HERE)}" for source in sources()]
        status = protoc.main(
            ["protoc", f"-I{root}", f"-I{bundled}", f"--python_out={made}", f"--pyi_out={made}", *names]
        )
        if status != 0:
            raise ProtocError(f"protoc exited with status {status} on {', '.join(names)}; its message is above")
        top = Path(made) / "caisson/proto"
        for module in (file for pattern in ("*_pb2.py", "*_pb2.pyi") for file in top.rglob(pattern)):
            module.replace(HERE / module.relative_to(top))


def ensure() -> None:
    """Compile only what is not up to date: a few stat calls on most days."""
    if outdated():
        generate()


if __name__ == "__main__":
    try:
        generate()
    except ProtocError as error:
        sys.exit(f"caisson.proto.generate: {error}")
