"""Compile a kernel of our own, configured from nothing but the fragments, and without modules.

It starts from ``allnoconfig``, so what no fragment asks for is off.  A request that did not take
effect is an error that says why.  Sources: Documentation/kbuild/{kconfig,kbuild,reproducible-builds}.rst.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from caisson.image.errors import ImageError
from caisson.image.kernel import fragments
from caisson.image.packages.apt import Apt
from caisson.image.run import CommandFailed, remove_in_background, run

#: Our names of architectures → the kernel's, and what its build makes that a boot loader takes.
ARCHITECTURES = {"amd64": ("x86", "arch/x86/boot/bzImage"), "arm64": ("arm64", "arch/arm64/boot/Image")}

#: Which bytes this module makes of a source and requests: another one compiles every kernel again, which takes minutes.
#: To be changed when the build changes, not when only its messages do.
REVISION = "10028efd58beed61727e0da5"

#: Seconds between two lines of progress.
PROGRESS_INTERVAL = 10.0

#: What would otherwise record in the kernel who built it, where and when.
REPRODUCIBLE = {
    "KBUILD_BUILD_TIMESTAMP": "Thu Jan  1 00:00:00 UTC 1970",
    "KBUILD_BUILD_USER": "caisson",
    "KBUILD_BUILD_HOST": "caisson",
    "KBUILD_BUILD_VERSION": "1",
}


@dataclass(frozen=True)
class SourcePackage:
    """Debian's kernel source: a package whose one tar archive is the patched tree."""

    apt: Callable[[], Apt]
    package: str

    def key(self) -> str:
        """Return what identifies the tree: the newest version is taken once, and then kept."""
        return self.package

    @contextmanager
    def tree(self, scratch: Path) -> Iterator[tuple[Path, list[dict[str, str]]]]:
        """Return the unpacked tree, and the package's record."""
        (deb,) = self.apt().fetch([self.package])
        run(["dpkg-deb", "--extract", deb.file, scratch / "deb"])
        archives = list((scratch / "deb/usr/src").glob("linux-source-*.tar.*"))
        if len(archives) != 1:
            raise ImageError(f"{self.package}: holds {len(archives)} kernel trees, not one; name a package with one")
        place = scratch / "tree"
        place.mkdir()
        run(["tar", "--extract", "--file", archives[0], "--strip-components=1", "--no-same-owner", "-C", place])
        yield place, [deb.record()]


@dataclass(frozen=True)
class SourceTree:
    """Use a tree of the user's own; nothing is written to it."""

    place: Path

    def key(self) -> str:
        """Return the time of the newest change of any file or directory: reading a gigabyte would take too long."""
        newest = 0
        for directory, names, files in os.walk(self.place):
            names[:] = [name for name in names if name != ".git"]
            for name in (*files, "."):  # a file that is removed, or comes with an older time, changes its directory
                newest = max(newest, os.lstat(os.path.join(directory, name)).st_mtime_ns)  # noqa: PTH118
        return f"{self.place}@{newest}"

    @contextmanager
    def tree(self, scratch: Path) -> Iterator[tuple[Path, list[dict[str, str]]]]:
        """Return the tree as it is."""
        if not (self.place / "Kconfig").is_file():
            raise ImageError(f"{self.place} is not a kernel tree: it has no Kconfig")
        if (self.place / ".config").exists():
            raise ImageError(f"{self.place}: has been built in; clean it with: make mrproper")
        yield self.place, []


@dataclass(frozen=True)
class Compiled:
    """A kernel to be compiled from ``source`` for ``arch`` (amd64 or arm64)."""

    source: SourcePackage | SourceTree
    arch: str
    report: Callable[[str], None]

    def make(self, target: Path, requests: Sequence[fragments.Request]) -> None:
        """Configure and compile; ``target`` gets vmlinux (for a direct start by PVH), bzImage, config, kernel.json.

        Raises Unsatisfied with the reason for every symbol that did not come out, CommandFailed for the compiler.
        """
        if self.arch not in ARCHITECTURES:
            raise ImageError(f"{self.arch}: kernels are not compiled for it, but for {' and '.join(ARCHITECTURES)}")
        # The kernel's build takes no directory with a space or a colon in its name.
        place = None if re.search(r"[\s:]", str(target)) else target
        with _scratch(place) as scratch:
            self.report("unpacking the kernel's source")
            with self.source.tree(scratch) as (tree, packages):
                build = scratch / "build"
                build.mkdir()
                verdict = configure(tree, build, self.arch, requests)
                log = scratch / "build.log"
                self.report(f"compiling the kernel: minutes, once; its log is {log}")
                goal = "all" if self.arch == "arm64" else "bzImage"
                counted = f"objects-{self.arch}"
                with _progress(build, self.report, _last_count(target.parent, counted)):
                    _make(tree, build, self.arch, goal, jobs=os.cpu_count() or 1, log=log)
                (target / counted).write_text(str(_objects(build)))
                self._take(build, target, packages, verdict)

    def _take(self, build: Path, target: Path, packages: list[dict[str, str]], verdict: fragments.Verdict) -> None:
        bootable = build / ARCHITECTURES[self.arch][1]
        shutil.copyfile(bootable, target / bootable.name)
        if self.arch == "amd64":
            run(["strip", "--strip-all", "-o", target / "vmlinux", build / "vmlinux"])
        else:
            shutil.copyfile(bootable, target / "vmlinux")
        shutil.copyfile(build / ".config", target / "config")
        (target / "modules").mkdir()
        document = {
            "release": (build / "include/config/kernel.release").read_text().strip(),
            "config_sha256": hashlib.sha256((target / "config").read_bytes()).hexdigest(),
            "modules": [],
            "later": {},
            "missing": [request.symbol for request in verdict.missing],
            "packages": packages,
        }
        (target / "kernel.json").write_text(json.dumps(document, indent=2))


