"""Build images of distributions from repositories created by the test, without contacting their servers."""

from __future__ import annotations

import json
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from caisson.image.build import rootfs
from caisson.image.build.builder import Build, Image
from caisson.image.build.cache import Cache
from caisson.image.build.definition import Loaded, find, load
from caisson.image.errors import ImageError
from caisson.image.kernel.kernel import Kernel, Prebuilt
from caisson.image.packages import apt
from caisson.image.packages.apk import Apk
from caisson.image.packages.distribution import extract
from caisson.image.packages.package import Package
from tests.build import alpine_repository, debian_repository

#: The version of the interpreter running this, the only one certain to be here, and so the guests' version below.
PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="repositories are made for x86_64")


def libraries_of(program: Path) -> dict[str, bytes]:
    """Return the shared libraries that a program on this machine loads, by name."""
    said = subprocess.run(["ldd", program], capture_output=True, text=True, check=True).stdout
    return {Path(name).name: Path(name).read_bytes() for name in re.findall(r"(/\S+) \(0x", said)}


def host_python() -> dict[str, bytes | str]:
    """Return the part of this machine's interpreter that compiles Python, as files of a package."""
    program, library = Path(sys.executable).resolve(), Path(sysconfig.get_path("stdlib"))
    files: dict[str, bytes | str] = {f"usr/bin/python{PYTHON}": program.read_bytes()}
    packages = (  # some of these are modules in older Pythons
        "collections", "concurrent", "ctypes", "email", "encodings", "importlib", "json", "logging", "pathlib", "re",
        "sysconfig", "urllib",
    )  # fmt: skip
    for file in [*library.glob("*.py"), *(one for name in packages for one in (library / name).rglob("*.py"))]:
        files[f"usr/lib/python{PYTHON}/{file.relative_to(library)}"] = file.read_bytes()
    for file in (library / "lib-dynload").glob("_struct*.so"):
        files[f"usr/lib/python{PYTHON}/lib-dynload/{file.name}"] = file.read_bytes()
    return files


def busybox() -> bytes:
    program = shutil.which("busybox")
    assert program is not None
    return Path(program).read_bytes()


def kernel_files(release: str, image: str) -> dict[str, bytes | str]:
    """Return a kernel package's files, which cannot boot."""
    return {
        f"boot/config-{release}": b"CONFIG_VSOCKETS=m\nCONFIG_NET=y\n",
        f"boot/{image}": b"a kernel",
        f"lib/modules/{release}/modules.builtin": b"",
        f"lib/modules/{release}/kernel/vsock.ko": b"\x7fELF of a kind\0depends=\0",
    }


def definition(tmp_path: Path, template: str, more: str) -> Loaded:
    """Return a template with this machine's interpreter, no wheels, and few kernel requirements."""
    (tmp_path / "definition").mkdir()
    file = tmp_path / "definition/image.yaml"
    file.write_text(f'extends: {template}\npython: "{PYTHON}"\nwheels: []\nkernel: {{fragments: [test.conf]}}\n{more}')
    (file.parent / "test.conf").write_text("CONFIG_VSOCKETS=y module vsock: sockets\n")
    return load(file)


def check_image(image: Image, kind: str, distribution: str, suite: str, packages: set[str]) -> None:
    """Check everything that holds for every built image, whichever distribution its packages come from."""
    manifest = image.manifest
    assert (manifest["distribution"], manifest["suite"]) == (distribution, suite)
    assert {one["name"] for one in manifest["packages"] if one["type"] == kind} == packages
    assert manifest["kernel"]["modules"] == ["vsock.ko"]
    assert (image.directory / "vmlinux").read_bytes() == b"a kernel"
    sbom = json.loads((image.directory / "image.spdx.json").read_text())
    locators = [ref["referenceLocator"] for one in sbom["packages"] for ref in one.get("externalRefs", [])]
    assert len([one for one in locators if one.startswith(f"pkg:{kind}/{distribution}/")]) == len(packages)
    archive = (image.directory / "initrd.img").read_bytes()
    listed = subprocess.run(["cpio", "-it", "--quiet"], input=archive, capture_output=True, check=True).stdout.decode()
    names = set(listed.splitlines())
    assert {
        "init",
        f"usr/bin/python{PYTHON}",
        f"usr/lib/python{PYTHON}/os.pyc",
        "usr/lib/caisson/caisson/agent/guest/init.pyc",
    } <= names
    assert {"usr/lib/caisson/containers/busybox/bin/sh", "usr/lib/modules/vsock.ko"} <= names
    assert not [name for name in names if name.endswith(".py") or "libunused" in name or name.startswith("usr/share/")]
    extract = ["cpio", "-i", "--quiet", "--to-stdout", "var/lib/osbuilder/osbuilder.yaml"]
    osbuilder = yaml.safe_load(subprocess.run(extract, input=archive, capture_output=True, check=True).stdout)
    assert osbuilder["base-distro"]["name"] == distribution.capitalize()
    assert {one.partition("=")[0] for one in osbuilder["base-distro"]["packages"]["default"]} == packages


