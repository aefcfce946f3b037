"""What runs in a guest: containers, driven over gRPC (grpc.AgentService of Kata Containers 1.x).

Start-up is paid under emulation at 10-20 times its native price, so modules here import little, and late.
"""
