"""Test the store of container images: listing, removing and pruning; and a command's progress while it packs one."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import pytest

from caisson.commands import run
from caisson.commands.catalogue import GROUPS
from caisson.commands.main import CommandLine
from caisson.image.build.cache import Cache
from caisson.image.containers import oci
from caisson.image.containers.oci import pack_image
from caisson.image.containers.store import images, remember, remove
from caisson.image.errors import ImageError
from tests.build.container_images import docker_archive, file, layer
from tests.build.oci_example import CONFIG, LAYERS

pytestmark = pytest.mark.skipif(shutil.which("sqfstar") is None, reason="needs squashfs-tools")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cache:
    """Provide the cache that commands use."""
    monkeypatch.setenv("CAISSON_CACHE", str(tmp_path / "cache"))
    return Cache(tmp_path / "cache")


def stored(cache: Cache, place: Path, tag: str) -> str:
    """Pack a new image under a tag; return its id."""
    saved = docker_archive(place / "image.tar", [*LAYERS, layer((tag, file(tag.encode())))], **CONFIG)
    with pack_image(saved, "amd64", cache) as image:
        found = next(one for one in images(cache) if one.disk == image.disk)
    remember(cache, found.id, [f"test:{tag}"])
    assert remove(cache, "test:latest") == 0  # the archive's own name; the image has another one
    return found.id


def test_stored_images_are_listed_removed_by_name_and_pruned_by_age(
    cache: Cache, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ids = {tag: stored(cache, tmp_path, tag) for tag in ("one", "two", "three")}
    run.images(as_json=True)
    rows = json.loads(capsys.readouterr().out)
    assert {row["name"]: row["id"] for row in rows} == {f"test:{tag}": key[:12] for tag, key in ids.items()}

    run.rmi(image="test:one")
    assert re.search(r"\d+ MB freed", capsys.readouterr().err)
    assert {one.id for one in images(cache)} == {ids["two"], ids["three"]}
    with pytest.raises(ImageError, match="test:one: no stored image of this name; list them: caisson images"):
        run.rmi(image="test:one")

    old = next(one for one in images(cache) if one.id == ids["two"])
    os.utime(old.disk.parent / ".used", (0, 0))
    run.prune(older=3600)
    assert "1 images removed" in capsys.readouterr().err
    assert [one.names for one in images(cache)] == [("test:three",)]
    run.prune(older=0)
    assert images(cache) == []


def test_what_an_interrupted_removal_leaves_is_swept(
    cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    stored(cache, tmp_path, "one")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run.rmi(image="test:one")
    assert images(cache) == []
    cache.trim(1 << 40)
    assert list((cache.root / "containers").iterdir()) == []


def test_no_vm_is_booted_for_an_image_that_does_not_exist(
    cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run, "find_or_boot_vm", lambda *_, **__: pytest.fail("boots a VM"))
    assert CommandLine(GROUPS).run(["run", f"{tmp_path}/missing.tar"]) == 125
    expected = f"caisson: {tmp_path}/missing.tar: no such image; name a file, a directory, or a stored image\n"
    assert capsys.readouterr().err == expected


def test_what_takes_longer_says_how_far_it_is(cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(oci, "PROGRESS_INTERVAL", 0.0)
    said: list[str] = []
    large = layer(*((f"f{number}", file(os.urandom(1 << 20))) for number in range(3)))
    with pack_image(docker_archive(tmp_path / "image.tar", [large], **CONFIG), "amd64", cache, report=said.append):
        pass
    done = [int(megabytes) for line in said for megabytes in re.findall(r"^packing .*: .*, (\d+) MB done$", line)]
    assert len(done) > 2
    assert done == sorted(done)
    assert done[-1] >= 3
