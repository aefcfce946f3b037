"""The machine around the containers."""
