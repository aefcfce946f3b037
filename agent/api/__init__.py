"""Adapters from the wire to the model: check a request, call the model, and map its errors to a gRPC status."""
