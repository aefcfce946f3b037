"""Commands that build guest images."""

from __future__ import annotations

from caisson.commands.catalogue.shared import JSON
from caisson.commands.declare import (
    DIRECTORY,
    FILE,
    TEMPLATE,
    Command,
    Option,
    Positional,
    choice,
    name,
    seconds,
    setting,
)

BASE = (
    Option("template", "what to build: debian, lean, systemd…, or a definition of your own (a file or its directory)",
           TEMPLATE, default="debian"),
    Option("suite", "suite of the distribution", name("SUITE", "bookworm"), default="", shown="the template's"),
    Option("arch", "architecture of the guest; cross-built if it is not this machine's",
           choice("amd64", "arm64"), default="", shown="this machine's"),
    Option("set", "change a setting of the template; += adds to a list", setting("KEY[+]=VALUE", "packages+=strace"),
           repeat=True, dest="changes"),
)  # fmt: skip

COMMANDS = (
    Command(
        "build-image",
        "Build a guest image (root file system, kernel and agent) and print its directory.",
        "caisson.commands.image:build_image",
        options=(
            *BASE,
            Option("locked", "an image.lock: reject packages other than those it lists", FILE, default=""),
            Option(
                "treemap",
                "draw the image's size by package and by directory, as .html or .svg",
                FILE,
                default="",
            ),
            Option("dry-run", "print the whole definition and what each step would do, without building anything"),
            Option("settings", "print every setting with its type, default and meaning (with --json: a JSON schema)"),
            JSON,
        ),
        examples=(
            "caisson build-image --template lean",
            "caisson build-image --set packages+=strace --set limits.image='60 MB' --dry-run",
            "caisson build-image --treemap image.html",
        ),
    ),
    Command(
        "verify-image",
        "Rebuild an image and compare the two byte for byte.",
        "caisson.commands.image:verify_image",
        positionals=(Positional("directory", "directory of the image", DIRECTORY),),
        options=BASE,
        examples=('caisson verify-image "$(caisson build-image)"',),
    ),
    Command(
        "clean",
        "Remove cached images, snapshots and build steps; running VMs are not affected.",
        "caisson.commands.image:clean",
        options=(Option("all", "also remove downloaded packages", dest="everything"),),
        examples=("caisson clean", "caisson clean --all"),
    ),
    Command(
        "images",
        "List the stored container images: those that were run before.",
        "caisson.commands.run:images",
        options=(JSON,),
        examples=("caisson images",),
    ),
    Command(
        "rmi",
        "Remove a stored container image; VMs that use it keep their copy.",
        "caisson.commands.run:rmi",
        positionals=(Positional("image", "its name or id", name("IMAGE", "alpine")),),
        examples=("caisson rmi alpine",),
    ),
    Command(
        "prune",
        "Remove stored container images that have not been used for a while.",
        "caisson.commands.run:prune",
        options=(Option("older", "not used for this long", seconds(), default=0.0, shown="all of them"),),
        examples=("caisson prune --older 24h",),
    ),
)
