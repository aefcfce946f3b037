"""Test lock files: they are read as written, and each kind of drift is reported."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from caisson.image.build import lock
from caisson.image.build.lock import Lock
from caisson.image.errors import ImageError

A, B = "a" * 64, "b" * 64


def record(kind: str, name: str, version: str, sha256: str = A) -> dict[str, str]:
    return {"type": kind, "name": name, "version": version, "sha256": sha256}


def locked(*records: dict[str, str]) -> Lock:
    return Lock.of("trixie", "amd64", records)


BASE = (record("deb", "libc6", "2.41-12"), record("deb", "libssl3t64", "3.5.1-1"), record("wheel", "grpcio", "1.85.1"))


def test_lock_round_trip(tmp_path: Path) -> None:
    file = tmp_path / "image.lock"
    lock.write(locked(*BASE), file)
    assert lock.read(file) == locked(*BASE)
    assert lock.drift(lock.read(file), locked(*BASE)) == []
    lock.check(lock.read(file), locked(*BASE))


def test_the_order_of_packages_changes_nothing(tmp_path: Path) -> None:
    for name, records in (("first", BASE), ("second", BASE[::-1])):
        lock.write(locked(*records), tmp_path / name)
    assert (tmp_path / "first").read_bytes() == (tmp_path / "second").read_bytes()


def test_a_package_is_a_line(tmp_path: Path) -> None:
    file = tmp_path / "image.lock"
    lock.write(locked(*BASE), file)
    assert len([line for line in file.read_text().splitlines() if "sha256" in line]) == len(BASE)
    lock.write(locked(), file)
    assert lock.read(file).packages == ()


def test_each_difference_is_named() -> None:
    now = Lock.of(
        "bookworm",
        "amd64",
        [record("deb", "libc6", "2.41-13"), record("deb", "zlib1g", "1.3"), record("wheel", "grpcio", "1.85.1", B)],
    )
    assert [str(difference) for difference in lock.drift(locked(*BASE), now)] == [
        "suite: trixie is locked, not bookworm",
        "deb libc6: 2.41-12 is locked, 2.41-13 is there",
        "deb libssl3t64: 3.5.1-1 is locked, but no longer needed or found",
        "deb zlib1g: 1.3 is not in the lock file",
        f"wheel grpcio: 1.85.1 is a different file: sha256 {A} is locked, {B} is there",
    ]
    with pytest.raises(lock.Drift) as caught:
        lock.check(locked(*BASE), now)
    assert len(caught.value.differences) == 5
    assert "deb zlib1g: 1.3 is not in the lock file" in str(caught.value)


def test_a_deb_and_a_wheel_of_one_name_are_two_packages() -> None:
    both = locked(record("deb", "six", "1.16"), record("wheel", "six", "1.17"))
    assert len(both.packages) == 2
    assert [str(difference) for difference in lock.drift(both, locked(record("deb", "six", "1.16")))] == [
        "wheel six: 1.17 is locked, but no longer needed or found"
    ]


def test_one_package_in_two_versions_is_refused() -> None:
    with pytest.raises(ImageError, match="deb libc6 is listed twice: 1 and 2"):
        locked(record("deb", "libc6", "1"), record("deb", "libc6", "2"))
    assert len(locked(BASE[0], BASE[0]).packages) == 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format": 2}, "not a lock file of format 1"),
        ({"suite": None}, "suite must be a string"),
        ({"packages": {}}, "packages must be a list"),
        ({"packages": [{"type": "deb"}]}, "package 1: must have type, name, version, sha256"),
        ({"packages": [BASE[0], record("deb", "x", "")]}, "package 2: version must be a string"),
        ({"packages": [record("deb", "x", "1", "A" * 64)]}, "not a sha256"),
        ({"packages": [record("deb", "x", "1", "a" * 63)]}, "not a sha256"),
    ],
)
def test_lock_rejects_malformed_files(tmp_path: Path, change: dict[str, object], words: str) -> None:
    file = tmp_path / "image.lock"
    document = {"format": 1, "suite": "trixie", "arch": "amd64", "packages": list(BASE)} | change
    file.write_text(json.dumps(document))
    with pytest.raises(ImageError, match=words):
        lock.read(file)


def test_no_file_and_no_json_are_told_with_the_file(tmp_path: Path) -> None:
    file = tmp_path / "image.lock"
    with pytest.raises(ImageError, match=r"image\.lock"):
        lock.read(file)
    file.write_text("packages: []")
    with pytest.raises(ImageError, match=r"image\.lock"):
        lock.read(file)
