"""The HTTP door on the real Ray Serve, through its proxy: beside Kafka, with the same bits."""

import json
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pipeline import LONG_S, features, produce
from waiting import wait_until

from inference.artifact import load_artifact, save_artifact
from inference.engine import Engine
from inference.model import ModelConfig
from inference.seeded import seeded_artifact
from schemas.settings import Settings
from tapeline.app import ServeApplication
from tapeline.simulator import simulate, symbol_names
from tapeline.topics import ensure_topics

MakeSettings = Callable[..., Settings]


def test_the_door_answers_with_the_engine_s_bits_and_the_latest_features(
    make_settings: MakeSettings, ray_runtime: int, tmp_path: Path
) -> None:
    config = ModelConfig(
        conv_channels=(8,), lstm_hidden=16, lstm_layers=1, num_features=8, score_names=("up",)
    )
    save_artifact(seeded_artifact(config=config), tmp_path / "model")
    settings = make_settings(
        model={"artifact": tmp_path / "model", "device": "cpu", "max_batch": 32},
        serve={"app_name": "door", "worker_num_cpus": 0.2, "model_num_cpus": 0.2},
        http={"enabled": True, "port": ray_runtime, "token": "secret"},
    )
    ensure_topics(settings)
    url = f"http://127.0.0.1:{ray_runtime}"

    def ask(path: str, body: bytes | None = None, **headers: str) -> tuple[int, bytes]:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        request = urllib.request.Request(
            url + path, body, {"Authorization": "Bearer secret"} | named
        )
        try:
            with urllib.request.urlopen(request, timeout=LONG_S) as reply:
                return reply.status, reply.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()

    application = ServeApplication(settings)
    application.deploy()
    try:
        wait_until(lambda: ask("/readyz")[0] == 200, LONG_S, "the door to be ready")
        windows = np.random.default_rng(1).normal(0, 2, (5, 50, 60)).astype("<f4")
        expected = Engine(load_artifact(tmp_path / "model"), device="cpu").infer(windows)
        raw = "application/octet-stream"
        code, body = ask("/v1/features", windows.tobytes(), Content_Type=raw, Accept=raw)
        assert code == 200, body
        rows = np.frombuffer(body, "<f4").reshape(5, 9)
        assert rows[:, :8].tobytes() == expected.features.tobytes()
        assert rows[:, 8:].tobytes() == expected.scores.tobytes()
        as_json = json.dumps({"windows": windows[:1].tolist()}).encode()
        code, body = ask("/v1/features", as_json, Content_Type="application/json")
        assert code == 200, body
        made: Any = json.loads(body)
        assert made["model_version"] == expected.model_version
        assert made["scores"] == [{"up": pytest.approx(float(expected.scores[0, 0]))}]
        assert ask("/v1/features", as_json, Content_Type="application/json",
                   Authorization="Bearer wrong")[0] == 401  # fmt: skip

        symbol = symbol_names(1)[0]
        assert ask(f"/v1/features/SIM/{symbol}")[0] == 404
        events = list(simulate(symbols=[symbol], seed=1, start_time_us=10**15, num_events=100))
        produce(settings, events, "realtime")
        last = features(settings, 41)[-1].feature
        path = f"/v1/features/{last.venue}/{last.symbol}"
        wait_until(
            lambda: json.loads(ask(path)[1]).get("event_id") == events[-1].event_id,
            LONG_S,
            "the last features to be at the door",
        )
        assert json.loads(ask(path)[1])["features"] == last.features.tolist()
    finally:
        application.delete()
