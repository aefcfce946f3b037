"""Fetch Alpine packages: verify the index's signature and the packages against the index, and unpack without root.

Debian (bookworm, trixie) has no apk-tools, so this does what `apk fetch` would, for the format that Alpine's
repositories have (apk-v2(5)).  A package is three gzip streams, one after another: signature, control, data.  The
signed index has the digest of a package's control part, and that part has the digest of the data: with both checked
a package needs no signature of its own.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import io
import os
import re
import tarfile
import tempfile
import time
import urllib.error
import urllib.request
import zlib
from collections.abc import Iterable
from pathlib import Path

from caisson.image.errors import ImageError
from caisson.image.packages.apk_index import Entry, Index, parse
from caisson.image.packages.package import Package
from caisson.image.run import CommandFailed, run

#: Alpine's names of architectures, by Debian's.
ARCHITECTURES = {"amd64": "x86_64", "arm64": "aarch64"}

REPOSITORIES = ("main", "community")

#: A signature's digest, as its file name and as openssl spell it.
DIGESTS = {"RSA": "sha1", "RSA256": "sha256", "RSA512": "sha512"}

#: Seconds within which a server must respond.
TIMEOUT = 60

#: Bytes of a compressed index, and of a signature's segment, before anything is verified.
MAX_INDEX = 64 << 20
MAX_SIGNATURE = 64 << 10

#: Days after which an index is too old, unless $CAISSON_MAX_INDEX_AGE says otherwise: it has no date of expiry.
MAX_INDEX_DAYS = 365


class Untrusted(ImageError):
    """An index or a package was not signed by any of the trusted keys."""


class Apk:
    """Provide the packages of one release, with downloads in ``directory`` (kept between runs: it is a cache).

    ``keys`` is a directory with the public keys that an index may be signed by, in files that are called as in
    /etc/apk/keys.
    """

    def __init__(
        self,
        directory: Path,
        suite: str,
        architecture: str,
        mirror: str,
        keys: Path,
    ) -> None:
        self.directory = directory
        self.suite = suite
        self.architecture = ARCHITECTURES[architecture]
        self.mirror = mirror.rstrip("/")
        self.keys = keys
        self._index = Index([])

    def update(self) -> None:
        """Fetch the indexes.  Raises ImageError if the mirror fails, and Untrusted for an invalid signature."""
        (self.directory / "apks").mkdir(parents=True, exist_ok=True)
        entries: list[Entry] = []
        for name in REPOSITORIES:
            place = f"{self.mirror}/{self.suite}/{name}/{self.architecture}"
            found = read_index(_get(f"{place}/APKINDEX.tar.gz", MAX_INDEX), self.keys, f"{place}/APKINDEX.tar.gz")
            entries += (
                entry for entry in parse(found, place) if entry.architecture in (self.architecture, "noarch", "")
            )
        self._index = Index(entries)

    def fetch(self, packages: Iterable[str]) -> list[Package]:
        """Download exactly these packages, or take them from before.  Raises ImageError."""
        return [self._fetch(self._index.newest(package)) for package in packages]

    def fetch_all(self, packages: Iterable[str]) -> list[Package]:
        """Download the packages and all they depend on.  Raises ImageError."""
        return [self._fetch(entry) for entry in self._index.resolve(packages)]

    def fetch_kernel(self, package: str) -> list[Package]:
        """Fetch the package with a kernel and its modules: for Alpine it is the package of this name."""
        return self.fetch([package])

    def _fetch(self, entry: Entry) -> Package:
        file = self.directory / "apks" / entry.file
        if not file.is_file() or _wrong(file.read_bytes(), entry):
            data = _get(f"{entry.repository}/{entry.file}", entry.size)
            if complaint := _wrong(data, entry):
                raise Untrusted(f"{entry.repository}/{entry.file}: {complaint}")
            with tempfile.NamedTemporaryFile(dir=file.parent, delete=False) as stream:
                stream.write(data)
            Path(stream.name).rename(file)
        return Package.of("apk", entry.name, entry.version, file)


def extract(apks: Iterable[Package], tree: Path) -> None:
    """Unpack packages over each other; none of their scripts runs.  Files belong to whoever runs this."""
    for apk in apks:
        archive = gzip.decompress(split(apk.file.read_bytes(), str(apk.file))[-1])
        # /lib and the like are links in a guest.  The unknown keywords are checksums, not needed after `_wrong`.
        options = ["--keep-directory-symlink", "--no-same-owner", "--no-same-permissions", "--mode=u+rwX"]
        run(["tar", "--extract", "--warning=no-unknown-keyword", *options, "--directory", tree], stdin=archive)


def read_index(data: bytes, keys: Path, shown: str) -> str:
    """Read a signed index.  Raises Untrusted unless it was signed by one of the keys."""
    if len(data) > MAX_INDEX:
        raise ImageError(f"{shown}: more than {MAX_INDEX} bytes; name another mirror in CAISSON_ALPINE_MIRROR")
    signature = _first_stream(data, shown)
    signed = data[len(signature) :]
    if not signed:
        raise Untrusted(f"{shown} is not signed")
    _verify(_files(signature, shown), signed, keys, shown)  # before anything else of it is unpacked
    files = _files(signed, shown)
    _check_age(signed, shown)
    if "APKINDEX" not in files:
        raise ImageError(f"{shown}: has no index in it")
    return files["APKINDEX"].decode(errors="replace")


def _first_stream(data: bytes, shown: str) -> bytes:
    """Return the first gzip stream of a file that is not verified yet: nothing else of it is unpacked."""
    unpacker = zlib.decompressobj(wbits=31)
    try:
        unpacker.decompress(data, MAX_SIGNATURE)
    except zlib.error as error:
        raise ImageError(f"{shown} is damaged: {error}") from error
    if not unpacker.eof:
        raise Untrusted(f"{shown} is not signed")
    return data[: len(data) - len(unpacker.unused_data)]


def _check_age(signed: bytes, shown: str) -> None:
    """Raise Untrusted for an old index: a mirror could be holding back security fixes."""
    with tarfile.open(fileobj=io.BytesIO(gzip.decompress(signed))) as archive:
        made = max((member.mtime for member in archive), default=0)
    days = int(os.environ.get("CAISSON_MAX_INDEX_AGE") or MAX_INDEX_DAYS)
    if made < time.time() - days * 86400:
        date = time.strftime("%Y-%m-%d", time.gmtime(made))
        raise Untrusted(f"{shown}: of {date}, older than {days} days; allow more with CAISSON_MAX_INDEX_AGE=DAYS")


def split(data: bytes, shown: str) -> list[bytes]:
    """Split a file into its gzip streams, still compressed.  Raises ImageError for a damaged one."""
    streams = []
    while data:
        unpacker = zlib.decompressobj(wbits=31)
        try:
            unpacker.decompress(data)
        except zlib.error as error:
            raise ImageError(f"{shown} is damaged: {error}") from error
        if not unpacker.eof:
            raise ImageError(f"{shown} is damaged: it ends too early")
        streams.append(data[: len(data) - len(unpacker.unused_data)])
        data = unpacker.unused_data
    return streams


def _verify(signatures: dict[str, bytes], signed: bytes, keys: Path, shown: str) -> None:
    """Check that there is a valid signature by one of our keys.  Raises Untrusted."""
    names = []
    for name, signature in signatures.items():
        found = re.fullmatch(r"\.SIGN\.(RSA|RSA256|RSA512)\.([^/]+)", name)
        if not found:
            continue
        names.append(found[2])
        if not (keys / found[2]).is_file():
            continue
        with tempfile.NamedTemporaryFile() as file:
            file.write(signature)
            file.flush()
            digest, key = f"-{DIGESTS[found[1]]}", keys / found[2]
            try:
                run(["openssl", "dgst", digest, "-verify", key, "-signature", file.name], stdin=signed)
            except CommandFailed as error:
                raise Untrusted(f"{shown}: the signature by {found[2]} does not hold: {error}") from error
            return
    if names:
        raise Untrusted(f"{shown} is signed by {', '.join(names)}, and {keys} has no such key")
    raise Untrusted(f"{shown} is not signed")


def _wrong(data: bytes, entry: Entry) -> str:
    """Return what is wrong with a package's file; empty if it matches the index."""
    if len(data) != entry.size:
        return f"it has {len(data)} bytes, and the index says {entry.size}"
    try:
        streams = split(data, entry.file)
        # Signatures are optional: the signed index has the control part's digest.
        *_, control, contents = streams
        information = _files(control, entry.file)[".PKGINFO"].decode(errors="replace")
    except (ImageError, KeyError, ValueError) as error:
        return f"it is no package: {error}"
    algorithm = {"Q1": hashlib.sha1, "Q2": hashlib.sha256}.get(entry.checksum[:2])
    if algorithm is None:
        return f"the index has a checksum of an unknown kind, {entry.checksum}"
    if base64.b64encode(algorithm(control).digest()).decode() != entry.checksum[2:]:
        return "its control part is not the one that the index means"
    digest = re.search(r"^datahash = ([0-9a-f]{64})$", information, re.MULTILINE)
    if not digest or digest[1] != hashlib.sha256(contents).hexdigest():
        return "its data are not those that its control part means"
    return ""


def _files(segment: bytes, shown: str) -> dict[str, bytes]:
    """Read the regular files of a compressed tar segment, which may lack the end-of-archive blocks."""
    try:
        with tarfile.open(fileobj=io.BytesIO(gzip.decompress(segment))) as archive:
            members = [member for member in archive if member.isfile()]
            return {member.name: archive.extractfile(member).read() for member in members}  # type: ignore[union-attr]
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        raise ImageError(f"{shown} is damaged: {error}") from error


def _get(url: str, most: int) -> bytes:
    """Fetch a file from a server (or, by file:, a directory), at most ``most`` + 1 bytes of it.  Raises ImageError."""
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT) as answer:
            data: bytes = answer.read(most + 1)
            return data
    except (OSError, ValueError) as error:
        raise ImageError(
            f"{url}: {error}; if that is not the right mirror, name another in CAISSON_ALPINE_MIRROR"
        ) from error
