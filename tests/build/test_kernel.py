"""Test prebuilt kernels: which modules are taken, in which order, and what is rejected."""

from __future__ import annotations

import json
import lzma
from collections.abc import Iterable
from pathlib import Path

import pytest

from caisson.image.errors import ImageError
from caisson.image.kernel.fragments import Request, Unsatisfied
from caisson.image.kernel.kernel import Kernel, Prebuilt, load_order, modinfo
from caisson.image.packages.apt import Apt
from caisson.image.packages.package import Package
from caisson.image.run import run


def module(depends: str = "", *softdeps: str) -> bytes:
    """Return a file with .modinfo as laid out by the linker: consecutive NUL-terminated strings, somewhere in it."""
    lines = ["license=GPL", f"depends={depends}", *(f"softdep={soft}" for soft in softdeps), "name=x"]
    return b"\x7fELF\0\0\0" + b"".join(line.encode() + b"\0" for line in lines) + b"\xff\0"


@pytest.fixture
def place(tmp_path: Path) -> Path:
    place = tmp_path / "modules"
    (place / "kernel/net").mkdir(parents=True)
    (place / "modules.builtin").write_text("kernel/drivers/virtio/virtio.ko\nkernel/lib/crc-t10dif.ko\n")
    return place


def put(place: Path, name: str, depends: str = "", *softdeps: str) -> None:
    (place / f"kernel/net/{name}.ko").write_bytes(module(depends, *softdeps))


def order(place: Path, *wanted: str) -> list[str]:
    return [name for name, _ in load_order(place, wanted)]


def test_a_module_comes_after_what_it_needs(place: Path) -> None:
    put(place, "transport", "common,vsock")
    put(place, "common", "vsock")
    put(place, "vsock")
    put(place, "unwanted")
    assert order(place, "transport") == ["vsock.ko", "common.ko", "transport.ko"]
    assert order(place, "vsock", "transport", "common") == ["vsock.ko", "common.ko", "transport.ko"]


def test_built_in_modules_are_not_loaded(place: Path) -> None:
    put(place, "net", "virtio,crc_t10dif")
    assert order(place, "net", "virtio") == ["net.ko"]


def test_dashes_and_underscores_are_the_same(place: Path) -> None:
    put(place, "snd-core")
    put(place, "snd_card", "snd-core")
    assert order(place, "snd-card") == ["snd_core.ko", "snd_card.ko"]


def test_soft_dependencies_before_a_module_come_first_where_there_are_any(place: Path) -> None:
    put(place, "one")
    put(place, "two")
    put(place, "after")
    put(place, "top", "", "pre: one absent post: after", "pre: two")
    assert order(place, "top") == ["one.ko", "two.ko", "top.ko"]


def test_modules_are_unpacked(place: Path) -> None:
    (place / "kernel/net/xz.ko.xz").write_bytes(lzma.compress(module()))
    (place / "kernel/net/zst.ko.zst").write_bytes(run(["zstd", "-q", "-c"], stdin=module("xz")))
    assert load_order(place, ["zst"]) == [("xz.ko", module()), ("zst.ko", module("xz"))]


def test_a_module_that_is_not_there_names_who_needs_it(place: Path) -> None:
    put(place, "top", "gone")
    with pytest.raises(ImageError, match="module gone: not in this kernel, which top needs"):
        order(place, "top")
    with pytest.raises(ImageError, match="module tpo: not in this kernel; correct the fragment"):
        order(place, "tpo")


def test_a_circle_is_an_error(place: Path) -> None:
    put(place, "a", "b")
    put(place, "b", "a")
    with pytest.raises(ImageError, match="a → b → a"):
        order(place, "a")


def test_fields_of_a_module() -> None:
    data = module("a,b", "pre: c", "pre: d")
    assert modinfo(data, "depends") == ["a,b"]
    assert modinfo(data, "softdep") == ["pre: c", "pre: d"]
    assert modinfo(data, "pends") == []


# ---- a whole package, without a network