@pytest.fixture(scope="module")
def private(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return alpine_repository.make_key(tmp_path_factory.mktemp("alpine-key"))


def test_an_image_of_alpine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, private: Path) -> None:
    mirror = alpine_repository.Repository(tmp_path / "mirror", private)
    program = Path(sys.executable).resolve()
    # The libraries of this machine's interpreter under musl's names: either loader will do.
    libraries = {f"usr/lib/{name}": data for name, data in libraries_of(program).items() if not name.startswith("ld-")}
    (loader,) = (data for name, data in libraries_of(program).items() if name.startswith("ld-"))
    mirror.add("musl", files={"lib/ld-musl-x86_64.so.1": loader, **libraries}, provides="so:libc.musl-x86_64.so.1=1")
    mirror.add("python3", f"{PYTHON}.9-r0", host_python(), depends="so:libc.musl-x86_64.so.1", provides="cmd:python3=1")
    mirror.add("libstdc++", files={"usr/lib/libunused.so.6": libraries["usr/lib/libc.so.6"]})
    mirror.add("libseccomp", files={"usr/lib/libseccomp.so.2": libraries["usr/lib/libc.so.6"]})
    mirror.add("busybox-static", files={"bin/busybox.static": busybox()})
    # Its dependency is for machines that build their own initrd, and is not installed.
    mirror.add("linux-virt", "6.12.1-r0", kernel_files("6.12.1-0-virt", "vmlinuz-virt"), depends="mkinitfs")
    mirror.publish()
    monkeypatch.setenv("CAISSON_ALPINE_MIRROR", mirror.root.as_uri())
    monkeypatch.setenv("CAISSON_ALPINE_KEYS", str(mirror.keys))
    loaded = definition(tmp_path, "alpine", "keep+: [usr/lib/ld-musl-x86_64.so.1]\n")
    build = Build(loaded, Cache(tmp_path / "cache"))
    image = build.image()
    packages = {"busybox-static", "libseccomp", "libstdc++", "linux-virt", "musl", "python3"}
    check_image(image, "apk", "alpine", "v3.22", packages)
    tree = build.base() / "tree"
    assert (tree / "lib").is_symlink()
    assert (tree / "usr/lib/libseccomp.so.2").is_file()
    assert not (tree / "usr/lib/libunused.so.6").exists()
    run_guests_python(tree, "usr/lib", "ld-musl-x86_64.so.1")
    assert {one.kind for one in build.files() if one.package == "busybox-static"} == {"Alpine packages"}


Served = tuple[debian_repository.Repository, str]


