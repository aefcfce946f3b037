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
    stamp = environment / f"caisson-{hashlib.sha256(repr(wanted).encode()).hexdigest()[:16]}"
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
                stamp.touch()
    if Path(sys.prefix).resolve() != environment.resolve():
        os.execv(python, [str(python), str(ROOT / "tasks.py"), *sys.argv[1:]])


_enter_environment()
sys.path.insert(0, str(ROOT))
os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # its log would end up in a command's stderr

from proto import generate  # noqa: E402

generate.ensure()

import asyncio  # noqa: E402
import contextlib  # noqa: E402
import functools  # noqa: E402
import json  # noqa: E402
import shutil  # noqa: E402
import signal  # noqa: E402
import subprocess  # noqa: E402
import time  # noqa: E402
import uuid  # noqa: E402
from collections.abc import Awaitable, Callable, Iterable, Iterator  # noqa: E402
from typing import Any, TypeVar  # noqa: E402

from invoke import Argument, Collection, Context, Exit, Program, Task, task  # noqa: E402

import image  # noqa: E402
import image.oci  # noqa: E402
from agent import client  # noqa: E402
from agent.client import console, copy, listing, logs, ocispec, rootdisk  # noqa: E402
from agent.client import forward as forwarding  # noqa: E402
from image.vm import VM, VMConfig, VMError, find_vm, list_vms  # noqa: E402
from image.vm.disks import plug_disk, unplug_unused  # noqa: E402
from image.vm.template import Template, checked, says_ready  # noqa: E402

T = TypeVar("T")

#: Programs that a command needs, and the Debian packages of each.
TO_BUILD = {
    "gcc": "gcc",
    "make": "make",
    "musl-gcc": "musl-tools",
    "strip": "binutils",
    "zstd": "zstd",
    "mkfs.erofs": "erofs-utils",
    "mksquashfs": "squashfs-tools",
}
#: And with a kernel from source.
TO_COMPILE = {"flex": "flex libelf-dev", "bison": "bison", "bc": "bc", "xz": "xz-utils", "gcc": "gcc libc6-dev"}
TO_BOOT = {"qemu-system-x86_64": "qemu-system-x86", "setpriv": "util-linux"}
TO_PACK = {"sqfstar": "squashfs-tools", "zstd": "zstd"}
TO_TEST = (
    TO_BUILD
    | TO_COMPILE
    | TO_BOOT
    | TO_PACK
    | {"busybox": "busybox-static", "clang": "clang libclang-rt-dev", "cpio": "cpio", "ip": "iproute2"}
    | {"gcc": "gcc libc6-dev", "mke2fs": "e2fsprogs"}
    | {"faketime": "faketime", "/usr/bin/python3": "python3", "sfdisk": "fdisk", "veritysetup": "cryptsetup-bin"}
    | {"openssl": "openssl", "gpg": "gnupg"}  # to sign repositories with
    | {"crun": "crun", "runc": "runc"}  # to compare with
)

#: The VM that commands mean when they name none.
DEFAULT_VM = "default"

#: An interactive shell, the better one where there are two.
SHELL = ["/bin/sh", "-c", "command -v bash >/dev/null && exec bash; exec sh"]

#: Exit status when a command could not be run at all; 126, 127 and 128+n are those of a shell.
NOT_RUN = 125


class Refused(Exception):
    """This cannot be done; the text says why, and the way out."""


class Command(Task[Any]):
    """A task with words of its own; `--help` in place of one is help, where invoke would take it for the word."""

    def get_arguments(self, ignore_unknown_help: bool | None = None) -> list[Argument]:
        arguments: list[Argument] = super().get_arguments(ignore_unknown_help)
        for argument in arguments:
            if argument.positional:
                argument.__class__ = _Word
                assert isinstance(argument, _Word)
                argument.task = self.name
        return arguments


class _Word(Argument):
    task = ""

    def set_value(self, value: Any, cast: bool = True) -> None:
        if value in ("--help", "-h"):
            os.execv(sys.executable, [sys.executable, str(ROOT / "tasks.py"), "--help", self.task])
        super().set_value(value, cast)


#: What is a user's to know, not a bug.
FAILURES = (Refused, image.ImageError, VMError, client.AgentError, client.OutputError, client.Mistake)


