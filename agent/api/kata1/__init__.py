"""The agent API of Kata Containers 1.x (grpc.AgentService)."""
