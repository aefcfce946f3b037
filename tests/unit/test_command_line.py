"""Test the command line: the meaning of its arguments, and errors for meaningless ones."""

from __future__ import annotations

import contextlib
import inspect
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from caisson.agent.client import copy
from caisson.agent.client.errors import UsageError
from caisson.commands import execute
from caisson.commands import main as command_line
from caisson.commands.catalogue import COMMANDS, GROUPS
from caisson.commands.declare import Command, Option
from caisson.commands.main import EXPECTED_ERRORS, CommandLine, load, one_line
from caisson.commands.manpage import VARIABLES, manual
from caisson.commands.parse import CommandLineError, HelpWanted, parse
from caisson.commands.renamed import OLD_COMMANDS, OLD_OPTIONS
from caisson.commands.run import _parse_volume, run
from caisson.commands.usage import help_of
from caisson.proto.contract import VERSION
from tests.support.source import ROOT

EXEC, RUN, BOOT_VM, STOP_VM, CP, UNSHARE = (
    COMMANDS[name] for name in ("exec", "run", "boot-vm", "stop-vm", "cp", "unshare")
)
EVERY = [command for command in COMMANDS.values() if not command.hidden]


def refused(command: Command, *words: str) -> str:
    """Return the one-line error for an invalid command line."""
    with pytest.raises(CommandLineError) as caught:
        parse(command, words)
    text = str(caught.value)
    assert "\n" not in text and text.startswith(f"{command.name}: ")
    assert caught.value.status == (125 if command.name in ("exec", "run", "shell") else 2)
    return text


@pytest.mark.parametrize(
    ("words", "program"),
    [
        (["uname", "-a"], ["uname", "-a"]),
        (["--", "uname", "-a"], ["uname", "-a"]),
        (["-n", "web", "sh", "-c", "exit 7", "--", "--name", "x"], ["sh", "-c", "exit 7", "--", "--name", "x"]),
        (["--name=web", "--", "--help"], ["--help"]),
        (["--", "--", "x"], ["--", "x"]),
        (["echo", ""], ["echo", ""]),
        (["printf", "a\udcffb"], ["printf", "a\udcffb"]),
    ],
)
def test_exec_passes_the_programs_words_on_as_they_are(words: list[str], program: list[str]) -> None:
    assert parse(EXEC, words)[0]["words"] == program


@pytest.mark.parametrize(
    ("words", "path", "program", "detach"),
    [
        (["a.tar"], "a.tar", [], False),
        (["a.tar", "--detach"], "a.tar", [], True),
        (["-d", "a.tar", "cat", "-d"], "a.tar", ["cat", "-d"], True),
        (["a.tar", "--", "-d"], "a.tar", ["-d"], False),
        (["--", "a.tar", "cat"], "a.tar", ["cat"], False),
        (["--path", "a.tar", "cat"], "a.tar", ["cat"], False),
    ],
)
def test_run_takes_options_until_the_programs_first_word(
    words: list[str], path: str, program: list[str], detach: bool
) -> None:
    values, _ = parse(RUN, words)
    assert (values["path"], values["words"], values["detach"]) == (path, program, detach)


def test_options_in_every_form() -> None:
    values, _ = parse(EXEC, ["-tcbox", "-e", "A=1", "--env=B=", "--user=1:2", "-n=web", "true"])
    assert (values["tty"], values["container"], values["env"]) == (True, "box", ["A=1", "B="])
    assert (values["user"], values["name"], values["workdir"]) == ("1:2", "web", "/")


def test_what_fingers_know_from_docker() -> None:
    values, _ = parse(
        RUN, ["-it", "--rm", "-v", "./a:/b:ro", "-p", "80:80", "-e", "A=1", "-u", "1", "-w", "/x", "i", "sh"]
    )
    assert (values["tty"], values["rm"], values["volume"], values["publish"]) == (True, True, ["./a:/b:ro"], ["80:80"])
    assert (values["env"], values["user"], values["workdir"], values["words"]) == (["A=1"], "1", "/x", ["sh"])
    assert parse(EXEC, ["-it", "sh"])[0]["tty"]


