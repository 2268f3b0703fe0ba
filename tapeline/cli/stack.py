"""``tapeline up``, ``down``, ``status``, ``doctor`` and ``topics``."""

from typing import TYPE_CHECKING, Annotated

import typer

from tapeline.cli.terminal import (
    JsonOption,
    err,
    given_settings,
    print_json,
    print_table,
    settings_of,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tapeline.stack import ServiceStatus


def up(
    ctx: typer.Context,
    kafka_port: Annotated[int, typer.Option(help="Of the broker, if it is started.")] = 9092,
    redis_port: Annotated[int, typer.Option(help="Of Redis, if it is started.")] = 6379,
    json: JsonOption = False,
) -> None:
    """Start Kafka and Redis on this machine and create the lanes' topics.

    What the settings name elsewhere is used instead of started. What runs already stays.
    """
    from tapeline.stack import Stack

    settings = given_settings(ctx)
    with err().status("starting") as spinner:
        stack = Stack(
            settings,
            kafka_port=kafka_port,
            redis_port=redis_port,
            progress=lambda text: spinner.update(text),
        )
        statuses = stack.up()
    _show(statuses, json)


def down(
    ctx: typer.Context,
    purge: Annotated[bool, typer.Option(help="Also delete what they stored.")] = False,
    json: JsonOption = False,
) -> None:
    """End what `tapeline up` started, and nothing else."""
    from tapeline.stack import Stack

    with err().status("ending"):
        statuses = Stack(given_settings(ctx)).down(purge=purge)
    _show(statuses, json)


def status(ctx: typer.Context, json: JsonOption = False) -> None:
    """Show Kafka and Redis as they are; exit 1 if one is stopped or does not answer."""
    from tapeline.stack import Stack

    statuses = Stack(given_settings(ctx)).status()
    _show(statuses, json)
    if any(one.state in ("stopped", "unhealthy") for one in statuses):
        raise typer.Exit(1)


def doctor(ctx: typer.Context, json: JsonOption = False) -> None:
    """Say what this machine lacks, and the command that mends it; exit 1 if it lacks anything."""
    from tapeline.doctor import diagnose

    findings = diagnose(given_settings(ctx))
    if json:
        print_json(findings)
    else:
        print_table(
            ("", "what", "found", "needed for", "mend"),
            [
                ("ok" if one.ok else "LACKS", one.name, one.found, one.required_for, one.mend)
                for one in findings
            ],
        )
    if not all(one.ok for one in findings):
        raise typer.Exit(1)


def topics(
    ctx: typer.Context,
    create: Annotated[
        bool, typer.Option("--create", help="Create those that are missing.")
    ] = False,
    json: JsonOption = False,
) -> None:
    """Show the lanes' topics; exit 1 if one is missing or its partitions are not as set."""
    from tapeline.clients import check_kafka
    from tapeline.topics import ensure_topics, topic_statuses

    settings = settings_of(ctx)
    check_kafka(settings)
    found = ensure_topics(settings) if create else topic_statuses(settings)
    if json:
        print_json(found)
    else:
        print_table(
            ("topic", "state", "partitions", "detail"),
            [(one.name, one.state, one.num_partitions, one.detail) for one in found],
        )
    if any(one.state in ("missing", "mismatch") for one in found):
        raise typer.Exit(1)


def _show(statuses: "Sequence[ServiceStatus]", json: bool) -> None:
    if json:
        print_json(statuses)
        return
    print_table(
        ("service", "state", "endpoint", "pid", "version", "detail"),
        [
            (one.name, one.state, one.endpoint, str(one.pid or "-"), one.version, one.detail)
            for one in statuses
        ],
    )
