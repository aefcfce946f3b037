"""Test root file systems as disk images: each format's own tools can read them, and builds are reproducible."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import re
import shutil
import stat
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from uuid import UUID

import pytest

from caisson.image.build.tools import HOST, Tools
from caisson.image.errors import ImageError
from caisson.image.formats import disk, ext4
from caisson.image.formats.initrd import CONSOLE
from caisson.image.formats.tree import Node, Tree
from caisson.image.run import CommandFailed, MissingProgram

NOBODY = 65534
DIRECTORY, FILE, LINK = stat.S_IFDIR, stat.S_IFREG, stat.S_IFLNK
FORMATS = sorted(disk.WRITERS)


def noise(size: int, seed: str = "") -> bytes:
    return hashlib.shake_256(seed.encode()).digest(size)


Member = tuple[str, Node]


def entry(path: str, mode: int, data: bytes = b"") -> Member:
    return path, Node.of(mode, data)


def tree_of(members: list[Member]) -> Tree:
    tree = Tree()
    for path, node in members:
        tree.put(os.fsencode(path), node)
    return tree


def write(target: Path, members: list[Member], format: str, tools: Tools = HOST) -> None:
    with tree_of(members) as tree:
        disk.write_filesystem(target, tree, format, tools)


#: A small guest: every file type, modes that a umask would change, and more names than fit in a block.
MEMBERS = [
    *CONSOLE.items(),
    entry("bin", LINK | 0o777, b"usr/bin"),
    entry("dev", DIRECTORY | 0o755),
    entry("etc", DIRECTORY | 0o755),
    entry("etc/empty", FILE | 0o644),
    entry("etc/secret", FILE | 0o600, b"secret\n"),
    entry("etc/a name with spaces, größe", FILE | 0o644, b"x" * 4096),
    entry("etc/just more than a block", FILE | 0o644, noise(4097)),
    entry("tmp", DIRECTORY | 0o1777),
    entry("usr", DIRECTORY | 0o755),
    entry("usr/bin", DIRECTORY | 0o755),
    entry("usr/bin/program", FILE | 0o755, noise(300_000) + bytes(300_000)),
    entry("usr/lib", DIRECTORY | 0o755),
    *(entry(f"usr/lib/{'module' * 10}-{number:03}.pyc", FILE | 0o644, b"%d" % number) for number in range(150)),
    entry("usr/short", LINK | 0o777, b"s" * 59),
    entry("usr/sixty", LINK | 0o777, b"m" * 60),
    entry("usr/long", LINK | 0o777, b"/l" * 500),
    entry("usr/share/made/on/the/way", FILE | 0o644, b"deep"),
]
MADE = ["usr/share", "usr/share/made", "usr/share/made/on", "usr/share/made/on/the"]


def tool(*words: str | Path) -> str:
    done = subprocess.run(words, check=True, capture_output=True, text=True)
    return done.stdout + done.stderr


def unpack(image: Path, format: str, target: Path) -> None:
    """Unpack with the format's own tools, which also check it."""
    if format == "ext4":
        tool("e2fsck", "-f", "-n", image)
        target.mkdir()
        tool("debugfs", "-R", f"rdump / {target}", image)
        (target / "lost+found").rmdir()
        for mode, name in re.findall(
            r"^/\d+/04(\d+)/0/0/(\w+)/", tool("debugfs", "-R", "ls -p /", image), re.MULTILINE
        ):
            (target / name).chmod(int(mode, 8))  # rdump drops the sticky bit
    elif format == "squashfs":
        tool("unsquashfs", "-no-xattrs", "-d", target, image)
    else:
        tool("fsck.erofs", f"--extract={target}", "--preserve-perms", image)


def owner_and_time(image: Path, format: str, path: str) -> tuple[int, int, bool]:
    """Return user, group, and whether the time is that of 1970."""
    if format == "ext4":
        said = tool("debugfs", "-R", f"stat /{path}", image)
        found = re.search(r"User:\s+(\d+)\s+Group:\s+(\d+)", said)
        times = re.findall(r"(?:c|a|m|cr)time: (0x[0-9a-f]{8}:[0-9a-f]{8}) ", said)
        recent = times != ["0x00000000:00000000"] * 4
    elif format == "squashfs":
        said = tool("unsquashfs", "-lln", "-UTC", image, path)
        found = re.search(rf" (\d+)/(\d+) .*/{path}( ->|$)", said, re.MULTILINE)
        recent = " 1970-01-01 00:00 " not in said.splitlines()[-1]
    else:
        said = tool("dump.erofs", f"--path=/{path}", image)
        found = re.search(r"Uid:\s+(\d+)\s+Gid:\s+(\d+)", said)
        recent = "1970-01-01 00:00:00" not in said
    assert found is not None, said
    return int(found[1]), int(found[2]), not recent


def members(tree: Path) -> dict[str, tuple[int, bytes]]:
    found = {}
    for path in tree.rglob("*"):
        mode = path.lstat().st_mode
        data = os.fsencode(path.readlink()) if path.is_symlink() else path.read_bytes() if path.is_file() else b""
        found[str(path.relative_to(tree))] = (mode, data)
    return found


