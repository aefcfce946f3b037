"""Test what doctor reports about a machine, and what a report includes and omits."""

from __future__ import annotations

import json
import os
import platform
import re
import tarfile
from pathlib import Path

import pytest

from caisson.commands import doctor, report
from caisson.commands.catalogue import GROUPS
from caisson.commands.main import CommandLine
from caisson.image import programs
from caisson.image.vm.accel import Host
from caisson.proto.contract import VERSION


@pytest.fixture
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Set up a machine with an empty PATH, no keyring, and its own directories; return where to put programs."""
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr(programs, "SYSTEM", ())
    monkeypatch.setenv("CAISSON_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("CAISSON_RUN", str(tmp_path / "run"))
    return tmp_path / "bin"


def found() -> dict[str, doctor.Finding]:
    return {finding.name: finding for finding in doctor.examine()}


def test_a_machine_without_qemu_gets_the_command_that_installs_it(bare: Path) -> None:
    findings = found()
    assert findings["QEMU"].status == "missing"
    assert "qemu-system-x86_64" in findings["QEMU"].found
    assert "apt-get install" in findings["QEMU"].remedy and "qemu-system-x86" in findings["QEMU"].remedy
    assert findings["build tools"].status == "missing" and "musl-tools" in findings["build tools"].remedy
    assert findings["virtiofsd"].status == findings["kernel tools"].status == "limited"
    assert findings["cache"].status == findings["run directory"].status == "ok"


@pytest.mark.parametrize(("usage", "status"), [("--shared-dir", "ok"), ("-o source=", "limited")])
def test_a_virtiofsd_that_an_ordinary_user_cannot_run_is_limited(
    bare: Path, monkeypatch: pytest.MonkeyPatch, usage: str, status: str
) -> None:
    (bare / "virtiofsd").write_text(f"#!/bin/sh\necho '{usage}'\n")
    (bare / "virtiofsd").chmod(0o755)
    assert found()["virtiofsd"].status == "ok" or os.geteuid() != 0
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    finding = found()["virtiofsd"]
    assert finding.status == status
    assert status == "ok" or ("needs root" in finding.found and "apt-get install virtiofsd" in finding.remedy)


def test_qemu_says_its_version(bare: Path) -> None:
    (bare / "qemu-system-x86_64").write_text("#!/bin/sh\necho QEMU emulator version 7.0\n")
    (bare / "qemu-system-x86_64").chmod(0o755)
    assert found()["QEMU"].found == f"QEMU emulator version 7.0 ({bare}/qemu-system-x86_64)"


@pytest.mark.parametrize(
    ("flags", "device", "status", "problem", "remedy"),
    [
        ("vmx", True, "ok", "", ""),
        ("sse", True, "limited", "the CPU shows neither vmx nor svm", "nested virtualization"),
        ("vmx", False, "limited", "cannot be opened (No such file or directory)", "sudo modprobe kvm_intel"),
    ],
)
def test_kvm_is_judged_by_evidence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: str, device: bool, status: str, problem: str, remedy: str
) -> None:
    if device:
        (tmp_path / "kvm").touch()
    host = Host("x86_64", f"flags\t: fpu {flags}\n", tmp_path / "kvm", tmp_path / "vhost-vsock")
    monkeypatch.setattr(Host, "current", classmethod(lambda cls: host))
    finding = found()["KVM"]
    assert finding.status == status and problem in finding.found and remedy in finding.remedy
    assert bool(finding.remedy) == (status != "ok")


def test_json_and_exit_status(bare: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert CommandLine(GROUPS).run(["doctor", "--json"]) == 1
    documents = json.loads(capsys.readouterr().out)
    assert all(set(one) == {"name", "status", "found", "remedy"} for one in documents)
    assert all(one["remedy"] for one in documents if one["status"] != "ok")
    assert CommandLine(GROUPS).run(["doctor"]) == 1
    assert (
        capsys.readouterr().out.splitlines()[-1].startswith("Guests cannot be built and booted here yet: build tools")
    )


def test_a_report_has_the_evidence_and_no_secrets(
    bare: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CAISSON_MIRROR", "http://me:hunter2@mirror/debian")
    vm = tmp_path / "run/web"
    vm.mkdir(parents=True)
    (vm / "vm.json").write_text('{"append": "quiet token=xyz", "api_key": "abc"}')
    (vm / "console.log").write_bytes(b"x" * report.MAX_TAIL + b"\xffroot_password=hunter2 quiet\nthe last line\n")
    (vm / "secret.img").write_text("a disk")
    archive = tmp_path / "report.tar.gz"
    assert CommandLine(GROUPS).run(["report", "--output", str(archive)]) == 0
    assert capsys.readouterr().out == f"{archive}\n"
    with tarfile.open(archive) as tar:
        texts = {name.removeprefix("caisson-report/"): _read(tar, name) for name in tar.getnames()}
    assert set(texts) == {"versions.txt", "doctor.json", "vms.txt", "vms/web/vm.json", "vms/web/console.log"}
    assert f"caisson {VERSION}" in texts["versions.txt"] and json.loads(texts["doctor.json"])
    assert "CAISSON_MIRROR=http://[removed]@mirror/debian\n" in texts["versions.txt"]
    assert texts["vms/web/console.log"].endswith("root_password=[removed] quiet\nthe last line\n")
    assert texts["vms/web/vm.json"] == '{"append": "quiet token=[removed]", "api_key": "[removed]"}'
    assert CommandLine(GROUPS).run(["report", "--output", str(archive)]) == 1
    remedy = "already exists; remove it, or name another file: --output FILE"
    assert capsys.readouterr().err == f"caisson: {archive}: {remedy}\n"


def _read(tar: tarfile.TarFile, name: str) -> str:
    file = tar.extractfile(name)
    assert file is not None
    return file.read().decode()


def test_this_machine_is_judged_by_what_it_shows() -> None:
    """KVM may be a trap: the device opens on a CPU without virtualization."""
    finding = found()["KVM"]
    if platform.machine() == "x86_64" and not re.search(r"\b(vmx|svm)\b", Path("/proc/cpuinfo").read_text()):
        assert finding.status == "limited" and finding.remedy
        opens = os.access("/dev/kvm", os.R_OK | os.W_OK)
        assert ("neither vmx nor svm" if opens else "cannot be opened") in finding.found
    else:
        assert (finding.status == "ok") == (not finding.remedy)
