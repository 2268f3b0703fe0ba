"""The model on Ray Serve, as its callers reach it. Free of torch, and of Ray until a call fails."""

import asyncio
import math
import time
from typing import Any

import numpy as np
from numpy.typing import NDArray

from inference.client import Inference, ModelDescription
from inference.shared import CAN_SHARE, Blocks, Written
from schemas.errors import TransientError

_BY_VALUE_S = 60.0  # after a replica that cannot see this process's memory


class ServeInferencer:
    """A ``FeatureModel`` deployment on Ray Serve, reached through its handle.

    Windows go through shared memory to a replica that can see it (``inference.shared``), and by
    value where one cannot.

    Args:
        handle: the deployment's ``DeploymentHandle``.
        timeout_s: of one call, the wait for a free replica included. A late call is cancelled.
        prepare_timeout_s: of ``prepare``.
        share_memory: False: always by value.
    """

    def __init__(
        self,
        handle: Any,
        *,
        timeout_s: float = 10.0,
        prepare_timeout_s: float = 120.0,
        share_memory: bool = True,
    ) -> None:
        self._handle = handle
        # Small messages go faster straight to the replica's gRPC port than through Ray's tasks.
        self._direct = handle.options(_by_reference=False)
        self._timeout_s = timeout_s
        self._prepare_timeout_s = prepare_timeout_s
        self._blocks = Blocks()
        self._share_from_s = 0.0 if share_memory and CAN_SHARE else math.inf

    async def infer(
        self, windows: NDArray[np.float32], model_version: str | None = None
    ) -> Inference:
        if windows.dtype == np.float32 and time.monotonic() >= self._share_from_s:
            inference = await self._infer_shared(windows, model_version)
            if inference is not None:
                return inference
            self._share_from_s = time.monotonic() + _BY_VALUE_S
        by_value: Inference = await self._call(self._handle.infer, windows, model_version)
        return by_value

    async def _infer_shared(
        self, windows: NDArray[np.float32], model_version: str | None
    ) -> Inference | None:
        """None: the replica that Serve chose cannot see this process's memory."""
        block = self._blocks.take(windows.nbytes)
        np.copyto(block.floats[: windows.size].reshape(windows.shape), windows)
        answer = await self._call(
            self._direct.infer_shared, block.name, windows.shape, model_version
        )
        inference = answer.read(block.floats) if isinstance(answer, Written) else answer
        self._blocks.give_back(block)
        return inference

    async def describe(self) -> ModelDescription:
        description: ModelDescription = await self._call(self._handle.describe)
        return description

    async def prepare(self, versions: tuple[str, ...]) -> ModelDescription:
        """On every replica there is; one that starts later reads the store itself."""
        try:
            described: list[ModelDescription] = await self._handle.broadcast(
                "prepare", versions
            ).results_async(timeout_s=self._prepare_timeout_s)
        except TimeoutError as error:
            limit_s = self._prepare_timeout_s
            raise TransientError(f"the model was not ready within {limit_s:g} s") from error
        except Exception as error:
            ours = _as_ours(error)
            if ours is error:
                raise
            raise ours from error
        if not described:
            raise TransientError("the model has no replica yet")
        return described[0]

    async def close(self) -> None:
        """Leaves the deployment running: it is not this object's."""

    async def _call(self, method: Any, *args: Any) -> Any:
        response = method.remote(*args)
        try:
            async with asyncio.timeout(self._timeout_s):
                return await response
        except TimeoutError as error:
            response.cancel()
            raise TransientError(
                f"the model gave no answer within {self._timeout_s:g} s"
            ) from error
        except asyncio.CancelledError:
            response.cancel()
            raise
        except Exception as error:
            ours = _as_ours(error)
            if ours is error:
                raise
            raise ours from error


def _as_ours(error: Exception) -> Exception:
    """The error that a caller reacts to: the replica's own, as it was raised there, or
    TransientError where Ray restarts, reroutes or frees what failed.
    """
    import grpc
    from ray import exceptions as ray_errors
    from ray.serve import exceptions as serve_errors

    if isinstance(error, ray_errors.RayTaskError):
        return error.cause if isinstance(error.cause, Exception) else error
    may_heal = (
        ray_errors.RayActorError,  # its replica died or is unreachable: Serve starts another
        ray_errors.WorkerCrashedError,
        ray_errors.NodeDiedError,
        ray_errors.OutOfMemoryError,
        ray_errors.ObjectLostError,
        ray_errors.GetTimeoutError,
        ray_errors.RpcError,
        ray_errors.TaskCancelledError,  # by a replica that drains: our own cancels end elsewhere
        serve_errors.BackPressureError,
        serve_errors.DeploymentUnavailableError,
        grpc.RpcError,  # the way to the replica broke
    )
    if not isinstance(error, may_heal):
        return error
    reason = str(error).partition("\n")[0]  # Ray appends pages of context
    return TransientError(f"the model could not answer: {type(error).__name__}: {reason}")