@pytest.mark.parametrize("format", FORMATS)
def test_every_member_is_there_and_nothing_else(tmp_path: Path, format: str) -> None:
    image, tree = tmp_path / "image", tmp_path / "tree"
    write(image, MEMBERS, format)
    unpack(image, format, tree)
    wanted = {path: (node.mode, node.read()) for path, node in MEMBERS if path not in CONSOLE}
    wanted |= {path: (DIRECTORY | 0o755, b"") for path in MADE}
    assert members(tree) == wanted
    assert stat.S_IMODE(tree.stat().st_mode) == 0o755
    assert list(tmp_path.glob(".*")) == []


@pytest.mark.parametrize("format", FORMATS)
def test_all_of_it_is_roots_and_from_1970(tmp_path: Path, format: str) -> None:
    image = tmp_path / "image"
    write(image, MEMBERS, format)
    for path in ("usr/bin", "usr/bin/program", "tmp", "usr/long", "usr/share/made"):
        assert owner_and_time(image, format, path) == (0, 0, True)


@pytest.mark.parametrize("format", FORMATS)
def test_an_image_is_whole_blocks_and_no_more_than_it_needs(tmp_path: Path, format: str) -> None:
    image = tmp_path / "image"
    write(image, MEMBERS, format)
    size = image.stat().st_size
    assert size % 4096 == 0
    blocks = sum(-(-node.length // 4096) for _, node in MEMBERS)
    # One block per 16 inodes, some for directories, and the file system's own metadata.
    assert size <= (blocks + len(MEMBERS) // 16 + 24) * 4096


@pytest.mark.parametrize("format", FORMATS)
def test_an_image_replaces_what_was_there(tmp_path: Path, format: str) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    write(first, MEMBERS, format)
    second.write_bytes(noise(1 << 21))
    write(second, MEMBERS, format)
    assert first.read_bytes() == second.read_bytes()


def test_the_uuid_follows_from_the_members(tmp_path: Path) -> None:
    def uuid(name: str, format: str, entries: list[Member]) -> str:
        write(tmp_path / name, entries, format)
        return tool("blkid", "-o", "value", "-s", "UUID", tmp_path / name)

    same = [uuid(name, "ext4", MEMBERS[:4]) for name in ("a", "b")]
    assert same[0] == same[1] and re.fullmatch(r"[0-9a-f-]{36}", same[0].strip())
    others = [uuid("c", "ext4", MEMBERS[:3]), uuid("d", "erofs", MEMBERS[:4]), uuid("e", "erofs-lz4hc", MEMBERS[:4])]
    assert len({same[0], *others}) == 4


# The same bytes, whoever builds it.

Change = Callable[[Path], Path]


def as_another_user(place: Path) -> Path:
    os.setgroups([])
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)
    return place


def with_another_umask(place: Path) -> Path:
    os.umask(0o077)
    return place


def elsewhere_on_earth(place: Path) -> Path:
    os.environ["TZ"] = "Pacific/Kiritimati"
    time.tzset()
    return place


def with_another_temporary_directory(place: Path) -> Path:
    (place / "temporary").mkdir()
    os.environ["TMPDIR"] = str(place / "temporary")
    return place


def at_another_path(place: Path) -> Path:
    other = place / ("another path" * 10)
    other.mkdir()
    other.chmod(0o2777)  # new files inherit its group
    return other


def in_memory(place: Path) -> Path:
    """Copy to another file system, which lists files in a different order."""
    return Path(tempfile.mkdtemp(dir="/dev/shm"))


def in_another_year(place: Path) -> Path:
    """Give the tools a different date: they do not see this process's own environment."""
    (place / "bin").mkdir()
    for name in ("mkfs.erofs", "mksquashfs"):
        wrapper = place / "bin" / name
        wrapper.write_text(f"#!/bin/sh\nexec faketime '2031-05-06 07:08:09' {shutil.which(name)} \"$@\"\n")
        wrapper.chmod(0o755)
    os.environ["PATH"] = f"{place / 'bin'}:{os.environ['PATH']}"
    assert b"2031" in subprocess.run(["faketime", "2031-05-06", "date"], check=True, capture_output=True).stdout
    return place


@pytest.fixture
def public_directory() -> Iterator[Path]:
    """Create a directory accessible to other users, too."""
    place = Path(tempfile.mkdtemp())
    place.chmod(0o777)
    yield place
    shutil.rmtree(place)


def _digest(change: Change, place: Path, format: str, answer: Path) -> None:
    answer.touch(0o666)
    with answer.open("w") as stream:  # before switching the user
        target = change(place) / "image"
        write(target, MEMBERS, format)
        stream.write(hashlib.sha256(target.read_bytes()).hexdigest())
        target.unlink()
        if target.parent.parent == Path("/dev/shm"):
            target.parent.rmdir()


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(
    "change",
    [
        pytest.param(as_another_user, marks=pytest.mark.root),
        with_another_umask,
        elsewhere_on_earth,
        with_another_temporary_directory,
        at_another_path,
        in_memory,
        in_another_year,
    ],
)
def test_the_bytes_depend_on_the_members_alone(
    tmp_path: Path, public_directory: Path, change: Change, format: str
) -> None:
    image, answer = tmp_path / "image", tmp_path / "answer"
    write(image, MEMBERS, format)
    child = multiprocessing.get_context("fork").Process(target=_digest, args=(change, public_directory, format, answer))
    child.start()
    child.join()
    assert child.exitcode == 0
    assert answer.read_text() == hashlib.sha256(image.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Provide the tools and their libraries, as if their packages had been unpacked there."""
    tree = tmp_path_factory.mktemp("snapshot")
    libraries = tree / "usr/lib/some-triplet"
    libraries.mkdir(parents=True)
    (tree / "usr/bin").mkdir()
    for name in ("mkfs.erofs", "mksquashfs"):
        program = shutil.which(name)
        assert program is not None
        shutil.copy(program, tree / "usr/bin")
        for library in re.findall(r"(/\S+) \(0x", tool("ldd", program)):
            shutil.copy(library, libraries)
    return tree


@pytest.mark.parametrize("format", FORMATS)
def test_tools_of_a_snapshot_need_nothing_of_the_host(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, snapshot: Path, format: str
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    write(first, MEMBERS, format)
    monkeypatch.setenv("PATH", str(tmp_path))
    write(second, MEMBERS, format, Tools(snapshot))
    assert first.read_bytes() == second.read_bytes()


def test_a_snapshot_runs_its_own_programs_with_its_own_libraries(snapshot: Path) -> None:
    loader, option, libraries, program = Tools(snapshot).command("mkfs.erofs")
    assert Path(loader).parent == snapshot / "usr/lib/some-triplet"
    assert (option, program) == ("--library-path", str(snapshot / "usr/bin/mkfs.erofs"))
    assert str(snapshot / "usr/lib/some-triplet") in libraries.split(":")
    maps = subprocess.run([loader, option, libraries, "--list", program], capture_output=True, text=True, check=True)
    assert str(snapshot) in maps.stdout and " => /lib/" not in maps.stdout and " => /usr/lib/" not in maps.stdout


def test_what_a_snapshot_lacks_is_named(tmp_path: Path, snapshot: Path) -> None:
    with pytest.raises(ImageError, match=r"mkfs\.xfs is not among the tools"):
        Tools(snapshot).command("mkfs.xfs")
    with pytest.raises(ImageError, match="a program loader is not among the tools"):
        Tools(tmp_path).command("mkfs.erofs")


# Invalid input.


@pytest.mark.parametrize("format", FORMATS)
def test_members_of_other_kinds_are_refused(tmp_path: Path, format: str) -> None:
    with pytest.raises(ImageError, match="/etc/fifo: is not a file, directory or link"):
        write(tmp_path / "image", [*MEMBERS, entry("etc/fifo", stat.S_IFIFO | 0o644)], format)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("format", "package"), [("erofs", "erofs-utils"), ("squashfs", "squashfs-tools")])
def test_a_missing_tool_is_named_with_its_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: str, package: str
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MissingProgram, match=f"apt-get install {package}"):
        write(tmp_path / "image", MEMBERS, format)
    assert list(tmp_path.iterdir()) == []


def test_errors_of_tools_are_passed_on(tmp_path: Path) -> None:
    with pytest.raises(CommandFailed, match="nonsense"):
        disk._write_erofs(tmp_path / "image", tree_of(MEMBERS), UUID(int=0), HOST, options=["-znonsense"])
    assert list(tmp_path.glob(".*")) == []


# ext4, of which we write every byte.


def test_an_ext4_of_several_groups_is_sound(tmp_path: Path) -> None:
    image = tmp_path / "image"
    large = [entry("large", FILE | 0o644, bytes(129 << 20)), entry("z", FILE | 0o644, b"behind it")]
    write(image, [*MEMBERS, *large], "ext4")
    said = tool("e2fsck", "-f", "-n", image)
    assert re.search(r"(\d+)/\1 blocks", said)  # no free blocks
    assert tool("debugfs", "-R", "cat /z", image).startswith("behind it")
    assert "Group 1" in tool("dumpe2fs", image)


def test_e2fsck_would_notice_a_wrong_ext4(tmp_path: Path) -> None:
    image = tmp_path / "image"
    write(image, MEMBERS, "ext4")
    with image.open("r+b") as stream:
        stream.seek(2 * 4096)
        stream.write(bytes(8))  # the block bitmap
    assert subprocess.run(["e2fsck", "-f", "-n", image], capture_output=True).returncode != 0


def test_a_file_of_more_than_512_mib_is_refused_by_ext4(tmp_path: Path) -> None:
    huge = Node(FILE | 0o644, size=(512 << 20) + 1)
    with pytest.raises(ImageError, match="huge: is larger than 512 MiB"):
        ext4.write_ext4(tmp_path / "image", [(b"huge", huge)], UUID(int=1))
    with pytest.raises(ImageError, match=r"lost\+found"):
        ext4.write_ext4(tmp_path / "image", [(b"lost+found", Node.of(DIRECTORY | 0o755))], UUID(int=1))
    assert list(tmp_path.iterdir()) == []
