"""Signs of life: every host says where it stands, and hears of a host that died, froze, was cut off or is slow."""

import contextlib
import dataclasses
import json
import logging
import os
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax

from bit_jax.scale import jax_internals
from input_pipeline import exits

BEAT = 1.0  # seconds between two signs of life
AGAIN = "start all hosts again to continue from the last checkpoint"
LOOK = 30.0  # seconds of steps over which hosts are compared
LATE, OFTEN = 0.1, 1.5  # a slow host keeps the others waiting for this share of a step, and is so many times the median

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Sign:
    """What a host says of itself.

    Attributes:
        step: the last step that it finished.
        activity: what it does.
        waited: seconds in which its devices have waited for its input, in all.
        worked: seconds that its slowest device took for `same_work`, or 0.
        progress: a number that changes whenever something in it goes on.
    """

    step: int = 0
    activity: str = ""
    waited: float = 0.0
    worked: float = 0.0
    progress: int = 0

    @classmethod
    def parsed(cls, text: str) -> tuple[int, "Sign"]:
        """Returns a sign of life's number and what it says; a host of another version may say less or more."""
        content = json.loads(text)
        known = {field.name for field in dataclasses.fields(cls)}
        return int(content["beat"]), cls(**{name: value for name, value in content.items() if name in known})

    @property
    def place(self) -> str:
        step = f", since step {self.step}" if self.step else ""
        return step + (f" ({self.activity})" if self.activity else "")


class Watch:
    """Watches the other hosts: one thread writes this host's signs of life into the coordinator's store and reads the
    others', another ends this process if a host fails or falls silent.

    Args:
        timeout: seconds of silence after which a host is taken for dead.

    Attributes:
        sign: function that says where this host stands.
        told_of_loss: functions that are told the sentence before another host's end ends this process.
    """

    def __init__(self, timeout: float):
        self.sign: Callable[[], Sign] = Sign
        self.told_of_loss: list[Callable[[str], object]] = []
        self._client = jax_internals.store()
        self._timeout = timeout
        self._host, self._hosts = jax.process_index(), jax.process_count()
        self._stopping = threading.Event()
        now = time.monotonic()
        # {host: (its last beat, the time at which that was new, what it said)}
        self._seen: dict[int, tuple[int, float, Sign]] = dict.fromkeys(range(self._hosts), (0, now, Sign()))
        self._heard = now  # the time at which the store last answered
        self._failed: dict[int, str] = {}
        threading.Thread(target=self._beat, name="signs of life", daemon=True).start()
        threading.Thread(target=self._look, name="watch", daemon=True).start()

    def leave(self, sentence: str) -> None:
        """Tells the other hosts why this host ends, and gives them time to read it.

        This host's error may be caused by another host's death. So this waits until every other host has given a sign
        of life after the error; if one does not, `_look` ends this host with the right sentence.
        """
        failed = time.monotonic() + 2 * BEAT  # signs of life that are seen until then may be from before the error
        while not all(when > failed for host, (_, when, _) in self._seen.items() if host != self._host):
            time.sleep(BEAT / 10)
        with contextlib.suppress(Exception):  # the store itself may be gone
            self._client.key_value_set(f"bit_jax/failed/{self._host}", sentence)
            self._stopping.set()
            time.sleep(3 * BEAT)

    def stop(self) -> None:
        self._stopping.set()

    @property
    def place(self) -> str:
        return f"host {self._host} of {self._hosts}"

    @property
    def progress(self) -> tuple[int, ...]:
        """The `Sign.progress` of each other host, as last heard."""
        return tuple(sign.progress for host, (_, _, sign) in self._seen.items() if host != self._host)

    def _beat(self) -> None:
        count, comparison = 0, Comparison(time.monotonic())
        while not self._stopping.wait(BEAT):
            count += 1
            try:
                said = json.dumps({"beat": count} | dataclasses.asdict(self.sign()))
                self._client.key_value_set(f"bit_jax/alive/{self._host}", said, allow_overwrite=True)
                alive = self._client.key_value_dir_get("bit_jax/alive/")
                self._failed = {_number(key): why for key, why in self._client.key_value_dir_get("bit_jax/failed/")}
            except Exception:  # the store does not answer; `_look` ends this host if that lasts
                continue
            now = self._heard = time.monotonic()
            for key, text in alive:
                beat, sign = Sign.parsed(text)
                if self._seen[_number(key)][0] != beat:
                    self._seen[_number(key)] = beat, now, sign
            if self._host == 0:
                for sentence in comparison.of([self._seen[host][2] for host in range(self._hosts)], now):
                    log.warning(sentence)

    def _look(self) -> None:
        looked = time.monotonic()
        while not self._stopping.wait(BEAT):
            now = time.monotonic()
            still, looked = now - looked - BEAT, now
            if still > self._timeout:  # the others took this host for dead
                self._end(f"this host stood still for {still:.0f} s, and the others have ended without it")
            if still > BEAT:  # in that time it could hear of nobody
                self._heard += still
                self._seen = {host: (beat, when + still, sign) for host, (beat, when, sign) in self._seen.items()}
            for host, why in self._failed.items():
                if host != self._host:
                    self._end(f"host {host} ended: {why}")
            if now - self._heard > self._timeout:
                self._end(self._silent(0, ""))
            for host, (_, when, sign) in self._seen.items():
                if self._heard - when > self._timeout:
                    self._end(self._silent(host, sign.place))

    def _silent(self, host: int, place: str) -> str:
        silence = f"nothing for {self._timeout} s{place}"
        return f"host {host} is not heard any more: {silence}; it died, froze, or is cut off"

    def _end(self, sentence: str) -> None:
        if self._stopping.is_set():
            return
        for tell in self.told_of_loss:
            with contextlib.suppress(Exception):  # nothing may keep this process from ending
                tell(sentence)
        exits.tell(f"error: {self.place}: {sentence}; {AGAIN}\n".encode())
        if self._host == 0:
            time.sleep(3 * BEAT)  # the store lives with this host, and the others still have to read it
        os._exit(1)


