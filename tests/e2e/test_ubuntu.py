"""Test booting a guest of Ubuntu's layout.

Ubuntu's own servers are not used: the packages are Debian's, with the kernel split in two as in Ubuntu, and the
repository's indexes are written by apt-ftparchive.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from caisson.image.build.definition import find, load
from caisson.image.packages.distribution import packages_of
from tests.build.debian_repository import Repository, Signer
from tests.e2e.conftest import TIMEOUT, Caisson

pytestmark = [pytest.mark.root, pytest.mark.vm, pytest.mark.nightly]

SUITE, PYTHON = "trixie", "3.13"
POCKETS = ("noble", "noble-updates", "noble-security")


@pytest.fixture
def signer() -> Iterator[Signer]:
    made = Signer()
    yield made
    made.close()


def split_kernel(image: Path, pool: Path) -> None:
    """Split a kernel package in two, and create the metapackage."""
    tree = pool / "kernel"
    subprocess.run(["dpkg-deb", "--raw-extract", image, tree], check=True)
    (release,) = (path.name for path in (tree / "usr/lib/modules").iterdir())
    shutil.rmtree(tree / "DEBIAN")
    modules = pool / "modules"
    (modules / "boot").mkdir(parents=True)
    (tree / "usr").rename(modules / "usr")
    (tree / f"boot/config-{release}").rename(modules / f"boot/config-{release}")
    for directory, name, depends in (
        (modules, f"linux-modules-{release}", ""),
        (tree, f"linux-image-{release}", f"linux-modules-{release}"),
        (pool / "virtual", "linux-image-virtual", f"linux-image-{release}"),
    ):
        control = f"Package: {name}\nVersion: 1\nArchitecture: amd64\nMaintainer: nobody <n@example.org>\n"
        control += f"Depends: {depends}\n" if depends else ""
        (directory / "DEBIAN").mkdir(parents=True)
        (directory / "DEBIAN/control").write_text(f"{control}Description: of a test\n")
        words = ["dpkg-deb", "--build", "--root-owner-group", "-Zgzip", "-z1"]
        subprocess.run([*words, directory, pool], check=True, capture_output=True)
        shutil.rmtree(directory)


def publish(root: Path, signer: Signer) -> None:
    """Write the indexes of all pockets: the first has all packages."""

    def write(*words: str) -> bytes:
        return subprocess.run(["apt-ftparchive", *words], cwd=root, check=True, capture_output=True).stdout

    for pocket in POCKETS:
        binary = root / f"dists/{pocket}/main/binary-amd64"
        binary.mkdir(parents=True)
        (binary / "Packages").write_bytes(write("packages", "pool") if pocket == POCKETS[0] else b"")
        fields = {
            "Origin": "Ubuntu",
            "Suite": pocket,
            "Codename": "noble",
            "Components": "main",
            "Architectures": "amd64",
        }
        options = [
            word for name, value in fields.items() for word in ("-o", f"APT::FTPArchive::Release::{name}={value}")
        ]
        release = write(*options, "release", f"dists/{pocket}")
        (root / f"dists/{pocket}/InRelease").write_bytes(signer.sign(release.decode()))


@pytest.mark.timeout(3 * TIMEOUT)
def test_a_guest_of_ubuntus_layout_boots_and_runs_programs(own: Caisson, signer: Signer, tmp_path: Path) -> None:
    debian = packages_of("debian", tmp_path / "apt", SUITE, "amd64")
    debian.update()
    definition = load(find("debian")).definition
    with Repository.served(tmp_path / "mirror", signer) as (mirror, url):
        pool = mirror.root / "pool"
        pool.mkdir(parents=True)
        for package in debian.fetch_all([*definition.packages, definition.busybox]):
            shutil.copy(package.file, pool)
        (image,) = debian.fetch_kernel("linux-image-cloud-amd64")
        split_kernel(image.file, pool)
        publish(mirror.root, signer)
        own.environment |= {
            "CAISSON_CACHE": str(tmp_path / "cache"),
            "CAISSON_UBUNTU_MIRROR": url,
            "CAISSON_UBUNTU_KEYRING": str(signer.keyring),
            "no_proxy": "127.0.0.1",
        }
        (tmp_path / "definition").mkdir()
        file = tmp_path / "definition/image.yaml"
        file.write_text(f'extends: ubuntu\npython: "{PYTHON}"\n')
        made = own("build-image", "--template", str(file), timeout=2 * TIMEOUT)
    assert made.returncode == 0, made.stderr.decode()
    booted = own("boot-vm", "--image", made.stdout.decode().strip(), "--detach")
    assert booted.returncode == 0, booted.stderr.decode()
    manifest = own.manifest("default")
    assert (manifest["distribution"], manifest["suite"]) == ("ubuntu", "noble")
    done = own("exec", "--", "sh", "-c", "uname -r; cat; exit 7", stdin=b"in and out")
    assert done.returncode == 7, done.stderr.decode()
    assert done.stdout.decode() == f"{manifest['kernel']['release']}\nin and out"
    assert own("stop-vm").returncode == 0
