"""The agent: run containers in a guest, driven over gRPC (grpc.AgentService of Kata Containers 1.x) or ttrpc (3.x).

Under emulation, startup costs 10-20 times as much as natively, so modules here import little, and late.
"""