@pytest.mark.parametrize("name", ["a b", "a\nb", "-a", "x" * 65, "\xe9", "a/b"])
def test_a_host_name_that_is_none_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match=r"--hostname .*: is not a host name; "):
        run(**parse(RUN, [f"--hostname={name}", "image"])[0])


@pytest.mark.parametrize("text", [":/v", "src:v", "/v", "src", "src:/v:xx", "no-such-directory:/v"])
def test_a_volume_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"--volume .*: "):
        _parse_volume(text)


@pytest.mark.parametrize(
    ("word", "size"), [("512", 512), ("512M", 512), ("512MiB", 512), ("1g", 1024), ("1.5G", 1536), ("262144K", 256)]
)
def test_memory_has_units(word: str, size: int) -> None:
    assert parse(BOOT_VM, ["--memory", word])[0]["memory"] == size


def test_a_vms_name_is_a_word_or_an_option() -> None:
    assert parse(STOP_VM, ["web"])[0]["name"] == "web"
    assert parse(STOP_VM, ["--name", "web"])[0]["name"] == "web"
    assert parse(STOP_VM, [])[0]["name"] == "default"


@pytest.mark.parametrize(
    ("command", "words", "text"),
    [
        (BOOT_VM, ["--memry", "1"], "--memry: unknown option; did you mean --memory?"),
        (BOOT_VM, ["--memory"], "--memory: a value is missing; for example --memory 512M"),
        (BOOT_VM, ["--memory", "abc"], "--memory abc: is not a size; for example 512M or 2G (without a unit: MiB)"),
        (BOOT_VM, ["--memory", "-5"], "--memory -5: is out of range; give 128M to 16T"),
        (BOOT_VM, ["--memory", "9" * 5000], f"--memory {'9' * 5000}: is not a size; for example 512M or 2G"),
        (BOOT_VM, ["--cpus", "1e3"], "--cpus 1e3: is not a whole number; give 1 to 255"),
        (BOOT_VM, ["--cpus", "256"], "--cpus 256: is out of range; give 1 to 255"),
        (COMMANDS["prune"], ["--older", "-1"], "--older -1: is out of range; give 0 to 31536000 seconds"),
        (BOOT_VM, ["--accel", "hvf"], "--accel hvf: is unknown; give auto, kvm or tcg"),
        (BOOT_VM, ["--detach=yes"], "--detach: takes no value; write --detach alone"),
        (BOOT_VM, ["--image", "--detach"], "--image: a value is missing before --detach"),
        (BOOT_VM, ["--timeout", "nan"], "--timeout nan: is not a time"),
        (BOOT_VM, ["--x\ny"], r"'--x\ny': unknown option"),
        (STOP_VM, ["a", "b"], "b: unexpected argument; usage: caisson stop-vm [OPTIONS] [NAME]"),
        (STOP_VM, [""], "NAME '': is empty; for example NAME web"),
        (CP, ["a"], "TARGET is missing; usage: caisson cp [OPTIONS] SOURCE TARGET"),
        (EXEC, [], "COMMAND is missing; usage: caisson exec [OPTIONS] [--] COMMAND [ARG…]"),
        (EXEC, ["--env", "x", "true"], "--env x: is not NAME=value; for example TERM=xterm"),
        (EXEC, ["--container", "\udcff", "ls"], r"--container '\udcff': is not a name; give letters, digits"),
        (UNSHARE, ["a\n"], r"TAG 'a\n': is not a name"),
        (EXEC, ["-x", "ls"], "-x: unknown option; a program's own options go after --"),
    ],
)
def test_wrong_words_are_named_with_a_remedy(command: Command, words: list[str], text: str) -> None:
    assert text in refused(command, *words)


def test_help_is_a_word_anywhere_before_the_program() -> None:
    for words in (["--help"], ["web", "-h"], ["--memory", "1G", "--help"]):
        with pytest.raises(HelpWanted):
            parse(BOOT_VM, words)
    assert parse(EXEC, ["ls", "--help"])[0]["words"] == ["ls", "--help"]


