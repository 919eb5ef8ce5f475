"""A run's folder: config.json says whose it is; a folder that holds another configuration's run is refused."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from bit_jax import hosts
from bit_jax.config import Config, identity
from bit_jax.hyperrule import Recipe
from input_pipeline.errors import RequestError
from input_pipeline.files import write_json


@dataclasses.dataclass(frozen=True)
class Workdir:
    path: Path

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
    def final(self) -> Path:
        return self.path / "final.npz"

    def claim(self, cfg: Config, **derived: Any) -> None:
        """Makes the folder and writes config.json, or finds there the same configuration.

        Args:
            cfg: what is to run.
            derived: what follows from it and from the machine or dataset (recipe, global batch, class names); kept
                beside it, and compared too.

        Raises:
            RequestError: the folder cannot be written, or holds another configuration's run.
        """
        if not hosts.is_first():
            hosts.wait_for_all("work directory")
            if not self.config.exists():
                raise RequestError(f"{self.path} is not the first host's; put --workdir on a disk that all hosts share")
        try:
            self._claim(cfg, derived)
        finally:
            if hosts.is_first():
                hosts.wait_for_all("work directory")

    def _claim(self, cfg: Config, derived: dict[str, Any]) -> None:
        wanted = json.loads(json.dumps({"config": identity(cfg), **derived}, default=_plain))
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            if not self.config.exists():
                stray = [name for name in ("checkpoints", "final.npz", "result.json") if (self.path / name).exists()]
                if stray:
                    raise RequestError(
                        f"{self.path} holds {stray[0]} but no config.json to say of which run; choose another --workdir"
                    )
                write_json(self.config, wanted)
                return
            found = json.loads(self.config.read_text())
        except OSError as error:
            raise RequestError(
                f"cannot use work directory {self.path}: {error.strerror}; choose another --workdir"
            ) from None
        except json.JSONDecodeError as error:
            raise RequestError(f"{self.config} is damaged ({error}); choose another --workdir") from None
        differing = _differences(found, wanted)
        if differing:
            raise RequestError(
                f"{self.path} holds a run of another configuration ({'; '.join(differing)}); "
                "choose another --workdir, or the same flags to continue that run"
            )

    def finished(self) -> dict[str, Any] | None:
        """The result of a run that came to its end here."""
        if self.result.exists() and self.final.exists():
            try:
                return json.loads(self.result.read_text())
            except ValueError as error:
                raise RequestError(f"{self.result} is damaged ({error}); delete it to have it written again") from None
        return None


def _plain(value: Any) -> Any:
    """What JSON has no form for: the recipe as an object, paths as text."""
    return dataclasses.asdict(value) if isinstance(value, Recipe) else str(value)


def _differences(found: Any, wanted: Any, name: str = "") -> list[str]:
    if isinstance(found, dict) and isinstance(wanted, dict):
        keys = list(wanted) + [key for key in found if key not in wanted]
        return [line for key in keys for line in _differences(found.get(key), wanted.get(key), f"{name}{key}: ")]
    return [] if found == wanted else [f"{name}{found} there, {wanted} here"]
