"""Commands for snapshots: saved VMs, from which any number of clones can be started."""

from __future__ import annotations

from caisson.commands.catalogue.shared import ACCEL, APPEND, MEMORY, VSOCK
from caisson.commands.catalogue.vm import CPUS
from caisson.commands.declare import DIRECTORY, FILE, SNAPSHOT, Command, Option, Positional

COMMANDS = (
    Command(
        "save-snapshot",
        "Boot a VM and save it with its agent running; `boot-vm --snapshot` clones it in a fraction of a boot's time.",
        "caisson.commands.snapshot:save_snapshot",
        details="""A snapshot is tied to its image, QEMU's version and the CPU. An existing snapshot with this name is
            replaced; `caisson clean` removes it.""",
        positionals=(Positional("name", "name of the snapshot; also --name", SNAPSHOT, default="default"),),
        options=(
            Option(
                "image", "directory of an image", DIRECTORY, default="",
                shown="the lean image on erofs, built once if needed (takes minutes)",
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
        details="""Writes the shim's configuration, links its program into /usr/local/bin unless containerd can already
            find it, and prints what to add to the configurations of containerd and docker. The shim itself never builds
            or downloads anything; run this again after an upgrade.""",
        options=(
            Option("image", "directory of an image", DIRECTORY, default="", shown="the default, built if needed"),
            Option("memory", "memory of a pod's VM; without a unit: MiB", MEMORY, default=512, short="m", shown="512M"),
            Option("cpus", "virtual CPUs of a pod's VM", CPUS, default=1),
            Option("config", "write the configuration here", FILE, default="/etc/caisson/shim.toml"),
            ACCEL,
            VSOCK,
        ),
        examples=("sudo caisson install-shim --memory 1G",),
    ),
)  # fmt: skip
