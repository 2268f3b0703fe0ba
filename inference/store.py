"""The versions of a model that may serve, and which of them do: a folder and one small file.

    <store>/<model_version>/     artifacts, each under its full name; they never change
    <store>/rollout.json         which of them serves, shadows or is a canary, and which did before

Workers look at the file every second, replicas of the model when they start: on several machines
all of them must see the store under the same path.
"""

import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

from inference.artifact import Artifact, load_artifact, save_artifact
from schemas.errors import ConfigError
from schemas.rollout import ROLLOUT_FILE, Rollout, find_rollout
from schemas.settings import WindowSettings

_LOCK = ".lock"
_MAX_BEFORE = 16


class ModelStore:
    """A folder of model versions. What is changed here is seen whole or not at all.

    Args:
        path: made by the first ``add``.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def versions(self) -> list[str]:
        """What is in the store, by name."""
        if not self.path.is_dir():
            return []
        folders = (one for one in self.path.iterdir() if one.is_dir())
        return sorted(one.name for one in folders if not one.name.startswith("."))

    def rollout(self) -> Rollout:
        """What is in use. Raises ConfigError: nothing is yet, or the file is no rollout."""
        if (rollout := find_rollout(self.path)) is None:
            raise ConfigError(
                f"no model of {self.path} serves yet; say `tapeline model promote NAME@VERSION`"
            )
        return rollout

    def resolve(self, name: str) -> str:
        """The one version in the store that is called so: its full name, or NAME@VERSION.

        Raises ConfigError, with what there is.
        """
        known = self.versions()
        found = [name] if name in known else [one for one in known if _is_called(one, name)]
        if len(found) == 1:
            return found[0]
        if found:
            raise ConfigError(f"{name} may be {' or '.join(found)}; say which")
        raise ConfigError(
            f"there is no model {name!r} in {self.path}; it holds {', '.join(known) or 'none'}"
        )

    def load(self, model_version: str, window: WindowSettings | None = None) -> Artifact:
        """Reads and checks a version; against the window that will feed it, if given.

        Raises ConfigError.
        """
        return load_artifact(
            self.path / model_version,
            channels_version=window.channel_set if window else None,
            num_steps=window.num_steps if window else None,
        )

    def add(self, folder: Path) -> str:
        """Copies an artifact into the store, if it is not there yet; its ``model_version``.

        Raises ConfigError: it is no artifact, or the store cannot be written.
        """
        artifact = load_artifact(folder)
        if not (self.path / artifact.model_version).exists():
            save_artifact(artifact, self.path / artifact.model_version)
        return artifact.model_version

    def promote(self, model_version: str, window: WindowSettings) -> Rollout:
        """Has this version serve; a shadow or a canary ends.

        Raises ConfigError: it does not fit the window, or gives something else than the one that
        serves.
        """
        self._demand_fit(model_version, window)
        with self._changing() as now:
            if now is None:
                return self._write(Rollout(model_version))
            if now.serving == model_version:
                return self._write(replace(now, shadow=None, canary=None, canary_share=0.0))
            before = (now.serving, *now.before)[:_MAX_BEFORE]
            return self._write(Rollout(model_version, before))

    def try_out(
        self, model_version: str, window: WindowSettings, canary_share: float | None = None
    ) -> Rollout:
        """Has this version shadow the one that serves or, with a share, serve so many symbols.

        Raises ConfigError: as ``promote``, or nothing serves yet.
        """
        self._demand_fit(model_version, window)
        with self._changing():
            now = self.rollout()
            if model_version == now.serving:
                raise ConfigError(f"{model_version} serves already; there is nothing to try out")
            if canary_share is None:
                return self._write(replace(now, shadow=model_version))
            return self._write(replace(now, canary=model_version, canary_share=canary_share))

    def roll_back(self) -> Rollout:
        """Ends shadow and canary; where there is neither, the version before serves again.

        Raises ConfigError if there is nothing to go back to.
        """
        with self._changing():
            now = self.rollout()
            if now.shadow or now.canary:
                return self._write(Rollout(now.serving, now.before))
            if not now.before:
                raise ConfigError(f"{now.serving} is the first that served: nothing is before it")
            return self._write(Rollout(now.before[0], now.before[1:]))

    def _demand_fit(self, model_version: str, window: WindowSettings) -> None:
        new = self.load(model_version, window).config
        now = find_rollout(self.path)
        if now is None or now.serving == model_version:
            return
        old = self.load(now.serving).config
        if (new.num_features, new.score_names) != (old.num_features, old.score_names):
            raise ConfigError(
                f"{model_version} gives {new.num_features} features and the scores "
                f"{list(new.score_names)}, {now.serving} gives {old.num_features} and "
                f"{list(old.score_names)}: subscribers could not read both; use another store"
            )

    @contextmanager
    def _changing(self) -> Iterator[Rollout | None]:
        """One at a time, on this machine."""
        try:
            with (self.path / _LOCK).open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                yield find_rollout(self.path)
        except OSError as error:
            raise ConfigError(f"cannot change {self.path}: {error.strerror}") from error

    def _write(self, rollout: Rollout) -> Rollout:
        descriptor, part = tempfile.mkstemp(prefix=f".{ROLLOUT_FILE}.", dir=self.path)
        with os.fdopen(descriptor, "w") as file:
            json.dump(asdict(rollout), file, indent=2)
            file.write("\n")
        os.chmod(part, 0o644)  # mkstemp's 0600 would hide it from a service's own user
        shutil.move(part, self.path / ROLLOUT_FILE)
        return rollout


def _is_called(model_version: str, name: str) -> bool:
    return "@" in name and model_version.rpartition("-")[0] == name
