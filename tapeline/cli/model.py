"""``tapeline model inspect | bench | optimize | ls | promote | rollback``."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from schemas.errors import ConfigError
from schemas.rollout import find_rollout
from tapeline.cli.terminal import JsonOption, err, given_settings, out, print_json, print_table

if TYPE_CHECKING:
    from inference.artifact import Artifact
    from inference.model import ModelConfig
    from inference.optimize import Step
    from inference.store import ModelStore
    from schemas.rollout import Rollout
    from schemas.settings import ModelSettings, Settings

app = typer.Typer(
    help="Look at a model, measure it, make it fast, have it serve.", no_args_is_help=True
)


@app.callback()
def _log() -> None:
    """What an engine has to say goes to stderr: stdout is the answer's."""
    from consumers.logs import configure_logging

    configure_logging()


ArtifactArgument = Annotated[
    Path | None,
    typer.Argument(help="A model folder; else model.artifact; else the seeded weights."),
]


@app.command()
def inspect(
    ctx: typer.Context, artifact: ArtifactArgument = None, json: JsonOption = False
) -> None:
    """Check a model folder and show what it is: sizes, scores, precision, card."""
    model = _artifact(given_settings(ctx).model, artifact)
    config = model.config
    facts = {
        "model version": model.model_version,
        "channel set": model.channels_version,
        "window": f"{config.num_channels} channels x {config.num_steps} steps",
        "features": config.num_features,
        "scores": ", ".join(config.score_names) or "none",
        "architecture": _architecture(config),
        "parameters": sum(tensor.numel() for tensor in model.weights.values()),
        "precision": model.precision,
        "CUDA graphs": model.cuda_graphs,
        "tolerance": f"{model.tolerance:g} of {len(model.reference.windows)} reference windows",
    }
    if json:
        print_json(facts | {"card": model.card})
        return
    print_table(("", ""), facts.items())
    out().print(model.card, markup=False, highlight=False)


@app.command()
def bench(
    ctx: typer.Context,
    artifact: ArtifactArgument = None,
    size: Annotated[
        list[int] | None, typer.Option(help="Windows in a call; may be given again.")
    ] = None,
    seconds: Annotated[float, typer.Option(help="For each size.")] = 1.0,
    csv: Annotated[Path | None, typer.Option(help="Write the table there as well.")] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw it there as well, PNG or SVG; needs matplotlib.")
    ] = None,
    json: JsonOption = False,
) -> None:
    """Time the engine's calls by batch size on this machine: numpy in, numpy out.

    Device, threads and the largest batch are the settings' (model.device, ...).
    """
    from rich.progress import track

    from inference.bench import caption, plot_timings, time_calls
    from inference.engine import build_engine

    settings = given_settings(ctx).model
    model = _artifact(settings, artifact)
    engine = build_engine(model, settings)
    sizes = size or [1, *(bucket.num_rows for bucket in engine.statistics().buckets)]
    timings = [
        time_calls(engine, model, one, seconds=seconds)
        for one in track(sizes, description="timing", console=err(), transient=True)
    ]
    if csv:
        rows = [
            f"{one.num_windows},{one.p50_ms},{one.p99_ms},{one.windows_per_s}" for one in timings
        ]
        csv.write_text("\n".join(["windows,p50_ms,p99_ms,windows_per_s", *rows]) + "\n")
    about = caption(engine, model) | {"threads": settings.num_threads}
    if plot:
        plot_timings(timings, ", ".join(f"{key} {one}" for key, one in about.items()), plot)
    if json:
        print_json(about | {"timings": timings})
        return
    out().print(", ".join(f"{key} {value}" for key, value in about.items()), highlight=False)
    print_table(
        ("windows", "p50 ms", "p99 ms", "windows/s"),
        [(one.num_windows, one.p50_ms, one.p99_ms, int(one.windows_per_s)) for one in timings],
    )


@app.command()
def optimize(
    ctx: typer.Context,
    target: Annotated[Path, typer.Argument(help="The new model folder.")],
    artifact: ArtifactArgument = None,
    max_error: Annotated[
        float, typer.Option(help="Allowed difference of an output from fp32.", min=0)
    ] = 0.01,
    prune: Annotated[
        float, typer.Option(help="Share of each convolution's weights to set to 0.", min=0, max=1)
    ] = 0.0,
    json: JsonOption = False,
) -> None:
    """Try what could make a model faster on this machine, and write what did to a new folder.

    Each change is kept only if every output stays within --max-error of fp32 and calls measure
    faster. Nothing is written if none was kept.
    """
    from inference.artifact import demand_new, save_artifact
    from inference.optimize import optimize as find_fastest

    demand_new(target)  # before minutes of work
    settings = given_settings(ctx).model
    console = err()
    with console.status("trying variants"):
        found = find_fastest(
            _artifact(settings, artifact),
            device=settings.device,
            num_threads=settings.num_threads,
            max_batch=settings.max_batch,
            gpu_memory_fraction=settings.gpu_memory_fraction,
            max_error=max_error,
            prune_amount=prune,
            on_step=lambda step: console.print(f"{step.change}: {step.why}", highlight=False),
        )
    kept = any(step.kept for step in found.steps)
    if kept:
        report = "\n".join(_card_lines(found.steps, found.hardware))
        save_artifact(
            found.artifact.with_card(f"{found.artifact.card.rstrip()}\n\n{report}"), target
        )
    if json:
        print_json(
            {
                "hardware": found.hardware,
                "max_error": found.max_error,
                "steps": found.steps,
                "model_version": found.artifact.model_version,
                "written": target if kept else None,
            }
        )
        return
    print_table(
        ("change", "kept", "why", "largest error", "ms a call, before and after"),
        [(one.change, one.kept, one.why, _error(one), _calls(one)) for one in found.steps],
        title=found.hardware,
    )
    wrote = f"wrote {target}: {found.artifact.model_version}" if kept else "nothing was faster"
    out().print(wrote, highlight=False)


