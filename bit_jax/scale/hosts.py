"""Several hosts that compute one run: they find each other at the start and notice when one of them dies.

Every host runs the same command and computes the same steps; only the first, host 0, writes and prints.
"""

import contextlib
import itertools
import os
import socket
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from bit_jax.config import ScaleConfig
from bit_jax.scale import coordinator, jax_internals
from bit_jax.scale.schedulers import ALL, Task
from bit_jax.scale.watch import Sign, Watch
from input_pipeline import exits
from input_pipeline.errors import RequestError, RunFailed, Stopped

Ending = TypeVar("Ending", RequestError, RunFailed, Stopped)

MOST_WORDS = 2**22  # uint32 numbers that are sent at a time, 16 MiB
_watch: list[Watch] = []  # of the hosts that this process has joined
_exchanges: defaultdict[str, Iterator[int]] = defaultdict(itertools.count)  # numbers of the exchanges, by their names
PROXIES = ("grpc_proxy", "https_proxy", "http_proxy")  # environment variables that gRPC reads


def is_first() -> bool:
    """Whether this host is the one that writes and prints."""
    return jax.process_index() == 0


def position() -> tuple[int, int]:
    """Returns the index of this host, and the number of hosts."""
    return jax.process_index(), jax.process_count()


def agree(number: int) -> int:
    """Returns host 0's `number` on every host."""
    return number if jax.process_count() == 1 else int(multihost_utils.broadcast_one_to_all(number))


def wait_for_all(what: str) -> None:
    """Returns once every host has made this call; no devices are needed for it, which may be what is wrong."""
    exchange(f"wait: {what}", "")


def exchange(what: str, text: str) -> list[str]:
    """Returns the texts of all hosts, in the order of their indices. They go through the coordinator, so the hosts may
    have different versions. All hosts have to make this call, equally often with the same `what`."""
    if jax.process_count() == 1:
        return [text]
    client, count = jax_internals.store(), next(_exchanges[what])
    client.key_value_set(f"bit_jax/{what}/{count}/{jax.process_index()}", text)
    forever = 10**9  # ms; if another host dies meanwhile, `Watch` ends this one
    every = range(jax.process_count())
    return [client.blocking_key_value_get(f"bit_jax/{what}/{count}/{host}", forever) for host in every]


def given_by(host: int, array: np.ndarray) -> np.ndarray:
    """Returns the array of that host on every host, bit for bit; the others give one of its shape and dtype."""
    if jax.process_count() == 1:
        return array
    octets = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    # JAX adds the hosts' arrays up, all but one of which are zeros; as floats, -0.0 would become 0.0
    words, source = np.pad(octets, (0, -octets.size % 4)).view(np.uint32), jax.process_index() == host
    parts = []
    for start in range(0, words.size, MOST_WORDS):
        part = words[start : start + MOST_WORDS]
        # a power of two, because JAX compiles a program for every size
        padded = np.pad(part, (0, (1 << (part.size - 1).bit_length()) - part.size))
        parts.append(np.asarray(multihost_utils.broadcast_one_to_all(padded, is_source=source))[: part.size])
    given = np.concatenate(parts) if parts else words
    return given.view(np.uint8)[: octets.size].view(array.dtype).reshape(array.shape)


def on_all_hosts(error: Ending) -> Ending:
    """Marks an exception that every host raises, because they agreed on its cause."""
    error.on_all_hosts = True
    return error


def observe(sign: Callable[[], Sign], lost: Callable[[str], object]) -> None:
    """Tells the other hosts where this one stands, and this one when another is lost.

    Args:
        sign: function that says where this host stands; a thread calls it every second.
        lost: function that is told, in a thread, the sentence with which another host's end ends this process.
    """
    for watch in _watch:
        watch.sign = sign
        watch.told_of_loss.append(lost)


def progress() -> tuple[int, ...]:
    """Returns numbers of which at least one changes whenever something goes on at another host, as far as is known
    here. It asks nobody, so that it returns whatever hangs."""
    return _watch[0].progress if _watch else ()


def place() -> str:
    """Returns `host I of N: `, to begin a message with; empty for one host. It asks nobody either."""
    return f"{_watch[0].place}: " if _watch else ""


