"""Templates of distributions whose servers are not asked: rendered, and built from repositories that the test makes."""

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

from caisson.image.build import rootfs
from caisson.image.build.builder import Build, Image
from caisson.image.build.cache import Cache
from caisson.image.build.definition import Loaded, find, load
from caisson.image.build.settings import DefinitionError
from caisson.image.errors import ImageError
from caisson.image.kernel.kernel import Kernel, Prebuilt
from caisson.image.packages import apt
from caisson.image.packages.apk import Apk
from caisson.image.packages.distribution import extract, packages_of
from caisson.image.packages.package import Package
from tests.build import alpine_repository, debian_repository

TEMPLATES = Path(__file__).resolve().parents[2] / "rootfs-templates"

#: Of the interpreter that runs this: the only one that is here for sure, and so that of the guests below.
PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="repositories are made for x86_64")


# ---- rendered


@pytest.mark.parametrize(
    ("template", "suite", "name", "python", "libraries"),
    [
        ("ubuntu", None, "ubuntu-noble", "3.12", "usr/lib/x86_64-linux-gnu"),
        ("ubuntu", "noble", "ubuntu-noble", "3.12", "usr/lib/x86_64-linux-gnu"),
        ("alpine", None, "alpine-v3.22", "3.12", "usr/lib"),
        ("alpine", "v3.20", "alpine-v3.20", "3.12", "usr/lib"),
        ("debian", "bookworm", "debian-bookworm", "3.11", "usr/lib/x86_64-linux-gnu"),
    ],
)
def test_a_template_renders(template: str, suite: str | None, name: str, python: str, libraries: str) -> None:
    loaded = load(find(template), suite=suite)
    definition = loaded.definition
    assert (definition.distribution, definition.name, definition.python) == (template, name, python)
    assert definition.libraries == libraries
    assert [word for word in (*definition.packages, *definition.keep) if re.search(r"\d\.\d", word)]
    assert not re.search(
        r"3\.(?!" + python.removeprefix("3.") + ")", " ".join((*definition.packages, *definition.keep))
    )
    assert dict(Build(loaded)._own_files())["init"] == TEMPLATES / "debian/files/init.j2"


@pytest.mark.parametrize("template", ["ubuntu", "alpine"])
def test_a_suite_of_another_distribution_is_refused(template: str) -> None:
    with pytest.raises(DefinitionError, match=r"'trixie': unknown; known are: "):
        load(find(template), suite="trixie")


def test_a_distribution_that_is_not_known() -> None:
    with pytest.raises(DefinitionError, match="distribution is one of debian, ubuntu, alpine, not 'gentoo'"):
        load(settings=["distribution=gentoo"])


def test_what_a_definition_says_is_what_its_parent_is_rendered_with(tmp_path: Path) -> None:
    (tmp_path / "image.yaml").write_text('extends: debian\nname: own\nsuite: forky\npython: "3.99"\n')
    definition = load(tmp_path / "image.yaml").definition
    assert (definition.suite, definition.python) == ("forky", "3.99")
    assert "python3.99-minimal" in definition.packages


def test_a_kernel_is_compiled_only_from_what_there_is() -> None:
    settings = ["kernel.package=", "kernel.source=linux-source-6.12"]
    assert load(find("ubuntu"), settings=settings).definition.kernel.source
    with pytest.raises(DefinitionError, match="alpine has no kernel sources in packages; name a directory"):
        load(find("alpine"), settings=settings)
    assert load(find("alpine"), settings=[settings[0], "kernel.source=./linux"]).definition.kernel.source


def test_the_guide_for_a_new_distribution_holds(tmp_path: Path) -> None:
    guide = (TEMPLATES / "template/README.md").read_text()
    (example,) = re.findall(r"^```yaml\n(.*?)^```$", guide, re.MULTILINE | re.DOTALL)
    (tmp_path / "image.yaml").write_text(example)
    definition = load(tmp_path / "image.yaml").definition
    for name in ("name", "suite", "python"):
        assert getattr(definition, name) != getattr(load().definition, name)
    for word in re.findall(r"`((?:image|tests|rootfs-templates)/[\w./-]+)`", guide):
        assert (TEMPLATES.parent / word).exists(), word


# ---- where packages come from


