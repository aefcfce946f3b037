"""Test hash trees as veritysetup creates and verifies them, and the command line with which the kernel opens them."""

from __future__ import annotations

import hashlib
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from caisson.image.errors import ImageError
from caisson.image.formats import verity

BLOCK = 4096


def noise(size: int) -> bytes:
    return hashlib.shake_256(b"caisson").digest(size)


def veritysetup(action: str, tree: verity.HashTree, data: Path, hashes: Path, *words: str) -> str:
    command = [
        "veritysetup", action, "--no-superblock", "--hash=sha256", f"--data-block-size={BLOCK}",
        f"--hash-block-size={BLOCK}", f"--data-blocks={tree.blocks}", f"--salt={tree.salt.hex()}",
        *words, str(data), str(hashes),
    ]  # fmt: skip
    if action == "verify":
        command.append(tree.root_hash.hex())
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@pytest.mark.parametrize("blocks", [1, 2, 127, 128, 129, 128 * 128 + 1])
def test_the_tree_is_the_one_that_veritysetup_makes(tmp_path: Path, blocks: int) -> None:
    image, hashes = tmp_path / "image", tmp_path / "hashes"
    image.write_bytes(noise(blocks * BLOCK))
    tree = verity.hash_tree(image)
    hashes.write_bytes(b"")
    said = veritysetup("format", tree, image, hashes)
    found = re.search(r"Root hash:\s+([0-9a-f]{64})", said)
    assert found is not None and found[1] == tree.root_hash.hex()
    assert hashes.read_bytes() == tree.stored
    assert tree.blocks == blocks


def test_an_appended_tree_is_verified_and_a_flipped_byte_is_not(tmp_path: Path) -> None:
    image = tmp_path / "image"
    size = 300 * BLOCK
    image.write_bytes(noise(size))
    tree = verity.append(image)
    assert tree.record()["hash_offset"] == size
    assert image.stat().st_size == size + 4 * BLOCK  # 3 blocks of digests, and the root block
    offset = f"--hash-offset={size}"
    veritysetup("verify", tree, image, image, offset)
    whole = image.read_bytes()
    for at in (0, size // 2, size - 1, size, size + 2 * BLOCK):
        image.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(subprocess.CalledProcessError):
            veritysetup("verify", tree, image, image, offset)


def test_the_salt_follows_from_the_data(tmp_path: Path) -> None:
    first, second, other = (tmp_path / name for name in ("first", "second", "other"))
    first.write_bytes(noise(BLOCK))
    second.write_bytes(noise(BLOCK))
    other.write_bytes(noise(BLOCK)[::-1])
    assert verity.hash_tree(first) == verity.hash_tree(second)
    assert verity.hash_tree(first).salt != verity.hash_tree(other).salt


@pytest.mark.parametrize("size", [0, 1, BLOCK - 1, BLOCK + 512])
def test_only_whole_blocks_are_hashed(tmp_path: Path, size: int) -> None:
    image = tmp_path / "image"
    image.write_bytes(bytes(size))
    with pytest.raises(ImageError, match=f"{size} bytes"):
        verity.append(image)
    assert image.stat().st_size == size


def test_the_command_line_is_a_dm_init_table(tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(noise(16 * BLOCK))
    tree = verity.append(image)
    create, root, access = shlex.split(tree.command_line())
    assert (root, access) == ("root=/dev/dm-0", "ro")
    name, uuid, minor, flags, table = create.removeprefix("dm-mod.create=").split(",")
    assert (name, uuid, minor, flags) == ("root", "", "", "ro")
    assert table.split() == [
        "0", str(16 * 8), "verity", "1", "/dev/vda", "/dev/vda", "4096", "4096", "16", "16",
        "sha256", tree.root_hash.hex(), tree.salt.hex(),
    ]  # fmt: skip


def test_a_tree_on_its_own_device_starts_at_its_start(tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(noise(16 * BLOCK))
    line = verity.hash_tree(image).command_line("/dev/vda1", "/dev/vda2", on_corruption="panic")
    assert "verity 1 /dev/vda1 /dev/vda2 4096 4096 16 0 sha256" in line
    assert line.endswith(' 1 panic_on_corruption" root=/dev/dm-0 ro')
