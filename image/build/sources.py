"""The sources that go into a guest: the agent without its host side, the compiled protocol, and nsexec."""

from __future__ import annotations

import shutil
from pathlib import Path

from caisson.image.build.cache import digest_of_files
from caisson.image.errors import ImageError
from caisson.image.run import run
from caisson.proto.contract import VERSION

#: The directory of the packages: a checkout, or the installed `caisson`.
ROOT = Path(__file__).resolve().parents[2]

#: The import name: a namespace package, so a directory without __init__.py.
PACKAGE = "caisson"

#: Packages of agent/ that no guest needs.
HOST_ROOMS = ("client", "hypervisor", "nsexec", "pods", "runtime", "shim")

#: Modules of proto/ that no guest needs.
HOST_PROTOCOLS = ("containerd/", "generate.py", "kata3/hypervisor_", "kata3/confidential_data_hub_")

#: The sources of nsexec, with the Makefile that compiles them.
NSEXEC = ROOT / "agent/nsexec"


def agent_files() -> list[Path]:
    """Return the Python modules of a guest.  Raises ImageError if the protocol is not compiled yet."""
    proto = ROOT / "proto"
    protocol = [file for file in proto.rglob("*.py") if not str(file.relative_to(proto)).startswith(HOST_PROTOCOLS)]
    if not any(file.name.endswith("_pb2.py") for file in protocol):
        raise ImageError(f"{proto}: is not compiled; run: python3 -m caisson.proto.generate")
    agent = [file for file in (ROOT / "agent").rglob("*.py") if file.relative_to(ROOT).parts[1] not in HOST_ROOMS]
    return sorted([*agent, *protocol])


def agent_version() -> str:
    """Return the version of the agent: the project's."""
    return VERSION


def digests() -> tuple[str, str]:
    """Return the digests of the modules and of nsexec's sources.  Raises ImageError."""
    return digest_of_files(ROOT, agent_files()), nsexec_digest()


def nsexec_digest() -> str:
    """Return the digest of nsexec's sources."""
    return digest_of_files(ROOT, [NSEXEC / "Makefile", *NSEXEC.glob("*.[ch]")])


def copy(home: Path) -> None:
    """Copy the modules below our directory in a guest.  Raises ImageError."""
    for source in agent_files():
        place = home / PACKAGE / source.relative_to(ROOT)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, place)


def compile_nsexec(build: Path, target: Path, triplet: str, musl: Path | None) -> None:
    """Compile nsexec in a directory, and install it.  Raises CommandFailed.

    ``musl`` is the unpacked C library of another architecture, for which its compiler of this triplet is used.
    """
    cross = [] if musl is None else [f"CROSS={triplet}-", f"MUSL={musl / 'usr'}"]
    build.mkdir(parents=True, exist_ok=True)
    # A killed compiler leaves its temporary files.
    run(["make", "-s", "-C", NSEXEC, f"BUILD={build}", *cross], env={"TMPDIR": str(build)})
    shutil.move(build / "nsexec", target)