def test_mirrors_and_keys_are_chosen_by_variables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("UBUNTU_MIRROR", "UBUNTU_KEYRING", "ALPINE_MIRROR", "ALPINE_KEYS"):
        monkeypatch.delenv(f"CAISSON_{name}", raising=False)
    sources = {arch: packages_of("ubuntu", tmp_path, "noble", arch) for arch in ("amd64", "arm64")}
    assert {arch: one.mirror for arch, one in sources.items() if isinstance(one, apt.Apt)} == {
        "amd64": "http://archive.ubuntu.com/ubuntu", "arm64": "http://ports.ubuntu.com/ubuntu-ports",
    }  # fmt: skip
    alpine = packages_of("alpine", tmp_path, "v3.22", "arm64")
    assert isinstance(alpine, Apk)
    assert (alpine.architecture, str(alpine.keys)) == ("aarch64", "/etc/apk/keys")
    monkeypatch.setenv("CAISSON_ALPINE_MIRROR", "http://here/alpine/")
    monkeypatch.setenv("CAISSON_UBUNTU_KEYRING", str(tmp_path / "none.gpg"))
    alpine = packages_of("alpine", tmp_path, "v3.22", "amd64")
    assert isinstance(alpine, Apk) and alpine.mirror == "http://here/alpine"
    with pytest.raises(ImageError, match=r"none\.gpg: is missing; .* CAISSON_UBUNTU_KEYRING names another"):
        packages_of("ubuntu", tmp_path, "noble", "amd64").update()


HOSTILE = """Acquire::http "";
Acquire::http::Proxy "http://proxy:3128";
Acquire::http::Proxy::internal "DIRECT";
Acquire::https::CAInfo "/etc/ca.pem";
Acquire::https::Verify-Peer "false";
Acquire::http::AllowRedirect "true";
"""


def test_the_hosts_apt_configuration_weakens_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(apt, "run", lambda argv, **_: HOSTILE.encode() if argv[0] == "apt-config" else b"")
    keyring = tmp_path / "keyring"
    keyring.touch()
    source = apt.Apt(tmp_path, "trixie", "amd64", "http://m/debian", apt.Keyring(keyring, ""), security="http://s")
    source.update()
    written = (tmp_path / "apt.conf").read_text()
    assert written.count("Proxy") == 2 and "CAInfo" in written and "Verify-Peer" not in written
    assert (tmp_path / "sources.list").read_text().splitlines() == [
        f"deb [arch=amd64 signed-by={keyring}] http://m/debian trixie main",
        f"deb [arch=amd64 signed-by={keyring}] http://s trixie-security main",
    ]
    done = subprocess.run(
        ["apt-config", "dump"], env={"APT_CONFIG": str(tmp_path / "apt.conf"), "PATH": "/usr/bin:/bin"},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    for setting in (
        'Acquire::AllowInsecureRepositories "false";', 'Acquire::AllowWeakRepositories "false";',
        'APT::Get::AllowUnauthenticated "false";', 'Dir::Etc::Main "/dev/null";',
    ):  # fmt: skip
        assert setting.lower() in done.stdout.lower(), setting


@pytest.mark.parametrize(
    ("mirror", "chosen", "security"),
    [
        ("http://m/debian/", "", "http://m/debian-security"),
        ("http://m/snapshot", "", ""),
        ("http://m/debian", "none", ""),
        ("http://m/debian", "http://s", "http://s"),
    ],
)
def test_security_updates_are_in_by_default(
    monkeypatch: pytest.MonkeyPatch, mirror: str, chosen: str, security: str
) -> None:
    monkeypatch.setenv("CAISSON_SECURITY_MIRROR", chosen)
    assert apt.security_mirror(mirror) == security


def test_wheels_have_hashes_or_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[object]] = []
    lines: list[str] = []
    monkeypatch.setattr(rootfs, "run", asked.append)
    definition = load(find("debian"), settings=["wheels+=loose==1"]).definition
    rootfs.fetch_wheels(Path(sys.executable), definition, tmp_path, lines.append)
    assert "--require-hashes" in asked[0] and asked[1][-1] == "loose==1"
    assert len(lines) == 1 and "loose==1" in lines[0]


def test_wheels_are_those_of_the_c_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[object]] = []
    monkeypatch.setattr(rootfs, "run", asked.append)
    for name in ("alpine", "ubuntu"):
        rootfs.fetch_wheels(Path(sys.executable), load(find(name)).definition, tmp_path)
    platforms = [[str(word) for word in argv if "linux" in str(word)] for argv in asked]
    assert platforms[0] == ["musllinux_1_1_x86_64", "musllinux_1_2_x86_64"]
    assert "manylinux_2_28_x86_64" in platforms[1] and not any("musl" in word for word in platforms[1])
    rootfs.fetch_wheels(Path(sys.executable), load(find("alpine"), settings=["wheels=[]"]).definition, tmp_path)
    assert len(asked) == 2


