"""The guest's packet filter, by ip[6]tables-save(8) and ip[6]tables-restore(8) where the image has them."""

from __future__ import annotations

from caisson.agent.base.errors import SystemCallFailed
from caisson.agent.guest import programs

TYPE_CHECKING = False
if TYPE_CHECKING:
    from caisson.agent.model.reaper import Reaper

#: Seconds that ip[6]tables waits for another one to be done.
LOCK_TIMEOUT = "5"


class PacketFilter:
    """Rules of IPv4 and IPv6."""

    def __init__(self, reaper: Reaper) -> None:
        self._reaper = reaper

    async def save(self, *, ipv6: bool) -> bytes:
        """Return all rules.  Raises Unsupported where there is no such program, SystemCallFailed, or Timeout."""
        return await self._run(f"{_program(ipv6)}-save")

    async def restore(self, rules: bytes, *, ipv6: bool) -> bytes:
        """Replace the rules of the tables that ``rules`` name; returns what the program says.  Raises as `save`."""
        return await self._run(f"{_program(ipv6)}-restore", "--wait", LOCK_TIMEOUT, data=rules)

    async def _run(self, name: str, *arguments: str, data: bytes = b"") -> bytes:
        done = await programs.run(self._reaper, name, *arguments, data=data)
        if done.status:
            said = " ".join(done.stderr.decode(errors="replace").split())
            raise SystemCallFailed(f"{name}: exit status {done.status}: {said}")
        return done.stdout


def _program(ipv6: bool) -> str:
    return "ip6tables" if ipv6 else "iptables"
