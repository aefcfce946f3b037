"""cgroup v1."""
