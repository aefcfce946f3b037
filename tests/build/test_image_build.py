"""Test the contents of the default image, really built (or taken from the cache, if built before)."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from spdx_tools.spdx.parser.jsonlikedict.json_like_dict_parser import JsonLikeDictParser
from spdx_tools.spdx.validation.document_validator import validate_full_spdx_document

from caisson import image
from caisson.agent.libcontainer.process.libseccomp import LIBRARY
from caisson.image.build.builder import Build
from caisson.image.build.cache import Cache, default_root
from caisson.image.build.definition import load
from caisson.image.build.rootfs import HOME
from tests.support.poll import wait_until


@pytest.fixture(scope="session")
def built() -> image.Image:
    return image.build_image(report=print)


@pytest.fixture(scope="session")
def archive(built: image.Image) -> bytes:
    assert built.manifest["root"]["compression"] == "none"
    return (built.directory / "initrd.img").read_bytes()


@pytest.fixture(scope="session")
def names(archive: bytes) -> set[str]:
    return set(
        subprocess.run(["cpio", "-it", "--quiet"], input=archive, capture_output=True).stdout.decode().split("\n")
    )


@pytest.fixture(scope="session")
def guest(archive: bytes, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Unpack the guest's root, without device nodes, which only root may create."""
    root = tmp_path_factory.mktemp("guest")
    unpack = ["cpio", "-id", "--quiet", "--no-absolute-filenames", "--nonmatching", "dev/*"]
    subprocess.run(unpack, input=archive, cwd=root, check=True)
    yield root
    shutil.rmtree(root)


def test_a_killed_compiler_leaves_files_only_where_it_builds(tmp_path: Path) -> None:
    temporary, build = tmp_path / "tmp", tmp_path / "build"
    temporary.mkdir()
    program = "import sys; from pathlib import Path; from caisson.image.build.sources import compile_nsexec as compile;"
    words = [sys.executable, "-c", f"{program} compile(Path(sys.argv[1]), Path(sys.argv[2]), '', None)"]
    with subprocess.Popen([*words, build, tmp_path / "nsexec"], env=os.environ | {"TMPDIR": str(temporary)}) as process:
        wait_until(lambda: any(tmp_path.glob("*/*.o")) or process.poll() is not None, "an object file")
        process.kill()
    assert not list(temporary.iterdir())
    assert list(build.glob("*.o"))


