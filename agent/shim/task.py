"""containerd's Task service: containerd's requests to a shim, for all containers of one pod.

Source: containerd, api/runtime/task/v2/shim.proto and v3; core/runtime/v2/README.md for the order of events.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
from typing import Any

from google.protobuf.empty_pb2 import Empty

from caisson.agent.base.aio import runs_to_completion
from caisson.agent.pods.guest import CALL_TIMEOUT
from caisson.agent.rpc.codes import StatusCode
from caisson.agent.rpc.ttrpc.responses import ConnectionClosed, RpcError
from caisson.agent.shim import stats
from caisson.agent.shim.bundle import KILLED, TaskBundle
from caisson.agent.shim.container import Container
from caisson.agent.shim.errors import ShimError, not_found
from caisson.agent.shim.events import Publisher, stamp, task_exit
from caisson.agent.shim.options import shim_cgroup
from caisson.agent.shim.pod import Pod
from caisson.agent.shim.process import CREATED, RUNNING, STOPPED, Process
from caisson.agent.shim.spec import guest_spec
from caisson.proto.containerd import events_pb2, task_v2_pb2, tasks_pb2
from caisson.proto.kata3 import agent_pb2

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from caisson.agent.base.log import Log

#: Seconds between two attempts to end a pod that is just starting.
ABORT_INTERVAL = 0.1

#: Version of the Task service that Connect reports.
TASK_VERSION = "v3"


class TaskService:
    """The containers of a pod.  Versions 2 and 3 of the service have the same messages on the wire.

    containerd closes the connection when its client gives up: what changes a pod runs to completion.
    """

    def __init__(
        self, make_pod: Callable[[str], Pod], publisher: Publisher, log: Log, shut_down: Callable[[], None]
    ) -> None:
        """``make_pod`` creates a pod by id; ``shut_down`` ends this process once the last container is deleted."""
        self._make_pod = make_pod
        self._publisher = publisher
        self._log = log
        self._shut_down = shut_down
        self._pod: Pod | None = None
        self._containers: dict[str, Container] = {}
        self._creating = asyncio.Lock()
        self._starting: Pod | None = None  # for the container or sandbox that is being created
        self._unfinished = ""  # the container that is being created
        self._ending: asyncio.Future[None] | None = None  # the pod's end, after its last container was deleted
        self._closed = False
        self._oom: asyncio.Task[None] | None = None
        self._sandboxed = False  # the Sandbox service decides when the pod ends

    def _container(self, container_id: str) -> Container:
        if container_id not in self._containers:
            raise not_found(f"container {container_id}")
        return self._containers[container_id]

    def _process(self, request: Any) -> Process:
        return self._container(request.id).process(request.exec_id)

    @property
    def _pid(self) -> int:
        assert self._pod is not None
        return self._pod.pid

    @property
    def pod(self) -> Pod | None:
        """The pod, if there is one."""
        return self._pod

    async def start_sandbox(self, bundle: TaskBundle, document: dict[str, Any]) -> Pod:
        """Start the pod for a sandbox: it stays when its last container is deleted.  Raises the errors that status_of
        knows.
        """
        async with self._creating:
            self._sandboxed = True
            pod = await self._start_pod(bundle.id, document, bundle)
            pod.sysctls, pod.mounts = document["linux"]["sysctl"], document["mounts"]
            await pod.connect_network()
            self._starting = None
            self._watch(pod)
            return pod

    async def _start_pod(
        self, sandbox_id: str, document: dict[str, Any], bundle: TaskBundle, shim_cgroup: str = ""
    ) -> Pod:
        if self._closed:
            raise ShimError(StatusCode.UNAVAILABLE, "the shim is ending")
        if self._ending is not None:
            await asyncio.shield(self._ending)
        self._starting = pod = self._make_pod(sandbox_id)
        await pod.start(document, bundle, shim_cgroup)
        self._pod = pod
        return pod

    def _watch(self, pod: Pod) -> None:
        """Start waiting for out-of-memory events: late, as the guest has one CPU and a container to create."""
        if self._oom is None or self._oom.done():
            self._oom = asyncio.get_running_loop().create_task(self._watch_oom(pod))

    @runs_to_completion
    async def Create(self, request: Any) -> Any:
        if request.checkpoint:
            raise ShimError(StatusCode.UNIMPLEMENTED, "restoring a checkpoint: not implemented")
        if request.id in self._containers:
            raise ShimError(StatusCode.ALREADY_EXISTS, f"container {request.id}: already exists")
        own_cgroup = shim_cgroup(request.options)
        bundle = TaskBundle(request.bundle, request.id)
        document = bundle.config()
        guest_spec(document, request.id)  # reject unsupported specs before starting a VM
        async with self._creating:
            self._unfinished = request.id
            try:
                pod = await self._create(request, bundle, document, own_cgroup)
            finally:
                self._unfinished, self._starting = "", None
        self._watch(pod)
        event = events_pb2.TaskCreate(
            container_id=request.id, bundle=request.bundle, checkpoint="", pid=self._pid, rootfs=request.rootfs
        )
        event.io.stdin, event.io.stdout, event.io.stderr = request.stdin, request.stdout, request.stderr
        event.io.terminal = request.terminal
        self._publisher.publish(event)
        return task_v2_pb2.CreateTaskResponse(pid=self._pid)

    async def _create(self, request: Any, bundle: TaskBundle, document: dict[str, Any], own_cgroup: str) -> Pod:
        """Create a container, and its pod if it is the first.  Nothing of either is left at an error."""
        pod = self._pod if self._ending is None else None
        owner = pod is None
        if pod is None:
            pod = await self._start_pod(bundle.sandbox, document, bundle, own_cgroup)
        else:
            pod.record(bundle)
        try:
            self._containers[request.id] = await Container.create(pod, bundle, document, request, owner=owner)
        except BaseException:
            if owner:
                await self._end_pod()
            raise
        return pod

    @runs_to_completion
    async def Start(self, request: Any) -> Any:
        container = self._container(request.id)
        process = container.process(request.exec_id)

        async def ended(process: Process) -> None:
            await self._ended(container, process)

        if request.exec_id:
            await container.start_exec(process)
            event: Any = events_pb2.TaskExecStarted(container_id=request.id, exec_id=request.exec_id, pid=self._pid)
        else:
            await container.start()
            event = events_pb2.TaskStart(container_id=request.id, pid=self._pid)
        self._publisher.publish(event)  # before any event of the process's exit
        process.started(ended)
        return task_v2_pb2.StartResponse(pid=self._pid)

    async def _ended(self, container: Container, process: Process) -> None:
        pid = self._pid
        if process is container.init:
            await container.execs_ended()
            await self._end_holder()
        identity = process.exec_id or container.id
        exit_event = task_exit(container.id, identity, pid, process.exit_status, process.exited_at)
        self._publisher.publish(exit_event)
        process.exited.set()

    async def _end_holder(self) -> None:
        """End the holder first: a client that learns of the last container's exit may check that its process is
        gone.
        """
        ended = all(one.init.status == STOPPED for one in self._containers.values())
        if ended and not self._sandboxed and self._pod is not None:
            await self._pod.end_holder()

    async def _end_unstarted(self, container: Container, status: int) -> None:
        """End a container that was only created: there is no exit for the agent to report."""
        with contextlib.suppress(ConnectionClosed):  # it has exited with its VM
            await container.kill_all(signal.SIGKILL)
        if container.init.status == CREATED:  # otherwise it was started, or another request has ended it
            await container.init.end(status)
            await self._ended(container, container.init)

    @runs_to_completion
    async def Delete(self, request: Any) -> Any:
        if request.id == self._unfinished:  # containerd's client has given up; Shutdown comes next
            await self._abort_creation(request.id)
            self._creating.release()
        container = self._container(request.id)
        process = container.process(request.exec_id)
        pid = self._pid
        if process.status == CREATED and not request.exec_id:
            await self._end_unstarted(container, KILLED)
        if process.exited_at:
            await process.exited.wait()  # its exit is published before its deletion
        if request.exec_id:
            if process.status not in (STOPPED, CREATED):
                raise ShimError(StatusCode.FAILED_PRECONDITION, f"process {request.exec_id}: is running")
            await process.close()
            del container.execs[request.exec_id]
        else:
            ends_pod = not self._sandboxed and (container.owner or len(self._containers) == 1)
            await container.remove(guest_ends=ends_pod)
            self._containers.pop(request.id, None)
            if ends_pod:
                self._start_end()  # `delete`, which containerd calls next, waits for it
            event = events_pb2.TaskDelete(container_id=request.id, pid=pid, exit_status=process.exit_status)
            stamp(event.exited_at, process.exited_at)
            self._publisher.publish(event)
        response = task_v2_pb2.DeleteResponse(pid=pid, exit_status=process.exit_status)
        stamp(response.exited_at, process.exited_at)
        return response

    def _start_end(self) -> None:
        if self._ending is None and self._pod is not None:
            self._ending = asyncio.ensure_future(self._stop(self._pod))

    async def _stop(self, pod: Pod) -> None:
        if self._oom is not None:
            self._oom.cancel()
        try:
            await pod.stop()
        finally:
            self._pod = self._ending = None

    async def _end_pod(self) -> None:
        """End the pod, unless it is already ending, and wait until it has ended."""
        self._start_end()
        if self._ending is not None:
            await asyncio.shield(self._ending)

    async def State(self, request: Any) -> Any:
        container = self._container(request.id)
        process = container.process(request.exec_id)
        paused = container.paused and process.status == RUNNING
        response = task_v2_pb2.StateResponse(
            id=request.id, bundle=str(container.bundle.path), pid=self._pid, exec_id=request.exec_id,
            status=tasks_pb2.PAUSED if paused else process.status, stdin=process.stdin, stdout=process.stdout,
            stderr=process.stderr, terminal=process.terminal, exit_status=process.exit_status,
        )  # fmt: skip
        if process.exited_at:
            stamp(response.exited_at, process.exited_at)
        return response

    async def Wait(self, request: Any) -> Any:
        process = self._process(request)
        await process.exited.wait()
        response = task_v2_pb2.WaitResponse(exit_status=process.exit_status)
        stamp(response.exited_at, process.exited_at)
        return response

    @runs_to_completion
    async def Kill(self, request: Any) -> Any:
        container = self._container(request.id)
        process = container.process(request.exec_id)
        if process.status == CREATED and not request.exec_id:
            await self._end_unstarted(container, 128 + request.signal)
        elif request.all and not request.exec_id:
            await container.kill_all(request.signal)
        else:
            await process.signal(request.signal)
        return Empty()

    async def Exec(self, request: Any) -> Any:
        self._container(request.id).add_exec(request)
        self._publisher.publish(events_pb2.TaskExecAdded(container_id=request.id, exec_id=request.exec_id))
        return Empty()

    async def ResizePty(self, request: Any) -> Any:
        process = self._process(request)
        if not process.terminal:
            return Empty()  # as with runc's shim: nothing to resize
        size = agent_pb2.TtyWinResizeRequest(**process.ids, row=request.height, column=request.width)
        await self._rpc.TtyWinResize(size, timeout=CALL_TIMEOUT)
        return Empty()

    async def CloseIO(self, request: Any) -> Any:
        process = self._process(request)
        if request.stdin:
            process.close_input()
        return Empty()

    async def Pids(self, request: Any) -> Any:
        self._container(request.id)
        return task_v2_pb2.PidsResponse(processes=[tasks_pb2.ProcessInfo(pid=self._pid)])

    @runs_to_completion
    async def Pause(self, request: Any) -> Any:
        container = self._container(request.id)
        await self._rpc.PauseContainer(agent_pb2.PauseContainerRequest(container_id=request.id), timeout=CALL_TIMEOUT)
        container.paused = True
        self._publisher.publish(events_pb2.TaskPaused(container_id=request.id))
        return Empty()

    @runs_to_completion
    async def Resume(self, request: Any) -> Any:
        container = self._container(request.id)
        await self._rpc.ResumeContainer(agent_pb2.ResumeContainerRequest(container_id=request.id), timeout=CALL_TIMEOUT)
        container.paused = False
        self._publisher.publish(events_pb2.TaskResumed(container_id=request.id))
        return Empty()

    async def Checkpoint(self, request: Any) -> Any:
        raise ShimError(StatusCode.UNIMPLEMENTED, "checkpoints: not implemented")

    async def Update(self, request: Any) -> Any:
        await self._container(request.id).update(json.loads(request.resources.value or b"{}"))
        return Empty()

    async def Stats(self, request: Any) -> Any:
        self._container(request.id)
        answer = await self._rpc.StatsContainer(
            agent_pb2.StatsContainerRequest(container_id=request.id), timeout=CALL_TIMEOUT
        )
        made = stats.metrics(answer)
        response = task_v2_pb2.StatsResponse()
        response.stats.type_url, response.stats.value = made.DESCRIPTOR.full_name, made.SerializeToString()
        return response

    async def Connect(self, request: Any) -> Any:
        pid = self._pid if self._pod is not None else 0
        return task_v2_pb2.ConnectResponse(shim_pid=os.getpid(), task_pid=pid, version=TASK_VERSION)

    async def Shutdown(self, request: Any) -> Any:
        if not self._containers and not self._sandboxed:
            self._shut_down()
        return Empty()

    @property
    def _rpc(self) -> Any:
        if self._pod is None:
            raise ShimError(StatusCode.UNAVAILABLE, "the VM has ended")
        return self._pod.rpc

    async def _watch_oom(self, pod: Pod) -> None:
        while True:
            try:
                event = await pod.rpc.GetOOMEvent(agent_pb2.GetOOMEventRequest())
            except RpcError:
                pod.lost.set()  # the VM has exited
                return
            if event.container_id in self._containers:
                self._publisher.publish(events_pb2.TaskOOM(container_id=event.container_id))
                await self._publisher.drained()  # a hostile guest reports as many as it likes

    async def close(self) -> None:
        """End the pod, whatever is left of it, even one that is just starting."""
        self._closed = True
        await self._abort_creation()
        try:
            await self._end_pod()
            for container in self._containers.values():
                await asyncio.to_thread(container.unmount)
        finally:
            self._creating.release()

    async def _abort_creation(self, container_id: str = "") -> None:
        """Acquire the lock; until then abort the pod that is starting for this container, or on close any pod."""
        idle = asyncio.ensure_future(self._creating.acquire())
        while not (await asyncio.wait([idle], timeout=ABORT_INTERVAL))[0]:
            if self._closed:
                pod = self._starting or self._pod
            else:
                pod = self._starting if container_id == self._unfinished else None
            if pod is not None:
                await pod.abort()
