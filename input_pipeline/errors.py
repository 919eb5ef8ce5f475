"""The exceptions of every command: wrong requests, failed runs and signals.

`exits.exit_code` turns each into one sentence and an exit code; any other exception is a defect and keeps its
traceback.
"""


class _Ending:
    """An exception that ends a command.

    Attributes:
        on_all_hosts: whether every host of the run raises this too. `hosts.joined` then waits for all of them; it takes
            any other exception for this host's failure and ends the others.
    """

    on_all_hosts = False


class RequestError(ValueError, _Ending):
    """The request cannot be carried out; the message names the value and the remedy."""


class RunFailed(RuntimeError, _Ending):
    """The request was right, but the run cannot go on; the message says why."""


class Stopped(BaseException, _Ending):
    """A signal ended the run; the message says what is saved. Like KeyboardInterrupt, it should not be handled."""

    def __init__(self, number: int, message: str):
        super().__init__(message)
        self.number = number
