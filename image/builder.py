"""Building an image: the steps, each kept in the cache by the digest of what it reads.

base        packages, wheels and container rootfs, pruned and compiled    (minutes old, or years: changes rarely)
kernel      the kernel and its modules
images      the whole image: base + kernel + agent + nsexec + manifest    (after every change of the agent: seconds)
"""

from __future__ import annotations

import io
import json
import shutil
import sys
import tempfile
import tomllib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jinja2

from image import apt, initrd, manifest, rootfs
from image.cache import Cache, default_root, digest_of, digest_of_files
from image.definition import DEFAULT, TEMPLATES, load
from image.errors import ImageError
from image.fragments import Request, merge, parse
from image.kernel import Kernel, Prebuilt
from image.run import run

ROOT = Path(__file__).resolve().parent.parent

#: How many results of each step are kept; those used longest ago go when a new image is made.
KEEP = {"images": 4, "base": 2, "kernel": 2}


class SourcesChanged(ImageError):
    """Someone is editing."""


@dataclass(frozen=True)
class Image:
    """A built image: ``directory`` holds the kernel, the initrd and image.json."""

    directory: Path
    manifest: dict[str, Any]

    @classmethod
    def load(cls, directory: Path) -> Image:
        """An image that was built before.  Raises ImageError when the directory holds none."""
        try:
            document = json.loads((directory / "image.json").read_text())
        except (OSError, ValueError) as error:
            raise ImageError(f"{directory} holds no image: {error}; make one: invoke build-image") from error
        if document.get("format") != manifest.FORMAT:
            raise ImageError(f"the image in {directory} has another format; build it again: invoke build-image")
        return cls(directory.resolve(), document)


