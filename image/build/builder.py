"""Build an image in steps, each cached by the digest of its inputs.

base        packages, wheels and container rootfs, pruned and compiled    (minutes old, or years: changes rarely)
native      for a guest of another architecture: the same packages for this one, to run while building
kernel      the kernel and its modules
agent       the agent and nsexec, compiled for this guest                 (after every change of the agent: a second)
images      the whole image: base + kernel + agent + the template's files + manifest
"""

from __future__ import annotations

import filecmp
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from caisson.image.build import libraries, lock, manifest, pack, rootfs, sbom, sources, treemap
from caisson.image.build.cache import Cache, default_root, digest_of, digest_of_files, size_limit, size_of
from caisson.image.build.definition import DEFAULT, TEMPLATES, Loaded, load
from caisson.image.build.template_files import TemplateFiles
from caisson.image.build.tools import HOST, Tools
from caisson.image.build.tools import PACKAGES as TOOLS
from caisson.image.errors import ImageError
from caisson.image.kernel import source as kernelsource
from caisson.image.kernel.fragments import Request, merge, parse
from caisson.image.kernel.kernel import Kernel, Prebuilt
from caisson.image.kernel.source import Compiled, SourcePackage, SourceTree
from caisson.image.packages import apt
from caisson.image.packages import contents as package_contents
from caisson.image.packages.distribution import Packages, extract, packages_of
from caisson.proto.contract import BUSYBOX_ROOTFS

#: The directory of the packages: a checkout, or the installed `caisson`.
ROOT = Path(__file__).resolve().parents[2]

#: Where Kata's tools look for an image's description.
OSBUILDER = "var/lib/osbuilder/osbuilder.yaml"

#: The modules that determine a step's result: changing one invalidates it.
PACKAGES_CODE = tuple(f"packages/{name}.py" for name in ("apk", "apk_index", "apt", "distribution", "package"))
BASE_CODE = (*PACKAGES_CODE, "packages/contents.py", "build/choices.py", "build/libraries.py", "build/rootfs.py")
KERNEL_CODE = (*PACKAGES_CODE, "kernel/bzimage.py", "kernel/kernel.py")


class SourcesChanged(ImageError):
    """The sources changed during the build: someone is editing."""


@dataclass(frozen=True)
class Image:
    """A built image: ``directory`` holds the kernel, the root and image.json."""

    directory: Path
    manifest: dict[str, Any]

    @classmethod
    def load(cls, directory: Path) -> Image:
        """Load a built image.  Raises ImageError if the directory contains none."""
        try:
            document = json.loads((directory / "image.json").read_text())
        except (OSError, ValueError) as error:
            why = (error.strerror or "").lower() if isinstance(error, OSError) else error
            raise ImageError(f"{directory}: contains no image ({why}); build one: caisson build-image") from error
        if not isinstance(document, dict) or document.get("format") != manifest.FORMAT:
            raise ImageError(f"{directory}: its image has a different format; build it again: caisson build-image")
        return cls(directory.resolve(), document)


@dataclass(frozen=True)
class StepResult:
    """The outcome of a step: the ``seconds`` it took, and the ``bytes`` of its result."""

    step: str
    key: str
    cached: bool
    seconds: float
    bytes: int


