"""Deploying again without a restart, and the names that all sides know the deployments by."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ray.serve import Deployment

MODEL_NAME = "model"
WORKER_NAME = "worker"


def with_version(deployment: "Deployment", version: str | None) -> "Deployment":
    """A Serve deployment whose replicas live on when it is deployed again under the same version.

    Left alone, Serve makes one up for every ``serve.run``, and so starts all replicas again; it has
    no public way to give one (2.60).
    """
    return deployment.options(version=version, _internal=True) if version else deployment
