"""Are all hosts about to compute the same run? Hosts that differ would wait for each other forever, or add up numbers
that do not belong together."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax

from bit_jax.config import Config, of_all_hosts
from bit_jax.scale import hosts
from input_pipeline.errors import RequestError

ROOT = Path(__file__).parent.parent.parent
PROGRAM = ("bit_jax/**/*.py", "input_pipeline/**/*.py")  # the program's files, relative to ROOT
MISSING = "missing"


def require_same_run(cfg: Config) -> None:
    """Compares the flags and the program of all hosts, if there are several; with --doctor, which compares more and
    shows it, only whether all have that flag. All hosts have to make this call.

    Raises:
        RequestError: they differ.
    """
    if not jax.distributed.is_initialized():
        return
    require("command", {"--doctor": cfg.scale.doctor})
    if not cfg.scale.doctor:
        require("flags", of_all_hosts(cfg) | {"jax": jax.__version__, "program": program()})


def require(what: str, own: dict[str, Any]) -> None:
    """Compares this host's facts, as JSON types, with those of the other hosts, which all have to make this call.

    Raises:
        RequestError: they differ.
    """
    refuse(differences([json.loads(text) for text in hosts.exchange(f"alike: {what}", json.dumps(own))]))


def refuse(differing: Sequence[str]) -> None:
    """Raises RequestError, on all hosts, if there are differences, which all hosts know."""
    if differing:
        sentence = f"the hosts differ: {'; '.join(differing)}; make them alike, and start all of them again"
        raise hosts.on_all_hosts(RequestError(sentence))


def differences(facts: Sequence[dict[str, Any]]) -> list[str]:
    """Returns a clause for every fact in which a host differs from the first; a host may lack some."""
    names = dict.fromkeys(name for host in facts for name in host)
    return [
        f"{name} is {host.get(name, MISSING)} on host {number}, {facts[0].get(name, MISSING)} on host 0"
        for number, host in enumerate(facts)
        for name in names
        if host.get(name, MISSING) != facts[0].get(name, MISSING)
    ]


def program() -> str:
    """Returns the digest of the program's files."""
    return digest(path.read_bytes() for pattern in PROGRAM for path in sorted(ROOT.glob(pattern)))


def digest(parts: Iterable[bytes]) -> str:
    """Returns the first 64 bits of SHA-256, which tell files apart that nobody forges."""
    hashed = hashlib.sha256()
    for part in parts:
        hashed.update(part)
    return hashed.hexdigest()[:16]
