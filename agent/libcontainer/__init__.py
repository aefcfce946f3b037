"""Run containers: turn an OCI configuration into a plan, and `nsexec`, which executes it.

Importers import the modules they need; importing the package itself costs nothing.
"""
