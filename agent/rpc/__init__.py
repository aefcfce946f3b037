"""Unary remote procedure calls on asyncio: gRPC over HTTP/2 and ttrpc, before one dispatch that knows neither."""
