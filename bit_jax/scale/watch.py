"""Signs of life: every host says where it stands, and hears of a host that died, froze, was cut off or is slow."""

import contextlib
import dataclasses
import json
import logging
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax

from bit_jax.scale import jax_internals
from input_pipeline import exits

BEAT = 1.0  # seconds between two signs of life
TO_READ = 3  # beats that a host waits before it ends, so that the others read from the store why it does
ITS_END_FIRST = 4  # beats that those wait: a scheduler has to see first with which exit code the host ended that failed
AGAIN = "start all hosts again to continue from the last checkpoint"
# Hosts are compared after this many seconds, and not before they have taken this many steps: what two hosts say may be
# apart by one step at either end, which counts as 11 : 9 in ten steps, and as 3 : 1 in two.
LOOK, STEPS = 30.0, 10
# A host's input makes it slow where mending that would make every step a tenth shorter. In both comparisons it takes
# half as much time again as the median host: measurements of the same work on a busy machine differed by 1.4 times.
LATE, OFTEN = 0.1, 1.5

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Sign:
    """What a host says of itself.

    Attributes:
        step: the last step that it finished, perhaps in an earlier start; 0 before any.
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
        """What it last said of itself, to stand behind a clause; empty if it said nothing."""
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
        self._threads = [
            threading.Thread(target=self._beat, name="signs of life", daemon=True),
            threading.Thread(target=self._look, name="watch", daemon=True),
        ]
        for thread in self._threads:
            thread.start()

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
            time.sleep(TO_READ * BEAT)

    def stop(self) -> None:
        """Ends the watch and waits for its threads, `timeout` seconds at most. If Python ended while one of them was
        asking the store, it would abort the process: a run that is done would seem to have crashed."""
        self._stopping.set()
        for thread in self._threads:
            thread.join(self._timeout)

    @property
    def place(self) -> str:
        return f"host {self._host} of {self._hosts}"

    @property
    def progress(self) -> tuple[int, ...]:
        """The `Sign.progress` of each other host, as last heard."""
        return tuple(sign.progress for host, (_, _, sign) in self._seen.items() if host != self._host)

    def _beat(self) -> None:
        count, comparison = 0, Comparison()
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
            if still > self._timeout:  # the others took this host for dead, unless they stood still as well
                self._end(f"this host stood still for {still:.0f} s; after {self._timeout} s the others end without it")
            if still > BEAT:  # in that time it could hear of nobody; `_beat` may have heard of somebody just now
                self._heard = min(self._heard + still, now)
                for host, (beat, when, sign) in self._seen.items():
                    self._seen[host] = beat, min(when + still, now), sign
            for host, why in self._failed.items():
                if host != self._host:
                    self._end(f"host {host} ended: {why}", after=ITS_END_FIRST)
            if now - self._heard > self._timeout:
                self._end(self._unanswered())
            for host, (_, when, sign) in self._seen.items():
                if self._heard - when > self._timeout:
                    silence = f"nothing for {self._timeout} s{sign.place}"
                    self._end(f"host {host} is not heard any more: {silence}; it died, froze, or is cut off")

    def _unanswered(self) -> str:
        """The sentence where the store, whose process is a child of host 0's, has been silent for too long."""
        silence = f"not heard any more: nothing for {self._timeout} s"
        if self._host == 0:
            return f"the coordinator, a process beside host 0's, is {silence}; it froze"
        return f"host 0 is {silence}; it died or froze, or one of the two hosts is cut off"

    def _end(self, sentence: str, after: float = 0.0) -> None:
        """Ends this process, unless it is ending by itself.

        Args:
            after: number of beats to wait before.
        """
        if self._stopping.is_set():
            return
        for tell in self.told_of_loss:
            with contextlib.suppress(Exception):  # nothing may keep this process from ending
                tell(sentence)
        if self._host == 0:  # the store lives with this host, and the others still have to read it
            after = max(after, TO_READ)
        if self._stopping.wait(after * BEAT):
            return  # it fails by itself, and says why
        exits.end_at_once(f"{self.place}: {sentence}; {AGAIN}", 1)


class Comparison:
    """Names hosts that keep the others waiting, by what the hosts said at the beginning and at the end of a while.

    All hosts take the same steps at the same time, so a slow one shows in no host's time of a step: it shows in the
    time in which its own devices waited for its input, and in the time of a piece of work that its devices do alone.
    """

    def __init__(self):
        self._first = 0  # the step that host 0 first spoke of, perhaps the one that the run continues from
        self._began, self._before = 0.0, None
        self._slow: set[int] = set()

    def of(self, signs: Sequence[Sign], now: float) -> list[str]:
        """Returns a sentence for each host that has become slow, or has ceased to be; nothing before `LOOK` seconds and
        `STEPS` steps have passed since it last compared them.

        The first while begins once every host has taken a step: before, hosts compile and wait for their first batches.

        Args:
            signs: what each host said last, in the order of the hosts.
            now: the time, in seconds.
        """
        if self._before is None:
            self._first = self._first or signs[0].step
            if self._first and all(sign.step > self._first for sign in signs):
                self._began, self._before = now, tuple(signs)
            return []
        seconds, before = now - self._began, self._before
        steps = signs[0].step - before[0].step
        if seconds < LOOK or steps < STEPS:
            return []
        self._began, self._before = now, tuple(signs)
        waited = [(sign.waited - earlier.waited) / steps for sign, earlier in zip(signs, before, strict=True)]
        late = _reasons(seconds / steps, waited, [sign.worked for sign in signs])
        said = [
            f"host {host} of {len(signs)} is slow: {'; '.join(reasons)}"
            for host, reasons in late.items()
            if host not in self._slow
        ]
        said += [f"host {host} of {len(signs)} keeps up with the others again" for host in self._slow - set(late)]
        self._slow = set(late)
        return said


def _reasons(step: float, waited: Sequence[float], worked: Sequence[float]) -> dict[int, list[str]]:
    """Returns {slow host: clauses that say why it is one}.

    Args:
        step: seconds from one step to the next.
        waited: seconds of these in which each host's devices wait for its input.
        worked: see `Sign`.
    """
    reasons: dict[int, list[str]] = {}
    usual, work = statistics.median_low(waited), statistics.median_low(worked)
    for host, (wait, own) in enumerate(zip(waited, worked, strict=True)):
        if wait > max(LATE * step, OFTEN * usual):
            reasons.setdefault(host, []).append(
                f"of the {step:.3g} s from one step to the next, its devices wait {wait:.2g} s for its input, those of "
                f"the median host {usual:.2g} s"
            )
        if own > OFTEN * work > 0:
            reasons.setdefault(host, []).append(
                f"its slowest device takes {1e3 * own:.3g} ms for what the median host's does in {1e3 * work:.3g} ms"
            )
    return reasons


def _number(key: str) -> Any:
    return int(key.rsplit("/", 1)[1])
