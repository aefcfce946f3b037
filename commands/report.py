"""Collect what a bug report needs in one archive, without secrets."""

from __future__ import annotations

import io
import json
import os
import platform
import re
import tarfile
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

from caisson.commands import doctor
from caisson.image.vm.directory import VMDirectory
from caisson.image.vm.runroot import run_root
from caisson.proto.contract import VERSION

#: Maximum bytes of a log's end, and of other files.
MAX_TAIL, MAX_FILE = 256 << 10, 1 << 20

#: Files that describe a VM and its last output; others are not included.
TEXTS = ("vm.json", "image.json", "console.log", "qemu.log", "firmware.log")

#: A setting whose name suggests a secret value, on a command line or in JSON.  Bounded: a log comes from the guest.
SECRET = re.compile(
    r'((?:passw(?:or)?d|secret|token|credential|api[_-]?key)[\w.-]{0,40}"?\s{0,4}[=:]\s{0,4}"?)[^\s",]+', re.IGNORECASE
)

#: The name and password in a URL (RFC 3986, section 3.2.1), for instance a mirror's.
USERINFO = re.compile(r"//[^\s/@\"]{1,200}@")

#: Packages whose versions matter.
LIBRARIES = ("grpcio", "protobuf", "jinja2", "pyyaml", "kconfiglib", "invoke", "pytest")


def write(archive: Path) -> list[str]:
    """Write a .tar.gz; returns the names of its members.  Raises OSError."""
    names = []
    with tarfile.open(archive, "x:gz") as tar:
        for name, text in _texts():
            data = without_secrets(text).encode(errors="replace")
            member = tarfile.TarInfo(f"caisson-report/{name}")
            member.size, member.mtime, member.mode = len(data), int(time.time()), 0o644
            tar.addfile(member, io.BytesIO(data))
            names.append(name)
    return names


def without_secrets(text: str) -> str:
    """Remove values of settings that are secret by name, and the name of the user's home."""
    home = str(Path.home())
    text = text.replace(f"{home}/", "~/") if len(home) > 1 else text
    return SECRET.sub(r"\1[removed]", USERINFO.sub("//[removed]@", text))


def _texts() -> Iterator[tuple[str, str]]:
    parts: dict[str, Callable[[], str]] = {"versions.txt": _versions, "doctor.json": _doctor, "vms.txt": _vms}
    for name, text in parts.items():
        yield name, _or_why_not(text)
    root = run_root()
    for directory in sorted(path for path in root.iterdir() if path.is_dir()) if root.is_dir() else ():
        for name in TEXTS:
            if (directory / name).is_file():
                yield f"vms/{directory.name}/{name}", _or_why_not(lambda file=directory / name: _tail(file))  # type: ignore[misc]


def _or_why_not(text: Callable[[], str]) -> str:
    """Collect a part of a report, or say why it fails: reports are made when things are broken."""
    try:
        return text()
    except Exception as error:
        return f"{type(error).__name__}: {error}\n"


def _versions() -> str:
    lines = [f"caisson {VERSION}", f"Python {platform.python_version()}"]
    lines.append(f"Linux {platform.release()} {platform.machine()}")
    lines.append(platform.freedesktop_os_release().get("PRETTY_NAME", ""))
    for library in LIBRARIES:
        try:
            lines.append(f"{library} {metadata.version(library)}")
        except metadata.PackageNotFoundError:
            lines.append(f"{library} is not installed")
    lines += [f"{name}={value}" for name, value in sorted(os.environ.items()) if name.startswith("CAISSON_")]
    return "\n".join(lines) + "\n"


def _doctor() -> str:
    return json.dumps(doctor.documents(doctor.examine()), indent=2) + "\n"


def _vms() -> str:
    """Return the VMs' directories, and whether a supervisor holds each."""
    root = run_root()
    found = sorted(path for path in root.iterdir() if path.is_dir()) if root.is_dir() else []
    lines = [f"{path.name}: {'running' if VMDirectory(path).is_running() else 'not running'}" for path in found]
    return "\n".join([f"{root}: {len(found)} VMs", *lines]) + "\n"


def _tail(file: Path) -> str:
    limit = MAX_TAIL if file.suffix == ".log" else MAX_FILE
    with file.open("rb") as stream:
        stream.seek(max(0, os.fstat(stream.fileno()).st_size - limit))
        return stream.read(limit).decode(errors="replace")
