"""HTTP/2 (RFC 9113) for a server, on asyncio: what gRPC needs, and safe handling of everything else that a peer may
send.
"""
