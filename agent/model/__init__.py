"""Sandbox, containers and processes: asyncio supervision over libcontainer."""
