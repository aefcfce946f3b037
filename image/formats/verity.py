"""dm-verity: a hash tree over a file-system image, and the kernel command line that opens it without an initrd.

The tree is the one of `veritysetup format --no-superblock`: version 1, sha256, 4096-byte blocks, the top level first.
It is computed here, in one pass over the file: without root or loop devices, and reproducibly.

Sources: Documentation/admin-guide/device-mapper/{verity,dm-init}.rst, cryptsetup's wiki page "DMVerity".
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from caisson.image.errors import ImageError

BLOCK = 4096
SECTOR = 512
DIGEST = hashlib.sha256().digest_size

#: The kernel's reaction to a corrupted block: "fail" the read, so that the root cannot be mounted or a program not run;
#: or stop the machine at once ("panic" needs Linux 5.9).
OnCorruption = Literal["fail", "restart", "panic"]
_OPTIONS: dict[OnCorruption, str] = {
    "fail": "",
    "restart": " 1 restart_on_corruption",
    "panic": " 1 panic_on_corruption",
}


@dataclass(frozen=True)
class HashTree:
    """What was hashed (``blocks`` of 4096 bytes), with which ``salt``, and the tree as it is stored."""

    blocks: int
    salt: bytes
    root_hash: bytes
    stored: bytes

    def record(self) -> dict[str, str | int]:
        """Return its entry in image.json; an appended tree starts at ``hash_offset`` bytes."""
        return {
            "hash": "sha256",
            "root_hash": self.root_hash.hex(),
            "salt": self.salt.hex(),
            "data_blocks": self.blocks,
            "block_size": BLOCK,
            "hash_offset": self.blocks * BLOCK,
        }

    def command_line(
        self, data: str = "/dev/vda", hashes: str | None = None, *, on_corruption: OnCorruption = "fail"
    ) -> str:
        """Return the kernel parameters that set up /dev/dm-0 on the device ``data`` and mount it as the root.

        The tree is on the device ``hashes``, from its start; by default it follows the data on the same device.
        """
        start = self.blocks if hashes is None else 0
        table = (
            f"0 {self.blocks * BLOCK // SECTOR} verity 1 {data} {hashes or data} {BLOCK} {BLOCK} {self.blocks} {start} "
            f"sha256 {self.root_hash.hex()} {self.salt.hex()}{_OPTIONS[on_corruption]}"
        )
        return f'dm-mod.create="root,,,ro,{table}" root=/dev/dm-0 ro'


def hash_tree(image: Path) -> HashTree:
    """Compute the tree over a file.  The salt is the file's own digest: reproducible, and different for any other file.

    Raises ImageError if the file is empty or not a whole number of blocks.
    """
    size = image.stat().st_size
    if size == 0 or size % BLOCK:
        raise ImageError(f"{image} cannot be hashed for dm-verity: its {size} bytes are not whole {BLOCK}-byte blocks")
    with image.open("rb") as stream:
        salt = hashlib.file_digest(stream, "sha256").digest()
    digests = _hashes(_blocks_of_file(image), salt)
    levels: list[bytes] = []
    while len(digests) > DIGEST:
        level = digests + bytes(-len(digests) % BLOCK)
        levels.insert(0, level)
        digests = _hashes((level[at : at + BLOCK] for at in range(0, len(level), BLOCK)), salt)
    return HashTree(size // BLOCK, salt, digests, b"".join(levels))


def append(image: Path) -> HashTree:
    """Append a file's tree to its data."""
    tree = hash_tree(image)
    with image.open("ab") as stream:
        stream.write(tree.stored)
    return tree


def _blocks_of_file(image: Path) -> Iterator[bytes]:
    with image.open("rb") as stream:
        while block := stream.read(BLOCK):
            yield block


def _hashes(blocks: Iterator[bytes], salt: bytes) -> bytes:
    salted = hashlib.sha256(salt)
    digests = bytearray()
    for block in blocks:
        state = salted.copy()
        state.update(block)
        digests += state.digest()
    return bytes(digests)
