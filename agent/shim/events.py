"""Events for containerd: published in order, and retried across restarts of containerd.

Source: containerd, api/services/ttrpc/events/v1/events.proto; core/runtime/v2/README.md, "Events".
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

from caisson.agent.rpc.ttrpc.client import Client, Stub
from caisson.agent.rpc.ttrpc.responses import ConnectionClosed, RpcError
from caisson.proto.containerd import events_pb2, publisher_pb2

TYPE_CHECKING = False
if TYPE_CHECKING:
    from caisson.agent.base.log import Log

#: Seconds for containerd to accept an event, and between attempts while it restarts.
EVENT_TIMEOUT = 5.0
RETRY_INTERVAL = 1.0
MAX_ATTEMPTS = 5

#: The topic of each kind of event.
TOPICS = {
    "TaskCreate": "/tasks/create",
    "TaskStart": "/tasks/start",
    "TaskExecAdded": "/tasks/exec-added",
    "TaskExecStarted": "/tasks/exec-started",
    "TaskExit": "/tasks/exit",
    "TaskDelete": "/tasks/delete",
    "TaskOOM": "/tasks/oom",
    "TaskPaused": "/tasks/paused",
    "TaskResumed": "/tasks/resumed",
}


class Publisher:
    """Publish events of one namespace to containerd's socket; with an empty address they are dropped."""

    def __init__(self, address: str, namespace: str, log: Log) -> None:
        self._address = address.removeprefix("unix://")
        self._namespace = namespace
        self._log = log
        self._queue: asyncio.Queue[Any] = asyncio.Queue()
        self._client: Client | None = None

    def publish(self, event: Any) -> None:
        """Queue an event (a message of containerd.events); it gets the current time."""
        envelope = publisher_pb2.ForwardRequest()
        stamp(envelope.envelope.timestamp, time.time_ns())
        envelope.envelope.namespace = self._namespace
        envelope.envelope.topic = TOPICS[event.DESCRIPTOR.name]
        envelope.envelope.event.type_url = event.DESCRIPTOR.full_name
        envelope.envelope.event.value = event.SerializeToString()
        self._queue.put_nowait(envelope)

    async def run(self) -> None:
        """Forward queued events until cancelled."""
        while True:
            envelope = await self._queue.get()
            try:
                if self._address:
                    await self._forward(envelope)
            finally:
                self._queue.task_done()

    async def drained(self) -> None:
        """Wait until all queued events are forwarded."""
        await self._queue.join()

    async def flush(self, timeout: float) -> None:
        """Wait until all queued events are forwarded, at most ``timeout`` seconds."""
        try:
            async with asyncio.timeout(timeout):
                await self.drained()
        except TimeoutError:
            self._log("error", "events were not forwarded in time")

    async def _forward(self, request: Any) -> None:
        topic = request.envelope.topic
        for _ in range(MAX_ATTEMPTS):
            try:
                if self._client is None:
                    self._client = await Client.connect(self._address)
                stub = Stub(self._client, publisher_pb2.DESCRIPTOR.services_by_name["Events"])
                metadata = [("containerd-namespace-ttrpc", self._namespace)]
                await stub.Forward(request, EVENT_TIMEOUT, metadata)
                return
            except (OSError, ConnectionClosed):
                if self._client is not None:
                    await self._client.close()
                self._client = None
                await asyncio.sleep(RETRY_INTERVAL)
            except RpcError as error:
                self._log("error", "an event was refused", topic=topic, error=str(error))
                return
        self._log("error", "an event was lost: containerd does not answer", topic=topic)


def stamp(timestamp: Any, nanoseconds: int) -> None:
    """Set a google.protobuf.Timestamp to a time since the epoch."""
    timestamp.seconds, timestamp.nanos = divmod(nanoseconds, 1_000_000_000)


def task_exit(container_id: str, process_id: str, pid: int, status: int, exited_at: int) -> events_pb2.TaskExit:
    """Return a TaskExit; ``exited_at`` in nanoseconds since the epoch."""
    event = events_pb2.TaskExit(container_id=container_id, id=process_id, pid=pid, exit_status=status)
    stamp(event.exited_at, exited_at)
    return event
