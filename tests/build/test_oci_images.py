"""Test images in all their formats: they are read, and damaged or foreign ones are rejected."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from caisson.image.build.cache import Cache
from caisson.image.containers.documents import Config
from caisson.image.containers.oci import pack_image
from caisson.image.containers.store import images, remember, remove
from caisson.image.errors import ImageError
from caisson.image.formats.tree import Malformed
from tests.build.container_images import (
    FOLDER,
    Member,
    configuration,
    docker_archive,
    file,
    layer,
    oci_layout,
    packed_directory,
    sha256,
)
from tests.build.oci_example import CONFIG, LAYERS, READ, listed, read, rewritten

pytestmark = pytest.mark.skipif(shutil.which("sqfstar") is None, reason="needs squashfs-tools")


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


def test_the_cap_of_the_cache_is_for_their_disks_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = read(docker_archive(tmp_path / "one.tar", LAYERS, **CONFIG))
    os.utime(one.disk.parent / ".used", (1000, 1000))
    read(docker_archive(tmp_path / "two.tar", LAYERS[:1]))
    assert one.disk.exists()
    os.utime(one.disk.parent / ".used", (1000, 1000))
    monkeypatch.setenv("CAISSON_CACHE_SIZE", "1")
    three = read(docker_archive(tmp_path / "three.tar", LAYERS[1:]))
    assert not one.disk.exists() and three.disk.exists(), "what was used long ago is removed, what is in use stays"


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
def test_image_configuration_becomes_a_process(
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


def test_the_manifest_for_the_guests_platform(tmp_path: Path) -> None:
    layout = oci_layout(tmp_path / "layout", LAYERS, **CONFIG)

    def several(index: dict[str, Any]) -> None:
        (mine,) = index["manifests"]
        mine["platform"] = {"os": "linux", "architecture": "amd64"}
        other = mine | {"digest": f"sha256:{'0' * 64}", "platform": {"os": "linux", "architecture": "arm64"}}
        index["manifests"] = [other, mine]

    rewritten(layout, several)
    assert read(layout).config == READ
    with pytest.raises(ImageError, match=r"no image for linux/s390x; it has linux/arm64, linux/amd64"):
        read(layout, "s390x")
    # A nested index.
    inner = (layout / "index.json").read_bytes()
    (layout / "blobs/sha256" / sha256(inner)).write_bytes(inner)
    rewritten(layout, lambda index: index.update(manifests=[{"digest": f"sha256:{sha256(inner)}"}]))
    assert read(layout).config == READ


def test_another_architecture(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"an image for linux/amd64; the guest is linux/arm64"):
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
        (saved([{"Config": "c"}, {"Config": "d", "RepoTags": ["two"]}]), r"several images: \?, two"),
        (saved([{"Config": "missing", "Layers": []}]), "lacks missing"),
        (saved([{"Config": "c", "Layers": ["x"]}]), "1 layers, and 0"),
        (saved([{"Config": "c", "Layers": "x"}]), "Layers must be of the type list"),
        (saved([{"Config": "c", "Layers": [1]}]), "list of strings"),
        (saved([{"Config": "c", "Layers": []}], b"[]"), "not a JSON object"),
        (saved([{"Config": "c", "Layers": []}], b"{"), "not valid JSON"),
        (saved([{"Config": "c", "Layers": []}], b'{"a":[' + b"[]," * 270_000 + b"[]]}"), "more than 262144 values"),
        (layer(("manifest.json", file(b"[]")), ("/".join(["n" * 200] * 6), file())), "names no image"),
        (saved([{"Config": "c", "Layers": ["../../etc/passwd"]}], configuration([b""])), "lacks ../../etc/passwd"),
        (saved([{"Config": "c", "Layers": []}], b'{"rootfs": {"diff_ids": ["md5:1"]}}'), "not a sha256 digest"),
        (saved([{"Config": "c", "Layers": []}], b'{"config": {"Env": {}}}'), "Env must be"),
        (b"", "not a tar archive"),
        (b"x" * 5000, "not a tar archive"),
    ],
)
def test_oci_image_rejects_malformed_layouts(tmp_path: Path, data: bytes, why: str) -> None:
    (tmp_path / "image.tar").write_bytes(data)
    with pytest.raises(ImageError, match=why):
        read(tmp_path / "image.tar")


def test_a_layer_that_reaches_out_leaves_nothing(tmp_path: Path) -> None:
    image = docker_archive(tmp_path / "image.tar", [LAYERS[0], layer(("../escape", file(b"x")))])
    with pytest.raises(Malformed, match="leaves the root"):
        read(image)
    assert not list(tmp_path.rglob("escape"))
    assert not list((tmp_path / "cache/containers").glob("[!.]*"))


def test_oci_image_reports_missing_parts(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="no such image"):
        read(tmp_path / "nowhere")


def test_the_dir_transport_of_skopeo(tmp_path: Path) -> None:
    layout = oci_layout(tmp_path / "layout", LAYERS, **CONFIG)
    target = tmp_path / "dir"
    shutil.copytree(layout / "blobs/sha256", target)
    (manifest,) = json.loads((layout / "index.json").read_text())["manifests"]
    (target / manifest["digest"][7:]).rename(target / "manifest.json")
    (target / "version").write_text("Directory Transport Version: 1.1\n")
    assert read(target).config == READ
    with pack_image(f"dir:{target}", "amd64", Cache(tmp_path / "cache")) as image:
        assert image.config == READ


def test_a_directory_that_is_no_image_is_refused(tmp_path: Path) -> None:
    (tmp_path / "home/documents").mkdir(parents=True)
    with pytest.raises(ImageError, match="not an image; expected an OCI layout"):
        read(tmp_path / "home")


@pytest.mark.parametrize(
    ("members", "why"),
    [
        ([("repositories", file(b"{}")), ("1" * 64 + "/layer.tar", file(LAYERS[0]))], "load it into a newer one"),
        ([("config.json", file(b"{}")), ("rootfs/bin/sh", file())], "holds a bundle; unpack it"),
        ([("mine/oci-layout", file(b"{}")), ("mine/index.json", file(b"{}"))], "in its directory mine; unpack it"),
        ([("./mine/manifest.json", file(b"[]")), ("./mine/x.json", file(b"{}"))], "in its directory mine; unpack it"),
    ],
)
def test_an_archive_with_an_image_somewhere_in_it_is_not_packed(
    tmp_path: Path, members: list[Member], why: str
) -> None:
    (tmp_path / "image.tar").write_bytes(layer(*members))
    with pytest.raises(ImageError, match=why):
        read(tmp_path / "image.tar")


def test_a_root_file_system_that_holds_an_image_is_one(tmp_path: Path) -> None:
    (tmp_path / "root.tar").write_bytes(
        layer(("srv/i/oci-layout", file(b"{}")), ("config.json", file()), ("app", file()))
    )
    assert "srv/i/oci-layout" in listed(tmp_path / "root.tar")


@pytest.mark.parametrize(
    ("given", "workdir"),
    [
        ("/bin/../srv", "/srv"),
        ("/srv/", "/srv"),
        ("", "/"),
        ("srv", "/srv"),
        ("/../..", "/"),
        ("//srv//x/.", "/srv/x"),
    ],
)
def test_working_directories(tmp_path: Path, given: str, workdir: str) -> None:
    image = docker_archive(tmp_path / "image.tar", LAYERS, WorkingDir=given)
    assert read(image).config.workdir == workdir
    assert workdir == "/" or workdir[1:] in listed(image)


def test_a_working_directory_or_volume_that_is_a_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Malformed, match="WorkingDir /etc/motd: a file"):
        read(docker_archive(tmp_path / "one.tar", LAYERS, WorkingDir="/etc/motd/"))
    with pytest.raises(Malformed, match="Volumes /etc/motd: a file"):
        read(docker_archive(tmp_path / "two.tar", LAYERS, Volumes={"/etc/motd/x": {}}))


def test_volumes_are_made(tmp_path: Path) -> None:
    image = docker_archive(tmp_path / "image.tar", LAYERS, Volumes={"/data": {}, "/var/lib/db/": {}})
    assert {"data", "var/lib/db"} <= listed(image)


def test_empty_layers(tmp_path: Path) -> None:
    assert "bin/sh" in listed(oci_layout(tmp_path / "gzip", [*LAYERS, b""]))
    plain = docker_archive(tmp_path / "plain.tar", [*LAYERS, b""])
    assert "bin/sh" in listed(plain)


def test_zstd_with_skippable_frames(tmp_path: Path) -> None:
    frame = b"\x5a\x2a\x4d\x18" + (7).to_bytes(4, "little") + b"skipped"
    (tmp_path / "rootfs.tar").write_bytes(frame + zstd(LAYERS[0][:512]) + frame + zstd(LAYERS[0][512:]) + frame)
    assert "bin/sh" in listed(tmp_path / "rootfs.tar")


def test_a_root_file_system_may_have_more_files_than_an_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("caisson.image.containers.archives.MAX_FILES", 3)
    (tmp_path / "rootfs.tar").write_bytes(layer(("etc", FOLDER), *((f"etc/{n}", file(b"x")) for n in range(9))))
    assert "etc/8" in listed(tmp_path / "rootfs.tar")


def test_five_thousand_directories_deep(tmp_path: Path) -> None:
    deep = "/".join(["d"] * 5000)
    assert deep in listed(docker_archive(tmp_path / "image.tar", [layer((deep, FOLDER))]))
    with pytest.raises(Malformed, match="deeper than 10000"):
        read(docker_archive(tmp_path / "deeper.tar", [layer(("/".join(["d"] * 10001), FOLDER))]))


def test_sparse_files_reach_the_disk_by_their_holes(tmp_path: Path) -> None:
    (tmp_path / "root/etc").mkdir(parents=True)
    with (tmp_path / "root/log").open("wb") as log:
        for number in range(30):
            log.seek(number << 20)
            log.write(b"%d" % number)
        log.truncate(1 << 30)
    for form in ("root", "root.tar"):
        if form == "root.tar":
            subprocess.run(["tar", "-S", "-C", tmp_path / "root", "-cf", tmp_path / form, "."], check=True)
        with pack_image(tmp_path / form, "amd64", Cache(tmp_path / "cache"), max_size=1 << 20) as image:
            found = subprocess.run(["unsquashfs", "-cat", image.disk, "log"], capture_output=True, check=True).stdout
        assert len(found) == 1 << 30 and found[29 << 20 : (29 << 20) + 2] == b"29"


def test_data_beyond_the_limit_is_refused_in_one_line(tmp_path: Path) -> None:
    bomb = docker_archive(tmp_path / "image.tar", [layer(("zeros", file(bytes(8 << 20))))])
    squeezed = tmp_path / "image.tgz"
    squeezed.write_bytes(gzip.compress(bomb.read_bytes()))
    cache = Cache(tmp_path / "cache")
    for path in (bomb, squeezed):
        with pytest.raises(Malformed, match=r"more than 0.0 GiB of data; --max-size raises the limit$"):
            with pack_image(path, "amd64", cache, max_size=4 << 20):
                pass
        with pack_image(path, "amd64", cache, max_size=16 << 20):
            pass


def test_attributes_that_a_disk_cannot_hold_are_named(tmp_path: Path) -> None:
    attributes = {"user.kept": b"x", "system.posix_acl_access": b"x", "trusted.overlay.opaque": b"y"}
    image = docker_archive(tmp_path / "image.tar", [layer(("file", file(xattrs=attributes)))])
    lines: list[str] = []
    with pack_image(image, "amd64", Cache(tmp_path / "cache"), report=lines.append):
        pass
    assert len(lines) == 2 and all(line.startswith("/file: attribute ") for line in lines)
    assert "system.posix_acl_access" in lines[0] and "trusted.overlay.opaque" in lines[1]


def test_attributes_that_no_kernel_could_list_are_not_kept(tmp_path: Path) -> None:
    attributes = {f"user.{'a' * 200}{number}": b"" for number in range(400)}
    image = docker_archive(tmp_path / "image.tar", [layer(("file", file(xattrs=attributes)))])
    lines: list[str] = []
    with pack_image(image, "amd64", Cache(tmp_path / "cache"), report=lines.append):
        pass
    assert lines == ["/file: attributes after the first 313: not kept: a kernel could not list them"]


def test_a_name_means_the_image_that_was_packed_under_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = Cache(tmp_path / "cache")
    docker = docker_archive(tmp_path / "image.tar", LAYERS, **CONFIG)
    with pack_image(docker, "amd64", cache) as image:
        key = image.name
    docker.unlink()
    for name in ("test", "test:latest", key[:12]):
        with pack_image(name, "amd64", cache) as image:
            assert (image.config, image.name) == (READ, key)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ImageError, match="no file or stored image of this name; to pull it"):
        read(Path("other"))
    assert remove(cache, "test") > 0 and images(cache) == []
    with pytest.raises(ImageError, match="no stored image"):
        remove(cache, "test")


@pytest.mark.parametrize("name", ["a b:latest", "n\nl:latest", "lat\udce9:latest", "../up:latest", "%41:latest"])
def test_any_bytes_are_a_name(tmp_path: Path, name: str) -> None:
    cache = Cache(tmp_path / "cache")
    with pack_image(docker_archive(tmp_path / "image.tar", LAYERS, **CONFIG), "amd64", cache) as image:
        remember(cache, image.name or "", [name])
    assert name in next(iter(images(cache))).names


@pytest.mark.parametrize("prefix", ["", "docker-archive:"])
@pytest.mark.parametrize("name", ["1", "host.example:5000/a/b:1"])
def test_a_whole_name_behind_a_path_chooses(tmp_path: Path, prefix: str, name: str) -> None:
    (tmp_path / "c:d").mkdir()
    config = configuration([LAYERS[0]], Cmd=["chosen"])
    manifest = [
        {"Config": "c.json", "RepoTags": ["host.example:5000/a/b:1"], "Layers": ["l"]},
        {"Config": "other.json", "RepoTags": ["host.example:5000/a/b:2"], "Layers": ["l"]},
    ]
    members = (("c.json", file(config)), ("other.json", file(b"{}")), ("l", file(LAYERS[0])))
    (tmp_path / "c:d/image.tar").write_bytes(layer(*members, ("manifest.json", file(json.dumps(manifest).encode()))))
    with pack_image(f"{prefix}{tmp_path}/c:d/image.tar:{name}", "amd64", Cache(tmp_path / "cache")) as image:
        assert image.config.command == ("chosen",)


def test_a_registrys_image_is_fetched_by_skopeo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = oci_layout(tmp_path / "layout", LAYERS, **CONFIG)
    (tmp_path / "bin").mkdir()
    skopeo = tmp_path / "bin/skopeo"
    skopeo.write_text(
        "#!/bin/sh\n"
        f'echo "$@" >{tmp_path}/words\n'
        "for last; do :; done; rest=${last#oci:}; target=${rest%%:*}\n"
        f'cp -r {layout} "$target"\n'
    )
    skopeo.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    with pack_image("docker://example.org/a/b:1", "amd64", Cache(tmp_path / "cache")) as image:
        assert image.config == READ
    words = (tmp_path / "words").read_text()
    assert "--override-arch amd64" in words and "docker://example.org/a/b:1 oci:" in words
