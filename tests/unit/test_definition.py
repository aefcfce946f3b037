"""Test the image definition: what is accepted, and the errors for everything else."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from caisson.image.build.builder import Build
from caisson.image.build.cache import Cache
from caisson.image.build.definition import DEFAULT, host_architecture, load
from caisson.image.build.settings import DefinitionError
from caisson.image.errors import ImageError

ROOT = Path(__file__).resolve().parents[2]

WHOLE = """
name: small
suite: {{ suite }}
arch: {{ arch }}
python: "3.13"
packages: [python3.13-minimal]
wheels: [grpcio==1.85.1]
busybox: busybox-static
kernel:
  package: linux-image-cloud-{{ arch }}
  fragments: [base]
compression: none
cmdline: quiet
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "image.yaml"


@pytest.mark.parametrize(("suite", "python"), [(None, "3.13"), ("trixie", "3.13"), ("bookworm", "3.11")])
def test_the_default_is_valid_for_each_suite(suite: str | None, python: str) -> None:
    loaded = load(suite=suite)
    read = loaded.definition
    assert (read.suite, read.python, read.arch) == (suite or "trixie", python, host_architecture())
    assert f"python{python}-minimal" in read.packages
    assert loaded.templates == (DEFAULT.parent,)


def test_the_guest_has_the_protobuf_that_compiles_the_protocol() -> None:
    pins = (ROOT / "constraints.txt").read_text().splitlines()
    pin = next(line for line in pins if line.startswith("protobuf=="))
    assert any(wheel.startswith(f"{pin} --hash=sha256:") for wheel in load().definition.wheels)


def test_a_definition_of_ones_own(file: Path) -> None:
    file.write_text(WHOLE)
    loaded = load(file, suite="bookworm")
    read = loaded.definition
    assert (read.name, read.suite, read.kernel.fragments, read.prune) == ("small", "bookworm", ("base",), ())
    assert read.sources is False
    assert loaded.templates == (file.parent,)


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ("wheels:", "wheel:", r"wheel is not a key of a definition; did you mean wheels\?"),
        ("  fragments:", "  fragment:", r"kernel\.fragment is not a key .* did you mean kernel\.fragments\?"),
        ("cmdline: quiet", "cmdline: quiet\nzzz: 1", r"zzz is not a key of a definition; known are: name, suite"),
        ("cmdline: quiet", "", "cmdline is missing"),
        ("  fragments: [base]", "", "kernel.fragments is missing"),
        ('"3.13"', "3.13", "python must be a string, not 3.13; quotes make it one"),
        ("[python3.13-minimal]", "python3.13-minimal", "packages must be a list of strings"),
        ("[grpcio==1.85.1]", "[1]", r"wheels must be a list of strings, not \[1\]"),
        ("compression: none", "compression: brotli", "compression is one of none, .*, not 'brotli'"),
        ("cmdline: quiet", "cmdline: quiet\nsources: maybe", "sources must be true or false, not 'maybe'"),
        ("arch: {{ arch }}", "arch: m68k", "arch is 'm68k'; there are amd64 and arm64"),
        ("suite: {{ suite }}", "suite: trixie", "its suite is fixed to trixie"),
        ("{{ suite }}", "{{ suit }}", "'suit' is undefined"),
        ("{{ suite }}", "{{ suite", r"image\.yaml:4: expected token"),
        ("name: small", "name: [", r"image\.yaml: "),
        ("name: small", "name: {{ 1 / 0 }}", r"image\.yaml: division by zero"),
        ("name: small", "name: 2026-13-45", r"image\.yaml: month must be in 1..12"),
        ("name: small", f"name: {'[' * 5000}", r"image\.yaml: nested too deeply"),
        ("[python3.13-minimal]", "['-y']", "packages: '-y' is not the name of a package"),
        ("cmdline: quiet", "cmdline: quiet\nprune: [/usr/share]", "prune: '/usr/share' is not a path in the guest"),
        ("cmdline: quiet", "cmdline: quiet\nkeep: [../x]", r"keep: '\.\./x' is not a path in the guest"),
        ("cmdline: quiet", "cmdline: quiet\nfiles: {/../../x: image.yaml}", "files: '/../../x' is not the path of"),
        ("cmdline: quiet", "cmdline: quiet\nfiles: {/: image.yaml}", "files: '/' is not the path of"),
        ("cmdline: quiet", "cmdline: quiet\nkeep+: usr/bin/x", r"keep\+ must be a list of strings, not 'usr/bin/x'"),
        ("cmdline: quiet", "cmdline: quiet\ncmdline+: x", r"cmdline is not a list: cmdline\+ cannot append to it"),
    ],
)
def test_definition_errors_name_the_setting(file: Path, old: str, new: str, complaint: str) -> None:
    assert old in WHOLE
    file.write_text(WHOLE.replace(old, new, 1))
    with pytest.raises(DefinitionError, match=complaint):
        load(file, suite="bookworm")


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        (["nokey=3"], "^--set nokey=3: nokey is not a key of a definition"),
        (["name=x", "packges+=a"], r"^--set name=x packges\+=a: packges is not a key .*; did you mean packages\?"),
        (["verity=perhaps"], "^--set verity=perhaps: verity must be true or false"),
    ],
)
def test_a_setting_that_is_wrong_is_not_blamed_on_the_file(file: Path, given: list[str], complaint: str) -> None:
    file.write_text(WHOLE)
    with pytest.raises(DefinitionError, match=complaint):
        load(file, suite="bookworm", settings=given)
    file.write_text(WHOLE.replace("cmdline:", "cmdlin:"))
    with pytest.raises(DefinitionError, match=r"^.*image\.yaml: cmdlin is not a key"):
        load(file, suite="bookworm", settings=given)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("- a\n- b\n", "the definition must be a mapping"),
        ("", "the definition must be a mapping"),
        (WHOLE.split("kernel:")[0] + "kernel: 3\ncompression: none\ncmdline: quiet\n", "kernel must be a mapping"),
    ],
)
def test_definition_rejects_other_files(file: Path, text: str, complaint: str) -> None:
    file.write_text(text)
    with pytest.raises(DefinitionError, match=complaint):
        load(file)


