"""Caisson's command line: build a guest image, boot it, run commands in containers inside it.

    python3 tasks.py exec -- uname -a      # sets up everything it needs, then builds, boots and runs
    python3 tasks.py --list                # all commands; `invoke …` does the same once .venv is there

This is the only place that uses both halves: image/ (makes and boots a guest) and agent.client (talks to its agent).
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent

#: The directories that are packages of `caisson`.
PACKAGES = ("agent", "commands", "image", "proto")


def _enter_environment() -> None:
    """Continue inside .venv, made first where it is missing or older than what pyproject.toml asks for.

    Standard library only: this runs on a machine that has nothing but Python and apt.
    """
    if sys.version_info < (3, 11):  # noqa: UP036
        sys.exit(f"caisson: Python 3.11 or newer is needed, this is {sys.version.split()[0]}")
    import fcntl
    import hashlib
    import subprocess
    import tomllib

    environment = ROOT / ".venv"
    python = environment / "bin" / "python"
    project = ROOT / "pyproject.toml"
    wanted = tomllib.loads(project.read_text())["project"]["dependencies"]
    stamp = environment / f"caisson-{hashlib.sha256(repr((wanted, PACKAGES)).encode()).hexdigest()[:16]}"
    if not stamp.exists():
        with project.open() as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # two first runs at once
            if not stamp.exists():
                print("caisson: setting up .venv", file=sys.stderr)
                pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *wanted]
                for command in ([sys.executable, "-m", "venv", str(environment)], pip):
                    if subprocess.run(command, stdout=sys.stderr).returncode != 0:
                        hint = "" if command is pip else "; on Debian: apt-get install python3-venv"
                        sys.exit(f"caisson: `{' '.join(command)}` failed{hint}")
                _link_packages(environment)
                stamp.touch()
    if Path(sys.prefix).resolve() != environment.resolve():
        os.execv(python, [str(python), str(ROOT / "tasks.py"), *sys.argv[1:]])


def _link_packages(environment: Path) -> None:
    """Let the environment import this checkout as `caisson`: links to its directories, in a directory on sys.path.

    Plain links, not the import hook of an editable install: it costs no start time, and type checkers follow it.
    """
    source = environment / "src"
    namespace = source / "caisson"
    namespace.mkdir(parents=True, exist_ok=True)
    for name in PACKAGES:
        link = namespace / name
        if not link.is_symlink():
            link.symlink_to(Path("../../..") / name)
    for place in environment.glob("lib/python3.*/site-packages"):
        (place / "caisson.pth").write_text(f"{source}\n")


_enter_environment()
os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # its log would end up in a command's stderr

from caisson.proto import generate  # noqa: E402

generate.ensure()

import asyncio  # noqa: E402
import contextlib  # noqa: E402
import functools  # noqa: E402
import json as jsonlib  # noqa: E402
import shlex  # noqa: E402
import signal  # noqa: E402
import time  # noqa: E402
import uuid  # noqa: E402
from collections.abc import Callable, Iterator  # noqa: E402
from typing import Any  # noqa: E402

from invoke import Argument, Collection, Context, Exit, Program, Task, task  # noqa: E402

import tests.commands  # noqa: E402
from caisson.agent import client  # noqa: E402
from caisson.agent.client import foreground, guest, listing, logs, specs  # noqa: E402
from caisson.agent.client import share as share_in  # noqa: E402
from caisson.commands import container as container_commands  # noqa: E402
from caisson.commands import image as image_commands  # noqa: E402
from caisson.commands.image import image_directory  # noqa: E402
from caisson.image import ImageError  # noqa: E402
from caisson.image.containers.oci import packed as packed_image  # noqa: E402
from caisson.image.programs import TO_BOOT, TO_PACK, need  # noqa: E402
from caisson.image.vm import VM, VMConfig, VMError, find_vm, get_vm, list_vms  # noqa: E402
from caisson.image.vm import timeline as timelines  # noqa: E402
from caisson.image.vm.config import DryRun, parse_share  # noqa: E402
from caisson.image.vm.config import dry_run as planned  # noqa: E402
from caisson.image.vm.drawing import svg  # noqa: E402
from caisson.image.vm.hotplug import share as sharing  # noqa: E402
from caisson.image.vm.hotplug.disks import plug_disk, unplug_unused  # noqa: E402
from caisson.image.vm.hotplug.resources import memory_now, set_memory  # noqa: E402
from caisson.image.vm.snapshot.snapshot import Snapshot  # noqa: E402
from caisson.image.vm.timeline import Timeline  # noqa: E402

#: Kernel parameters of a boot that is measured.
TIMED = f"{timelines.PARAMETERS} agent.timeline"

#: Exit status when a command could not be run at all; 126, 127 and 128+n are those of a shell.
NOT_RUN = 125

#: What is run when this machine was suspended: guests' clocks stood still meanwhile.
ON_RESUME = (sys.executable, "-m", "caisson.agent.client.identity")

#: Seconds for the agent of a VM that runs to answer, and after which it is looked whether the VM still runs.
PATIENCE = 60.0
LOOKING = 3.0

#: The commands whose exit status is a program's.
RUN_PROGRAMS = ("exec", "run", "shell")

#: What is a user's to know, not a bug.
FAILURES = (ImageError, VMError, client.AgentError, client.OutputError, client.UsageError)


class Command(Task[Any]):
    """A task as people know commands: what goes wrong is one line and an exit status; bugs keep their traceback.

    `--help` in place of one of its words is help, where invoke would take it for the word.
    """

    def __init__(self, made: Task[Any]) -> None:
        super().__init__(made.body, name=made.name, help=made.help, iterable=made.iterable)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().__call__(*args, **kwargs)
        except client.ProgramError as error:
            raise Exit(f"caisson: {error}", code=error.exit_status) from None
        except FAILURES as error:
            raise Exit(f"caisson: {error}", code=NOT_RUN if self.name in RUN_PROGRAMS else 1) from None
        except KeyboardInterrupt:
            raise Exit(code=130) from None

    def get_arguments(self, ignore_unknown_help: bool | None = None) -> list[Argument]:
        arguments: list[Argument] = super().get_arguments(ignore_unknown_help)
        for argument in arguments:
            if argument.positional:
                argument.__class__ = _Word
                assert isinstance(argument, _Word)
                argument.task = self.name.replace("_", "-")
        return arguments


class _Word(Argument):
    task = ""

    def set_value(self, value: Any, cast: bool = True) -> None:
        if value in ("--help", "-h"):
            os.execv(sys.executable, [sys.executable, str(ROOT / "tasks.py"), "--help", self.task])
        super().set_value(value, cast)


def _words() -> list[str]:
    """What follows `--` on the command line, exactly as typed (invoke would join it into one string)."""
    return sys.argv[sys.argv.index("--") + 1 :] if "--" in sys.argv else []


def _say(line: str) -> None:
    print(f"caisson: {line}", file=sys.stderr, flush=True)


def _reporter(verbose: bool) -> Callable[[str], None]:
    """Progress goes to a terminal, or where it was asked for: a command's stderr is the program's alone."""
    return _say if verbose or sys.stderr.isatty() else lambda line: None


def _console(data: bytes) -> None:
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()


def _running(name: str) -> VM:
    """The running VM of this name, whose agent answers."""
    vm = get_vm(name)
    deadline = time.monotonic() + PATIENCE
    while not client.is_serving(vm.agent_socket, timeout=LOOKING):
        get_vm(name)  # it may have ended since
        if time.monotonic() > deadline:
            raise VMError(f"the agent of VM {vm.name!r} does not answer; see {vm.directory / 'console.log'}")
    return vm


@contextlib.contextmanager
def _vm_for(name: str, report: Callable[[str], None]) -> Iterator[VM]:
    """The VM of this name; with no name the running default one, or else a VM for the time of this block."""
    if name or find_vm("default") is not None:
        yield _running(name or "default")
    else:
        directory = image_directory("", report)
        need(TO_BOOT, report)
        config = VMConfig(image=directory, name=f"exec-{os.getpid()}", on_resume=ON_RESUME)
        with VM.start(config, ready=client.ReadinessProbe(), report=report) as vm:
            yield vm


def _timeline(vm: VM, began: float, spoke: list[float], answered: float) -> Timeline:
    """Where the time of a boot went, from those who know it: this machine, the guest's kernel and its agent."""
    times = asyncio.run(client.boot_times(vm.agent_socket))
    info = vm.info
    host = timelines.Host(began, info["spawned"], (spoke[0], spoke[-1]) if spoke else None, answered)
    guest = timelines.Guest(times.marks, times.imports, times.kernel_log, times.ahead, times.error)
    manifest = vm.manifest
    what = f"{manifest['name']}, Linux {manifest['kernel']['release']}, {info['accel'].upper()}: from boot-vm to ready"
    return timelines.timeline(what, host, guest)


