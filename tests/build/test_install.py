"""Test Caisson installed with pip, far from its checkout: the command, the library, the pytest plugin, the archives."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import venv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from caisson.proto.contract import VERSION
from tests.support.checkout import clean_environment, copy_sources
from tests.support.unique import unique

ROOT = Path(__file__).resolve().parents[2]

#: Seconds for pip with a slow mirror, and for building and booting a guest without hardware virtualization.
PIP_TIMEOUT, GUEST_TIMEOUT = 600, 280


@dataclass
class Environment:
    """A separate virtual environment, with Caisson installed."""

    directory: Path
    checkout: Path

    @property
    def python(self) -> Path:
        return self.directory / "bin/python"

    def run(self, *words: str | Path, timeout: float = 60, **options: Any) -> str:
        done = subprocess.run(
            words, env=clean_environment(), stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout,
            **options,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return str(done.stdout)

    def pip(self, *words: str | Path, **options: Any) -> str:
        pip = (self.python, "-m", "pip", "--disable-pip-version-check")
        return self.run(*pip, *words, timeout=PIP_TIMEOUT, **options)


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """Install Caisson from a checkout that is then removed; both paths contain spaces."""
    place = tmp_path_factory.mktemp("an install")
    checkout = place / "a checkout"
    copy_sources(checkout)
    venv.create(place / "an environment", with_pip=True)
    environment = Environment(place / "an environment", place / "moved away")
    environment.pip("install", "--quiet", "-c", checkout / "constraints.txt", checkout)
    checkout.rename(environment.checkout)
    return environment


@pytest.fixture
def run_directory(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Create the run directory: its path is short because socket paths are limited."""
    directory = Path("/tmp") / unique("caisson-install")
    monkeypatch.setenv("CAISSON_RUN", str(directory))
    yield directory
    shutil.rmtree(directory, ignore_errors=True)


def test_the_command_runs_a_program_in_a_guest(installed: Environment, run_directory: Path, tmp_path: Path) -> None:
    command = installed.directory / "bin/caisson"
    assert installed.run(command, "--version", cwd=tmp_path) == f"caisson {VERSION}\n"
    shown = installed.run(command, "exec", "--", "uname", "-s", cwd=tmp_path, timeout=GUEST_TIMEOUT)
    assert shown == "Linux\n"
    assert "spec: " in installed.run(installed.directory / "bin/caisson-oci", "--version", cwd=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_project_of_its_own_has_the_library_and_the_plugin(
    installed: Environment, run_directory: Path, tmp_path: Path
) -> None:
    """docs/library.md, as written."""
    installed.pip("install", "--quiet", "pytest")
    files = re.findall(r"```python (\S+)\n(.*?)```", (ROOT / "docs/library.md").read_text(), re.DOTALL)
    assert [name for name, _ in files] == ["conftest.py", "test_guest.py"]
    for name, text in files:
        (tmp_path / name).write_text(text)
    shown = installed.run(installed.python, "-m", "pytest", "-q", cwd=tmp_path, timeout=GUEST_TIMEOUT)
    assert "1 passed" in shown


def test_it_adds_no_other_module(installed: Environment, tmp_path: Path) -> None:
    program = "import importlib.metadata as m, json; print(json.dumps([str(f) for f in m.files('caisson-vm')]))"
    files = json.loads(installed.run(installed.python, "-c", program, cwd=tmp_path))
    tops = {file.partition("/")[0] for file in files if not file.startswith(("../../../bin/", "../../../share/"))}
    for shared in ("man/man1/caisson.1", "bash-completion/completions/caisson", "zsh/site-functions/_caisson"):
        assert (installed.directory / "share" / shared).stat().st_size > 0
    assert {top for top in tops if not top.endswith(".dist-info")} == {"caisson"}
    assert not any(name in file for file in files for name in ("tests/", "tasks.py", ".proto-"))
    for needed in ("agent/nsexec/nsexec.c", "rootfs-templates/debian/image.yaml", "proto/kata1/agent.proto",
                   "proto/kata1/agent_pb2.py", "proto/kata1/agent_pb2.pyi", "agent/py.typed"):  # fmt: skip
        assert f"caisson/{needed}" in files


def test_packages_that_are_called_alike_are_left_alone(installed: Environment, tmp_path: Path) -> None:
    installed.pip("install", "--quiet", "proto-plus")
    program = "import proto, caisson.agent.client, caisson.proto; print(proto.Message.__module__)"
    assert installed.run(installed.python, "-c", program, cwd=tmp_path) == "proto.message\n"
    installed.pip("check")


def test_a_source_archive_builds_without_a_network(installed: Environment, tmp_path: Path) -> None:
    """A distribution's packagers have no PyPI: the archive contains the compiled protocol."""
    installed.pip("install", "--quiet", "setuptools>=77", "wheel", "grpcio-tools", "-c", ROOT / "constraints.txt")
    source = tmp_path / "source"
    shutil.copytree(installed.checkout, source)
    program = f"import setuptools.build_meta as b; print(b.build_sdist({str(tmp_path)!r}))"
    name = installed.run(installed.python, "-c", program, cwd=source).splitlines()[-1]
    assert name == f"caisson_vm-{VERSION}.tar.gz"
    installed.pip("uninstall", "--yes", "grpcio-tools")
    offline = ("wheel", "--no-index", "--no-deps", "--no-build-isolation", "--wheel-dir", tmp_path)
    installed.pip(*offline, tmp_path / name, cwd=tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    names = subprocess.run([sys.executable, "-m", "zipfile", "-l", wheel], capture_output=True, text=True).stdout
    assert "caisson/proto/kata1/agent_pb2.py " in names and "caisson/rootfs-templates/debian/image.yaml" in names


def test_an_editable_install_follows_the_checkout(installed: Environment, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(installed.checkout, source)
    venv.create(tmp_path / "environment", with_pip=True)
    environment = Environment(tmp_path / "environment", source)
    environment.pip("install", "--quiet", "-c", source / "constraints.txt", "-e", source)
    contract = source / "proto/contract.py"
    contract.write_text(contract.read_text().replace(f'VERSION = "{VERSION}"', 'VERSION = "9.9.9"'))
    assert environment.run(tmp_path / "environment/bin/caisson", "--version", cwd=tmp_path) == "caisson 9.9.9\n"
    environment.run(environment.python, "-c", "import caisson.image, caisson.agent.client", cwd=tmp_path)
