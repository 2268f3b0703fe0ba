"""When the machine runs short: what counts, what is measured, and on which cores work is done."""

import asyncio
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from prometheus_client import CollectorRegistry
from stand_ins import FakeModel

from consumers.dedup import open_first_seen
from consumers.guard import ResourceGuard, Restraint
from consumers.scheduler import LaneScheduler
from consumers.service_times import ServiceTimes
from consumers.worker import Worker
from inference.client import LocalInferencer, ModelDescription, engine_thread
from inference.engine import load_engine
from schemas.errors import ConfigError
from schemas.guard import GuardSettings
from schemas.placement import pin_thread
from schemas.resources import ControlGroup, ResourceMeter, ResourceUsage
from schemas.settings import ModelSettings, load_settings
from tapeline.app import run_worker

CORES = sorted(os.sched_getaffinity(0))
NO_CORE = 4095


# The settings.


def test_thresholds_are_those_of_the_design() -> None:
    guard = load_settings().guard
    assert (guard.cpu_target, guard.cpu_max) == (0.70, 0.85)
    assert (guard.memory_target, guard.memory_max) == (0.75, 0.90)
    assert (guard.gpu_memory_target, guard.gpu_memory_max) == (0.60, 0.80)


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        ({"memory_target": 0.9}, r"memory_target \(0\.9\) must be below memory_max \(0\.9\)"),
        ({"cpu_max": 0.5}, r"cpu_target \(0\.7\) must be below cpu_max \(0\.5\)"),
        ({"hysteresis": 0.6}, r"gpu_memory_target \(0\.6\) must be above hysteresis \(0\.6\)"),
        ({"cpu": "auto"}, "guard.cpu"),
        ({"memory_max": 1.5}, "guard.memory_max"),
        ({"memory_limit": 0.5}, "unknown setting 'memory_limit'"),
    ],
)
def test_thresholds_out_of_order_are_refused(overrides: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        load_settings(guard=overrides)


@pytest.mark.parametrize(
    ("settings", "device", "watched"),
    [
        ({}, "cpu", ("memory",)),
        ({}, "cuda", ("memory",)),  # else a GPU's engines, once built, would hold it back for ever
        ({"cpu": True}, "cpu", ("cpu", "memory")),
        ({"gpu_memory": True}, "cpu", ("memory",)),
        ({"cpu": True, "memory": False, "gpu_memory": True}, "cuda", ("cpu", "gpu_memory")),
    ],
)
def test_what_counts_depends_on_where_the_model_runs(
    settings: dict[str, Any], device: str, watched: tuple[str, ...]
) -> None:
    assert GuardSettings(**settings).watched(device) == watched


# The decision. Its invariants are in tests/property/test_guard_properties.py.


def test_worker_steps_back_and_forward_one_step_a_look() -> None:
    settings = load_settings()
    guard = ResourceGuard(settings.guard, settings.active_lanes, 256)
    guard.watch(["memory"])
    looks = [
        (0.74, 0, ()),
        (0.76, 1, ()),  # above the target: 128 at most
        (0.91, 2, ("background",)),  # above the max: lanes are held, too
        (0.91, 3, ("background", "historical")),
        (0.80, 4, ("background", "historical")),
        (0.72, 4, ("background", "historical")),  # below the target by less than the hysteresis
        (0.69, 4, ("background",)),
        (0.69, 4, ()),
        (0.69, 3, ()),  # micro-batches grow once no lane is held any more
        (0.76, 4, ()),
    ]
    for used, shrunk_by, held in looks:
        assert guard.look(ResourceUsage(cpu=1.0, memory=used)) == Restraint(shrunk_by, held)
    assert guard.statistics().steps == {
        ("memory", "shrink"): 5, ("memory", "grow"): 1,
        ("memory", "hold"): 2, ("memory", "release"): 2,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("max_batch", "num_halvings"), [(1, 0), (4, 0), (5, 1), (8, 1), (9, 1), (10, 2), (256, 6)]
)
def test_batches_shrink_to_the_smallest_bucket_and_no_further(
    max_batch: int, num_halvings: int
) -> None:
    settings = load_settings()
    guard = ResourceGuard(settings.guard, settings.active_lanes, max_batch)
    guard.watch(["memory"])
    for _ in range(10):
        guard.look(ResourceUsage(cpu=0, memory=0.8))
    assert guard.restraint.shrunk_by == num_halvings
    guard.configure(1024)
    assert guard.look(ResourceUsage(cpu=0, memory=0.8)).shrunk_by == num_halvings + 1


def test_step_is_counted_for_the_resource_that_is_shortest() -> None:
    settings = load_settings()
    guard = ResourceGuard(settings.guard, settings.active_lanes, 256)
    guard.watch(["cpu", "memory", "gpu_memory"])
    guard.look(ResourceUsage(cpu=0.95, memory=0.80, gpu_memory=0.70))
    guard.look(ResourceUsage(cpu=0.10, memory=0.80, gpu_memory=0.99))
    assert guard.statistics().steps == {
        ("cpu", "shrink"): 1, ("cpu", "hold"): 1,
        ("gpu_memory", "shrink"): 1, ("gpu_memory", "hold"): 1,
    }  # fmt: skip


def test_held_lane_queues_what_its_share_comes_to_in_a_second() -> None:
    settings = load_settings(lanes={"historical": {"max_queued_records": 20}})
    service_times = ServiceTimes()
    scheduler = LaneScheduler(
        settings.active_lanes, service_times, max_batch=256, max_service_share=0.2
    )
    held = ["background", "historical", "batch"]
    scheduler.restrain(1, held)
    assert scheduler.max_queued("background") == 4096, "nothing is known of the model yet"
    service_times.expect({256: 0.256})  # 1,000 records a second
    scheduler.restrain(1, held)
    limits = {lane.name: scheduler.max_queued(lane.name) for lane in settings.active_lanes}
    assert limits == {
        "realtime": 4096, "market-data": 4096, "batch": 150, "historical": 20, "background": 30,
    }  # fmt: skip
    scheduler.restrain(1, held[:1])
    assert scheduler.max_queued("batch") == 4096


def test_worker_shows_what_the_guard_saw_and_did() -> None:
    registry = CollectorRegistry()
    description = ModelDescription("m@1", "market50-v1", 50, 60, 4, ())
    settings = load_settings(redis={"url": None}, guard={"cpu": True})

    async def build() -> Worker:
        inferencer = LocalInferencer(FakeModel(lambda _: pytest.fail("never called"), description))
        return Worker(
            settings, inferencer, await open_first_seen(settings.redis), registry=registry
        )

    def value(name: str, **labels: str) -> float | None:
        return registry.get_sample_value(name, labels)

    worker = asyncio.run(build())
    assert worker.statistics().guard.usage is None
    assert value("tapeline_guard_looks_total") == 0
    assert value("tapeline_resource_used_ratio", resource="cpu") is None
    worker._guard.watch(settings.guard.watched("cpu"))
    worker._guard.look(ResourceUsage(cpu=0.9, memory=0.3))
    assert value("tapeline_guard_looks_total") == 1
    assert value("tapeline_resource_used_ratio", resource="cpu") == 0.9
    assert value("tapeline_resource_used_ratio", resource="memory") == 0.3
    assert value("tapeline_resource_used_ratio", resource="gpu_memory") is None
    assert value("tapeline_guard_steps_total", resource="cpu", step="shrink") == 1
    assert value("tapeline_guard_halvings") == 1
    assert value("tapeline_lane_held", lane="background") == 1
    assert value("tapeline_lane_held", lane="realtime") == 0


# The measurement.


def in_thread(work: Callable[[], None]) -> None:
    """Runs it in a thread of its own, whose affinity ends with it; raises what it raises."""
    with engine_thread() as thread:
        thread.submit(work).result()


def burn(cpu_s: float) -> None:
    end_s = time.thread_time() + cpu_s
    while time.thread_time() < end_s:
        pass


def test_processor_in_use_is_that_of_the_cores_that_we_may_run_on() -> None:
    def work() -> None:
        pin_thread("test", CORES[:1])
        meter = ResourceMeter(gpu=False)
        burn(0.5)  # whoever else runs: this core is busy all the time
        assert 0.9 <= meter.read().cpu <= 1.0

    in_thread(work)


def test_memory_in_use_is_the_machines() -> None:
    used = psutil.virtual_memory().percent / 100
    assert ResourceMeter(gpu=False).read().memory == pytest.approx(used, abs=0.05)
    assert ResourceMeter(gpu=False).read().gpu_memory is None


def write_group(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("_", ".")).write_text(text)


def group_in(root: Path, path: str) -> Path:
    """A control group's folder; this process is in it."""
    write_group(root / "proc/self", cgroup=f"0::{path}\n")
    return root / "sys/fs/cgroup" / path.lstrip("/")


@pytest.mark.parametrize("path", ["/", "/system.slice/tapeline.service", "/../elsewhere"])
def test_limit_of_the_own_group_or_of_one_around_it_counts(tmp_path: Path, path: str) -> None:
    folder = group_in(tmp_path, path)
    top = tmp_path / "sys/fs/cgroup"
    limited = top if path == "/../elsewhere" else folder
    assert ControlGroup(tmp_path).memory() == 0
    write_group(
        limited,
        memory_max="1000\n",
        memory_current="900\n",
        memory_stat="anon 500\ninactive_file 300\nslab 5\n",
    )
    assert ControlGroup(tmp_path).memory() == pytest.approx(0.6), "the kernel can take back 300"
    write_group(top, memory_max="max\n", memory_current="5000\n")
    expected = 0 if limited == top else 0.6
    assert ControlGroup(tmp_path).memory() == pytest.approx(expected)


def test_quota_of_a_group_counts_since_the_last_reading(tmp_path: Path) -> None:
    """The fullest of the groups around us, whatever was used before."""
    folder = group_in(tmp_path, "/outer/inner")
    write_group(folder, cpu_max="max 100000\n", cpu_stat="usage_usec 7000000\nuser_usec 1\n")
    now_s = [100.0]
    group = ControlGroup(tmp_path, clock=lambda: now_s[0])

    def read_after(seconds: float, used_us: int) -> float:
        now_s[0] += seconds
        write_group(folder, cpu_stat=f"usage_usec {used_us}\nuser_usec 1\n")
        return group.cpu()

    assert read_after(1, 7_900_000) == 0, "no quota"
    write_group(folder, cpu_max="50000 100000\n")
    assert read_after(2, 8_500_000) == pytest.approx(0.6), "0.3 of 0.5 cores"
    assert read_after(0, 8_600_000) == 0, "no time has passed"
    assert read_after(1, 9_600_000) == 1, "more than the quota, for a moment"
    write_group(folder.parent, cpu_max="25000 100000\n", cpu_stat="usage_usec 0\n")
    group.cpu()
    write_group(folder.parent, cpu_stat="usage_usec 200000\n")
    assert read_after(1, 9_700_000) == pytest.approx(0.8)


def test_groups_of_this_machine_can_be_read() -> None:
    group = ControlGroup()
    assert 0 <= group.memory() <= 1
    assert 0 <= group.cpu() <= 1


def num_gpus() -> int:
    torch = pytest.importorskip("torch")
    return int(torch.cuda.device_count())


@pytest.mark.skipif("not num_gpus()", reason="there is no GPU")
def test_gpu_memory_in_use_grows_with_what_is_taken() -> None:
    import torch

    meter = ResourceMeter(gpu=True)
    before = meter.read().gpu_memory
    assert before is not None
    total_bytes = torch.cuda.get_device_properties(0).total_memory
    taken = torch.zeros(total_bytes // 10, dtype=torch.uint8, device="cuda")
    after = meter.read().gpu_memory
    assert after is not None
    assert after - before > 0.08
    del taken


# On which cores work is done.


def test_pinned_thread_and_those_that_it_starts_run_there() -> None:
    found: list[set[int]] = []

    def work() -> None:
        pin_thread("test", CORES[-1:])
        child = threading.Thread(target=lambda: found.append(os.sched_getaffinity(0)))
        child.start()
        child.join()
        found.append(os.sched_getaffinity(0))

    in_thread(work)
    assert found == [{CORES[-1]}] * 2
    assert os.sched_getaffinity(0) == set(CORES)


def test_core_that_is_not_there_is_named_and_nothing_changes() -> None:
    for cores in ([NO_CORE], [CORES[0], NO_CORE]):
        with pytest.raises(ConfigError, match=r"worker\.cpu_affinity: core 4095 is not there"):
            pin_thread("worker.cpu_affinity", cores)
        assert os.sched_getaffinity(0) == set(CORES)


def test_every_thread_of_a_process_is_pinned_and_an_engine_may_leave() -> None:
    """The model's cores need not be among the worker's."""
    program = f"""
import os, threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from schemas.placement import pin_process, pin_thread
old = ThreadPoolExecutor(1)
old.submit(int).result()
pin_process("worker.cpu_affinity", [{CORES[0]}])
for task in Path("/proc/self/task").iterdir():
    assert os.sched_getaffinity(int(task.name)) == {{{CORES[0]}}}, task
engine = ThreadPoolExecutor(1, initializer=lambda: pin_thread("model", [{CORES[-1]}]))
print(engine.submit(lambda: os.sched_getaffinity(0)).result(), old.submit(int).result())
"""
    found = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert (found.returncode, found.stdout) == (0, f"{{{CORES[-1]}}} 0\n"), found.stderr


def test_engine_runs_on_the_models_cores() -> None:
    def work() -> None:
        load_engine(ModelSettings(max_batch=4, device="cpu", cpu_affinity=CORES[-1:]))
        assert os.sched_getaffinity(0) == {CORES[-1]}

    in_thread(work)


@pytest.mark.parametrize("section", ["worker", "model"])
def test_worker_refuses_cores_that_are_not_there(section: str) -> None:
    settings = load_settings(**{section: {"cpu_affinity": [NO_CORE]}}, redis={"url": None})
    with pytest.raises(ConfigError, match=rf"{section}\.cpu_affinity: core 4095 is not there"):
        asyncio.run(run_worker(settings, on_started=lambda: pytest.fail("it started")))


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        ({"worker": {"cpu_affinity": [-1]}}, "worker.cpu_affinity"),
        ({"worker": {"cpu_affinity": 3}}, "worker.cpu_affinity"),
        (
            {"model": {"num_threads": 2, "cpu_affinity": [1, 1]}},
            r"num_threads \(2\) must not be above the number of cores in cpu_affinity \(1\)",
        ),
    ],
)
def test_cores_that_cannot_be_are_refused(overrides: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        load_settings(**overrides)