def test_old_words_still_work_and_say_so_once(capsys: pytest.CaptureFixture[str]) -> None:
    for (command, old), new in OLD_OPTIONS.items():
        values, said = parse(COMMANDS[command], [f"--{old}", "small"])
        assert values[new] == "small" and said == [f"--{old}: the option is --{new} now; the old one still works"]
    for old, new in OLD_COMMANDS.items():
        assert CommandLine(GROUPS).run([old, "--help"]) == 0
        shown = capsys.readouterr()
        assert f"Usage: caisson {new}" in shown.out
        assert shown.err == f"caisson: {old}: the command is {new} now; the old name still works\n"


@pytest.mark.parametrize("command", [one for one in COMMANDS.values() if one.run], ids=lambda one: one.name)
def test_a_declaration_fits_its_function(command: Command) -> None:
    names = [one.parameter for one in command.parameters()] + ([command.program.dest] if command.program else [])
    parameters = inspect.signature(load(command.run)).parameters
    assert sorted(names) == sorted(parameters)


@pytest.mark.parametrize("command", EVERY, ids=lambda one: one.name)
def test_help_shows_usage_defaults_and_examples(command: Command) -> None:
    page = help_of(command)
    assert page.startswith(f"Usage: caisson {command.name}") and "Example" in page
    assert all(f"--{option.name}" in page for option in command.options)
    assert max(map(len, page.splitlines())) <= 100
    for line in command.examples:
        first = line.partition("&&")[0].partition("|")[2 if line.startswith("echo") else 0].partition("#")[0].strip()
        if first.startswith(f"caisson {command.name} ") and '"$(' not in line:
            parse(command, shlex.split(first)[2:])


def test_the_manual_page_has_every_command_and_option() -> None:
    page = manual(GROUPS, VERSION)
    for command in EVERY:
        section = page.partition(f".SS caisson {command.name.replace('-', chr(92) + '-')}")[2].partition("\n.SS ")[0]
        for option in command.options:
            assert ("--" + option.name).replace("-", "\\-") in section, (command.name, option.name)
    if shutil.which("groff"):
        words = ["groff", "-man", "-Kutf8", "-Tutf8", "-ww", "-z"]
        done = subprocess.run(words, input=page.encode(), capture_output=True, timeout=60)
        assert (done.returncode, done.stderr) == (0, b"")


def test_the_manual_lists_every_variable() -> None:
    files = [*(ROOT / "image").rglob("*.py"), *(ROOT / "commands").rglob("*.py")]
    texts = [file.read_text() for file in files if file.name != "manpage.py"]
    read = {name for text in texts for name in re.findall(r'"(CAISSON_[A-Z_]+)"', text)}
    assert read == {name for name, _ in VARIABLES}


def test_expected_errors_are_there() -> None:
    for name in EXPECTED_ERRORS:
        error: type[Exception] = load(name)  # type: ignore[assignment]
        assert issubclass(error, Exception) and f"{error.__module__}:{error.__qualname__}" == name
    assert one_line(UsageError("x: y; z")) == "x: y; z"
    assert one_line(PermissionError(13, "Permission denied", "/x")) == "/x: Permission denied"
    assert one_line(KeyError("a bug")) == ""


# The whole program, as a process.


def caisson(*words: str | bytes, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-m", "caisson.commands.main", *words],
        env=os.environ | (environment or {}), stdin=subprocess.DEVNULL, capture_output=True, timeout=60,
    )  # fmt: skip


def test_alone_it_shows_the_commands_in_groups() -> None:
    for words in ((), ("--help",), ("help",), ("--list",)):
        done = caisson(*words)
        assert done.returncode == 0 and done.stderr == b""
        shown = done.stdout.decode()
        assert all(f"\n{group.title}:\n" in shown for group in GROUPS)
        assert all(f"\n  {command.name} " in shown for command in EVERY)


def test_the_version_costs_no_library() -> None:
    done = caisson("--version", environment={"PYTHONPROFILEIMPORTTIME": "1"})
    assert done.stdout.decode() == f"caisson {VERSION}\n"
    modules = {line.rpartition(b"|")[2].strip().decode() for line in done.stderr.splitlines()}
    assert "caisson.commands.parse" in modules
    for name in (
        "invoke",
        "grpc",
        "jinja2",
        "yaml",
        "google.protobuf",
        "asyncio",
        "caisson.image",
        "caisson.agent.client",
    ):
        assert name not in modules


