"""Test rendering distributions' templates, and the package requests that result."""

from __future__ import annotations

import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest

from caisson.image.build import rootfs
from caisson.image.build.definition import find, load
from caisson.image.build.settings import DefinitionError
from caisson.image.build.template_files import TemplateFiles
from caisson.image.errors import ImageError
from caisson.image.packages import apt
from caisson.image.packages.apk import Apk
from caisson.image.packages.distribution import packages_of

TEMPLATES = Path(__file__).resolve().parents[2] / "rootfs-templates"


pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="repositories are made for x86_64")


@pytest.mark.parametrize(
    ("template", "suite", "name", "python", "libraries"),
    [
        ("ubuntu", None, "ubuntu-noble", "3.12", "usr/lib/x86_64-linux-gnu"),
        ("ubuntu", "noble", "ubuntu-noble", "3.12", "usr/lib/x86_64-linux-gnu"),
        ("alpine", None, "alpine-v3.22", "3.12", "usr/lib"),
        ("alpine", "v3.20", "alpine-v3.20", "3.12", "usr/lib"),
        ("debian", "bookworm", "debian-bookworm", "3.11", "usr/lib/x86_64-linux-gnu"),
    ],
)
def test_a_template_renders(template: str, suite: str | None, name: str, python: str, libraries: str) -> None:
    loaded = load(find(template), suite=suite)
    definition = loaded.definition
    assert (definition.distribution, definition.name, definition.python) == (template, name, python)
    assert definition.libraries == libraries
    assert [word for word in (*definition.packages, *definition.keep) if re.search(r"\d\.\d", word)]
    assert not re.search(
        r"3\.(?!" + python.removeprefix("3.") + ")", " ".join((*definition.packages, *definition.keep))
    )
    assert dict(TemplateFiles(loaded).sources())["init"] == TEMPLATES / "debian/files/init.j2"


@pytest.mark.parametrize("template", ["ubuntu", "alpine"])
def test_a_suite_of_another_distribution_is_refused(template: str) -> None:
    with pytest.raises(DefinitionError, match=r"'trixie': unknown; known are: "):
        load(find(template), suite="trixie")


def test_a_distribution_that_is_not_known() -> None:
    with pytest.raises(DefinitionError, match="distribution is one of debian, ubuntu, alpine, not 'gentoo'"):
        load(settings=["distribution=gentoo"])


def test_what_a_definition_says_is_what_its_parent_is_rendered_with(tmp_path: Path) -> None:
    (tmp_path / "image.yaml").write_text('extends: debian\nname: own\nsuite: forky\npython: "3.99"\n')
    definition = load(tmp_path / "image.yaml").definition
    assert (definition.suite, definition.python) == ("forky", "3.99")
    assert "python3.99-minimal" in definition.packages


def test_a_kernel_is_compiled_only_from_what_there_is() -> None:
    settings = ["kernel.package=", "kernel.source=linux-source-6.12"]
    assert load(find("ubuntu"), settings=settings).definition.kernel.source
    with pytest.raises(DefinitionError, match="alpine has no kernel sources in packages; name a directory"):
        load(find("alpine"), settings=settings)
    assert load(find("alpine"), settings=[settings[0], "kernel.source=./linux"]).definition.kernel.source


def test_the_guide_for_a_new_distribution_holds(tmp_path: Path) -> None:
    guide = (TEMPLATES / "template/README.md").read_text()
    (example,) = re.findall(r"^```yaml\n(.*?)^```$", guide, re.MULTILINE | re.DOTALL)
    (tmp_path / "image.yaml").write_text(example)
    definition = load(tmp_path / "image.yaml").definition
    for name in ("name", "suite", "python"):
        assert getattr(definition, name) != getattr(load().definition, name)
    for word in re.findall(r"`((?:image|tests|rootfs-templates)/[\w./-]+)`", guide):
        assert (TEMPLATES.parent / word).exists(), word


# ---- where packages come from


def test_mirrors_and_keys_are_chosen_by_variables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("UBUNTU_MIRROR", "UBUNTU_KEYRING", "ALPINE_MIRROR", "ALPINE_KEYS"):
        monkeypatch.delenv(f"CAISSON_{name}", raising=False)
    sources = {arch: packages_of("ubuntu", tmp_path, "noble", arch) for arch in ("amd64", "arm64")}
    assert {arch: one.mirror for arch, one in sources.items() if isinstance(one, apt.Apt)} == {
        "amd64": "http://archive.ubuntu.com/ubuntu", "arm64": "http://ports.ubuntu.com/ubuntu-ports",
    }  # fmt: skip
    alpine = packages_of("alpine", tmp_path, "v3.22", "arm64")
    assert isinstance(alpine, Apk)
    assert (alpine.architecture, str(alpine.keys)) == ("aarch64", "/etc/apk/keys")
    monkeypatch.setenv("CAISSON_ALPINE_MIRROR", "http://here/alpine/")
    monkeypatch.setenv("CAISSON_UBUNTU_KEYRING", str(tmp_path / "none.gpg"))
    alpine = packages_of("alpine", tmp_path, "v3.22", "amd64")
    assert isinstance(alpine, Apk) and alpine.mirror == "http://here/alpine"
    with pytest.raises(ImageError, match=r"none\.gpg: is missing; .* CAISSON_UBUNTU_KEYRING names another"):
        packages_of("ubuntu", tmp_path, "noble", "amd64").update()


