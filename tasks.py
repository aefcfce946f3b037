"""Run Caisson's command line in a checkout: set up the environment, then do what the installed `caisson` does.

    python3 tasks.py exec -- uname -a      # needs only Python and apt: builds, boots and runs
    python3 tasks.py test                  # runs all tests
    python3 tasks.py                       # lists all commands; `invoke …` in .venv/bin is the same

The commands are in commands/; those for developers only, test and bench, are in tests/.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent
ENVIRONMENT = ROOT / ".venv"

#: The directories that are packages of `caisson`.
PACKAGES = ("agent", "commands", "image", "proto")

#: Commands that build or boot a guest: their requirements are installed first.
NEED_GUESTS = ("exec", "run", "boot-vm", "build-image")


def enter_environment() -> None:
    """Re-execute inside .venv; create it first if it is missing, or older than pyproject.toml or its Python.

    Standard library only: this runs on a machine with nothing but Python and apt.
    """
    if sys.version_info < (3, 11):  # noqa: UP036
        sys.exit(f"caisson: Python {sys.version.split()[0]}: is too old; install Python 3.11 or newer")
    import fcntl

    python = ENVIRONMENT / "bin" / "python"
    if not _is_current(python):
        with (ROOT / "pyproject.toml").open() as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # two first runs at once
            if not _is_current(python):
                _set_up(python)
    if Path(sys.prefix).resolve() != ENVIRONMENT.resolve():
        os.execv(python, [str(python), str(ROOT / "tasks.py"), *sys.argv[1:]])


def _set_up(python: Path) -> None:
    try:
        _make_environment(python)
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as error:
        sys.exit(f"caisson: {error.filename}: {error.strerror}; a checkout has to be in a directory of your own")


def _is_current(python: Path) -> bool:
    """Return whether .venv was made from these requirements by a Python that still exists."""
    try:
        return (ENVIRONMENT / "made-of").read_text() == _made_of(python.resolve(strict=True))
    except OSError:
        return False


def _made_of(interpreter: Path) -> str:
    texts = [(ROOT / name).read_text() for name in ("pyproject.toml", "constraints.txt")]
    return "\n".join([str(interpreter), repr(PACKAGES), *texts])


def _make_environment(python: Path) -> None:
    import importlib.util
    import subprocess
    import tomllib

    _link_packages()
    sys.path.insert(0, str(ENVIRONMENT / "src"))
    from caisson.image import programs

    packages = programs.packages_of_missing(_needed_programs())
    if importlib.util.find_spec("ensurepip") is None:
        packages.append("python3-venv")
    try:
        programs.require_packages(packages, _info)
    except programs.MissingPrograms as error:
        sys.exit(f"caisson: {error}")
    _info("setting up .venv")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wanted = [*project["project"]["dependencies"], *project["project"]["optional-dependencies"]["checkout"]]
    # Not pathlib's exists(): an interpreter in another user's home raises PermissionError, and is unusable anyway.
    there = os.path.exists(python)  # noqa: PTH110
    whole = there and any((place / "pip").is_dir() for place in _package_directories(python))
    venv = [sys._base_executable, "-m", "venv", "--clear", str(ENVIRONMENT)]  # type: ignore[attr-defined]
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-c", "constraints.txt"]
    # A user's pip settings do not apply here: `--user` alone makes pip refuse to work in a virtual environment.
    variables = {name: value for name, value in os.environ.items() if name not in ("PIP_TARGET", "PIP_PREFIX")}
    for command in ([*pip, *wanted],) if whole else (venv, [*pip, *wanted]):
        done = subprocess.run(command, cwd=ROOT, env=variables | {"PIP_USER": "0"}, stdout=sys.stderr)
        if done.returncode != 0:
            sys.exit(f"caisson: {ENVIRONMENT}: could not be set up (the reason is above); try again: python3 tasks.py")
    _link_packages()
    for place in _package_directories(python):
        (place / "caisson.pth").write_text(f"{ENVIRONMENT / 'src'}\n")
    _write_launcher(python)
    subprocess.run([str(python), "-m", "compileall", "-q", *PACKAGES], cwd=ROOT, stdout=sys.stderr)
    (ENVIRONMENT / "made-of").write_text(_made_of(python.resolve(strict=True)))


def _needed_programs() -> tuple[str, ...]:
    """Return the programs the command will need, so that all missing ones are reported at once."""
    from caisson.image import programs

    if sys.argv[1:2] == ["test"] and "--quick" not in sys.argv:
        from tests.commands import TO_TEST

        return TO_TEST
    guests = len(sys.argv) > 1 and sys.argv[1] in NEED_GUESTS
    return (*programs.TO_BUILD, programs.DEBIAN_KEYRING, *programs.TO_BOOT) if guests else ()


def _package_directories(python: Path) -> list[Path]:
    """Return the site-packages directories of .venv's interpreter: an upgraded Python has a different one."""
    name = python.resolve().name
    return sorted(ENVIRONMENT.glob(f"lib/{name if name.startswith('python3.') else 'python3.*'}/site-packages"))


def _link_packages() -> None:
    """Let the environment import this checkout as `caisson`: links to its directories, in a directory on sys.path.

    Plain links, not the import hook of an editable install: it costs no start time, and type checkers follow it.
    """
    namespace = ENVIRONMENT / "src" / "caisson"
    namespace.mkdir(parents=True, exist_ok=True)
    for name in PACKAGES:
        link = namespace / name
        if not link.is_symlink():
            link.symlink_to(Path("../../..") / name)


def _write_launcher(python: Path) -> None:
    """Write .venv/bin/caisson, as an installation would."""
    import shlex

    launcher = ENVIRONMENT / "bin" / "caisson"
    launcher.write_text(f'#!/bin/sh\nexec {shlex.quote(str(python))} {shlex.quote(str(ROOT / "tasks.py"))} "$@"\n')
    launcher.chmod(0o755)


def _info(line: str) -> None:
    print(f"caisson: {line}", file=sys.stderr, flush=True)


def run() -> int:
    """Run the command line, with the commands for developers in addition."""
    from caisson.proto import generate

    generate.ensure()
    from caisson.commands.entry import main

    return main("tests.catalogue")


# `invoke …` loads this file: run the same command line, not Invoke's own.
if __name__ == "__main__" or Path(sys.argv[0]).name in ("invoke", "inv"):
    sys.path.insert(0, str(ROOT))
    enter_environment()
    sys.exit(run())
