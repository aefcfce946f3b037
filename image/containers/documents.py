"""Read the JSON documents of container images: verified by digest, size-limited, with type-checked fields.

Sources: OCI image specification, image-index.md, manifest.md and config.md; moby, image/tarexport (manifest.json).
"""

from __future__ import annotations

import json
import os
import posixpath
import re
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from errno import ELOOP
from typing import IO, Any, Protocol

from caisson.image.containers.archives import check, sha256_of
from caisson.image.errors import ImageError
from caisson.image.formats.beneath import Beneath
from caisson.image.formats.tree import Malformed

DIGEST = re.compile(r"sha256:([0-9a-f]{64})")

#: Maximum nesting of indexes, and manifests of an image.
MAX_INDEXES = 4
MAX_MANIFESTS = 1000

#: Maximum bytes of a document, and values in it: each takes up to a hundred bytes of memory.
MAX_DOCUMENT = 4 << 20
MAX_VALUES = 1 << 18

#: Kinds of manifests in an index, Docker's and OCI's; other descriptors are not images.
MANIFESTS = re.compile(
    r"application/vnd\.(oci\.image\.(manifest|index)\.v1|docker\.distribution\.manifest(\.list)?\.v2)\+json"
)

#: Go's names of architectures, by the kernel's names, which some tools write.
ARCHITECTURES = {"x86_64": "amd64", "x86-64": "amd64", "aarch64": "arm64"}

#: The default command.
SHELL = ("/bin/sh",)

#: Annotations that name an image in an index: OCI's, and containerd's.
NAMES = ("io.containerd.image.name", "org.opencontainers.image.ref.name")


class ImageFiles(Protocol):
    """The files of an image by name."""

    shown: str

    def has(self, name: str) -> bool: ...

    def open(self, name: str) -> IO[bytes]: ...


@dataclass(frozen=True)
class Config:
    """What an image runs; ``user`` is USER[:GROUP], by name or number."""

    entrypoint: tuple[str, ...] = ()
    command: tuple[str, ...] = SHELL
    env: tuple[str, ...] = ()
    user: str = ""
    workdir: str = "/"
    volumes: tuple[str, ...] = ()

    def words(self, given: Sequence[str]) -> list[str]:
        """Return the program and its arguments; ``given`` replaces the image's command."""
        return [*self.entrypoint, *(given or self.command)]


@dataclass(frozen=True)
class Layer:
    """``name`` in the image's files; the digests of the file and of its contents, empty if unknown."""

    name: str
    digest: str
    contents: str


@dataclass(frozen=True)
class ContainerImage:
    """A selected image: its layers, lowest first, a digest that identifies it, and its names."""

    layers: list[Layer]
    config: Config
    identity: str
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Candidate:
    """``indexes`` are the digests of the nested indexes that lead to it."""

    digest: str
    names: tuple[str, ...]
    manifest: dict[str, Any]
    config: dict[str, Any]
    variant: str
    indexes: tuple[str, ...] = ()


def read_layout(files: ImageFiles, architecture: str, tag: str) -> ContainerImage:
    """Select an image from an OCI image layout.  Raises ImageError."""
    index = _document(files.open("index.json"), "index.json")
    return _choose(list(_candidates(files, index, (), (), [0])), files, architecture, tag, "blobs/sha256/{}")


def read_directory(files: ImageFiles, architecture: str) -> ContainerImage:
    """Read skopeo's `dir:`: a manifest, and blobs named by their digests.  Raises ImageError."""
    manifest = _document(files.open("manifest.json"), "manifest.json")
    _check_manifest(manifest, "manifest.json")
    name = _sha256(_of(_of(manifest, "config", dict), "digest", str))
    config = _checked(files, name, name)
    return _image(_Candidate(name, (), manifest, config, ""), files, architecture, "{}")


