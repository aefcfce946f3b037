"""Commands that run programs in containers, and bring files and ports to them."""

from __future__ import annotations

from caisson.commands.catalogue.shared import (
    ENV,
    IN_CONTAINER,
    INTERACTIVE,
    NETWORK,
    PUBLISH,
    TTY,
    VERBOSE,
    VM,
    VM_OR_OWN,
)
from caisson.commands.declare import (
    CONTAINER,
    DIRECTORY,
    FILE,
    TEXT,
    Command,
    Option,
    Positional,
    Program,
    decimal,
    integer,
    memory,
    name,
    seconds,
)

DIRECTORY_IN_GUEST = name("DIR", "/tmp")

EXEC = Command(
    "exec",
    "Run a program in a container in a VM.",
    "caisson.commands.execute:exec_",
    details="""Its standard streams are this command's; so is its exit status: 128+n if signal n ended it, 127 if there
        is no such program, 126 if it cannot be executed, 125 if Caisson could not run it at all. Ctrl-C is passed on to
        it; the third one kills it. With no VM running, one is booted for it and stopped afterwards.""",
    options=(
        VM_OR_OWN,
        Option(
            "container", "the container", CONTAINER, short="c", shown="`default`, which is made on first use and kept"
        ),
        Option(
            "guest", "run it in the guest itself, outside all containers: among the image's own files and processes"
        ),
        TTY,
        INTERACTIVE,
        ENV,
        NETWORK,
        Option("user", "run it as this user", name("USER[:GROUP]", "1000:1000"), default="0", short="u"),
        Option("workdir", "its working directory in the container", DIRECTORY_IN_GUEST, default="/", short="w"),
        VERBOSE,
    ),
    program=Program("the program and its arguments"),
    runs_program=True,
    examples=(
        "caisson exec uname -a",
        "echo hello | caisson exec -- sh -c 'cat; exit 7'",
        "caisson exec --tty sh",
        "caisson exec --guest dmesg",
    ),
)

RUN = Command(
    "run",
    "Run a container image, an OCI bundle or a root file system as a container.",
    "caisson.commands.run:run",
    details="""Entry point, environment, user and working directory are the image's; COMMAND takes the place of its own.
        The container can write to its root; that is gone when it is removed: at its end, or with `caisson rm` if it
        was detached. If this command is killed, the container is removed by the next `run`. The container is confined
        as Docker does it: its capabilities, its filter of system calls, 2048 processes, and three quarters of the
        guest's memory.""",
    positionals=(
        Positional(
            "path",
            "an OCI image layout, what `docker save` or skopeo's dir: writes, an OCI bundle or a root file system, a "
            "directory or tar; PATH:TAG chooses one of several images; or the name of an image that was run before, or "
            "in a registry",
            FILE,
        ),
    ),
    options=(
        VM_OR_OWN,
        Option("container", "name of the container", CONTAINER, default="", short="c", shown="a new one"),
        TTY,
        INTERACTIVE,
        Option("detach", "leave it running in the background, in the VM `default`; prints its name", short="d"),
        Option("rm", "remove it at its end, as is done for all that are not detached"),
        ENV,
        Option("env-file", "set variables from a file: NAME=value in each line", FILE, repeat=True),
        Option(
            "user", "run it as this user", name("USER[:GROUP]", "1000:1000"), default="", short="u", shown="the image's"
        ),
        Option("workdir", "its working directory", DIRECTORY_IN_GUEST, default="", short="w", shown="the image's"),
        Option("hostname", "its host name", name("NAME", "web"), default="", shown="caisson"),
        Option("entrypoint", "run this in place of the image's entry point; '' for none", TEXT, shown="the image's"),
        Option("memory", "its memory limit", memory(6, 16 << 20), default=0, short="m", shown="3/4 of the guest's"),
        Option("cpus", "its limit of CPU time, in CPUs", decimal(0.01, 1024), default=0.0, shown="none"),
        Option("pids-limit", "its limit of processes; -1 for none", integer(-1, 4194304), shown="2048"),
        Option("read-only", "make its root read-only"),
        Option("tmpfs", "mount a tmpfs", name("PATH[:OPTIONS]", "/tmp:size=64m"), repeat=True),
        Option(
            "volume", "share a directory of the host", name("HOST:GUEST[:ro]", "./data:/data"), repeat=True, short="v"
        ),
        Option("cap-add", "add a capability, or ALL", name("CAPABILITY", "NET_ADMIN"), repeat=True),
        Option("cap-drop", "drop a capability, or ALL", name("CAPABILITY", "CHOWN"), repeat=True),
        Option("privileged", "confine it by the guest alone: all capabilities, no filter, no limits"),
        Option("init", "run an init in it that passes signals on and reaps processes"),
        Option("timeout", "stop it after this time; the status is 124 then", seconds(), default=0.0, shown="never"),
        NETWORK,
        PUBLISH,
        Option("tag", "which of several images", name("TAG", "latest"), default="", shown="the only one"),
        Option("max-size", "refuse an image with more data", memory(1, 16 << 20), default=0, shown="16G at most"),
        VERBOSE.but(short=""),  # -v is --volume, as docker has it
    ),
    program=Program("what to run in place of the image's own command", required=False),
    runs_program=True,
    examples=(
        "caisson run alpine.tar",
        "caisson run alpine.tar cat /etc/os-release",
        "caisson run --detach --container web site.tar",
        "caisson run --memory 64M --volume ./data:/data:ro alpine.tar ls /data",
    ),
)  # fmt: skip

