"""Test Alpine packages: versions, dependencies, and that nothing unsigned is accepted."""

from __future__ import annotations

import gzip
import itertools
import os
import tracemalloc
from pathlib import Path

import pytest

from caisson.image.errors import ImageError
from caisson.image.packages.apk import Apk, Untrusted, extract, read_index, split
from caisson.image.packages.apk_index import Dependency, Entry, Index, Unresolvable, compare, parse
from tests.build.alpine_repository import KEY, NOW, Repository, make_key, segment

#: Oldest first; each version is older than all that follow.
VERSIONS = [
    "0.9", "1.0_alpha", "1.0_alpha2", "1.0_beta1", "1.0_pre1", "1.0_rc1", "1.0_rc1-r3", "1.0_rc2", "1.0", "1.0-r1",
    "1.0-r10", "1.0_cvs1", "1.0_git20240101", "1.0_p1", "1.0_p1-r1", "1.0_p2", "1.0a", "1.0b", "1.0.1", "1.0.5",
    "1.0.10", "1.2", "1.10", "2", "10",
]  # fmt: skip


def test_versions_have_an_order() -> None:
    wrong = [
        (older, newer)
        for older, newer in itertools.combinations(VERSIONS, 2)
        if not compare(older, newer) < 0 < compare(newer, older)
    ]
    assert wrong == []
    assert [compare(version, version) for version in VERSIONS] == [0] * len(VERSIONS)
    assert compare("1.05", "1.1") < 0 < compare("1.05", "1.01")  # compared as fractions


@pytest.mark.parametrize("version", ["", "a", "1.", "1.0-1", "1.0_foo", "1.0-r", "../1"])
def test_apk_rejects_malformed_versions(version: str) -> None:
    with pytest.raises(ImageError, match="no Alpine package can have it"):
        compare(version, "1")


@pytest.mark.parametrize(
    ("dependency", "yes", "no"),
    [
        ("a", ["1", ""], []),
        ("a=1.2-r0", ["1.2-r0"], ["1.2", "1.2-r1", ""]),
        ("a>1.2", ["1.3", "1.2-r0"], ["1.2", "1.1", ""]),
        ("a>=1.2", ["1.2", "1.3"], ["1.2_rc1", ""]),
        ("a<1.2", ["1.1", "1.2_rc1"], ["1.2", "1.2-r0"]),
        ("a<=1.2", ["1.2", "1.0"], ["1.2-r0"]),
        ("a~1.2", ["1.2", "1.2.9-r4", "1.2-r0"], ["1.20", "1.3", "1", ""]),
        ("a=~3.12", ["3.12.11-r0"], ["3.13.1-r0"]),
        ("a@edge>1", ["2"], ["1"]),
    ],
)
def test_constraints(dependency: str, yes: list[str], no: list[str]) -> None:
    parsed = Dependency.parse(dependency)
    assert parsed.name == "a"
    assert [version for version in (*yes, *no) if parsed.accepts(version)] == yes


def entry(name: str, version: str = "1-r0", depends: str = "", provides: str = "", priority: int = 0) -> Entry:
    record = f"C:Q1x\nP:{name}\nV:{version}\nS:1\nD:{depends}\np:{provides}\nk:{priority}\n"
    (found,) = parse(record)
    return found


def names(*entries: Entry, want: str) -> list[str]:
    return [f"{one.name}-{one.version}" for one in Index(entries).resolve(want.split())]


def test_an_index_is_read() -> None:
    text = (
        "C:Q1abc=\nP:a\nV:1-r0\nA:noarch\nS:12\nI:99\nT:of: colons\nD:so:x.so.1 !b c>=2\np:cmd:a=1-r0 virtual\n\n"
        "C:Q1d=\nP:b\nV:2\nS:3\n"
    )
    first, second = parse(text, "http://m")
    assert (first.name, first.version, first.checksum, first.size, first.architecture) == (
        "a",
        "1-r0",
        "Q1abc=",
        12,
        "noarch",
    )
    assert [str(one) for one in first.dependencies] == ["so:x.so.1", "!b", "c>=2"]
    assert first.provides == (("cmd:a", "1-r0"), ("virtual", ""))
    assert list(first.owns()) == ["a", "cmd:a"]
    assert (second.file, second.repository, second.dependencies) == ("b-2.apk", "http://m", ())