@pytest.fixture(scope="module")
def signer() -> Iterator[debian_repository.Signer]:
    made = debian_repository.Signer()
    yield made
    made.close()


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, signer: debian_repository.Signer) -> Iterator[Served]:
    """Serve a repository; yield it and its URL."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with debian_repository.Repository.served(tmp_path / "mirror", signer) as both:
        yield both


def test_an_image_of_ubuntu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, served: Served, signer: debian_repository.Signer
) -> None:
    mirror, url = served
    triplet = "usr/lib/x86_64-linux-gnu"
    libraries = {f"{triplet}/{name}": data for name, data in libraries_of(Path(sys.executable).resolve()).items()}
    libc = libraries[f"{triplet}/libc.so.6"]
    mirror.add("noble", "libc6", files=libraries)
    mirror.add("noble", f"python{PYTHON}-minimal", files=host_python(), depends="libc6")
    mirror.add("noble", f"libpython{PYTHON}-stdlib")
    mirror.add("noble", "libstdc++6", files={f"{triplet}/libunused.so.6": libc})
    mirror.add("noble", "libseccomp2", files={f"{triplet}/libseccomp.so.2": b"as it was"})
    mirror.add("noble-security", "libseccomp2", "1+fixed", {f"{triplet}/libseccomp.so.2": libc})
    mirror.add("noble", "busybox-static", files={"usr/bin/busybox": busybox()})
    release = "6.8.0-9-generic"
    files = kernel_files(release, f"vmlinuz-{release}")
    image_files = {name: data for name, data in files.items() if "vmlinuz" in name}
    mirror.add("noble-updates", "linux-image-virtual", depends=f"linux-image-{release}")
    mirror.add("noble-updates", f"linux-image-{release}", files=image_files, depends=f"linux-modules-{release}")
    mirror.add(
        "noble-updates", f"linux-modules-{release}", files={k: v for k, v in files.items() if k not in image_files}
    )
    mirror.publish()
    monkeypatch.setenv("CAISSON_UBUNTU_MIRROR", url)
    monkeypatch.setenv("CAISSON_UBUNTU_KEYRING", str(signer.keyring))
    build = Build(definition(tmp_path, "ubuntu", ""), Cache(tmp_path / "cache"))
    image = build.image()
    names = {"busybox-static", "libc6", f"libpython{PYTHON}-stdlib", "libseccomp2", "libstdc++6"}
    names |= {f"python{PYTHON}-minimal", f"linux-image-{release}", f"linux-modules-{release}"}
    check_image(image, "deb", "ubuntu", "noble", names)
    versions = {one["name"]: one["version"] for one in image.manifest["packages"]}
    assert versions["libseccomp2"] == "1+fixed"
    tree = build.base() / "tree"
    assert (tree / triplet / "libseccomp.so.2").is_file()
    assert not (tree / triplet / "libunused.so.6").exists()
    run_guests_python(tree, triplet, "ld-linux-x86-64.so.2")


def run_guests_python(tree: Path, libraries: str, loader: str) -> None:
    """Check that the tree's interpreter runs byte code from the tree, with the tree's libraries."""
    start: list[str | Path] = [
        tree / libraries / loader,
        "--library-path",
        tree / libraries,
        tree / f"usr/bin/python{PYTHON}",
    ]
    # Loaded from a file: the interpreter has `os` as a frozen module.
    program = "import textwrap; print(textwrap.__file__)"
    environment = {"PYTHONHOME": str(tree / "usr")}
    done = subprocess.run([*start, "-P", "-S", "-c", program], env=environment, capture_output=True, text=True)
    assert done.stdout == f"{tree}/usr/lib/python{PYTHON}/textwrap.pyc\n", done.stderr


def test_a_repository_that_another_key_has_signed(tmp_path: Path, served: Served) -> None:
    mirror, url = served
    mirror.add("noble", "some")
    mirror.publish()
    other = debian_repository.Signer()
    try:
        keyring = apt.Keyring(other.keyring, "")
        source = apt.Apt(tmp_path / "cache", "noble", "amd64", url, keyring, variable="CAISSON_TEST")
        with pytest.raises(ImageError, match=r"(?s)not signed|NO_PUBKEY.*CAISSON_TEST names another"):
            source.update()
    finally:
        other.close()


def test_packages_of_a_debian_repository(tmp_path: Path, served: Served, signer: debian_repository.Signer) -> None:
    mirror, url = served
    mirror.add("test", "top", depends="middle (>= 2)")
    mirror.add("test", "middle", "1")
    mirror.add("test", "middle", "3")
    mirror.publish()
    keyring = apt.Keyring(signer.keyring, "")
    source = apt.Apt(tmp_path / "cache", "test", "amd64", url, keyring)
    source.update()
    found = source.fetch_all(["top"])
    assert [(one.kind, one.name, one.version) for one in found] == [("deb", "middle", "3"), ("deb", "top", "1")]
    extract(found, _made(tmp_path / "tree"))
    assert (tmp_path / "tree/usr/share/middle/version").read_text() == "3"
    with pytest.raises(ImageError, match="top: expected to depend on one kernel, but depends on none"):
        source.fetch_kernel("top")


def test_a_package_whose_download_was_killed_is_fetched_again(
    tmp_path: Path, served: Served, signer: debian_repository.Signer
) -> None:
    mirror, url = served
    mirror.add("test", "top")
    mirror.publish()
    source = apt.Apt(tmp_path / "cache", "test", "amd64", url, apt.Keyring(signer.keyring, ""))
    source.update()
    (whole,) = source.fetch(["top"])
    for damaged in (whole.file.read_bytes()[:300], bytes(whole.file.stat().st_size)):
        whole.file.write_bytes(damaged)
        assert source.fetch(["top"]) == [whole]


def _made(directory: Path) -> Path:
    directory.mkdir()
    return directory


# ---- musl


def test_a_tree_without_a_loader_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "usr/lib").mkdir(parents=True)
    with pytest.raises(ImageError, match=r"^/usr/lib: the guest's libc has no program loader"):
        rootfs.compile_python(tmp_path, load(find("alpine")).definition, tmp_path, prefix=tmp_path)


def test_a_kernel_of_alpine(tmp_path: Path) -> None:
    file = tmp_path / "linux-virt.apk"
    data = alpine_repository.segment(kernel_files("6.12.1-0-virt", "vmlinuz-virt"), end=True)
    file.write_bytes(alpine_repository.segment({".PKGINFO": b""}) + data)

    class Source(Apk):
        def __init__(self) -> None:
            pass

        def fetch_kernel(self, package: str) -> list[Package]:
            return [Package("apk", package, "6.12.1-r0", "abc", file)]

    target = _made(tmp_path / "kernel")
    Prebuilt(Source(), "linux-virt").make(target, [])
    made = Kernel.load(target)
    assert (made.release, made.packages[0]["type"]) == ("6.12.1-0-virt", "apk")
    assert made.file.read_bytes() == b"a kernel"
