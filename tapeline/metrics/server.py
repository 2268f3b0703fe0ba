"""The HTTP endpoint of ``metrics.port``: metrics, and where all others are.

``/metrics`` is this process's own. ``/targets`` lists every worker and model replica, as Prometheus
asks for them (``http_sd_configs``), so that one scrape config finds all, wherever Ray put them.
"""

import json
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from socketserver import ThreadingMixIn
from typing import Any, cast
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import make_wsgi_app
from prometheus_client.registry import CollectorRegistry

from schemas.errors import ConfigError, TapelineError
from schemas.exposition import Target

Targets = Callable[[], Sequence[Target]]


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True


class _Silent(WSGIRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        """Not a line for every scrape."""


@contextmanager
def metrics_server(
    port: int, registry: CollectorRegistry, others: Targets, part: str
) -> Iterator[int]:
    """Serves until the context ends; yields the port.

    Args:
        port: 0: any that is free.
        others: the other processes with metrics; may block, and may raise TapelineError.
        part: what this one is.

    Raises ConfigError: the port is taken.
    """
    metrics = make_wsgi_app(registry)

    def application(environ: dict[str, Any], start: Any) -> Iterable[bytes]:
        path = environ["PATH_INFO"]
        if path == "/metrics":
            return cast(Iterable[bytes], metrics(environ, start))
        if path == "/targets":
            here = Target(environ["HTTP_HOST"], part)
            return _answer_targets(here, others, start)
        start("404 Not Found", [("Content-Type", "text/plain")])
        return [b"there are /metrics and /targets\n"]

    try:
        server = make_server("", port, application, _Server, _Silent)
    except OSError as error:
        raise ConfigError(
            f"cannot serve metrics on port {port}: {error.strerror}; set TAPELINE_METRICS__PORT"
        ) from error
    thread = threading.Thread(target=server.serve_forever, name="metrics", daemon=True)
    thread.start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()


def _answer_targets(here: Target, others: Targets, start: Any) -> Iterable[bytes]:
    try:
        found = [here, *others()]
    except TapelineError as error:  # Prometheus keeps those that it knew
        start("503 Service Unavailable", [("Content-Type", "text/plain")])
        return [f"{error}\n".encode()]
    groups = [{"targets": [one.address], "labels": {"part": one.part}} for one in found]
    start("200 OK", [("Content-Type", "application/json")])
    return [json.dumps(groups).encode()]
