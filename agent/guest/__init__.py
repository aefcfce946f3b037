"""The guest machine around the containers."""
