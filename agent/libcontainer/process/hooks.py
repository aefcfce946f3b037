"""Hooks: programs that a configuration has run at points of a container's life (OCI runtime spec 1.2, config.md).

prestart, createRuntime, poststart and poststop hooks run here, in the runtime's own
namespaces; createContainer and startContainer hooks run in the container's and are nsexec's (hooks.c).
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
from contextlib import suppress

from caisson.agent.libcontainer.errors import LaunchError, reason

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from caisson.agent.libcontainer.config.spec import Hook, Spec
    from caisson.agent.libcontainer.process.launcher import Child, Children

VERSION = "1.2.0"  # of the state document
OUTPUT_KEPT = 800  # bytes of what a hook wrote last, for the error's text
PIPE_MAX, READ = 1 << 20, 1 << 16  # what a process may let a pipe hold (pipe(7)), and what is read at once
#: A Python process ignores some signals, and ignored signals survive execve.  32 and 33 are the C library's own.
DEFAULTS = sorted(set(range(1, signal.SIGRTMAX + 1)) - {signal.SIGKILL, signal.SIGSTOP, 32, 33})


def state(container_id: str, bundle: str, annotations: Mapping[str, str], status: str = "", pid: int = 0) -> str:
    """The state of a container as hooks get it on standard input (runtime.md, "State").

    Without a status it stops short of `status` and `pid`, for nsexec to finish: only there it is known which number
    the process has in its own pid namespace.
    """
    document: dict[str, object] = {"ociVersion": VERSION, "id": container_id, "bundle": bundle}
    if annotations:
        document["annotations"] = dict(annotations)
    if not status:
        return json.dumps(document)[:-1]
    return json.dumps(document | {"status": status} | ({"pid": pid} if pid else {}))


async def run(children: Children, point: str, hooks: Iterable[Hook], document: str) -> None:
    """Run hooks one after the other; `document` is their standard input.

    Raises LaunchError at the first that cannot be executed, does not end with status 0, or not within its time (it is
    killed then, with its process group).  A caller that is cancelled kills the hook that runs.
    """
    for index, hook in enumerate(hooks):
        await _Run(children, f"{point} hook #{index}", hook).run(document.encode())


class CreateHooks:
    """What a configuration's hooks mean while its container is created.

    `outside` is whether there are some that run in the agent's namespaces.  `state` is what those inside get (see
    `state`), `create_seconds` and `start_seconds` how long they may take, one after the other: None for any time.
    """

    def __init__(self, children: Children, spec: Spec, container_id: str, bundle: str) -> None:
        self._children = children
        self._spec = spec
        self._id = container_id
        self._bundle = bundle
        self.outside = bool(spec.hooks.prestart or spec.hooks.create_runtime)
        self.state = state(container_id, bundle, spec.annotations)
        self.create_seconds = _seconds(spec.hooks.create_container)
        self.start_seconds = _seconds(spec.hooks.start_container)

    async def run(self, pid: int) -> None:
        """Run those of the agent's namespaces, once the container's exist.  Raises LaunchError."""
        document = state(self._id, self._bundle, self._spec.annotations, "creating", pid)
        await run(self._children, "prestart", self._spec.hooks.prestart, document)
        await run(self._children, "createRuntime", self._spec.hooks.create_runtime, document)


def _seconds(hooks: Iterable[Hook]) -> int | None:
    times = [hook.timeout for hook in hooks]
    return None if None in times else sum(time for time in times if time is not None)


class _Run:
    """One hook, from its start to its end."""

    def __init__(self, children: Children, step: str, hook: Hook) -> None:
        self._children = children
        self._step = step
        self._hook = hook
        self._loop = asyncio.get_running_loop()
        self._output = b""
        self._stdin = self._stdout = -1
        self._unsent = memoryview(b"")

    async def run(self, document: bytes) -> None:
        child = self._spawn()
        self._unsent = memoryview(document)
        self._loop.add_writer(self._stdin, self._feed)
        self._loop.add_reader(self._stdout, self._drain)
        try:
            async with asyncio.timeout(self._hook.timeout):
                status = await child.wait()
        except TimeoutError:
            _kill_group(child.pid)
            await child.wait()
            if self._stdout >= 0:
                self._drain()
            raise self._error(f"timed out after {self._hook.timeout} s and was killed") from None
        except BaseException:
            _kill_group(child.pid)
            raise
        finally:
            self._close()
        if status != 0:
            how = f"was killed by signal {status - 128}" if status > 128 else f"exited with status {status}"
            raise self._error(how)

    def _spawn(self) -> Child:
        """Start it, as the leader of its own session.  By posix_spawn: the agent has threads and must not fork."""
        hook = self._hook
        theirs: list[int] = []
        try:
            theirs_in, self._stdin = os.pipe2(os.O_CLOEXEC)
            theirs.append(theirs_in)
            self._stdout, theirs_out = os.pipe2(os.O_CLOEXEC)
            theirs.append(theirs_out)
            os.set_blocking(self._stdin, False)
            os.set_blocking(self._stdout, False)
            pid = os.posix_spawn(
                hook.path,
                hook.args or (hook.path,),
                dict(variable.partition("=")[::2] for variable in hook.env),
                file_actions=[
                    *((os.POSIX_SPAWN_DUP2, fd, n) for n, fd in enumerate((theirs_in, theirs_out, theirs_out))),
                    *((os.POSIX_SPAWN_CLOSE, fd) for fd in _inheritable()),
                ],
                setsid=True,
                setsigmask=(),
                setsigdef=DEFAULTS,
            )
        except OSError as error:
            self._close()
            raise LaunchError(
                f"{self._step} {hook.path}: {reason(error.errno or 0)}",
                step=self._step,
                path=hook.path,
                errno=error.errno or 0,
            ) from error
        finally:
            for fd in theirs:
                os.close(fd)
        return self._children.claim(pid)  # nothing was awaited since: it is still there

    def _feed(self) -> None:
        try:
            self._unsent = self._unsent[os.write(self._stdin, self._unsent) :]
        except BlockingIOError:
            return
        except OSError:  # a hook need not read
            self._unsent = memoryview(b"")
        if not self._unsent:
            self._close_stdin()

    def _drain(self) -> None:
        """Take what fits into a pipe, not all that may be written meanwhile; the last of it is kept."""
        with suppress(BlockingIOError):
            for _ in range(PIPE_MAX // READ):
                data = os.read(self._stdout, READ)
                if not data:
                    self._close_stdout()
                    return
                self._output = (self._output + data)[-OUTPUT_KEPT:]

    def _error(self, how: str) -> LaunchError:
        said = self._output.decode("utf-8", "replace").strip()
        message = f"{self._step} {self._hook.path}: {how}" + (f": {said}" if said else "")
        return LaunchError(message, step=self._step, path=self._hook.path)

    def _close_stdin(self) -> None:
        if self._stdin >= 0:
            self._loop.remove_writer(self._stdin)
            os.close(self._stdin)
            self._stdin = -1

    def _close_stdout(self) -> None:
        if self._stdout >= 0:
            self._loop.remove_reader(self._stdout)
            os.close(self._stdout)
            self._stdout = -1

    def _close(self) -> None:
        """Close both pipes.  What it wrote right before its end is still in one of them."""
        if self._stdout >= 0:
            self._drain()
        self._close_stdout()
        self._close_stdin()


def _inheritable() -> Iterable[int]:
    """Descriptors that a library, or whoever started the agent, left open for its children."""
    for name in os.listdir("/proc/self/fd"):  # noqa: PTH208 - no pathlib at start
        with suppress(OSError):  # the directory itself is closed by now
            if int(name) > 2 and os.get_inheritable(int(name)):
                yield int(name)


def _kill_group(pid: int) -> None:
    """SIGKILL to a hook that was not reaped yet, and to all in its process group."""
    with suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