@pytest.mark.parametrize(
    ("record", "complaint"),
    [
        ("P:a\nV:1\nC:Q1x", "malformed: 'S'"),
        ("P:a\nV:1\nC:Q1x\nS:many", "malformed: invalid literal"),
        ("P:../a\nV:1\nC:Q1x\nS:1", r"'../a' '1': no Alpine package can be called so"),
        ("P:a\nV:1/2\nC:Q1x\nS:1", "no Alpine package can be called so"),
        ("P:a\nV:1\nC:Q1x\nS:1\nD:b>", "dependency 'b>': no Alpine package can have it"),
    ],
)
def test_an_index_that_is_malformed(record: str, complaint: str) -> None:
    with pytest.raises(ImageError, match=complaint):
        list(parse(record))


def test_resolver_finds_provided_names() -> None:
    musl = entry("musl", provides="so:libc.musl-x86_64.so.1=1")
    shell = entry("busybox", depends="so:libc.musl-x86_64.so.1", provides="/bin/sh cmd:sh=1")
    tool = entry("tool", depends="/bin/sh cmd:sh so:libc.musl-x86_64.so.1 pc:zlib>=1.2")
    old, new = entry("zlib-old-dev", provides="pc:zlib=1.1"), entry("zlib-dev", provides="pc:zlib=1.3")
    assert names(musl, shell, tool, old, new, want="tool") == [
        "busybox-1-r0",
        "musl-1-r0",
        "tool-1-r0",
        "zlib-dev-1-r0",
    ]


def test_of_several_the_best_is_taken() -> None:
    several = entry("a", "1-r0"), entry("a", "10-r0"), entry("a", "9-r0")
    assert names(*several, want="a") == ["a-10-r0"]
    assert names(*several, want="a<10") == ["a-9-r0"]
    assert names(entry("x", "2", provides="v"), entry("y", provides="v", priority=5), want="v") == ["y-1-r0"]
    assert names(entry("x", provides="y=9"), entry("y", "1"), want="y") == ["y-1"]


def test_a_choice_that_leads_nowhere_is_taken_back() -> None:
    found = names(
        entry("top", depends="any other"), entry("any", "2", depends="lib=2"), entry("any", "1", depends="lib=1"),
        entry("other", depends="lib<2"), entry("lib", "1"), entry("lib", "2"), want="top",
    )  # fmt: skip
    assert found == ["any-1", "lib-1", "other-1-r0", "top-1-r0"]


def test_packages_that_exclude_each_other() -> None:
    one, two = entry("one", provides="v"), entry("two", depends="!one", provides="v")
    assert names(one, two, want="v") == ["one-1-r0"]
    assert names(one, two, want="two v") == ["two-1-r0"]
    with pytest.raises(Unresolvable, match="the definition needs two, but two excludes one, which is one-1-r0"):
        names(one, two, want="one two")
    with pytest.raises(Unresolvable, match="the definition needs one, but two excludes one"):
        names(one, two, want="two one")


def test_packages_that_own_the_same_name() -> None:
    with pytest.raises(Unresolvable, match="openssl-1-r0 and libressl-1-r0 cannot both be so:libssl"):
        names(
            entry("libressl", provides="so:libssl=1"), entry("openssl", provides="so:libssl=2"), want="libressl openssl"
        )


def test_circles_are_no_hindrance() -> None:
    assert names(entry("a", depends="b"), entry("b", depends="a"), want="a") == ["a-1-r0", "b-1-r0"]


@pytest.mark.parametrize(
    ("want", "complaint"),
    [
        ("b", "a needs so:gone, which no package is or provides"),
        ("zzz", "the definition needs zzz, which no"),
        ("!a", "!a: a definition names what it wants"),
        ("c a", "d needs a=7, which no package"),
    ],
)
def test_missing_packages_are_named_with_their_dependents(want: str, complaint: str) -> None:
    there = entry("a", depends="so:gone"), entry("b", depends="a"), entry("c", depends="d"), entry("d", depends="a=7")
    with pytest.raises(Unresolvable, match=complaint):
        names(*there, want=want)


def test_many_packages_in_a_row() -> None:
    chain = [entry(f"p{number}", depends=f"p{number + 1}") for number in range(2000)]
    with pytest.raises(Unresolvable, match="p1999 needs p2000"):
        names(*chain, want="p0")
    assert len(names(*chain, entry("p2000"), want="p0")) == 2001


# ---- a repository


