"""Processes in containers: nsexec, its setup channel, hooks and seccomp programs."""
