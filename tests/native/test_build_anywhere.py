"""Test that anyone, anywhere and at any time, builds the same image; and that interrupted builds do no harm later."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from caisson import image
from caisson.image.build.cache import default_root
from tests.support.checkout import copy_sources

#: This checkout under its import name.
OURS = Path(image.__file__).parents[1]
NOBODY = 65534
SUITE = "trixie"

pytestmark = [pytest.mark.root, pytest.mark.timeout(900)]


def seed(cache: Path) -> None:
    """Provide downloaded packages, without the kernel source."""
    for debs in default_root().glob(f"apt/{SUITE}-a*/debs"):
        target = cache / "apt" / debs.parent.name / "debs"
        target.mkdir(parents=True)
        for deb in debs.glob("*.deb"):
            if not deb.name.startswith("linux-source"):
                shutil.copy(deb, target)


def builder(root: Path, python: str = sys.executable, arch: str | None = None) -> list[str]:
    """Return the command that builds the default image, with the sources in a directory called `caisson`."""
    path = f"sys.path.insert(0, {str(root.parent)!r})"
    build = f"image.build_image(arch={arch!r}).directory"
    return [python, "-c", f"import sys; {path}; from caisson import image; print({build})"]


def public_python(place: Path) -> Path | str:
    """Provide an interpreter with our libraries that an ordinary user may run: ours may be below /root."""
    # setpriv itself has root's privileges until it has executed another program.
    drop = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
    script = '"$0" -c "import jinja2"'
    if subprocess.run([*drop, "sh", "-c", script, sys.executable], capture_output=True).returncode == 0:
        return sys.executable
    subprocess.run(["/usr/bin/python3", "-m", "venv", "--without-pip", place / "python"], check=True)
    [libraries] = (place / "python/lib").glob("python*/site-packages")
    shutil.copytree(sysconfig.get_path("purelib"), libraries, dirs_exist_ok=True)
    return place / "python/bin/python"


def environment(cache: Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name in ("PATH", "HOME") or name.startswith("PIP_")}
    mirror = {name: value for name, value in os.environ.items() if "proxy" in name.lower() or name == "CAISSON_MIRROR"}
    return kept | mirror | {"CAISSON_CACHE": str(cache)}


def digests(directory: Path) -> dict[str, str]:
    files = [path for path in directory.iterdir() if path.name != ".used"]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture
def public_directory() -> Iterator[Path]:
    """Provide a directory accessible to an ordinary user; pytest's own are only accessible to root."""
    with tempfile.TemporaryDirectory(prefix="caisson-build-") as place:
        Path(place).chmod(0o755)
        yield Path(place)


@pytest.mark.parametrize("arch", ["amd64", "arm64"])
def test_an_ordinary_user_elsewhere_at_another_time_builds_the_same(public_directory: Path, arch: str) -> None:
    ours, theirs, place = (
        public_directory / "ours",
        public_directory / "theirs",
        public_directory / "another place/caisson",
    )
    seed(ours)
    mine = subprocess.run(builder(OURS, arch=arch), env=environment(ours), capture_output=True, text=True)
    assert mine.returncode == 0, mine.stderr

    seed(theirs)
    copy_sources(place, compiled=True)
    temporary = public_directory / "temporary"
    temporary.mkdir()
    for top in (theirs, place.parent, temporary):
        subprocess.run(["chown", "-R", f"{NOBODY}:{NOBODY}", top], check=True)
    settings = {"TMPDIR": str(temporary), "TZ": "Pacific/Auckland", "HOME": str(temporary), "LANG": "de_DE.UTF-8"}
    script = 'umask 077; exec "$@"'
    words = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", "faketime", "-f", "+2d"]
    argv = [*words, "sh", "-c", script, "sh", *builder(place, str(public_python(public_directory)), arch)]
    other = subprocess.run(argv, env=environment(theirs) | settings, capture_output=True, text=True, cwd=temporary)
    assert other.returncode == 0, other.stderr
    assert digests(Path(other.stdout.strip())) == digests(Path(mine.stdout.strip()))
    assert list(temporary.glob("tmp*")) == []


def test_a_build_that_was_killed_at_any_moment_is_followed_by_a_whole_one(public_directory: Path) -> None:
    cache = public_directory / "cache"
    seed(cache)
    began = time.monotonic()
    whole = subprocess.run(builder(OURS), env=environment(cache), capture_output=True, text=True)
    assert whole.returncode == 0, whole.stderr
    lasted, wanted = time.monotonic() - began, digests(Path(whole.stdout.strip()))
    killed = 0
    for number, how in enumerate([signal.SIGKILL, signal.SIGINT, signal.SIGTERM, signal.SIGKILL]):
        for step in ("base", "kernel", "agent", "images"):
            shutil.rmtree(cache / step)
        build = subprocess.Popen(
            builder(OURS),
            env=environment(cache),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        try:
            build.wait(lasted * (number + 0.7) / 4.5)
        except subprocess.TimeoutExpired:
            killed += 1
            os.killpg(build.pid, how)
        build.communicate()
        again = subprocess.run(builder(OURS), env=environment(cache), capture_output=True, text=True)
        assert again.returncode == 0, again.stderr
        assert digests(Path(again.stdout.strip())) == wanted
        assert list(cache.glob("*/.making-*")) == []
    assert killed >= 2, "otherwise this test is vacuous"


def test_a_full_disk_is_said_and_later_forgotten(public_directory: Path) -> None:
    cache = public_directory / "small"
    cache.mkdir()
    debs = default_root().glob(f"apt/{SUITE}-a*/debs/*.deb")
    kept = [deb for deb in debs if not deb.name.startswith("linux-source")]
    seeded = sum(deb.stat().st_size for deb in kept) >> 20  # MiB, of every build so far
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={seeded + 20}m", "tmpfs", cache], check=True)
    try:
        seed(cache)
        full = subprocess.run(
            builder(OURS),
            env=environment(cache),
            capture_output=True,
            text=True,
        )
        assert full.returncode == 1
        assert "No space left on device" in full.stderr
        assert list(cache.glob("*/.making-*")) == []
        subprocess.run(["mount", "-o", f"remount,size={seeded + 900}m", cache], check=True)
        after = subprocess.run(builder(OURS), env=environment(cache), capture_output=True, text=True)
        assert after.returncode == 0, after.stderr
    finally:
        subprocess.run(["umount", cache], check=True)