@pytest.fixture(scope="session")
def private(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_key(tmp_path_factory.mktemp("alpine-key"))


@pytest.fixture
def mirror(tmp_path: Path, private: Path) -> Repository:
    repository = Repository(tmp_path / "mirror", private)
    repository.add(
        "musl", files={"lib/ld-musl-x86_64.so.1": b"loader", "lib/libc.so": "ld-musl-x86_64.so.1"}, provides="so:libc=1"
    )
    repository.add("tool", "2.1-r3", {"usr/bin/tool": b"program"}, depends="so:libc extra")
    repository.add("extra", repository="community")
    repository.add("alien", "1-r0", extra="A:s390x")
    return repository


def apk(tmp_path: Path, repository: Repository) -> Apk:
    return Apk(tmp_path / "cache", "v3.22", "amd64", repository.root.as_uri() + "/", repository.keys)


@pytest.mark.parametrize("algorithm", ["RSA", "RSA256"])
def test_packages_come_from_a_repository(tmp_path: Path, mirror: Repository, algorithm: str) -> None:
    mirror.publish(algorithm=algorithm)
    packages = apk(tmp_path, mirror)
    packages.update()
    found = packages.fetch_all(["tool"])
    assert [(one.kind, one.name, one.version) for one in found] == [
        ("apk", "extra", "1.0-r0"), ("apk", "musl", "1.0-r0"), ("apk", "tool", "2.1-r3"),
    ]  # fmt: skip
    assert [one.name for one in packages.fetch(["musl"])] == ["musl"]
    assert [one.name for one in packages.fetch_kernel("tool")] == ["tool"]
    with pytest.raises(Unresolvable, match="no package alien"):
        packages.fetch(["alien"])
    tree = tmp_path / "tree"
    (tree / "usr/lib").mkdir(parents=True)
    (tree / "lib").symlink_to("usr/lib")
    extract(found, tree)
    assert (tree / "lib").is_symlink()  # the guest's /usr is merged, the package's is not
    assert (tree / "usr/lib/ld-musl-x86_64.so.1").read_bytes() == b"loader"
    assert (tree / "usr/lib/libc.so").readlink() == Path("ld-musl-x86_64.so.1")
    assert os.access(tree / "usr/bin/tool", os.X_OK)
    assert {path.name for path in tree.iterdir()} == {"lib", "usr"}  # nothing from the control segment


def test_packages_are_fetched_once_unless_damaged(tmp_path: Path, mirror: Repository) -> None:
    mirror.publish()
    packages = apk(tmp_path, mirror)
    packages.update()
    (musl,) = packages.fetch(["musl"])
    there = mirror.place() / musl.file.name
    whole = there.read_bytes()
    there.unlink()
    assert packages.fetch(["musl"]) == [musl]
    musl.file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ImageError, match=r"musl-1\.0-r0\.apk"):
        packages.fetch(["musl"])
    there.write_bytes(whole)
    assert packages.fetch(["musl"]) == [musl]
    assert [path.name for path in musl.file.parent.iterdir()] == [musl.file.name]


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda parts: [parts[0], parts[1], gzip.compress(b"x", 1)], "bytes, and the index says"),
        (lambda parts: [parts[0], parts[1], parts[2][:4] + b"\1" + parts[2][5:]], "its data are not those"),
        (lambda parts: [parts[0], parts[1][:4] + b"\1" + parts[1][5:], parts[2]], "its control part is not"),
        (lambda parts: [bytes(len(b"".join(parts)))], "it is no package"),
        (lambda parts: [parts[0], parts[1], parts[2][:-8] + bytes(8)], "it is no package"),
    ],
)
def test_a_package_that_is_not_the_one_in_the_index(tmp_path: Path, mirror: Repository, change, complaint: str) -> None:  # type: ignore[no-untyped-def]
    mirror.publish()
    file = mirror.place() / "tool-2.1-r3.apk"
    file.write_bytes(b"".join(change(split(file.read_bytes(), "it"))))
    packages = apk(tmp_path, mirror)
    packages.update()
    with pytest.raises(Untrusted, match=complaint):
        packages.fetch(["tool"])
    assert list((tmp_path / "cache/apks").iterdir()) == []


def test_an_index_that_someone_changed(tmp_path: Path, mirror: Repository) -> None:
    mirror.publish()
    file = mirror.place() / "APKINDEX.tar.gz"
    signature = split(file.read_bytes(), "it")[0]
    file.write_bytes(signature + segment({"APKINDEX": b"C:Q1x\nP:evil\nV:1\nS:1\n"}, end=True))
    with pytest.raises(Untrusted, match=rf"APKINDEX\.tar\.gz: the signature by {KEY} does not hold"):
        apk(tmp_path, mirror).update()


