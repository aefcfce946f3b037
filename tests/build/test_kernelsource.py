"""Test kernel configurations from fragments, with Debian's source: each request is met, or an error says why not."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from caisson.image.build.cache import default_root
from caisson.image.build.definition import TEMPLATES, find, host_architecture, load
from caisson.image.errors import ImageError
from caisson.image.kernel.fragments import FragmentError, Request, Unsatisfied, merge, parse
from caisson.image.kernel.source import SourcePackage, SourceTree, configure
from caisson.image.packages import apt

ARCH = host_architecture()
FRAGMENTS = {file.stem: parse(file) for file in sorted((TEMPLATES / "kernel").glob("*.conf"))}
#: The base of every fragment; a custom kernel has no modules, which only prebuilt ones need.
FOUNDATION = FRAGMENTS["own"] + FRAGMENTS["base"]

pytestmark = pytest.mark.timeout(900)


def unpacked(suite: str, place: Path) -> Iterator[Path]:
    package = load(find("lean"), suite=suite).definition.kernel.source
    fetcher = apt.Apt(default_root() / "apt" / f"{suite}-{ARCH}", suite, ARCH, apt.host_mirror())
    fetcher.update()
    with SourcePackage(lambda: fetcher, package).tree(place) as (tree, records):
        assert records[0]["name"] == package
        yield tree


@pytest.fixture(scope="module")
def newest(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Debian's 6.12."""
    yield from unpacked("trixie", tmp_path_factory.mktemp("trixie"))