@task(
    iterable=["share"],
    help={
        "name": "what to call the VM",
        "template": "start it from this template (see save-template), as the guest was when that was saved",
        "image": "directory of an image (default: the default image, built if need be)",
        "accel": "auto, kvm or tcg; auto picks by evidence and says why",
        "vsock": "auto, vhost (the kernel's) or user (our own device)",
        "memory": "MiB (default: 512)",
        "cpus": "virtual CPUs (default: 1)",
        "max-memory": "MiB that can be reached by plugging in",
        "max-cpus": "virtual CPUs that can be reached by plugging in",
        "share": "TAG=DIR or TAG=DIR:rw, a directory of this machine that the guest can mount by 9p; may be repeated",
        "append": "more of the kernel's command line, for example agent.log=debug",
        "detach": "leave it running in the background",
        "dry-run": "print QEMU's command, quoted for a shell, and start nothing; why it is so goes to stderr",
        "json": "with --dry-run: the command as a list",
        "timeout": "seconds to wait for the agent (default: 60 with KVM, 240 with TCG)",
        "timeline": "FILE.svg or FILE.json, for where the time of the boot went; measuring costs some 2 % of it",
    },
)
def boot_vm(
    _: Context,
    share: list[str],
    name: str = "default",
    template: str = "",
    image: str = "",
    accel: str = "auto",
    vsock: str = "auto",
    memory: int = 0,
    cpus: int = 0,
    max_memory: int = 0,
    max_cpus: int = 0,
    append: str = "",
    detach: bool = False,
    dry_run: bool = False,
    json: bool = False,
    timeout: float = 0.0,
    timeline: str = "",
) -> None:
    """Boot a VM and wait for its agent; shows the console until Ctrl-C unless detached.

    Examples: invoke boot-vm --name web --memory 1024 --detach
              invoke boot-vm --detach --timeline boot.svg
    """
    told = Path(timeline) if timeline else None
    if told and told.suffix not in (".svg", ".json"):
        raise client.UsageError(f"--timeline draws FILE.svg or writes FILE.json, not {told.name!r}")
    if template and told:
        raise client.UsageError("a guest from a template does not boot: --timeline goes without --template")
    if json and not dry_run:
        raise client.UsageError("--json goes with --dry-run; what runs is told by: invoke list-vms --json")
    need(TO_BOOT, _say)
    ready: Callable[[Path], bool] = client.ReadinessProbe()
    if template:
        if image or memory or cpus or append or max_memory or max_cpus or share:
            raise client.UsageError(
                "a guest from a template is as it was saved: --template goes with --name, --accel, --vsock"
            )
        config = VMConfig.clone(Snapshot.named(template), name=name, accel=accel, vsock=vsock, on_resume=ON_RESUME)
        ready = functools.partial(client.is_personalized, hostname=name)
    else:
        config = VMConfig(
            image=image_directory(image, _say), name=name, accel=accel, vsock=vsock, memory=memory or 512,
            cpus=cpus or 1, append=f"{append} {TIMED}" if told else append, max_memory=max_memory, max_cpus=max_cpus,
            shares=dict(parse_share(text) for text in share), firmware=bool(told), on_resume=ON_RESUME,
        )  # fmt: skip
    if dry_run:
        _show_dry_run(planned(config), as_json=json)
        return
    console = None if detach else _console
    began = time.monotonic()
    spoke: list[float] = []  # when the firmware did
    with VM.start(
        config, ready=ready, report=_say, console=console, firmware=lambda _: spoke.append(time.monotonic()),
        timeout=timeout or None,
    ) as vm:  # fmt: skip
        answered = time.monotonic()
        _say(f"{name}: the agent answers after {answered - began:.1f} s; {vm.agent_socket}")
        if told:
            found = _timeline(vm, began, spoke, answered)
            told.write_text(found.json() if told.suffix == ".json" else svg(found))
            _say(f"{told}: where the time went")
        if detach:
            vm.detach()
        else:
            vm.wait(_console)


