"""Names the ways in which a file cannot be had, and the remedies that their messages end with."""

from input_pipeline.errors import RequestError

MIRROR = "see whether a mirror (BIT_JAX_MIRROR) has it"
NOTHING_KEPT = f"nothing of it was kept, {MIRROR}"


class FetchError(RequestError):
    """A published file could not be had; what has arrived of it, and can be trusted, is kept and resumed."""


class Dropped(Exception):
    """The server could not be reached, broke off or was in trouble: worth another attempt."""
