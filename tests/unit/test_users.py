"""Test looking up user names in an image."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from caisson.agent.libcontainer.config.process import Process, User
from caisson.agent.libcontainer.config.reader import SpecError
from caisson.agent.libcontainer.plan.user_files import FILE_MAX, UserFiles
from caisson.agent.libcontainer.plan.users import look_up, look_up_at_once, needs_files, resolve
from tests.support.descriptors import watch_opens

PASSWD = """root:x:0:0:root:/root:/bin/sh
app:x:1000:100:An app:/srv/app:/bin/sh
1000abc:x:0:0::/:/bin/sh
4294967296:x:0:0::/:/bin/sh
short:x:5
wrong:x:-1:0::/:/bin/sh
"""
GROUP = "root:x:0:\nusers:x:100:\naudio:x:29:app,root\nvideo:x:44:other,app\n7:x:0:app\nbroken\n"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/passwd").write_text(PASSWD)
    (tmp_path / "etc/group").write_text(GROUP)
    return tmp_path


def who(root: Path, username: str, **fields: object) -> Process:
    user = User(uid=5, gid=6, username=username)
    with UserFiles(str(root)) as files:
        return resolve(Process(args=("x",), user=user, **fields), files)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "username, uid, gid, groups",
    [
        ("app", 1000, 100, (29, 44, 0)),
        ("root", 0, 0, (29,)),
        ("1000", 1000, 100, (29, 44, 0)),  # an entry with this number
        ("77", 77, 0, ()),
        ("4294967294", 4294967294, 0, ()),
        ("app:audio", 1000, 29, ()),
        ("app:77", 1000, 77, ()),
        ("77:users", 77, 100, ()),
        ("app:", 1000, 100, (29, 44, 0)),
        ("1000:", 1000, 100, (29, 44, 0)),
        (":audio", 0, 29, ()),
        (":5", 0, 5, ()),
        ("77:7", 77, 7, ()),  # a number, whatever any group is called
    ],
)
def test_username_is_resolved(root: Path, username: str, uid: int, gid: int, groups: tuple[int, ...]) -> None:
    found = who(root, username).user
    assert (found.uid, found.gid, found.additional_gids, found.username) == (uid, gid, groups, "")


@pytest.mark.parametrize(
    "username",
    [
        "+0", "0x3e8", "1000abc", "4294967295", "4294967296", "-1", ":", "wrong", "short",
        "nobody", "app:nogroup", "app:-1", "app:broken", " 0", "0 ", "٣", "app:4294967295", "a/b", "app:x:y",
    ],
)  # fmt: skip
def test_username_rejects_unknown_names(root: Path, username: str) -> None:
    with pytest.raises(SpecError, match=r"process\.user\.username"):
        who(root, username)


def test_texts_as_of_runc(root: Path) -> None:
    with pytest.raises(SpecError, match="unable to find user nobody: no matching entries in passwd file"):
        who(root, "nobody")
    with pytest.raises(SpecError, match="unable to find group nogroup: no matching entries in group file"):
        who(root, "app:nogroup")


def test_home(root: Path) -> None:
    assert who(root, "app").env == ("HOME=/srv/app",)
    assert who(root, "app", env=("HOME=/x",)).env == ("HOME=/x",)
    assert who(root, "77").env == ()


@pytest.mark.parametrize("env", [(), ("HOME=",), ("A=1", "HOME=")])
def test_home_is_that_of_the_uid_also_when_it_is_empty(root: Path, env: tuple[str, ...]) -> None:
    process = Process(args=("x",), env=env, user=User(uid=1000))
    assert needs_files(process)
    assert look_up(process, str(root)).env[-1] == "HOME=/srv/app"
    assert look_up(process.but(user=User(uid=4)), str(root)).env[-1] == "HOME=/"
    assert not needs_files(process.but(env=("HOME=/x",)))


@pytest.mark.parametrize("file", ["passwd", "group"])
def test_a_directory_in_the_place_of_a_file_is_an_error_in_words_and_costs_no_descriptor(root: Path, file: str) -> None:
    (root / "etc" / file).unlink()
    (root / "etc" / file).mkdir()
    before = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(SpecError, match=f"the container's /etc/{file} is a directory"):
        who(root, "app")
    home = look_up(Process(args=("x",), user=User(uid=1000)), str(root)).env
    assert home == ("HOME=/",) if file == "passwd" else ("HOME=/srv/app",)
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_more_groups_stay(root: Path) -> None:
    process = Process(args=("x",), user=User(additional_gids=(3, 29), username="app"))
    assert look_up(process, str(root)).user.additional_gids == (3, 29, 44, 0)


def test_files_are_the_images_own(root: Path, tmp_path_factory: pytest.TempPathFactory) -> None:  # CVE-2025-24965
    outside = tmp_path_factory.mktemp("outside") / "passwd"
    outside.write_text("app:x:0:0::/:/bin/sh\n")
    passwd = root / "etc/passwd"
    passwd.unlink()
    for target in (outside, f"../../../../../../..{outside}"):
        passwd.symlink_to(target)
        with pytest.raises(SpecError, match="unable to find user app"):
            who(root, "app")
        passwd.unlink()
    passwd.symlink_to("/etc/other")  # inside
    (root / "etc/other").write_text(PASSWD)
    assert who(root, "app").user.uid == 1000


def test_user_lookup_ignores_special_files(root: Path) -> None:
    for path in (root / "etc/passwd", root / "etc/group"):
        path.unlink()
        os.mkfifo(path)  # opening one could block forever
    assert who(root, "77").user.uid == 77
    with pytest.raises(SpecError, match="unable to find user"):
        who(root, "app")


def test_user_lookup_opens_only_regular_files(root: Path) -> None:
    """Opening a device can start it: a watchdog of the host, for example."""
    passwd, process = root / "etc/passwd", Process(args=("x",))
    for special in (False, True):
        with watch_opens(passwd) as was_opened:
            look_up(process, str(root))
            assert was_opened() != special
            assert look_up_at_once(process, str(root), str(root)) is not None
            assert was_opened() != special
        passwd.unlink()
        os.mkfifo(passwd)


def test_numbers_without_end_are_no_ids(root: Path) -> None:
    """Python's int() rejects thousands of digits with a different exception."""
    digits = "9" * 5000
    (root / "etc/passwd").write_text(f"long:x:{digits}:0::/:\napp:x:1000:{digits}::/srv/app:\n")
    assert who(root, "77").user.uid == 77
    for name in ("long", "app", digits):
        with pytest.raises(SpecError, match=r"is not an id: 0 to 4294967294$"):
            who(root, name)


