"""Test kernel modules that are loaded on demand."""

from __future__ import annotations

from pathlib import Path

import pytest

from caisson.agent.base import syscalls
from caisson.agent.base.errors import DeviceTimeout, ModelError
from caisson.agent.base.log import Log
from caisson.agent.guest import modules
from caisson.agent.guest.blockdevices import BlockDevices
from caisson.agent.guest.storage import Storage, Storages


@pytest.fixture
def loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Return what was passed to the kernel: file and parameters."""
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.ko").write_text(name)
    (tmp_path / "list").write_text(
        f"b_mod {tmp_path}/a.ko {tmp_path}/b.ko\nc {tmp_path}/c.ko\nbroken {tmp_path}/no.ko\n"
    )
    (tmp_path / "sys/there").mkdir(parents=True)
    monkeypatch.setattr(modules, "LISTED", str(tmp_path / "list"))
    monkeypatch.setattr(modules, "LOADED", str(tmp_path / "sys"))
    given: list[tuple[str, str]] = []

    def finit_module(fd: int, parameters: str = "") -> None:
        name = Path(f"/proc/self/fd/{fd}").readlink().stem
        if any(one == name for one, _ in given):
            raise FileExistsError(17, "exists")
        given.append((name, parameters))

    monkeypatch.setattr(syscalls, "finit_module", finit_module)
    return given


def test_with_what_it_needs_first(loaded: list[tuple[str, str]]) -> None:
    modules.load("b-mod", ("debug=1", "x=2"))
    modules.load("b_mod")
    assert loaded == [("a", ""), ("b", "debug=1 x=2")]


def test_missing_modules_are_skipped(loaded: list[tuple[str, str]]) -> None:
    modules.load_available(("no_such", "c"))
    assert loaded == [("c", "")]


async def test_the_file_systems_of_all_layers_are_loaded(loaded: list[tuple[str, str]], tmp_path: Path) -> None:
    layers = [Storage("erofs.multi-layer", "01", fstype, "/root", (mark,)) for fstype, mark in (
        ("ext4", "X-kata.overlay-upper"), ("c", "X-kata.overlay-lower")
    )]  # fmt: skip
    storages = Storages(BlockDevices(0, sys=str(tmp_path), dev=str(tmp_path)), Log("error"))
    with pytest.raises(DeviceTimeout):
        await storages.mount(layers)
    assert loaded == [("c", "")]


@pytest.mark.parametrize(
    "name, text",
    [
        ("", "Kernel module name is empty"),
        ("no", "kernel module no: it is not in the image"),
        ("../x", "not a valid module name"),
        ("broken", "kernel module broken: .*no such file"),
    ],
)
def test_load_reports_why_a_module_cannot_be_loaded(loaded: list[tuple[str, str]], name: str, text: str) -> None:
    with pytest.raises(ModelError, match=text):
        modules.load(name)
    modules.load("there")  # it is already loaded
    assert loaded == []
