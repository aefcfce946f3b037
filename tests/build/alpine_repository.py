"""Create Alpine repositories in a directory for tests: packages, an index, and the key that signs it."""

from __future__ import annotations

import base64
import gzip
import hashlib
import io
import subprocess
import tarfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

KEY = "test-0123.rsa.pub"


#: The default date of an index.
NOW = int(time.time())


def segment(files: Mapping[str, bytes | str], *, end: bool = False, mtime: int = NOW) -> bytes:
    """Return a compressed tar segment: text is the target of a symbolic link; ``end`` completes the archive."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.mtime = mtime
            if isinstance(content, str):
                member.type, member.linkname = tarfile.SYMTYPE, content
                archive.addfile(member)
            else:
                member.size, member.mode = len(content), 0o755
                member.pax_headers = {"APK-TOOLS.checksum.SHA1": hashlib.sha1(content).hexdigest()}
                archive.addfile(member, io.BytesIO(content))
        blocks = archive.offset
    data = buffer.getvalue()
    return gzip.compress(data if end else data[:blocks], 1, mtime=0)


def make_key(directory: Path) -> Path:
    """Create a private key, and its public half in ``directory/keys``."""
    (directory / "keys").mkdir(parents=True)
    private = directory / "private.pem"
    subprocess.run(["openssl", "genrsa", "-out", private, "2048"], check=True, capture_output=True)
    subprocess.run(
        ["openssl", "rsa", "-in", private, "-pubout", "-out", directory / "keys" / KEY], check=True, capture_output=True
    )
    return private


@dataclass
class Repository:
    """``root`` is a mirror: packages are put below ``root/suite/main/x86_64``."""

    root: Path
    private: Path
    suite: str = "v3.22"
    architecture: str = "x86_64"
    records: dict[str, list[str]] = field(default_factory=lambda: {"main": [], "community": []})

    @property
    def keys(self) -> Path:
        return self.private.parent / "keys"

    def place(self, name: str = "main") -> Path:
        place = self.root / self.suite / name / self.architecture
        place.mkdir(parents=True, exist_ok=True)
        return place

    def add(
        self,
        name: str,
        version: str = "1.0-r0",
        files: Mapping[str, bytes | str] | None = None,
        *,
        depends: str = "",
        provides: str = "",
        extra: str = "",
        repository: str = "main",
    ) -> Path:
        """Add a package; ``publish`` writes the index."""
        data = segment(files or {f"usr/share/{name}": name.encode()}, end=True)
        information = f"pkgname = {name}\npkgver = {version}\ndatahash = {hashlib.sha256(data).hexdigest()}\n"
        control = segment({".PKGINFO": information.encode()})
        whole = segment({f".SIGN.RSA.{KEY}": b"the index vouches for it"}) + control + data
        file = self.place(repository) / f"{name}-{version}.apk"
        file.write_bytes(whole)
        checksum = "Q1" + base64.b64encode(hashlib.sha1(control).digest()).decode()
        lines = [f"C:{checksum}", f"P:{name}", f"V:{version}", f"A:{self.architecture}", f"S:{len(whole)}", "T:a test"]
        lines += [f"D:{depends}"] if depends else []
        lines += [f"p:{provides}"] if provides else []
        lines += [extra] if extra else []
        self.records[repository].append("\n".join(lines) + "\n")
        return file

    def publish(self, *, algorithm: str = "RSA", key: str = KEY) -> None:
        """Write and sign the indexes."""
        for name, records in self.records.items():
            index = segment({"DESCRIPTION": b"a test", "APKINDEX": "\n".join(records).encode()}, end=True)
            digest = {"RSA": "-sha1", "RSA256": "-sha256"}[algorithm]
            sign = ["openssl", "dgst", digest, "-sign", str(self.private)]
            signature = subprocess.run(sign, input=index, check=True, capture_output=True).stdout
            signed = segment({f".SIGN.{algorithm}.{key}": signature}) + index
            (self.place(name) / "APKINDEX.tar.gz").write_bytes(signed)
