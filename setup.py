"""Map the directories of this checkout onto the packages of `caisson`, and compile the protocol for them.

pyproject.toml has everything that does not depend on files.
"""

from __future__ import annotations

import os
import runpy
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py
from setuptools.command.sdist import sdist

#: Directories that are packages: `agent` is installed as `caisson.agent`.
PACKAGES = ("agent", "commands", "image", "proto")

#: Directories of plain files that the code reads, beside the packages.
DATA = ("rootfs-templates",)

#: Files that the command line writes about itself: where to, and by which words.
SHARED = {
    "build/share/caisson.1": ("share/man/man1", ["help", "--man"]),
    "build/share/caisson": ("share/bash-completion/completions", ["completion", "bash"]),
    "build/share/_caisson": ("share/zsh/site-functions", ["completion", "zsh"]),
    "build/share/caisson.fish": ("share/fish/vendor_completions.d", ["completion", "fish"]),
}

#: Compiles the protocol files; a module of its own, since `caisson` cannot be imported yet.
PROTOCOL = runpy.run_path("proto/generate.py", run_name="generate")


class BuildPackages(build_py):
    """Compile the protocol before packages are collected, and leave out what an earlier build collected."""

    def run(self) -> None:
        PROTOCOL["ensure"]()
        write_shared_files()
        shutil.rmtree(Path(self.build_lib) / "caisson", ignore_errors=True)
        super().run()


class SourceArchive(sdist):
    """Put the compiled protocol into the archive: building from it needs no protoc."""

    def run(self) -> None:
        PROTOCOL["ensure"]()
        super().run()


def write_shared_files() -> None:
    """Have the command line write its manual page and completions: with `caisson` where it can be imported."""
    with tempfile.TemporaryDirectory() as scratch:
        (Path(scratch) / "caisson").mkdir()
        for name in PACKAGES:
            (Path(scratch) / "caisson" / name).symlink_to(Path(name).resolve())
        for file, (_, words) in SHARED.items():
            command = [sys.executable, "-m", "caisson.commands.main", *words]
            text = subprocess.run(
                command, env=os.environ | {"PYTHONPATH": scratch}, capture_output=True, check=True
            ).stdout
            Path(file).parent.mkdir(parents=True, exist_ok=True)
            Path(file).write_bytes(text)


def packages() -> list[str]:
    """The names of all packages."""
    below = (f"{top}.{name}" for top in PACKAGES for name in find_packages(top))
    return [f"caisson.{name}" for name in (*PACKAGES, *below, *DATA)]


def files_below(directory: str, *patterns: str) -> list[str]:
    """The files that match, relative to the directory; hidden ones too, which setuptools' own patterns leave out."""
    root = Path(directory)
    found = (path for pattern in patterns for path in root.rglob(pattern) if path.is_file())
    return sorted(str(path.relative_to(root)) for path in found)


setup(
    version=runpy.run_path("proto/contract.py")["VERSION"],
    packages=packages(),
    package_dir={f"caisson.{name}": name for name in (*PACKAGES, *DATA)},
    package_data={
        "caisson.agent": ["py.typed", "nsexec/*.[ch]", "nsexec/front/*.[ch]", "nsexec/Makefile"],
        "caisson.commands": ["py.typed"],
        "caisson.image": ["py.typed"],
        "caisson.proto": ["py.typed", *files_below("proto", "*.proto"), "*/*_pb2.pyi"],
        **{f"caisson.{name}": files_below(name, "*") for name in DATA},
    },
    data_files=[(directory, [file]) for file, (directory, _) in SHARED.items()],
    scripts=["commands/caisson-oci"],
    cmdclass={"build_py": BuildPackages, "sdist": SourceArchive},
    setup_requires=["grpcio-tools>=1.60"] if PROTOCOL["outdated"]() else [],
)