@contextmanager
def _scratch(place: Path | None) -> Iterator[Path]:
    """Yield a directory to build in.  It is removed, after Ctrl-C in the background: that takes many seconds."""
    scratch = Path(tempfile.mkdtemp(dir=place, prefix=".kernel-"))
    try:
        yield scratch
    except KeyboardInterrupt:
        remove_in_background(scratch)
        raise
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
    shutil.rmtree(scratch, ignore_errors=True)


def _objects(build: Path) -> int:
    return sum(name.endswith(".o") for _, _, names in os.walk(build) for name in names)


def _last_count(kernels: Path, name: str) -> str:
    """Return how many objects the last compiled kernel had; empty if there was none."""
    try:
        counts = sorted(kernels.glob(f"[!.]*/{name}"), key=lambda file: file.stat().st_mtime)
        return counts[-1].read_text() if counts else ""
    except OSError:  # the cache may be emptied meanwhile
        return ""


@contextmanager
def _progress(build: Path, report: Callable[[str], None], last: str) -> Iterator[None]:
    """Report periodically how many objects are compiled, next to how many there were the ``last`` time.

    The total is unknown beforehand: make(1) decides directory by directory.
    """
    of = f" (the last kernel had {last})" if last else ""
    done = threading.Event()

    def watch() -> None:
        began = time.monotonic()
        while not done.wait(PROGRESS_INTERVAL):
            count = _objects(build)
            if done.is_set():
                return
            report(f"compiling the kernel: {count} objects after {time.monotonic() - began:.0f} s{of}")

    threading.Thread(target=watch, name="progress", daemon=True).start()
    try:
        yield
    finally:
        done.set()


def configure(tree: Path, build: Path, arch: str, requests: Sequence[fragments.Request]) -> fragments.Verdict:
    """Write ``build``/.config from the requests that concern this kernel, and judge it.  Raises Unsatisfied."""
    release = run(["make", "-s", "-C", tree, "kernelversion"]).decode().strip()
    asked = [request for request in requests if request.concerns(fragments.version_of(release))]
    lines = [f"# {one.symbol} is not set\n" if one.value == "n" else f"{one.symbol}={one.value}\n" for one in asked]
    (build / "requests").write_text("".join(lines))
    _make(tree, build, arch, f"KCONFIG_ALLCONFIG={build / 'requests'}", "allnoconfig")
    config = build / ".config"
    try:
        return fragments.check(asked, fragments.parse_config(config.read_text()))
    except fragments.Unsatisfied as error:
        try:
            from caisson.image.kernel.kconfig import Explainer
        except ModuleNotFoundError:  # an install without the extra "build"
            raise error.with_reasons(lambda _: "and why, this says after: pip install kconfiglib") from None
        explainer = Explainer(tree, ARCHITECTURES[arch][0], release, config)
        raise error.with_reasons(lambda one: explainer.why(one.symbol, one.value)) from None


def _make(tree: Path, build: Path, arch: str, *words: str, jobs: int = 1, log: Path | None = None) -> None:
    compiler = "ccache gcc" if shutil.which("ccache") else "gcc"
    settings = [f"ARCH={ARCHITECTURES[arch][0]}", f"CC={compiler}", f"HOSTCC={compiler}"]
    settings += [f"{name}={value}" for name, value in REPRODUCIBLE.items()]
    try:
        run(
            ["make", "-s", "-C", tree, f"O={build}", f"-j{jobs}", *settings, *words],
            # A killed compiler leaves its temporary files.
            env={"CCACHE_BASEDIR": str(build), "TMPDIR": str(build)}, log=log,
        )  # fmt: skip
    except CommandFailed as error:
        if "gelf.h" in str(error) or "libelf" in str(error):
            raise ImageError(
                "libelf: its headers are missing; install them with: sudo apt-get install libelf-dev"
            ) from error
        raise


def compiler_version() -> str:
    """Return the compiler's version string: another compiler produces different bytes."""
    return run(["gcc", "--version"]).decode().partition("\n")[0]
