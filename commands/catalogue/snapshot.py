"""Commands about snapshots: saved VMs, of which any number of clones can be started."""

from __future__ import annotations

from caisson.commands.catalogue.shared import ACCEL, APPEND, MEMORY, VSOCK
from caisson.commands.catalogue.vm import CPUS
from caisson.commands.declare import DIRECTORY, SNAPSHOT, Command, Option, Positional

COMMANDS = (
    Command(
        "save-snapshot",
        "Boot a VM and save it with its agent running, for `boot-vm --snapshot` to clone in a part of a boot's time.",
        "caisson.commands.snapshot:save_snapshot",
        details="""A snapshot is tied to its image, QEMU's version and the CPU; one of the same name is replaced, and
            `caisson clean` removes it.""",
        positionals=(Positional("name", "name of the snapshot; also --name", SNAPSHOT, default="default"),),
        options=(
            Option(
                "image", "directory of an image", DIRECTORY, default="",
                shown="the lean image on erofs, compiled if need be: minutes, once",
            ),
            Option("memory", "memory of the VM; without a unit: MiB", MEMORY, default=512, short="m", shown="512M"),
            Option("cpus", "virtual CPUs", CPUS, default=1),
            APPEND,
            ACCEL,
            VSOCK,
        ),
        examples=("caisson save-snapshot small --memory 256M && caisson boot-vm --snapshot small --detach",),
    ),
)  # fmt: skip
