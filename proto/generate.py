"""Compile every ``.proto`` below this directory to ``*_pb2.py`` and ``*_pb2.pyi`` beside it, with grpcio-tools' protoc.

Runs where a package is built and where a checkout is set up, never in a guest: a guest gets the compiled modules.  A
module holds its file's descriptor and nothing else; what makes classes of it is descriptors.py.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from google.protobuf.descriptor_pb2 import FileDescriptorProto

HERE = Path(__file__).resolve().parent

#: Directories with a descriptor pool of their own: the same names stand for other messages in another one.
POOLS = ("kata1", "kata3")

MODULE = '''"""Compiled from {name}; do not edit."""

from caisson.proto import descriptors
{imports}
DESCRIPTOR, __getattr__ = descriptors.load(globals(), {serialized!r}, {pool!r}, ({known}))
'''


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
    import tempfile  # here, as below: a checkout's commands look whether there is something to do, and no more

    with tempfile.TemporaryDirectory(dir=HERE, prefix=".protoc-") as scratch:
        made = Path(scratch)
        for directory in sorted({source.parent for source in sources()}):  # in one run names would have to differ
            for file in _compiled(directory, made):
                place = made / file.name.removeprefix("caisson/proto/").removesuffix(".proto")
                stub = made / f"{file.name.removesuffix('.proto')}_pb2.pyi"
                stub.write_text(_corrected(stub.read_text()))
                place.parent.mkdir(exist_ok=True)
                place.with_name(f"{place.name}_pb2.py").write_text(_module(file, directory.name))
                stub.replace(place.with_name(f"{place.name}_pb2.pyi"))
        for module in (file for pattern in ("*/*_pb2.py", "*/*_pb2.pyi") for file in made.glob(pattern)):
            module.replace(HERE / module.relative_to(made))


def _compiled(directory: Path, made: Path) -> Iterator[FileDescriptorProto]:
    """Have protoc write the stubs of a directory's files; returns their descriptors."""
    import tempfile

    import grpc_tools
    from google.protobuf import descriptor_pb2
    from grpc_tools import protoc

    bundled = Path(grpc_tools.__file__).parent / "_proto"  # google/protobuf/empty.proto
    with tempfile.TemporaryDirectory(prefix="caisson-protoc-") as scratch:
        root = Path(scratch)
        (root / "caisson").mkdir()
        (root / "caisson/proto").symlink_to(HERE)  # imports are by the installed name, wherever the checkout is
        descriptors = root / "descriptors"
        names = [f"caisson/proto/{source.relative_to(HERE)}" for source in sorted(directory.glob("*.proto"))]
        outputs = [f"--descriptor_set_out={descriptors}", f"--pyi_out={made}"]
        status = protoc.main(["protoc", f"-I{root}", f"-I{bundled}", *outputs, *names])
        if status != 0:
            raise ProtocError(f"protoc exited with status {status} on {', '.join(names)}; its message is above")
        yield from descriptor_pb2.FileDescriptorSet.FromString(descriptors.read_bytes()).file


def _module(file: FileDescriptorProto, directory: str) -> str:
    """Return the text of a file's module: its descriptor, after those of the files that it imports."""
    google = [name for name in file.dependency if name.startswith("google/")]
    ours = [name for name in file.dependency if name not in google]
    known = [Path(name).stem + "_pb2" for name in google]
    imports = [f"from google.protobuf import {name}" for name in known]
    imports += [f"from {'.'.join(Path(name).parts[:-1])} import {Path(name).stem}_pb2 as _{number}"
                for number, name in enumerate(ours)]  # fmt: skip
    return MODULE.format(
        name=file.name,
        imports="\n".join([*imports, ""]),
        serialized=file.SerializeToString(),
        pool=directory if directory in POOLS else "",
        known="".join(f"{name}, " for name in known),
    )


def _corrected(stub: str) -> str:
    """Correct a stub for strict type checkers: no generic type without its arguments, and no field that hides
    the type which has its name.  In `Process: Process`, of a Spec, the second word would be the field.
    """
    classes = set(re.findall(r"^class (\w+)\(", stub, re.MULTILINE))
    hidden: set[str] = set()

    def of_class(match: re.Match[str]) -> str:
        text = match[0]
        for name in classes & set(re.findall(r"^    (\w+):", text, re.MULTILINE)):
            hidden.add(name)
            text = re.sub(
                rf"(?<=[:\[] )\b{name}\b(?=$|[,\]])|(?<=\[){name}\b(?=[,\]])", f"_{name}", text, flags=re.MULTILINE
            )
        return text

    stub = re.sub(r"^class .*?(?=^\S|\Z)", of_class, stub, flags=re.MULTILINE | re.DOTALL)
    stub = re.sub(r"\b_Mapping\b(?=\])", "_Mapping[str, object]", stub)
    return stub + "".join(f"\n_{name} = {name}" for name in sorted(hidden)) + "\n"


def ensure() -> None:
    """Compile only what is not up to date: a few stat calls on most days."""
    if outdated():
        generate()


if __name__ == "__main__":
    try:
        generate()
    except ProtocError as error:
        sys.exit(f"caisson.proto.generate: {error}")
