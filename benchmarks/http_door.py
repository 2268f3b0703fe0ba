"""What the HTTP door takes for an answer, through Ray Serve's proxy, with the default CPU model.

    python -m benchmarks.http_door [--clients 1,4] [--seconds 5] [--rounds 3] [--json]

Starts a broker, a Redis and a Ray of its own with ``tapeline run``'s deployments. Each client asks
for the features of one window, one request after the other on a connection of its own; JSON and raw
float32 take turns within a round. Milliseconds from request to the answer's last byte; medians over
the rounds. Clients, door, proxy and model share the machine.
"""

import argparse
import http.client
import json
import statistics
import threading
import time
from dataclasses import asdict, dataclass

import numpy as np

from benchmarks.tape import parts
from schemas.settings import Settings
from tapeline.app import ServeApplication, ray_session
from tapeline.machine import this_machine
from tapeline.processes import free_ports
from tapeline.topics import ensure_topics

_JSON, _RAW = "application/json", "application/octet-stream"


@dataclass(frozen=True, slots=True)
class Door:
    """Requests of so many clients at once, in one form."""

    clients: int
    form: str
    p50_ms: float
    p95_ms: float
    p99_ms: float
    requests_per_s: float


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clients", default="1,4")
    parser.add_argument("--seconds", type=float, default=5, help="of each form in each round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()

    machine = str(this_machine())
    http = {"enabled": True, "port": free_ports(1)[0], "requests_per_minute": 0}
    with parts(http=http) as settings, ray_session(settings, log_to_driver=False):
        ensure_topics(settings)
        application = ServeApplication(settings)
        application.deploy()
        cases = [(int(one), form) for one in options.clients.split(",") for form in (_JSON, _RAW)]
        _measure(settings, 1, _JSON, 1.0)  # warm-up
        rounds = [
            [_measure(settings, clients, form, options.seconds) for clients, form in cases]
            for _ in range(options.rounds)
        ]
        application.delete()
    medians = [_median(list(one)) for one in zip(*rounds, strict=True)]
    if options.json:
        print(json.dumps({"machine": machine, "door": [asdict(one) for one in medians]}, indent=2))
        return
    print(f"{machine}; {options.rounds} rounds\n")
    print("| clients | form | p50 ms | p95 ms | p99 ms | requests/s |")
    print("| ---: | --- | ---: | ---: | ---: | ---: |")
    for one in medians:
        print(
            f"| {one.clients} | {one.form} | {one.p50_ms:.1f} | {one.p95_ms:.1f} "
            f"| {one.p99_ms:.1f} | {one.requests_per_s:,.0f} |"
        )


def _measure(settings: Settings, clients: int, form: str, seconds: float) -> Door:
    window = np.random.default_rng(0).normal(0, 1, (1, 50, 60)).astype("<f4")
    body = window.tobytes() if form == _RAW else json.dumps({"windows": window.tolist()}).encode()
    taken_ms: list[float] = []
    end_s = time.perf_counter() + seconds

    def ask_until_the_end() -> None:
        connection = http.client.HTTPConnection(settings.http.host, settings.http.port)
        while (begun_s := time.perf_counter()) < end_s:
            connection.request("POST", "/v1/features", body, {"Content-Type": form})
            reply = connection.getresponse()
            answer = reply.read()
            if reply.status != 200:
                raise SystemExit(f"the door answered {reply.status}: {answer!r}")
            taken_ms.append((time.perf_counter() - begun_s) * 1000)
        connection.close()

    threads = [threading.Thread(target=ask_until_the_end) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    p50, p95, p99 = np.percentile(taken_ms, [50, 95, 99]).tolist()
    return Door(clients, form, p50, p95, p99, len(taken_ms) / seconds)


def _median(rounds: list[Door]) -> Door:
    first = rounds[0]
    figures = {
        name: statistics.median(getattr(one, name) for one in rounds)
        for name in ("p50_ms", "p95_ms", "p99_ms", "requests_per_s")
    }
    return Door(first.clients, first.form, **figures)


if __name__ == "__main__":
    main()
