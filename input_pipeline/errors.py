"""The exceptions that every command knows: wrong requests and failed runs, told from defects.

`exits.exit_code` turns each into one sentence and an exit code; anything else is a defect and keeps its traceback.
"""


class RequestError(ValueError):
    """What was asked for cannot be done; the message names the value and the remedy."""


class RunFailed(RuntimeError):
    """The request was right, but the run cannot go on; the message says why."""


class Stopped(BaseException):
    """A signal ended the run; the message says what is saved. Like KeyboardInterrupt, it is not for recovery."""

    def __init__(self, number: int, message: str):
        super().__init__(message)
        self.number = number
