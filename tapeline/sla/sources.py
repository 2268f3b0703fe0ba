"""Where figures come from: a bench report, or Prometheus."""

import json
import math
import urllib.error
import urllib.parse
import urllib.request

from schemas.errors import ConfigError
from schemas.timing import STAGES
from tapeline.bench.report import BenchReport
from tapeline.sla.rules import Figures

_TIMEOUT_S = 10.0


def from_report(report: BenchReport) -> Figures:
    """What a bench measured. Without ``metrics.port`` it knows nothing of stages and machines."""
    seconds = len(report.seconds) or 1
    return Figures(
        latency_ms=report.latency_ms,
        asked_per_s=report.asked / seconds,
        per_s=report.per_s,
        availability=report.availability,
        errors=1 - report.answered / report.asked if report.asked else None,
        use_percent=report.use_percent,
        has_gpu="gpu" in report.use_percent,
        stages_ms=report.stages_ms,
        windows_a_call=report.windows_a_call,
        late_ms=report.late_ms,
    )


def from_prometheus(url: str, over: str, lane: str) -> Figures:
    """Of the last ``over`` (Prometheus' notation: ``15m``).

    A histogram does not know its largest value: ``max`` stays unknown.

    Raises ConfigError: no Prometheus answers there.
    """

    def ask(expression: str) -> float | None:
        value = _query(url, expression.replace("RANGE", over).replace("LANE", lane))
        return None if value is None or math.isnan(value) else value

    def share(name: str) -> str:
        return f'sum(increase({name}{{lane="LANE"}}[RANGE]))'

    latency = 'sum by (le) (increase(tapeline_latency_seconds_bucket{lane="LANE"}[RANGE]))'
    latency_ms = {
        name: 1000 * seconds
        for name, quantile in (("p50", 0.5), ("p95", 0.95), ("p99", 0.99))
        if (seconds := ask(f"histogram_quantile({quantile}, {latency})")) is not None
    }
    stage = 'tapeline_stage_seconds_{part}{{lane="LANE",stage="{stage}"}}[RANGE]'
    stages_ms = {
        name: 1000 * seconds
        for name in STAGES
        if (
            seconds := ask(
                f"sum(increase({stage.format(part='sum', stage=name)})) / "
                f"sum(increase({stage.format(part='count', stage=name)}))"
            )
        )
        is not None
    }
    requests, failed = (
        share(f"cnn_lstm_prediction_{what}_total") for what in ("requests", "errors")
    )
    use_percent = {
        name: value
        for name in ("cpu", "memory", "gpu")
        if (value := ask(f"max(max_over_time(cnn_lstm_{name}_utilization_percent[RANGE]))"))
        is not None
    }
    records = 'sum(rate(tapeline_records_total{{lane="LANE",outcome="{}"}}[RANGE]))'
    return Figures(
        latency_ms=latency_ms,
        asked_per_s=ask(records.format("records")),
        per_s=ask(records.format("features")),
        availability=ask('avg(avg_over_time(up{job="tapeline",part!="run"}[RANGE]))'),
        errors=ask(f"{failed} / {requests}"),
        use_percent=use_percent,
        has_gpu="gpu" in use_percent,
        stages_ms=stages_ms,
        windows_a_call=ask(
            "sum(increase(cnn_lstm_batch_size_sum[RANGE])) / "
            "sum(increase(cnn_lstm_batch_size_count[RANGE]))"
        ),
    )


def _query(url: str, expression: str) -> float | None:
    query = urllib.parse.urlencode({"query": expression})
    try:
        with urllib.request.urlopen(f"{url}/api/v1/query?{query}", timeout=_TIMEOUT_S) as answer:
            found = json.load(answer)["data"]["result"]
    except urllib.error.HTTPError as error:
        raise ConfigError(
            f"Prometheus at {url} refuses a query: {error.read().decode()}"
        ) from error
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"no Prometheus answers at {url}: {error}") from error
    return float(found[0]["value"][1]) if found else None
