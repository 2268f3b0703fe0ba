"""Workers and model on Ray Serve, in the place of a fleet of processes."""

import random
import time
from collections import Counter
from contextlib import ExitStack

import psutil
from waiting import wait_until

from inference.redeploy import MODEL_NAME
from schemas.settings import Settings
from tapeline.app import ServeApplication, ray_session

LONG_S = 120.0
_TICK_S = 0.05


class ServeFleet:
    """One Serve application; Serve is the process manager. Slots have no meaning here.

    A Ray that runs in this process is used, else one of our own is started.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._application = ServeApplication(settings)
        self._cleanup = ExitStack()
        self._is_deployed = False
        self.ends: Counter[str] = Counter()
        self.failures: list[str] = []

    @property
    def slots(self) -> list[int]:
        return [0] if self._is_deployed else []

    def add(self, slot: int) -> None:
        import ray

        if self._is_deployed:
            return
        if not ray.is_initialized():
            self._cleanup.enter_context(ray_session(self._settings, log_to_driver=False))
        self._application.deploy()
        self._is_deployed = True

    def wait_until_up(self) -> None:
        """Returns when every replica of the model is there."""
        wait_until(
            lambda: len(self.model_pids()) == self._settings.model.num_replicas,
            LONG_S,
            "every model replica to be there",
        )

    def tend(self) -> None:
        """Serve does it."""

    def run_for(self, seconds: float) -> None:
        time.sleep(seconds)

    def dismiss(self, slot: int) -> None:
        """Drains the workers, which must all answer, and takes the application away."""
        drained = self._application.drain()
        self.ends["in order"] += len(drained)
        self._application.delete()
        self._is_deployed = False

    def close(self) -> None:
        if self._is_deployed:
            self._application.delete()
            self._is_deployed = False
        self._cleanup.close()

    def num_takeovers(self) -> int:
        return 0

    def model_pids(self) -> list[int]:
        """The processes of the model's replicas; Ray names them in their titles."""
        title = f"ServeReplica:{self._settings.serve.app_name}:{MODEL_NAME}"
        return sorted(
            process.pid
            for process in psutil.process_iter(["cmdline"])
            if title in " ".join(process.info["cmdline"] or ())
        )

    def kill_model(self, chance: random.Random) -> None:
        """kill -9 of a replica; returns when Serve has made another one."""
        self.wait_until_up()
        before = self.model_pids()
        victim = chance.choice(before)
        psutil.Process(victim).kill()

        def replaced() -> bool:
            now = self.model_pids()
            return victim not in now and len(now) == len(before)

        wait_until(replaced, LONG_S, "Serve to replace a model replica")
