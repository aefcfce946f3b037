"""Build, check and remove guest images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from caisson import image as images
from caisson.commands.streams import info
from caisson.image.errors import ImageError
from caisson.image.programs import DEBIAN_KEYRING, TO_BUILD, TO_COMPILE, need


def build_image(
    *, template: str, suite: str, changes: list[str], locked: str, dry_run: bool, settings: bool, as_json: bool
) -> None:
    """Build a guest image; prints its directory."""
    if settings:
        _print_json(images.schema()) if as_json else print("\n".join(images.describe()))
        return
    loaded = images.load(images.find(template), suite=suite or None, settings=changes)
    build = images.Build(loaded, report=info, locked=images.read_lock(Path(locked)) if locked else None)
    if dry_run:
        document, steps = images.plain(loaded.definition), build.plan()
        if as_json:
            _print_json({"definition": document, "steps": [vars(step) for step in steps]})
        else:
            print(images.planned(document, steps))
        return
    need(programs_to_build(loaded), info)
    directory = build.image().directory
    if as_json:
        _print_json({"directory": str(directory), "steps": [vars(step) for step in build.done]})
        return
    for line in images.summary(build.done):
        info(line)
    print(directory)


def programs_to_build(loaded: Any) -> tuple[str, ...]:
    """The programs that building this definition takes."""
    definition = loaded.definition
    keyring = (DEBIAN_KEYRING,) if definition.distribution == "debian" else ()
    return (*TO_BUILD, *keyring, *(TO_COMPILE if definition.kernel.source else ()))


def _print_json(value: object) -> None:
    print(json.dumps(value, indent=2))


def verify_image(*, directory: str, template: str, suite: str, changes: list[str]) -> None:
    """Build an image's definition once more and compare byte for byte."""
    loaded = images.load(images.find(template), suite=suite or None, settings=changes)
    need(programs_to_build(loaded), info)
    differing = images.verify(loaded, images.Image.load(Path(directory)), report=info)
    if differing:
        raise ImageError(f"{directory}: differs from a new build in {', '.join(differing)}")
    info("the same, byte for byte")


def clean(*, everything: bool) -> None:
    """Empty the cache of images and of the steps on the way to them."""
    freed = images.clean(everything=everything)
    info(f"freed {freed / 1e6:.0f} MB")
