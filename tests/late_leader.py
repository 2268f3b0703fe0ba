"""A broker whose leader is late: a proxy before a real one that has a first request refused."""

import asyncio
import struct
import threading
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Literal

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
        self._connections: set[asyncio.Task[None]] = set()
        self.bootstrap_servers = ""
        self.num_refused = 0

    async def open(self) -> None:
        self._server = await asyncio.start_server(self._join, self._host, 0)
        self._own_port = self._server.sockets[0].getsockname()[1]
        self.bootstrap_servers = f"{self._host}:{self._own_port}"

    async def close(self) -> None:
        self._server.close()
        for connection in self._connections:
            connection.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    async def _join(self, client: asyncio.StreamReader, answers: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task
        self._connections.add(task)
        broker, requests = await asyncio.open_connection(self._host, self._port)
        ways = self._ask(client, requests), self._answer(broker, answers)
        both = [asyncio.create_task(way) for way in ways]
        try:
            await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for way in both:
                way.cancel()
            await asyncio.gather(*both, return_exceptions=True)
            for writer in (requests, answers):
                writer.close()
                with suppress(ConnectionError):
                    await writer.wait_closed()

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


async def _read(stream: asyncio.StreamReader) -> bytes:
    (length,) = _LENGTH.unpack(await stream.readexactly(_LENGTH.size))
    return await stream.readexactly(length)


@contextmanager
def late_leader(
    bootstrap_servers: str, topic: str, request: Literal["produce", "list_offsets"] = "produce"
) -> Iterator[LateLeader]:
    """One that serves on a thread of its own."""
    leader = LateLeader(bootstrap_servers, topic, request)
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    def on_loop(call: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(call, loop).result(10)

    try:
        on_loop(leader.open())
        try:
            yield leader
        finally:
            on_loop(leader.close())
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()
