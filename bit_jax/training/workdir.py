"""A run's folder: config.json says whose it is; a folder that holds another configuration's run is refused."""

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bit_jax.config import Config, identity
from bit_jax.scale import hosts
from bit_jax.training.hyperrule import Recipe
from input_pipeline import claims
from input_pipeline.errors import RequestError
from input_pipeline.files import is_unfinished, read_json, write_json

OTHER = "choose another --workdir"
OWN = ("config.json", "metrics.jsonl", "result.json", "final.npz")  # what a run writes as a whole


@dataclasses.dataclass(frozen=True)
class Workdir:
    """The folder of one run.

    Attributes:
        path: the folder.
        content: what config.json says of the run.
    """

    path: Path
    content: dict[str, Any]

    @classmethod
    def of(cls, cfg: Config, **derived: Any) -> "Workdir":
        """The folder of the configured run.

        Args:
            cfg: what is to run.
            derived: what follows from it and from the machine or dataset (recipe, global batch, class names); kept
                beside it in config.json, and compared too.
        """
        content = {"config": identity(cfg), **derived}
        return cls(cfg.run.workdir, json.loads(json.dumps(content, default=_plain)))

    @property
    def config(self) -> Path:
        return self.path / "config.json"

    @property
    def result(self) -> Path:
        return self.path / "result.json"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def programs(self) -> Path:
        return self.path / "programs"

    @property
    def final(self) -> Path:
        return self.path / "final.npz"

    @property
    def profile(self) -> Path:
        return self.path / "profile"

    @contextlib.contextmanager
    def owned(self) -> Iterator[None]:
        """Within, this run alone writes into the folder; config.json is there. Host 0 owns it for all hosts.

        Raises:
            RequestError: the folder cannot be written, belongs to another process, or holds another configuration's
                run.
        """
        if not hosts.is_first():
            hosts.wait_for_all("work directory")
            if not self.config.exists():
                raise RequestError(f"{self.path} is not the first host's; put --workdir on a disk that all hosts share")
            self.check()
            yield
            return
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            owning = contextlib.ExitStack()
            owning.enter_context(claims.claimed(self.path / claims.CLAIM, self.path, OTHER))
        except OSError as error:
            raise RequestError(f"cannot use work directory {self.path}: {error.strerror}; {OTHER}") from None
        with owning:
            try:
                self.check()
                self._clear()
                if not self.config.exists():
                    write_json(self.config, self.content)
            finally:
                hosts.wait_for_all("work directory")
            yield

    def _clear(self) -> None:
        """Removes what a killed run of this program was writing: half a final.npz may be large."""
        for path in self.path.iterdir():
            if any(is_unfinished(path, name) for name in OWN):
                path.unlink()

    def check(self) -> None:
        """Compares what config.json says, if it is there, with this run.

        Raises:
            RequestError: it is another configuration's, or damaged, or missing beside a run's results.
        """
        if not self.config.exists():
            stray = [name for name in ("checkpoints", "final.npz", "result.json") if (self.path / name).exists()]
            if stray:
                raise RequestError(
                    f"{self.path} holds {stray[0]} but no config.json to say of which run; choose another --workdir"
                )
            return
        differing = _differences(read_json(self.config, dict, OTHER), self.content)
        if differing:
            raise RequestError(
                f"{self.path} holds a run of another configuration ({'; '.join(differing)}); "
                "choose another --workdir, or the same flags to continue that run"
            )

    def finished(self) -> dict[str, Any] | None:
        """The result of this very run where it came to its end here, else None.

        Raises:
            RequestError: as `check`; or result.json is damaged.
        """
        self.check()
        if self.result.exists() and self.final.exists():
            return read_json(self.result, dict, "move it away to have it written again")
        return None


def _plain(value: Any) -> Any:
    """What JSON has no form for: the recipe as an object, paths as text."""
    return dataclasses.asdict(value) if isinstance(value, Recipe) else str(value)


def _differences(found: Any, wanted: Any, name: str = "") -> list[str]:
    if isinstance(found, dict) and isinstance(wanted, dict):
        keys = list(wanted) + [key for key in found if key not in wanted]
        return [line for key in keys for line in _differences(found.get(key), wanted.get(key), f"{name}{key}: ")]
    return [] if found == wanted else [f"{name}{found} there, {wanted} here"]
