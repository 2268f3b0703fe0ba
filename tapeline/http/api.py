"""The HTTP door: windows in, features out, and the latest features of a symbol.

An ASGI application that knows no Ray: ``tapeline.http.deployment`` puts it on Ray Serve.
"""

import hmac
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Annotated, Any

import msgspec
import numpy as np
from fastapi import Depends, FastAPI, HTTPException, Path, Query, Request, Response
from fastapi.responses import JSONResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from limits import RateLimitItemPerMinute
from limits.aio.storage import MemoryStorage
from limits.aio.strategies import SlidingWindowCounterRateLimiter
from numpy.typing import NDArray
from pydantic import BaseModel

from inference.client import Inference, Inferencer, ModelDescription
from schemas.errors import TransientError
from schemas.http import HttpSettings
from schemas.messages import MAX_NAME_CHARS, FeatureVector
from tapeline.http.latest import LatestFeatures

RAW = "application/octet-stream"
JSON = "application/json"
_RETRY_AFTER_S = 1

Lifespan = Callable[[FastAPI], AbstractAsyncContextManager[None]]
Name = Annotated[str, Path(min_length=1, max_length=MAX_NAME_CHARS)]


class Problem(BaseModel):
    """What was wrong, and how to mend it."""

    detail: str


class Made(BaseModel):
    """One row a window, in their order."""

    model_version: str
    features: list[list[float]]
    scores: list[dict[str, float]]


class Latest(BaseModel):
    """The newest features of a symbol, and the event that completed their window."""

    venue: str
    symbol: str
    lane: str
    event_id: str
    event_time_us: int
    model_version: str
    channels_version: str
    features: list[float]
    scores: dict[str, float]
    flags: list[str]


class Health(BaseModel):
    status: str


class _Windows(msgspec.Struct, forbid_unknown_fields=True):
    windows: list[list[list[float]]]


def build_api(
    settings: HttpSettings,
    inferencer: Inferencer,
    latest: LatestFeatures,
    lifespan: Lifespan | None = None,
) -> FastAPI:
    """The application.

    Args:
        lifespan: what is to run as long as it does.
    """
    shape = _Shape(inferencer)
    limiter = SlidingWindowCounterRateLimiter(MemoryStorage())
    limit = RateLimitItemPerMinute(settings.requests_per_minute or 1)

    async def admit(request: Request) -> None:
        address = request.client.host if request.client else ""
        if settings.requests_per_minute and not await limiter.hit(limit, address):
            raise HTTPException(
                429,
                f"more than http.requests_per_minute ({settings.requests_per_minute}) came from "
                "your address; come again later, or send several windows in one request",
                {"Retry-After": str(_RETRY_AFTER_S)},
            )

    admission = [Depends(admit)]
    if settings.token is not None:
        admission.insert(0, Depends(_demand(settings.token)))
    api = FastAPI(
        title="Tapeline",
        summary="Features of market data, beside Kafka.",
        lifespan=lifespan,
        docs_url=None,  # its page would load scripts from elsewhere
        redoc_url=None,
    )

    @api.exception_handler(TransientError)
    async def away(_: Request, error: TransientError) -> Response:
        headers = {"Retry-After": str(_RETRY_AFTER_S)}
        return JSONResponse({"detail": f"{error}; try again"}, 503, headers)

    @api.get("/healthz")
    async def healthz() -> Health:
        """The door itself answers."""
        return Health(status="ok")

    @api.get("/readyz", responses=_problems(503))
    async def readyz() -> Health:
        """The model answers, and features are being read along."""
        await inferencer.describe()
        if not latest.is_reading:
            raise HTTPException(503, "the output topics are not being read yet")
        return Health(status="ok")

    @api.post(
        "/v1/features",
        dependencies=admission,
        responses={
            200: {"model": Made, "content": {RAW: {}}},
            **_problems(400, 401, 406, 413, 415, 422, 429, 503),
        },
        openapi_extra={"requestBody": _request_body()},
    )
    async def make_features(request: Request) -> Response:
        """The features of one window or several, by the version that serves.

        As JSON, or raw: little-endian float32, windows one after the other, each channel by
        channel, oldest step first. `Accept: application/octet-stream` asks for raw answers: a row
        of features, then scores, for each window.
        """
        wants_raw = _wants_raw(request)
        content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if content_type not in (JSON, RAW):
            raise HTTPException(415, f"the body must be {JSON} or {RAW}, not {content_type!r}")
        body = await _body(request, settings.max_body_bytes)
        model = await shape.ask()
        windows = _from_raw(body, model) if content_type == RAW else _from_json(body, model)
        if not 0 < len(windows) <= settings.max_windows:
            raise HTTPException(
                422,
                f"a request must hold 1 to {settings.max_windows} windows (http.max_windows), "
                f"not {len(windows)}",
            )
        if not np.isfinite(windows).all():
            raise HTTPException(422, "windows must hold finite float32 numbers")
        made = await inferencer.infer(windows)
        rows = np.concatenate([made.features, made.scores], axis=1)
        if not np.isfinite(rows).all():
            raise HTTPException(422, "the model made NaN or infinity of these windows")
        version = {"Tapeline-Model-Version": made.model_version}
        if wants_raw:
            return Response(rows.astype("<f4").tobytes(), media_type=RAW, headers=version)
        return Response(msgspec.json.encode(_as_json(made, model)), media_type=JSON)

    @api.get(
        "/v1/features/{venue}/{symbol}",
        dependencies=admission,
        responses=_problems(401, 404, 429),
    )
    async def latest_features(
        venue: Name,
        symbol: Name,
        lane: Annotated[str | None, Query(description="Of this lane; else of all.")] = None,
    ) -> Latest:
        """The newest features of a symbol that were published since this door opened."""
        feature = latest.find(venue, symbol, lane)
        if feature is None:
            raise HTTPException(
                404, f"no features of {symbol!r} on {venue!r} came since this door opened"
            )
        return _latest(feature)

    return api


