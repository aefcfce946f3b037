"""Hooks: programs run at points of a container's lifecycle (OCI runtime-spec 1.3, config.md).

prestart, createRuntime, poststart and poststop hooks run here, in the runtime's own namespaces; createContainer and
startContainer hooks run in the container's and are nsexec's (hooks.c).
"""

from __future__ import annotations

import os

from caisson.agent.base.json import dumps
from caisson.agent.libcontainer.errors import LaunchError, reason
from caisson.agent.libcontainer.state import OCI_VERSION
from caisson.agent.libcontainer.waits import Deadline

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from caisson.agent.libcontainer.config.spec import Hook, Spec
    from caisson.agent.libcontainer.process.children import Child, Children
    from caisson.agent.libcontainer.waits import Waits

OUTPUT_MAX = 800  # bytes of a hook's last output, for the error message
PIPE_MAX, READ = 1 << 20, 1 << 16  # the maximum size of a pipe (pipe(7)), and of one read
SIGKILL, SIGSTOP, SIGNALS = 9, 19, 64
#: A Python process ignores some signals, and ignored signals survive execve.  32 and 33 are the C library's own.
DEFAULT_SIGNALS = sorted(set(range(1, SIGNALS + 1)) - {SIGKILL, SIGSTOP, 32, 33})


def state(container_id: str, bundle: str, annotations: Mapping[str, str], status: str = "", pid: int = 0) -> str:
    """Write the state of a container that hooks get on standard input (runtime.md, "State").

    Without a status it stops before `status` and `pid`, for nsexec to finish: only nsexec knows the process's number in
    its own pid namespace.
    """
    document: dict[str, object] = {"ociVersion": OCI_VERSION, "id": container_id, "bundle": bundle}
    if annotations:
        document["annotations"] = dict(annotations)
    if not status:
        return dumps(document)[:-1]
    return dumps(document | {"status": status} | ({"pid": pid} if pid else {}))


class HookRunner:
    """Run hooks in the runtime's own namespaces."""

    def __init__(self, children: Children, waits: Waits) -> None:
        self._children = children
        self._waits = waits

    async def run(self, point: str, hooks: Iterable[Hook], document: str) -> None:
        """Run hooks one after the other; `document` is their standard input.

        Raises LaunchError at the first that cannot be executed, fails, or exceeds its timeout (it is then killed with
        its process group).  Cancelling the caller kills the running hook.
        """
        for number, hook in enumerate(hooks):
            await _HookProcess(self._children, self._waits, f"{point} hook #{number}", hook).run(document.encode())


class RuntimeHooks:
    """A configuration's hooks while its container is created.

    `outside` is whether any run in the runtime's namespaces.  `state` is the input of those inside (see `state`);
    `create_timeout` is the total timeout of createContainer hooks in seconds, None for no limit.
    """

    def __init__(self, runner: HookRunner, spec: Spec, container_id: str, bundle: str) -> None:
        self._runner = runner
        self._spec = spec
        self._id = container_id
        self._bundle = bundle
        self.outside = bool(spec.hooks.prestart or spec.hooks.create_runtime)
        self.state = state(container_id, bundle, spec.annotations)
        self.create_timeout = total_timeout(spec.hooks.create_container)

    async def run(self, pid: int) -> None:
        """Run those in the runtime's namespaces, once the container's exist.  Raises LaunchError."""
        document = state(self._id, self._bundle, self._spec.annotations, "creating", pid)
        await self._runner.run("prestart", self._spec.hooks.prestart, document)
        await self._runner.run("createRuntime", self._spec.hooks.create_runtime, document)


def total_timeout(hooks: Iterable[Hook]) -> int | None:
    """Add up the timeouts of hooks in seconds; None for no limit."""
    timeouts = [hook.timeout for hook in hooks]
    return None if None in timeouts else sum(timeout for timeout in timeouts if timeout is not None)