def _show_dry_run(dry: DryRun, *, as_json: bool) -> None:
    _say(dry.reasons)
    _say(f"before QEMU, in another shell: {dry.beside}")
    print(jsonlib.dumps(list(dry.command), indent=2) if as_json else shlex.join(dry.command))


@task(
    name="exec",
    iterable=["env"],
    help={
        "name": "the VM (default: the running VM `default`, else one booted for this command)",
        "tty": "give CMD a terminal",
        "env": "NAME=value for CMD; may be given more than once",
        "user": "uid[:gid] that CMD runs as",
        "workdir": "CMD's working directory in the container",
        "container": "the container; made on first use and kept",
        "verbose": "say what happens, also when stderr is no terminal",
    },
)
def exec_(
    _: Context,
    env: list[str],
    name: str = "",
    tty: bool = False,
    user: str = "0",
    workdir: str = "/",
    container: str = "default",
    verbose: bool = False,
) -> None:
    """Run CMD in a container in a VM: invoke exec [options] -- CMD [ARG…]

    Its standard streams are the caller's; the exit status is CMD's (128+n for a signal, 127 when it is not there).
    With no VM running, one is booted for it and taken down after.

    Example: echo hello | invoke exec -- sh -c 'cat; exit 7'
    """
    words = _words()
    if not words:
        raise client.UsageError("what to run comes after --, e.g.: invoke exec -- uname -a")
    ids = specs.user_ids(user)
    specs.check_settings(env)
    with _vm_for(name, _reporter(verbose)) as vm:
        work = foreground.execute(vm, container, words, env=env, cwd=workdir, user=ids, terminal=tty)
        status = asyncio.run(work)
    raise Exit(code=status)


