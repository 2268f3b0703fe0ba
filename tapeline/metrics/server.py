"""The HTTP endpoint of ``metrics.port``: metrics, and where all others are.

``/metrics`` is this process's own. ``/targets`` lists every worker and model replica, as Prometheus
asks for them (``http_sd_configs``), so that one scrape config finds all, wherever Ray put them.
``/`` is a page that shows them, ``/snapshot`` its figures; they cost nothing until someone looks.
"""

import json
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from socketserver import ThreadingMixIn
from typing import Any, cast
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import make_wsgi_app
from prometheus_client.registry import CollectorRegistry

from schemas.errors import ConfigError, TapelineError
from schemas.exposition import Target
from tapeline.metrics.snapshot import Sampler

_PAGE = Path(__file__).with_name("page.html")
_PAGE_HEADERS = [
    (
        "Content-Security-Policy",
        "default-src 'none'; connect-src 'self'; script-src 'unsafe-inline'; "
        "style-src 'unsafe-inline'; frame-ancestors 'none'",
    ),
    ("X-Content-Type-Options", "nosniff"),
]
Targets = Callable[[], Sequence[Target]]


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True


class _Silent(WSGIRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        """Not a line for every scrape."""


@contextmanager
def metrics_server(
    port: int,
    registry: CollectorRegistry,
    others: Targets,
    part: str,
    prometheus: str | None = None,
) -> Iterator[int]:
    """Serves until the context ends; yields the port.

    Args:
        port: 0: any that is free.
        others: the other processes with metrics; may block, and may raise TapelineError.
        part: what this one is.
        prometheus: whose alerts the page shows.

    Raises ConfigError: the port is taken.
    """
    metrics = make_wsgi_app(registry)
    sampler: Sampler

    def application(environ: dict[str, Any], start: Any) -> Iterable[bytes]:
        path = environ["PATH_INFO"]
        if path == "/metrics":
            return cast(Iterable[bytes], metrics(environ, start))
        if path == "/targets":
            here = Target(environ["HTTP_HOST"], part)
            return _answer(lambda: _as_json(_groups([here, *others()])), start)
        if path == "/snapshot":
            return _answer(lambda: _as_json(asdict(sampler.next())), start)
        if path == "/":
            start("200 OK", [("Content-Type", "text/html; charset=utf-8"), *_PAGE_HEADERS])
            return [_PAGE.read_bytes()]
        start("404 Not Found", [("Content-Type", "text/plain")])
        return [b"there are /, /metrics, /targets and /snapshot\n"]

    try:
        server = make_server("", port, application, _Server, _Silent)
    except OSError as error:
        raise ConfigError(
            f"cannot serve metrics on port {port}: {error.strerror}; set TAPELINE_METRICS__PORT"
        ) from error
    sampler = Sampler(f"http://127.0.0.1:{server.server_port}", prometheus)
    thread = threading.Thread(target=server.serve_forever, name="metrics", daemon=True)
    thread.start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()


def _answer(make: Callable[[], bytes], start: Any) -> Iterable[bytes]:
    try:
        body = make()
    except TapelineError as error:  # Prometheus keeps the targets that it knew
        start("503 Service Unavailable", [("Content-Type", "text/plain; charset=utf-8")])
        return [f"{error}\n".encode()]
    start("200 OK", [("Content-Type", "application/json")])
    return [body]


def _groups(targets: Sequence[Target]) -> list[dict[str, Any]]:
    """As Prometheus' HTTP service discovery wants them."""
    return [{"targets": [one.address], "labels": {"part": one.part}} for one in targets]


def _as_json(document: Any) -> bytes:
    return json.dumps(document).encode()
