"""Several hosts that compute one run: start-up, and noticing in time when one of them is gone.

Every host runs the same command and computes the same steps; the first, host 0, alone writes and prints.
"""

import contextlib
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import jax
from jax.experimental import multihost_utils

from bit_jax.config import ScaleConfig
from bit_jax.scale import coordinator, jax_internals
from bit_jax.scale.schedulers import ALL, Task
from input_pipeline import exits
from input_pipeline.errors import RequestError

BEAT = 1.0  # seconds between two signs of life
AGAIN = "start all hosts again to continue from the last checkpoint"
PROXIES = ("grpc_proxy", "https_proxy", "http_proxy")  # what gRPC reads


def is_first() -> bool:
    """Whether this is the host that writes and prints."""
    return jax.process_index() == 0


def agree(number: int) -> int:
    """Host 0's number, on every host."""
    return number if jax.process_count() == 1 else int(multihost_utils.broadcast_one_to_all(number))


def wait_for_all(what: str) -> None:
    """Returns once every host has come here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)


def exchange(what: str, text: str) -> list[str]:
    """What every host has to say, by number. It goes through the coordinator, so hosts of any versions understand."""
    if jax.process_count() == 1:
        return [text]
    client = jax_internals.store()
    client.key_value_set(f"bit_jax/{what}/{jax.process_index()}", text)
    forever = 10**9  # ms; a host that dies in the meantime ends this one
    return [client.blocking_key_value_get(f"bit_jax/{what}/{host}", forever) for host in range(jax.process_count())]


@contextlib.contextmanager
def joined(scale: ScaleConfig) -> Iterator[None]:
    """Within, all hosts of the run are one JAX program, by SLURM, Open MPI, Kubernetes or the flags; alone without any.

    A host that dies or is cut off makes the others end with exit code 1 and a sentence that names it, after
    `--host-timeout` seconds; one that fails by itself, at once.

    Raises:
        RequestError: the hosts do not find each other.
    """
    arguments = _arguments(scale)
    if arguments is None:
        yield
        return
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM away from `exits`
    missing = (
        f"the hosts did not find each other in {scale.start_timeout} s; start all of them with the same --coordinator "
        "and --hosts, and see that its port is reachable from each"
    )
    with within(scale.start_timeout, missing, 2):
        try:
            _initialize(
                **arguments,
                initialization_timeout=10 * scale.start_timeout,  # JAX's own, which aborts without a sentence
                heartbeat_timeout_seconds=10 * scale.host_timeout,  # JAX's own, which aborts without a sentence
                shutdown_timeout_seconds=scale.host_timeout,
            )
        except RequestError:
            raise
        except Exception as error:  # of several kinds
            raise RequestError(f"the hosts cannot be joined: {_sentence(error)}") from None
    watch = _Watch(scale.host_timeout)
    exits.end_abruptly()  # an orderly end would wait for hosts that are gone
    try:
        yield
    except BaseException as error:
        watch.leave(_sentence(error))
        raise
    wait_for_all("end")
    watch.stop()
    jax.distributed.shutdown()
    exits.end_abruptly(False)


@contextlib.contextmanager
def within(seconds: float, sentence: str, code: int) -> Iterator[None]:
    """Ends the process with the sentence and the exit code where what is within takes longer: JAX would wait on, or
    end with a stack trace."""

    def end() -> None:
        sys.stderr.write(f"error: {sentence}\n")
        sys.stderr.flush()
        os._exit(code)

    patience = threading.Timer(seconds, end)
    patience.daemon = True
    patience.start()
    try:
        yield
    finally:
        patience.cancel()


def _initialize(**arguments: Any) -> None:
    """`jax.distributed.initialize` with two things mended.

    JAX has the coordinator in host 0's process. When that is killed, all others abort at once with a stack trace; in a
    process of its own, it lets them be told which host it was.

    Between CPUs, Gloo tells the others the address that this machine's name has, which on many is the loopback's; it is
    given the one that faces the coordinator.
    """
    with jax_internals.service_started_by(coordinator.start), _without_proxies():
        jax.distributed.initialize(**arguments)
    jax_internals.let_gloo_announce(_address_facing(jax_internals.coordinator_address()))


@contextlib.contextmanager
def _without_proxies() -> Iterator[None]:
    """Within, gRPC knows no proxy: the coordinator is a host of the same cluster, which a proxy for the internet may
    not reach. A connection that was made within stays direct."""
    hidden = {name: os.environ.pop(name) for name in PROXIES if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(hidden)


def _address_facing(other: str) -> str:
    """This machine's address on the way to HOST:PORT."""
    host, port = other.rsplit(":", 1)
    family, kind, _, _, address = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as route:  # of datagrams: connecting sends nothing
        route.connect(address)
        return route.getsockname()[0]


