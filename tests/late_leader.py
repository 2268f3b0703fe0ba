"""Brokers whose leader is late, or unsure: proxies before a real one."""

import asyncio
import struct
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import Literal, TypeVar

from schemas.settings import Settings

_LENGTH = struct.Struct(">i")
_HEAD = struct.Struct(">h")
_NUMBERS = {"produce": 0, "list_offsets": 2}  # Kafka's of its requests
_REQUEST = struct.Struct(">hhi")  # number and version of a request, and what its answer bears
_FIRST_FLEXIBLE = 9  # version of a request to produce
_REQUEST_TIMED_OUT = 7

Leader = TypeVar("Leader", bound="_Proxy")


class _Proxy:
    """Stands between clients and a broker, and has its way with what names the topic.

    Attributes:
        bootstrap_servers: where clients come to it.
    """

    def __init__(self, bootstrap_servers: str, topic: str) -> None:
        host, port = bootstrap_servers.rsplit(":", 1)
        self._host, self._port = host, int(port)
        self._topic = topic.encode()
        self._held: bytes | None = None
        self.bootstrap_servers = ""

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
            for frame in self._asked(await _read(client)):
                requests.write(_LENGTH.pack(len(frame)) + frame)

    def _asked(self, frame: bytes) -> list[bytes]:
        """What the broker gets now, for one request of a client."""
        raise NotImplementedError

    async def _answer(self, broker: asyncio.StreamReader, answers: asyncio.StreamWriter) -> None:
        host = self._host.encode()
        while True:
            frame = self._answered(await _read(broker))
            ports = (host + _LENGTH.pack(port) for port in (self._port, self._own_port))
            frame = frame.replace(*ports)  # or clients would go on without the proxy
            answers.write(_LENGTH.pack(len(frame)) + frame)

    def _answered(self, frame: bytes) -> bytes:
        """What the client gets of an answer."""
        raise NotImplementedError


class LateLeader(_Proxy):
    """The first request that names the topic is refused.

    The broker gets it for a topic that it does not have, and the client reads its own name in the
    answer. A request to produce is held until the next one is there, so that both are under way.

    Attributes:
        num_refused: requests so far, 0 or 1.
    """

    def __init__(self, bootstrap_servers: str, topic: str, request: str) -> None:
        super().__init__(bootstrap_servers, topic)
        self._no_topic = b"x" * len(self._topic)
        self._request = request
        self.num_refused = 0

    def _asked(self, frame: bytes) -> list[bytes]:
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

    def _answered(self, frame: bytes) -> bytes:
        return frame.replace(self._no_topic, self._topic)


class UnsureLeader(_Proxy):
    """The second request to produce to the topic is taken, and its answer says: perhaps.

    As where a follower dies before it has the records. The third is held back until then, so that
    its answer comes while the client waits to send the second again.

    Attributes:
        num_unsure: answers so far, 0 or 1.
    """

    def __init__(self, bootstrap_servers: str, topic: str) -> None:
        super().__init__(bootstrap_servers, topic)
        self.num_unsure = 0
        self._num_asked = 0
        self._unsure: tuple[int, int] | None = None  # which request: its number, and its version

    def _asked(self, frame: bytes) -> list[bytes]:
        number, version, correlation = _REQUEST.unpack_from(frame)
        if number != _NUMBERS["produce"] or self._topic not in frame:
            return [frame]
        self._num_asked += 1
        if self._num_asked == 2:
            self._held, self._unsure = frame, (correlation, version)
            return []
        held, self._held = self._held, None
        return [held, frame] if held else [frame]

    def _answered(self, frame: bytes) -> bytes:
        (correlation,) = _LENGTH.unpack_from(frame)
        if self._unsure is None or correlation != self._unsure[0] or self._topic not in frame:
            return frame
        self.num_unsure += 1
        _, version = self._unsure
        self._unsure = None
        # Behind the name: how many partitions, which one, its error.
        place = frame.index(self._topic) + len(self._topic)
        place += 5 if version >= _FIRST_FLEXIBLE else 8
        return frame[:place] + _HEAD.pack(_REQUEST_TIMED_OUT) + frame[place + _HEAD.size :]


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
    with _serving(LateLeader(bootstrap_servers, topic, request)) as leader:
        yield leader


@contextmanager
def unsure_leader(bootstrap_servers: str, topic: str) -> Iterator[UnsureLeader]:
    """The same."""
    with _serving(UnsureLeader(bootstrap_servers, topic)) as leader:
        yield leader


@contextmanager
def _serving(leader: Leader) -> Iterator[Leader]:
    ready = threading.Event()
    thread = threading.Thread(target=lambda: asyncio.run(leader.serve(ready)))
    thread.start()
    assert ready.wait(10)
    try:
        yield leader
    finally:
        leader.stop()
        thread.join(10)