@pytest.mark.parametrize("words", [("exec", "--tty", "--", "cat"), ("run", "--tty", "image.tar")])
def test_a_terminal_for_input_that_is_not_one_is_refused(words: tuple[str, ...]) -> None:
    done = caisson(*words)
    assert done.stderr == b"caisson: --tty: standard input is not a terminal; leave --tty out\n"
    assert done.returncode == 125


def test_a_misspelt_command_is_recognised() -> None:
    done = caisson("boot")
    assert (done.returncode, done.stderr) == (2, b"caisson: boot: unknown command; did you mean boot-vm?\n")


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams_are_no_traceback(closed: str) -> None:
    script = f'exec "$@" {closed}'
    words = ["sh", "-c", script, "sh", sys.executable, "-m", "caisson.commands.main", "help", "exec"]
    done = subprocess.run(words, capture_output=True, timeout=60)
    assert done.returncode == 0 and done.stderr == b""


def test_a_closed_pipe_ends_it_as_a_signal_would() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    words = [sys.executable, "-m", "caisson.commands.main", "help"]
    done = subprocess.run(words, stdout=writing, stderr=subprocess.PIPE, timeout=60)
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, b"")


def test_ctrl_c_while_it_starts_is_no_traceback() -> None:
    script = """
import os, signal, sys

class Interrupt:
    def find_spec(self, name, path=None, target=None):
        if name == "caisson.commands.parse":
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Interrupt())
from caisson.commands import entry
sys.exit(entry.main())
"""
    done = subprocess.run([sys.executable, "-c", script, "--version"], capture_output=True)
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, b"", b"")


@pytest.mark.parametrize("word", ["help", "--version"], ids=["more than a buffer", "less than a buffer"])
def test_a_full_disk_is_one_line(word: str) -> None:
    with Path("/dev/full").open("wb") as full:
        words = [sys.executable, "-m", "caisson.commands.main", word]
        done = subprocess.run(words, stdout=full, stderr=subprocess.PIPE, timeout=60)
    assert done.returncode == 1
    assert done.stderr == b"caisson: output: No space left on device; make room for it, or write it elsewhere\n"


def test_a_limited_file_size_is_one_line(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "caisson.commands.main", "help"]
    with (tmp_path / "out").open("wb") as limited:
        done = subprocess.run(["prlimit", "--fsize=0", *words], stdout=limited, stderr=subprocess.PIPE, timeout=60)
    assert done.returncode == 1
    assert done.stderr == b"caisson: output: File too large; make room for it, or write it elsewhere\n"


def test_a_locale_without_utf_8_is_enough() -> None:
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"}
    done = caisson("exec", environment=ascii_only)
    assert done.returncode == 125 and done.stderr.endswith(b"COMMAND [ARG?]\n")


def test_words_that_are_not_utf_8_come_back_as_they_were() -> None:
    done = caisson(b"stop-vm", b"--n\xff")
    assert done.returncode == 2 and b"Traceback" not in done.stderr and done.stderr.count(b"\n") == 1


def wrong_lines(seed: int) -> Iterator[tuple[Command, list[str]]]:
    """Yield every command with every option, in every kind of mistake."""
    chance = random.Random(seed)
    for command in EVERY:
        yield command, ["--no-such-option"]
        yield command, ["--" + chance.choice(["\udcff", "x" * 300, "a b", "\n", "é"])]
        yield command, ["-?"]
        if not command.program and not any(place.repeat for place in command.positionals):
            yield command, ["word"] * (len(command.positionals) + 1)
        for option in command.options:
            name = f"--{option.name}"
            letter = chance.randrange(3, len(name))
            yield command, [name[:letter] + chance.choice("qzj") + name[letter:]]
            if option.kind is None:
                yield command, [f"{name}=x"]
            else:
                yield command, [name]
                yield command, [name, "--help"]
                yield from ((command, [name, word]) for word in wrong_values(option))


def wrong_values(option: Option) -> Iterator[str]:
    """Return words that are not values of this option."""
    assert option.kind is not None
    for word in ("", "abc", "\udce9", "-1", "1e9", "9" * 30, "nan", "inf", "0x10", "١", "1 2", "\0"[:0] + "\x1b[31m"):
        try:
            option.kind.read(word)
        except ValueError:
            yield word


