"""Create Debian-style repositories in a directory for tests: packages, indexes, and the key that signs them."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import http.server
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from email.utils import formatdate
from pathlib import Path


class Signer:
    """A test's own key, in its own home directory (with a short name: gpg-agent has its socket there)."""

    def __init__(self) -> None:
        self.home = Path(tempfile.mkdtemp(prefix="gpg-"))
        self._gpg("--quick-gen-key", "--passphrase", "", "test@example.org", "rsa2048")
        self.keyring = self.home / "exported.gpg"
        self.keyring.write_bytes(self._gpg("--export"))

    def sign(self, text: str) -> bytes:
        return self._gpg("--clearsign", stdin=text.encode())

    def close(self) -> None:
        """Stop gpg-agent, and remove the key."""
        subprocess.run(["gpgconf", "--homedir", self.home, "--kill", "all"], check=True)
        shutil.rmtree(self.home)

    def _gpg(self, *words: str, stdin: bytes = b"") -> bytes:
        argv = ["gpg", "--homedir", str(self.home), "--batch", "--quiet", *words]
        return subprocess.run(argv, input=stdin, check=True, capture_output=True).stdout


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass


def build_deb(file: Path, control: str, files: Mapping[str, bytes | str]) -> None:
    """Build a package: text is the target of a symbolic link."""
    with tempfile.TemporaryDirectory() as scratch:
        tree = Path(scratch) / "tree"
        for name, content in {"DEBIAN/control": control.encode(), **files}.items():
            place = tree / name
            place.parent.mkdir(parents=True, exist_ok=True, mode=0o755)
            if isinstance(content, str):
                place.symlink_to(content)
            else:
                place.write_bytes(content)
                place.chmod(0o755)
        for directory in (tree, tree / "DEBIAN"):
            directory.chmod(0o755)
        subprocess.run(
            ["dpkg-deb", "--build", "--root-owner-group", "-Zgzip", "-z1", tree, file], check=True, capture_output=True
        )


@dataclass
class Repository:
    """``root`` is a mirror with packages in ``pool``, and an index for each suite with packages."""

    root: Path
    signer: Signer
    suites: dict[str, list[str]] = field(default_factory=dict)

    @classmethod
    @contextlib.contextmanager
    def served(cls, root: Path, signer: Signer) -> Iterator[tuple[Repository, str]]:
        """Serve one while the block runs, and yield its URL: apt does not fetch from local directories."""
        handler = functools.partial(_Quiet, directory=str(root))
        with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
            thread = threading.Thread(target=server.serve_forever, args=(0.05,))
            thread.start()
            try:
                yield cls(root, signer), f"http://127.0.0.1:{server.server_port}"
            finally:
                server.shutdown()
                thread.join()

    def add(
        self,
        suite: str,
        name: str,
        version: str = "1",
        files: Mapping[str, bytes | str] | None = None,
        *,
        depends: str = "",
    ) -> None:
        """Add a package; ``publish`` writes the indexes."""
        (self.root / "pool").mkdir(parents=True, exist_ok=True)
        file = self.root / "pool" / f"{name}_{version}_amd64.deb"
        control = f"Package: {name}\nVersion: {version}\nArchitecture: amd64\nMaintainer: nobody <n@example.org>\n"
        control += f"Depends: {depends}\n" if depends else ""
        build_deb(file, f"{control}Description: of a test\n", files or {f"usr/share/{name}/version": version.encode()})
        data = file.read_bytes()
        where = f"Filename: pool/{file.name}\nSize: {len(data)}\nSHA256: {hashlib.sha256(data).hexdigest()}\n"
        self.suites.setdefault(suite, []).append(f"{control}{where}Description: of a test\n")

    def publish(self) -> None:
        """Write and sign the indexes."""
        for suite, records in self.suites.items():
            name = "main/binary-amd64/Packages"
            index = self.root / "dists" / suite / name
            index.parent.mkdir(parents=True, exist_ok=True)
            data = "\n".join(records).encode()
            index.write_bytes(data)
            digest = hashlib.sha256(data).hexdigest()
            release = (
                f"Origin: Test\nSuite: {suite}\nCodename: {suite}\nDate: {formatdate(usegmt=True)}\n"
                f"Architectures: amd64\nComponents: main\nSHA256:\n {digest} {len(data)} {name}\n"
            )
            (self.root / "dists" / suite / "InRelease").write_bytes(self.signer.sign(release))
