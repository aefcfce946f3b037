"""Test a VM's configuration, and what is rejected before anything is started."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from caisson.image.vm import VMConfig, VMError, qemu
from caisson.image.vm.config import memory_of_host, parse_share, shares_to_plug
from caisson.image.vm.network import Publish
from caisson.image.vm.pace import MAX_SLOWNESS, scaled, slowness
from tests.unit.test_qemu import MANIFEST


@pytest.mark.parametrize("mode", ["", ":ro", ":rw"])
@pytest.mark.parametrize("name", ["plain", "odd:rw", "odd:ro"])
def test_a_directory_may_be_called_like_a_mode(tmp_path: Path, name: str, mode: str) -> None:
    (tmp_path / name).mkdir()
    assert parse_share(f"src={tmp_path / name}{mode}") == ("src", (str(tmp_path / name), mode == ":rw"))


def test_a_mode_is_a_mode_where_both_directories_are_there(tmp_path: Path) -> None:
    for name in ("src", "src:rw"):
        (tmp_path / name).mkdir()
    assert parse_share(f"a={tmp_path}/src:rw") == ("a", (f"{tmp_path}/src", True))
    assert parse_share(f"a={tmp_path}/src:rw:ro") == ("a", (f"{tmp_path}/src:rw", False))


@pytest.mark.parametrize("option", ["memory", "max_memory"])
def test_more_memory_than_the_machine_has_is_refused(tmp_path: Path, option: str) -> None:
    flag = "--" + option.replace("_", "-")
    with pytest.raises(VMError, match=rf"^{flag} 99999999: more than the {memory_of_host()} MiB of this machine; give"):
        VMConfig(tmp_path, **{option: 99999999})  # type: ignore[arg-type]


def image(tmp_path: Path, shares: list[str] | None) -> Path:
    manifest = {"arch": "amd64", "cmdline": "", "kernel": {"file": "k"}, "root": {"file": "i", "format": "initrd"}}
    if shares is not None:
        manifest["kernel"]["shares"] = shares  # type: ignore[index]
    directory = tmp_path / "image"
    directory.mkdir()
    (directory / "image.json").write_text(json.dumps(manifest))
    for part in ("k", "i"):
        (directory / part).touch()
    return directory


def test_a_kernel_that_cannot_mount_a_share_is_refused_before_the_boot(tmp_path: Path) -> None:
    config = VMConfig(image(tmp_path, []), shares={"src": (str(tmp_path), False)})
    with pytest.raises(VMError, match="can mount neither 9p nor virtiofs; use one that can: --template lean"):
        shares_to_plug(config)


def test_virtiofs_takes_the_place_of_9p(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "virtiofsd").write_text("#!/bin/sh\necho --shared-dir --readonly\n")
    (tmp_path / "virtiofsd").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    config = VMConfig(image(tmp_path, ["virtiofs"]), shares={"src": (str(tmp_path), False)})
    assert shares_to_plug(config) == {"src": (str(tmp_path), False)}


@pytest.mark.parametrize("shares", [None, ["9p"], ["9p", "virtiofs"]])
def test_9p_is_used_where_the_kernel_has_it(tmp_path: Path, shares: list[str] | None) -> None:
    assert shares_to_plug(VMConfig(image(tmp_path, shares), shares={"src": (str(tmp_path), False)})) == {}


def test_a_user_network_is_qemus_own(tmp_path: Path) -> None:
    devices = qemu.Devices(Path("/c"), Path("/q"), "user", vsock_fd=3, cid=3)
    wanted = qemu.MachineSpec("v", "tcg", 256, 1, network="user", publish=[Publish.parse("127.0.0.2:8080:80")])
    words = list(qemu.command(qemu.QemuProgram("qemu", (7, 2)), Path("/i"), MANIFEST, devices, wanted))
    netdev = words[words.index("-netdev") + 1]
    assert netdev.startswith("user,") and netdev.endswith(",hostfwd=tcp:127.0.0.2:8080-:80")
    none = qemu.MachineSpec("v", "tcg", 256, 1)
    assert "-netdev" not in qemu.command(qemu.QemuProgram("qemu", (7, 2)), Path("/i"), MANIFEST, devices, none)


@pytest.mark.parametrize("text", ["80", "80:", ":80", "a:b", "80:70000", "0:80", "1.2.3.4:80", "80:80/sctp", "8:8,x=1"])
def test_port_rejects_malformed_rules(text: str) -> None:
    with pytest.raises(VMError, match=r"^--publish .*: is not \[ADDRESS:\]PORT:PORT"):
        Publish.parse(text)


def test_a_published_port_is_this_machines_alone_unless_said_otherwise(tmp_path: Path) -> None:
    assert Publish.parse("localhost:8080:80").hostfwd == "hostfwd=tcp:127.0.0.1:8080-:80"
    assert Publish.parse("8080:80").address == "127.0.0.1"
    assert Publish.parse("0.0.0.0:53:53/udp").hostfwd == "hostfwd=udp:0.0.0.0:53-:53"
    with pytest.raises(VMError, match="--publish: the VM has no network; add --network user"):
        VMConfig(tmp_path, publish=(Publish(1, 2),))


def test_time_outs_scale_with_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 1 <= slowness() <= MAX_SLOWNESS
    assert scaled(2.0) == 2 * slowness()
    slowness.cache_clear()
    try:
        monkeypatch.setattr("os.getloadavg", lambda: (64.0, 0, 0))
        monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1})
        assert slowness() == MAX_SLOWNESS
    finally:
        slowness.cache_clear()
