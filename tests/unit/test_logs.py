"""Where log lines go."""

import io
import json
from collections.abc import Iterator
from contextlib import redirect_stderr

import pytest
import structlog

from consumers.logs import configure_logging


@pytest.fixture
def configured() -> Iterator[None]:
    configure_logging()
    yield
    structlog.reset_defaults()


@pytest.mark.usefixtures("configured")
def test_lines_go_to_what_stderr_is_by_then_and_hide_secrets() -> None:
    """A program may put another in its place, and close the one of before."""
    log = structlog.get_logger()
    for number in range(2):
        with io.StringIO() as stderr, redirect_stderr(stderr):
            log.info("said", number=number, redis_password="hush")
            line = json.loads(stderr.getvalue())
        assert (line["event"], line["number"], line["level"]) == ("said", number, "info")
        assert line["redis_password"] == "***"
