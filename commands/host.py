"""Commands for this machine and this command line."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from caisson.commands.completion import SCRIPTS
from caisson.commands.parse import CommandLineError
from caisson.commands.streams import info


def doctor(*, as_json: bool) -> int:
    """Show what this machine supports; return 1 if guests cannot be built and booted on it."""
    from caisson.commands import doctor as examination

    findings = examination.examine()
    if as_json:
        print(json.dumps(examination.documents(findings), indent=2))
    else:
        print("\n".join(examination.lines(findings)))
    return int(any(finding.status == "missing" for finding in findings))


def report(*, output: str) -> None:
    """Write an archive for a bug report; prints its path."""
    from caisson.commands import report as archive

    try:
        names = archive.write(Path(output))
    except FileExistsError as error:
        text = f"{output}: already exists; remove it, or name another file: --output FILE"
        raise CommandLineError(text, 1) from error
    for name in names:
        info(f"packed {name}")
    info("review it before you send it")
    print(output)


def completion(*, shell: str) -> None:
    """Print a shell's completion."""
    sys.stdout.write(SCRIPTS[shell])
