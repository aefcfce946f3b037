"""Test results of build steps: found again, built once, and never used if incomplete."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from caisson.commands import image
from caisson.image.build.cache import (
    Cache,
    Removed,
    clean,
    default_root,
    digest_of,
    digest_of_files,
    size_limit,
    size_of,
)
from caisson.image.errors import ImageError
from tests.support.poll import wait_until

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache")


def never(target: Path) -> None:
    pytest.fail("built again")


def contents(cache: Cache) -> list[str]:
    """Return every file of a cache, except locks and access times; skip files removed meanwhile."""
    found = (Path(place, name) for place, _, names in os.walk(cache.root) for name in names if name != ".used")
    return sorted(str(path.relative_to(cache.root)) for path in found if not path.name.startswith(".lock-"))


def test_a_result_is_made_once(cache: Cache) -> None:
    assert cache.get("step", "k1") is None
    made = cache.get_or_make("step", "k1", lambda target: (target / "f").symlink_to("1"))
    assert (made / "f").readlink() == Path("1")
    assert cache.get_or_make("step", "k1", never) == made
    assert cache.get("step", "k1") == made
    assert cache.get("step", "k2") is None
    assert cache.get("other", "k1") is None


def test_a_result_that_is_being_removed_is_found_or_not(cache: Cache) -> None:
    made = cache.get_or_make("step", "k", lambda target: None)
    done = threading.Event()

    def remove_and_restore() -> None:
        while not done.is_set():
            made.rename(made.with_name("gone")).rename(made)

    other = threading.Thread(target=remove_and_restore)
    other.start()
    try:
        found = {cache.get("step", "k") for _ in range(10_000)}
    finally:
        done.set()
        other.join(30)
    assert found <= {made, None}


@pytest.mark.parametrize("error", [ImageError("no"), KeyboardInterrupt(), ValueError("bug")])
def test_a_failure_leaves_nothing(cache: Cache, error: BaseException) -> None:
    def fail(target: Path) -> None:
        (target / "half").write_text("half")
        raise error

    with pytest.raises(type(error)):
        cache.get_or_make("step", "k", fail)
    wait_until(lambda: contents(cache) == [], "after Ctrl-C the rest goes in the background")
    cache.get_or_make("step", "k", lambda target: (target / "f").touch())
    assert contents(cache) == ["step/k/f"]


def test_a_killed_build_leaves_nothing_that_is_taken_for_whole(cache: Cache) -> None:
    program = f"""
import os, signal
from pathlib import Path
from caisson.image.build.cache import Cache
def make(target):
    (target / "half").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
