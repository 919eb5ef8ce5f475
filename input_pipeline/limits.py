"""The limit on open files: raised as far as the system allows, and compared with the number that a run needs."""

import contextlib
import resource

from input_pipeline.errors import RequestError

RESERVED = 128  # files for everything but the dataset: libraries, logs, checkpoints, connections to other hosts
UNLIMITED = 1 << 40


def raise_descriptor_limit() -> int:
    """Raises the soft limit on open files to the hard one, and returns the new limit.

    Shells and schedulers often set 1,024, which a dataset of 1,024 shards alone uses up; the hard limit is what the
    system's administrator meant to allow.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(OSError, ValueError):  # some systems allow less than their hard limit says
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return UNLIMITED if soft == resource.RLIM_INFINITY else soft


def require_descriptors(needed: int, what: object) -> None:
    """Makes sure that this process may hold `needed` files open besides the `RESERVED` ones.

    Args:
        needed: number of files that are to be open at the same time; see `examples.descriptors`.
        what: the dataset that they belong to, for the message.

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