def test_a_home_that_is_empty_is_the_root(root: Path) -> None:
    (root / "etc/passwd").write_text("app:x:1000:100:::\n")
    assert look_up(Process(args=("x",), user=User(uid=1000)), str(root)).env == ("HOME=/",)


def test_a_home_with_a_nul_is_none(root: Path) -> None:
    """It would end the variable, and start another."""
    (root / "etc/passwd").write_bytes(b"app:x:1000:100::/srv\0LD_PRELOAD=/evil.so:\n")
    process = Process(args=("x",), user=User(uid=1000))
    assert look_up(process, str(root)).env == ("HOME=/",)


def test_a_file_without_end(root: Path) -> None:
    (root / "etc/passwd").write_bytes(b"x" * (FILE_MAX + 1))
    with pytest.raises(SpecError, match="larger than"):
        who(root, "app")


def test_files_of_the_roots_own_file_system_are_read_at_once(root: Path) -> None:
    process = Process(args=("x",), user=User(username="app"))
    look_up(process, str(root))  # from here on the kernel caches the path
    found = look_up_at_once(process, str(root), str(root))
    assert found is not None and found == look_up(process, str(root))
    (root / "etc/group").unlink()
    assert look_up_at_once(process, str(root), str(root)) == look_up(process, str(root))


def test_files_of_another_file_system_are_not_read_at_once(root: Path) -> None:
    process = Process(args=("x",))
    look_up(process, str(root))
    assert look_up_at_once(process, str(root), "/proc") is None
    assert look_up_at_once(process, str(root / "nowhere"), str(root)) is None
    (root / "etc/passwd").unlink()
    assert look_up_at_once(process, str(root), "/proc") == look_up(process, str(root))  # nothing to read
