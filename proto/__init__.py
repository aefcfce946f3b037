"""The wire: the one thing that the image's half and the agent's half share.

The ``.proto`` files are the source; ``python -m proto.generate`` makes ``*_pb2.py`` beside them, never committed.
"""
