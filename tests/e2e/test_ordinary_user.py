"""Test that everything a user does works without root: setting up, building an image, booting it, running a program."""

from __future__ import annotations

import json
import os
import pwd
import secrets
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from caisson.image.build.cache import default_root
from tests.support.checkout import clean_environment, copy_sources
from tests.support.poll import wait_until

pytestmark = [pytest.mark.root, pytest.mark.vm, pytest.mark.timeout(1200)]

#: Seconds to set up a virtual environment, build an image and boot a guest on a busy machine.
TIMEOUT = 600


def unused_uid() -> int:
    """Return a user id that nobody on this machine has."""
    while True:
        uid = 60_000 + secrets.randbelow(4_000)
        try:
            pwd.getpwuid(uid)
        except KeyError:
            return uid


@dataclass
class User:
    """A user with a home directory, a checkout of this project and a package cache."""

    uid: int
    place: Path

    @property
    def home(self) -> Path:
        return self.place / "home"

    def caisson(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run a command of the checkout as this user, without root's groups and capabilities."""
        identity = f"--reuid={self.uid}", f"--regid={self.uid}", "--clear-groups"
        environment = clean_environment() | {
            "HOME": str(self.home), "PATH": "/usr/local/bin:/usr/bin:/bin", "CAISSON_RUN": str(self.place / "run"),
        }  # fmt: skip
        environment.pop("CAISSON_CACHE", None)
        return subprocess.run(
            ["setpriv", *identity, "python3", self.home / "caisson/tasks.py", *words],
            env=environment, cwd=self.home, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=TIMEOUT,
        )  # fmt: skip

    def processes(self) -> list[str]:
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            try:
                if process.stat().st_uid == self.uid:
                    found.append((process / "comm").read_text().strip())
            except OSError:  # it has exited
                continue
        return found


@pytest.fixture(scope="module")
def user() -> Iterator[User]:
    place = Path(tempfile.mkdtemp(prefix="caisson-user-", dir="/tmp"))  # short, for socket paths
    place.chmod(0o755)
    user = User(unused_uid(), place)
    copy_sources(user.home / "caisson")
    if (packages := default_root() / "apt").is_dir():  # reuse existing downloads
        shutil.copytree(packages, user.home / ".cache/caisson/apt", symlinks=True)
    for directory, _, files in os.walk(place):
        for path in (directory, *(f"{directory}/{name}" for name in files)):
            if path != str(place):
                os.chown(path, user.uid, user.uid, follow_symlinks=False)
    (place / "run").mkdir()
    os.chown(place / "run", user.uid, user.uid)
    yield user
    shutil.rmtree(place)


def test_an_ordinary_user_builds_an_image_and_runs_a_program_in_it(user: User) -> None:
    built = user.caisson("build-image")
    assert built.returncode == 0, built.stderr
    image = Path(built.stdout.strip())
    assert image.is_relative_to(user.home / ".cache/caisson/images")
    assert {path.stat().st_uid for path in image.rglob("*")} == {user.uid}
    try:
        ran = user.caisson("exec", "--", "id")
        assert (ran.returncode, ran.stdout[:13]) == (0, "uid=0(root) g"), ran.stderr
    finally:
        stopped = user.caisson("stop-vm", "--all")
    assert stopped.returncode == 0, stopped.stderr
    wait_until(lambda: not user.processes(), "no process of the user's is left", found=user.processes)
    assert list((user.place / "run").iterdir()) == []


def test_doctor_tells_an_ordinary_user_what_to_do(user: User) -> None:
    done = user.caisson("doctor", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    findings = {one["name"]: one for one in json.loads(done.stdout)}
    assert findings["caisson"]["found"].endswith(f"({user.home}/caisson/.venv/bin/python)")
    assert findings["cache"]["found"].endswith(f"{user.home}/.cache/caisson")
    kvm = findings["KVM"]
    if "Permission denied" in kvm["found"]:
        assert (
            kvm["status"] == "limited"
            and "/dev/kvm" in kvm["remedy"]
            and kvm["remedy"].split(": ")[1].startswith("sudo")
        )