def test_an_index_by_a_key_that_we_do_not_have(tmp_path: Path, mirror: Repository) -> None:
    mirror.publish(key="other.rsa.pub")
    with pytest.raises(Untrusted, match=r"is signed by other\.rsa\.pub, and .*keys has no such key"):
        apk(tmp_path, mirror).update()
    mirror.publish(key="../keys/" + KEY)
    with pytest.raises(Untrusted, match="is not signed"):
        apk(tmp_path, mirror).update()


def test_an_index_without_a_signature(tmp_path: Path, mirror: Repository) -> None:
    mirror.publish()
    file = mirror.place() / "APKINDEX.tar.gz"
    data = file.read_bytes()
    file.write_bytes(data[len(split(data, "it")[0]) :])
    with pytest.raises(Untrusted, match="is not signed"):
        apk(tmp_path, mirror).update()
    file.write_bytes(segment({"README": b"no signature"}) + file.read_bytes())
    with pytest.raises(Untrusted, match="is not signed"):
        apk(tmp_path, mirror).update()


def test_a_mirror_that_is_not_there(tmp_path: Path, mirror: Repository) -> None:
    with pytest.raises(ImageError, match="name another in CAISSON_ALPINE_MIRROR"):
        apk(tmp_path, mirror).update()


@pytest.mark.parametrize("data", [b"no gzip", gzip.compress(b"x" * 999)[:-3]])
def test_streams_that_are_damaged(data: bytes) -> None:
    with pytest.raises(ImageError, match="it is damaged"):
        split(gzip.compress(b"whole") + data, "it")


def test_an_index_of_long_ago_is_refused(tmp_path: Path, mirror: Repository, monkeypatch: pytest.MonkeyPatch) -> None:
    mirror.add("old")
    mirror.publish()
    monkeypatch.setattr("caisson.image.packages.apk.time.time", lambda: NOW + 400 * 86400.0)
    with pytest.raises(Untrusted, match=r"older than 365 days; allow more with CAISSON_MAX_INDEX_AGE"):
        apk(tmp_path, mirror).update()
    monkeypatch.setenv("CAISSON_MAX_INDEX_AGE", "500")
    apk(tmp_path, mirror).update()


def test_an_index_is_not_unpacked_before_its_signature_was_checked(
    tmp_path: Path, mirror: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    mirror.add("one")
    mirror.publish()
    file = mirror.place() / "APKINDEX.tar.gz"
    signature = split(file.read_bytes(), "it")[0]
    file.write_bytes(signature + gzip.compress(bytes(1 << 20)))
    unpacked: list[int] = []
    real = gzip.decompress

    def record(data: bytes) -> bytes:
        unpacked.append(len(data))
        return real(data)

    monkeypatch.setattr("caisson.image.packages.apk.gzip.decompress", record)
    with pytest.raises(Untrusted, match="does not hold"):
        apk(tmp_path, mirror).update()
    assert unpacked == [len(signature)]


def test_an_index_is_fetched_up_to_a_bound(tmp_path: Path, mirror: Repository, monkeypatch: pytest.MonkeyPatch) -> None:
    mirror.publish()
    monkeypatch.setattr("caisson.image.packages.apk.MAX_INDEX", 1000)
    (mirror.place() / "APKINDEX.tar.gz").write_bytes(bytes(8 << 20))
    packages = apk(tmp_path, mirror)
    tracemalloc.start()
    try:
        with pytest.raises(ImageError, match="more than 1000 bytes; name another mirror"):
            packages.update()
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


def test_a_package_is_fetched_up_to_its_size(tmp_path: Path, mirror: Repository) -> None:
    mirror.publish()
    packages = apk(tmp_path, mirror)
    packages.update()
    (musl,) = packages.fetch(["musl"])
    musl.file.unlink()
    (mirror.place() / musl.file.name).write_bytes(bytes(8 << 20))
    tracemalloc.start()
    try:
        with pytest.raises(Untrusted, match="and the index says"):
            packages.fetch(["musl"])
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


def test_a_signature_is_unpacked_up_to_a_bound(tmp_path: Path) -> None:
    bomb = gzip.compress(bytes(64 << 20))
    tracemalloc.start()
    try:
        with pytest.raises(Untrusted, match="is not signed"):
            read_index(bomb, tmp_path, "it")
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()