def build_image(
    definition: Path | None = None,
    *,
    suite: str | None = None,
    arch: str | None = None,
    settings: Sequence[str] = (),
    cache: Cache | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> Image:
    """Build the image of a definition, or take it from the cache if none of its inputs has changed.

    ``report`` gets a line for each step that takes time.  Raises ImageError; in any case, the cache holds only complete
    results.
    """
    loaded = load(definition or DEFAULT, suite=suite, arch=arch, settings=settings)
    return Build(loaded, cache, report).image()


def verify(loaded: Loaded, image: Image, report: Callable[[str], None] = lambda line: None) -> list[str]:
    """Rebuild a definition from its packages, and compare with an existing image.

    Returns the names of the files that differ.  The rebuild is not cached.  Raises ImageError.
    """
    root = default_root()
    with Cache(root).scratch("verify") as scratch:
        again = Build(loaded, Cache(scratch), report, downloads=root / "apt").image()
        names = {path.name for one in (image, again) for path in one.directory.iterdir() if path.name != ".used"}
        return sorted(name for name in names if not _same(image.directory / name, again.directory / name))


def _same(one: Path, another: Path) -> bool:
    return one.is_file() and another.is_file() and filecmp.cmp(one, another, shallow=False)


class Build:
    """The steps of one definition.  ``done`` lists the outcome of those executed."""

    def __init__(
        self,
        loaded: Loaded,
        cache: Cache | None = None,
        report: Callable[[str], None] = lambda line: None,
        *,
        downloads: Path | None = None,
        locked: lock.Lock | None = None,
    ) -> None:
        """``downloads`` is where packages are kept (default: in the cache); with ``locked``, other packages are
        rejected.
        """
        self.loaded = loaded
        self.definition = loaded.definition
        self.cache = cache or Cache(default_root())
        self.downloads = downloads or self.cache.root / "apt"
        self.locked = locked
        self.report = report
        self.done: list[StepResult] = []
        self.requests: list[Request] = merge(parse(self._fragment(name)) for name in self.definition.kernel.fragments)
        self._packages: dict[str, Packages] = {}
        self.template_files = TemplateFiles(loaded)  # report broken hooks before building anything

    def image(self) -> Image:
        """Build the image.  Raises ImageError, and Drift if its packages differ from the lock."""
        try:
            directory = self._made()
        except SourcesChanged:  # the slow steps are cached by now
            directory = self._made()
        if not self.done[-1].cached:
            self.cache.trim(size_limit())
        if self.locked is not None:
            lock.check(self.locked, lock.read(directory / "image.lock"))
        return Image.load(directory)

    def _made(self) -> Path:
        key = self.key()
        return self._step("images", key, lambda target: self._make_image(key, target))

    def is_cached(self) -> bool:
        """Return whether the image is cached, so that nothing has to be built."""
        return self.cache.get("images", self.key()) is not None

    def plan(self) -> list[StepResult]:
        """List the steps with their keys and whether each is cached, without building anything."""
        keys = {"base": self.base_key(), "kernel": self.kernel_key(), "agent": self.agent_key(), "images": self.key()}
        return [StepResult(step, key, self.cache.get(step, key) is not None, 0.0, 0) for step, key in keys.items()]

    def _step(self, step: str, key: str, make: Callable[[Path], None]) -> Path:
        began = time.monotonic()
        cached = self.cache.get(step, key) is not None
        result = self.cache.get_or_make(step, key, make)
        self.done.append(StepResult(step, key, cached, time.monotonic() - began, size_of(result)))
        return result

    def key(self) -> str:
        """Return the digest of all inputs of the image."""
        return digest_of(
            "image", manifest.plain(self.definition), self.base_key(), self.kernel_key(), self.agent_key(),
            _code(_image_code()),
            self.template_files.digests(),
            [digest_of_files(hook.parent, [hook]) for hook in self.template_files.hooks],
        )  # fmt: skip

    def base_key(self) -> str:
        """Return the digest of the inputs of the base: packages and wheels."""
        d = manifest.plain(self.definition)
        names = (
            "distribution", "suite", "arch", "python", "packages", "wheels", "busybox", "sources", "prune", "keep",
            "init",
        )  # fmt: skip
        etc = list((TEMPLATES / "busybox/etc").iterdir())
        return digest_of("base", {name: d[name] for name in names}, _code(BASE_CODE), digest_of_files(TEMPLATES, etc))

    def kernel_key(self) -> str:
        """Return the digest of the kernel's inputs.  A package's newest version is used once, and then kept."""
        d = self.definition
        if d.kernel.source:
            source = self._kernel_source().key(), kernelsource.compiler_version()
            # Not the reasons, or the lines they are in: compiling takes minutes.
            asked = sorted((one.symbol, one.value, one.optional, one.since, one.until) for one in self.requests)
            return digest_of("compiled", d.arch, source, asked, kernelsource.REVISION)
        requests = [asdict(request) for request in self.requests]
        return digest_of("kernel", d.distribution, d.suite, d.arch, d.kernel.package, requests, _code(KERNEL_CODE))

    def agent_key(self) -> str:
        """Return the digest of the agent's sources, and of the interpreter that compiles them."""
        return digest_of("agent layer", sources.agent_version(), self.base_key(), sources.digests())

    def _packages_of_suite(self, arch: str = "") -> Packages:
        """Return the packages of the suite, with a fresh index, for the guest's architecture or another."""
        d = self.definition
        arch = arch or d.arch
        if arch not in self._packages:
            packages = packages_of(d.distribution, self.downloads / f"{d.suite}-{arch}", d.suite, arch)
            packages.update()
            self._packages[arch] = packages
        return self._packages[arch]

    def _fragment(self, name: str) -> Path:
        return self.loaded.beside(name) if name.endswith(".conf") else TEMPLATES / "kernel" / f"{name}.conf"

    def base(self) -> Path:
        """Build the tree of packages, wheels and container rootfs."""
        return self._step("base", self.base_key(), self._make_base)

    def _make_base(self, target: Path) -> None:
        d = self.definition
        self.report(f"fetching packages of {d.suite}")
        tree = target / "tree"
        rootfs.skeleton(tree)
        debs = self._packages_of_suite().fetch_all(d.packages)
        extract(debs, tree)
        self.report("fetching wheels")
        wheels = rootfs.fetch_wheels(Path(sys.executable), d, target / "wheels", self.report)
        rootfs.unpack_wheels(wheels, tree / rootfs.HOME)
        busybox = self._packages_of_suite().fetch([d.busybox])
        licences = {package.name: package_contents.licence(package) for package in (*debs, *busybox, *wheels)}
        owners = rootfs.owners((*debs, *wheels))
        shutil.rmtree(target / "wheels")
        self.report("pruning and compiling")
        rootfs.prune(tree, d.prune, d.keep)
        wheels_elves = [file for file in sorted((tree / rootfs.HOME).rglob("*")) if libraries.is_elf(file)]
        libraries.drop_unused_needs(wheels_elves, tree / d.libraries)
        libraries.drop_unused_libraries(tree, d)
        libraries.strip(tree, d)
        interpreter = self._native() if d.is_foreign else tree
        for place in (f"usr/lib/python{d.python}", rootfs.HOME):
            rootfs.compile_python(interpreter, d.native(), tree / place, prefix=tree)
        with tempfile.TemporaryDirectory(dir=target) as scratch:
            extract(busybox, Path(scratch))
            container = tree / BUSYBOX_ROOTFS.lstrip("/")
            native = self._native() if d.is_foreign else Path(scratch)
            rootfs.busybox_rootfs(Path(scratch), container, TEMPLATES / "busybox/etc", native)
        packages = (*debs, *busybox, *wheels)
        records = [package.record() for package in packages]
        for package, record in zip(packages, records, strict=True):
            if declared := licences[package.name]:
                record["license"] = declared
        (target / "packages.json").write_text(json.dumps(records))
        (target / "owners.json").write_text(json.dumps(owners))

    def _native(self) -> Path:
        """Build the tree of the guest's packages for this machine: an interpreter to compile with, a busybox to run."""
        d = self.definition.native()
        key = digest_of("native", d.distribution, d.suite, d.arch, d.packages, d.busybox, _code(PACKAGES_CODE))
        return self._step("native", key, self._make_native) / "tree"

    def _make_native(self, target: Path) -> None:
        d = self.definition.native()
        self.report(f"fetching what runs on {d.arch} meanwhile")
        rootfs.skeleton(target / "tree")
        packages = self._packages_of_suite(d.arch)
        extract([*packages.fetch_all(d.packages), *packages.fetch([d.busybox])], target / "tree")

    def kernel(self) -> Kernel:
        """Build the kernel with the modules that the fragments name."""
        return Kernel.load(self._step("kernel", self.kernel_key(), self._make_kernel))

    def _make_kernel(self, target: Path) -> None:
        kernel = self.definition.kernel
        if kernel.source:
            Compiled(self._kernel_source(), self.definition.arch, self.report).make(target, self.requests)
        else:
            self.report(f"fetching {kernel.package}")
            Prebuilt(self._packages_of_suite(), kernel.package).make(target, self.requests)

    def _kernel_source(self) -> SourcePackage | SourceTree:
        source = self.definition.kernel.source
        if "/" in source:
            return SourceTree(Path(source).expanduser().resolve())
        return SourcePackage(self._sources, source)

    def _sources(self) -> apt.Apt:
        packages = self._packages_of_suite()
        assert isinstance(packages, apt.Apt)  # load() rejects source packages of other distributions
        return packages

    def agent(self, base: Path) -> Path:
        """Build the layer of our own sources: the agent's byte code, and nsexec."""
        return self._step("agent", self.agent_key(), lambda target: self._make_agent(base, target / "tree")) / "tree"

    def _make_agent(self, base: Path, target: Path) -> None:
        self.report("compiling the agent")
        key, d = self.agent_key(), self.definition
        home = target / rootfs.HOME
        sources.copy(home)
        rootfs.compile_python(self._native() if d.is_foreign else base / "tree", d.native(), home, prefix=target)
        shutil.copy(self._nsexec(), home / "nsexec")
        if self.agent_key() != key:
            raise SourcesChanged("the agent's sources changed while they were compiled; build it again")

    def _nsexec(self) -> Path:
        """Build nsexec, a step of its own: a change of the agent leaves it as it is."""
        d = self.definition
        key = digest_of("nsexec", d.distribution, d.suite, d.arch, sources.nsexec_digest())
        return self._step("nsexec", key, self._make_nsexec) / "nsexec"

    def _make_nsexec(self, target: Path) -> None:
        digest, d = sources.nsexec_digest(), self.definition
        with tempfile.TemporaryDirectory(dir=target) as scratch:
            musl = Path(scratch, "musl") if d.is_foreign else None
            if musl is not None:
                musl.mkdir()
                extract(self._packages_of_suite().fetch(["musl-dev"]), musl)
            sources.compile_nsexec(Path(scratch, "build"), target / "nsexec", d.triplet, musl)
        if sources.nsexec_digest() != digest:
            raise SourcesChanged("nsexec's sources changed while they were compiled; build it again")

    def files(self) -> list[treemap.File]:
        """List the files of the image before it is packed, and their packages; runs steps that are not cached."""
        base, kernel = self.base(), self.kernel()
        owners = json.loads((base / "owners.json").read_text())
        found = [treemap.File(kernel.file.name, kernel.file.stat().st_size, "kernel", "kernel")]
        with tempfile.TemporaryDirectory() as scratch:
            layer = Path(scratch)
            kernel.put_modules(layer / "usr/lib/modules")
            found += [treemap.File(path, size, "modules", "kernel") for path, size in treemap.sizes(layer)]
        with tempfile.TemporaryDirectory() as scratch:
            self.template_files.render(Path(scratch))
            found += [treemap.File(path, size, "files", "template") for path, size in treemap.sizes(Path(scratch))]
        found += [treemap.File(path, size, "agent", "agent") for path, size in treemap.sizes(self.agent(base))]
        kinds = {one["name"]: one["type"] for one in json.loads((base / "packages.json").read_text())}
        busybox = self.definition.busybox, kinds[self.definition.busybox]
        for path, size in treemap.sizes(base / "tree"):
            # Sources are byte code by now; the container's root has one program, and links to it.
            source = path.removesuffix("c") if path.endswith(".pyc") else path
            other = busybox if f"/{path}".startswith(BUSYBOX_ROOTFS) else ("made here", "made")
            package, kind = owners.get(path) or owners.get(source) or other
            found.append(treemap.File(path, size, package, treemap.KINDS.get(kind, kind)))
        return found

    def tools(self) -> Tools:
        """Fetch the programs that pack disks, from the suite itself, so that this machine's versions do not matter."""
        d = self.definition.native()
        if d.format == "initrd":
            return HOST
        key = digest_of("tools", d.suite, d.arch, TOOLS)
        return Tools(self._step("tools", key, self._make_tools) / "tree")

    def _make_tools(self, target: Path) -> None:
        self.report("fetching the programs that pack disks")
        (target / "tree").mkdir()
        arch = self.definition.native().arch
        extract(self._packages_of_suite(arch).fetch_all(TOOLS), target / "tree")

    def _make_image(self, key: str, target: Path) -> None:
        d = self.definition
        base, kernel = self.base(), self.kernel()
        agent = self.agent(base)
        pack.check_kernel(d, kernel)
        self.report("packing the image")
        with tempfile.TemporaryDirectory(dir=target) as scratch:
            layer = Path(scratch)
            packages = [*json.loads((base / "packages.json").read_text()), *kernel.packages]
            document = manifest.contents(d, key, kernel, packages, sources.agent_version())
            (layer / rootfs.HOME).mkdir(parents=True)
            manifest.write(document, layer / rootfs.HOME / "image.json")
            (layer / OSBUILDER).parent.mkdir(parents=True)
            (layer / OSBUILDER).write_text(manifest.osbuilder(document, d))
            self.template_files.render(layer)
            kernel.put_modules(layer / "usr/lib/modules")
            trees = [base / "tree", agent, layer]
            if d.hooks:
                trees = [self.template_files.run_hooks(trees, Path(scratch + ".hooked"), self.report)]
            root = pack.root(d, trees, kernel, target, self.tools())
            if d.hooks:
                shutil.rmtree(trees[0])
        for name in ("vmlinux", "bzImage"):
            if (kernel.directory / name).is_file():
                (target / name).hardlink_to(kernel.directory / name)
        document |= {"root": root}
        manifest.write(document, target / "image.json")
        sbom.write(document, target / "image.spdx.json")
        lock.write(lock.Lock.of(d.suite, d.arch, packages), target / "image.lock")
        if self.key() != key:
            raise SourcesChanged("the agent's sources changed while the image was built from them; build it again")


def _image_code() -> Iterable[str]:
    """List every module of this half that a build runs."""
    files = (path.relative_to(ROOT / "image") for path in (ROOT / "image").rglob("*.py"))
    return sorted(str(path) for path in files if path.parts[0] not in ("containers", "vm"))


def _code(names: Iterable[str]) -> str:
    return digest_of_files(ROOT / "image", [ROOT / "image" / name for name in names])
