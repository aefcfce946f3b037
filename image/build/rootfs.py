"""Build the guest's root file system: from packages and wheels to a tree that contains only what is used."""

from __future__ import annotations

import fnmatch
import shutil
import zipfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from caisson.image.build.choices import DISTRIBUTIONS
from caisson.image.build.definition import Definition
from caisson.image.errors import ImageError
from caisson.image.packages import contents
from caisson.image.packages.package import Package
from caisson.image.run import run
from caisson.proto.contract import GUEST_HOME

#: Where our own files are in a guest.
HOME = GUEST_HOME.lstrip("/")

#: A merged /usr, and what the agent mounts over or looks for.
LINKS = {"bin": "usr/bin", "sbin": "usr/sbin", "lib": "usr/lib", "lib64": "usr/lib64"}
DIRECTORIES = ("dev", "etc", "proc", "run", "sys", "tmp", "usr/bin", "usr/lib", "usr/lib64", "usr/sbin", "var", "mnt")

#: Where the host's name servers are bind-mounted (agent/guest/dns.py).
RESOLV_CONF = "etc/resolv.conf"


def skeleton(tree: Path) -> None:
    """Make the directories and links of an empty guest."""
    for name in DIRECTORIES:
        (tree / name).mkdir(parents=True, exist_ok=True)
    for name, target in LINKS.items():
        (tree / name).symlink_to(target)
    (tree / RESOLV_CONF).touch()


def fetch_wheels(
    python: Path, definition: Definition, directory: Path, report: Callable[[str], None] = lambda line: None
) -> list[Package]:
    """Download the definition's wheels for the guest's interpreter with pip, checked by their hashes.

    Raises ImageError.
    """
    machine = definition.triplet.split("-")[0]
    platforms = [name.format(machine=machine) for name in DISTRIBUTIONS[definition.distribution].wheels]
    directory.mkdir(exist_ok=True)
    if not definition.wheels:
        return []  # pip would reject it
    download: list[str | Path] = [
        python, "-m", "pip", "download", "--quiet", "--disable-pip-version-check",
        "--only-binary", ":all:", "--no-deps", "--dest", directory,
        "--implementation", "cp", "--python-version", definition.python,
        *(word for name in platforms for word in ("--platform", name)),
    ]  # fmt: skip
    hashed = [wheel for wheel in definition.wheels if "--hash=" in wheel]
    if hashed:
        requirements = directory / "requirements.txt"
        requirements.write_text("".join(f"{wheel}\n" for wheel in hashed))
        run([*download, "--require-hashes", "--requirement", requirements])
        requirements.unlink()
    if others := [wheel for wheel in definition.wheels if wheel not in hashed]:
        report(f"without a hash in the definition: {', '.join(others)}; add --hash=sha256:… to each")
        run([*download, *others])
    wheels = []
    for file in sorted(directory.glob("*.whl")):
        name, version = file.name.split("-")[:2]
        wheels.append(Package.of("wheel", name, version, file))
    return wheels


def unpack_wheels(wheels: Iterable[Package], target: Path) -> None:
    """Unpack wheels side by side where the agent looks for them."""
    for wheel in wheels:
        with zipfile.ZipFile(wheel.file) as archive:
            archive.extractall(target)  # names are checked by zipfile: none leads out of the target


def owners(packages: Iterable[Package]) -> dict[str, tuple[str, str]]:
    """Return the name and kind of the package of each file, by its path in a guest whose /usr is merged."""
    found = {}
    for package in packages:
        for name in contents.files(package):
            top, slash, rest = name.partition("/")
            path = f"{HOME}/{name}" if package.kind == "wheel" else f"{LINKS.get(top, top)}{slash}{rest}"
            found[path] = (package.name, package.kind)
    return found


def prune(tree: Path, patterns: Sequence[str], keep: Sequence[str]) -> None:
    """Remove what matches a pattern and is not to be kept; keeping a path keeps its parent directories.

    Nothing is removed behind a link that leaves the tree: an absolute one means the guest's root, not this machine's.
    """
    root = tree.resolve()
    for pattern in patterns:
        for path in sorted(tree.glob(pattern)):
            name = str(path.relative_to(tree))
            if not path.parent.resolve().is_relative_to(root):
                continue
            if any(fnmatch.fnmatch(name, kept) for kept in keep):
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)


def compile_python(tree: Path, definition: Definition, place: Path, *, prefix: Path) -> None:
    """Replace every .py below ``place`` by byte code (or, with ``sources``, put that beside it), made by the guest's
    own interpreter in ``tree``.  Byte code is the same on all architectures: for a guest of another one, tree and
    definition are `Definition.native`'s.

    Compiling at every boot would take four times as long as starting; byte code that is not checked against a source
    needs no source.  Tracebacks keep line numbers, and file names as they are in the guest: less ``prefix``.
    """
    library = tree / definition.libraries
    loader = next(iter(sorted(library.glob(DISTRIBUTIONS[definition.distribution].loader))), None)
    if loader is None:
        raise ImageError(f"/{definition.libraries}: the guest's libc has no program loader there")
    interpreter = tree / f"usr/bin/python{definition.python}"
    run(
        [
            loader, "--library-path", library, interpreter, "-P", "-S", "-B", "-m", "compileall", "-q", "-f",
            *(() if definition.sources else ("-b",)), "--invalidation-mode", "unchecked-hash",
            "-s", prefix, "-p", "/", place,
        ],
        env={"PYTHONHOME": str(tree / "usr"), "PYTHONHASHSEED": "0"},
    )  # fmt: skip
    if not definition.sources:
        for source in list(place.rglob("*.py")):
            source.unlink()


def busybox_rootfs(tree: Path, target: Path, etc: Path, native: Path) -> None:
    """Make a small container rootfs of an unpacked busybox package; that in ``native`` runs on this machine."""
    for name in ("bin", "dev", "etc", "home", "mnt", "proc", "root", "run", "sys", "tmp", "usr", "var"):
        (target / name).mkdir(parents=True)
    (target / "tmp").chmod(0o1777)
    shutil.copy(_busybox(tree), target / "bin/busybox")
    for applet in run([_busybox(native), "--list"]).decode().split():
        if applet != "busybox":
            (target / "bin" / applet).symlink_to("busybox")
    for name in ("sbin", "usr/bin", "usr/sbin"):
        (target / name).symlink_to("bin" if name == "sbin" else "../bin")
    for file in etc.iterdir():
        shutil.copy(file, target / "etc" / file.name)


def _busybox(tree: Path) -> Path:
    names = ("bin/busybox", "usr/bin/busybox", "bin/busybox.static", "usr/bin/busybox.static")  # the latter: Alpine's
    found = next((tree / name for name in names if (tree / name).exists()), None)
    if found is None:
        raise ImageError(f"busybox: the package in the definition has no {names[0]}; name one like busybox-static")
    return found