class _HookProcess:
    """One hook, from start to exit."""

    def __init__(self, children: Children, waits: Waits, step: str, hook: Hook) -> None:
        self._children = children
        self._waits = waits
        self._step = step
        self._hook = hook
        self._output = b""
        self._stdout = -1

    async def run(self, document: bytes) -> None:
        """Run it.  Raises LaunchError."""
        child = self._spawn(document)
        try:
            ended = await self._follow(child.pid)
        except OSError as error:
            _kill_group(child.pid)
            await child.wait()
            raise self._error(reason(error.errno or 0), error.errno or 0) from error
        except BaseException:
            _kill_group(child.pid)
            raise
        finally:
            self._drain()
            self._close()
        if not ended:
            _kill_group(child.pid)
            await child.wait()
            raise self._error(f"timed out after {self._hook.timeout} s and was killed")
        status = await child.wait()
        if status != 0:
            raise self._error(f"signal: {signal_name(status - 128)}" if status > 128 else f"exit status {status}")

    async def _follow(self, pid: int) -> bool:
        """Read its output until it exits; False on timeout.  Raises OSError."""
        pidfd = os.pidfd_open(pid)  # nothing was awaited since the spawn: it has not been reaped
        deadline = Deadline(self._hook.timeout)
        try:
            while True:
                fds = [pidfd] if self._stdout < 0 else [pidfd, self._stdout]
                if not await self._waits.readable(*fds, seconds=deadline.left):
                    return False
                self._drain()
                if await self._waits.readable(pidfd, seconds=0):
                    return True
        finally:
            os.close(pidfd)

    def _spawn(self, document: bytes) -> Child:
        """Start it, as the leader of its own session.  Uses posix_spawn: an agent has threads and must not fork."""
        hook = self._hook
        child_fds: list[int] = []
        try:
            stdin = os.memfd_create("state", os.MFD_CLOEXEC)
            child_fds.append(stdin)
            os.write(stdin, document)
            os.lseek(stdin, 0, os.SEEK_SET)
            self._stdout, stdout = os.pipe2(os.O_CLOEXEC)
            child_fds.append(stdout)
            os.set_blocking(self._stdout, False)
            pid = os.posix_spawn(
                hook.path,
                hook.args or (hook.path,),
                dict(variable.partition("=")[::2] for variable in hook.env) or os.environ,  # as with runc and crun
                file_actions=[
                    *((os.POSIX_SPAWN_DUP2, fd, number) for number, fd in enumerate((stdin, stdout, stdout))),
                    *((os.POSIX_SPAWN_CLOSE, fd) for fd in _inheritable()),
                ],
                setsid=True,
                setsigmask=(),
                setsigdef=DEFAULT_SIGNALS,
            )
        except OSError as error:
            self._close()
            raise self._error(reason(error.errno or 0), error.errno or 0) from error
        finally:
            for fd in child_fds:
                os.close(fd)
        return self._children.claim(pid)

    def _drain(self) -> None:
        """Read as much as fits into a pipe, not everything written meanwhile; keep the end of it."""
        if self._stdout < 0:
            return
        try:
            for _ in range(PIPE_MAX // READ):
                data = os.read(self._stdout, READ)
                if not data:
                    self._close()
                    return
                self._output = (self._output + data)[-OUTPUT_MAX:]
        except BlockingIOError:
            pass

    def _error(self, how: str, errno: int = 0) -> LaunchError:
        said = self._output.decode("utf-8", "replace").strip()
        message = f"error running {self._step}: {self._hook.path}: {how}" + (f": {said}" if said else "")
        return LaunchError(message, step=self._step, path=self._hook.path, errno=errno)

    def _close(self) -> None:
        if self._stdout >= 0:
            os.close(self._stdout)
            self._stdout = -1


def signal_name(number: int) -> str:
    """Describe a signal, uncapitalised: "killed", "bad system call"."""
    from signal import strsignal  # late: its enums

    return (strsignal(number) or f"signal {number}").lower()


def _inheritable() -> Iterable[int]:
    """List descriptors that a library, or the parent of this process, left inheritable."""
    for name in os.listdir("/proc/self/fd"):  # noqa: PTH208 - no pathlib at start
        try:
            if int(name) > 2 and os.get_inheritable(int(name)):
                yield int(name)
        except OSError:  # the directory itself is closed by now
            pass


def _kill_group(pid: int) -> None:
    """Send SIGKILL to a hook that has not been reaped yet, and to its process group."""
    try:
        os.killpg(pid, SIGKILL)
    except ProcessLookupError:
        pass
