"""The shim's process: serves containerd until the last container of its pod is deleted."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from pathlib import Path
from typing import Any

from caisson.agent.base.log import Log
from caisson.agent.base.tracing import Tracing
from caisson.agent.pods.machines import Machines
from caisson.agent.rpc.dispatch import Dispatch, Service
from caisson.agent.rpc.listener import accept
from caisson.agent.rpc.server import Server
from caisson.agent.shim.errors import status_of
from caisson.agent.shim.events import Publisher
from caisson.agent.shim.host import PodHost
from caisson.agent.shim.launch import Arguments
from caisson.agent.shim.pod import Pod
from caisson.agent.shim.sandbox import SandboxService
from caisson.agent.shim.task import TaskService
from caisson.proto.containerd import sandbox_pb2, task_v2_pb2, task_v3_pb2

#: The service under both of its names, with its handlers: a missing handler is an error at import.
SERVICES = [Service(module.DESCRIPTOR.services_by_name["Task"], TaskService) for module in (task_v2_pb2, task_v3_pb2)]
SANDBOX = Service(sandbox_pb2.DESCRIPTOR.services_by_name["Sandbox"], SandboxService)

#: Seconds to forward the last events on exit.
FLUSH_TIMEOUT = 3.0

#: Seconds for containerd to close its connection once it has the last response.
LINGER = 0.3


def serve(listener: socket.socket, arguments: Arguments, machines: Machines, begun: PodHost | None = None) -> None:
    """Serve until Shutdown or SIGTERM; then nothing of the pod is left, even if its host's part has only ``begun``."""
    asyncio.run(_serve(listener, arguments, machines, begun))


async def _serve(listener: socket.socket, arguments: Arguments, machines: Machines, begun: PodHost | None) -> None:
    loop = asyncio.get_running_loop()
    log = Log("debug" if arguments.debug else "info")
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    publisher = Publisher(os.environ.get("TTRPC_ADDRESS", ""), arguments.namespace, log)

    early = [begun] if begun is not None else []

    def make_pod(sandbox_id: str) -> Pod:
        if early and early[0].id == sandbox_id:
            return Pod(early.pop(), log)
        return Pod(PodHost(sandbox_id, arguments.namespace, machines), log)

    task = TaskService(make_pod, publisher, log, stop.set)
    methods: dict[str, Any] = SANDBOX.bind(SandboxService(task, stop.set))
    for service in SERVICES:
        methods |= service.bind(task)
    server = Server(log, ttrpc=Dispatch(methods, log, Tracing(""), status_of))
    listener.setblocking(False)
    path = listener.getsockname()
    jobs = [loop.create_task(publisher.run()), loop.create_task(accept(listener, server.accept, log))]
    await stop.wait()
    Path(path).unlink(missing_ok=True)
    await task.close()
    for host in early:  # nobody has asked for it
        unwanted = Pod(host, log)
        await unwanted.release()
        await unwanted.stop()
    await publisher.flush(FLUSH_TIMEOUT)
    await server.stop(grace=1.0, linger=LINGER)
    for job in jobs:
        job.cancel()
    await asyncio.gather(*jobs, return_exceptions=True)