@task(
    iterable=["env"],
    help={
        "path": "an OCI image layout, what `docker save` writes, an OCI bundle, a root file system; directory or tar",
        "name": "the VM (default: the running VM `default`, else one booted for this command)",
        "container": "what to call it (default: a name of its own)",
        "tty": "give it a terminal",
        "detach": "leave it running in the background; prints its name",
        "env": "NAME=value, over those of the image; may be given more than once",
        "user": "USER[:GROUP], by names or numbers, in place of the image's",
        "workdir": "its working directory, in place of the image's",
        "verbose": "say what happens, also when stderr is no terminal",
    },
)
def run(
    _: Context,
    path: str,
    env: list[str],
    name: str = "",
    container: str = "",
    tty: bool = False,
    detach: bool = False,
    user: str = "",
    workdir: str = "",
    verbose: bool = False,
) -> None:
    """Run an image as a container: invoke run PATH [options] [-- ARG…]

    Its entrypoint, environment, user and working directory are the image's; what follows -- takes the place of its
    command. It may write to its root; that is gone when it is removed, at its end unless detached. If this command is
    killed, the container runs on until the next `run`.

    Example: invoke run alpine.tar -- cat /etc/os-release
    """
    need(TO_PACK, _say)
    specs.check_settings(env)
    container = container or f"run-{uuid.uuid4().hex[:8]}"
    with _vm_for(name or ("default" if detach else ""), _reporter(verbose)) as vm:
        known = guest.container_registry(vm)
        if container in known.names():
            raise client.UsageError(f"there is a container {container!r} already; remove it: invoke rm {container}")
        _clear(vm)
        with contextlib.ExitStack() as stack:
            with packed_image(Path(path), vm.architecture) as packed:
                spec = specs.image_spec(
                    packed.config, packed.bundle, _words(), env=env, user=user, cwd=workdir, terminal=tty
                )
                disk = packed.name or uuid.uuid4().hex[:24]
                stack.callback(_forget, vm, container)
                stack.enter_context(known.lease(container, disk=disk))
                slot = plug_disk(vm, packed.disk, disk)
            status = asyncio.run(foreground.run_image(vm, container, spec, slot, detach=detach))
            if status is None:
                known.add(container, disk=disk)
                stack.pop_all()
                print(container)
    raise Exit(code=status or 0)


def _clear(vm: VM) -> None:
    """Remove the containers whose `run` was killed."""
    for container in guest.container_registry(vm).orphaned():
        with contextlib.suppress(client.AgentError):  # it may not have got so far
            _remove(vm, container, timeout=30)
        _forget(vm, container)


def _remove(vm: VM, container: str, timeout: int) -> None:
    guest.call_sync(vm, lambda agent: agent.container(container).remove(timeout))


def _forget(vm: VM, container: str) -> None:
    """Forget a container that has gone, and take out the disks that no other has."""
    known = guest.container_registry(vm)
    known.discard(container)
    with contextlib.suppress(VMError):  # they end with the VM
        unplug_unused(vm, lambda: {str(known.metadata(other).get("disk")) for other in known.names()})


