"""The HTTP door's contract: what it answers, what it refuses, and that nothing makes it fail.

A labelled fake stands for the model; ``tests/integration/test_http_door.py`` has the real one.
"""

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import schemathesis
from hypothesis import settings as hypothesis_settings
from numpy.typing import NDArray
from schemathesis.specs.openapi.checks import positive_data_acceptance
from stand_ins import FakeModel
from starlette.testclient import TestClient

from inference.client import Inference, LocalInferencer, ModelDescription
from schemas.errors import TransientError
from schemas.http import HttpSettings
from schemas.messages import FeatureVector, Flags
from tapeline.http.api import JSON, RAW, build_api
from tapeline.http.latest import LatestFeatures

MODEL = ModelDescription("m@1-00000000", "test-v1", 2, 3, 4, ("up", "down"))
WINDOW = [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]


def answer(windows: NDArray[np.float32]) -> Inference:
    """Features that tell which window they are of; 1e30 breaks the model, 1e31 takes it away."""
    if (windows == np.float32(1e31)).any():
        raise TransientError("the model gave no answer")
    sums = windows.sum(axis=(1, 2), keepdims=True)[:, :, 0]
    made = np.where(windows.max() == np.float32(1e30), np.nan, sums)
    return Inference(made * np.ones((1, 4), np.float32), made * np.ones((1, 2), np.float32), "m@1")


def feature(symbol: str, number: int, lane: str = "realtime") -> FeatureVector:
    return FeatureVector(
        f"e{number}", symbol, "SIM", number, lane, "m@1", "test-v1", "t", 0, number,
        np.full(4, number, np.float32), {"up": 0.5}, Flags.STALE,
    )  # fmt: skip


def api_of(latest: LatestFeatures | None = None, **changes: Any) -> Any:
    latest = latest or LatestFeatures(100)
    latest.is_reading = True
    inferencer = LocalInferencer(FakeModel(answer, MODEL))
    return build_api(HttpSettings(**{"requests_per_minute": 0} | changes), inferencer, latest)


@pytest.fixture
def client() -> Iterator[TestClient]:
    with TestClient(api_of()) as client:
        yield client


def test_windows_in_json_give_rows_in_their_order(client: TestClient) -> None:
    other = [[0.5, 0, 0], [0, 0, 0]]
    got = client.post("/v1/features", json={"windows": [WINDOW, other]})
    assert got.status_code == 200, got.text
    assert got.json() == {
        "model_version": "m@1",
        "features": [[21.0] * 4, [0.5] * 4],
        "scores": [{"up": 21.0, "down": 21.0}, {"up": 0.5, "down": 0.5}],
    }


def test_raw_windows_give_raw_rows(client: TestClient) -> None:
    body = np.array([WINDOW, WINDOW], "<f4").tobytes()
    got = client.post("/v1/features", content=body, headers={"content-type": RAW, "accept": RAW})
    assert got.headers["tapeline-model-version"] == "m@1"
    assert got.headers["content-type"] == RAW
    np.testing.assert_array_equal(
        np.frombuffer(got.content, "<f4").reshape(2, 6), np.full((2, 6), 21, np.float32)
    )
    as_json = client.post("/v1/features", content=body, headers={"content-type": RAW})
    assert as_json.json()["features"] == [[21.0] * 4] * 2


@pytest.mark.parametrize(
    ("body", "code", "says"),
    [
        (b"", 400, "the body must be"),
        (b"[]", 400, "the body must be"),
        (b'{"windows": 1}', 400, "the body must be"),
        (b'{"window": []}', 400, "the body must be"),
        (b'{"windows": [[[NaN, 2, 3], [4, 5, 6]]]}', 400, "the body must be"),
        (b'{"windows": [[["1", 2, 3], [4, 5, 6]]]}', 400, "the body must be"),
        (b'\xff{"windows": []}', 400, "the body must be"),
        (b'{"windows": []}', 422, "1 to 256 windows"),
        (b'{"windows": [[[1, 2, 3]]]}', 422, "window 0 is not 2 channels x 3 steps"),
        (b'{"windows": [[[1, 2, 3], [4, 5]]]}', 422, "window 0 is not 2 channels x 3 steps"),
        (b'{"windows": [[[1e39, 2, 3], [4, 5, 6]]]}', 422, "finite float32"),
        (b'{"windows": [[[1e30, 2, 3], [4, 5, 6]]]}', 422, "the model made NaN"),
        (b'{"windows": [[[1e31, 2, 3], [4, 5, 6]]]}', 503, "gave no answer; try again"),
    ],
)
def test_bad_windows_are_told_what_is_wrong(
    client: TestClient, body: bytes, code: int, says: str
) -> None:
    got = client.post("/v1/features", content=body, headers={"content-type": JSON})
    assert got.status_code == code, got.text
    assert says in got.json()["detail"]
    assert client.post("/v1/features", json={"windows": [WINDOW]}).status_code == 200


