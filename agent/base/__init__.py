"""Basics shared by the guest's and the host's side: system calls, records, logs, errors, limits, lazy imports."""