SHELL = Command(
    "shell",
    "Work in a container, or with --guest in the guest itself.",
    "caisson.commands.program:shell",
    details="The exit status is the shell's.",
    positionals=(
        Positional("container", "the container; `default` is made on first use and kept", CONTAINER, default="default"),
    ),
    options=(Option("guest", "in the guest itself, outside all containers"), VM),
    runs_program=True,
    examples=("caisson shell", "caisson shell web"),
)

CP = Command(
    "cp",
    "Copy files into a container or out of it.",
    "caisson.commands.program:cp",
    details="The container needs `sh` and `tar`.",
    positionals=(
        Positional("source", "PATH, or CONTAINER:PATH", FILE),
        Positional("target", "PATH, or CONTAINER:PATH", FILE),
    ),
    options=(VM,),
    examples=("caisson cp build/app default:/tmp", "caisson cp default:/etc/passwd ."),
)

SHARE = Command(
    "share",
    "Share a directory of this machine with a container; prints where it is mounted.",
    "caisson.commands.program:share",
    details="""It is read-only unless --writable is given. It comes as virtiofs, or as 9p if the VM was booted with the
        same share.""",
    positionals=(Positional("directory", "the directory to share", DIRECTORY),),
    options=(
        VM,
        IN_CONTAINER,
        Option("at", "where in the container", DIRECTORY_IN_GUEST, default="", shown="/run/shared/TAG"),
        Option("tag", "name of the share", name("TAG", "src"), default="", shown="the directory's name"),
        Option("writable", "let the guest write to it"),
        Option("only-plug", "do not mount it: the guest has a virtiofs device with this tag"),
    ),
    examples=("caisson share . --writable && caisson exec ls /run/shared",),
)

UNSHARE = Command(
    "unshare",
    "Unmount a shared directory in all containers and remove it from the VM.",
    "caisson.commands.program:unshare",
    positionals=(Positional("tag", "name of the share", name("TAG", "src")),),
    options=(VM,),
    examples=("caisson unshare src",),
)

FORWARD = Command(
    "forward",
    "Forward a TCP port of this machine to a port of the guest, until Ctrl-C or the VM's end.",
    "caisson.commands.program:forward",
    positionals=(
        Positional(
            "ports", "[ADDRESS:]PORT:PORT, this machine's first (0: any free one), or [ADDRESS:]PORT:vsock:PORT",
            name("PORTS", "8080:80"),
        ),
    ),
    options=(
        Option("reverse", "forward the guest's connections to this machine's vsock port to the TCP port"),
        IN_CONTAINER,
        VM,
    ),
    examples=("caisson forward 8080:80", "caisson forward 0.0.0.0:8080:vsock:9000"),
)  # fmt: skip

COMMANDS = (EXEC, RUN, SHELL, CP, SHARE, UNSHARE, FORWARD)