def test_the_wheels_of_alpine_exist(tmp_path: Path) -> None:
    wheels = rootfs.fetch_wheels(Path(sys.executable), load(find("alpine")).definition, tmp_path)
    files = {wheel.name: wheel.file.name for wheel in wheels}
    assert set(files) == {"protobuf"}
    assert not any("manylinux" in name for name in files.values())


# ---- built


def libraries_of(program: Path) -> dict[str, bytes]:
    """The shared libraries that a program of this machine loads, by name."""
    said = subprocess.run(["ldd", program], capture_output=True, text=True, check=True).stdout
    return {Path(name).name: Path(name).read_bytes() for name in re.findall(r"(/\S+) \(0x", said)}


def host_python() -> dict[str, bytes | str]:
    """As much of this machine's interpreter as compiles Python, as files of a package."""
    program, library = Path(sys.executable).resolve(), Path(sysconfig.get_path("stdlib"))
    files: dict[str, bytes | str] = {f"usr/bin/python{PYTHON}": program.read_bytes()}
    packages = (
        "collections",
        "concurrent",
        "encodings",
        "importlib",
        "json",
        "re",
        "urllib",
        "email",
        "logging",
        "ctypes",
    )
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
    """A kernel package's files, of which none boots."""
    return {
        f"boot/config-{release}": b"CONFIG_VSOCKETS=m\nCONFIG_NET=y\n",
        f"boot/{image}": b"a kernel",
        f"lib/modules/{release}/modules.builtin": b"",
        f"lib/modules/{release}/kernel/vsock.ko": b"\x7fELF of a kind\0depends=\0",
    }


def definition(tmp_path: Path, template: str, more: str) -> Loaded:
    """A template with this machine's interpreter, no wheels, and a kernel of which little is asked."""
    (tmp_path / "definition").mkdir()
    file = tmp_path / "definition/image.yaml"
    file.write_text(f'extends: {template}\npython: "{PYTHON}"\nwheels: []\nkernel: {{fragments: [test.conf]}}\n{more}')
    (file.parent / "test.conf").write_text("CONFIG_VSOCKETS=y module vsock: sockets\n")
    return load(file)


def check_image(image: Image, kind: str, distribution: str, suite: str, packages: set[str]) -> None:
    """What every built image has, whoever its packages are from."""
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


@pytest.fixture(scope="module")
def private(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return alpine_repository.make_key(tmp_path_factory.mktemp("alpine-key"))


def test_an_image_of_alpine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, private: Path) -> None:
    mirror = alpine_repository.Repository(tmp_path / "mirror", private)
    program = Path(sys.executable).resolve()
    # The libraries of this machine's interpreter under musl's names: one loader is as good as the other.
    libraries = {f"usr/lib/{name}": data for name, data in libraries_of(program).items() if not name.startswith("ld-")}
    (loader,) = (data for name, data in libraries_of(program).items() if name.startswith("ld-"))
    mirror.add("musl", files={"lib/ld-musl-x86_64.so.1": loader, **libraries}, provides="so:libc.musl-x86_64.so.1=1")
    mirror.add("python3", f"{PYTHON}.9-r0", host_python(), depends="so:libc.musl-x86_64.so.1", provides="cmd:python3=1")
    mirror.add("libstdc++", files={"usr/lib/libunused.so.6": libraries["usr/lib/libc.so.6"]})
    mirror.add("libseccomp", files={"usr/lib/libseccomp.so.2": libraries["usr/lib/libc.so.6"]})
    mirror.add("busybox-static", files={"bin/busybox.static": busybox()})
    # What it depends on is for a machine that makes its own initrd: nobody asks for it.
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


Served = tuple[debian_repository.Repository, str]


@pytest.fixture(scope="module")
def signer() -> Iterator[debian_repository.Signer]:
    made = debian_repository.Signer()
    yield made
    made.close()


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, signer: debian_repository.Signer) -> Iterator[Served]:
    """A repository, and its URL."""
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
    """The interpreter of the tree runs byte code of the tree, with the tree's libraries."""
    start: list[str | Path] = [
        tree / libraries / loader,
        "--library-path",
        tree / libraries,
        tree / f"usr/bin/python{PYTHON}",
    ]
    # Loaded from a file: the interpreter has `os` frozen within itself.
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
    with pytest.raises(ImageError, match="top: was to bring one kernel, but brings none"):
        source.fetch_kernel("top")


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
