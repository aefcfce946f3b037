"""Errors of the host's side that the caller can fix."""

from __future__ import annotations


class UsageError(Exception):
    """Report a request that cannot be served, in one line: object, problem, remedy."""
