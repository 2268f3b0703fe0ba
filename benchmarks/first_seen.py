"""What the first-seen table costs Redis: pages of ids, as they are, against a key for each id.

    python -m benchmarks.first_seen [--ids 300000] [--rounds 3] [--json]

Starts a Redis of its own, with the stack's config. Processor time of Redis and of this process (the
client) an id, all ids new; and Redis's memory an id. The least of the rounds, in turns.
"""

import argparse
import asyncio
import json
import time
import uuid
from collections.abc import Awaitable, Callable, Sequence

import msgspec
import psutil
from redis.asyncio import Redis

from benchmarks.tape import parts, print_rows
from consumers.dedup import open_first_seen
from schemas.settings import Settings
from tapeline.machine import this_machine

_A_KEY_EACH = """
local ttl, prefix, given = ARGV[1], ARGV[2], cmsgpack.unpack(ARGV[3])
local ids, sources, known = given[1], given[2], {}
for i, id in ipairs(ids) do
  local first = redis.call('SET', prefix .. id, sources[i], 'NX', 'GET', 'EX', ttl)
  if first then known[#known + 1] = {i - 1, first} end
end
return cmsgpack.pack(known)
"""

_Ask = Callable[[Sequence[str], Sequence[str]], Awaitable[object]]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ids", type=int, default=300_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with parts() as settings:
        rows = asyncio.run(_measure_all(settings, options.ids, options.rounds))
    if options.json:
        print(json.dumps({"machine": str(this_machine()), "rows": rows}, indent=2))
        return
    print(f"{this_machine()}; {options.ids:,} ids\n")
    print_rows(rows, num_left=2)


async def _measure_all(
    settings: Settings, num_ids: int, rounds: int
) -> list[dict[str, str | int | float]]:
    found: dict[tuple[str, int], list[tuple[float, float, float]]] = {}
    for _ in range(rounds):
        for batch in (16, 256, 1024):
            for way in ("pages", "a key each"):
                costs = await _measure(settings, way, num_ids * min(batch, 256) // 256, batch)
                found.setdefault((way, batch), []).append(costs)
    return [
        {"way": way, "batch": batch, "redis us": redis, "client us": client, "bytes": memory}
        for (way, batch), costs in found.items()
        for redis, client, memory in [[round(min(one), 2) for one in zip(*costs, strict=True)]]
    ]


async def _measure(
    settings: Settings, way: str, num_ids: int, batch: int
) -> tuple[float, float, float]:
    """Microseconds of Redis and of the client, and bytes, an id."""
    prefix = f"{uuid.uuid4().hex}:"
    url = settings.redis.url
    assert url
    client: Redis = Redis.from_url(url)
    changes = {"key_prefix": prefix, "max_local_ids": 1}
    table = await open_first_seen(settings.redis.model_copy(update=changes))
    script = client.register_script(_A_KEY_EACH)

    async def ask(ids: Sequence[str], sources: Sequence[str]) -> object:
        if way == "pages":
            return await table.sightings(ids, sources)
        given = msgspec.msgpack.encode((ids, sources))
        return await script([], [settings.redis.ttl_s, prefix, given])

    process = psutil.Process((await client.info("server"))["process_id"])
    memory = (await client.info("memory"))["used_memory"]
    used_s, own_s = sum(process.cpu_times()[:2]), time.process_time()
    await _ask_all(ask, num_ids, batch)
    used_s, own_s = sum(process.cpu_times()[:2]) - used_s, time.process_time() - own_s
    memory = (await client.info("memory"))["used_memory"] - memory
    await client.flushall()
    await table.close()
    await client.aclose()
    return 1e6 * used_s / num_ids, 1e6 * own_s / num_ids, memory / num_ids


async def _ask_all(ask: _Ask, num_ids: int, batch: int) -> None:
    for start in range(0, num_ids, batch):
        numbers = range(start, min(start + batch, num_ids))
        await ask(
            [f"sim:5:1000000000000000:SYM{one % 100:04d}:{one}" for one in numbers],
            [f"market.realtime:{one % 48}:{one}" for one in numbers],
        )


if __name__ == "__main__":
    main()
