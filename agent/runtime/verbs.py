"""The commands of the OCI command line: their options, operands, help and implementations."""

from __future__ import annotations

from caisson.agent.runtime.options import FLAG, LIST, NUMBER, NUMBERS, TEXT, RuntimeOption
from caisson.proto.record import Record

HELP = RuntimeOption("help", FLAG, "show help", "h")

GLOBAL = (
    RuntimeOption("debug", FLAG, "log debug messages, including those of container setup"),
    RuntimeOption("log", TEXT, "append the log to this file instead of standard error"),
    RuntimeOption("log-format", TEXT, "format of the log: text or json", default="text"),
    RuntimeOption("root", TEXT, "directory for the state of containers; best on a tmpfs", default=""),
    RuntimeOption("criu", TEXT, "accepted and ignored: there is no checkpoint"),
    RuntimeOption("systemd-cgroup", FLAG, "have systemd create the cgroups; cgroupsPath is then slice:prefix:name"),
    RuntimeOption("rootless", TEXT, "ignore cgroup permission errors: true, false or auto", default="auto"),
    HELP,
    RuntimeOption("version", FLAG, "print the version", "v"),
)

BUNDLE = RuntimeOption("bundle", TEXT, "directory of config.json and the root; default: the working directory", "b")
CONSOLE = RuntimeOption("console-socket", TEXT, "AF_UNIX socket that receives the master of the terminal")
PID_FILE = RuntimeOption("pid-file", TEXT, "write the process's pid to this file")
PIDFD = RuntimeOption("pidfd-socket", TEXT, "AF_UNIX socket that receives a pidfd of the process")
PRESERVE = RuntimeOption("preserve-fds", NUMBER, "pass N descriptors beyond stdio and those of LISTEN_FDS", default=0)
DETACH = RuntimeOption("detach", FLAG, "return once the process is running", "d")
NO_SUBREAPER = RuntimeOption("no-subreaper", FLAG, "do not reap what the container leaves behind")
NO_PIVOT = RuntimeOption("no-pivot", FLAG, "use MS_MOVE and chroot instead of pivot_root, for a root on a ramdisk")
CREATE = (
    BUNDLE, CONSOLE, PID_FILE, PIDFD, NO_PIVOT,
    RuntimeOption("no-new-keyring", FLAG, "keep the caller's session keyring"),
    PRESERVE,
)  # fmt: skip
CHECKPOINT = (
    RuntimeOption("image-path", TEXT, "directory of the image"),
    RuntimeOption("work-path", TEXT, "directory for work files and logs"),
    RuntimeOption("tcp-established", FLAG, "allow open TCP connections"),
    RuntimeOption("ext-unix-sk", FLAG, "allow external Unix sockets"),
    RuntimeOption("shell-job", FLAG, "allow shell jobs"),
    RuntimeOption("file-locks", FLAG, "handle file locks"),
    RuntimeOption("manage-cgroups-mode", TEXT, "soft, full, strict or ignore"),
    RuntimeOption("empty-ns", LIST, "create a namespace without restoring its contents"),
    RuntimeOption("auto-dedup", FLAG, "deduplicate memory images"),
    RuntimeOption("lazy-pages", FLAG, "restore memory by userfaultfd"),
    RuntimeOption("link-remap", FLAG, "remap unlinked files"),
    RuntimeOption("tcp-skip-in-flight", FLAG, "skip connections that are being set up"),
)
UPDATE = (
    RuntimeOption("resources", TEXT, "file with the limits as JSON (LinuxResources); - is standard input", "r"),
    RuntimeOption("blkio-weight", NUMBER, "weight of block I/O, 10 to 1000", default=0),
    RuntimeOption("cpu-period", TEXT, "period of the CPU quota, microseconds"),
    RuntimeOption("cpu-quota", TEXT, "CPU time in a period, microseconds"),
    RuntimeOption("cpu-burst", TEXT, "unused CPU time that may be kept, microseconds"),
    RuntimeOption("cpu-share", TEXT, "CPU shares, relative to other containers"),
    RuntimeOption("cpu-rt-period", TEXT, "period of the realtime quota, microseconds"),
    RuntimeOption("cpu-rt-runtime", TEXT, "realtime CPU time in a period, microseconds"),
    RuntimeOption("cpuset-cpus", TEXT, "CPUs to use, such as 0-3,7"),
    RuntimeOption("cpuset-mems", TEXT, "memory nodes to use"),
    RuntimeOption("cpu-idle", TEXT, "1: run only when the CPU is otherwise idle"),
    RuntimeOption("memory", TEXT, "memory limit; suffixes k, m, g; -1 is unlimited"),
    RuntimeOption("memory-reservation", TEXT, "soft memory limit"),
    RuntimeOption("memory-swap", TEXT, "limit of memory and swap together; -1 is unlimited"),
    RuntimeOption("kernel-memory", TEXT, "obsolete, ignored"),
    RuntimeOption("kernel-memory-tcp", TEXT, "obsolete, ignored"),
    RuntimeOption("pids-limit", NUMBER, "maximum number of processes", default=0),
    RuntimeOption("l3-cache-schema", TEXT, "schema of the L3 cache (Intel RDT/CAT)"),
    RuntimeOption("mem-bw-schema", TEXT, "schema of memory bandwidth (Intel RDT/MBA)"),
)
EXEC = (
    CONSOLE, PIDFD,
    RuntimeOption("cwd", TEXT, "working directory in the container"),
    RuntimeOption("env", LIST, "set an environment variable, NAME=value", "e"),
    RuntimeOption("tty", FLAG, "allocate a terminal", "t"),
    RuntimeOption("user", TEXT, "UID[:GID], numbers", "u"),
    RuntimeOption("additional-gids", NUMBERS, "add a supplementary group", "g"),
    RuntimeOption("process", TEXT, "file with the process as JSON", "p"),
    DETACH, PID_FILE,
    RuntimeOption("process-label", TEXT, "SELinux label of the process"),
    RuntimeOption("apparmor", TEXT, "AppArmor profile of the process"),
    RuntimeOption("no-new-privs", FLAG, "set no_new_privs"),
    RuntimeOption("cap", LIST, "add a capability", "c"),
    PRESERVE,
    RuntimeOption("cgroup", LIST, "run in a sub-cgroup: [CONTROLLER[,CONTROLLER]:]PATH"),
    RuntimeOption("ignore-paused", FLAG, "exec in a paused container; the process waits to be resumed"),
)  # fmt: skip
FORMAT = RuntimeOption("format", TEXT, "table or json", "f", default="table")


