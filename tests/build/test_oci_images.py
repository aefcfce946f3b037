"""Images in their forms: what they say is read, what is damaged or for somebody else is refused."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from caisson.image.build.cache import Cache
from caisson.image.containers.layers import Malformed
from caisson.image.containers.oci import Config, Packed, packed
from caisson.image.errors import ImageError
from tests.build.container_images import (
    FOLDER,
    configuration,
    docker_archive,
    file,
    layer,
    oci_layout,
    packed_directory,
    sha256,
)

pytestmark = pytest.mark.skipif(shutil.which("sqfstar") is None, reason="needs squashfs-tools")

LAYERS = (layer(("bin", FOLDER), ("bin/sh", file(b"#!", mode=0o755))), layer(("etc/motd", file(b"hello"))))
CONFIG: dict[str, Any] = {
    "Entrypoint": ["/entry"], "Cmd": ["a", "b"], "Env": ["A=1"], "User": "web:logs", "WorkingDir": "/srv",
}  # fmt: skip
READ = Config(("/entry",), ("a", "b"), ("A=1",), "web:logs", "/srv")


def read(path: Path, architecture: str = "amd64") -> Packed:
    with packed(path, architecture, Cache(path.parent / "cache")) as image:
        return image


def listed(path: Path) -> set[str]:
    """The names on an image's disk."""
    with packed(path, "amd64", Cache(path.parent / "cache")) as image:
        done = subprocess.run(["unsquashfs", "-l", image.disk], capture_output=True, text=True, check=True)
    return {line.removeprefix("squashfs-root/") for line in done.stdout.splitlines()}


def test_every_form_has_the_same_in_it(tmp_path: Path) -> None:
    layout = oci_layout(tmp_path / "layout", LAYERS, **CONFIG)
    archive = packed_directory(tmp_path / "layout.tar", layout)
    compressed = tmp_path / "layout.tgz"
    compressed.write_bytes(gzip.compress(archive.read_bytes()))
    docker = docker_archive(tmp_path / "docker.tar", LAYERS, **CONFIG)
    for path in (layout, archive, compressed, docker):
        assert read(path).config == READ
        assert {"bin/sh", "etc/motd", "srv"} <= listed(path)
    assert read(layout).name == read(compressed).name != ""
    assert not list((tmp_path / "cache/containers").glob(".making-*"))


def test_a_name_is_of_the_contents(tmp_path: Path) -> None:
    one = docker_archive(tmp_path / "one.tar", LAYERS, **CONFIG)
    two = docker_archive(tmp_path / "two.tar", LAYERS[:1], **CONFIG)
    assert read(one).name == read(one).name != read(two).name


def test_a_root_file_system(tmp_path: Path) -> None:
    (tmp_path / "rootfs.tar").write_bytes(LAYERS[0])
    image = read(tmp_path / "rootfs.tar")
    assert image.config == Config() and image.config.words([]) == ["/bin/sh"] and image.name
    assert "bin/sh" in listed(tmp_path / "rootfs.tar")
    (tmp_path / "root/etc").mkdir(parents=True)
    assert "etc" in listed(tmp_path / "root")
    assert read(tmp_path / "root").name == ""


@pytest.mark.parametrize(
    ("entrypoint", "command", "given", "words"),
    [
        (["/e"], ["a"], [], ["/e", "a"]),
        (["/e"], ["a"], ["x", "y"], ["/e", "x", "y"]),
        (["/e"], [], [], ["/e"]),
        ([], ["a", "b"], [], ["a", "b"]),
        ([], ["a", "b"], ["x"], ["x"]),
        ([], [], [], ["/bin/sh"]),
    ],
)
def test_what_is_run(
    tmp_path: Path, entrypoint: list[str], command: list[str], given: list[str], words: list[str]
) -> None:
    image = docker_archive(tmp_path / "image.tar", LAYERS, Entrypoint=entrypoint or None, Cmd=command or None)
    assert read(image).config.words(given) == words


def zstd(data: bytes) -> bytes:
    return subprocess.run(["zstd", "-qc"], input=data, capture_output=True, check=True).stdout


@pytest.mark.parametrize("compress", [bytes, gzip.compress, bz2.compress, lzma.compress, zstd])
def test_compressions(tmp_path: Path, compress: Callable[[bytes], bytes]) -> None:
    (tmp_path / "rootfs.tar").write_bytes(compress(LAYERS[0]))
    assert "bin/sh" in listed(tmp_path / "rootfs.tar")


@pytest.mark.parametrize("compress", [gzip.compress, bz2.compress, lzma.compress, zstd])
def test_compressions_that_are_cut_short(tmp_path: Path, compress: Callable[[bytes], bytes]) -> None:
    data = compress(LAYERS[0])
    (tmp_path / "rootfs.tar").write_bytes(data[: len(data) - 12])
    with pytest.raises(Malformed):
        read(tmp_path / "rootfs.tar")


