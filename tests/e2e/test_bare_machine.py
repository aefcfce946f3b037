"""Test the README's commands on a Debian with only Python and apt: a fresh root file system, which becomes "/".

Its network is this machine's, and so is the access to mirrors: apt's settings, pip's, and the certificates.
"""

from __future__ import annotations

import fcntl
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from caisson.image.packages.apt import host_mirror
from tests.support.checkout import clean_environment, copy_mirror_settings, copy_sources
from tests.support.unique import unique

pytestmark = [pytest.mark.root, pytest.mark.vm, pytest.mark.nightly, pytest.mark.timeout(3 * 3600)]

#: Debian's releases, with each one's Python.
SUITES = {"bookworm": "Python 3.11", "trixie": "Python 3.13"}

#: A bare machine's own mount and pid namespaces: processes left running end with them.  Its root is also the
#: namespaces' root: after chroot(2) there are no user namespaces and no pivot_root (user_namespaces(7), pivot_root(2)).
ENTER = """
set -e
mount --rbind "$0" "$0"
mount --rbind /dev "$0/dev"
mount --rbind /sys "$0/sys"
mount -t proc proc "$0/proc"
mount -t tmpfs tmpfs "$0/run"
cd "$0"
pivot_root . .
umount -l .
"$@"
exit  # a shell stays process 1 and reaps orphans
"""

#: The output that the README's first command must get from the guest.
FIRST = ("python3", "tasks.py", "exec", "--", "uname", "-s")
OWN_USER = "someone"
KEYRINGS = "usr/share/keyrings"
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


class Bare:
    """A root file system with two users, each with a checkout."""

    def __init__(self, place: Path, suite: str) -> None:
        self.root = place
        packages = "--include=mount,python3,python3-venv"
        made = ["mmdebstrap", "--quiet", "--variant=apt", packages, suite, str(place), host_mirror()]
        subprocess.run(made, check=True, env=clean_environment() | {"PATH": PATH})
        copy_mirror_settings(place)
        subprocess.run(["useradd", "--root", place, "--create-home", OWN_USER], check=True)
        for home in ("root", f"home/{OWN_USER}"):
            copy_sources(place / home / "caisson")
        subprocess.run(["chroot", place, "chown", "-R", f"{OWN_USER}:", f"/home/{OWN_USER}"], check=True)

    def start(self, *words: str, user: str = "root", **settings: str) -> subprocess.Popen[str]:
        """Start a command in the user's checkout, its stdout and stderr in one pipe."""
        home = "/root" if user == "root" else f"/home/{user}"
        environment = clean_environment() | {"HOME": home, "PATH": PATH} | settings
        environment.pop("PIP_FIND_LINKS", None)  # a directory on this machine
        as_user = [] if user == "root" else ["runuser", "--user", user, "--"]
        return subprocess.Popen(
            ["unshare", "--mount", "--pid", "--fork", "--kill-child", "sh", "-c", ENTER, str(self.root),
             "env", "-C", f"{home}/caisson", *as_user, *words],
            env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    def run(self, *words: str, user: str = "root", **settings: str) -> tuple[int, str]:
        """Run a command; return its exit status and output."""
        process = self.start(*words, user=user, **settings)
        written, _ = process.communicate()
        return process.returncode, written

    def good(self, *words: str, user: str = "root", **settings: str) -> str:
        """Return the output of a command that must succeed."""
        status, written = self.run(*words, user=user, **settings)
        assert status == 0, written[-8000:]
        return written


@pytest.fixture(scope="module", params=SUITES)
def bare(request: pytest.FixtureRequest) -> Iterator[Bare]:
    place = Path("/var/tmp") / unique("caisson-bare")  # on a disk: some gigabytes
    try:
        machine = Bare(place, request.param)
        assert SUITES[request.param] in machine.good("python3", "--version")
        yield machine
    finally:
        shutil.rmtree(place, ignore_errors=True)


def test_a_user_is_told_everything_that_is_missing_in_one_command(bare: Bare) -> None:
    for keyring in (bare.root / KEYRINGS).iterdir():
        keyring.unlink()
    status, written = bare.run(*FIRST, user=OWN_USER)
    assert status != 0
    advice = [line for line in written.splitlines() if "apt-get install" in line]
    assert len(advice) == 1, written
    assert {"qemu-system-x86", "erofs-utils", "--reinstall", "debian-archive-keyring"} <= set(advice[0].split())


def test_the_first_command_fills_an_empty_directory_of_keyrings_once_another_apt_is_done(bare: Bare) -> None:
    with (bare.root / "var/lib/dpkg/lock-frontend").open("w") as lock:
        fcntl.lockf(lock, fcntl.LOCK_EX)
        process = bare.start(*FIRST)
        assert process.stdout is not None
        written = ""
        while "waiting for it" not in written:
            line = process.stdout.readline()
            assert line, written
            written += line
    rest, _ = process.communicate()
    assert process.returncode == 0, written + rest
    assert rest.splitlines()[-1] == "Linux"
    assert (bare.root / KEYRINGS / "debian-archive-keyring.gpg").exists()


def test_the_first_command_works_as_an_ordinary_user(bare: Bare) -> None:
    assert bare.good(*FIRST, user=OWN_USER).splitlines()[-1] == "Linux"


@pytest.mark.parametrize("user", ["root", OWN_USER])
def test_the_quick_tests_pass(bare: Bare, user: str) -> None:
    last = bare.good("python3", "tasks.py", "test", "--quick", user=user).splitlines()[-1]
    assert " passed" in last and "failed" not in last


def test_all_tests_pass(bare: Bare) -> None:
    last = bare.good(".ci/run", CI="1").splitlines()[-1]
    assert " passed" in last and "failed" not in last
