"""Test the OCI command line without containers: options, JSON, log lines, sizes, durations, signals."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from caisson.agent.base.json import JsonError, dumps, loads
from caisson.agent.runtime.errors import CommandError
from caisson.agent.runtime.events import duration
from caisson.agent.runtime.inspect import table
from caisson.agent.runtime.lifecycle import signal_number
from caisson.agent.runtime.limits import size
from caisson.agent.runtime.log import quote
from caisson.agent.runtime.options import OptionError, parse
from caisson.agent.runtime.verbs import VERBS

PACKAGES = Path(__file__).resolve().parents[2] / ".venv" / "src"


def test_options_and_operands_may_be_mixed() -> None:
    values, operands = parse(VERBS["delete"].options, ["box", "-f"], stop_at_operand=False)
    assert values.flag("force") and operands == ["box"]


def test_options_end_at_the_first_operand_of_exec() -> None:
    words = ["-t", "--env=A=b", "-e", "C=d", "box", "ls", "-la", "--", "x"]
    values, operands = parse(VERBS["exec"].options, words, stop_at_operand=True)
    assert values.flag("tty") and values.texts("env") == ["A=b", "C=d"]
    assert operands == ["box", "ls", "-la", "--", "x"]


def test_values_may_look_like_options() -> None:
    values, _ = parse(VERBS["update"].options, ["--memory", "-1", "box"], stop_at_operand=False)
    assert values.text("memory") == "-1"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--nope"], "flag provided but not defined: -nope"),
        (["--preserve-fds", "x", "box"], 'invalid value "x" for flag -preserve-fds: parse error'),
        (["--detach=maybe", "box"], 'invalid boolean value "maybe" for -detach: parse error'),
        (["-d=maybe", "box"], 'invalid boolean value "maybe" for -d: parse error'),
        (["--preserve-fds", " 1", "box"], 'invalid value " 1" for flag -preserve-fds: parse error'),
        (
            ["--preserve-fds", f"{1 << 63}", "box"],
            f'invalid value "{1 << 63}" for flag -preserve-fds: value out of range',
        ),
        (["--bundle"], "flag needs an argument: -bundle"),
        (["-b"], "flag needs an argument: -b"),
        (["---detach"], "bad flag syntax: ---detach"),
        (["--=x"], "bad flag syntax: --=x"),
    ],
)
def test_options_that_are_refused(words: list[str], message: str) -> None:
    with pytest.raises(OptionError) as caught:
        parse(VERBS["run"].options, words, stop_at_operand=False)
    assert str(caught.value) == message


@pytest.mark.parametrize(("text", "why"), [("x", "invalid syntax"), ("0x10", "invalid syntax"), ("", "invalid syntax"),
                                           (f"{1 << 63}", "value out of range")])  # fmt: skip
def test_groups_that_are_no_numbers_are_no_command_line(text: str, why: str) -> None:
    with pytest.raises(OptionError) as caught:
        parse(VERBS["exec"].options, ["-g", "5", "-g", text, "box", "id"], stop_at_operand=True)
    assert str(caught.value) == f'invalid value "{text}" for flag -g: strconv.ParseInt: parsing "{text}": {why}'


@pytest.mark.parametrize("value", [{}, [], {"a": [1, 2.5, {"x": 'é\n"<'}, [], {}], "b": None, "c": True}, "x", 0])
@pytest.mark.parametrize("indent", [0, 2])
def test_json_is_what_the_standard_library_reads_and_writes(value: object, indent: int) -> None:
    assert json.loads(dumps(value, indent)) == value == loads(f" {dumps(value, indent)}\n")


@pytest.mark.parametrize("text", ["", "{", "[1,]", "NaN", "{}x", '"\x01"', "[" * 100_000, '{"a":1,}'])
def test_what_is_not_json_is_refused(text: str) -> None:
    with pytest.raises(JsonError):
        loads(text)


def test_log_values_are_quoted_where_they_are_not_one_word() -> None:
    assert quote("plain-word") == "plain-word"
    assert quote('say "x"\n') == '"say \\"x\\"\\n"'
    assert quote("\x1b[2J") == '"\\x1b[2J"'


@pytest.mark.parametrize(
    ("text", "number"), [("-1", -1), ("32M", 32 << 20), ("1g", 1 << 30), ("4096", 4096), ("1kb", 1024)]
)
def test_sizes(text: str, number: int) -> None:
    assert size("memory", text) == number


@pytest.mark.parametrize(("text", "seconds"), [("5s", 5), ("100ms", 0.1), ("1m30s", 90), ("0s", 0)])
def test_durations(text: str, seconds: float) -> None:
    assert duration(text) == pytest.approx(seconds)


@pytest.mark.parametrize(("text", "number"), [("9", 9), ("KILL", 9), ("sigterm", 15), ("0", 0), ("RTMIN+1", 35)])
def test_signals(text: str, number: int) -> None:
    assert signal_number(text) == number


@pytest.mark.parametrize("text", ["XX", "-9", "65", "SIG", "RTMIN+99"])
def test_signals_that_are_unknown(text: str) -> None:
    with pytest.raises(CommandError, match="unknown signal"):
        signal_number(text)


def test_tables_are_padded_as_runc_pads_them() -> None:
    assert table([["ID", "PID"], ["box", "7"]]) == "ID          PID\nbox         7\n"


def test_commands_that_look_import_little(tmp_path: Path) -> None:
    """Imports too slow for a command: an event loop, regular expressions, enums, the parser's own."""
    argv = ["--root", str(tmp_path), "list", "-q"]
    script = (
        f"import sys; sys.path.insert(0, {str(PACKAGES)!r}); sys.argv = ['x', *{argv!r}]\n"
        "from caisson.agent.runtime.main import main; main()\n"
        "heavy = {'asyncio', 're', 'enum', 'json', 'pathlib', 'ctypes', 'argparse', 'contextlib'}\n"
        "sys.exit(' '.join(heavy & sys.modules.keys()) or 0)"
    )
    done = subprocess.run([sys.executable, "-I", "-S", "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
