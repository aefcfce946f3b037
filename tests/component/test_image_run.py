"""Test the single wrapper for running programs: input, output, and error messages."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from caisson.image.run import CommandFailed, MissingProgram, run
from tests.component.fake_qemu import lives
from tests.support.poll import wait_until

ROOT = Path(__file__).resolve().parents[2]


def test_run_returns_standard_output(tmp_path: Path) -> None:
    assert run(["cat"], stdin=b"a\0b") == b"a\0b"
    assert run(["pwd", "-P"], cwd=tmp_path) == f"{tmp_path.resolve()}\n".encode()
    assert run(["cat"]) == b""


def test_a_missing_program_names_its_package() -> None:
    with pytest.raises(MissingProgram, match="musl-gcc: is not installed; run: sudo apt-get install musl-tools"):
        run(["musl-gcc", "-v"], env={"PATH": "/nowhere"})
    with pytest.raises(MissingProgram, match="lz4: is not installed; run: sudo apt-get install lz4"):
        run(["lz4"], env={"PATH": "/nowhere"})


def test_a_missing_file_is_not_a_missing_program(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        run(["true"], cwd=tmp_path / "none")


def test_a_failure_shows_command_status_and_last_words() -> None:
    program = "import sys; [print(n, file=sys.stderr) for n in range(100)]; sys.exit(3)"
    with pytest.raises(CommandFailed) as caught:
        run([sys.executable, "-c", program])
    text = str(caught.value)
    assert "exited with status 3" in text
    assert text.endswith("\n98\n99")
    assert "\n80\n" not in text
    assert caught.value.status == 3


def test_the_environment_is_a_small_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PYTHONPATH", "LANG", "SECRET", "https_proxy", "HTTPS_PROXY", "PIP_INDEX_URL", "SSL_CERT_FILE"):
        monkeypatch.setenv(name, "/x")
    lines = run(["env"], env={"EXTRA": "1"}).decode().splitlines()
    names = {line.partition("=")[0] for line in lines}
    assert {"https_proxy", "HTTPS_PROXY", "PIP_INDEX_URL", "SSL_CERT_FILE", "PATH", "EXTRA", "LC_ALL"} <= names
    assert not names & {"PYTHONPATH", "LANG", "SECRET"}


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_nothing_outlives_who_runs_it(tmp_path: Path, how: signal.Signals) -> None:
    """As with make: a program whose children outlive it."""
    jobs = "sleep 1000 & sleep 1000 & echo $$ $! > new; mv new pids; wait"
    program = f"from caisson.image.run import run; run(['sh', '-c', {jobs!r}], cwd={str(tmp_path)!r})"
    with subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stderr=subprocess.DEVNULL) as runner:
        wait_until((tmp_path / "pids").exists)
        pids = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
        assert all(map(lives, pids))
        runner.send_signal(how)
    wait_until(lambda: not any(map(lives, pids)))


def test_a_program_that_a_signal_ends() -> None:
    with pytest.raises(CommandFailed) as caught:
        run(["sh", "-c", "kill -TERM $$"])
    assert caught.value.status == 128 + signal.SIGTERM
