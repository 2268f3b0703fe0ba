"""The command ``tapeline``: one module per family of commands, listed here.

Exit codes: 0 good; 1 the answer is bad, or something outside failed; 2 bad use, one sentence on
stderr says how to mend it; 130 ended by Ctrl-C. Commands import what they need when they run, so
that ``tapeline --help`` is quick.
"""

import signal
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from schemas.errors import ConfigError, TapelineError
from tapeline.cli import (
    audit,
    autoscale,
    bench,
    dlq,
    features,
    lag,
    model,
    sla,
    stack,
    stream,
    tape,
    top,
    training,
)
from tapeline.cli.terminal import GlobalOptions


class _Tapeline(TyperGroup):
    """Turns our errors into one sentence and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except ConfigError as error:
            code, text = 2, str(error)
        except TapelineError as error:
            code, text = 1, str(error)
        typer.echo(f"tapeline: {text}", err=True)
        raise typer.Exit(code)


app = typer.Typer(
    name="tapeline",
    cls=_Tapeline,
    help="Market events in, model features out.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,  # Rich's own help takes 0.3 s to import
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

_COMMANDS: list[Callable[..., None]] = [
    *(stack.up, stack.down, stack.status, stack.doctor, stack.topics),
    *(tape.produce, tape.simulate, features.subscribe),
    *(stream.demo, stream.run, stream.worker, lag.lag, top.top, sla.sla, audit.audit),
]
for _command in _COMMANDS:
    app.command()(_command)
for _command in (training.train, training.evaluate, training.drift):
    model.app.command()(_command)
app.add_typer(autoscale.app, name="autoscale")
app.add_typer(bench.app, name="bench")
app.add_typer(dlq.app, name="dlq")
app.add_typer(model.app, name="model")


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"tapeline {version('tapeline')}")
        raise typer.Exit


@app.callback()
def _global_options(
    ctx: typer.Context,
    config: Annotated[
        Path | None,
        typer.Option(help="Settings, TOML; else $TAPELINE_CONFIG, else ./tapeline.toml."),
    ] = None,
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version and end.", is_eager=True, callback=_print_version
        ),
    ] = False,
) -> None:
    ctx.obj = GlobalOptions(config)


def main() -> None:
    """The console script."""
    # A polite kill ends a command as Ctrl-C does: buffers are flushed, files are closed.
    signal.signal(signal.SIGTERM, _interrupt)
    app()


def _interrupt(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