def build(
    definition: Path | None = None,
    *,
    suite: str | None = None,
    cache: Cache | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> Image:
    """The image of a definition: from the cache when nothing that goes into it has changed, else built.

    ``report`` gets a line for each step that takes time.  Raises ImageError; whatever happens, the cache holds only
    whole results.
    """
    return _Build(definition or DEFAULT, suite, cache or Cache(default_root()), report).image()


def agent_files() -> list[Path]:
    """The sources that go into a guest: the agent without its host side, and the compiled protocol.

    Raises ImageError when the protocol is not compiled yet.
    """
    protocol = sorted((ROOT / "proto").glob("*_pb2.py"))
    if not protocol:
        raise ImageError(f"{ROOT / 'proto'} is not compiled; run: python -m proto.generate")
    agent = [
        file for file in (ROOT / "agent").rglob("*.py") if file.relative_to(ROOT).parts[1] not in ("client", "nsexec")
    ]
    return sorted([*agent, ROOT / "proto/__init__.py", *protocol])


def agent_version() -> str:
    """The version of the agent, which is that of the whole project."""
    return str(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"])


class _Build:
    def __init__(self, file: Path, suite: str | None, cache: Cache, report: Callable[[str], None]) -> None:
        self.definition, self.template = load(file, suite=suite)
        self.cache = cache
        self.report = report
        self.fragment_files = [TEMPLATES / "kernel" / f"{name}.conf" for name in self.definition.kernel.fragments]
        self.requests: list[Request] = merge(parse(file) for file in self.fragment_files)
        # What the steps do is in these modules; a change there is a change of what they make.
        builder = sorted((ROOT / "image").glob("*.py"))
        self.builder = digest_of_files(ROOT, builder)
        self.files = [file for file in (self.template / "files").rglob("*.j2") if file.is_file()]
        self._apt: apt.Apt | None = None

    def image(self) -> Image:
        directory = self.cache.get("images", self.key())
        if directory is None:
            try:
                directory = self._made()
            except SourcesChanged:  # what takes long is in the cache by now
                directory = self._made()
            for step, keep in KEEP.items():
                self.cache.trim(step, keep)
        return Image.load(directory)

    def _made(self) -> Path:
        key = self.key()
        return self.cache.get_or_make("images", key, lambda target: self._make_image(key, target))

    def key(self) -> str:
        """The digest of all that goes into the image."""
        nsexec = [path for path in (ROOT / "agent/nsexec").iterdir() if path.is_file()]
        return digest_of(
            "image", asdict(self.definition), self.base_key(), self.kernel_key(), agent_version(),
            digest_of_files(ROOT, agent_files()),
            digest_of_files(ROOT, nsexec),
            digest_of_files(self.template, self.files),
        )  # fmt: skip

    def apt(self) -> apt.Apt:
        """apt for the suite, with a fresh index."""
        if self._apt is None:
            d = self.definition
            place = self.cache.root / "apt" / f"{d.suite}-{d.arch}"
            self._apt = apt.Apt(place, d.suite, d.arch, apt.host_mirror())
            self._apt.update()
        return self._apt

    def base_key(self) -> str:
        d = asdict(self.definition)
        inputs = {
            name: d[name]
            for name in ("suite", "arch", "python", "packages", "wheels", "busybox", "sources", "prune", "keep")
        }
        etc = list((TEMPLATES / "busybox/etc").iterdir())
        return digest_of("base", inputs, self.builder, digest_of_files(TEMPLATES, etc))

    def kernel_key(self) -> str:
        d = self.definition
        requests = [asdict(request) for request in self.requests]
        return digest_of("kernel", d.suite, d.arch, d.kernel.package, requests, self.builder)

    def base(self) -> Path:
        return self.cache.get_or_make("base", self.base_key(), self._make_base)

    def _make_base(self, target: Path) -> None:
        d = self.definition
        self.report(f"fetching packages of {d.suite}")
        tree = target / "tree"
        rootfs.skeleton(tree)
        debs = self.apt().fetch_all(d.packages)
        apt.extract(debs, tree)
        self.report("fetching wheels")
        wheels = rootfs.fetch_wheels(Path(sys.executable), d, target / "wheels")
        rootfs.unpack_wheels(wheels, tree / rootfs.HOME)
        shutil.rmtree(target / "wheels")
        self.report("pruning and compiling")
        rootfs.prune(tree, d.prune, d.keep)
        rootfs.drop_unused_libraries(tree, d)
        rootfs.strip(tree)
        for place in (f"usr/lib/python{d.python}", rootfs.HOME):
            rootfs.compile_python(tree, d, tree / place, prefix=tree)
        busybox = self.apt().fetch([d.busybox])
        with tempfile.TemporaryDirectory(dir=target) as scratch:
            apt.extract(busybox, Path(scratch))
            container = tree / rootfs.HOME / "containers/busybox"
            rootfs.busybox_rootfs(Path(scratch), container, TEMPLATES / "busybox/etc")
        records = [package.record() for package in (*debs, *busybox, *wheels)]
        (target / "packages.json").write_text(json.dumps(records))

    def kernel(self) -> Kernel:
        return Kernel.load(self.cache.get_or_make("kernel", self.kernel_key(), self._make_kernel))

    def _make_kernel(self, target: Path) -> None:
        self.report(f"fetching {self.definition.kernel.package}")
        Prebuilt(self.apt(), self.definition.kernel.package).make(target, self.requests)

    def _make_image(self, key: str, target: Path) -> None:
        d = self.definition
        base, kernel = self.base(), self.kernel()
        self.report("packing the image")
        with tempfile.TemporaryDirectory(dir=target) as scratch:
            layer = Path(scratch)
            self._make_layer(layer)
            packages = [*json.loads((base / "packages.json").read_text()), *kernel.packages]
            document = manifest.contents(d, key, kernel, packages, agent_version())
            manifest.write(document, layer / rootfs.HOME / "image.json")
            place = layer / "usr/lib/modules"
            place.mkdir(parents=True)
            for file in (kernel.directory / "modules").iterdir():
                shutil.copy(file, place / file.name)
            lines = [
                " ".join([name, *(f"/lib/modules/{file}" for file in files)]) for name, files in kernel.later.items()
            ]
            (place / "caisson.later").write_text("".join(f"{line}\n" for line in lines))
            (place / "caisson.list").write_text("".join(f"/lib/modules/{name}\n" for name in kernel.modules))
            archive = io.BytesIO()
            initrd.write_cpio(archive, initrd.overlaid([base / "tree", layer], [initrd.CONSOLE]))
        packed = initrd.pack(archive.getvalue(), d.compression)
        (target / "initrd.img").write_bytes(packed)
        (target / "vmlinux").hardlink_to(kernel.file)
        manifest.write(manifest.with_initrd(document, packed, d.compression), target / "image.json")
        if self.key() != key:
            raise SourcesChanged("the agent's sources changed while the image was built from them; build it again")

    def _make_layer(self, layer: Path) -> None:
        """What changes with our own sources: the agent, nsexec, and the template's files."""
        d = self.definition
        home = layer / rootfs.HOME
        for source in agent_files():
            place = home / source.relative_to(ROOT)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, place)
        rootfs.compile_python(self.base() / "tree", d, home, prefix=layer)
        run(["make", "-s", "-C", ROOT / "agent/nsexec", f"BUILD={layer / 'build'}"])
        shutil.move(layer / "build/nsexec", home / "nsexec")
        shutil.rmtree(layer / "build")
        for source in self.files:
            text = jinja2.Template(source.read_text(), undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
            place = layer / source.relative_to(self.template / "files").with_suffix("")
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_text(text.render(asdict(d)))
            place.chmod(0o755 if place.read_text().startswith("#!") else 0o644)
