"""grpc.Health: whether the agent serves, and its version."""

from __future__ import annotations

import asyncio

from caisson.agent.base.boot_timestamps import BootTimestamps
from caisson.proto.contract import VERSION
from caisson.proto.kata1 import health_pb2

#: The version of this API that Kata 1.x agents report.
API_VERSION = "0.0.1"


class Health:
    """Answers as soon as the agent serves at all, before and after there is a sandbox."""

    def __init__(self, timestamps: BootTimestamps) -> None:
        self._timestamps = timestamps
        self._asked = asyncio.Event()

    async def wait_until_answered(self, timeout: float) -> None:
        """Wait until a caller has received a response, for at most ``timeout`` seconds."""
        try:
            await asyncio.wait_for(self._asked.wait(), timeout)  # the response was sent before this continues
        except TimeoutError:
            pass

    async def Check(self, request: health_pb2.CheckRequest) -> health_pb2.HealthCheckResponse:
        if not self._asked.is_set():
            self._asked.set()
            self._timestamps("first request")
        return health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.SERVING)

    async def Version(self, request: health_pb2.CheckRequest) -> health_pb2.VersionCheckResponse:
        return health_pb2.VersionCheckResponse(grpc_version=API_VERSION, agent_version=VERSION)
