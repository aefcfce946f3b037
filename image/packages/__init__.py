"""Packages of distributions and of PyPI: resolved, fetched, verified, unpacked."""
