"""Test kernel config fragments: reading, merging, and checking a kernel's config against them."""

from __future__ import annotations

from pathlib import Path

import pytest

from caisson.image.build.definition import TEMPLATES, load
from caisson.image.kernel import fragments
from caisson.image.kernel.fragments import FragmentError, Request, Unsatisfied

SHIPPED = sorted((TEMPLATES / "kernel").glob("*.conf"))


def read(tmp_path: Path, text: str, name: str = "some.conf") -> list[Request]:
    file = tmp_path / name
    file.write_text(text)
    return fragments.parse(file)


def test_a_line_says_what_where_and_why(tmp_path: Path) -> None:
    (vsock, clocks, name, count, disks) = read(
        tmp_path,
        "# About something.\n\n"
        "CONFIG_VSOCKETS=y module vsock vsock-diag: the address family\n"
        "CONFIG_TIME_NS=y optional: clocks: a container's own\n"
        'CONFIG_LSM="landlock": one is enough\n'
        "CONFIG_NR_CPUS=64: no more than a host has\n"
        "CONFIG_VIRTIO_BLK=y optional later virtio_blk: disks\n",
    )
    assert vsock == Request(
        "CONFIG_VSOCKETS", "y", "the address family", "some.conf:3", modules=("vsock", "vsock-diag")
    )
    assert (clocks.optional, clocks.reason, clocks.where) == (True, "clocks: a container's own", "some.conf:4")
    assert (name.value, count.value) == ('"landlock"', "64")
    assert (disks.optional, disks.later, disks.modules) == (True, True, ("virtio_blk",))


@pytest.mark.parametrize(
    "line",
    [
        "CONFIG_NET=y",
        "CONFIG_NET=y:",
        "CONFIG_NET=yes: a reason",
        "NET=y: a reason",
        "CONFIG_NET y: a reason",
        "# CONFIG_NET is not set\nCONFIG_NET=: a reason",
        "CONFIG_NET=y module: a reason",
        "CONFIG_NET=y sometimes: a reason",
    ],
)
def test_a_malformed_line_is_named(tmp_path: Path, line: str) -> None:
    with pytest.raises(FragmentError, match=rf"some\.conf:{line.count(chr(10)) + 1}: expected CONFIG_NAME=value"):
        read(tmp_path, line + "\n")


def test_a_fragment_that_is_not_there_names_those_that_are() -> None:
    with pytest.raises(FragmentError, match=r"no kernel fragment 'vsok'; there are: 9p, balloon, base, .*vsock"):
        fragments.parse(TEMPLATES / "kernel" / "vsok.conf")


def test_a_fragment_that_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "mine.conf").write_bytes(b"# \xff\n")
    with pytest.raises(FragmentError, match=r"mine\.conf: is not UTF-8 at byte 2"):
        fragments.parse(tmp_path / "mine.conf")


def test_two_values_of_one_symbol_name_both_lines(tmp_path: Path) -> None:
    one = read(tmp_path, "CONFIG_NET=y: sockets\n", "one.conf")
    two = read(tmp_path, "# hm\nCONFIG_NET=n: no network\n", "two.conf")
    with pytest.raises(FragmentError) as caught:
        fragments.merge([one, two])
    for words in ("two.conf:2", "CONFIG_NET=n", "no network", "one.conf:1", "CONFIG_NET=y", "sockets"):
        assert words in str(caught.value)


def test_the_same_wish_twice_is_one_wish(tmp_path: Path) -> None:
    one = read(tmp_path, "CONFIG_NET=y: sockets\n", "one.conf")
    two = read(tmp_path, "CONFIG_INET=y: TCP\nCONFIG_NET=y: for TCP\n", "two.conf")
    assert [request.where for request in fragments.merge([one, two])] == ["one.conf:1", "two.conf:1"]


CONFIG = """
CONFIG_NET=y
CONFIG_VSOCKETS=m
CONFIG_LSM="landlock,yama"
CONFIG_NR_CPUS=64
# CONFIG_DEBUG is not set
# CONFIG_NETWORKING=y as a comment is none
"""


def judge(*requests: Request) -> fragments.Verdict:
    return fragments.check(requests, fragments.parse_config(CONFIG))


def wish(symbol: str, value: str = "y", *modules: str, optional: bool = False) -> Request:
    return Request(f"CONFIG_{symbol}", value, "a reason", f"{symbol.lower()}.conf:7", optional, modules)


def test_a_kernel_that_has_everything() -> None:
    verdict = judge(
        wish("NET"),
        wish("NET", "y", "net"),
        wish("VSOCKETS", "y", "vsock", "vsock_diag"),
        wish("DEBUG", "n"),
        wish("ABSENT", "n"),
        wish("LSM", '"landlock,yama"'),
        wish("NR_CPUS", "64"),
        wish("KVM_GUEST", optional=True),
        wish("VSOCKETS", "y", "vsock"),
    )
    assert verdict.modules == ("vsock", "vsock_diag")  # none for what is built in; each once
    assert [request.symbol for request in verdict.missing] == ["CONFIG_KVM_GUEST"]


@pytest.mark.parametrize(
    ("request_", "why"),
    [
        (wish("NETWORKING"), r"CONFIG_NETWORKING=y \(networking\.conf:7: a reason\): it is n"),
        (wish("DEBUG"), "it is n"),
        (wish("NET", "n"), "it is y"),
        (wish("VSOCKETS"), "is a module, but the fragment names none"),
        (wish("NR_CPUS", "128"), "it is 64"),
        (wish("LSM", '"landlock"'), 'it is "landlock,yama"'),
    ],
)
def test_missing_kernel_options_are_named_with_the_reason(request_: Request, why: str) -> None:
    with pytest.raises(Unsatisfied, match=why):
        judge(wish("NET"), request_)


def test_everything_that_is_lacking_is_said_at_once() -> None:
    with pytest.raises(Unsatisfied) as caught:
        judge(wish("ONE"), wish("TWO"), wish("NET"))
    assert "CONFIG_ONE" in str(caught.value)
    assert "CONFIG_TWO" in str(caught.value)
    assert "CONFIG_NET" not in str(caught.value)


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
def test_shipped_fragments_are_well_formed(file: Path) -> None:
    requests = fragments.parse(file)
    assert requests
    symbols = [request.symbol for request in requests]
    assert len(symbols) == len(set(symbols))


def test_shipped_fragments_do_not_contradict_each_other() -> None:
    merged = fragments.merge(fragments.parse(file) for file in SHIPPED)
    assert {request.where.split(".")[0] for request in merged} == {file.stem for file in SHIPPED}


def test_the_default_names_fragments_that_exist() -> None:
    assert set(load().definition.kernel.fragments) <= {file.stem for file in SHIPPED}