Cache(Path({str(cache.root)!r})).get_or_make("step", "k", make)
"""
    killed = subprocess.run([sys.executable, "-c", program], cwd=ROOT)
    assert killed.returncode == -9
    assert any(name.endswith("/half") for name in contents(cache)), "otherwise this test is vacuous"
    assert cache.get("step", "k") is None
    cache.get_or_make("step", "k", lambda target: (target / "f").touch())
    wait_until(lambda: contents(cache) == ["step/k/f"], "partial results are removed", found=lambda: contents(cache))


def test_two_builders_make_it_once(cache: Cache) -> None:
    looked = threading.Event()

    class Second(Cache):
        def get(self, step: str, key: str) -> Path | None:
            found = super().get(step, key)
            looked.set()
            return found

    made: list[str] = []
    results: list[Path] = []
    second = threading.Thread(
        target=lambda: results.append(Second(cache.root).get_or_make("step", "k", lambda target: made.append("second")))
    )

    def make(target: Path) -> None:
        second.start()
        assert looked.wait(30)  # the second has seen that there is nothing yet, and is about to lock
        made.append("first")

    results.append(cache.get_or_make("step", "k", make))
    second.join(30)
    assert made == ["first"]
    assert results[0] == results[1]


def test_builders_of_different_results_do_not_wait_for_each_other(cache: Cache) -> None:
    def make(target: Path) -> None:
        other = threading.Thread(target=lambda: cache.get_or_make("step", "other", lambda target: None))
        other.start()
        other.join(30)
        assert not other.is_alive()

    cache.get_or_make("step", "k", make)
    assert cache.get("step", "other") is not None


def test_trimming_removes_what_killed_builds_left_and_nothing_of_running_ones(cache: Cache) -> None:
    def make(target: Path) -> None:
        left = cache.root / "step/.making-dead"
        left.mkdir()
        (cache.root / "step/.lock-dead").touch()
        cache.trim(0)
        assert not left.exists()
        (target / "f").touch()

    cache.get_or_make("step", "k", make)
    assert contents(cache) == ["step/k/f"]
    cache.trim(1 << 30)
    assert list((cache.root / "step").glob(".lock-*")) == []


def test_a_big_tree_that_a_killed_build_left_does_not_hold_up_the_next(cache: Cache) -> None:
    """Removing it continues during the next build, and afterwards."""
    old = cache.root / "step/.making-k"
    (old / "tree").mkdir(parents=True)
    for number in range(200):
        (old / "tree" / str(number)).touch()

    def make(target: Path) -> None:
        assert list(target.iterdir()) == []
        (target / "f").touch()

    cache.get_or_make("step", "k", make)
    assert (cache.root / "step/k/f").is_file()
    wait_until(lambda: not list((cache.root / "step").glob(".making-*")), "the old tree is gone")
    wait_until(lambda: [path.name for path in (cache.root / "step").glob(".lock-*")] == [".lock-k"], "and its lock")


def test_a_cache_is_its_owners_alone(cache: Cache) -> None:
    cache.get_or_make("step", "k", lambda target: None)
    assert cache.root.stat().st_mode & 0o077 == 0


def test_remains_of_killed_builds_are_removed(cache: Cache) -> None:
    program = (
        "import os, signal, sys; from pathlib import Path; from caisson.image.build.cache import Cache\n"
        "with Cache(Path(sys.argv[1])).scratch('step') as place:\n"
        "    (place / 'f').touch(); os.kill(os.getpid(), signal.SIGKILL)"
    )
    killed = subprocess.run([sys.executable, "-c", program, cache.root], cwd=ROOT)
    assert killed.returncode == -9
    assert len(list((cache.root / "step").glob(".making-*/f"))) == 1
    with cache.scratch("step") as mine, cache.scratch("step") as another:
        assert {mine, another} == set((cache.root / "step").glob(".making-*"))
    assert list((cache.root / "step").iterdir()) == []


def freed(removed: list[Removed]) -> int:
    return sum(one.bytes for one in removed)


def test_those_used_last_are_kept(cache: Cache) -> None:
    def make(target: Path) -> None:
        (target / "f").write_bytes(bytes(1000))

    for number, (step, key) in enumerate([("one", "a"), ("two", "b"), ("one", "c"), ("two", "d")]):
        result = cache.get_or_make(step, key, make)
        os.utime(result / ".used", (1000 + number, 1000 + number))
    cache.get("one", "a")  # just used
    assert freed(cache.trim(2500)) == 2000
    assert contents(cache) == ["one/a/f", "two/d/f"]
    assert freed(cache.trim(0)) == 1000  # what may be in use is kept
    assert contents(cache) == ["one/a/f"]
    assert freed(cache.trim(0, spare=0)) == 1000
    assert contents(cache) == []


def test_clean_says_what_it_freed_and_of_what(
    cache: Cache, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CAISSON_CACHE", str(cache.root))
    for step, key, size in (("images", "a", 3), ("images", "b", 20), ("containers", "c", 400), ("other", "d", 5000)):
        result = cache.get_or_make(step, key, lambda target: (target / "f").touch())
        os.truncate(result / "f", size * 10**6)
        (result / ".used").write_text("")
        cache.get_or_make(step, key, never)
    before = size_of(cache.root)
    image.clean(everything=False)
    assert capsys.readouterr().err.splitlines() == [
        "caisson: images: 2 removed, 23 MB",
        "caisson: container images: 1 removed, 400 MB",
        "caisson: freed 5423 MB",
    ]
    assert before - size_of(cache.root) == pytest.approx(5423e6, abs=1000)
    image.clean(everything=False)
    assert capsys.readouterr().err == "caisson: freed 0 MB\n"


def test_the_cap_is_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAISSON_CACHE_SIZE", "2000")
    assert size_limit() == 2000
    monkeypatch.setenv("CAISSON_CACHE_SIZE", "2 GB")
    with pytest.raises(ImageError, match=r"CAISSON_CACHE_SIZE .*: is not a number of bytes"):
        size_limit()


def test_a_cache_that_cannot_be_written_names_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ImageError, match="set CAISSON_CACHE to another directory"):
        Cache(tmp_path / "file").get_or_make("step", "k", never)


@pytest.mark.parametrize(
    ("environment", "root"),
    [
        ({"CAISSON_CACHE": "/a", "XDG_CACHE_HOME": "/b"}, "/a"),
        ({"XDG_CACHE_HOME": "/b"}, "/b/caisson"),
        ({"HOME": "/h"}, "/h/.cache/caisson"),
    ],
)
def test_where_it_is(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], root: str) -> None:
    for name in ("CAISSON_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert default_root() == Path(root)


def test_keys_are_of_the_contents() -> None:
    assert digest_of("a", {"x": 1, "y": 2}) == digest_of("a", {"y": 2, "x": 1})
    assert len({digest_of("a"), digest_of("b"), digest_of("a", "b"), digest_of(["a", "b"]), digest_of()}) == 5


def test_the_digest_of_files_is_of_names_contents_and_what_is_runnable(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    one.write_text("1")
    two.write_text("2")
    seen = [digest_of_files(tmp_path, [one, two])]
    os.utime(one, (1, 1))
    one.chmod(0o600)
    assert digest_of_files(tmp_path, [two, one]) == seen[0]
    one.chmod(0o755)
    seen.append(digest_of_files(tmp_path, [one, two]))
    one.write_text("12")
    two.write_text("")
    seen.append(digest_of_files(tmp_path, [one, two]))
    seen.append(digest_of_files(tmp_path, [one]))
    one.rename(tmp_path / "three")
    seen.append(digest_of_files(tmp_path, [tmp_path / "three"]))
    assert len(set(seen)) == len(seen)


def test_a_full_disk_is_named_whoever_meets_it(cache: Cache) -> None:
    def full(_: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "some/file")

    def apt(_: Path) -> None:
        raise ImageError("http://mirror: `apt-get update`: E: No space left on device; if it is not the right mirror …")

    for make in (full, apt):
        with pytest.raises(
            ImageError, match="the disk is full; free some space, or set CAISSON_CACHE to another directory"
        ) as caught:
            cache.get_or_make("step", "k", make)
        assert str(caught.value).startswith(str(cache.root)) and "mirror" not in str(caught.value)


def test_clean_says_what_it_removed(cache: Cache) -> None:
    def make(target: Path) -> None:
        (target / "f").write_bytes(bytes(1000))

    cache.get_or_make("images", "a", make)
    (cache.root / "apt/trixie").mkdir(parents=True)
    (cache.root / "apt/trixie/deb").write_bytes(bytes(500))
    assert clean(cache.root) == [Removed("images", 1000)]
    assert clean(cache.root, everything=True) == [Removed("downloads", 500)]
    assert not (cache.root / "apt").exists()


def test_an_interruption_moves_what_is_half_made_away_at_once(cache: Cache) -> None:
    def interrupted(target: Path) -> None:
        (target / "tree").mkdir()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache.get_or_make("step", "k", interrupted)
    assert not (cache.root / "step/.making-k").exists()
    wait_until(lambda: [one.name for one in (cache.root / "step").iterdir()] == [".lock-k"], "leftovers are removed")
