"""The entry of the command line: global options, the command, its errors and its status.

Source: runc's man pages (runc.8 and those of its commands); texts that callers match are exact.
"""

from __future__ import annotations

import os
import sys

from caisson.agent.libcontainer.config.reader import SpecError
from caisson.agent.libcontainer.container import Container, Runtime
from caisson.agent.libcontainer.errors import LaunchError
from caisson.agent.libcontainer.state import OCI_VERSION
from caisson.agent.libcontainer.state_directory import ContainerError
from caisson.agent.libcontainer.waits import BlockingWaits
from caisson.agent.runtime.errors import CommandError, is_of_program, sentence
from caisson.agent.runtime.log import Log
from caisson.agent.runtime.options import OptionError, Values, parse
from caisson.agent.runtime.verbs import GLOBAL, HELP, VERBS

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from caisson.agent.libcontainer.cgroups import Hierarchy
    from caisson.agent.libcontainer.process.launcher import ProcessLauncher
    from caisson.agent.runtime.verbs import Verb

#: Version of the command line that callers expect, not of this program: they compare it to decide what to use.
VERSION = "1.3.0"
DEFAULT_ROOT = "/run/runc"
#: Errors reported as one line, without a traceback.
EXPECTED = (CommandError, ContainerError, SpecError, LaunchError, OSError)


class Call:
    """One command: its options and operands, and the runtime it uses."""

    def __init__(self, prog: str, verb: Verb, options: Values, operands: list[str], settings: Values, log: Log) -> None:
        self.prog = prog
        self.verb = verb
        self.options = options
        self.operands = operands
        self.log = log
        self.warned = False
        self.root_given = "root" in settings.given
        self.root = settings.text("root") if self.root_given else default_root()
        self.systemd = settings.flag("systemd-cgroup")
        self.rootless = settings.text("rootless")
        self.is_rootless = self.rootless == "true" or (self.rootless == "auto" and is_ordinary_user())
        self._launcher: ProcessLauncher | None = None
        self._hierarchy: list[Hierarchy | None] = []
        self.runtime = Runtime(self.root, BlockingWaits(), self._make_launcher, self.hierarchy, self.warn, _saved)

    def warn(self, message: str) -> None:
        """Log a warning."""
        self.warned = True
        self.log("warning", message)

    def container(self) -> Container:
        """Return the container that the command operates on.  Raises ContainerError or CommandError."""
        return Container.load(self.runtime, self.id)

    @property
    def id(self) -> str:
        """The id of the container.  Raises CommandError for an invalid one."""
        name = self.operands[0]
        if not name:
            raise CommandError("container id cannot be empty")
        from caisson.agent.libcontainer.state import check_id

        try:
            return check_id(name)
        except SpecError:
            raise CommandError("invalid container ID format") from None

    def hierarchy(self) -> Hierarchy | None:
        """Return the cgroup hierarchies of this machine."""
        if not self._hierarchy:
            from caisson.agent.libcontainer.cgroups import of_host

            self._hierarchy.append(of_host())
        return self._hierarchy[0]

    def _nsexec_log(self, level: str, message: str, **_: object) -> None:
        """Log a line from nsexec; failures are reported by the error that ends the command."""
        self.log("debug" if level == "fatal" else level, message)

    def _make_launcher(self) -> ProcessLauncher:
        if self._launcher is None:
            from caisson.agent.libcontainer.process.children import OwnChildren
            from caisson.agent.libcontainer.process.launcher import ProcessLauncher
            from caisson.agent.libcontainer.process.nsexec import Nsexec
            from caisson.agent.libcontainer.process.starter import Starter
            from caisson.agent.runtime.program import find

            nsexec = Nsexec.seal(find())
            self.log("debug", "runc exeseal: using /proc/self/exe clone")
            self._launcher = ProcessLauncher(
                Starter(
                    nsexec, OwnChildren(), self.runtime.waits, self._nsexec_log, timeout=None, verbose=self.log.verbose
                )
            )
        return self._launcher


def _saved(container: Container) -> None:
    """Write the files that the front needs for a container."""
    from caisson.agent.runtime.prepared import write_front_state

    write_front_state(container)


def default_root() -> str:
    """Return the default of --root."""
    directory = os.environ.get("XDG_RUNTIME_DIR", "")
    return f"{directory}/runc" if directory and is_ordinary_user() else DEFAULT_ROOT


def is_ordinary_user() -> bool:
    """Return whether this is not the machine's root: podman runs its runtime as root of a user namespace."""
    if os.geteuid() != 0:
        return True
    from caisson.agent.libcontainer.plan.users import in_user_namespace

    return os.environ.get("USER") != "root" and in_user_namespace()


