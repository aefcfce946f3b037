"""docs/api.md speaks of every method."""

from __future__ import annotations

import re

from caisson.proto.kata1 import agent_pb2, health_pb2
from tests.conformance.test_any_request import APIS
from tests.native.agent_support import ROOT


def test_no_method_is_missing() -> None:
    rows = [line for line in (ROOT / "docs/api.md").read_text().splitlines() if line.startswith("| `")]
    named = [name for row in rows for name in re.findall(r"`(\w+)`", row.split(" | ")[0])]
    assert sorted(named) == sorted(method.name for _, method in APIS["http2"].methods)
    assert all(row.count("|") == 4 for row in rows)
    assert {agent_pb2.DESCRIPTOR.package, health_pb2.DESCRIPTOR.package} == {"grpc"}
