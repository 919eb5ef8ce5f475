"""The error of all checkpoints."""

from input_pipeline.errors import RequestError


class CheckpointError(RequestError):
    """A checkpoint cannot be written or read, or its files have changed since they were written."""