def command(failed: int) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Turn what can go wrong for a user into one line and an exit status; bugs keep their traceback."""

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> None:
            try:
                function(*args, **kwargs)
            except client.ProgramError as error:
                raise Exit(f"caisson: {error}", code=error.exit_status) from None
            except FAILURES as error:
                raise Exit(f"caisson: {error}", code=failed) from None
            except KeyboardInterrupt:
                raise Exit(code=130) from None

        return wrapper

    return decorate


def _need(programs: dict[str, str]) -> None:
    """Have these programs: installed by apt for root, else one line says how."""
    missing = (names.split() for program, names in programs.items() if shutil.which(program) is None)
    packages = sorted({package for names in missing for package in names})
    if not packages:
        return
    install = ["apt-get", "install", "--yes", "--no-install-recommends", *packages]
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        raise Refused(f"this machine lacks {', '.join(packages)}; run: sudo {' '.join(install)}")
    print(f"caisson: installing {', '.join(packages)}", file=sys.stderr)
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    for step in (["apt-get", "update"], install):
        done = subprocess.run(step, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True)
        if done.returncode != 0:
            raise Refused(f"`{' '.join(step)}` failed:\n{done.stderr.strip() or done.stdout.strip()}")


def _words() -> list[str]:
    """What follows `--` on the command line, exactly as typed (invoke would join it into one string)."""
    return sys.argv[sys.argv.index("--") + 1 :] if "--" in sys.argv else []


def _say(line: str) -> None:
    print(f"caisson: {line}", file=sys.stderr, flush=True)


def _reporter(verbose: bool) -> Callable[[str], None]:
    """Progress goes to a terminal, or where it was asked for: a command's stderr is the program's alone."""
    return _say if verbose or sys.stderr.isatty() else lambda line: None


def _answers(socket: Path) -> bool:
    return client.answers(socket, timeout=1.0)


def _json(value: object) -> str:
    return json.dumps(value, indent=2)


def _image_directory(path: str, report: Callable[[str], None]) -> Path:
    """The image in a directory, or the default one, built if need be."""
    if path:
        return image.Image.load(Path(path)).directory
    _need(TO_BUILD)
    return image.build(report=report).directory


@task(
    iterable=["set"],
    help={
        "template": "what to build: debian, lean, systemd…, or a definition of your own (a file or its directory)",
        "suite": "another suite than the definition's, e.g. bookworm",
        "set": "KEY=VALUE over the definition's, KEY+=VALUE adds to a list; may be repeated",
        "locked": "an image.lock: refuse packages that are not those it names",
        "dry-run": "print the whole definition and what each step would do; build nothing",
        "settings": "print every setting with its type, default and meaning (with --json: the JSON schema)",
        "json": "print JSON",
    },
)
@command(failed=1)
def build_image(
    _: Context,
    set: list[str],
    template: str = "debian",
    suite: str = "",
    locked: str = "",
    dry_run: bool = False,
    settings: bool = False,
    json: bool = False,
) -> None:
    """Build a guest image: rootfs, kernel and agent; prints its directory.

    Examples: invoke build-image --template lean
              invoke build-image --set packages+=strace --set limits.image="60 MB" --dry-run
    """
    if settings:
        print(_json(image.schema()) if json else "\n".join(image.describe()))
        return
    loaded = image.load(image.find(template), suite=suite or None, settings=set)
    build = image.Build(loaded, report=_say, locked=image.read_lock(Path(locked)) if locked else None)
    if dry_run:
        document, steps = image.plain(loaded.definition), build.plan()
        print(
            _json({"definition": document, "steps": [vars(step) for step in steps]})
            if json
            else image.planned(document, steps)
        )
        return
    _need(TO_BUILD | (TO_COMPILE if loaded.definition.kernel.source else {}))
    directory = build.image().directory
    if json:
        print(_json({"directory": str(directory), "steps": [vars(step) for step in build.done]}))
        return
    for line in image.summary(build.done):
        _say(line)
    print(directory)


@task(
    iterable=["set"],
    help={
        "directory": "the image's",
        "template": "what it was built from, as for build-image",
        "suite": "as for build-image",
        "set": "as for build-image",
    },
)
@command(failed=1)
def verify_image(_: Context, directory: str, set: list[str], template: str = "debian", suite: str = "") -> None:
    """Build an image's definition once more, from its packages to the end, and compare byte for byte.

    Example: invoke verify-image "$(invoke build-image)"
    """
    loaded = image.load(image.find(template), suite=suite or None, settings=set)
    _need(TO_BUILD | (TO_COMPILE if loaded.definition.kernel.source else {}))
    differing = image.verify(loaded, image.Image.load(Path(directory)), report=_say)
    if differing:
        raise Refused(f"not the same: {', '.join(differing)}")
    _say("the same, byte for byte")


@task(help={"all": "everything: downloaded packages, too"})
@command(failed=1)
def clean(_: Context, all: bool = False) -> None:
    """Empty the cache of images and of the steps on the way to them; running VMs keep what they have.

    Example: invoke clean --all
    """
    freed = image.clean(everything=all)
    _say(f"{freed / 1e6:.0f} MB are free again")


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
        "timeout": "seconds to wait for the agent (default: 60 with KVM, 240 with TCG)",
    },
)
@command(failed=1)
def boot_vm(
    _: Context,
    share: list[str],
    name: str = DEFAULT_VM,
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
    timeout: float = 0.0,
) -> None:
    """Boot a VM and wait for its agent; shows the console until Ctrl-C unless detached.

    Example: invoke boot-vm --name web --memory 1024 --detach
    """
    _need(TO_BOOT)
    ready = _answers
    if template:
        if image or memory or cpus or append or max_memory or max_cpus or share:
            raise Refused("a guest from a template is as that was saved: --template goes with --name, --accel, --vsock")
        config = VMConfig.clone(_template(template), name=name, accel=accel, vsock=vsock)
        ready = functools.partial(client.settled, hostname=name)
    else:
        config = VMConfig(
            image=_image_directory(image, _say), name=name, accel=accel, vsock=vsock, memory=memory or 512,
            cpus=cpus or 1, append=append, max_memory=max_memory, max_cpus=max_cpus,
            shares=dict(_share(text) for text in share),
        )  # fmt: skip
    console = None if detach else _console
    began = time.monotonic()
    with VM.start(config, ready=ready, report=_say, console=console, timeout=timeout or None) as vm:
        _say(f"{name}: the agent answers after {time.monotonic() - began:.1f} s; {vm.agent_socket}")
        if detach:
            vm.detach()
        else:
            vm.wait(_console)


@task(
    help={
        "name": "what to call the template; one of this name is replaced",
        "image": "directory of an image (default: the lean one on a disk, erofs, built if need be)",
        "accel": "auto, kvm or tcg",
        "vsock": "auto, vhost (the kernel's) or user (our own device)",
        "memory": "MiB",
        "cpus": "virtual CPUs",
        "append": "more of the kernel's command line",
    }
)
@command(failed=1)
def save_template(
    _: Context,
    name: str = DEFAULT_VM,
    image: str = "",
    accel: str = "auto",
    vsock: str = "auto",
    memory: int = 512,
    cpus: int = 1,
    append: str = "",
) -> None:
    """Boot a guest and save it, its agent listening: `boot-vm --template` starts clones of it in a part of the time.

    It fits the image, the version of QEMU and the CPU it was saved with; `invoke clean` removes it.

    Example: invoke save-template --name small --memory 256 && invoke boot-vm --template small --detach
    """
    _need(TO_BOOT)
    checked(name)
    directory = _lean_image() if not image else _image_directory(image, _say)
    config = VMConfig(
        image=directory, name=f"save-{os.getpid()}", accel=accel, vsock=vsock, memory=memory, cpus=cpus, append=append,
        savable=True,
    )  # fmt: skip
    began = time.monotonic()
    with VM.start(config, ready=says_ready, report=_say) as vm:
        booted = time.monotonic() - began
        size = vm.save(name)
    saved = time.monotonic() - began - booted
    _say(f"template {name}: {size / 1e6:.0f} MB, booted in {booted:.1f} s, saved in {saved:.1f} s")


def _lean_image() -> Path:
    """The image that templates are made of: all is built into its kernel, and its root is no part of its memory."""
    _need(TO_BUILD | TO_COMPILE)
    loaded = image.load(image.find("lean"), settings=["format=erofs"])
    return image.Build(loaded, report=_say).image().directory


def _template(name: str) -> Template:
    found = Template.load(name)
    if found is None:
        raise Refused(f"there is no template {name!r}; save one: invoke save-template --name {name}")
    return found


def _share(text: str) -> tuple[str, tuple[str, bool]]:
    tag, equals, path = text.partition("=")
    if not equals or not path:
        raise Refused(f"--share takes TAG=DIR or TAG=DIR:rw, not {text!r}")
    return tag, (path.removesuffix(":rw"), path.endswith(":rw"))


def _console(data: bytes) -> None:
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()


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
@command(failed=NOT_RUN)
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
        raise Refused("what to run comes after --, e.g.: invoke exec -- uname -a")
    uid, gid = _ids(user)
    _check_settings(env)
    with _vm_for(name, _reporter(verbose)) as vm:
        status = asyncio.run(_run(vm, container, words, env, workdir, uid, gid, tty))
    raise Exit(code=status)


def _check_settings(env: list[str]) -> None:
    for setting in env:
        if "=" not in setting:
            raise Refused(f"--env takes NAME=value, not {setting!r}")


def _ids(user: str) -> tuple[int, int]:
    uid, _, gid = user.partition(":")
    if not uid.isascii() or not uid.isdecimal() or (gid and not (gid.isascii() and gid.isdecimal())):
        raise Refused(f"--user takes numbers, uid or uid:gid, not {user!r}")
    return int(uid), int(gid or 0)


@contextlib.contextmanager
def _vm_for(name: str, report: Callable[[str], None]) -> Iterator[VM]:
    """The VM of this name; with no name the running default one, or else a VM for the time of this block."""
    if find_vm(name or DEFAULT_VM) is not None or name:
        yield _running(name or DEFAULT_VM)
    else:
        directory = _image_directory("", report)
        _need(TO_BOOT)
        config = VMConfig(image=directory, name=f"exec-{os.getpid()}")
        with VM.start(config, ready=_answers, report=report) as vm:
            yield vm


def _running(name: str) -> VM:
    """The running VM of this name, whose agent answers."""
    vm = find_vm(name)
    if vm is None:
        raise _no_vm(name)
    if not client.answers(vm.agent_socket, timeout=60.0):
        raise Refused(f"the agent of VM {vm.name!r} does not answer; see {vm.directory / 'console.log'}")
    return vm


def _no_vm(name: str) -> Refused:
    names = ", ".join(other.name for other in list_vms()) or "none"
    return Refused(f"there is no VM {name!r}; running: {names}; start it: invoke boot-vm --name {name} --detach")


def _ask(vm: VM, work: Callable[[client.Agent], Awaitable[T]]) -> T:
    """What a VM's agent answers."""

    async def ask() -> T:
        async with client.Agent.connect(vm.agent_socket) as agent:
            return await work(agent)

    return asyncio.run(ask())


