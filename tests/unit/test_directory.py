"""Test the directories of VMs: names, locks, staleness and ownership."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from caisson.image.vm import find_vm, list_vms
from caisson.image.vm.directory import VMDirectory, running_vms
from caisson.image.vm.errors import VMError
from caisson.image.vm.runroot import owned_run_root, run_root


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "r"
    path.mkdir(mode=0o700)
    monkeypatch.setenv("CAISSON_RUN", str(path))
    return path


def test_vm_is_alive_while_its_lock_is_held(run: Path) -> None:
    directory = VMDirectory.of("v")
    assert not directory.is_running()
    with directory.create():
        assert directory.is_running()
        assert [other.name for other in running_vms()] == ["v"]
        with pytest.raises(VMError, match="stop-vm v"):
            VMDirectory.of("v").create()
    assert not directory.is_running()
    directory.remove()
    assert list(run.iterdir()) == []


def test_a_stale_one_makes_room(run: Path) -> None:
    directory = VMDirectory.of("v")
    directory.create().close()
    directory.agent_socket.touch()
    (directory.path / "further").mkdir()
    (directory.path / "further/down").touch()
    with directory.create():
        assert [path.name for path in directory.path.iterdir()] == ["lock"]


def test_listing_removes_nothing(run: Path, tmp_path: Path) -> None:
    """A package manager's directory has an unlocked file with this name, too; and a link may lead to one."""
    dpkg = tmp_path / "dpkg"
    dpkg.mkdir()
    for name in ("lock", "status"):
        (dpkg / name).touch()
    (run / "linked").symlink_to(dpkg)
    (run / "beside").mkdir()
    (run / "beside/lock").touch()
    (run / "beside/file").touch()
    VMDirectory.of("old").create().close()
    assert list(running_vms()) == []
    assert list_vms() == []
    assert find_vm("old") is None
    assert sorted(path.name for path in run.iterdir()) == ["beside", "linked", "old"]
    assert sorted(path.name for path in dpkg.iterdir()) == ["lock", "status"]


@pytest.mark.parametrize("name", ["linked", "beside", "marked by a link"])
def test_only_what_carries_our_mark_makes_room(run: Path, tmp_path: Path, name: str) -> None:
    name = name.replace(" ", "-")
    place = run / name
    other = tmp_path / "other"
    VMDirectory.of("mine").create().close()
    if name == "linked":
        (run / "mine").rename(other)
        place.symlink_to(other)
    else:
        place.mkdir()
        (place / "file").touch()
        (place / "lock").symlink_to(run / "mine/lock") if "link" in name else (place / "lock").touch()
    before = sorted(other.iterdir() if name == "linked" else place.iterdir())
    with pytest.raises(VMError, match="in the way, and is not a VM's directory"):
        VMDirectory.of(name).create()
    assert sorted(other.iterdir() if name == "linked" else place.iterdir()) == before


@pytest.mark.parametrize("file", ["lock", "vm.json"])
def test_files_are_for_their_owner_only(run: Path, file: str) -> None:
    directory = VMDirectory.of("v")
    with directory.create():
        directory.write({"name": "v"})
        assert (directory.path / file).stat().st_mode & 0o077 == 0
        assert directory.path.stat().st_mode & 0o777 == 0o700


as_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs another user's files")


@as_root
def test_somebody_elses_link_as_the_run_root_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """/tmp/caisson-UID is another user's link, to a directory that is ours and private."""
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o1777)
    private = tmp_path / "private"
    private.mkdir(mode=0o700)
    link = shared / "caisson"
    link.symlink_to(private)
    monkeypatch.setenv("CAISSON_RUN", str(link))
    assert owned_run_root() == private
    os.chown(link, 12345, 12345, follow_symlinks=False)
    with pytest.raises(VMError, match="another user's link; set CAISSON_RUN"):
        owned_run_root()
    with pytest.raises(VMError, match="another user's link"):
        VMDirectory.of("v")


@as_root
@pytest.mark.parametrize("part", [".", "lock"])
def test_a_marked_directory_of_somebody_elses_is_not_removed(run: Path, part: str) -> None:
    """Our mark is no secret: another user can write it to their own directory, or own the lock in one of ours."""
    directory = VMDirectory.of("v")
    directory.create().close()
    os.chown(directory.path / part, 12345, 12345)
    with pytest.raises(VMError, match="in the way, and is not a VM's directory"):
        VMDirectory.of("v").create()
    with pytest.raises(VMError, match="in the way, and is not a VM's directory"):
        directory.remove()
    assert (directory.path / "lock").exists()


@as_root
@pytest.mark.parametrize(
    ("what", "owner", "mode", "why"),
    [
        (".", (12345, 0), 0o700, "belongs to another user"),
        ("..", (12345, 0), 0o755, "others can replace files in"),
        ("..", (0, 12345), 0o775, "others can replace files in"),
        ("..", (12345, 12345), 0o1777, "others can replace files in"),
    ],
)
def test_a_run_root_of_somebody_elses_is_refused(
    run: Path, what: str, owner: tuple[int, int], mode: int, why: str
) -> None:
    place = run if what == "." else run.parent
    place.chmod(mode)
    os.chown(place, *owner)
    with pytest.raises(VMError, match=why):
        owned_run_root()


def test_a_run_root_that_others_can_exchange_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shared = tmp_path / "shared"
    (shared / "r").mkdir(parents=True, mode=0o700)
    monkeypatch.setenv("CAISSON_RUN", str(shared / "r"))
    shared.chmod(0o777)
    with pytest.raises(VMError, match=r"others can replace files in .*shared; set CAISSON_RUN"):
        owned_run_root()
    shared.chmod(0o1777)
    assert owned_run_root() == shared / "r"


@as_root
def test_another_users_runtime_directory_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CAISSON_RUN", raising=False)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    assert run_root() == tmp_path / "caisson"
    os.chown(tmp_path, 12345, 12345)
    assert run_root() == Path("/run/caisson")


def test_somebody_elses_files_are_not_touched(run: Path) -> None:
    (run / "documents").mkdir()
    (run / "documents/thesis").touch()
    (run / "file").touch()
    for name in ("documents", "file"):
        with pytest.raises(VMError, match="in the way"):
            VMDirectory.of(name).create()
    assert (run / "documents/thesis").exists()


def test_removal_does_not_follow_links(run: Path, tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "file").touch()
    directory = VMDirectory.of("v")
    directory.create().close()
    (directory.path / "link").symlink_to(kept)
    directory.remove()
    assert (kept / "file").exists()


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "-x", "a b", "a\n", ".hidden"])
def test_names_that_cannot_be_directories(name: str) -> None:
    with pytest.raises(VMError, match="is not a name; give letters"):
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


def test_a_link_in_the_way_of_a_document_is_not_followed(run: Path, tmp_path: Path) -> None:
    directory = VMDirectory.of("v")
    with directory.create():
        (tmp_path / "file").write_text("of the host")
        (directory.path / "vm.new").symlink_to(tmp_path / "file")
        with pytest.raises(OSError, match="symbolic links"):
            directory.write({"name": "v"})
    assert (tmp_path / "file").read_text() == "of the host"


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
