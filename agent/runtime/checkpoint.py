"""`checkpoint` and `restore`, which are not supported: their options are parsed, and they fail with a message."""

from __future__ import annotations

from caisson.agent.runtime.errors import CommandError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

    from caisson.agent.runtime.main import Call


def checkpoint(call: Call) -> NoReturn:
    """Refuse to checkpoint a container."""
    raise CommandError("checkpoint: not supported by this runtime; stop the container and create it again instead")


def restore(call: Call) -> NoReturn:
    """Refuse to restore a container."""
    raise CommandError("restore: not supported by this runtime; create the container again instead")