def _known(vm: VM) -> client.Known:
    """The containers that commands have made in a VM."""
    return client.Known(vm.directory / "containers")


async def _run(
    vm: VM, container_id: str, words: list[str], env: list[str], cwd: str, uid: int, gid: int, tty: bool
) -> int:
    environment = [client.PATH, "HOME=/root" if uid == 0 else "HOME=/"]
    if tty:
        environment.append(f"TERM={os.environ.get('TERM', 'xterm')}")
    async with client.Agent.connect(vm.agent_socket) as agent:
        container = await _ensure(vm, agent, container_id)
        process = await container.exec(words, env=[*environment, *env], cwd=cwd, uid=uid, gid=gid, terminal=tty)
        return await client.attach(process)


async def _ensure(vm: VM, agent: client.Agent, container_id: str) -> client.Container:
    """The container of this name, or a new one with the rootfs that is in the image."""
    contents = json.loads((vm.directory / "image.json").read_text())
    await agent.create_sandbox()
    container = await agent.ensure_container(container_id, client.default_spec(contents["containers"]["busybox"]))
    known = _known(vm)
    if container_id not in known.names():  # what is known of one of `run` says which disk it is on
        known.add(container_id)
    return container


@task(
    klass=Command,
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
@command(failed=NOT_RUN)
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
    command. It may write to its root; that is gone when it is removed, at its end unless detached.

    Example: invoke run alpine.tar -- cat /etc/os-release
    """
    _need(TO_PACK)
    _check_settings(env)
    report = _reporter(verbose)
    container = container or f"run-{uuid.uuid4().hex[:8]}"
    with _vm_for(name or (DEFAULT_VM if detach else ""), report) as vm:
        if container in _known(vm).names():
            raise Refused(f"there is a container {container!r} already; remove it: invoke rm {container}")
        architecture = json.loads((vm.directory / "image.json").read_text())["arch"]
        with image.oci.packed(Path(path), architecture) as packed:
            spec = _spec_of(packed, env, user, workdir, tty)
            disk = packed.name or uuid.uuid4().hex[:24]
            try:
                _known(vm).add(container, disk=disk)
                slot = plug_disk(vm, packed.disk, disk)
            except BaseException:
                _forget(vm, container)
                raise
        raise Exit(code=asyncio.run(_run_image(vm, container, spec, slot, disk, detach)))


def _spec_of(packed: image.oci.Packed, env: list[str], user: str, workdir: str, tty: bool) -> Any:
    """What an image is to run, with what was asked for on the command line."""
    if packed.bundle:
        spec = ocispec.spec_from_bundle(packed.bundle)
        del spec.Process.Args[: len(spec.Process.Args) if _words() else 0]
        spec.Process.Args.extend(_words())
        spec.Process.Env.extend(env)
        spec.Process.Terminal |= tty
        spec.Process.User.Username = user or spec.Process.User.Username
        spec.Process.Cwd = workdir or spec.Process.Cwd
        return spec
    config = packed.config
    terminal = [f"TERM={os.environ.get('TERM', 'xterm')}"] if tty else []
    return rootdisk.image_spec(
        config.words(_words()),
        env=[*terminal, *config.env, *env],
        user=user or config.user,
        cwd=workdir or config.workdir,
        terminal=tty,
    )


async def _run_image(vm: VM, container_id: str, spec: Any, slot: str, disk: str, detach: bool) -> int:
    async with client.Agent.connect(vm.agent_socket) as agent:
        container = agent.container(container_id)
        keep = False
        try:
            await rootdisk.create(agent, container_id, spec, slot, "squashfs")
            _known(vm).add(container_id, disk=disk)
            await container.start()
            if detach:
                keep = True
                print(container_id)
                return 0
            return await client.attach(container.init(terminal=spec.Process.Terminal))
        finally:
            if not keep:
                with contextlib.suppress(client.AgentError):
                    await container.remove()
                _forget(vm, container_id)


def _forget(vm: VM, container_id: str) -> None:
    """Forget a container that has gone, and take out the disks that no other has."""
    known = _known(vm)
    known.discard(container_id)
    with contextlib.suppress(VMError):  # they end with the VM
        unplug_unused(vm, lambda: {str(known.about(other).get("disk")) for other in known.names()})


@task(help={"name": "the VM", "all": "every VM"})
@command(failed=1)
def stop_vm(_: Context, name: str = DEFAULT_VM, all: bool = False) -> None:
    """Stop a VM: its containers, then the machine; nothing of it stays behind.

    Example: invoke stop-vm --name web
    """
    vms = list_vms() if all else [find_vm(name)]
    for vm in vms:
        if vm is None:
            raise _no_vm(name)
        with contextlib.suppress(client.AgentError):
            _ask(vm, lambda agent: agent.destroy_sandbox(timeout=5.0))
        vm.stop()
        _say(f"{vm.name}: stopped")


@task(name="list-vms", help={"json": "as a JSON array"})
@command(failed=1)
def list_vms_(_: Context, json: bool = False) -> None:
    """List the running VMs.

    Example: invoke list-vms --json
    """
    infos = [vm.info for vm in list_vms()]
    shown = (
        info | {"uptime": f"{time.time() - info['started']:.0f} s", "memory": f"{info['memory']} MiB"} for info in infos
    )
    _show(("name", "state", "accel", "vsock", "cpus", "memory", "uptime"), infos, shown, as_json=json)


def _show(columns: tuple[str, ...], data: list[Any], rows: Iterable[dict[str, Any]], *, as_json: bool) -> None:
    """Print data as JSON, or rows about it as a table."""
    if as_json:
        print(_json(data))
        return
    table = [columns, *(["-" if row.get(column) is None else str(row[column]) for column in columns] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for line in table:
        print("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip())


@task(
    name="logs", help={"name": "the VM", "agent": "only the agent's lines, JSON objects", "follow": "until the VM ends"}
)
@command(failed=1)
def logs_(_: Context, name: str = DEFAULT_VM, agent: bool = False, follow: bool = False) -> None:
    """Show what a guest has printed: its kernel's messages and its agent's log.

    Example: invoke logs --agent --follow
    """
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # as cat(1) ends when nobody reads on
    vm = find_vm(name)
    if vm is None:
        raise _no_vm(name)
    vm.show(logs.AgentLines(_console) if agent else _console, follow=follow)


@task(
    klass=Command, help={"source": "a path, or CONTAINER:PATH", "target": "a path, or CONTAINER:PATH", "name": "the VM"}
)
@command(failed=1)
def cp(_: Context, source: str, target: str, name: str = DEFAULT_VM) -> None:
    """Copy a file or a directory into a container or out of it; it needs `sh` and `tar` in the container.

    Example: invoke cp build/app default:/tmp && invoke cp default:/etc/passwd .
    """
    for left_out in _ask(_running(name), lambda agent: copy.copy(agent, source, target)):
        _say(f"not copied: {left_out}")


@task(
    help={
        "container": "the container; made on first use and kept",
        "guest": "outside of all containers",
        "name": "the VM",
    }
)
@command(failed=NOT_RUN)
def shell(_: Context, container: str = "default", guest: bool = False, name: str = DEFAULT_VM) -> None:
    """Work in a container, or with --guest in the guest itself; the exit status is the container's shell's.

    The guest's shell is there if it was booted with agent.debug_console_vport=PORT; the size of its terminal is told
    once.

    Example: invoke shell --container web
    """
    vm = _running(name)
    if guest:
        asyncio.run(console.console(vm.vsock_socket, console.console_port(vm.kernel_words)))
        if not client.answers(vm.agent_socket, timeout=1.0):
            raise Refused(f"VM {name!r} has ended")
    else:
        raise Exit(code=asyncio.run(_run(vm, container, SHELL, [], "/", 0, 0, sys.stdin.isatty())))


@task(
    klass=Command,
    help={
        "ports": "[ADDRESS:]PORT:PORT, the host's TCP port first (0: any that is free), or [ADDRESS:]PORT:vsock:PORT",
        "reverse": "connections of the guest to the host's vsock port go to the host's TCP port",
        "container": "its `nc` reaches the guest's TCP port; made on first use",
        "name": "the VM",
    },
)
@command(failed=1)
def forward(_: Context, ports: str, reverse: bool = False, container: str = "default", name: str = DEFAULT_VM) -> None:
    """Join a TCP port of the host to a port of the guest, until Ctrl-C or the VM's end.

    Example: invoke forward 8080:80
    """
    vm = _running(name)
    rule = forwarding.Rule.parse(ports)
    asyncio.run(_forward(vm, rule, container, reverse))


async def _forward(vm: VM, rule: forwarding.Rule, container_id: str, reverse: bool) -> None:
    async with contextlib.AsyncExitStack() as stack:
        where: forwarding.Rule | Path = rule
        if rule.kind == "tcp":
            agent = await stack.enter_async_context(client.Agent.connect(vm.agent_socket))
            serve = forwarding.to_container(await _ensure(vm, agent, container_id), rule.guest)
        elif reverse:
            where, serve = vm.host_port(rule.guest), forwarding.to_tcp(rule.address, rule.host)
        else:
            serve = forwarding.to_vsock(vm.vsock_socket, rule.guest)
        if reverse and rule.kind != "vsock":
            raise Refused("--reverse is for vsock ports: PORT:vsock:PORT")
        port = await stack.enter_async_context(forwarding.listening(where, serve, _say))
        arrow = "←" if reverse else "→"
        _say(f"{rule.address}:{rule.host if reverse else port} {arrow} {rule.kind} port {rule.guest} of {vm.name}")
        await forwarding.ended(stack.enter_context(vm.lifeline()))


CONTAINER = {"container": "its name", "name": "the VM"}


@task(help={"container": "only this one (default: all that commands have made)", "name": "the VM", "json": "as JSON"})
@command(failed=1)
def ps(_: Context, container: str = "", name: str = DEFAULT_VM, json: bool = False) -> None:
    """List the processes of containers; pids are the guest's. One without any has ended.

    Example: invoke ps --container web --json
    """
    vm = _running(name)
    found = _ask(vm, lambda agent: listing.processes(agent, _known(vm), container))
    rows = ({"container": one["container"]} | row for one in found for row in one["processes"] or [{}])
    _show(("container", *listing.COLUMNS), found, rows, as_json=json)


@task(
    help={
        "container": "only this one (default: all that commands have made)",
        "name": "the VM",
        "interval": "seconds over which CPU usage is measured",
        "json": "as JSON",
    }
)
@command(failed=1)
def stats(_: Context, container: str = "", name: str = DEFAULT_VM, interval: float = 1.0, json: bool = False) -> None:
    """Show what containers use: CPU, memory (bytes), number of processes.

    Example: invoke stats --interval 5
    """
    vm = _running(name)
    found = _ask(vm, lambda agent: listing.stats(agent, _known(vm), container, interval))
    _show(listing.USAGE, found, found, as_json=json)


@task(
    klass=Command,
    help=CONTAINER | {"signal": "its number or name", "all": "signal all its processes, not only the first one"},
)
@command(failed=1)
def kill(_: Context, container: str, signal: str = "TERM", all: bool = False, name: str = DEFAULT_VM) -> None:
    """Send a signal to a container.

    Example: invoke kill web --signal HUP
    """
    number = listing.signal_number(signal)
    _ask(_running(name), lambda agent: listing.signal_container(agent.container(container), number, everything=all))


@task(klass=Command, help=CONTAINER | {"timeout": "seconds that it may take; 0 for as long as it takes"})
@command(failed=1)
def rm(_: Context, container: str, timeout: int = 30, name: str = DEFAULT_VM) -> None:
    """End a container and remove it.

    Example: invoke rm web
    """
    vm = _running(name)
    _ask(vm, lambda agent: agent.container(container).remove(timeout))
    _forget(vm, container)


@task(klass=Command, help=CONTAINER)
@command(failed=1)
def pause(_: Context, container: str, name: str = DEFAULT_VM) -> None:
    """Let all processes of a container stand still.

    Example: invoke pause web
    """
    _ask(_running(name), lambda agent: agent.container(container).pause())


@task(klass=Command, help=CONTAINER)
@command(failed=1)
def resume(_: Context, container: str, name: str = DEFAULT_VM) -> None:
    """Let a paused container go on.

    Example: invoke resume web
    """
    _ask(_running(name), lambda agent: agent.container(container).resume())


@task(help={"quick": "fewer samples: less than five minutes", "json": "as a list of rows"})
@command(failed=1)
def bench(_: Context, quick: bool = False, json: bool = False) -> None:
    """Measure everything beside its peer and its limit; fails when a budget is exceeded. docs/performance.md explains.

    Example: invoke bench --quick
    """
    _need(TO_TEST)
    words = [f"--{name}" for name, wanted in (("quick", quick), ("json", json)) if wanted]
    os.chdir(ROOT)
    os.execv(sys.executable, [sys.executable, "-m", "tests.bench", *words])


@task
@command(failed=1)
def test(_: Context) -> None:
    """Set up what the tests need and run them: invoke test [-- PYTEST ARGUMENTS]

    Example: invoke test -- tests/unit -k definition
    """
    _need(TO_TEST)
    import tomllib

    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["test"]
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *extras]
    if subprocess.run(pip).returncode != 0:
        raise Refused("pip could not install what the tests need; its message is above")
    os.chdir(ROOT)
    os.execv(sys.executable, [sys.executable, "-m", "pytest", *_words()])


if __name__ == "__main__":
    Program(name="caisson", binary="invoke", namespace=Collection.from_module(sys.modules[__name__])).run()
