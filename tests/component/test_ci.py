"""Test that CI's files are consistent: files, commands and variables named by workflows and docs/ci.md exist."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from caisson.commands.catalogue import COMMANDS
from tests.catalogue import GROUP
from tests.support.golang import Module

ROOT = Path(__file__).resolve().parents[2]
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def jobs() -> Iterator[tuple[str, dict[str, Any]]]:
    """Return all jobs of the workflows, and of the examples for GitHub."""
    page = (ROOT / "docs/ci.md").read_text()
    texts = [path.read_text() for path in WORKFLOWS] + re.findall(r"```yaml\n(jobs:.*?)```", page, re.DOTALL)
    assert len(texts) == len(WORKFLOWS) + 1
    for text in texts:
        yield from yaml.safe_load(text)["jobs"].items()


def sources() -> str:
    """Return all code that could read a variable."""
    return "".join(path.read_text() for name in ("image", "agent", "tests") for path in (ROOT / name).rglob("*.py"))


@pytest.mark.parametrize(("name", "job"), list(jobs()))
def test_a_job_names_what_is_there(name: str, job: dict[str, Any]) -> None:
    commands = [step["run"].replace("python3 tasks.py test --quick\n", "") for step in job["steps"] if "run" in step]
    (run,) = [command for command in commands if ".ci/run" in command or "tasks.py" in command]
    for file in re.findall(r"(?:caisson/)?((?:tests|\.ci|\.github)/[\w./-]+|tasks\.py)", " ".join(commands)):
        assert (ROOT / file).exists(), f"{name}: {file}"
    if "sudo" in run:  # which passes only the listed variables
        (passed,) = re.findall(r"--preserve-env=(\S+)", run)
        assert set(passed.split(",")) == {"CI", *job["env"]}, name
    for variable in job["env"]:
        assert f'"{variable}"' in sources(), f"{name}: nothing reads {variable}"


def test_scripts_can_be_run_and_are_shell() -> None:
    for script in (ROOT / ".ci/run", ROOT / ".github/enable-kvm"):
        assert os.access(script, os.X_OK)
        shell = "bash" if "bash" in script.read_text().partition("\n")[0] else "sh"
        subprocess.run([shell, "-n", script], check=True)


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_have_few_rights_and_pinned_actions(path: Path) -> None:
    """Read access, no credentials left in the checkout, actions pinned by commit, one run per branch."""
    workflow = yaml.safe_load(path.read_text())
    assert workflow["permissions"] == {"contents": "read"}
    assert workflow["concurrency"]["cancel-in-progress"] is True
    for job in workflow["jobs"].values():
        assert "permissions" not in job and job["timeout-minutes"] <= 300
        for step in job["steps"]:
            if "uses" in step:
                assert re.fullmatch(r"[\w/-]+@[0-9a-f]{40}", step["uses"]), step["uses"]
            if step.get("uses", "").startswith("actions/checkout@"):
                assert step["with"]["persist-credentials"] is False
    for line in re.findall(r"uses: .*", path.read_text()):
        assert re.search(r" # v\d+\.\d+\.\d+$", line), f"{line}: add a comment with the version"


@pytest.mark.nightly
@pytest.mark.timeout(900)
def test_actionlint_finds_nothing(tmp_path: Path) -> None:
    """Contexts where they are allowed, types of expressions, shell scripts, inputs of actions."""
    actionlint = Module(Path(__file__).with_name("go_actionlint"), tmp_path / "go")
    program = actionlint.build("github.com/rhysd/actionlint/cmd/actionlint", "actionlint")
    done = subprocess.run([program, "-color=false", *WORKFLOWS], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_gitlab_jobs_name_what_is_there() -> None:
    document = yaml.safe_load((ROOT / ".ci/gitlab.yml").read_text())
    base = document[".test"]
    assert base["script"] == ".ci/run" and base["interruptible"] is True
    for file in base["cache"]["key"]["files"]:
        assert (ROOT / file).is_file()
    jobs = {name: job for name, job in document.items() if name not in ("workflow", ".test")}
    assert set(jobs) == {"kvm", "emulated"}
    for job in jobs.values():
        assert job["extends"] == ".test" and job["tags"]
        for variable in job["variables"]:
            assert f'"{variable}"' in sources(), f"nothing reads {variable}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages_name_variables_that_are_asked_for(page: Path) -> None:
    known = sources()
    for variable in sorted(set(re.findall(r"\bCAISSON_[A-Z_]*[A-Z]\b", page.read_text()))):
        assert f'"{variable}"' in known, variable


def test_pages_name_commands_that_there_are() -> None:
    """Those in code: `caisson NAME`, or indented lines of them; with each one's options."""
    commands = COMMANDS | {command.name: command for command in GROUP.commands}
    for page in PAGES:
        found = re.findall(
            r"(?:[`|&$(] ?|^ +)(?:caisson|python3 tasks\.py) ([a-z][a-z-]*)([^\n`#|&;)]*)", page.read_text(), re.M
        )
        for name, rest in found:
            assert name in commands, f"{page.name}: {name}"
            there = {f"--{option.name}" for option in commands[name].parameters()} | {"--help"}
            for option in re.findall(r"--[a-z][a-z-]*", re.split(r" -- |\$\(", rest)[0]):
                assert option in there, f"{page.name}: {name} {option}"
