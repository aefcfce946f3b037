"""Turn container images, in all common forms, into disks for a guest.

    an OCI image layout, a directory or a tar archive of one     (image-layout.md)
    what `docker save` writes: a tar archive with manifest.json   (moby, image/tarexport)
    what skopeo writes to `dir:PATH`                               (containers-transports(5))
    an OCI bundle: a directory with config.json                   (OCI runtime specification, bundle.md)
    a root file system: a directory, or a tar archive
    a name: of an image that was packed before, or in a registry, fetched by skopeo(1)

Everything named by a digest is verified, layers also by the digest of their contents.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from caisson.image.build.cache import Cache, default_root, digest_of, size_limit
from caisson.image.containers import documents, store
from caisson.image.containers.archives import (
    Archive,
    Budget,
    Directory,
    Whole,
    check,
    ensure_uncompressed,
    sha256_of,
    unpack,
)
from caisson.image.containers.documents import Config, ContainerImage, ImageFiles, Layer
from caisson.image.containers.layers import LayerMerger
from caisson.image.errors import ImageError
from caisson.image.formats.beneath import Beneath
from caisson.image.formats.scan import from_directory
from caisson.image.formats.squashfs import write_squashfs
from caisson.image.formats.tree import Malformed, Tree
from caisson.image.programs import which
from caisson.image.run import run

#: Default maximum bytes of data in an image (or half of the free disk, if less); maximum size of one file, with its
#: holes.
MAX_SIZE = 16 << 30
MAX_FILE = 1 << 40

#: Disks of images are cached; bump VERSION when the same image must produce a different disk.
STEP = store.STEP
VERSION = 2

#: A root file system has at least one of these.
ROOT_MARKS = ("bin", "sbin", "usr", "etc", "lib", "proc")

#: Prefixes that name the kind of an image (containers-transports(5)).
TRANSPORTS = ("oci", "oci-archive", "docker-archive", "dir")

#: Seconds until progress is reported, and maximum lines about dropped files.
PROGRESS_INTERVAL = 2.0
MAX_WARNINGS = 10

Report = Callable[[str], None]


@dataclass(frozen=True)
class Packed:
    """An image as a disk: ``name`` identifies the contents; empty for a directory's.

    ``bundle`` is the whole configuration of a bundle.
    """

    disk: Path
    name: str
    config: Config
    bundle: dict[str, Any] = field(default_factory=dict)


@contextlib.contextmanager
def pack_image(
    source: str | Path,
    architecture: str,
    cache: Cache | None = None,
    *,
    tag: str = "",
    max_size: int | None = None,
    report: Report = lambda line: None,
) -> Iterator[Packed]:
    """Pack an image of any form as a read-only disk (squashfs), which may disappear after the block unless it is
    cached.

    ``architecture`` is the guest's, by Go's and Debian's name: amd64.  ``tag`` selects one of several images; so does
    PATH:TAG.  ``max_size`` bounds the bytes of data.  ``report`` gets lines about slow steps and dropped files.  Raises
    ImageError; Malformed for an image that is damaged, too large, or escapes its root.
    """
    cache = cache or Cache(default_root())
    with cache.scratch(STEP) as scratch:
        packer = _Packer(str(source), architecture, cache, scratch, tag, max_size, report)
        try:
            image = packer.pack()
        except OSError as error:
            raise ImageError(f"{source}: {error.strerror or error}") from error
        yield image


def find_image(source: str, tag: str = "", cache: Cache | None = None) -> tuple[Path | store.Stored | str, str]:
    """Find the image that a source names, and its tag: a path, with a transport or a tag; a stored one; or the name of
    one to be pulled.  Raises ImageError.
    """
    kind, colon, rest = source.partition(":")
    if source.startswith("docker:/"):
        source = rest.lstrip("/")
    else:
        if colon and kind in TRANSPORTS and not Path(source).exists():
            source = rest
        if Path(source).exists():
            return Path(source), tag
        for separator in reversed([*re.finditer("@(?=sha256:)|:", source)]):  # a name may have a port and a tag
            path = Path(source[: separator.start()])
            if path.exists():
                return path, tag or source[separator.end() :]
        if (stored := store.find(cache or Cache(default_root()), source)) is not None:
            return stored, tag
        if source.startswith(("/", "./", "../")) or not store.NAME.fullmatch(source) or kind in TRANSPORTS:
            raise ImageError(f"{source}: no such image; name a file, a directory, or a stored image")
    if which("skopeo") is None:
        raise ImageError(f"{source}: no file or stored image of this name; to pull it: sudo apt-get install skopeo")
    return source, ""


class _Packer:
    def __init__(
        self,
        source: str,
        architecture: str,
        cache: Cache,
        scratch: Path,
        tag: str,
        max_size: int | None,
        report: Report,
    ) -> None:
        self._source = source
        self._architecture = architecture
        self._cache = cache
        self._scratch = scratch
        self._tag = tag
        self._report = report
        self._max_size = max_size or min(MAX_SIZE, shutil.disk_usage(scratch).free // 2)
        self._progress = _Progress(source, report)

    def pack(self) -> Packed:
        place, self._tag = find_image(self._source, self._tag, self._cache)
        if isinstance(place, str):
            place = self._pull(place)
        if isinstance(place, store.Stored):
            return Packed(place.disk, place.id, Config(**place.config))
        if not place.is_dir():
            return self._archive(place)
        if (place / "oci-layout").exists():
            return self._finish(
                Directory(place), documents.read_layout(Directory(place), self._architecture, self._tag)
            )
        if os.path.lexists(place / "config.json"):
            return self._bundle(place)
        if (place / "version").is_file() and (place / "manifest.json").is_file():
            return self._finish(Directory(place), documents.read_directory(Directory(place), self._architecture))
        if not any(os.path.lexists(place / name) for name in ROOT_MARKS):
            kinds = "an OCI layout, skopeo's dir:, a bundle or a root file system"
            raise ImageError(f"{place}: not an image; expected {kinds} (which has one of {', '.join(ROOT_MARKS)})")
        return Packed(self._packed_directory(place), "", Config())

    def _pull(self, name: str) -> Path:
        self._report(f"pulling {name}")
        layout = self._scratch / "pulled"
        platform = ["--override-os", "linux", "--override-arch", self._architecture]
        run(["skopeo", *platform, "copy", "--quiet", f"docker://{name}", f"oci:{layout}:{name}"])
        return layout

    def _archive(self, path: Path) -> Packed:
        archive = ensure_uncompressed(path, self._scratch / "archive", Budget(self._max_size, self._progress.advance))
        with Archive.of(archive, str(path)) as files:
            if files.has("oci-layout"):
                return self._finish(files, documents.read_layout(files, self._architecture, self._tag))
            if files.has("manifest.json"):
                image = documents.read_docker(files, self._architecture, self._tag, digest_of)
                return self._finish(files, image)
            if instead := files.misplaced():
                raise ImageError(f"{path}: not an image; {instead}")
        if not archive.stat().st_size:
            raise Malformed(f"{path}: not a tar archive: it is empty")
        whole = Whole(archive)
        with whole.open("") as stream:
            digest = sha256_of(stream)
        return self._finish(whole, ContainerImage([Layer("", "", digest)], Config(), digest))

    def _bundle(self, place: Path) -> Packed:
        with Beneath.of(place) as bundle:
            document = documents.read_bundle(bundle)
            root = open_root(bundle, place, documents.root_of(document))
        return Packed(self._packed_directory(root), "", Config(), document)

    def _packed_directory(self, root: Path | Beneath) -> Path:
        disk = self._scratch / "disk"
        with from_directory(root) as tree, self._warnings() as warn:
            write_squashfs(tree, disk, warn, Budget(self._max_size, self._progress.advance).take)
        return disk

    def _finish(self, files: ImageFiles, image: ContainerImage) -> Packed:
        """Return the disk of an image: cached, or created now."""
        key = digest_of(VERSION, image.identity)
        made = self._cache.get_or_make(STEP, key, lambda target: self._make(files, image, target))
        stem = Path(files.shown).name.partition(".")[0]
        names = [name if "/" in name or ":" in name else f"{stem}:{name}" for name in image.names] or [stem]
        store.remember(self._cache, key, map(store.with_tag, names))
        self._cache.trim(size_limit())
        return Packed(made / "disk", key, image.config)

    def _make(self, files: ImageFiles, image: ContainerImage, target: Path) -> None:
        budget = Budget(self._max_size, self._progress.advance)
        with Tree() as tree, self._warnings() as warn:
            layers = LayerMerger(tree, warn, max(MAX_FILE, self._max_size))
            for number, layer in enumerate(image.layers):
                self._progress.doing = f"layer {number + 1} of {len(image.layers)}"
                file = self._scratch / f"layer-{number}"
                _fetch(files, layer, file, budget)
                layers.apply(file, layer.name or files.shown)
            for what, path in (
                ("WorkingDir", image.config.workdir),
                *(("Volumes", one) for one in image.config.volumes),
            ):
                try:
                    tree.ensure_directory(os.fsencode(path))
                except Malformed as error:
                    raise Malformed(f"{what} {error}") from error
            self._progress.doing = "the disk"
            write_squashfs(tree, target / "disk", warn, self._progress.advance)
        store.describe(target, image.config)

    @contextlib.contextmanager
    def _warnings(self) -> Iterator[Report]:
        """Pass on only the first warnings."""
        count = 0

        def warn(line: str) -> None:
            nonlocal count
            count += 1
            if count <= MAX_WARNINGS:
                self._report(line)

        yield warn
        if count > MAX_WARNINGS:
            self._report(f"… and {count - MAX_WARNINGS} more that are not kept")


class _Progress:
    """Report the progress of a long pack periodically."""

    def __init__(self, source: str, report: Report) -> None:
        self._source = source
        self._report = report
        self._said = time.monotonic()
        self._done = 0
        self.doing = "unpacking"

    def advance(self, count: int) -> None:
        self._done += count
        if time.monotonic() - self._said > PROGRESS_INTERVAL:
            self._said = time.monotonic()
            self._report(f"packing {self._source}: {self.doing}, {self._done / 1e6:.0f} MB done")


def open_root(bundle: Beneath, place: Path, path: str) -> Beneath:
    """Open root.path of a bundle at ``place``: below it, without links or "..".  Raises ImageError."""
    shown = f"{place}: root.path {path!r}"
    if path.startswith("/"):
        try:
            path = str(Path(path).relative_to(place.resolve()))
        except ValueError:
            raise ImageError(f"{shown}: outside of the bundle; copy the root file system into it") from None
    try:
        return bundle.directory(os.fsencode(path))
    except FileNotFoundError:
        raise ImageError(f"{shown}: no such directory") from None
    except (OSError, ImageError):
        raise ImageError(f"{shown}: leads through a link or '..'; name a directory below the bundle") from None


def _fetch(files: ImageFiles, layer: Layer, target: Path, budget: Budget) -> None:
    """Write a layer's contents to its own file, verified."""
    with files.open(layer.name) as source:
        if layer.digest and layer.name:
            check(sha256_of(source), layer.digest, layer.name)
            source.seek(0)
        contents = unpack(source, target, layer.name or files.shown, budget)
    if layer.contents:
        check(contents, layer.contents, f"{layer.name}, unpacked,")