class Verb(Record):
    """A command.  `handler` is "module:function" below this package; `max_operands` None allows any number."""

    name: str
    help: str
    handler: str
    usage: str = "<container-id>"
    options: tuple[RuntimeOption, ...] = ()
    min_operands: int = 1
    max_operands: int | None = 1
    stop_at_operand: bool = False
    more: str = ""
    prefix: str = ""  # of its errors
    status: int = 1  # of its failure


VERBS = {
    verb.name: verb
    for verb in (
        Verb("checkpoint", "checkpoint a running container", "checkpoint:checkpoint", options=(
            *CHECKPOINT,
            RuntimeOption("parent-path", TEXT, "image of an earlier pre-dump"),
            RuntimeOption("leave-running", FLAG, "leave the container running"),
            RuntimeOption("status-fd", NUMBER, "descriptor that is written to once lazy-pages is ready", default=-1),
            RuntimeOption("page-server", TEXT, "ADDRESS:PORT of the page server"),
            RuntimeOption("pre-dump", FLAG, "dump memory only, and leave the container running"),
        ), more="Checkpoints need CRIU and are not supported: the command says so and fails."),
        Verb("create", "create a container", "lifecycle:create", options=CREATE, prefix="runc create failed: ",
             more="The container's init process waits for `start`.  Example:\n\n    PROG create -b /bundle box"),
        Verb("delete", "delete a stopped container and its resources", "lifecycle:delete", options=(
            RuntimeOption("force", FLAG, "kill it first; ignore an id that does not exist", "f"),
        )),
        Verb("events", "print statistics and out-of-memory events", "events:events", options=(
            RuntimeOption("interval", TEXT, "time between statistics, such as 500ms or 5s", default="5s"),
            RuntimeOption("stats", FLAG, "print the statistics once"),
        )),
        Verb("exec", "run another process in a container", "execute:execute", options=EXEC, max_operands=None,
             usage="<container-id> <command> [arguments...] | -p process.json <container-id>", stop_at_operand=True,
             status=255, prefix="exec failed: ", more="Example:\n\n    PROG exec -t box sh"),
        Verb("features", "print what this runtime supports, as JSON", "features:features", usage="", min_operands=0,
             max_operands=0),
        Verb("kill", "signal a container's init process (default: SIGTERM)", "lifecycle:kill", options=(
            RuntimeOption("all", FLAG, "signal all processes of the container", "a"),
        ), usage="<container-id> [signal]", max_operands=2),
        Verb("list", "list the containers of this root", "inspect:list_containers", options=(
            FORMAT, RuntimeOption("quiet", FLAG, "print ids only", "q"),
        ), usage="", min_operands=0, max_operands=0),
        Verb("pause", "suspend all processes of a container", "limits:pause"),
        Verb("ps", "list the processes of a container", "inspect:ps", options=(FORMAT,), max_operands=None,
             usage="<container-id> [ps options]", stop_at_operand=True),
        Verb("restore", "restore a container from a checkpoint", "checkpoint:restore", options=(
            *CHECKPOINT, *CREATE, DETACH, NO_SUBREAPER,
            RuntimeOption("lsm-profile", TEXT, "LSM profile as TYPE:NAME"),
            RuntimeOption("lsm-mount-context", TEXT, "LSM mount context"),
        ), more="Checkpoints need CRIU and are not supported: the command says so and fails."),
        Verb("resume", "resume all processes of a paused container", "limits:resume"),
        Verb("run", "create and run a container", "lifecycle:run", options=(
            *CREATE, DETACH, RuntimeOption("keep", FLAG, "do not delete the container when it exits"), NO_SUBREAPER,
        ), prefix="runc run failed: ", more="Example:\n\n    PROG run -b /bundle box"),
        Verb("spec", "write a config.json to start from", "template:spec", options=(
            RuntimeOption("bundle", TEXT, "directory to write it to", "b"),
            RuntimeOption("rootless", FLAG, "write one for a rootless container"),
        ), usage="", min_operands=0, max_operands=0),
        Verb("start", "execute the program of a created container", "lifecycle:start"),
        Verb("state", "print the state of a container as JSON", "inspect:state"),
        Verb("update", "change the limits of a container", "limits:update", options=UPDATE),
    )
}  # fmt: skip
