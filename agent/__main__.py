"""The agent: options → (PID 1 duties) → listen → serve."""

from __future__ import annotations

import os
import sys

from caisson.agent import options as options_module
from caisson.agent.base.boot_timestamps import Marks
from caisson.agent.options import Options
from caisson.proto.contract import CONSOLE_PREFIX, READY_LINE

TYPE_CHECKING = False
if TYPE_CHECKING:
    import asyncio
    import socket

    from caisson.agent.base.lazyimport import Later
    from caisson.agent.base.log import Log
    from caisson.agent.base.tracing import Tracing
    from caisson.agent.model.reaper import Reaper
    from caisson.agent.services import Services


#: Calls that may be blocked in the kernel at once before others wait for them.
BLOCKED_AT_MOST = 64

#: Seconds that everything else waits for a host's first question to be answered.
WAITING = 1.0


def main() -> None:
    """Run as PID 1 of a guest, or as a program with options."""
    from caisson.agent.base.log import Log

    marks = Marks()
    marks("python")
    if os.getpid() == 1:
        _run_as_init(marks)
    else:
        options = options_module.from_arguments(sys.argv[1:])
        log = Log(options.log)
        for complaint in options.complaints:
            log("warning", complaint)
        _run(options, log, marks)


def _run_as_init(marks: Marks) -> None:
    from caisson.agent.base.log import Log
    from caisson.agent.guest import init as pid1

    try:
        pid1.prepare(marks)
        options = options_module.from_kernel(options_module.kernel_words())
        log = Log(options.log)
        for complaint in options.complaints:
            log("warning", complaint)
        _run(options, log, marks)
    except BaseException as error:
        import traceback

        told = isinstance(error, (pid1.DutyFailed, SystemExit))  # says all there is to say
        for line in [str(error)] if told else traceback.format_exception(error):
            pid1.say(line.rstrip().removeprefix(CONSOLE_PREFIX))
    pid1.power_off()


def _run(options: Options, log: Log, marks: Marks) -> None:
    from caisson.agent.base.lazyimport import Later
    from caisson.agent.rpc.listener import AddressError, listen

    try:
        listener = listen(options.listen)  # first: a host that connects early waits
    except AddressError as error:
        sys.exit(f"{CONSOLE_PREFIX}{error}")
    marks("listening")
    later = Later()
    sys.meta_path.insert(0, later)
    if options.timeline:
        marks.time_imports()
    try:
        import asyncio

        asyncio.run(_serve(options, listener, log, marks, later))
    finally:
        listener.close()
        if options.listen.startswith("unix:"):
            os.unlink(options.listen.removeprefix("unix:"))  # noqa: PTH108 - no pathlib at start


async def _serve(options: Options, listener: socket.socket, log: Log, marks: Marks, later: Later) -> None:
    """Serve until SIGTERM (or SIGINT: Ctrl-Alt-Delete of a guest); then end every container."""
    import asyncio
    import signal
    from concurrent.futures import ThreadPoolExecutor
    from functools import cache

    from caisson.agent.api.health import Health
    from caisson.agent.base import heap
    from caisson.agent.base.tracing import Tracing
    from caisson.agent.model.reaper import Reaper
    from caisson.agent.rpc.listener import accept
    from caisson.agent.rpc.server import Server
    from caisson.proto.kata1 import health_pb2

    marks("imports")
    loop = asyncio.get_running_loop()
    # Mounts and the like that do not come back hold a thread each; the next container's must not wait for them.
    loop.set_default_executor(ThreadPoolExecutor(BLOCKED_AT_MOST, "blocking"))
    stop = asyncio.Event()
    reaper = Reaper()
    tracing = Tracing(options.trace_target)
    if options.trace:
        _trace(tracing, log)

    @cache
    def services() -> Services:
        from caisson.agent.services import Services

        later.load()
        reaper.start(loop)
        return Services(options, reaper, log, tracing, marks)

    health = Health(marks)
    first: list[tuple[object, list[object]]] = [(health_pb2.DESCRIPTOR.services_by_name["Health"], [health])]
    server = Server(first, log, tracing, others=lambda: services().tables)
    heap.keep()
    marks("server")
    tasks = [loop.create_task(accept(listener, server.connection, log))]
    # Whoever has asked for more ports finds them there with the first answer.
    extras = options.log_listen or options.console_listen or options.console
    if not extras and _somebody_waits(listener):
        await health.answered(WAITING)
    services()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    if extras:
        tasks += _extras(options, reaper, log)
    print(f"{READY_LINE} {options.listen}", flush=True)
    await stop.wait()
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await server.stop(grace=1.0)
    await services().end()
    reaper.stop(loop)


def _somebody_waits(listener: socket.socket) -> bool:
    """Whether a host has connected already: it wants to hear as soon as can be that there is an agent."""
    import select

    return bool(select.select([listener], [], [], 0)[0])


def _trace(tracing: Tracing, log: Log) -> None:
    from caisson.agent.base.errors import Unsupported

    try:
        tracing.start()
    except Unsupported as error:
        log("warning", "requests are not traced", error=str(error))


def _extras(options: Options, reaper: Reaper, log: Log) -> list[asyncio.Task[None]]:
    """What some guests offer beside the API (agent/debug_ports.py)."""
    import asyncio

    from caisson.agent.debug_ports import LogStream, Port, Shells
    from caisson.agent.rpc.listener import AddressError, listen

    loop = asyncio.get_running_loop()
    shells = Shells(reaper, log)
    tasks = []
    if options.console:
        tasks.append(loop.create_task(shells.on_console()))
    stream = LogStream()
    if options.log_listen:
        log.listeners.append(stream.add)
    for address, serve in ((options.log_listen, stream.serve), (options.console_listen, shells.serve)):
        if not address:
            continue
        try:
            tasks.append(loop.create_task(Port(listen(address), serve, log).run()))
        except AddressError as error:
            log("error", "a port is not there", error=str(error))
    return tasks


if __name__ == "__main__":
    main()
