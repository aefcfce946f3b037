"""Commands about snapshots: saved VMs, of which any number of clones can be started."""

from __future__ import annotations

from caisson.commands.catalogue.shared import ACCEL, APPEND, MEMORY, VSOCK
from caisson.commands.catalogue.vm import CPUS
from caisson.commands.declare import DIRECTORY, FILE, SNAPSHOT, Command, Option, Positional

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
    Command(
        "install-shim",
        "Prepare this machine for containerd's runtime io.containerd.caisson.v2: image, snapshot, configuration.",
        "caisson.commands.pods:install_shim",
        details="""It writes the configuration of the shim, links its program in /usr/local/bin unless containerd finds
            it, and prints what containerd and docker need in their configurations. The shim itself never builds or
            downloads anything; after an upgrade, run this again.""",
        options=(
            Option("image", "directory of an image", DIRECTORY, default="", shown="the default, built if need be"),
            Option("memory", "memory of a pod's VM; without a unit: MiB", MEMORY, default=512, short="m", shown="512M"),
            Option("cpus", "virtual CPUs of a pod's VM", CPUS, default=1),
            Option("config", "write the configuration here", FILE, default="/etc/caisson/shim.toml"),
            ACCEL,
            VSOCK,
        ),
        examples=("sudo caisson install-shim --memory 1G",),
    ),
)  # fmt: skip
