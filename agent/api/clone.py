"""caisson.Guest: what this agent offers beside Kata's API."""

from __future__ import annotations

from typing import Any

from google.protobuf import empty_pb2

from agent.guest.identity import identify


class Clone:
    """For guests that were made from a template."""

    async def Identify(self, request: Any) -> Any:
        identify(request.hostname, request.machine_id)
        return empty_pb2.Empty()
