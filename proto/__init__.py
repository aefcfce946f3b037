"""The wire: the one thing that the image's half and the agent's half share.

The ``.proto`` files are the source; ``python3 -m caisson.proto.generate`` makes ``*_pb2.py`` beside them;
these are never committed.
"""