@pytest.fixture(scope="module")
def oldest(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Debian's 6.1."""
    yield from unpacked("bookworm", tmp_path_factory.mktemp("bookworm"))


@pytest.fixture(params=["newest", "oldest"])
def tree(request: pytest.FixtureRequest) -> Path:
    """Each."""
    found: Path = request.getfixturevalue(request.param)
    return found


def configured(tree: Path, tmp_path: Path, *requests: Request) -> str:
    """Configure a kernel with the base and further fragments; return its .config.  Raises Unsatisfied."""
    build = tmp_path / "build"
    build.mkdir()
    configure(tree, build, ARCH, merge([FOUNDATION, list(requests)]))
    return (build / ".config").read_text()


def test_all_fragments_together(tree: Path, tmp_path: Path) -> None:
    everything = [one for name, requests in FRAGMENTS.items() if name != "modules" for one in requests]
    config = configured(tree, tmp_path, *everything)
    assert "CONFIG_VIRTIO_VSOCKETS=y" in config
    assert "# CONFIG_MODULES is not set" in config
    assert "=m\n" not in config


@pytest.mark.parametrize("name", [name for name in FRAGMENTS if name not in ("own", "base", "modules")])
def test_each_fragment_by_itself(newest: Path, tmp_path: Path, name: str) -> None:
    configured(newest, tmp_path, *FRAGMENTS[name])


#: Invalid fragments, each in a different way, with their errors.
WRONG = {
    "CONFIG_NFS_FS=y: unmet": r"needs CONFIG_NETWORK_FILESYSTEMS \(fs/Kconfig:\d+\), which is n",
    "CONFIG_VIRTIO_VSOCKET=y: a typing error": r"no such symbol; did you mean CONFIG_VIRTIO_VSOCKETS\?",
    "CONFIG_DEVPTS_MULTIPLE_INSTANCES=y: removed long ago": r"no such symbol; it may have been removed, or renamed",
    "CONFIG_BRIDGE_NETFILTER=m: a module without modules": r"because m needs CONFIG_MODULES, which is n",
    "CONFIG_SMP=m: no tristate": r"because it is no tristate: it can be built in only",
    "CONFIG_GENERIC_ALLOCATOR=y: selected only": r"because it has no prompt: it comes with CONFIG_\w+",
    "CONFIG_HAVE_KVM_MSI_X=y: unknown": r"no such symbol",
    "CONFIG_SPARC64=y: another architecture's": r"no such symbol|architecture",
    "CONFIG_XFS_QUOTA=y: a chain": r"needs CONFIG_XFS_FS \(fs/xfs/Kconfig:\d+\), which is n",
    "CONFIG_VIRTIO=n: selected by others": r"it is y, because CONFIG_VIRTIO_\w+.* selects it",
    "CONFIG_NR_CPUS=999999: out of range": r"it is \d+",
}


def test_wrong_fragments_say_why(tree: Path, tmp_path: Path) -> None:
    file = tmp_path / "wrong.conf"
    file.write_text("".join(f"{line}\n" for line in WRONG))
    replaced = {line.partition("=")[0] for line in WRONG}
    foundation = [request for request in FOUNDATION if request.symbol not in replaced]
    build = tmp_path / "build"
    build.mkdir()
    with pytest.raises(Unsatisfied) as caught:
        configure(tree, build, ARCH, merge([foundation, parse(file)]))
    said = dict(zip((one.symbol for one, _ in caught.value.lacking), str(caught.value).splitlines()[1:], strict=True))
    for number, (line, words) in enumerate(WRONG.items(), 1):
        symbol = line.partition("=")[0]
        assert f"wrong.conf:{number}" in said[symbol]
        assert re.search(words, said[symbol]), said[symbol]


def test_of_a_choice_the_one_that_was_not_taken_is_named(newest: Path, tmp_path: Path) -> None:
    file = tmp_path / "wrong.conf"
    file.write_text("CONFIG_HZ_1000=y: the other of a choice\n")
    with pytest.raises(Unsatisfied, match=r"CONFIG_HZ_100=y .* because of its choice CONFIG_HZ_1000 was taken"):
        configured(newest, tmp_path, *parse(file))


def test_one_symbol_with_two_values_names_both_lines(tmp_path: Path) -> None:
    file = tmp_path / "wrong.conf"
    file.write_text("CONFIG_SMP=n: one CPU\n")
    with pytest.raises(FragmentError, match=r"wrong\.conf:1 asks for CONFIG_SMP=n \(one CPU\), but base\.conf:\d+ for"):
        merge([FOUNDATION, parse(file)])


def test_katas_symbols_are_judged_and_those_unmet_are_named(tree: Path, tmp_path: Path) -> None:
    symbols = (Path(__file__).parent / "data/kata-symbols").read_text().split()
    taken = {request.symbol for request in FOUNDATION}
    file = tmp_path / "kata.conf"
    file.write_text("".join(f"CONFIG_{name}=y: as Kata\n" for name in symbols if f"CONFIG_{name}" not in taken))
    with pytest.raises(Unsatisfied) as caught:
        configured(tree, tmp_path, *parse(file))
    said = {
        one.symbol: line
        for (one, _), line in zip(caught.value.lacking, str(caught.value).splitlines()[1:], strict=True)
    }
    assert "no such symbol" in said["CONFIG_MEMCG_SWAP"]  # removed since 6.1
    assert re.search(r"needs .*CONFIG_DNS_RESOLVER|needs CONFIG_NETWORK_FILESYSTEMS", said["CONFIG_CIFS"])
    assert 5 < len(said) < 60, sorted(said)


def test_kernel_source_rejects_other_trees_and_built_ones(tmp_path: Path) -> None:
    with (
        pytest.raises(ImageError, match="is not a kernel tree: it has no Kconfig"),
        SourceTree(tmp_path).tree(tmp_path),
    ):
        pass
    (tmp_path / "Kconfig").touch()
    (tmp_path / ".config").touch()
    with pytest.raises(ImageError, match="make mrproper"), SourceTree(tmp_path).tree(tmp_path):
        pass


def test_a_tree_is_known_by_its_newest_file(tmp_path: Path) -> None:
    (tmp_path / "Kconfig").touch()
    before = SourceTree(tmp_path).key()
    assert SourceTree(tmp_path).key() == before
    os.utime(tmp_path / "Kconfig", (2**31, 2**31))
    assert SourceTree(tmp_path).key() != before


def test_a_tree_without_one_of_its_files_is_another(tmp_path: Path) -> None:
    for name in ("Kconfig", "Makefile"):
        (tmp_path / name).touch()
    for place in (*tmp_path.iterdir(), tmp_path):
        os.utime(place, (0, 0))
    before = SourceTree(tmp_path).key()
    (tmp_path / "Makefile").unlink()
    assert SourceTree(tmp_path).key() != before