def rewritten(layout: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change an index."""
    index = json.loads((layout / "index.json").read_text())
    change(index)
    (layout / "index.json").write_text(json.dumps(index))


def test_the_manifest_for_the_guests_platform(tmp_path: Path) -> None:
    layout = oci_layout(tmp_path / "layout", LAYERS, **CONFIG)

    def several(index: dict[str, Any]) -> None:
        (mine,) = index["manifests"]
        mine["platform"] = {"os": "linux", "architecture": "amd64"}
        other = mine | {"digest": f"sha256:{'0' * 64}", "platform": {"os": "linux", "architecture": "arm64"}}
        index["manifests"] = [other, mine]

    rewritten(layout, several)
    assert read(layout).config == READ
    with pytest.raises(ImageError, match=r"no image for linux/s390x, but linux/arm64, linux/amd64"):
        read(layout, "s390x")
    # An index in an index.
    inner = (layout / "index.json").read_bytes()
    (layout / "blobs/sha256" / sha256(inner)).write_bytes(inner)
    rewritten(layout, lambda index: index.update(manifests=[{"digest": f"sha256:{sha256(inner)}"}]))
    assert read(layout).config == READ


def test_another_architecture(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"is for linux/amd64, the guest for linux/arm64"):
        read(docker_archive(tmp_path / "image.tar", LAYERS), "arm64")


def test_every_blob_is_checked(tmp_path: Path) -> None:
    layout = oci_layout(tmp_path / "layout", LAYERS, **CONFIG)
    for blob in list((layout / "blobs/sha256").iterdir()):
        whole = blob.read_bytes()
        blob.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        with pytest.raises(Malformed, match="damaged"):
            read(layout)
        blob.unlink()
        with pytest.raises(Malformed, match="lacks"):
            read(layout)
        blob.write_bytes(whole)
    assert read(layout).config == READ


def test_layers_are_checked_by_their_contents(tmp_path: Path) -> None:
    image = docker_archive(tmp_path / "image.tar", LAYERS)
    data = image.read_bytes()
    image.write_bytes(data.replace(b"hello", b"jello"))
    with pytest.raises(Malformed, match="damaged"):
        read(image)


def saved(manifest: object, config: bytes = b"{}") -> bytes:
    return layer(("manifest.json", file(json.dumps(manifest).encode())), ("c", file(config)))


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (saved([]), "names no image"),
        (saved({}), "names no image"),
        (saved(["x"]), "names no image"),
        (saved([{"Config": "c"}, {"Config": "c", "RepoTags": ["two"]}]), r"several images \(\?, two\)"),
        (saved([{"Config": "missing", "Layers": []}]), "lacks missing"),
        (saved([{"Config": "c", "Layers": ["x"]}]), "1 layers, and 0"),
        (saved([{"Config": "c", "Layers": "x"}]), "Layers is to be of the type list"),
        (saved([{"Config": "c", "Layers": [1]}]), "list of strings"),
        (saved([{"Config": "c", "Layers": []}], b"[]"), "no JSON object"),
        (saved([{"Config": "c", "Layers": []}], b"{"), "no JSON document"),
        (saved([{"Config": "c", "Layers": ["../../etc/passwd"]}], configuration([b""])), "lacks ../../etc/passwd"),
        (saved([{"Config": "c", "Layers": []}], b'{"rootfs": {"diff_ids": ["md5:1"]}}'), "no digest"),
        (saved([{"Config": "c", "Layers": []}], b'{"config": {"Env": {}}}'), "Env is to be"),
        (b"", "not a tar archive"),
        (b"x" * 5000, "not a tar archive"),
    ],
)
def test_what_is_refused(tmp_path: Path, data: bytes, why: str) -> None:
    (tmp_path / "image.tar").write_bytes(data)
    with pytest.raises(ImageError, match=why):
        read(tmp_path / "image.tar")


def test_a_layer_that_reaches_out_leaves_nothing(tmp_path: Path) -> None:
    image = docker_archive(tmp_path / "image.tar", [LAYERS[0], layer(("../escape", file(b"x")))])
    with pytest.raises(Malformed, match="leads out of the root"):
        read(image)
    assert not list(tmp_path.rglob("escape"))
    assert not list((tmp_path / "cache/containers").glob("[!.]*"))


def test_a_bundle(tmp_path: Path) -> None:
    (tmp_path / "b/files/etc").mkdir(parents=True)
    (tmp_path / "b/config.json").write_text('{"root": {"path": "files"}, "process": {"args": ["x"]}}')
    assert read(tmp_path / "b").bundle["process"] == {"args": ["x"]}
    assert "etc" in listed(tmp_path / "b") and "config.json" not in listed(tmp_path / "b")
    (tmp_path / "b/config.json").write_text("[]")
    with pytest.raises(Malformed, match="no JSON object"):
        read(tmp_path / "b")


def test_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="there is no such image"):
        read(tmp_path / "nowhere")
