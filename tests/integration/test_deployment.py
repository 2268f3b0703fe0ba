"""The model on a real Ray Serve: the same bits, clear errors, and a replica that survives them."""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from numpy.typing import NDArray
from ray import serve
from replica_process import replica_process

from inference.deployment import build_model_deployment
from inference.engine import Engine, load_engine
from inference.remote import ServeInferencer
from inference.shared import Block, BlockName
from schemas.errors import ConfigError, TransientError
from schemas.settings import ModelSettings, ServeSettings

APP_NAME = "test-deployment"
SETTINGS = ModelSettings(device="cpu", max_batch=64)
SERVE = ServeSettings(model_num_cpus=0.1)

pytestmark = pytest.mark.usefixtures("ray_runtime")


@pytest.fixture(scope="module")
def handle(ray_runtime: object) -> Iterator[Any]:
    yield serve.run(build_model_deployment(SETTINGS, SERVE), name=APP_NAME, route_prefix=None)
    serve.delete(APP_NAME)


@pytest.fixture(scope="module")
def engine() -> Engine:
    return load_engine(SETTINGS)


def windows_of(num_windows: int) -> NDArray[np.float32]:
    noise = np.random.default_rng(num_windows).normal(0, 3, (num_windows, 50, 60))
    return noise.astype(np.float32)


@pytest.mark.parametrize("share_memory", [True, False])
def test_calls_in_flight_give_the_engine_s_bits(
    handle: Any, engine: Engine, share_memory: bool
) -> None:
    async def main() -> None:
        inferencer = ServeInferencer(handle, timeout_s=60, share_memory=share_memory)
        assert await inferencer.describe() == engine.describe()
        batches = [windows_of(size) for size in (1, 300, 5, 64, 0, 2, 33, 128)]
        results = await asyncio.gather(*[inferencer.infer(batch) for batch in batches])
        for batch, result in zip(batches, results, strict=True):
            expected = engine.infer(batch)
            assert result.features.shape == expected.features.shape == (len(batch), 64)
            assert result.features.tobytes() == expected.features.tobytes()
            assert result.scores.shape == (len(batch), 0)
            assert result.model_version == expected.model_version
        await inferencer.close()

    asyncio.run(main())


def test_windows_lie_in_memory_that_the_replica_sees_and_lets_go_of(handle: Any) -> None:
    async def main() -> None:
        inferencer = ServeInferencer(handle, timeout_s=60)
        await asyncio.gather(*[inferencer.infer(windows_of(30)) for _ in range(3)])
        assert 1 <= num_mapped() <= 3
        for _ in range(3):
            with pytest.raises(ValueError, match="50 channels"):
                await inferencer.infer(np.zeros((3, 50, 59), np.float32))
        await ServeInferencer(handle, timeout_s=60).infer(windows_of(30))  # a block not seen yet
        assert 1 <= num_mapped() <= 4  # those of the calls that failed are gone

    asyncio.run(main())


def num_mapped() -> int:
    pid = replica_process(APP_NAME).pid
    return Path(f"/proc/{pid}/maps").read_text().count("/memfd:tapeline-")


def test_a_replica_out_of_reach_is_sent_the_windows(
    handle: Any, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one on another machine, where that descriptor of that process is something else."""
    elsewhere = BlockName(pid=1, descriptor=0, token="tapeline-of-another-machine")
    monkeypatch.setattr(Block, "name", elsewhere, raising=False)

    async def main() -> None:
        inferencer = ServeInferencer(handle, timeout_s=60)
        assert await handle.infer_shared.remote(elsewhere, (1, 50, 60)) is None
        result = await inferencer.infer(windows_of(5))
        assert result.features.tobytes() == engine.infer(windows_of(5)).features.tobytes()

    asyncio.run(main())


def test_a_bad_batch_is_named_and_the_replica_lives_on(handle: Any) -> None:
    async def main() -> None:
        inferencer = ServeInferencer(handle, timeout_s=60)
        before = await handle.statistics.remote()
        with pytest.raises(ValueError, match=r"50 channels, 60 steps\), not \(3, 50, 59\)"):
            await inferencer.infer(np.zeros((3, 50, 59), np.float32))
        with pytest.raises(ValueError, match="must be float32, not float64"):
            await inferencer.infer(np.zeros((3, 50, 60)))  # type: ignore[arg-type]
        await inferencer.infer(windows_of(3))
        after = await handle.statistics.remote()
        assert after.num_calls == before.num_calls + 1  # the counters of the same replica
        assert after.num_windows == before.num_windows + 3
        await handle.check_health.remote()

    asyncio.run(main())


def test_a_late_answer_may_be_asked_for_again(handle: Any, engine: Engine) -> None:
    batch = windows_of(2000)

    async def main() -> None:
        with pytest.raises(TransientError, match=r"no answer within 0\.001 s"):
            await ServeInferencer(handle, timeout_s=0.001).infer(batch)
        result = await ServeInferencer(handle, timeout_s=60).infer(batch[:3])
        assert result.features.tobytes() == engine.infer(batch[:3]).features.tobytes()

    asyncio.run(main())


def test_a_replica_that_dies_comes_back_with_the_same_bits(
    ray_runtime: object, engine: Engine
) -> None:
    """Until then its caller meets nothing but TransientError, in flight or still waiting."""
    name = f"{APP_NAME}-dies"
    handle = serve.run(build_model_deployment(SETTINGS, SERVE), name=name, route_prefix=None)
    batch = windows_of(200)
    expected = engine.infer(batch).features.tobytes()

    async def main() -> None:
        inferencer = ServeInferencer(handle, timeout_s=3)
        in_flight = asyncio.create_task(inferencer.infer(windows_of(3000)))
        await inferencer.describe()  # sent later and answered: the long call is at the replica
        ray.kill(replica_of(name))
        with pytest.raises(TransientError):
            await in_flight
        async with asyncio.timeout(120):
            while True:
                try:
                    result = await inferencer.infer(batch)
                    break
                except TransientError:
                    await asyncio.sleep(0.1)  # a caller backs off
        assert result.features.tobytes() == expected

    try:
        asyncio.run(main())
    finally:
        serve.delete(name)


def test_a_gpu_must_be_asked_for() -> None:
    with pytest.raises(ConfigError, match=r"'cuda', but serve\.model_num_gpus is 0"):
        build_model_deployment(ModelSettings(device="cuda"), SERVE)


def replica_of(app_name: str) -> Any:
    (actor,) = (
        actor
        for actor in ray.util.list_named_actors(all_namespaces=True)
        if actor["name"].startswith(f"SERVE_REPLICA::{app_name}#")
    )
    return ray.get_actor(actor["name"], namespace=actor["namespace"])
