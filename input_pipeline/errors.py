"""The exceptions of every command: wrong requests, failed runs and signals.

`exits.exit_code` turns each into one sentence and an exit code; any other exception is a defect and keeps its
traceback.
"""


class RequestError(ValueError):
    """The request cannot be carried out; the message names the value and the remedy."""


class RunFailed(RuntimeError):
    """The request was right, but the run cannot go on; the message says why."""


class Stopped(BaseException):
    """A signal ended the run; the message says what is saved. Like KeyboardInterrupt, it should not be handled."""

    def __init__(self, number: int, message: str):
        super().__init__(message)
        self.number = number