@task(
    help={
        "directory": "of this machine",
        "name": "the VM",
        "container": "where it is mounted; made on first use and kept",
        "at": "where in it (default: /run/shared/TAG)",
        "tag": "what to call it (default: the directory's name)",
        "writable": "the guest may write to it",
        "only-plug": "do not mount it: the guest has a virtiofs device with this tag",
    }
)
def share(
    _: Context,
    directory: str,
    name: str = "default",
    container: str = "default",
    at: str = "",
    tag: str = "",
    writable: bool = False,
    only_plug: bool = False,
) -> None:
    """Share a directory with a guest, read-only unless said otherwise, and mount it in a container; prints where.

    It is plugged in as virtiofs, unless the VM was booted with the same share (9p).

    Example: invoke share . --writable && invoke exec -- ls /run/shared
    """
    vm = _running(name)
    shared = sharing.share(vm, Path(directory), tag or sharing.tag_of(Path(directory)), writable=writable)
    if only_plug:
        print(shared.tag)
        return
    place = at or f"{share_in.SHARED}/{shared.tag}"
    try:
        asyncio.run(share_in.mount(vm, container, shared.fstype, shared.tag, place, writable=writable))
    except BaseException:
        if shared.new:
            sharing.unshare(vm, shared.tag)
        raise
    mode = "writable" if writable else "read-only"
    _say(f"{directory}: {shared.fstype}, {mode}, until: invoke unshare {shared.tag}")
    print(place)


@task(help={"tag": "what it is called", "name": "the VM"})
def unshare(_: Context, tag: str, name: str = "default") -> None:
    """Take a shared directory away from all containers, and out of the VM.

    Example: invoke unshare src
    """
    vm = _running(name)
    guest.call_sync(vm, lambda agent: share_in.unmount(agent, tag))
    sharing.unshare(vm, tag)


@task(help={"name": "the VM", "all": "every VM"})
def stop_vm(_: Context, name: str = "default", all: bool = False) -> None:
    """Stop a VM: its containers, then the machine; nothing of it stays behind.

    Example: invoke stop-vm --name web
    """
    for vm in list_vms() if all else [get_vm(name)]:
        with contextlib.suppress(client.AgentError):
            guest.call_sync(vm, lambda agent: agent.destroy_sandbox(timeout=5.0))
        vm.stop()
        _say(f"{vm.name}: stopped")


@task(name="list-vms", help={"json": "as a JSON array"})
def list_vms_(_: Context, json: bool = False) -> None:
    """List the running VMs.

    Example: invoke list-vms --json
    """
    infos = [vm.info | {"memory_now": memory_now(vm), "ports": guest.active_forwards(vm)} for vm in list_vms()]
    shown = (
        info
        | {"uptime": f"{time.time() - info['started']:.0f} s", "memory": f"{info['memory_now'] or info['memory']} MiB"}
        | {"ports": ", ".join(info["ports"]) or None}
        for info in infos
    )
    columns = ("name", "state", "accel", "vsock", "cpus", "memory", "uptime", "ports")
    listing.show(columns, infos, shown, as_json=json)


@task(help={"size": "MiB that the guest keeps, 128 to what it was booted with", "name": "the VM"})
def balloon(_: Context, size: str, name: str = "default") -> None:
    """Have a guest hand memory back, or let it have it again; prints the MiB that it has then.

    It keeps what it needs. What is free in a guest with a kernel of our own (lean) goes back without being asked.

    Example: invoke balloon 256
    """
    if not size.isdecimal():
        raise client.UsageError(f"a size is a number of MiB, not {size!r}")
    vm = _running(name)
    guest.call_sync(vm, lambda agent: agent.load_module("virtio_balloon"))
    print(set_memory(vm, int(size)))


@task(
    name="logs", help={"name": "the VM", "agent": "only the agent's lines, JSON objects", "follow": "until the VM ends"}
)
def logs_(_: Context, name: str = "default", agent: bool = False, follow: bool = False) -> None:
    """Show what a guest has printed: its kernel's messages and its agent's log.

    Example: invoke logs --agent --follow
    """
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # as cat(1) ends when nobody reads on
    get_vm(name).show(logs.AgentLines(_console) if agent else _console, follow=follow)


@task(
    help={
        "container": "its name",
        "name": "the VM",
        "timeout": "seconds that it may take; 0 for as long as it takes",
    }
)
def rm(_: Context, container: str, timeout: int = 30, name: str = "default") -> None:
    """End a container and remove it.

    Example: invoke rm web
    """
    vm = _running(name)
    _remove(vm, container, timeout)
    _forget(vm, container)


namespace = Collection()
namespace.configure({"running": _running, "say": _say, "words": _words})
for _module in (globals(), vars(image_commands), vars(container_commands), vars(tests.commands)):
    for _made in [value for value in _module.values() if isinstance(value, Task)]:
        namespace.add_task(Command(_made))

if __name__ == "__main__":
    try:
        Program(name="caisson", binary="invoke", namespace=namespace).run()
        sys.stdout.flush()
    except BrokenPipeError:  # nobody reads on, as with `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