def version() -> str:
    """Write the output of --version: callers match the beginnings of its lines."""
    return f"runc version {VERSION}\ncommit: caisson\nspec: {OCI_VERSION}\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; return the status to exit with."""
    words = list(sys.argv if argv is None else argv)
    prog = os.path.basename(words[0])  # noqa: PTH119 - no pathlib at start
    try:
        settings, rest = parse(GLOBAL, words[1:], stop_at_operand=True)
    except OptionError as error:
        _print_usage(f"Incorrect Usage: {error}", _program_help(prog))
        Log().error(str(error))
        return 1
    if settings.flag("version"):
        sys.stdout.write(version())
        return 0
    if settings.flag("help") or not rest or rest[0] in ("help", "h"):
        verb = VERBS.get(rest[1]) if len(rest) > 1 else None
        if verb is None and len(rest) > 1:
            return _no_help(rest[1], Log())
        sys.stdout.write(_program_help(prog) if verb is None else _command_help(prog, verb))
        return 0
    if settings.text("log-format") not in ("text", "json"):
        Log().error(f"invalid log-format: {settings.text('log-format')}")
        return 1
    as_json = settings.text("log-format") == "json"
    try:
        log = Log.open(settings.text("log"), json=as_json, debug=settings.flag("debug"))
    except OSError as error:
        Log(json=as_json).error(f"open {settings.text('log')}: {(error.strerror or '').lower()}")
        return 1
    with log:
        if "root" in settings.given:
            root = settings.text("root") and os.path.abspath(settings.text("root"))  # noqa: PTH100
            if root in ("", "/"):
                log.error(f"--root: {settings.text('root')!r} cannot hold the state of containers; give a directory")
                return 1
            settings.replace("root", root)
        return _dispatch(prog, settings, rest, log)


def run_and_exit() -> None:
    """Run the command line of this process and exit at once: an orderly interpreter shutdown takes 5 ms."""
    status = main()
    sys.stdout.flush()
    os._exit(status)


def _dispatch(prog: str, settings: Values, rest: list[str], log: Log) -> int:
    verb = VERBS.get(rest[0])
    if verb is None:
        return _no_help(rest[0], log)
    try:
        options, operands = parse((*verb.options, HELP), rest[1:], stop_at_operand=verb.stop_at_operand)
        if options.flag("help"):
            sys.stdout.write(_command_help(prog, verb))
            return 0
        if verb.name == "exec" and options.text("process"):
            verb = verb.but(min_operands=1)
        problem = _check_operands(verb, len(operands))
    except OptionError as error:
        _print_usage(f"Incorrect Usage: {error}", _command_help(prog, verb))
        log.error(str(error))
        return 1
    if problem:
        _print_usage("Incorrect Usage.", _command_help(prog, verb))
        log.error(problem)
        return 1
    return _run_command(Call(prog, verb, options, operands, settings, log))


def _no_help(word: str, log: Log) -> int:
    log.error(f"No help topic for '{word}'")
    return 3


def _run_command(call: Call) -> int:
    verb = call.verb
    try:
        if call.systemd and verb.name in ("create", "run", "exec", "update"):
            check_systemd()
        return int(_function(verb)(call) or 0)
    except EXPECTED as error:
        if is_of_program(error) and verb.name == "run":
            os.write(2, f"{error}\n".encode())  # as the process itself would
        else:
            call.log.error(verb.prefix + sentence(error))
    except Exception as error:
        from caisson.agent.libcontainer.cgroups.base import CgroupError

        if not isinstance(error, CgroupError):  # a bug: callers read only the log
            import traceback

            call.log("debug", traceback.format_exc())
            error = RuntimeError(f"{type(error).__name__}: {error}; please report this, with the output of --debug")
        call.log.error(verb.prefix + sentence(error))
    return verb.status


def check_systemd() -> None:
    """Reject --systemd-cgroup if systemd cannot manage cgroups.  Raises CommandError."""
    if not os.path.isdir("/run/systemd/system"):  # noqa: PTH112
        raise CommandError("systemd cgroup flag passed, but systemd support for managing cgroups is not available")
    if not os.path.exists("/sys/fs/cgroup/cgroup.controllers"):  # noqa: PTH110
        raise CommandError("systemd cgroup flag passed, but this machine has cgroup v1; leave the flag out")


def _function(verb: Verb) -> Callable[[Call], int | None]:
    module, _, name = verb.handler.partition(":")
    whole = f"{__package__}.{module}"
    __import__(whole)
    function: Callable[[Call], int | None] = getattr(sys.modules[whole], name)
    return function


def _check_operands(verb: Verb, count: int) -> str:
    """Return what is wrong with the number of operands; "" if nothing."""
    if verb.min_operands == verb.max_operands and count != verb.min_operands:
        return f'runc: "{verb.name}" requires exactly {verb.min_operands} argument(s)'
    if count < verb.min_operands:
        return f'runc: "{verb.name}" requires a minimum of {verb.min_operands} argument(s)'
    if verb.max_operands is not None and count > verb.max_operands:
        return f'runc: "{verb.name}" requires a maximum of {verb.max_operands} argument(s)'
    return ""


def _program_help(prog: str) -> str:
    from caisson.agent.runtime import help

    return help.program(prog, version().strip().replace("\n", "\n   "))


def _command_help(prog: str, verb: Verb) -> str:
    from caisson.agent.runtime import help

    return help.command(prog, verb)


def _print_usage(problem: str, text: str) -> None:
    sys.stdout.write(f"{problem}\n\n{text}")
    sys.stdout.flush()
