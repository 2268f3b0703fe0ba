"""What stands around the processor must answer, or say in one sentence how to mend it."""

import asyncio

import pytest

from consumers.dedup import open_first_seen
from consumers.metrics import LaneCounts
from schemas.errors import ConfigError
from schemas.settings import load_settings
from tapeline.app import ray_session
from tapeline.processes import free_ports


def test_an_address_without_ray_is_named() -> None:
    (port,) = free_ports(1)
    settings = load_settings(serve={"address": f"127.0.0.1:{port}"})
    with (
        pytest.raises(ConfigError, match=rf"no Ray cluster answers at 127\.0\.0\.1:{port}: .*`ray"),
        ray_session(settings),
    ):
        pytest.fail("there is no cluster to work on")


def test_the_password_of_redis_is_not_shown() -> None:
    (port,) = free_ports(1)
    settings = load_settings(redis={"url": f"redis://me:hush@127.0.0.1:{port}/0"})
    with pytest.raises(ConfigError) as caught:
        asyncio.run(open_first_seen(settings.redis))
    assert f"no Redis answers at redis://***@127.0.0.1:{port}/0" in str(caught.value)
    assert "hush" not in str(caught.value)


def test_counts_add_up_to_what_is_still_in_flight() -> None:
    counts = LaneCounts(records=21, features=6, warm_up=5, thinned=4, duplicates=3, dead_letters=2)
    assert counts.in_flight == 1
    assert (counts + LaneCounts(records=1, abandoned=1)).in_flight == 1
