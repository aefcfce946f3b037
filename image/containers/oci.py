"""Images of containers, in the forms that people have them: what is in them, and what they are to run.

    an OCI image layout, a directory or a tar archive of one     (image-layout.md)
    what `docker save` writes: a tar archive with manifest.json   (moby, image/tarexport)
    an OCI bundle: a directory with config.json                   (OCI runtime specification, bundle.md)
    a root file system: a directory, or a tar archive

What is named by a digest is checked against it, layers by that of their contents, too.
"""

from __future__ import annotations

import contextlib
import json
import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from caisson.image.build.cache import Cache, cap, default_root, digest_of
from caisson.image.containers.archives import Archive, Directory, Whole, check, plain, sha256_of, unpack
from caisson.image.containers.layers import Malformed, Tree, from_directory
from caisson.image.errors import ImageError
from caisson.image.formats.squashfs import write_squashfs

DIGEST = re.compile(r"sha256:([0-9a-f]{64})")

Files = Archive | Directory | Whole

#: How many indexes may lead to a manifest.
DEEPEST = 4

#: A document that is larger is not read into memory.
LARGEST_DOCUMENT = 16 << 20

#: Disks of images are kept; bump VERSION when the same image is to become another disk.
STEP = "containers"
VERSION = 1

#: What is run when nothing says what.
SHELL = ("/bin/sh",)


@dataclass(frozen=True)
class Config:
    """What an image is to run; ``user`` is USER[:GROUP], by names or numbers."""

    entrypoint: tuple[str, ...] = ()
    command: tuple[str, ...] = SHELL
    env: tuple[str, ...] = ()
    user: str = ""
    workdir: str = "/"

    def words(self, given: Sequence[str]) -> list[str]:
        """The program and its arguments; what is given takes the place of the image's command."""
        return [*self.entrypoint, *(given or self.command)]


@dataclass(frozen=True)
class Packed:
    """An image as a disk: ``name`` is the same for the same contents, and unknown (empty) for a directory's.

    ``bundle`` is the configuration of a bundle, all of it.
    """

    disk: Path
    name: str
    config: Config
    bundle: dict[str, Any] = field(default_factory=dict)


@contextlib.contextmanager
def packed(path: Path, architecture: str, cache: Cache | None = None) -> Iterator[Packed]:
    """An image of any form as a read-only disk (squashfs), which may go after the block unless it is in the cache.

    ``architecture`` is the guest's, in the words of Go and Debian: amd64.  Raises ImageError; Malformed for an archive
    that is damaged or reaches out of its root.
    """
    cache = cache or Cache(default_root())
    with cache.scratch(STEP) as scratch:
        try:
            image = _packed(path, architecture, cache, scratch)
        except OSError as error:
            raise ImageError(f"{path}: {error}") from error
        yield image


def _packed(path: Path, architecture: str, cache: Cache, scratch: Path) -> Packed:
    if path.is_dir() and not (path / "oci-layout").exists():
        bundle = _document((path / "config.json").open("rb"), "config.json") if (path / "config.json").exists() else {}
        root = path / str(_of(_of(bundle, "root", dict), "path", str) or "rootfs") if bundle else path
        disk = scratch / "disk"
        write_squashfs(from_directory(root), disk)
        return Packed(disk, "", Config(), bundle)
    if not path.exists():
        raise ImageError(f"{path}: there is no such image")
    with contextlib.ExitStack() as stack:
        files: Files
        if path.is_dir():
            files = Directory(path)
        else:
            archive = plain(path, scratch / "archive")
            files = stack.enter_context(Archive.of(archive, str(path)))
        if files.has("oci-layout"):
            image = _read_layout(files, architecture)
        elif files.has("manifest.json"):
            image = _read_docker(files, architecture)
        else:
            files = Whole(archive)
            with files.open() as stream:
                digest = sha256_of(stream)
            image = _Image([_Layer("", "", digest)], Config(), digest)
        name = digest_of(VERSION, image.identity)
        made = cache.get_or_make(STEP, name, lambda target: _make(files, image, scratch, target / "disk"))
        cache.trim(cap())
        return Packed(made / "disk", name, image.config)


def _make(files: Files, image: _Image, scratch: Path, target: Path) -> None:
    """Write an image's disk."""
    tree = Tree()
    with contextlib.ExitStack() as stack:
        for number, layer in enumerate(image.layers):
            file = scratch / f"layer-{number}"
            _fetch(files, layer, file)
            try:
                archive = stack.enter_context(tarfile.open(file, mode="r:", errors="surrogateescape"))
            except tarfile.TarError as error:
                raise Malformed(f"{layer.name or 'it'}: not a tar archive, or a damaged one: {error}") from error
            tree.add(archive)
        tree.ensure_directory(image.config.workdir)
        write_squashfs(tree, target)


@dataclass(frozen=True)
class _Layer:
    """``name`` in the image's files; the digests of the file and of its contents, empty where nothing says them."""

    name: str
    digest: str
    contents: str


@dataclass(frozen=True)
class _Image:
    layers: list[_Layer]
    config: Config
    identity: str


