"""The wire → the model: checks a request, calls the model, and turns what it refuses into a gRPC status."""
