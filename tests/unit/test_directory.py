"""The directories of VMs: names, locks, what is stale, and whom they belong to."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from caisson.image.vm.directory import VMDirectory, owned_run_root, running_vms
from caisson.image.vm.errors import VMError


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "r"
    path.mkdir(mode=0o700)
    monkeypatch.setenv("CAISSON_RUN", str(path))
    return path


def test_who_holds_the_lock_lives(run: Path) -> None:
    directory = VMDirectory.of("v")
    assert not directory.alive()
    with directory.create():
        assert directory.alive()
        assert [other.name for other in running_vms()] == ["v"]
        assert not directory.remove_stale()
        with pytest.raises(VMError, match="stop-vm v"):
            VMDirectory.of("v").create()
    assert not directory.alive()
    assert directory.remove_stale()
    assert list(run.iterdir()) == []


def test_a_stale_one_makes_room(run: Path) -> None:
    directory = VMDirectory.of("v")
    directory.create().close()
    directory.agent_socket.touch()
    (directory.path / "further").mkdir()
    (directory.path / "further/down").touch()
    with directory.create():
        assert [path.name for path in directory.path.iterdir()] == ["lock"]


def test_stale_ones_go_when_somebody_looks(run: Path) -> None:
    VMDirectory.of("old").create().close()
    (run / "else").mkdir()  # nothing says that it was a VM
    (run / "file").touch()
    assert list(running_vms()) == []
    assert sorted(path.name for path in run.iterdir()) == ["else", "file"]


def test_somebody_elses_files_are_not_touched(run: Path) -> None:
    (run / "documents").mkdir()
    (run / "documents/thesis").touch()
    (run / "file").touch()
    for name in ("documents", "file"):
        with pytest.raises(VMError, match="in the way"):
            VMDirectory.of(name).create()
    assert (run / "documents/thesis").exists()


def test_what_a_link_leads_to_stays(run: Path, tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "file").touch()
    directory = VMDirectory.of("v")
    directory.create().close()
    (directory.path / "link").symlink_to(kept)
    assert directory.remove_stale()
    assert (kept / "file").exists()


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "-x", "a b", "a\n", ".hidden"])
def test_names_that_cannot_be_directories(name: str) -> None:
    with pytest.raises(VMError, match="name is made of"):
        VMDirectory.of(name)


def test_a_name_too_long_for_a_socket() -> None:
    with pytest.raises(VMError, match="too long"):
        VMDirectory.of("x" * 100)


def test_a_place_where_others_write_is_refused(run: Path) -> None:
    run.chmod(0o777)
    with pytest.raises(VMError, match="chmod go-w"):
        owned_run_root()
    with pytest.raises(VMError, match="chmod go-w"):
        list(running_vms())


def test_a_place_that_is_no_directory_is_refused(run: Path) -> None:
    run.rmdir()
    assert owned_run_root() is None
    assert list(running_vms()) == []
    run.touch()
    with pytest.raises(VMError, match="not a directory"):
        owned_run_root()
    with pytest.raises(VMError, match="CAISSON_RUN"):
        owned_run_root(make=True)


def test_documents_are_replaced_whole(run: Path) -> None:
    directory = VMDirectory.of("v")
    assert directory.read() == {}
    with directory.create():
        directory.write({"name": "v", "state": "starting"})
        directory.write({"name": "v"})
        assert directory.read() == {"name": "v"}
        assert json.loads((directory.path / "vm.json").read_text()) == {"name": "v"}
        assert sorted(path.name for path in directory.path.iterdir()) == ["lock", "vm.json"]


def test_a_tail_has_no_control_characters(run: Path) -> None:
    directory = VMDirectory.of("v")
    assert directory.console_tail() == ""
    assert directory.console_silence() == "the guest printed nothing"
    with directory.create():
        lines = [f"line {number}" for number in range(5000)]
        directory.console.write_bytes("\r\n".join(lines).encode() + b"\n\x1b[31mred\x07\x1bc\x9b\xff\n\n \n")
        tail = directory.console_tail(3).splitlines()
        assert tail[:2] == ["line 4998", "line 4999"]
        assert tail[2].startswith("red")
        assert tail[2].isprintable()
        assert "last printed something 0 s ago" in directory.console_silence()