class FakeApt(Apt):
    """Provides the given packages, as (name, file)."""

    def __init__(self, packages: dict[str, Path]) -> None:
        self.packages = packages

    def resolve(self, packages: Iterable[str]) -> list[str]:
        return [*packages, *self.packages]

    def fetch(self, packages: Iterable[str]) -> list[Package]:
        return [Package("deb", name, "1", "abc", self.packages[name]) for name in packages]


@pytest.fixture
def package(tmp_path: Path) -> Path:
    tree = tmp_path / "deb"
    place = tree / "usr/lib/modules/6.0-test"
    (place / "kernel/net").mkdir(parents=True)
    (place / "modules.builtin").touch()
    put(place, "vsock")
    put(place, "transport", "vsock")
    put(place, "late-one", "vsock")
    (tree / "boot").mkdir()
    (tree / "boot/config-6.0-test").write_text("CONFIG_NET=y\nCONFIG_VIRTIO_VSOCKETS=m\nCONFIG_VSOCKETS=m\n")
    (tree / "boot/vmlinuz-6.0-test").write_bytes(b"boots on other architectures as it is")
    (tree / "DEBIAN").mkdir()
    (tree / "DEBIAN/control").write_text(
        "Package: linux-image-6.0-test\nVersion: 1\nArchitecture: all\nMaintainer: nobody <n@example.org>\n"
        "Description: test\n"
    )
    for directory in (tree, tree / "DEBIAN"):
        directory.chmod(0o755)
    run(["dpkg-deb", "--build", "--root-owner-group", tree, tmp_path / "k.deb"])
    return tmp_path / "k.deb"


VSOCK = Request("CONFIG_VIRTIO_VSOCKETS", "y", "the device", "vsock.conf:1", modules=("transport",))
LATER = Request("CONFIG_VSOCKETS", "y", "the family", "vsock.conf:2", modules=("late-one",), later=True)
KVM = Request("CONFIG_KVM_GUEST", "y", "the clock", "base.conf:1", optional=True)


def test_a_kernel_from_a_package(package: Path, tmp_path: Path) -> None:
    target = tmp_path / "result"
    target.mkdir()
    Prebuilt(FakeApt({"linux-image-6.0-test": package}), "linux-image-cloud").make(target, [VSOCK, LATER, KVM])
    made = Kernel.load(target)
    assert made.later == {"late_one": ("vsock.ko", "late_one.ko")}
    assert (target / "modules/late_one.ko").is_file()
    assert (made.release, made.modules, made.missing) == (
        "6.0-test",
        ("vsock.ko", "transport.ko"),
        ("CONFIG_KVM_GUEST",),
    )
    assert made.file.read_bytes() == b"boots on other architectures as it is"
    assert (target / "modules/transport.ko").read_bytes() == module("vsock")
    assert made.packages == ({"type": "deb", "name": "linux-image-6.0-test", "version": "1", "sha256": "abc"},)
    assert {path.name for path in target.iterdir()} == {"config", "kernel.json", "modules", made.file.name}
    assert json.loads((target / "kernel.json").read_text())["config_sha256"] == made.config_sha256


def test_a_kernel_that_does_not_do(package: Path, tmp_path: Path) -> None:
    lacking = Request("CONFIG_OVERLAY_FS", "y", "layers", "overlay.conf:3")
    with pytest.raises(Unsatisfied, match=r"CONFIG_OVERLAY_FS=y \(overlay\.conf:3: layers\)"):
        Prebuilt(FakeApt({"linux-image-6.0-test": package}), "linux-image-cloud").make(tmp_path, [VSOCK, lacking])


@pytest.mark.parametrize("kernels", [(), ("linux-image-6.0-test", "linux-image-6.1-test")])
def test_a_package_that_brings_no_kernel_or_several(package: Path, tmp_path: Path, kernels: tuple[str, ...]) -> None:
    with pytest.raises(ImageError, match=f"one kernel, but depends on {', '.join(kernels) or 'none'}"):
        Prebuilt(FakeApt(dict.fromkeys(kernels, package)), "linux-image-cloud").make(tmp_path, [VSOCK])