def _arguments(scale: ScaleConfig) -> dict[str, Any] | None:
    """Of `jax.distributed.initialize`; None for a host alone."""
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
    """Whether JAX can ask Kubernetes for the other pods: this is an indexed job's, and its client is installed."""
    import importlib.util

    indexed = "KUBERNETES_SERVICE_HOST" in os.environ and "JOB_COMPLETION_INDEX" in os.environ
    return indexed and importlib.util.find_spec("kubernetes") is not None


def _sentence(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


class _Watch:
    """Signs of life of all hosts in the coordinator's store, looked at by a thread of each."""

    def __init__(self, timeout: float):
        self._client = jax_internals.store()
        self._timeout = timeout
        self._host, self._hosts = jax.process_index(), jax.process_count()
        self._stopping = threading.Event()
        now = time.monotonic()
        # host: (its last beat, when that was new)
        self._seen: dict[int, tuple[int, float]] = dict.fromkeys(range(self._hosts), (0, now))
        self._heard = now  # when the store last answered
        self._failed: dict[int, str] = {}
        threading.Thread(target=self._beat, name="signs of life", daemon=True).start()
        threading.Thread(target=self._look, name="watch", daemon=True).start()

    def leave(self, sentence: str) -> None:
        """Tells the others why this host ends, and gives them the time to read it.

        An error here may be another host's death. So each of them has to give a sign of life first, one from after the
        error; for one that does not, `_look` ends this host with the right sentence.
        """
        failed = time.monotonic() + 2 * BEAT  # until then, what is seen may be from before
        while not all(when > failed for host, (_, when) in self._seen.items() if host != self._host):
            time.sleep(BEAT / 10)
        with contextlib.suppress(Exception):  # the store may be what is gone
            self._client.key_value_set(f"bit_jax/failed/{self._host}", sentence)
            self._stopping.set()
            time.sleep(3 * BEAT)

    def stop(self) -> None:
        self._stopping.set()

    def _beat(self) -> None:
        count = 0
        while not self._stopping.wait(BEAT):
            count += 1
            try:
                self._client.key_value_set(f"bit_jax/alive/{self._host}", str(count), allow_overwrite=True)
                alive = self._client.key_value_dir_get("bit_jax/alive/")
                self._failed = {_number(key): why for key, why in self._client.key_value_dir_get("bit_jax/failed/")}
            except Exception:  # the store does not answer; how long, `_look` sees
                continue
            now = self._heard = time.monotonic()
            for key, beat in alive:
                if self._seen[_number(key)][0] != int(beat):
                    self._seen[_number(key)] = int(beat), now

    def _look(self) -> None:
        silence = f"nothing for {self._timeout} s; it died, or is cut off"
        while not self._stopping.wait(BEAT):
            now = time.monotonic()
            for host, why in self._failed.items():
                if host != self._host:
                    self._end(f"host {host} ended: {why}")
            if now - self._heard > self._timeout:
                self._end(f"host 0 is not heard any more: {silence}")
            for host, (_, when) in self._seen.items():
                if self._heard - when > self._timeout:
                    self._end(
                        f"host {host} is not heard any more: nothing for {self._timeout} s; it died, or is cut off"
                    )

    def _end(self, sentence: str) -> None:
        if self._stopping.is_set():
            return
        sys.stderr.write(f"error: host {self._host} of {self._hosts}: {sentence}; {AGAIN}\n")
        if self._host == 0:
            time.sleep(3 * BEAT)  # the store is here: the others read it as long as this host lives
        sys.stderr.flush()
        os._exit(1)


def _number(key: str) -> int:
    return int(key.rsplit("/", 1)[1])