@contextlib.contextmanager
def joined(scale: ScaleConfig) -> Iterator[None]:
    """Joins all hosts of the run in one JAX program while the `with` block runs. SLURM, Open MPI, Kubernetes or the
    flags say which these are; without any of them, the run has one host.

    If a host dies or is cut off, the others end with exit code 1 and a sentence that names it, after `--host-timeout`
    seconds; if a host fails with an error, they end with that error's sentence, a second or two after it. After the
    block, or an exception that `on_all_hosts` has marked, each waits until all have come so far: the first may still
    write what another says is written.

    Raises:
        RequestError: the flags do not say which hosts these are, or the coordinator cannot listen. Hosts that do not
            find each other in time end with exit code 1.
    """
    arguments = _arguments(scale)
    if arguments is None:
        yield
        return
    jax.config.update("jax_enable_preemption_service", False)  # it would handle SIGTERM in place of `exits`
    missing = (
        f"the hosts did not find each other in {scale.start_timeout} s; start all of them with the same --coordinator "
        "and --hosts and each with its own --host, and see that the coordinator's port is reachable from each"
    )
    # exit code 1, because a host has died or froze more often than a flag is wrong
    with within(scale.start_timeout, missing, 1), exits.ended_by_first_signal("ended by a signal before the run began"):
        try:
            _initialize(
                **arguments,
                initialization_timeout=10 * scale.start_timeout,  # JAX's own, which aborts without a sentence
                heartbeat_timeout_seconds=10 * scale.host_timeout,  # JAX's own, which aborts without a sentence
                shutdown_timeout_seconds=scale.host_timeout,
            )
        except RequestError:
            raise
        except Exception as error:  # JAX raises several kinds
            raise RequestError(f"the hosts cannot be joined: {_sentence(error)}") from None
    watch = Watch(scale.host_timeout)
    _watch[:] = [watch]
    exits.end_abruptly()  # an orderly end would wait for hosts that are gone
    agreed = None
    try:
        try:
            yield
        except BaseException as error:
            if not getattr(error, "on_all_hosts", False):
                raise
            agreed = error
        wait_for_all("end")
    except BaseException as error:
        watch.leave(_sentence(error))
        raise
    watch.stop()
    jax.distributed.shutdown()
    exits.end_abruptly(False)
    if agreed is not None:
        raise agreed


@contextlib.contextmanager
def within(seconds: float, sentence: str, code: int) -> Iterator[None]:
    """Ends the process with the sentence and the exit code if the `with` block takes longer than so many seconds. JAX
    would wait on, or end with a stack trace."""

    patience = threading.Timer(seconds, exits.end_at_once, (sentence, code))
    patience.daemon = True
    patience.start()
    try:
        yield
    finally:
        patience.cancel()


def _initialize(**arguments: Any) -> None:
    """Calls `jax.distributed.initialize` with two repairs.

    JAX runs the coordinator in host 0's process. If that process is killed, all others abort at once with a stack
    trace; a coordinator in a process of its own can still tell them which host died.

    For collectives between CPUs, Gloo announces the address of this machine's name, which on many machines is the
    loopback address; it is given the address that faces the coordinator.
    """
    with jax_internals.service_started_by(coordinator.start), _without_proxies():
        jax.distributed.initialize(**arguments)
    jax_internals.let_gloo_announce(_address_facing(jax_internals.coordinator_address()))


@contextlib.contextmanager
def _without_proxies() -> Iterator[None]:
    """Hides proxies from gRPC while the `with` block runs: the coordinator is in the same cluster, which a proxy for
    the internet may not reach. Connections that are made meanwhile stay direct."""
    hidden = {name: os.environ.pop(name) for name in PROXIES if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(hidden)


def _address_facing(other: str) -> str:
    """Returns this machine's address on the route to HOST:PORT."""
    host, port = other.rsplit(":", 1)
    family, kind, _, _, address = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as route:  # connecting a datagram socket sends nothing
        route.connect(address)
        return route.getsockname()[0]


def _arguments(scale: ScaleConfig) -> dict[str, Any] | None:
    """Returns the arguments for `jax.distributed.initialize`, or None if the run has one host."""
    task = Task.find()
    if scale.coordinator:
        hosts, host = scale.hosts, scale.host
        if task is not None and hosts is None and host is None:
            hosts, host = task.count, task.number
        if hosts is None or host is None:
            raise RequestError(f"--coordinator {scale.coordinator} needs --hosts and --host too")
        if not 0 <= host < hosts:
            raise RequestError(f"--host {host} is not one of --hosts {hosts}, which are numbered from 0")
        if ":" not in scale.coordinator:
            raise RequestError(f"--coordinator {scale.coordinator} has no port; write ADDRESS:PORT")
        return {
            "coordinator_address": scale.coordinator,
            "num_processes": hosts,
            "process_id": host,
            "local_device_ids": task.own_gpus() if task else ALL,
            "cluster_detection_method": "deactivate",
        }
    if scale.hosts is not None or scale.host is not None:
        raise RequestError("--hosts and --host need --coordinator ADDRESS:PORT, which is host 0's")
    if task is not None and task.count > 1:
        if task.scheduler == "Open MPI" and "OMPI_MCA_orte_hnp_uri" not in os.environ:
            raise RequestError(
                "this version of Open MPI does not say where its first process runs; add --coordinator ADDRESS:PORT, "
                "with that machine's address and any free port"
            )
        return {"local_device_ids": task.own_gpus()}
    return {"local_device_ids": ALL} if _in_kubernetes_job() else None


def _in_kubernetes_job() -> bool:
    """Whether JAX can ask Kubernetes for the other pods: this pod is an indexed job's and the client is installed."""
    import importlib.util

    indexed = "KUBERNETES_SERVICE_HOST" in os.environ and "JOB_COMPLETION_INDEX" in os.environ
    return indexed and importlib.util.find_spec("kubernetes") is not None


def _sentence(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
