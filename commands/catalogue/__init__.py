"""All commands, in the groups and the order of the overview."""

from __future__ import annotations

from caisson.commands.catalogue import container, host, image, program, snapshot, vm
from caisson.commands.declare import Group

GROUPS = (
    Group("Run programs", program.COMMANDS),
    Group("Containers", container.COMMANDS),
    Group("Virtual machines", (*vm.COMMANDS, *snapshot.COMMANDS)),
    Group("Images", image.COMMANDS),
    Group("This machine", host.COMMANDS),
)

#: Every command by its name.
COMMANDS = {command.name: command for group in GROUPS for command in group.commands}
