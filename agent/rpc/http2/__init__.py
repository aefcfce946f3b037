"""HTTP/2 (RFC 9113) for a server, on asyncio: as much of it as gRPC needs, and what a peer may send besides."""
