"""Test that docs/api.md describes every method."""

from __future__ import annotations

import re

from caisson.proto.caisson import caisson_pb2
from caisson.proto.kata1 import agent_pb2, health_pb2
from tests.conformance.test_any_request import APIS
from tests.native.agent_support import ROOT

PAGE = (ROOT / "docs/api.md").read_text()


def rows(text: str) -> list[str]:
    """Return the rows of a page's tables."""
    found = [line for line in text.splitlines() if line.startswith("| `")]
    assert all(row.count("|") == 4 for row in found)
    return found


def methods(text: str) -> list[str]:
    """Return the methods in the tables."""
    return [name for row in rows(text) for name in re.findall(r"`(\w+)`", row.split(" | ")[0])]


def test_no_method_is_missing() -> None:
    old, _, new = PAGE.partition("## Kata 3.x")
    names = {kind: {method.name for _, method in api.methods} for kind, api in APIS.items()}
    names["ttrpc"].add("DestroySandbox")  # which ends the agent, so is not called at random
    assert sorted(methods(old)) == sorted(names["http2"])
    assert len(methods(new)) == len(set(methods(new)))
    assert set(methods(new)) <= names["ttrpc"] <= set(methods(new)) | names["http2"]
    assert {agent_pb2.DESCRIPTOR.package, health_pb2.DESCRIPTOR.package} == {"grpc"}


def test_our_own_methods_are_named() -> None:
    named = set(re.findall(r"`(\w+)`", PAGE.partition("## Beside Kata's")[2]))
    service = caisson_pb2.DESCRIPTOR.services_by_name["Guest"]
    assert {method.name for method in service.methods} - {"GetBootTimes"} <= named