def python(guest: Path, program: str) -> str:
    """Run a program in the guest's interpreter, with the guest's libraries, on this machine."""
    triplet, version = load().definition.triplet, load().definition.python
    library = guest / "usr/lib" / triplet
    (loader,) = library.glob("ld-linux-*.so.*")
    argv: list[str | Path] = [
        loader,
        "--library-path",
        library,
        guest / f"usr/bin/python{version}",
        "-S",
        "-P",
        "-c",
        program,
    ]
    environment = {"PYTHONHOME": str(guest / "usr"), "PYTHONPATH": str(guest / HOME)}
    done = subprocess.run(argv, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return str(done.stdout)


def test_a_second_build_is_a_hit(built: image.Image) -> None:
    said: list[str] = []
    assert image.build_image(report=said.append) == built
    assert said == []


def test_the_manifest_says_what_is_there(built: image.Image) -> None:
    document = built.manifest
    assert document == json.loads((built.directory / "image.json").read_text())
    for part in ("kernel", "root"):
        data = (built.directory / document[part]["file"]).read_bytes()
        assert hashlib.sha256(data).hexdigest() == document[part]["sha256"]
    assert document["root"]["bytes"] == len(data)
    assert re.match(r"\d+\.\d+\.", document["kernel"]["release"])
    assert "panic=-1" in document["cmdline"]
    assert document["init"] == "agent"
    packages = {(package["type"], package["name"]): package for package in document["packages"]}
    for kind, name in [
        ("deb", "busybox-static"),
        ("deb", "libc6"),
        ("deb", f"python{load().definition.python}-minimal"),
        ("deb", f"linux-image-{document['kernel']['release']}"),
        ("wheel", "protobuf"),
    ]:
        assert packages[kind, name]["version"]
        assert re.fullmatch("[0-9a-f]{64}", packages[kind, name]["sha256"])


def test_licences_are_those_that_the_packages_declare(built: image.Image) -> None:
    found = json.loads((built.directory / "image.spdx.json").read_text())
    parsed = JsonLikeDictParser().parse(found)  # type: ignore[no-untyped-call]
    assert [message.validation_message for message in validate_full_spdx_document(parsed)] == []
    declared = {package["name"]: package["licenseDeclared"] for package in found["packages"]}
    assert declared["busybox-static"] == "NOASSERTION", "its copyright file is only for people"
    assert declared["protobuf"] == "BSD-3-Clause"
    assert "LGPL-2.1-or-later" in declared["libc6"] and declared["zlib1g"] == "Zlib"
    assert declared["linux"] == "GPL-2.0-only WITH Linux-syscall-note"


def test_every_byte_of_the_guest_has_an_owner(built: image.Image, guest: Path) -> None:
    """As drawn by `--treemap`."""
    files = Build(load()).files()
    owners = {file.path: (file.package, file.kind) for file in files}
    version = load().definition.python
    assert owners[f"usr/bin/python{version}"] == (f"python{version}-minimal", "Debian packages")
    assert owners[f"usr/lib/python{version}/asyncio/events.pyc"][0] == f"libpython{version}-stdlib"
    assert owners[f"{HOME}/google/protobuf/message.pyc"] == ("protobuf", "Python wheels")
    assert owners[f"{HOME}/nsexec"] == ("agent", "agent")
    assert owners[f"{HOME}/containers/busybox/bin/busybox"][0] == "busybox-static"
    unknown = sum(file.size for file in files if file.kind == "made")
    assert unknown < sum(file.size for file in files) / 100
    there = {str(path.relative_to(guest)) for path in guest.rglob("*") if path.is_file() and not path.is_symlink()}
    written = {f"{HOME}/image.json", "var/lib/osbuilder/osbuilder.yaml"}  # written after everything else is known
    assert {name for name in there - owners.keys() if (guest / name).stat().st_nlink == 1} <= written


def test_the_image_knows_itself(built: image.Image, guest: Path) -> None:
    inside: dict[str, Any] = json.loads((guest / HOME / "image.json").read_text())
    assert inside | {"root": built.manifest["root"]} == built.manifest
    assert built.manifest["containers"] == {"busybox": f"/{HOME}/containers/busybox"}


def test_image_has_what_a_guest_needs(names: set[str], guest: Path) -> None:
    needed = {"init", "dev/console", "proc", "sys", "dev", "run", "tmp", "lib", "bin", f"{HOME}/nsexec"}
    needed |= {
        f"{HOME}/caisson/proto/kata1/agent_pb2.pyc",
        f"{HOME}/caisson/agent/model/sandbox.pyc",
        "usr/lib/modules/caisson.list",
    }
    assert needed <= names
    interpreter, flags = (guest / "init").read_text().splitlines()[0].split()
    assert interpreter.removeprefix("#!/") in names
    assert flags == "-IS"
    for program in ("init", f"{HOME}/nsexec", "usr/bin/python" + load().definition.python):
        assert os.access(guest / program, os.X_OK)


def test_image_has_no_more_than_a_guest_needs(names: set[str]) -> None:
    unwanted = re.compile(
        r"\.py$|__pycache__|\.dist-info|^usr/share/.|^var/.|^etc/.|/man\d?/|/doc/|/locale/|gconv|/test/|"
        rf"^usr/bin/(?!python)|^usr/sbin/.|libcrypto|{HOME}/caisson/agent/(client|nsexec)"
    )
    for_kata = {"var/lib", "var/lib/osbuilder", "var/lib/osbuilder/osbuilder.yaml"}
    assert [name for name in names - for_kata if unwanted.search(name)] == []


def test_modules_are_listed_in_the_order_of_their_needs(built: image.Image, guest: Path) -> None:
    listed = [Path(line) for line in (guest / "usr/lib/modules/caisson.list").read_text().splitlines()]
    assert [file.name for file in listed] == built.manifest["kernel"]["modules"]
    assert "vmw_vsock_virtio_transport.ko" in built.manifest["kernel"]["modules"]
    loaded: set[str] = set()
    here = {file.stem for file in listed}
    for file in listed:
        data = (guest / "usr" / file.relative_to("/")).read_bytes()
        assert data[:4] == b"\x7fELF"
        (depends,) = re.findall(rb"\0depends=([^\0]*)\0", data)
        assert {name for name in depends.decode().split(",") if name in here} <= loaded
        loaded.add(file.stem)


def test_the_guests_python_imports_all_that_the_agent_builds_on(guest: Path) -> None:
    program = (
        "import asyncio, array, fcntl, hashlib, json, random, resource, select, socket, struct, termios\n"
        "import ctypes, google.protobuf, google._upb._message, sys\n"
        "from caisson.proto.kata1 import agent_pb2, health_pb2, oci_pb2\n"
        "agent_pb2.CreateContainerRequest(container_id='x').SerializeToString()\n"
        "assert hashlib.sha256(b'').hexdigest().startswith('e3b0c442')\n"
        "print(asyncio.__file__, google.protobuf.__cached__, 'ssl' in sys.modules)\n"
    )
    where, cached, tls = python(guest, program).split()
    assert where.endswith("asyncio/__init__.pyc")
    assert cached.endswith("google/protobuf/__init__.pyc")
    assert tls == "False"


def test_tracebacks_name_files_as_they_are_in_the_guest(guest: Path) -> None:
    shown = python(
        guest, "import asyncio, caisson.proto.kata1.agent_pb2, caisson.agent\nprint(asyncio.run.__code__.co_filename)"
    )
    assert shown.strip() == f"/usr/lib/python{load().definition.python}/asyncio/runners.py"
    paths = [*(guest / HOME).rglob("*.pyc"), *(guest / "usr/lib").glob("python*/*.pyc")]
    assert len(paths) > 200
    assert [path for path in paths if str(default_root()).encode() in path.read_bytes()] == []


def test_byte_code_is_never_checked_against_a_source(guest: Path) -> None:
    flags = {path.read_bytes()[4:8] for path in guest.rglob("*.pyc")}
    assert flags == {b"\1\0\0\0"}  # PEP 552: hash-based, unchecked


def test_libraries_are_complete_and_all_used(guest: Path) -> None:
    elves = [path for path in guest.rglob("*") if path.is_file() and not path.is_symlink() and path.suffix != ".ko"]
    elves = [path for path in elves if path.open("rb").read(4) == b"\x7fELF"]
    output = subprocess.run(["readelf", "-dW", *elves], capture_output=True, text=True).stdout
    needed = set(re.findall(r"\(NEEDED\).*\[(.*)\]", output)) | {LIBRARY, "libgcc_s.so.1"}  # which are loaded by name
    there = {path.name for path in (guest / "usr/lib" / load().definition.triplet).iterdir()}
    assert needed <= there
    targets = {
        path.resolve().name for path in (guest / "usr/lib" / load().definition.triplet).iterdir() if path.name in needed
    }
    assert there - needed - targets == {path for path in there if path.startswith("ld-linux")} - needed


def test_the_container_has_every_applet(guest: Path) -> None:
    root = guest / HOME / "containers/busybox"
    listed = subprocess.run([root / "bin/busybox", "--list"], capture_output=True, text=True).stdout.split()
    assert len(listed) > 200
    for applet in ("sh", "ps", "uname", "sha256sum", "head"):
        assert (root / "bin" / applet).readlink() == Path("busybox")
    assert {path.name for path in (root / "bin").iterdir()} == {*listed, "busybox"}
    assert {"proc", "sys", "dev", "tmp", "run", "root", "home", "var", "etc", "mnt"} <= {p.name for p in root.iterdir()}
    assert (root / "etc/passwd").read_text().startswith("root:x:0:0:")
    assert "root:x:0:" in (root / "etc/group").read_text()


@pytest.fixture
def cache(built: image.Image, tmp_path: Path) -> Cache:
    """Provide a cache with everything that needs a network, but no image."""
    build = Build(load())
    for step, key in (("base", build.base_key()), ("kernel", build.kernel_key())):
        shutil.copytree(default_root() / step / key, tmp_path / step / key, symlinks=True)
    return Cache(tmp_path)


def test_the_same_sources_give_the_same_bytes_under_another_umask(
    built: image.Image, archive: bytes, cache: Cache
) -> None:
    said: list[str] = []
    before = os.umask(0o077)
    try:
        again = image.build_image(cache=cache, report=said.append)
    finally:
        os.umask(before)
    assert said == ["compiling the agent", "packing the image"]
    assert again.manifest == built.manifest
    assert (again.directory / "initrd.img").read_bytes() == archive


def test_a_directory_that_holds_no_image(tmp_path: Path) -> None:
    with pytest.raises(image.ImageError, match=r"contains no image \(no such file or directory\); build one: caisson"):
        image.Image.load(tmp_path)
    for text in ('{"format": 99}', "[]"):
        (tmp_path / "image.json").write_text(text)
        with pytest.raises(image.ImageError, match="different format; build it again"):
            image.Image.load(tmp_path)


def test_sources_that_change_meanwhile_are_not_taken_for_those_of_the_key(
    cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    version = "0.0.1"

    def report(line: str) -> None:
        nonlocal version
        said.append(line)
        if said == ["compiling the agent"]:
            version = "0.0.2"  # while the agent is compiled
        elif said[-1] == "packing the image" and version == "0.0.2":
            version = "0.0.3"  # while the image is packed

    monkeypatch.setattr(sys.modules["caisson.image.build.sources"], "agent_version", lambda: version)
    made = image.build_image(cache=cache, report=report)
    assert said == ["compiling the agent", "packing the image"] * 2
    assert made.manifest["agent"]["version"] == "0.0.3"
    assert len([path for path in (cache.root / "images").iterdir() if not path.name.startswith(".")]) == 1
    version = "0.0.4"
    said.clear()
    assert image.build_image(cache=cache, report=said.append).manifest["agent"]["version"] == "0.0.4"
    assert said == ["compiling the agent", "packing the image"]


def rebuilt(cache: Cache, template: Path) -> dict[str, bytes]:
    """Return an image of a custom template, as its files' contents by name."""
    made = image.build_image(template, cache=cache)
    with tempfile.TemporaryDirectory() as place:
        unpack = ["cpio", "-id", "--quiet", "--no-absolute-filenames", "--nonmatching", "dev/*"]
        subprocess.run(unpack, input=(made.directory / "initrd.img").read_bytes(), cwd=place, check=True)
        files = (path for path in Path(place).rglob("*") if path.is_file() and not path.is_symlink())
        return {str(path.relative_to(place)): path.read_bytes() for path in files}


def test_files_and_hooks_of_a_template_of_ones_own(cache: Cache, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    (mine / "files/etc").mkdir(parents=True)
    (mine / "files/etc/greeting.j2").write_text("hello from {{ name }}\n")
    (mine / "files/etc/plain").write_text("{{ as it is }}\n")
    (mine / "more").write_text("more\n")
    hook = mine / "hook"
    hook.write_text('#!/bin/sh\necho hooked >"$1/etc/hooked"; rm "$1/etc/plain"\n')
    hook.chmod(0o755)
    definition = mine / "image.yaml"
    definition.write_text("extends: debian\nname: mine\nfiles: {/etc/more: more}\n")
    files = rebuilt(cache, definition)
    assert files["etc/greeting"] == b"hello from mine\n"
    assert files["etc/plain"] == b"{{ as it is }}\n"
    assert files["etc/more"] == b"more\n"
    definition.write_text("extends: debian\nname: mine\nhooks: [hook]\n")
    files = rebuilt(cache, definition)
    assert files["etc/hooked"] == b"hooked\n"
    assert "etc/plain" not in files
    hook.write_text("#!/bin/sh\necho no such luck >&2; exit 3\n")
    with pytest.raises(image.ImageError, match=r"hook .* exited with status 3:\nno such luck"):
        image.build_image(definition, cache=cache)
    assert not list((cache.root / "images").glob(".making-*"))


def test_a_limit_that_is_exceeded_names_the_largest_files(cache: Cache) -> None:
    with pytest.raises(image.ImageError, match=r"limits\.tree is 1 MB, but the tree has \d+\.\d\d MB") as caught:
        image.build_image(settings=["limits.tree=1 MB"], cache=cache)
    lines = str(caught.value).splitlines()[1:]
    assert len(lines) == 10
    assert "/usr/bin/python" in lines[0]
    with pytest.raises(image.ImageError, match=r"limits\.image is 2 MB"):
        image.build_image(settings=["limits.image=2 MB", "compression=zstd"], cache=cache)


def test_image_has_the_files_of_katas_osbuilder(guest: Path, built: image.Image) -> None:
    document = yaml.safe_load((guest / "var/lib/osbuilder/osbuilder.yaml").read_text())
    assert document["file-format-version"] == "0.0.2"
    assert document["agent"] == {
        "url": "",
        "name": "caisson-agent",
        "version": built.manifest["agent"]["version"],
        "agent-is-init-daemon": "yes",
    }


def test_an_agent_that_has_changed_costs_the_last_layers_only(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    image.build_image(cache=cache)
    monkeypatch.setattr(sys.modules["caisson.image.build.sources"], "agent_version", lambda: "9.9.9")
    monkeypatch.delattr("caisson.image.build.sources.compile_nsexec")
    said: list[str] = []
    image.build_image(cache=cache, report=said.append)
    assert said == ["compiling the agent", "packing the image"]