def _read_layout(files: Files, architecture: str) -> _Image:
    document = _document(files.open("index.json"), "index.json")
    digest = ""
    for _ in range(DEEPEST):
        digest = _choose(_objects(document, "manifests"), architecture, files.shown)
        document = _blob(files, digest)
        if "manifests" not in document:
            break
    else:
        raise Malformed(f"{files.shown}: indexes of indexes of indexes")
    blobs = [_sha256(_of(layer, "digest", str)) for layer in _objects(document, "layers")]
    config = _blob(files, _sha256(_of(_of(document, "config", dict), "digest", str)))
    contents = _contents(config, len(blobs), files.shown)
    layers = [_Layer(f"blobs/sha256/{blob}", blob, content) for blob, content in zip(blobs, contents, strict=True)]
    return _Image(layers, _config(config, architecture, files.shown), digest)


def _choose(manifests: list[dict[str, Any]], architecture: str, shown: str) -> str:
    """The digest of the manifest for a guest: the only one, or the first for its platform."""
    platforms = []
    for manifest in manifests:
        platform = _of(manifest, "platform", dict)
        platforms.append(f"{platform.get('os')}/{platform.get('architecture')}")
    fitting = [one for one, platform in zip(manifests, platforms, strict=True) if platform == f"linux/{architecture}"]
    if not fitting and len(manifests) == 1:
        fitting = manifests
    if not fitting:
        raise ImageError(f"{shown} has no image for linux/{architecture}, but {', '.join(platforms) or 'none at all'}")
    return _sha256(_of(fitting[0], "digest", str))


def _read_docker(files: Files, architecture: str) -> _Image:
    with files.open("manifest.json") as stream:
        manifests = _json(stream, "manifest.json")
    if not isinstance(manifests, list) or not manifests or not isinstance(manifests[0], dict):
        raise Malformed(f"{files.shown}: manifest.json names no image")
    if len(manifests) > 1:
        names = ", ".join(str((_list_of_str(one, "RepoTags") or ["?"])[0]) for one in manifests)
        raise ImageError(f"{files.shown} has several images ({names}); save one at a time")
    with files.open(_of(manifests[0], "Config", str)) as stream:
        config = _document(stream, "the image's configuration")
    members = _list_of_str(manifests[0], "Layers")
    contents = _contents(config, len(members), files.shown)
    layers = [_Layer(member, "", content) for member, content in zip(members, contents, strict=True)]
    return _Image(layers, _config(config, architecture, files.shown), digest_of(config))


def _contents(config: dict[str, Any], count: int, shown: str) -> list[str]:
    """The digests of the layers' contents."""
    found = [_sha256(one) for one in _list_of_str(_of(config, "rootfs", dict), "diff_ids")]
    if len(found) != count:
        raise Malformed(f"{shown}: {count} layers, and {len(found)} in the image's configuration")
    return found


def _config(document: dict[str, Any], architecture: str, shown: str) -> Config:
    if document.get("architecture", architecture) != architecture or document.get("os", "linux") != "linux":
        raise ImageError(
            f"{shown} is for {document.get('os')}/{document.get('architecture')}, the guest for linux/{architecture}"
        )
    said = _of(document, "config", dict)
    entrypoint, command = _list_of_str(said, "Entrypoint"), _list_of_str(said, "Cmd")
    return Config(
        entrypoint=tuple(entrypoint),
        command=tuple(command) if command or entrypoint else SHELL,
        env=tuple(_list_of_str(said, "Env")),
        user=_of(said, "User", str),
        workdir=_of(said, "WorkingDir", str) or "/",
    )


def _fetch(files: Files, layer: _Layer, target: Path) -> None:
    """A layer's contents in a file of its own, checked."""
    with files.open(layer.name) as source:
        if layer.digest and layer.name:
            check(sha256_of(source), layer.digest, layer.name)
            source.seek(0)
        contents = unpack(source, target, layer.name)
    if layer.contents:
        check(contents, layer.contents, f"{layer.name}, unpacked,")


def _blob(files: Files, digest: str) -> dict[str, Any]:
    name = f"blobs/sha256/{digest}"
    with files.open(name) as stream:
        check(sha256_of(stream), digest, name)
        stream.seek(0)
        return _document(stream, name)


def _sha256(digest: str) -> str:
    found = DIGEST.fullmatch(digest)
    if not found:
        raise Malformed(f"{digest[:80]!r} is no digest of the kind sha256")
    return found[1]


def _json(stream: IO[bytes], what: str) -> Any:
    data = stream.read(LARGEST_DOCUMENT + 1)
    try:
        if len(data) > LARGEST_DOCUMENT:
            raise ValueError(f"more than {LARGEST_DOCUMENT} bytes")
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise Malformed(f"{what} is no JSON document: {error}") from error


def _document(stream: IO[bytes], what: str) -> dict[str, Any]:
    with stream:
        document = _json(stream, what)
    if not isinstance(document, dict):
        raise Malformed(f"{what} is no JSON object")
    return document


def _of(document: dict[str, Any], name: str, kind: type) -> Any:
    """A field, or nothing of its kind where there is none."""
    value = document.get(name)
    if value is None:
        return kind()
    if not isinstance(value, kind):
        raise Malformed(f"{name} is to be of the type {kind.__name__}")
    return value


def _objects(document: dict[str, Any], name: str) -> list[dict[str, Any]]:
    found = _of(document, name, list)
    if not all(isinstance(one, dict) for one in found):
        raise Malformed(f"{name} is to be a list of objects")
    return list(found)


def _list_of_str(document: dict[str, Any], name: str) -> list[str]:
    found = _of(document, name, list)
    if not all(isinstance(one, str) for one in found):
        raise Malformed(f"{name} is to be a list of strings")
    return list(found)
