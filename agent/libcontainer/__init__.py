"""Run containers: turn an OCI configuration into a plan, and `nsexec`, which carries the plan out.

Modules are imported one by one by who needs them; importing the package costs nothing.
"""
