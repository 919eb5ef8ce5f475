"""What a fault is, and all of them by their names."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from input_pipeline.errors import RequestError


@dataclasses.dataclass(frozen=True)
class Fault:
    """One fault, and where it must be found.

    Attributes:
        patch: function () -> context manager that applies the fault in a side's process.
        description: description for people.
        rung: first rung that must fail.
        line: beginning of the name of the first line that differs in that rung.
        precision: precision in which that line differs.
        framework: framework of the side that has the fault.
        attested: entry of the attestation in which the sides must differ, or empty if they need not.
        operation: operation that must be named, and what of it is wrong, or empty if the fault is not one operation's.
        candidate: the candidate side when it is looked for.
        additions: fields of `Additions` with which both sides compute when it is looked for.
    """

    patch: Callable[[], contextlib.AbstractContextManager[Any]]
    description: str
    rung: str
    line: str
    precision: str = "fp64"
    framework: str = "jax"
    attested: str = ""
    operation: str = ""
    candidate: str = "jax"
    additions: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def name(self) -> str:
        """Name of the fault, as `selftest --faults` takes it."""
        return self.patch.__name__.replace("_", "-")


FAULTS: dict[str, Fault] = {}


def fault(description: str, rung: str, line: str, **attributes: Any) -> Callable:
    """Decorates a function that becomes the `patch` of a fault in `FAULTS`; the arguments are attributes of `Fault`."""

    def enter(patch: Callable) -> Callable:
        entry = Fault(patch, description, rung, line, **attributes)
        FAULTS[entry.name] = entry
        return patch

    return enter


def of(framework: str) -> list[str]:
    """Returns the names of the faults of a framework's side."""
    return [name for name, fault in FAULTS.items() if fault.framework == framework]


@contextlib.contextmanager
def injected(name: str | None) -> Iterator[None]:
    """Has the fault of that name while the `with` block runs; None: no fault.

    Raises:
        RequestError: there is no fault of that name.
    """
    if name is None:
        yield
        return
    if name not in FAULTS:
        raise RequestError(f"unknown fault {name!r}; there are {', '.join(FAULTS)}")
    with FAULTS[name].patch():
        yield