@app.command()
def ls(ctx: typer.Context, json: JsonOption = False) -> None:
    """List the versions in model.store, and what each is used for."""
    store = _store(given_settings(ctx))
    versions, rollout = store.versions(), find_rollout(store.path)
    uses = {version: _use(version, rollout) for version in versions}
    if json:
        print_json(uses)
        return
    print_table(("model version", "use"), uses.items())


@app.command()
def promote(
    ctx: typer.Context,
    model: Annotated[
        str,
        typer.Argument(help="NAME@VERSION in model.store, or a model folder to copy into it."),
    ],
    shadow: Annotated[
        bool, typer.Option("--shadow", help="Only compute beside what serves, and compare.")
    ] = False,
    canary: Annotated[
        float | None,
        typer.Option(help="Serve this share of the symbols, chosen by hash.", min=0, max=1),
    ] = None,
) -> None:
    """Have a model version serve, while workers run and without losing a request.

    Workers on this model.store load and warm it beside what serves, and then change over; their
    log says so. `rollback` goes back.
    """
    if shadow and canary is not None:
        raise ConfigError("a model is tried as a shadow or as a canary, not as both; choose one")
    settings = given_settings(ctx)
    store = _store(settings)
    folder = Path(model)
    version = store.add(folder) if folder.is_dir() else store.resolve(model)
    if shadow or canary is not None:
        _show_rollout(store.try_out(version, settings.window, canary))
    else:
        _show_rollout(store.promote(version, settings.window))


@app.command()
def rollback(ctx: typer.Context) -> None:
    """End shadow and canary; where there is neither, have the version before serve again."""
    _show_rollout(_store(given_settings(ctx)).roll_back())


def _store(settings: "Settings") -> "ModelStore":
    from inference.store import ModelStore

    if settings.model.store is None:
        raise ConfigError(
            "there is no model.store; set TAPELINE_MODEL__STORE to a folder, for example models"
        )
    return ModelStore(settings.model.store)


def _use(version: str, rollout: "Rollout | None") -> str:
    if rollout is None:
        return "-"
    uses = {
        rollout.serving: "serves",
        rollout.canary: f"canary, {rollout.canary_share:.0%} of symbols",
        rollout.shadow: "shadow",
    }
    served = (
        f"served {rollout.before.index(version) + 1} before" if version in rollout.before else "-"
    )
    return uses.get(version, served)


def _show_rollout(rollout: "Rollout") -> None:
    out().print(f"serving {rollout.serving}", highlight=False)
    if rollout.canary:
        out().print(f"canary {rollout.canary}, {rollout.canary_share:.0%} of symbols")
    if rollout.shadow:
        out().print(f"shadow {rollout.shadow}", highlight=False)


def _artifact(settings: "ModelSettings", path: Path | None) -> "Artifact":
    from inference.artifact import load_artifact
    from inference.seeded import seeded_artifact

    path = path or settings.artifact
    return load_artifact(path) if path else seeded_artifact()


def _architecture(config: "ModelConfig") -> str:
    from inference.model import CNN_LSTM

    if config.architecture != CNN_LSTM:
        options = ", ".join(f"{name}={value!r}" for name, value in config.options.items())
        return f"{config.architecture}({options})"
    convolutions = " to ".join(map(str, config.conv_channels))
    return (
        f"{CNN_LSTM}: convolutions to {convolutions}, kernel {config.kernel_size}; "
        f"LSTM, {config.lstm_layers} layers of {config.lstm_hidden}"
    )


def _error(step: "Step") -> str:
    return "-" if step.max_error is None else f"{step.max_error:.1e}"


def _calls(step: "Step") -> str:
    pairs = (step.call_ms or {}).items()
    return ", ".join(f"{size}: {old:g} to {new:g}" for size, (old, new) in pairs) or "-"


def _card_lines(steps: "tuple[Step, ...]", where: str) -> list[str]:
    """The report as a part of the model card."""
    return [
        f"## Optimised on {where}",
        "",
        "| change | kept | why | largest error | ms a call, before and after |",
        "| --- | --- | --- | ---: | --- |",
        *(
            f"| {one.change} | {'yes' if one.kept else 'no'} | {one.why} | {_error(one)} "
            f"| {_calls(one)} |"
            for one in steps
        ),
        "",
    ]
