"""Test rules of port forwarding, as written on a command line."""

from __future__ import annotations

import pytest

from caisson.agent.client import UsageError
from caisson.agent.client.forward import ForwardRule


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("8080:80", ForwardRule("127.0.0.1", 8080, "tcp", 80)),
        ("0:tcp:80", ForwardRule("127.0.0.1", 0, "tcp", 80)),
        ("8080:vsock:4294967294", ForwardRule("127.0.0.1", 8080, "vsock", 4294967294)),
        ("0.0.0.0:8080:80", ForwardRule("0.0.0.0", 8080, "tcp", 80)),
        ("[::1]:8080:vsock:5000", ForwardRule("::1", 8080, "vsock", 5000)),
    ],
)
def test_rules(text: str, rule: ForwardRule) -> None:
    assert ForwardRule.parse(text) == rule


@pytest.mark.parametrize(
    "text", ["", "80", ":80", "80:", "x:80", "1:udp:2", "1:2:3:4", "65536:1", "1:65536", "1:vsock:4294967295", "-1:2"]
)
def test_forward_rejects_malformed_rules(text: str) -> None:
    with pytest.raises(UsageError):
        ForwardRule.parse(text)