def test_every_wrong_line_ends_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    seed = int(os.environ.get("CAISSON_SEED", "1"))
    count = 0
    for command, words in wrong_lines(seed):
        status = CommandLine(GROUPS).run([command.name, *words])
        shown = capsys.readouterr()
        assert status == command.usage_status, (command.name, words)
        assert shown.out == "" and shown.err.count("\n") == 1, (command.name, words)
        assert shown.err.startswith(f"caisson: {command.name}: ") and ";" in shown.err, shown.err
        assert shown.err[:-1].isprintable(), shown.err
        count += 1
    assert count > 300


@pytest.mark.parametrize("closed", ["<&-", ">&-", "<&- >&-"])
def test_wrong_lines_with_closed_streams(closed: str) -> None:
    """A few of the same, as processes: words pass through argv, and closed streams do not change the result."""
    seed = int(os.environ.get("CAISSON_SEED", "1"))
    for command, words in random.Random(seed).sample(list(wrong_lines(seed)), 4):
        line = [sys.executable, "-m", "caisson.commands.main", command.name, *words]
        argv = ["sh", "-c", f'exec "$@" {closed}', "sh", *line]
        done = subprocess.run([os.fsencode(word) for word in argv], capture_output=True, timeout=60)
        assert (done.returncode, done.stdout) == (command.usage_status, b""), (words, done.stderr)
        assert done.stderr.startswith(b"caisson: ") and done.stderr.count(b"\n") == 1, (words, done.stderr)


def test_main_runs_the_words_it_is_given(capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line.main(["--version"]) == 0
    assert capsys.readouterr().out == f"caisson {VERSION}\n"


@pytest.mark.parametrize(
    ("words", "status"),
    [
        ("boot-vm --publish 8080", 2),
        ("boot-vm --memory 9999999", 2),
        ("boot-vm --share src", 2),
        ("boot-vm --share 9x=/tmp", 2),
        ("boot-vm --network user --snapshot none", 2),
        ("boot-vm --timeline /proc/nosuch/x.svg", 2),
        ("boot-vm --timeline boot.png", 2),
        ("stop-vm a/b", 2),
        ("save-snapshot a/b", 2),
        ("forward 80", 2),
        ("cp a b", 2),
        ("kill x --signal NO", 2),
        ("build-image --treemap x.png", 2),
        ("build-image --treemap /proc/nosuch/x.svg", 2),
        ("run --container a/b none", 125),
        ("run --publish 8080 none", 125),
        ("run --volume x none", 125),
        ("exec --guest --container x true", 125),
        ("exec --user 4294967296 true", 125),
        ("stop-vm nosuch", 1),
        ("ps --name nosuch", 1),
    ],
)
def test_statuses_tell_a_wrong_command_line_from_what_went_wrong(
    words: str, status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Before anything is built, booted or fetched."""
    monkeypatch.setenv("CAISSON_RUN", str(tmp_path / "run"))
    monkeypatch.setenv("CAISSON_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("caisson.commands.run.require", lambda *_: None)
    assert command_line.main(words.split()) == status
    output, errors = capfd.readouterr()
    assert output == "" and errors.startswith("caisson: ") and errors.count("\n") == 1, errors
    assert not list(tmp_path.glob("cache/[!e]*"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_cp_cleans_up_when_it_is_to_end(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    cleaned_up = []

    def copying(*_: object) -> list[str]:
        try:
            os.kill(os.getpid(), number)
            time.sleep(10)
        finally:
            cleaned_up.append(True)
        return []

    monkeypatch.setattr(execute, "running_vm", lambda *_, **__: contextlib.nullcontext())
    monkeypatch.setattr(copy, "copy", copying)
    before = signal.signal(number, signal.SIG_DFL)
    try:
        with pytest.raises(SystemExit) as end:
            execute.cp(source="file", target="box:/there", name="default")
        assert signal.getsignal(number) is signal.SIG_DFL
    finally:
        signal.signal(number, before)
    assert (end.value.code, cleaned_up) == (128 + number, [True])
