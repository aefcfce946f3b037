"""Test the bytes of the bootstrap message against those of runc 1.1.5 (captured with strace)."""

from __future__ import annotations

from struct import unpack_from

import pytest

from caisson.agent.libcontainer.config.spec import IdMapping, TimeOffset
from caisson.agent.libcontainer.plan import wire
from caisson.agent.libcontainer.plan.wire import NAMESPACES, EncodingError, bootstrap


def test_create_as_runc_encodes_it() -> None:
    assert bootstrap(create=0x6C020000).hex() == (
        "18000000" "30f2" "0100" "01000000" "00000000" "0800916a0000026c"
    )  # fmt: skip


def _attributes(message: bytes) -> list[tuple[int, int, bytes]]:
    """Return (length, type, payload) of each attribute; check the message's own length."""
    assert unpack_from("=IH", message) == (len(message), 62000)
    found, at = [], 16
    while at < len(message):
        length, kind = unpack_from("=HH", message, at)
        found.append((length, kind, message[at + 4 : at + length]))
        at += (length + 3) & ~3
    assert at == len(message)
    return found


def test_user_namespace_as_runc_encodes_it() -> None:
    maps = [IdMapping(0, 100000, 65536)]
    message = bootstrap(create=0x7E020000, uid_map=maps, gid_map=maps, oom_score_adj=100)
    assert _attributes(message) == [
        (8, 27281, bytes.fromhex("0000027e")),
        (20, 27283, b"0 100000 65536\n\0"),
        (20, 27284, b"0 100000 65536\n\0"),
        (8, 27285, b"\1\0\0\0"),
        (8, 27286, b"100\0"),
    ]


def test_exec_as_runc_encodes_it() -> None:
    paths = [(name, f"/proc/9568/ns/{NAMESPACES[name][1]}") for name in ("ipc", "uts", "network", "pid", "mount")]
    message = bootstrap(paths=paths)
    names = (b"ipc", b"uts", b"net", b"pid", b"mnt")
    text = b",".join(b"%s:/proc/9568/ns/%s" % (name, name) for name in names) + b"\0"
    assert len(message) == 140
    assert _attributes(message) == [(8, 27281, bytes(4)), (114, 27282, text)]


def test_time_offsets_and_join_mask() -> None:
    message = bootstrap(join=0x20000, time_offsets={"boottime": TimeOffset(5, 7)})
    assert _attributes(message)[1:] == [
        (8, 27350, bytes.fromhex("00000200")),
        (18, 27290, b"boottime 5 7\n\0"),
    ]


@pytest.mark.parametrize("size", [65530, 65531, 65532, 65535, 65536, 65540, 200_000])
def test_a_length_is_never_wrapped(size: int) -> None:
    """A text of `size` bytes takes size + 1 + 4; 65535 is the maximum of 16 bits (CVE-2021-43784)."""
    if size + 5 <= 0xFFFF:
        encoded = wire.text(wire.UID_MAP, "x" * size)
        assert unpack_from("=HH", encoded) == (size + 5, wire.UID_MAP)
        assert len(encoded) == (size + 5 + 3) & ~3
    else:
        with pytest.raises(EncodingError, match="id map takes"):
            wire.text(wire.UID_MAP, "x" * size, "id map")


def test_strings_are_bounded() -> None:
    assert wire.strings(["a", "b=c"])[16:] == b"a\0b=c\0"
    with pytest.raises(EncodingError, match="args and env"):
        wire.strings(["x" * (2 << 20)])


def test_file_names_that_are_not_utf8() -> None:
    assert wire.encode("\udcff") == b"\xff"