def test_a_definition_that_is_not_text(file: Path) -> None:
    file.write_bytes(WHOLE.encode() + b"# \xff\n")
    with pytest.raises(DefinitionError, match=r"image\.yaml: is not UTF-8 at byte \d+"):
        load(file)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DefinitionError, match=r"cannot be read: .*none\.yaml"):
        load(tmp_path / "none.yaml")


def test_a_suite_that_the_template_does_not_know() -> None:
    with pytest.raises(DefinitionError, match=r"image.yaml: 'sid': unknown; known are: bookworm, trixie"):
        load(suite="sid")


def test_a_machine_that_is_not_supported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "s390x")
    with pytest.raises(DefinitionError, match="s390x: images cannot be built for it, only for x86_64 and aarch64"):
        load()


def test_a_definition_imports_nothing_that_builds() -> None:
    """Reading data needs no apt, file system tools or compressors."""
    program = "import sys; import caisson.image.build.definition; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    ours = {name.removeprefix("caisson.image.") for name in done.stdout.split() if name.startswith("caisson.image.")}
    assert not {name for name in ours if name.startswith(("formats", "packages", "kernel", "run"))}


def test_a_hook_that_cannot_be_executed_is_refused_before_anything_is_made(file: Path, tmp_path: Path) -> None:
    file.write_text(WHOLE + "hooks: [mine.sh]\n")
    hook = tmp_path / "mine.sh"
    hook.write_text("#!/bin/sh\n")
    with pytest.raises(ImageError, match=r"mine\.sh: is a hook and not executable; run: chmod \+x"):
        Build(load(file), Cache(tmp_path / "cache"))
    hook.chmod(0o755)
    Build(load(file), Cache(tmp_path / "cache"))
    assert not (tmp_path / "cache").exists()
