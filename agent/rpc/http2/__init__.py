"""HTTP/2 (RFC 9113) for a server, on asyncio: as much of it as gRPC needs, and whatever else a peer may send."""
