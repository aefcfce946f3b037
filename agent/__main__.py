"""The agent: options → (PID 1 duties) → listen → serve."""

from __future__ import annotations

import os
import sys

from caisson.agent import options as options_module
from caisson.agent.base.boot_timestamps import BootTimestamps
from caisson.agent.options import Options
from caisson.proto.contract import CONSOLE_PREFIX, READY_LINE

TYPE_CHECKING = False
if TYPE_CHECKING:
    import asyncio
    import socket

    from caisson.agent.base.log import Log
    from caisson.agent.base.tracing import Tracing
    from caisson.agent.model.reaper import Reaper
    from caisson.agent.rpc.codes import StatusCode
    from caisson.agent.services import Services


#: Threads for blocking system calls; further ones queue.
MAX_BLOCKED_CALLS = 64

#: Seconds for which the rest of startup waits for the first Health response to be sent.
FIRST_ANSWER_TIMEOUT = 1.0


def main() -> None:
    """Run as PID 1 of a guest, or as a program with command-line options."""
    from caisson.agent.base.log import Log

    timestamps = BootTimestamps()
    timestamps("python")
    if os.getpid() == 1:
        _run_as_init(timestamps)
    else:
        options = options_module.from_arguments(sys.argv[1:])
        log = Log(options.log)
        for complaint in options.complaints:
            log("warning", complaint)
        _run(options, log, timestamps)


def _run_as_init(timestamps: BootTimestamps) -> None:
    from caisson.agent.base.log import Log
    from caisson.agent.guest import cgroupfs, init

    try:
        init.prepare(timestamps)
        options = options_module.from_kernel(options_module.kernel_words()).but(cgroup_parent=cgroupfs.CONTAINERS)
        log = Log(options.log)
        for complaint in options.complaints:
            log("warning", complaint)
        _run(options, log, timestamps)
    except BaseException as error:
        import traceback

        expected = isinstance(error, (init.DutyFailed, SystemExit))  # the text says everything
        for line in [str(error)] if expected else traceback.format_exception(error):
            init.print_line(line.rstrip().removeprefix(CONSOLE_PREFIX))
    init.power_off()


def _run(options: Options, log: Log, timestamps: BootTimestamps) -> None:
    from caisson.agent.base.lazyimport import LazyImporter
    from caisson.agent.rpc.listener import ListenError, listen

    try:
        listener = listen(options.listen)  # before anything else: a host that connects early waits in the queue
    except ListenError as error:
        sys.exit(f"{CONSOLE_PREFIX}{error}")
    timestamps("listening")
    sys.meta_path.insert(0, LazyImporter())
    if options.timeline:
        timestamps.time_imports()
    try:
        import asyncio

        asyncio.run(_serve(options, listener, log, timestamps))
    finally:
        listener.close()
        if options.listen.startswith("unix:"):
            os.unlink(options.listen.removeprefix("unix:"))  # noqa: PTH108 - no pathlib at start


async def _serve(options: Options, listener: socket.socket, log: Log, timestamps: BootTimestamps) -> None:
    """Serve until SIGTERM (or SIGINT: a guest's Ctrl-Alt-Delete); then kill every container."""
    import asyncio
    import signal
    from concurrent.futures import ThreadPoolExecutor
    from functools import cache

    from caisson.agent.api.health import Health
    from caisson.agent.base import heap
    from caisson.agent.base.signals import Signals
    from caisson.agent.base.tracing import Tracing
    from caisson.agent.model.reaper import Reaper
    from caisson.agent.rpc.dispatch import Dispatch, Service
    from caisson.agent.rpc.listener import accept
    from caisson.agent.rpc.server import Server
    from caisson.proto.kata1 import health_pb2

    timestamps("imports")
    loop = asyncio.get_running_loop()
    # A hanging mount occupies a thread; the next container's mounts must not queue behind it.
    loop.set_default_executor(ThreadPoolExecutor(MAX_BLOCKED_CALLS, "blocking"))
    stop = asyncio.Event()
    reaper, signals = Reaper(), Signals(loop)
    tracing = Tracing(options.trace_target)
    if options.trace:
        _trace(tracing, log)

    @cache
    def services() -> Services:
        from caisson.agent.services import Services

        reaper.start(signals)
        return Services(options, reaper, log, tracing, timestamps, stop.set)

    health = Health(timestamps)
    first = Service(health_pb2.DESCRIPTOR.services_by_name["Health"], Health).bind(health)
    server = Server(
        log,
        grpc=Dispatch(first, log, tracing, _status_for_grpc, lambda: services().grpc),
        ttrpc=Dispatch(first, log, tracing, _status_for_ttrpc, lambda: services().ttrpc, _detail),
    )
    heap.raise_mmap_threshold()
    timestamps("server")
    tasks = [loop.create_task(accept(listener, server.accept, log))]
    # Hosts that enabled further ports find them open by the first response.
    extras = options.log_listen or options.console_listen or options.console
    connected = _host_is_connected(listener)
    if not extras and connected:
        await health.wait_until_answered(FIRST_ANSWER_TIMEOUT)
    services().load(server.spoken)
    for number in (signal.SIGTERM, signal.SIGINT):
        signals.handle(number, stop.set)
    if extras:
        tasks += _extras(options, reaper, log)
    if not connected and not options.timeline:  # as when a guest is booted to be saved
        services().import_for_containers()
        await server.warm_up(health_pb2.DESCRIPTOR.services_by_name["Health"].full_name, "Check")
    if options.warm_up:
        await services().warm_up(await server.connect())
    print(f"{READY_LINE} {options.listen}", flush=True)
    await stop.wait()
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await server.stop(grace=1.0)
    await services().end()
    signals.close()


def _status_for_grpc(error: Exception) -> tuple[StatusCode, str] | None:
    from caisson.agent.api.kata1.status import status_of  # late, as below: it imports the whole model

    return status_of(error)


def _status_for_ttrpc(error: Exception) -> tuple[StatusCode, str] | None:
    from caisson.agent.api.kata3.status import status_of

    return status_of(error)


def _detail(error: Exception) -> tuple[str, bytes] | None:
    from caisson.agent.api.reasons import detail_of

    return detail_of(error)


def _host_is_connected(listener: socket.socket) -> bool:
    """Return whether a host is already in the listen queue, waiting for the first response."""
    import select

    return bool(select.select([listener], [], [], 0)[0])


def _trace(tracing: Tracing, log: Log) -> None:
    from caisson.agent.base.errors import Unsupported

    try:
        tracing.start()
    except Unsupported as error:
        log("warning", "requests are not traced", error=str(error))


def _extras(options: Options, reaper: Reaper, log: Log) -> list[asyncio.Task[None]]:
    """Start the enabled debugging services (agent/debug_ports.py)."""
    import asyncio

    from caisson.agent.debug_ports import DebugConsole, LogStream, VsockListener
    from caisson.agent.rpc.listener import ListenError, listen

    loop = asyncio.get_running_loop()
    console = DebugConsole(reaper, log)
    tasks = []
    if options.console:
        tasks.append(loop.create_task(console.on_console()))
    stream = LogStream()
    if options.log_listen:
        log.listeners.append(stream.add)
    for address, serve in ((options.log_listen, stream.serve), (options.console_listen, console.serve)):
        if not address:
            continue
        try:
            tasks.append(loop.create_task(VsockListener(listen(address), serve, log).run()))
        except ListenError as error:
            log("error", "cannot listen on a debugging port", error=str(error))
    return tasks


if __name__ == "__main__":
    main()
