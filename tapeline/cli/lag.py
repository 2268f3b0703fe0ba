"""``tapeline lag``."""

from typing import Annotated

import typer

from tapeline.cli.terminal import JsonOption, print_json, print_table, settings_of


def lag(
    ctx: typer.Context,
    lane: Annotated[
        list[str] | None, typer.Option(help="Only this lane; may be given again.")
    ] = None,
    json: JsonOption = False,
) -> None:
    """Show how far the workers are behind, per lane and partition.

    lag: records between the committed offset and the end. replay from: where a worker that takes
    over would begin to rebuild its windows.
    """
    from tapeline.lag import lane_lags

    settings = settings_of(ctx)
    chosen = [settings.lane(name) for name in lane] if lane else None
    lags = lane_lags(settings, chosen)
    if json:
        print_json({"partitions": lags, "lag": sum(one.lag for one in lags)})
        return
    columns = ("lane", "topic", "partition", "committed", "replay from", "end", "lag")
    print_table(
        columns,
        [
            (one.lane, one.topic, one.partition, one.committed, one.replay_from, one.end, one.lag)
            for one in lags
        ],
        title=f"{sum(one.lag for one in lags):,} records behind",
    )
