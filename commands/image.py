"""The commands that make images and templates.  tasks.py lends them `say`: it takes a line for the user, on stderr."""

from __future__ import annotations

import json as jsonlib
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from invoke import Context, task

import caisson.image as images
from caisson.image.errors import ImageError
from caisson.image.programs import TO_BOOT, TO_BUILD, TO_COMPILE, need
from caisson.image.vm import VM, VMConfig
from caisson.image.vm.snapshot.snapshot import checked, says_ready

Report = Callable[[str], None]


def image_directory(path: str, report: Report) -> Path:
    """The image in a directory, or the default one, built if need be."""
    if path:
        return images.Image.load(Path(path)).directory
    need(TO_BUILD, report)
    return images.build_image(report=report).directory


def _lean_image(report: Report) -> Path:
    """The image that templates are made of: all is built into its kernel, and its root is no part of its memory."""
    need((*TO_BUILD, *TO_COMPILE), report)
    loaded = images.load(images.find("lean"), settings=["format=erofs"])
    return images.Build(loaded, report=report).image().directory


def _print_json(value: object) -> None:
    print(jsonlib.dumps(value, indent=2))


@task(
    iterable=["set"],
    help={
        "template": "what to build: debian, lean, systemd…, or a definition of your own (a file or its directory)",
        "suite": "another suite than the definition's, e.g. bookworm",
        "set": "KEY=VALUE over the definition's, KEY+=VALUE adds to a list; may be repeated",
        "locked": "an image.lock: refuse packages that are not those it names",
        "dry-run": "print the whole definition and what each step would do; build nothing",
        "settings": "print every setting with its type, default and meaning (with --json: the JSON schema)",
        "json": "print JSON",
    },
)
def build_image(
    context: Context,
    set: list[str],
    template: str = "debian",
    suite: str = "",
    locked: str = "",
    dry_run: bool = False,
    settings: bool = False,
    json: bool = False,
) -> None:
    """Build a guest image: rootfs, kernel and agent; prints its directory.

    Examples: invoke build-image --template lean
              invoke build-image --set packages+=strace --set limits.image="60 MB" --dry-run
    """
    if settings:
        _print_json(images.schema()) if json else print("\n".join(images.describe()))
        return
    loaded = images.load(images.find(template), suite=suite or None, settings=set)
    build = images.Build(loaded, report=context.say, locked=images.read_lock(Path(locked)) if locked else None)
    if dry_run:
        document, steps = images.plain(loaded.definition), build.plan()
        if json:
            _print_json({"definition": document, "steps": [vars(step) for step in steps]})
        else:
            print(images.planned(document, steps))
        return
    need(_to_build(loaded), context.say)
    directory = build.image().directory
    if json:
        _print_json({"directory": str(directory), "steps": [vars(step) for step in build.done]})
        return
    for line in images.summary(build.done):
        context.say(line)
    print(directory)


def _to_build(loaded: Any) -> tuple[str, ...]:
    return (*TO_BUILD, *TO_COMPILE) if loaded.definition.kernel.source else TO_BUILD


@task(
    help={
        "directory": "the image's",
        "template": "what it was built from, as for build-image",
        "suite": "as for build-image",
        "set": "as for build-image",
    },
    iterable=["set"],
)
def verify_image(context: Context, directory: str, set: list[str], template: str = "debian", suite: str = "") -> None:
    """Build an image's definition once more, from its packages to the end, and compare byte for byte.

    Example: invoke verify-image "$(invoke build-image)"
    """
    loaded = images.load(images.find(template), suite=suite or None, settings=set)
    need(_to_build(loaded), context.say)
    differing = images.verify(loaded, images.Image.load(Path(directory)), report=context.say)
    if differing:
        raise ImageError(f"not the same: {', '.join(differing)}")
    context.say("the same, byte for byte")


@task(help={"all": "everything: downloaded packages, too"})
def clean(context: Context, all: bool = False) -> None:
    """Empty the cache of images and of the steps on the way to them; running VMs keep what they have.

    Example: invoke clean --all
    """
    freed = images.clean(everything=all)
    context.say(f"{freed / 1e6:.0f} MB are free again")


@task(
    help={
        "name": "what to call the template; one of this name is replaced",
        "image": "directory of an image (default: the lean one on a disk, erofs, built if need be)",
        "accel": "auto, kvm or tcg",
        "vsock": "auto, vhost (the kernel's) or user (our own device)",
        "memory": "MiB",
        "cpus": "virtual CPUs",
        "append": "more of the kernel's command line",
    }
)
def save_template(
    context: Context,
    name: str = "default",
    image: str = "",
    accel: str = "auto",
    vsock: str = "auto",
    memory: int = 512,
    cpus: int = 1,
    append: str = "",
) -> None:
    """Boot a guest and save it, its agent listening: `boot-vm --template` starts clones of it in a part of the time.

    It fits the image, the version of QEMU and the CPU it was saved with; `invoke clean` removes it.

    Example: invoke save-template --name small --memory 256 && invoke boot-vm --template small --detach
    """
    need(TO_BOOT, context.say)
    checked(name)
    directory = image_directory(image, context.say) if image else _lean_image(context.say)
    config = VMConfig(
        image=directory, name=f"save-{os.getpid()}", accel=accel, vsock=vsock, memory=memory, cpus=cpus, append=append,
        savable=True,
    )  # fmt: skip
    began = time.monotonic()
    with VM.start(config, ready=says_ready, report=context.say) as vm:
        booted = time.monotonic() - began
        size = vm.save(name)
    saved = time.monotonic() - began - booted
    context.say(f"template {name}: {size / 1e6:.0f} MB, booted in {booted:.1f} s, saved in {saved:.1f} s")
