"""Containers inside the guest: an OCI configuration turned into a plan, and `nsexec`, which carries the plan out.

Modules are imported one by one by who needs them; importing the package costs nothing.
"""
