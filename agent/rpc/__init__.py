"""Unary remote procedure calls on asyncio: gRPC over HTTP/2 and ttrpc, in front of one protocol-independent
dispatch.
"""