def _candidates(
    files: ImageFiles, index: dict[str, Any], names: tuple[str, ...], above: tuple[str, ...], seen: list[int]
) -> Iterator[_Candidate]:
    """Yield the images of an index and nested ones, without attestations and signatures."""
    if len(above) >= MAX_INDEXES:
        raise Malformed(f"{files.shown}: more than {MAX_INDEXES} nested indexes")
    if "layers" in index or "config" in index:
        raise Malformed(f"{files.shown}: ambiguous: an index and a manifest in one document")
    for descriptor in _objects(index, "manifests"):
        seen[0] += 1
        if seen[0] > MAX_MANIFESTS:
            raise Malformed(f"{files.shown}: more than {MAX_MANIFESTS} manifests")
        annotations = _of(descriptor, "annotations", dict)
        platform = _of(descriptor, "platform", dict)
        if "vnd.docker.reference.type" in annotations or platform.get("os") == "unknown":
            continue
        kind = _of(descriptor, "mediaType", str)
        if kind and not MANIFESTS.fullmatch(kind):
            continue
        digest = _sha256(_of(descriptor, "digest", str))
        own = tuple(str(annotations[key]) for key in NAMES if annotations.get(key)) or names
        if not files.has(f"blobs/sha256/{digest}"):
            # Often only one of several platforms or tags was copied.
            yield _Candidate(digest, own, {}, platform, str(platform.get("variant") or ""), above)
            continue
        document = _checked(files, f"blobs/sha256/{digest}", digest)
        if "manifests" in document:
            yield from _candidates(files, document, own, (*above, digest), seen)
            continue
        _check_manifest(document, digest)
        if not _is_image(document, descriptor):
            continue
        config = _sha256(_of(_of(document, "config", dict), "digest", str))
        contents = _checked(files, f"blobs/sha256/{config}", config)
        yield _Candidate(digest, own, document, {**contents, **platform}, str(platform.get("variant") or ""), above)


def _check_manifest(document: dict[str, Any], what: str) -> None:
    """Reject what two tools would read as different images (CVE-2021-41190), and what is not a manifest."""
    if "manifests" in document:
        raise Malformed(f"{what}: ambiguous: an index and a manifest in one document")
    if "layers" not in document:
        raise Malformed(f"{what}: no image manifest: it has no layers (of Docker's first version?)")


def _is_image(manifest: dict[str, Any], descriptor: dict[str, Any]) -> bool:
    if manifest.get("artifactType") or descriptor.get("artifactType"):
        return False
    kinds = [_of(layer, "mediaType", str) for layer in _objects(manifest, "layers")]
    return all(not kind or ".tar" in kind or "diff" in kind for kind in kinds)


def _choose(candidates: list[_Candidate], files: ImageFiles, architecture: str, tag: str, place: str) -> ContainerImage:
    """Select the image of a tag for a guest: the only one that fits; several are listed in the error."""
    shown = files.shown
    if tag:
        named = [one for one in candidates if _is_called(one, tag)]
        if not named:
            raise ImageError(f"{shown}: no image {tag!r}; it has {_listed(candidates)}")
        candidates = named
    fitting = [one for one in candidates if _platform(one.config, architecture) == f"linux/{architecture}"]
    if not fitting:
        has = ", ".join(dict.fromkeys(_platform(one.config, architecture) for one in candidates)) or "none at all"
        raise ImageError(f"{shown}: no image for linux/{architecture}; it has {has}")
    fitting = [one for one in fitting if one.manifest] or fitting
    distinct = {one.digest: one for one in fitting}
    if len(distinct) > 1:  # among variants (amd64/v3), the one that runs everywhere
        least = min(one.variant for one in distinct.values())
        distinct = {digest: one for digest, one in distinct.items() if one.variant == least}
    if len(distinct) > 1:
        raise ImageError(f"{shown}: several images: {_listed(fitting)}; choose one with PATH:TAG or --tag")
    (chosen,) = distinct.values()
    if not chosen.manifest:
        raise Malformed(f"{shown} lacks {place.format(chosen.digest)}")
    image = _image(chosen, files, architecture, place)
    names = tuple(dict.fromkeys(name for one in candidates if one.digest == chosen.digest for name in one.names))
    return ContainerImage(image.layers, image.config, image.identity, names)


