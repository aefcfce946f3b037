"""Provide the guest's kernel: where it comes from, and what of it goes into an image.

``Prebuilt`` takes a distribution's kernel package, so that a first build compiles nothing: its config is checked
against the fragments and exactly the modules that satisfy them are taken, in the order in which they load.  A kernel
compiled from the same fragments fills a directory of the same shape.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import json
import lzma
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from caisson.image.errors import ImageError
from caisson.image.kernel import bzimage, fragments
from caisson.image.packages.distribution import Packages, extract
from caisson.image.run import run

#: File systems for directories of the host: the symbol, and the module, that a virtio device of theirs needs.
SHARED_FILE_SYSTEMS = (("9p", "CONFIG_NET_9P_VIRTIO", "9pnet_virtio"), ("virtiofs", "CONFIG_VIRTIO_FS", "virtiofs"))


@dataclass(frozen=True)
class Kernel:
    """Represent a kernel ready for an image, in a directory: ``vmlinux``, ``modules/`` and ``kernel.json``.

    ``modules`` are file names in load order, ``later`` those loaded on demand, by the name requested;
    ``missing`` are the optional symbols that it lacks.
    """

    directory: Path
    release: str
    config_sha256: str
    modules: tuple[str, ...]
    missing: tuple[str, ...]
    later: dict[str, tuple[str, ...]]
    packages: tuple[dict[str, str], ...]

    @property
    def file(self) -> Path:
        """Return the file that QEMU boots."""
        return self.directory / "vmlinux"

    def config(self) -> dict[str, str]:
        """Read its configuration: the symbols that have a value."""
        return fragments.parse_config((self.directory / "config").read_text())

    def shared_file_systems(self) -> list[str]:
        """Return the file systems by which a guest can mount a host directory: "9p", "virtiofs"."""
        config, modules = self.config(), {*self.later, *(file.partition(".")[0] for file in self.modules)}
        return [
            name
            for name, symbol, module in SHARED_FILE_SYSTEMS
            if config.get(symbol) == "y" or (config.get(symbol) == "m" and module in modules)
        ]

    def put_modules(self, place: Path) -> None:
        """Write its modules into a guest's tree, with the lists that the agent loads them by."""
        place.mkdir(parents=True)
        for file in (self.directory / "modules").iterdir():
            shutil.copy(file, place / file.name)
        paths = {name: [f"/lib/modules/{file}" for file in files] for name, files in self.later.items()}
        lines = [" ".join([name, *files]) for name, files in paths.items()]
        (place / "caisson.later").write_text("".join(f"{line}\n" for line in lines))
        (place / "caisson.list").write_text("".join(f"/lib/modules/{name}\n" for name in self.modules))

    @classmethod
    def load(cls, directory: Path) -> Kernel:
        """Load a kernel that was built before."""
        document = json.loads((directory / "kernel.json").read_text())
        sequences = {name: tuple(document[name]) for name in ("modules", "missing", "packages")}
        later = {name: tuple(files) for name, files in document["later"].items()}
        return cls(directory, document["release"], document["config_sha256"], later=later, **sequences)


class Prebuilt:
    """Take a kernel from a distribution's package."""

    def __init__(self, packages: Packages, package: str) -> None:
        self.packages = packages
        self.package = package

    def make(self, target: Path, requests: Sequence[fragments.Request]) -> None:
        """Fetch the newest kernel that the package depends on, check it against the fragments, and put what they ask
        for into ``target``.  Raises Unsatisfied.
        """
        packages = self.packages.fetch_kernel(self.package)
        tree = target / "package"
        tree.mkdir()
        extract(packages, tree)
        (config,) = tree.glob("boot/config-*")
        release = config.name.removeprefix("config-")
        verdict = fragments.check(requests, fragments.parse_config(config.read_text()))
        (vmlinuz,) = tree.glob("boot/vmlinuz-*")  # Alpine names it by its flavour, not by its release
        image = vmlinuz.read_bytes()
        with contextlib.suppress(bzimage.NotUsable):  # other architectures boot it as it is
            image = bzimage.extract(image)
        (target / "vmlinux").write_bytes(image)
        shutil.copyfile(config, target / "config")
        (target / "modules").mkdir()
        # /lib is a link to /usr/lib in a guest, and newer packages know that.
        place = next(
            path for path in (tree / "usr/lib/modules" / release, tree / "lib/modules" / release) if path.is_dir()
        )
        modules = load_order(place, verdict.modules)
        later = {name.replace("-", "_"): load_order(place, [name]) for name in verdict.later}
        for name, data in [*modules, *(one for order in later.values() for one in order)]:
            (target / "modules" / name).write_bytes(data)
        document = {
            "release": release,
            "config_sha256": hashlib.sha256(config.read_bytes()).hexdigest(),
            "modules": [name for name, _ in modules],
            "later": {name: [file for file, _ in order] for name, order in later.items()},
            "missing": [request.symbol for request in verdict.missing],
            "packages": [package.record() for package in packages],
        }
        (target / "kernel.json").write_text(json.dumps(document, indent=2))
        shutil.rmtree(tree)


def module_name(file: Path) -> str:
    """Spell a module's name as the kernel does."""
    return re.sub(r"\.ko(\.(xz|zst|gz))?$", "", file.name).replace("-", "_")


def read_module(file: Path) -> bytes:
    """Read a module's contents, unpacked."""
    if file.suffix == ".xz":
        return lzma.decompress(file.read_bytes())
    if file.suffix == ".gz":
        return gzip.decompress(file.read_bytes())
    if file.suffix == ".zst":
        return run(["zstd", "-d", "-q", "-c", file])
    return file.read_bytes()


def modinfo(module: bytes, field: str) -> list[str]:
    """Read the values of a field of a module's .modinfo section: NUL-terminated ``field=value`` strings."""
    found = re.findall(rb"(?<=\0)" + field.encode() + rb"=([^\0]*)(?=\0)", module)
    return [value.decode() for value in found]


def load_order(place: Path, wanted: Sequence[str]) -> list[tuple[str, bytes]]:
    """List the wanted modules with all their dependencies, each after what it needs, as (file name, contents).

    Built-in ones need no loading.  Raises ImageError for a module that the kernel does not have.
    """
    files = {module_name(file): file for file in place.rglob("*.ko*")}
    builtin = {module_name(Path(line)) for line in (place / "modules.builtin").read_text().split()}
    done: dict[str, tuple[str, bytes]] = {}

    def add(name: str, path: tuple[str, ...]) -> None:
        name = name.replace("-", "_")
        if name in done or name in builtin:
            return
        if name in path:
            raise ImageError(f"kernel modules depend on each other: {' → '.join((*path, name))}")
        if name not in files:
            needed_by = f", which {path[-1]} needs" if path else ""
            raise ImageError(f"module {name}: not in this kernel{needed_by}; correct the fragment that names it")
        data = read_module(files[name])
        needs = [need for value in modinfo(data, "depends") for need in value.split(",") if need]
        for soft in modinfo(data, "softdep"):
            before = re.search(r"pre: ?([^:]*?)(?:$| post:)", soft)
            needs += [need for need in (before[1].split() if before else ()) if need.replace("-", "_") in files]
        for need in needs:
            add(need, (*path, name))
        done[name] = (f"{name}.ko", data)

    for name in wanted:
        add(name, ())
    return list(done.values())
