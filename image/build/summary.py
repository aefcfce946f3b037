"""Summaries of what a build did, or would do."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import yaml

from caisson.image.build.builder import StepResult
from caisson.image.build.definition import Definition
from caisson.image.build.settings import describe_settings


def summary(steps: Sequence[StepResult]) -> Iterator[str]:
    """Format a table of the executed steps: seconds, whether from the cache, megabytes."""
    for done in steps:
        yield f"{done.step:8} {'cached' if done.cached else f'{done.seconds:5.1f} s':>8} {done.bytes / 1e6:8.1f} MB"


def planned(definition: Mapping[str, Any], steps: Iterable[StepResult]) -> str:
    """Format the resolved definition, and each step with its cache state."""
    verdicts = [f"{step.step:8} {'in the cache' if step.cached else 'to be made':12} {step.key}\n" for step in steps]
    return (
        yaml.safe_dump(dict(definition), sort_keys=False, allow_unicode=True, width=120) + "\n" + "".join(verdicts)[:-1]
    )


def describe() -> Iterator[str]:
    """Describe every setting of a definition, one per line."""
    for one in describe_settings(Definition):
        kind = "|".join(one.choices) or one.type
        default = "" if one.default in (None, "", (), False) else f" (default: {one.default})"
        yield f"{one.key:18} {kind:20} {one.help}{default}"
