"""Test the journeys drawn in docs/architecture.md: their files exist, and an exec passes through at most twenty."""

from __future__ import annotations

import re

import pytest

from tests.support.source import ROOT

#: Maximum number of files that a process passes through, from command line to execve.
MAX_FILES = 20

TEXT = (ROOT / "docs/architecture.md").read_text()


def journeys() -> dict[str, list[str]]:
    """Return each journey's files in order, by the first words of its title."""
    titles = re.split(r"^\*\*([^:*]+):[^*]*\*\*", TEXT.partition("## Five journeys")[2], flags=re.MULTILINE)[1:]
    return {
        title: re.findall(r"^    (\S+/\S+\.(?:py|c|h))", body, flags=re.MULTILINE)
        for title, body in zip(titles[::2], titles[1::2], strict=True)
    }


@pytest.mark.parametrize("journey", journeys())
def test_files_of_a_journey_are_there(journey: str) -> None:
    files = journeys()[journey]
    assert len(files) > 5
    assert [file for file in files if not (ROOT / file).is_file()] == []
    assert len(set(files)) == len(files)


def test_there_are_five_and_an_exec_is_short() -> None:
    found = journeys()
    assert len(found) == 5
    assert len(found["An exec"]) <= MAX_FILES
