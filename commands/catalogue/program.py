"""Commands that run programs in containers, and give them files and ports."""

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
    SHARE_TAG,
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
    details="""Standard streams and exit status are passed through: 128+n if signal n killed the program, 127 if it was
        not found, 126 if it cannot be executed, 125 if Caisson could not run it at all. Ctrl-C is passed on to the
        program; the third one kills it. If no VM is running, one is booted and stopped afterwards.""",
    options=(
        VM_OR_OWN,
        Option("container", "the container", CONTAINER, short="c", shown="`default`, created on first use and kept"),
        Option("guest", "run it in the guest itself, outside all containers, with the image's own files and processes"),
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
    is_short=True,
)

RUN = Command(
    "run",
    "Run a container image, an OCI bundle or a root file system as a container.",
    "caisson.commands.run:run",
    details="""Entry point, environment, user and working directory come from the image; COMMAND overrides its command.
        The container's root is writable; changes are lost when it is removed: when it exits, or by `caisson rm` if it
        was detached. If this command is killed, the next `run` removes the container. The container is confined as
        Docker does it: its capabilities, its seccomp filter, 2048 processes, and three quarters of the guest's
        memory.""",
    positionals=(
        Positional(
            "path",
            "an OCI image layout, the output of `docker save` or skopeo's dir:, an OCI bundle or a root file system, "
            "as a directory or tar; PATH:TAG selects one of several images; or the name of an image run "
            "before, or of one in a registry",
            FILE,
        ),
    ),
    options=(
        VM_OR_OWN,
        Option("container", "name of the container", CONTAINER, default="", short="c", shown="a new one"),
        TTY,
        INTERACTIVE,
        Option("detach", "leave it running in the background, in the VM `default`, and print its name", short="d"),
        Option("rm", "remove it when it exits; always done unless it is detached"),
        ENV,
        Option("env-file", "set variables from a file with NAME=value lines", FILE, repeat=True),
        Option(
            "user", "run it as this user", name("USER[:GROUP]", "1000:1000"), default="", short="u", shown="the image's"
        ),
        Option("workdir", "its working directory", DIRECTORY_IN_GUEST, default="", short="w", shown="the image's"),
        Option("hostname", "its host name", name("NAME", "web"), default="", shown="caisson"),
        Option("entrypoint", "run this instead of the image's entry point; '' for none", TEXT, shown="the image's"),
        Option("memory", "its memory limit", memory(6, 16 << 20), default=0, short="m", shown="3/4 of the guest's"),
        Option("cpus", "its CPU limit, in CPUs", decimal(0.01, 1024), default=0.0, shown="none"),
        Option("pids-limit", "its process limit; -1 for none", integer(-1, 4194304), shown="2048"),
        Option("read-only", "make its root read-only"),
        Option("tmpfs", "mount a tmpfs", name("PATH[:OPTIONS]", "/tmp:size=64m"), repeat=True),
        Option(
            "volume", "share a directory of the host", name("HOST:GUEST[:ro]", "./data:/data"), repeat=True, short="v"
        ),
        Option("cap-add", "add a capability, or ALL", name("CAPABILITY", "NET_ADMIN"), repeat=True),
        Option("cap-drop", "drop a capability, or ALL", name("CAPABILITY", "CHOWN"), repeat=True),
        Option("privileged", "do not confine it within the guest: all capabilities, no seccomp filter, no limits"),
        Option("init", "run an init in it that forwards signals and reaps processes"),
        Option("timeout", "stop it after this time, with exit status 124", seconds(), default=0.0, shown="never"),
        NETWORK,
        PUBLISH,
        Option("tag", "which image, if there are several", name("TAG", "latest"), default="", shown="the only one"),
        Option("max-size", "reject an image with more data", memory(1, 16 << 20), default=0, shown="16G at most"),
        VERBOSE.but(short=""),  # -v is --volume, as docker has it
    ),
    program=Program("what to run instead of the image's command", required=False),
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
    "Open a shell in a container, or with --guest in the guest itself.",
    "caisson.commands.execute:shell",
    details="The exit status is the shell's.",
    positionals=(
        Positional(
            "container", "the container; `default` is created on first use and kept", CONTAINER, default="default"
        ),
    ),
    options=(Option("guest", "in the guest itself, outside all containers"), VM),
    runs_program=True,
    examples=("caisson shell", "caisson shell web"),
    is_short=True,
)

CP = Command(
    "cp",
    "Copy files into a container or out of it.",
    "caisson.commands.execute:cp",
    details="The container needs `sh` and `tar`.",
    positionals=(
        Positional("source", "PATH, or CONTAINER:PATH", FILE),
        Positional("target", "PATH, or CONTAINER:PATH", FILE),
    ),
    options=(VM,),
    examples=("caisson cp build/app default:/tmp", "caisson cp default:/etc/passwd ."),
    enters_container=True,
    is_short=True,
)

SHARE = Command(
    "share",
    "Share a directory of this machine with a container, and print where it is mounted.",
    "caisson.commands.program:share",
    details="""It is read-only unless --writable is given. It is mounted by virtiofs, or by 9p if the VM was booted with
        the same share.""",
    positionals=(Positional("directory", "the directory to share", DIRECTORY),),
    options=(
        VM,
        IN_CONTAINER,
        Option("at", "mount point in the container", DIRECTORY_IN_GUEST, default="", shown="/run/shared/TAG"),
        Option("tag", "name of the share", name("TAG", "src"), default="", shown="the directory's name"),
        Option("writable", "let the guest write to it"),
        Option("only-plug", "do not mount it: only give the guest a virtiofs device with this tag"),
    ),
    examples=("caisson share . --writable && caisson exec ls /run/shared",),
    enters_container=True,
)

UNSHARE = Command(
    "unshare",
    "Unmount a shared directory in all containers and remove it from the VM.",
    "caisson.commands.program:unshare",
    positionals=(Positional("tag", "name of the share", SHARE_TAG),),
    options=(VM,),
    examples=("caisson unshare src",),
)

FORWARD = Command(
    "forward",
    "Forward a TCP port of this machine to a port of the guest, until Ctrl-C or until the VM stops.",
    "caisson.commands.program:forward",
    positionals=(
        Positional(
            "ports", "[ADDRESS:]PORT:PORT, this machine's port first (0: any free one), or [ADDRESS:]PORT:vsock:PORT",
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