def _is_called(candidate: _Candidate, tag: str) -> bool:
    digest = tag.removeprefix("@").removeprefix("sha256:")
    if len(digest) >= 12 and any(one.startswith(digest) for one in (candidate.digest, *candidate.indexes)):
        return True
    return any(tag == name or tag == name.rpartition("/")[2].rpartition(":")[2] for name in candidate.names)


def _listed(candidates: Sequence[_Candidate]) -> str:
    shown = dict.fromkeys(", ".join(one.names[-1:]) or f"sha256:{one.digest[:12]}" for one in candidates)
    return ", ".join(list(shown)[:20]) or "none"


def _platform(document: dict[str, Any], architecture: str) -> str:
    """Return OS/ARCHITECTURE in Go's names; missing values are the guest's."""
    said = _of(document, "architecture", str) or architecture
    system = (_of(document, "os", str) or "linux").lower()
    return f"{system}/{ARCHITECTURES.get(said.lower(), said)}"


def _image(candidate: _Candidate, files: ImageFiles, architecture: str, place: str) -> ContainerImage:
    shown = files.shown
    blobs = [_sha256(_of(layer, "digest", str)) for layer in _objects(candidate.manifest, "layers")]
    if any("encrypted" in _of(layer, "mediaType", str) for layer in _objects(candidate.manifest, "layers")):
        raise ImageError(f"{shown}: encrypted layers; decrypt the image first, with skopeo copy --decryption-key")
    contents = _contents(candidate.config, len(blobs), shown)
    layers = [Layer(place.format(blob), blob, content) for blob, content in zip(blobs, contents, strict=True)]
    for layer, described in zip(layers, _objects(candidate.manifest, "layers"), strict=True):
        urls = _strings(described, "urls")
        if urls and not files.has(layer.name):
            raise ImageError(f"{shown}: the layer {layer.name} is not in the image; download it from {urls[0]}")
    return ContainerImage(layers, _config(candidate.config, architecture, shown), candidate.digest)


def read_docker(files: ImageFiles, architecture: str, tag: str, identify: Any) -> ContainerImage:
    """Select an image from the output of `docker save`; ``identify`` digests its configuration.  Raises ImageError."""
    with files.open("manifest.json") as stream:
        manifests = _json(stream, "manifest.json")
    if not isinstance(manifests, list) or not manifests or not all(isinstance(one, dict) for one in manifests):
        raise Malformed(f"{files.shown}: manifest.json names no image")
    named = [(one, tuple(_strings(one, "RepoTags"))) for one in manifests]
    if tag:
        chosen = [
            one for one in named if any(tag in (name, name.rpartition("/")[2].rpartition(":")[2]) for name in one[1])
        ]
    else:
        chosen = named
    names = ", ".join(tags[0] if tags else "?" for _, tags in named)
    if not chosen:
        raise ImageError(f"{files.shown}: no image {tag!r}; it has {names}")
    if len({_of(one, "Config", str) for one, _ in chosen}) > 1:
        raise ImageError(f"{files.shown}: several images: {names}; choose one with PATH:TAG or --tag")
    manifest, tags = chosen[0]
    config = _document(files.open(_of(manifest, "Config", str)), "the image's configuration")
    members = _strings(manifest, "Layers")
    contents = _contents(config, len(members), files.shown)
    layers = [Layer(member, "", content) for member, content in zip(members, contents, strict=True)]
    return ContainerImage(layers, _config(config, architecture, files.shown), identify(config), tags)


def _contents(config: dict[str, Any], count: int, shown: str) -> list[str]:
    """Return the digests of the layers' contents."""
    found = [_sha256(one) for one in _strings(_of(config, "rootfs", dict), "diff_ids")]
    if len(found) != count:
        raise Malformed(f"{shown}: {count} layers, and {len(found)} in the image's configuration")
    return found


