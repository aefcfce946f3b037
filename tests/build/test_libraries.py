"""Test shared libraries of a guest: unneeded ones are removed, whatever the C library is."""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from caisson.image.build import libraries
from caisson.image.build.definition import find, load
from caisson.image.run import run

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="repositories are made for x86_64")


def test_a_library_of_which_nothing_is_used_is_not_needed(tmp_path: Path) -> None:
    sources = {"used": "int one(void) { return 1; }", "unused": "int two(void) { return 2; }"}
    for name, text in sources.items():
        (tmp_path / f"{name}.c").write_text(text)
        run(["gcc", "-shared", "-fPIC", "-o", tmp_path / f"lib{name}.so", tmp_path / f"{name}.c"])
    (tmp_path / "main.c").write_text("int one(void); int main(void) { return one() == 1 ? 7 : 8; }\n")
    program = tmp_path / "main"
    linked = ["-Wl,--no-as-needed", f"-L{tmp_path}", "-lunused", "-lused", f"-Wl,-rpath,{tmp_path}"]
    run(["gcc", "-o", program, tmp_path / "main.c", *linked])
    assert {"libused.so", "libunused.so"} <= libraries.needs(program)
    libraries.drop_unused_needs([program], tmp_path)
    assert "libunused.so" not in libraries.needs(program)
    (tmp_path / "libunused.so").unlink()
    assert subprocess.run([program]).returncode == 7


def test_libraries_that_nothing_needs_go_where_the_c_library_is_musl(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    library = tree / "usr/lib"
    library.mkdir(parents=True)
    (tree / "usr/bin").mkdir()
    (library / "python3").mkdir()
    (tmp_path / "one.c").write_text("int one(void) { return 1; }\n")
    (tmp_path / "main.c").write_text("int one(void); int main(void) { return one() == 1 ? 7 : 8; }\n")
    for name in ("libused.so", "libunused.so"):
        run(["musl-gcc", "-shared", "-fPIC", "-o", library / name, tmp_path / "one.c"])
    run(["musl-gcc", "-o", tree / "usr/bin/main", tmp_path / "main.c", f"-L{library}", "-lused"])
    shutil.copyfile("/lib/ld-musl-x86_64.so.1", library / "ld-musl-x86_64.so.1")
    (library / "ld-musl-x86_64.so.1").chmod(0o755)
    (library / "libc.so").symlink_to("ld-musl-x86_64.so.1")
    (library / "libother.so").symlink_to("ld-musl-x86_64.so.1")
    libraries.drop_unused_libraries(tree, load(find("alpine")).definition)
    assert sorted(path.name for path in library.iterdir()) == [
        "ld-musl-x86_64.so.1",
        "libc.so",
        "libused.so",
        "python3",
    ]
    loader = library / "ld-musl-x86_64.so.1"
    assert subprocess.run([loader, "--library-path", library, tree / "usr/bin/main"]).returncode == 7


def test_a_library_stays_of_which_an_object_needs_a_version(tmp_path: Path) -> None:
    """grpcio needs libpthread by name, though its functions have moved to libc; without it ld.so ends the program."""
    from grpc._cython import cygrpc

    module = Path(shutil.copy(cygrpc.__file__, tmp_path))
    triplet = subprocess.run(["gcc", "-print-multiarch"], capture_output=True, text=True, check=True).stdout.strip()
    libraries.drop_unused_needs([module], Path("/usr/lib") / triplet)
    program = "import ctypes, sys; ctypes.CDLL(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", program, module], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
