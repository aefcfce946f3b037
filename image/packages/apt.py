"""Resolve and fetch packages of any suite of Debian or a derivative with apt itself, in a directory of its own.

apt gets a configuration that shares nothing with the host's but the mirror, how it is reached (a proxy, certificates)
and the archive keys: no root is needed, the host's packages are ignored, and dependencies are apt's to resolve.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

from caisson.image.errors import ImageError
from caisson.image.packages.package import Package
from caisson.image.programs import DEBIAN_KEYRING
from caisson.image.run import CommandFailed, run


@dataclass(frozen=True)
class Keyring:
    """Name the keys that a suite may be signed by; ``hint`` says where to get the file."""

    file: Path
    hint: str


DEBIAN = Keyring(Path(DEBIAN_KEYRING), "run: sudo apt-get install --reinstall debian-archive-keyring")


#: Settings taken over from the host's apt configuration: how to reach servers, nothing that weakens a check.
TAKEN_OVER = re.compile(r"Acquire::https?::(Proxy(-Auto-Detect)?(::[^ ]+)?|CAInfo|CaPath|SslCert|SslKey|Timeout) ")

#: Suites without security updates of their own: fixes arrive in them directly.
WITHOUT_SECURITY = ("sid", "unstable", "experimental")


def security_mirror(mirror: str) -> str:
    """Return the mirror of Debian's security updates; empty if none is known or wanted.

    ``$CAISSON_SECURITY_MIRROR`` (``none`` for none), the neighbour of a mirror that ends in /debian, or the host's own
    beside its own mirror: cloud images name lists of mirrors (mirror+file:).
    """
    if chosen := os.environ.get("CAISSON_SECURITY_MIRROR"):
        return "" if chosen == "none" else chosen
    if mirror.rstrip("/").endswith("/debian"):
        return mirror.rstrip("/") + "-security"
    own = _host_repositories()
    return next((uri for uri in own if "security" in uri), "") if mirror in own else ""


def _host_repositories() -> list[str]:
    """Return the URIs of Debian's repositories of which the host's apt has an index."""
    words = ["apt-get", "indextargets", "--format", "$(ORIGIN) $(CREATED_BY) $(REPO_URI)"]
    lines = subprocess.run(words, capture_output=True, text=True).stdout.splitlines()
    return [line.removeprefix("Debian Packages ") for line in lines if line.startswith("Debian Packages ")]


def host_mirror() -> str:
    """Choose a Debian mirror: ``$CAISSON_MIRROR``, the host's own apt sources, or debootstrap's built-in default.

    Raises ImageError if none of these names one.
    """
    if chosen := os.environ.get("CAISSON_MIRROR"):
        return chosen
    for uri in _host_repositories():
        if "security" not in uri:
            return uri
    for source in [*Path("/etc/apt/sources.list.d").glob("*"), Path("/etc/apt/sources.list")]:
        # Before the first `apt-get update`, apt does not know the origin of its sources.
        text = source.read_text(errors="replace") if source.is_file() else ""
        if found := re.search(r"^(?:URIs:|deb(?: \[.*?\])?)\s+(\S+/debian/?)(?:\s|$)", text, re.MULTILINE):
            return found[1]
    script = Path("/usr/share/debootstrap/scripts/debian-common")
    if script.is_file() and (found := re.search(r"default_mirror (\S+)", script.read_text())):
        return found[1]
    raise ImageError("mirror: no Debian mirror is known on this machine; name one in CAISSON_MIRROR")


class Apt:
    """Provide the packages of one suite, with apt's files in ``directory`` (kept between runs: it is a cache).

    ``pockets`` are the suffixes of the suite's parts, ``variable`` is the environment variable that names the mirror,
    and ``security`` is the mirror of security updates, if there is one.
    """

    def __init__(
        self,
        directory: Path,
        suite: str,
        architecture: str,
        mirror: str,
        keyring: Keyring = DEBIAN,
        pockets: Sequence[str] = ("",),
        variable: str = "CAISSON_MIRROR",
        security: str = "",
    ) -> None:
        self.directory = directory
        self.suite = suite
        self.architecture = architecture
        self.mirror = mirror
        self.keyring = keyring
        self.pockets = pockets
        self.variable = variable
        self.security = security

    def update(self) -> None:
        """Fetch the suite's index.  Raises ImageError if the mirror fails or its signature is invalid."""
        if not self.keyring.file.exists():
            raise ImageError(f"{self.keyring.file}: is missing; {self.keyring.hint}")
        # apt may wait forever for the rest of what an update that was killed left here.
        shutil.rmtree(self.directory / "lists/partial", ignore_errors=True)
        for name in ("lists/partial", "archives/partial", "state", "debs"):
            (self.directory / name).mkdir(parents=True, exist_ok=True)
        (self.directory / "state/status").touch()
        whence = f"deb [arch={self.architecture} signed-by={self.keyring.file}] {self.mirror}"
        sources = "".join(f"{whence} {self.suite}{pocket} main\n" for pocket in self.pockets)
        if self.security:
            sources += f"{whence.removesuffix(self.mirror)}{self.security} {self.suite}-security main\n"
        (self.directory / "sources.list").write_text(sources)
        settings = {
            "Dir::State": self.directory / "state",
            "Dir::State::Lists": self.directory / "lists",
            "Dir::State::status": self.directory / "state/status",
            "Dir::Cache": self.directory,
            "Dir::Cache::archives": self.directory / "archives",
            "Dir::Etc::SourceList": self.directory / "sources.list",
            "Dir::Etc::SourceParts": "/dev/null",
            "Dir::Etc::Parts": "/dev/null",
            "Dir::Etc::Main": "/dev/null",  # apt reads it after this file
            "Dir::Etc::Trusted": "/dev/null",
            "Dir::Etc::TrustedParts": "/dev/null",
            "Acquire::AllowInsecureRepositories": "false",
            "Acquire::AllowWeakRepositories": "false",
            "Acquire::AllowDowngradeToInsecureRepositories": "false",
            "Acquire::Check-Valid-Until": "true",
            "APT::Get::AllowUnauthenticated": "false",
            "Dir::Etc::Preferences": "/dev/null",
            "Dir::Etc::PreferencesParts": "/dev/null",
            "APT::Architecture": self.architecture,
            "APT::Architectures": self.architecture,
            "APT::Install-Recommends": "false",
            "APT::Sandbox::User": "root" if os.geteuid() == 0 else "",
            "Acquire::Languages": "none",
            "Acquire::IndexTargets::deb::DEP-11::DefaultEnabled": "false",
            "Acquire::Retries": "3",
        }
        dump = run(["apt-config", "dump", "Acquire::http", "Acquire::https"]).decode()
        lines = [f"{line}\n" for line in dump.splitlines() if TAKEN_OVER.match(line)]
        lines += [f'{name} "{value}";\n' for name, value in settings.items() if value != ""]
        (self.directory / "apt.conf").write_text("".join(lines))
        try:
            self._apt("apt-get", "update", "--error-on=any", "-qq")
        except CommandFailed as error:
            raise ImageError(
                f"{self.mirror}: {error}; if it is not the right mirror, name another in {self.variable}"
            ) from error

    def resolve(self, packages: Iterable[str]) -> list[str]:
        """Resolve packages to these and all they depend on, sorted."""
        return list(_parse_uris(self._apt("apt-get", "install", "--print-uris", "--yes", "-qq", *packages)))

    def fetch(self, packages: Iterable[str]) -> list[Package]:
        """Download exactly these packages (verified by apt against the signed index), or take them from before."""
        output = self._apt("apt-get", "download", "--print-uris", "-qq", *packages)
        debs = self.directory / "debs"
        files = {package: (debs / name, digest) for package, (name, digest) in _parse_uris(output).items()}
        missing = [package for package, (file, digest) in files.items() if not _has_digest(file, digest)]
        for package in missing:
            files[package][0].unlink(missing_ok=True)  # apt would not check one of the right size
        if missing:
            self._apt("apt-get", "download", "-qq", *missing, cwd=debs)
        found = []
        for package, (file, _) in files.items():
            version = run(["dpkg-deb", "--field", file, "Version"]).decode().strip()
            found.append(Package.of("deb", package, version, file))
        return found

    def fetch_all(self, packages: Iterable[str]) -> list[Package]:
        """Download the packages and all they depend on."""
        return self.fetch(self.resolve(packages))

    def fetch_kernel(self, package: str) -> list[Package]:
        """Download the newest kernel that a package depends on.  Raises ImageError unless it is one kernel."""
        names = self.resolve([package])
        images = [name for name in names if re.match(r"linux-image-\d", name)]
        if len(images) != 1:
            raise ImageError(
                f"{package}: expected to depend on one kernel, but depends on {', '.join(images) or 'none'}"
            )
        # Ubuntu has a kernel's modules, and its config, in packages of their own.
        return self.fetch([*images, *(name for name in names if re.match(r"linux-modules-(extra-)?\d", name))])

    def _apt(self, *argv: str, cwd: Path | None = None) -> bytes:
        return run(argv, cwd=cwd, env={"APT_CONFIG": str(self.directory / "apt.conf")})


def _parse_uris(output: bytes) -> dict[str, tuple[str, str]]:
    """Parse the output of --print-uris into (file name, digest as ALGORITHM:HEX) by package, sorted."""
    found = re.findall(r"^'[^']+' (\S+) \d+ ?(\S*)$", output.decode(), re.MULTILINE)
    return {unquote(name).split("_")[0]: (name, digest) for name, digest in sorted(found)}


def _has_digest(file: Path, digest: str) -> bool:
    """Return whether a file is there, and whole: a download that was killed leaves a part of it."""
    algorithm, _, value = digest.partition(":")
    try:
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, algorithm.lower()).hexdigest() == value
    except FileNotFoundError:
        return False


def extract(debs: Iterable[Package], tree: Path) -> None:
    """Unpack packages over each other; no maintainer script runs.  Files belong to whoever runs this."""
    for deb in debs:
        archive = run(["dpkg-deb", "--fsys-tarfile", deb.file])
        # A merged /usr: /lib and the like are links here, and some packages still name them as directories.
        options = ["--keep-directory-symlink", "--no-same-owner", "--no-same-permissions", "--mode=u+rwX"]
        run(["tar", "--extract", *options, "--directory", tree], stdin=archive)