def _config(document: dict[str, Any], architecture: str, shown: str) -> Config:
    if (platform := _platform(document, architecture)) != f"linux/{architecture}":
        raise ImageError(f"{shown}: an image for {platform}; the guest is linux/{architecture}")
    said = _of(document, "config", dict)
    entrypoint, command = _words(said, "Entrypoint"), _words(said, "Cmd")
    return Config(
        entrypoint=tuple(entrypoint),
        command=tuple(command) if command or entrypoint else SHELL,
        env=tuple(variable for variable in _strings(said, "Env") if "=" in variable),  # as in docker: others are unset
        user=_string(_of(said, "User", str), "User"),
        workdir=_absolute(_string(_of(said, "WorkingDir", str), "WorkingDir")),
        volumes=tuple(sorted(_absolute(_string(one, "Volumes")) for one in _of(said, "Volumes", dict))),
    )


def _absolute(path: str) -> str:
    """Return a path as engines interpret it: absolute, with "." and ".." resolved."""
    return "/" + posixpath.normpath(f"/{path}").lstrip("/")


def read_bundle(bundle: Beneath) -> dict[str, Any]:
    """Return the configuration of a bundle, which must be a regular file.  Raises Malformed, OSError."""
    try:
        stream = os.fdopen(bundle.open(b"config.json"), "rb")
    except OSError as error:
        if error.errno != ELOOP:
            raise
        raise Malformed("config.json: not a regular file; copy it into the bundle") from None
    with stream:
        if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
            raise Malformed("config.json: not a regular file; copy it into the bundle")
        return _document(stream, "config.json")


def root_of(bundle: dict[str, Any]) -> str:
    """Return root.path of a bundle's configuration.  Raises Malformed."""
    return _string(_of(_of(bundle, "root", dict), "path", str), "root.path") or "rootfs"


def _checked(files: ImageFiles, name: str, digest: str) -> dict[str, Any]:
    with files.open(name) as stream:
        check(sha256_of(stream), digest, name)
        stream.seek(0)
        return _document(stream, name)


def _sha256(digest: str) -> str:
    found = DIGEST.fullmatch(digest)
    if not found:
        raise Malformed(f"{digest[:80]!r} is not a sha256 digest")
    return found[1]


def _json(stream: IO[bytes], what: str) -> Any:
    data = stream.read(MAX_DOCUMENT + 1)
    try:
        if len(data) > MAX_DOCUMENT:
            raise ValueError(f"more than {MAX_DOCUMENT} bytes")
        if sum(map(data.count, (b",", b"[", b"{", b":"))) > MAX_VALUES:
            raise ValueError(f"more than {MAX_VALUES} values")
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise Malformed(f"{what} is not valid JSON: {error}") from error


def _document(stream: IO[bytes], what: str) -> dict[str, Any]:
    with stream:
        document = _json(stream, what)
    if not isinstance(document, dict):
        raise Malformed(f"{what} is not a JSON object")
    return document


def _of(document: dict[str, Any], name: str, kind: type) -> Any:
    """Return a field; empty if missing."""
    value = document.get(name)
    if value is None:
        return kind()
    if not isinstance(value, kind):
        raise Malformed(f"{name} must be of the type {kind.__name__}")
    return value


def _objects(document: dict[str, Any], name: str) -> list[dict[str, Any]]:
    found = _of(document, name, list)
    if not all(isinstance(one, dict) for one in found):
        raise Malformed(f"{name} must be a list of objects")
    return list(found)


def _strings(document: dict[str, Any], name: str) -> list[str]:
    found = _of(document, name, list)
    if not all(isinstance(one, str) for one in found):
        raise Malformed(f"{name} must be a list of strings")
    return [_string(one, name) for one in found]


def _words(document: dict[str, Any], name: str) -> list[str]:
    """Return a program's arguments; a string is a single one, as in docker."""
    value = document.get(name)
    return _strings({name: [value]} if isinstance(value, str) else document, name)


def _string(value: str, name: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError:
        raise Malformed(f"{name}: {value[:40]!r}: not a string of characters") from None
    if "\0" in value:
        raise Malformed(f"{name}: {value[:40]!r}: with a NUL")
    return value