HOSTILE = """Acquire::http "";
Acquire::http::Proxy "http://proxy:3128";
Acquire::http::Proxy::internal "DIRECT";
Acquire::https::CAInfo "/etc/ca.pem";
Acquire::https::Verify-Peer "false";
Acquire::http::AllowRedirect "true";
"""


def test_the_hosts_apt_configuration_weakens_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(apt, "run", lambda argv, **_: HOSTILE.encode() if argv[0] == "apt-config" else b"")
    keyring = tmp_path / "keyring"
    keyring.touch()
    source = apt.Apt(tmp_path, "trixie", "amd64", "http://m/debian", apt.Keyring(keyring, ""), security="http://s")
    source.update()
    written = (tmp_path / "apt.conf").read_text()
    assert written.count("Proxy") == 2 and "CAInfo" in written and "Verify-Peer" not in written
    assert (tmp_path / "sources.list").read_text().splitlines() == [
        f"deb [arch=amd64 signed-by={keyring}] http://m/debian trixie main",
        f"deb [arch=amd64 signed-by={keyring}] http://s trixie-security main",
    ]
    done = subprocess.run(
        ["apt-config", "dump"], env={"APT_CONFIG": str(tmp_path / "apt.conf"), "PATH": "/usr/bin:/bin"},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    for setting in (
        'Acquire::AllowInsecureRepositories "false";', 'Acquire::AllowWeakRepositories "false";',
        'APT::Get::AllowUnauthenticated "false";', 'Dir::Etc::Main "/dev/null";',
    ):  # fmt: skip
        assert setting.lower() in done.stdout.lower(), setting


@pytest.mark.parametrize(
    ("mirror", "chosen", "security"),
    [
        ("http://m/debian/", "", "http://m/debian-security"),
        ("http://m/snapshot", "", ""),
        ("http://m/debian", "none", ""),
        ("http://m/debian", "http://s", "http://s"),
    ],
)
def test_security_updates_are_in_by_default(
    monkeypatch: pytest.MonkeyPatch, mirror: str, chosen: str, security: str
) -> None:
    monkeypatch.setenv("CAISSON_SECURITY_MIRROR", chosen)
    assert apt.security_mirror(mirror) == security


def test_security_updates_are_taken_from_the_hosts_own_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = [f"mirror+file:/etc/apt/mirrors/{name}.list" for name in ("other", "debian-security", "debian")]
    program = tmp_path / "apt-get"
    lines = "\n".join(
        f"echo {origin} Packages {uri}" for origin, uri in zip(("X", "Debian", "Debian"), sources, strict=True)
    )
    program.write_text(f"#!/bin/sh\n{lines}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    for name in ("CAISSON_MIRROR", "CAISSON_SECURITY_MIRROR"):
        monkeypatch.delenv(name, raising=False)
    assert (apt.host_mirror(), apt.security_mirror(sources[2])) == (sources[2], sources[1])
    assert apt.security_mirror("http://m/snapshot") == ""


def test_wheels_have_hashes_or_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[object]] = []
    lines: list[str] = []
    monkeypatch.setattr(rootfs, "run", asked.append)
    definition = load(find("debian"), settings=["wheels+=loose==1"]).definition
    rootfs.fetch_wheels(Path(sys.executable), definition, tmp_path, lines.append)
    assert "--require-hashes" in asked[0] and asked[1][-1] == "loose==1"
    assert len(lines) == 1 and "loose==1" in lines[0]


def test_wheels_are_those_of_the_c_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[object]] = []
    monkeypatch.setattr(rootfs, "run", asked.append)
    for name in ("alpine", "ubuntu"):
        rootfs.fetch_wheels(Path(sys.executable), load(find(name)).definition, tmp_path)
    platforms = [[str(word) for word in argv if "linux" in str(word)] for argv in asked]
    assert platforms[0] == ["musllinux_1_1_x86_64", "musllinux_1_2_x86_64"]
    assert "manylinux_2_28_x86_64" in platforms[1] and not any("musl" in word for word in platforms[1])
    rootfs.fetch_wheels(Path(sys.executable), load(find("alpine"), settings=["wheels=[]"]).definition, tmp_path)
    assert len(asked) == 2


def test_the_wheels_of_alpine_exist(tmp_path: Path) -> None:
    wheels = rootfs.fetch_wheels(Path(sys.executable), load(find("alpine")).definition, tmp_path)
    files = {wheel.name: wheel.file.name for wheel in wheels}
    assert set(files) == {"protobuf"}
    assert not any("manylinux" in name for name in files.values())