class Comparison:
    """Names hosts that keep the others waiting, by what the hosts said at the beginning and at the end of a while.

    All hosts take the same steps at the same time, so a slow one shows in no host's time of a step: it shows in the
    time in which its own devices waited for its input, and in the time of a piece of work that its devices do alone.
    """

    def __init__(self, began: float):
        self._began, self._before = began, {}
        self._slow: set[int] = set()

    def of(self, signs: Sequence[Sign], now: float) -> list[str]:
        """Returns a sentence for each host that has become slow, or has ceased to be, once every `LOOK` seconds.

        Args:
            signs: what each host said last, in the order of the hosts.
            now: the time, in seconds.
        """
        if now - self._began < LOOK:
            return []
        before, self._before = self._before, dict(enumerate(signs))
        seconds, self._began = now - self._began, now
        steps = signs[0].step - before[0].step if before else 0
        if steps < 1:
            return []
        step = seconds / steps
        waited = [(sign.waited - before[host].waited) / steps for host, sign in enumerate(signs)]
        worked = [sign.worked for sign in signs]
        late = {
            host: _sentence(host, step, waited, worked)
            for host in range(len(signs))
            if waited[host] > max(LATE * step, OFTEN * statistics.median_low(waited))
            or worked[host] > OFTEN * statistics.median_low(worked) > 0
        }
        said = [sentence for host, sentence in late.items() if host not in self._slow]
        said += [f"host {host} of {len(signs)} keeps up with the others again" for host in self._slow - set(late)]
        self._slow = set(late)
        return said


def _sentence(host: int, step: float, waited: Sequence[float], worked: Sequence[float]) -> str:
    input_, median = f"{waited[host]:.2g} s", f"{statistics.median_low(waited):.2g} s"
    sentence = (
        f"host {host} of {len(waited)} is slow: in a step, of {step:.3g} s, its devices wait {input_} for its input, "
        f"those of the median host {median}"
    )
    if all(worked):
        own, median = (f"{1e3 * seconds:.3g} ms" for seconds in (worked[host], statistics.median_low(worked)))
        sentence += f"; its slowest device takes {own} for what the median host's does in {median}"
    return sentence


def _number(key: str) -> Any:
    return int(key.rsplit("/", 1)[1])
