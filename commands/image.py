"""Build, check and remove guest images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from caisson import image as images
from caisson.commands.declare import WRONG_USAGE
from caisson.commands.parse import CommandLineError
from caisson.commands.streams import check_writable, info
from caisson.image.build import treemap as treemaps
from caisson.image.build.choices import COMPRESSORS
from caisson.image.errors import ImageError
from caisson.image.programs import DEBIAN_KEYRING, TO_BUILD, TO_COMPILE, TO_UNPACK_KERNEL, require, to_cross_build

#: Names of the steps' results for users.
CLEANED = {
    "images": "images", "base": "packages, unpacked", "native": "packages that run during a cross-build",
    "kernel": "kernels", "agent": "compiled agents", "nsexec": "compiled nsexec", "tools": "programs that pack disks",
    "containers": "container images", "snapshots": "snapshots", "verify": "comparisons",
    "downloads": "downloaded suites",
}  # fmt: skip


def build_image(
    *, template: str, suite: str, arch: str, changes: list[str], locked: str, treemap: str, dry_run: bool,
    settings: bool, as_json: bool,
) -> None:  # fmt: skip
    """Build a guest image; prints its directory."""
    if settings:
        _print_json(images.schema()) if as_json else print("\n".join(images.describe()))
        return
    if treemap and not treemap.endswith((".html", ".svg")):
        text = f"--treemap {treemap}: must end in .html or .svg"
        raise CommandLineError(text, WRONG_USAGE)
    if treemap:
        check_writable("--treemap", Path(treemap))
    loaded = images.load(images.find(template), suite=suite or None, arch=arch or None, settings=changes)
    build = images.Build(loaded, report=info, locked=images.read_lock(Path(locked)) if locked else None)
    if dry_run:
        document, steps = images.plain(loaded.definition), build.plan()
        if as_json:
            _print_json({"definition": document, "steps": [vars(step) for step in steps]})
        else:
            print(images.planned(document, steps))
        return
    require(programs_to_build(loaded), info)
    directory = build.image().directory
    done = list(build.done)
    if treemap:
        draw = treemaps.html if treemap.endswith(".html") else treemaps.svg
        Path(treemap).write_text(draw(loaded.definition.name, build.files()))
        info(f"{treemap}: what takes up space in the image")
    if as_json:
        _print_json({"directory": str(directory), "steps": [vars(step) for step in done]})
        return
    for line in images.summary(done):
        info(line)
    print(directory)


def programs_to_build(loaded: Any) -> tuple[str, ...]:
    """Return the programs needed to build this definition."""
    definition = loaded.definition
    keyring = (DEBIAN_KEYRING,) if definition.distribution == "debian" else ()
    cross = to_cross_build(definition.triplet) if definition.is_foreign else ()
    kernel = TO_COMPILE if definition.kernel.source else TO_UNPACK_KERNEL.get(definition.suite, ())
    return (*TO_BUILD, *keyring, *cross, *kernel, *COMPRESSORS[definition.compression][:1])


def _print_json(value: object) -> None:
    print(json.dumps(value, indent=2))


def verify_image(*, directory: str, template: str, suite: str, arch: str, changes: list[str]) -> None:
    """Rebuild an image's definition and compare byte for byte."""
    loaded = images.load(images.find(template), suite=suite or None, arch=arch or None, settings=changes)
    require(programs_to_build(loaded), info)
    differing = images.verify(loaded, images.Image.load(Path(directory)), report=info)
    if differing:
        raise ImageError(f"{directory}: differs from a new build in {', '.join(differing)}")
    info("identical, byte for byte")


def clean(*, everything: bool) -> None:
    """Empty the cache of images and build steps."""
    removed = images.clean(everything=everything)
    for step, what in CLEANED.items():
        sizes = [one.bytes for one in removed if one.step == step]
        if sizes:
            info(f"{what}: {len(sizes)} removed, {sum(sizes) / 1e6:.0f} MB")
    info(f"freed {sum(one.bytes for one in removed) / 1e6:.0f} MB")
