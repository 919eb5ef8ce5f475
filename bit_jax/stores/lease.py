"""Claims in a store: as `input_pipeline.claims`, with numbered objects in place of a file.

The object with the highest number is the claim that holds. A claim is made by creating the next number, which only one
process can do; so an owner that was taken for dead sees that its number is no longer the highest, and gives up.
"""

import contextlib
import secrets
from collections.abc import Callable, Iterator
from typing import Any

from bit_jax.stores.store import Store, StoreError
from input_pipeline import claims

FOLDER = ".owner"


@contextlib.contextmanager
def leased(
    store: Store,
    remedy: str,
    *,
    lost: Callable[[str], None] | None = None,
    patience: float = claims.PATIENCE,
) -> Iterator[None]:
    """Holds the claim on all objects of the store while the `with` block runs, and removes it afterwards.

    Args:
        remedy, lost, patience: see `claims.claimed`.

    Raises:
        InUse: another process, which is alive, owns the claim.
        StoreError: the store does not answer.
    """
    token = secrets.token_hex(8)
    number = _acquire(store, token, remedy, patience)
    try:
        with claims.kept(
            token,
            lambda: _holding(store)[1],
            lambda beat: store.write(_key(number), claims.text_of(token, beat)),
            store.name,
            lost,
        ):
            yield
    finally:
        with contextlib.suppress(StoreError):  # a claim that stays is that of a process which has ended
            store.remove(_key(n) for n in _numbers(store) if n <= number)


def _acquire(store: Store, token: str, remedy: str, patience: float) -> int:
    """Makes this process's claim and returns its number."""
    while True:
        number, owner = _holding(store)
        if owner is not None and claims.is_alive(owner, lambda: _holding(store)[1], store.name, patience):
            raise claims.in_use(owner, store.name, remedy)
        if store.create(_key(number + 1), claims.text_of(token, 0)):
            return number + 1


def _holding(store: Store) -> tuple[int, dict[str, Any] | None]:
    """Returns the number of the claim that holds, 0 if there is none, and its content."""
    number = max(_numbers(store), default=0)
    text = store.read(_key(number)) if number else None
    return (number, claims.content_of(text)) if text is not None else (number, None)


def _numbers(store: Store) -> list[int]:
    names = [key.removeprefix(f"{FOLDER}/").removesuffix(".json") for key in store.sizes(FOLDER)]
    return [int(name) for name in names if name.isdecimal()]


def _key(number: int) -> str:
    return f"{FOLDER}/{number:08d}.json"
