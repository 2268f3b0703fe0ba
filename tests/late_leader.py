"""A broker whose leader is late: a proxy before a real one that has a first request refused."""

import asyncio
import struct
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import Literal

from schemas.settings import Settings

_LENGTH = struct.Struct(">i")
_HEAD = struct.Struct(">h")
_NUMBERS = {"produce": 0, "list_offsets": 2}  # Kafka's of its requests


class LateLeader:
    """Stands between clients and a broker; the first request that names the topic is refused.

    The broker gets it for a topic that it does not have, and the client reads its own name in the
    answer. A request to produce is held until the next one is there, so that both are under way.

    Attributes:
        bootstrap_servers: where clients come to it.
        num_refused: requests so far, 0 or 1.
    """

    def __init__(self, bootstrap_servers: str, topic: str, request: str) -> None:
        host, port = bootstrap_servers.rsplit(":", 1)
        self._host, self._port = host, int(port)
        self._topic = topic.encode()
        self._no_topic = b"x" * len(self._topic)
        self._request = request
        self._held: bytes | None = None
        self.bootstrap_servers = ""
        self.num_refused = 0

    async def serve(self, ready: threading.Event) -> None:
        """Until ``stop``; whoever runs this cancels the connections that are left."""
        self._loop, self._stopping = asyncio.get_running_loop(), asyncio.Event()
        server = await asyncio.start_server(self._join, self._host, 0)
        self._own_port = server.sockets[0].getsockname()[1]
        self.bootstrap_servers = f"{self._host}:{self._own_port}"
        ready.set()
        await self._stopping.wait()
        server.close()
        await asyncio.sleep(0)  # for a connection that has not begun, and could not end

    def through(self, settings: Settings) -> Settings:
        """The same, for clients that come this way and have several small requests under way."""
        client = settings.kafka.client | {"batch.num.messages": 4, "linger.ms": 20}
        update = {"bootstrap_servers": self.bootstrap_servers, "client": client}
        return settings.model_copy(update={"kafka": settings.kafka.model_copy(update=update)})

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._stopping.set)

    async def _join(self, client: asyncio.StreamReader, answers: asyncio.StreamWriter) -> None:
        async with _closing(answers):
            broker, requests = await asyncio.open_connection(self._host, self._port)
            async with _closing(requests):
                ways = self._ask(client, requests), self._answer(broker, answers)
                both = [asyncio.create_task(way) for way in ways]
                try:
                    await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    for way in both:
                        way.cancel()
                    await asyncio.gather(*both, return_exceptions=True)

    async def _ask(self, client: asyncio.StreamReader, requests: asyncio.StreamWriter) -> None:
        while True:
            for frame in self._refused(await _read(client)):
                requests.write(_LENGTH.pack(len(frame)) + frame)

    def _refused(self, frame: bytes) -> list[bytes]:
        """What the broker gets now, for one request of a client."""
        (number,) = _HEAD.unpack_from(frame)
        if number != _NUMBERS[self._request] or self._topic not in frame or self.num_refused:
            return [frame]
        if self._request == "produce" and self._held is None:
            self._held = frame
            return []
        self.num_refused += 1
        refused = self._held or frame
        behind = [frame] if self._held else []
        return [refused.replace(self._topic, self._no_topic), *behind]

    async def _answer(self, broker: asyncio.StreamReader, answers: asyncio.StreamWriter) -> None:
        host = self._host.encode()
        while True:
            frame = (await _read(broker)).replace(self._no_topic, self._topic)
            ports = (host + _LENGTH.pack(port) for port in (self._port, self._own_port))
            frame = frame.replace(*ports)  # or clients would go on without the proxy
            answers.write(_LENGTH.pack(len(frame)) + frame)


@asynccontextmanager
async def _closing(writer: asyncio.StreamWriter) -> AsyncIterator[None]:
    try:
        yield
    finally:
        writer.close()
        with suppress(ConnectionError):
            await writer.wait_closed()


async def _read(stream: asyncio.StreamReader) -> bytes:
    (length,) = _LENGTH.unpack(await stream.readexactly(_LENGTH.size))
    return await stream.readexactly(length)


@contextmanager
def late_leader(
    bootstrap_servers: str, topic: str, request: Literal["produce", "list_offsets"] = "produce"
) -> Iterator[LateLeader]:
    """One that serves on a thread of its own."""
    leader = LateLeader(bootstrap_servers, topic, request)
    ready = threading.Event()
    thread = threading.Thread(target=lambda: asyncio.run(leader.serve(ready)))
    thread.start()
    assert ready.wait(10)
    try:
        yield leader
    finally:
        leader.stop()
        thread.join(10)