def test_other_forms_are_refused(client: TestClient) -> None:
    post = client.post
    as_csv = {"content-type": "text/csv"}
    assert post("/v1/features", content=b"x", headers=as_csv).status_code == 415
    as_html = {"accept": "text/html"}
    assert post("/v1/features", json={"windows": [WINDOW]}, headers=as_html).status_code == 406
    got = post("/v1/features", content=b"\0" * 25, headers={"content-type": RAW})
    assert got.status_code == 422
    assert "24 bytes; 25 is no multiple" in got.json()["detail"]
    nan = np.full((1, 2, 3), np.nan, "<f4").tobytes()
    assert post("/v1/features", content=nan, headers={"content-type": RAW}).status_code == 422


def test_limits_hold_whatever_the_headers_say() -> None:
    with TestClient(api_of(max_body_bytes=100, max_windows=2)) as client:

        def chunks() -> Iterator[bytes]:  # no content-length
            for _ in range(1000):
                yield b"\0" * 24

        got = client.post("/v1/features", content=chunks(), headers={"content-type": RAW})
        assert got.status_code == 413
        assert "100 bytes (http.max_body_bytes)" in got.json()["detail"]
        got = client.post("/v1/features", content=b"\0" * 72, headers={"content-type": RAW})
        assert got.status_code == 422
        assert "1 to 2 windows (http.max_windows)" in got.json()["detail"]


def test_a_token_is_demanded_of_all_but_probes() -> None:
    with TestClient(api_of(token="secret")) as client:
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "Basic secret"}):
            got = client.post("/v1/features", json={"windows": [WINDOW]}, headers=headers)
            assert got.status_code == 401, headers
            assert got.headers["www-authenticate"] == "Bearer"
            assert client.get("/v1/features/SIM/A", headers=headers).status_code == 401
        right = {"authorization": "Bearer secret"}
        assert client.post("/v1/features", json={"windows": [WINDOW]}, headers=right).is_success
        assert client.get("/healthz").is_success
        assert client.get("/readyz").is_success


def test_an_address_has_so_many_requests_a_minute() -> None:
    with TestClient(api_of(requests_per_minute=3)) as client:
        codes = [client.get("/v1/features/SIM/A").status_code for _ in range(5)]
        assert codes == [404, 404, 404, 429, 429]
        late = client.get("/v1/features/SIM/A")
        assert late.headers["retry-after"] == "1"
        assert "http.requests_per_minute (3)" in late.json()["detail"]
        assert client.get("/healthz").is_success


def test_the_latest_features_of_a_symbol() -> None:
    latest = LatestFeatures(2)
    with TestClient(api_of(latest)) as client:
        assert client.get("/v1/features/SIM/A").status_code == 404
        for one in (feature("A", 1), feature("A", 3), feature("A", 2, lane="batch")):
            latest.take(one)
        got = client.get("/v1/features/SIM/A").json()
        assert (got["event_id"], got["lane"], got["features"]) == ("e3", "realtime", [3.0] * 4)
        assert (got["scores"], got["flags"]) == ({"up": 0.5}, ["stale"])
        assert client.get("/v1/features/SIM/A?lane=batch").json()["event_id"] == "e2"
        assert client.get("/v1/features/SIM/A?lane=other").status_code == 404
        latest.take(feature("B", 4))
        latest.take(feature("C", 5))
        assert client.get("/v1/features/SIM/A").status_code == 404, "two are kept"
        assert client.get("/v1/features/SIM/C").is_success


def test_not_ready_until_features_are_read_along() -> None:
    latest = LatestFeatures(2)
    with TestClient(api_of(latest)) as client:
        assert client.get("/readyz").is_success
        latest.is_reading = False
        assert client.get("/readyz").status_code == 503
        assert client.get("/healthz").is_success


# Fuzzed by schemathesis, from the door's own OpenAPI description.

_latest = LatestFeatures(100)
_latest.take(feature("A", 1))
open_door = schemathesis.openapi.from_asgi("/openapi.json", api_of(_latest))
guarded_door = schemathesis.openapi.from_asgi("/openapi.json", api_of(_latest, token="secret"))
# How large a window is, the model says, not the description: most of what fits it is refused.
_UNTOLD = [positive_data_acceptance]


@open_door.parametrize()
@hypothesis_settings(max_examples=60, deadline=None)
def test_whatever_comes_is_answered_as_described(case: schemathesis.Case) -> None:
    case.call_and_validate(excluded_checks=_UNTOLD)


@guarded_door.parametrize()
@hypothesis_settings(max_examples=30, deadline=None)
def test_nothing_gets_past_the_token(case: schemathesis.Case) -> None:
    case.call_and_validate(excluded_checks=_UNTOLD)
    if case.path.startswith("/v1/"):
        assert case.call().status_code in (401, 404, 405)  # 404, 405: no such way in at all


def test_the_description_is_json_and_names_every_way_in(client: TestClient) -> None:
    described = client.get("/openapi.json").json()
    json.dumps(described)
    assert set(described["paths"]) == {
        "/healthz", "/readyz", "/v1/features", "/v1/features/{venue}/{symbol}",
    }  # fmt: skip