class _Shape:
    """What windows must be like, asked once: versions that follow each other are alike in it."""

    def __init__(self, inferencer: Inferencer) -> None:
        self._inferencer = inferencer
        self._known: ModelDescription | None = None

    async def ask(self) -> ModelDescription:
        if self._known is None:
            self._known = await self._inferencer.describe()
        return self._known


def _demand(token: str) -> Callable[..., None]:
    def demand(
        given: Annotated[
            HTTPAuthorizationCredentials | None, Depends(HTTPBearer(auto_error=False))
        ],
    ) -> None:
        said = given.credentials if given else ""
        if not hmac.compare_digest(said.encode(), token.encode()):
            raise HTTPException(
                401,
                "say the token of http.token as `Authorization: Bearer ...`",
                {"WWW-Authenticate": "Bearer"},
            )

    return demand


def _wants_raw(request: Request) -> bool:
    accepted = {
        one.partition(";")[0].strip().lower()
        for one in request.headers.get("accept", "*/*").split(",")
    }
    if accepted & {JSON, "*/*", "application/*", ""}:
        return False
    if RAW in accepted:
        return True
    raise HTTPException(406, f"answers are {JSON} or {RAW}")


async def _body(request: Request, max_bytes: int) -> bytes:
    """Reads no more than it may hold, whatever the header says."""
    parts: list[bytes] = []
    num_bytes = 0
    async for part in request.stream():
        num_bytes += len(part)
        if num_bytes > max_bytes:
            raise HTTPException(
                413,
                f"the body may have {max_bytes} bytes (http.max_body_bytes); send fewer windows",
            )
        parts.append(part)
    return b"".join(parts)


def _from_raw(body: bytes, model: ModelDescription) -> NDArray[np.float32]:
    row_bytes = 4 * model.num_channels * model.num_steps
    if len(body) % row_bytes:
        raise HTTPException(
            422,
            f"a window is {model.num_channels} channels x {model.num_steps} steps of float32, "
            f"{row_bytes} bytes; {len(body)} is no multiple of that",
        )
    flat = np.frombuffer(body, "<f4").astype(np.float32, copy=False)
    return flat.reshape(-1, model.num_channels, model.num_steps)


def _from_json(body: bytes, model: ModelDescription) -> NDArray[np.float32]:
    try:
        given = msgspec.json.decode(body, type=_Windows).windows
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise HTTPException(400, f'the body must be {{"windows": [[[...]]]}}: {error}') from error
    shape = (model.num_channels, model.num_steps)
    for number, window in enumerate(given):
        if len(window) != shape[0] or any(len(row) != shape[1] for row in window):
            raise HTTPException(
                422, f"window {number} is not {shape[0]} channels x {shape[1]} steps"
            )
    with np.errstate(over="ignore"):  # a number beyond float32 is infinite then, and refused
        return np.array(given, np.float64).astype(np.float32).reshape(-1, *shape)


def _as_json(made: Inference, model: ModelDescription) -> dict[str, Any]:
    return {
        "model_version": made.model_version,
        "features": made.features.tolist(),
        "scores": [dict(zip(model.score_names, row, strict=True)) for row in made.scores.tolist()],
    }


def _latest(feature: FeatureVector) -> Latest:
    return Latest(
        venue=feature.venue,
        symbol=feature.symbol,
        lane=feature.lane,
        event_id=feature.event_id,
        event_time_us=feature.event_time_us,
        model_version=feature.model_version,
        channels_version=feature.channels_version,
        features=feature.features.tolist(),
        scores=dict(feature.scores),
        flags=[flag.name.lower() for flag in feature.flags if flag.name],
    )


def _problems(*codes: int) -> dict[int | str, dict[str, Any]]:
    return {code: {"model": Problem} for code in codes}


def _request_body() -> dict[str, Any]:
    numbers: dict[str, Any] = {"type": "number"}
    for _ in range(3):
        numbers = {"type": "array", "items": numbers}
    as_json = {
        "type": "object",
        "properties": {"windows": numbers},
        "required": ["windows"],
        "additionalProperties": False,
    }
    content = {
        JSON: {"schema": as_json},
        RAW: {"schema": {"type": "string", "format": "binary"}},
    }
    return {"required": True, "content": content}
