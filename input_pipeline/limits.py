"""How many files this process may hold open: raised as far as the system lets it, and compared with what is needed."""

import contextlib
import resource

from input_pipeline.errors import RequestError

RESERVED = 128  # for all that is no dataset: libraries, logs, checkpoints, connections to other hosts
UNLIMITED = 1 << 40


def raise_descriptor_limit() -> int:
    """Raises the soft limit on open files to the hard one, and returns the limit that holds then.

    Shells and schedulers often give 1,024, which a dataset of 1,024 shards alone uses up; the hard limit is what the
    system's administrator meant to allow.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(OSError, ValueError):  # some systems allow less than their hard limit says
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return UNLIMITED if soft == resource.RLIM_INFINITY else soft


def require_descriptors(needed: int, what: object) -> None:
    """Makes sure that a process may hold so many files open, besides those that it always needs.

    Args:
        needed: files that are to be open at the same time; see `examples.descriptors`.
        what: what holds them open, for the message.

    Raises:
        RequestError: even the hard limit is lower.
    """
    limit = raise_descriptor_limit()
    if needed and needed + RESERVED > limit:
        raise RequestError(
            f"reading {what} holds {needed:,} files open and other parts of the program up to {RESERVED}, but this "
            f"process may open {limit:,}; raise its hard limit, as by ulimit -n {needed + RESERVED} in a shell that "
            "may, or prepare the dataset in fewer shards"
        )
