"""Errors of the host's side that the caller can fix."""

from __future__ import annotations


class ClientError(Exception):
    """Report what went wrong in one line: object, problem, remedy."""


class UsageError(ClientError):
    """Report a request that makes no sense."""


class CopyError(ClientError):
    """Report a file that cannot be copied."""
