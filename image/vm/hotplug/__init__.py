"""Devices added to and removed from a running VM."""
