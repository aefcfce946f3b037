"""cgroup v2."""
