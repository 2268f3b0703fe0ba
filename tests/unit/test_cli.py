"""The command line's own decisions: bad use, exit codes, percentiles, mixes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from inference.artifact import Artifact, save_artifact
from inference.model import ModelConfig, Normalisation, build_network
from inference.seeded import MARKET50_V1
from schemas.errors import ConfigError
from schemas.messages import Flags
from tapeline.autoscale.rules import Decision, LaneLoad
from tapeline.autoscale.trace import Entry, record
from tapeline.cli.features import flag_names, percentiles
from tapeline.cli.tape import parse_mix

NOWHERE = {"TAPELINE_KAFKA__BOOTSTRAP_SERVERS": "127.0.0.1:1"}  # nothing listens on port 1


def run_cli(
    *arguments: str, folder: Path, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Runs the command as a user does, in an empty folder."""
    return subprocess.run(
        [sys.executable, "-c", "from tapeline.cli import main; main()", *arguments],
        cwd=folder,
        env={**os.environ, **(environment or {})},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def assert_one_sentence(done: subprocess.CompletedProcess[str], *, naming: str) -> None:
    assert done.returncode == 2, done
    assert done.stdout == ""
    assert done.stderr.startswith("tapeline: ")
    assert done.stderr.count("\n") == 1, done.stderr
    assert naming in done.stderr


@pytest.mark.parametrize(
    "command",
    [
        ["lag"],
        ["topics"],
        ["topics", "--create"],
        ["simulate", "--events", "1"],
        ["subscribe", "--limit", "1"],
        ["produce", "tape.jsonl"],
        ["dlq", "ls"],
        ["dlq", "replay", "--all"],
        ["dlq", "purge", "--all", "--yes"],
    ],
    ids=" ".join,
)
def test_a_wrong_broker_address_is_one_sentence(command: list[str], tmp_path: Path) -> None:
    (tmp_path / "tape.jsonl").write_text("")
    done = run_cli(*command, folder=tmp_path, environment=NOWHERE)
    assert_one_sentence(done, naming="no Kafka broker answers at 127.0.0.1:1; start one with")


@pytest.mark.parametrize(
    ("arguments", "naming"),
    [
        (["produce", "absent.csv"], "absent.csv"),
        (["produce", "."], "name"),
        (["produce", "--speed", "-1", "absent.csv"], "speed"),
        (["--config", "absent.toml", "lag"], "absent.toml"),
        (["simulate", "--lane", "realtim"], "did you mean 'realtime'"),
        (["subscribe", "--lane", "nope"], "there is no lane 'nope'"),
        (["simulate", "--mix", "realtime"], "realtime=0.5"),
        (["simulate", "--mix", "realtime=1,batch=1", "--symbols", "1"], "--symbols 2"),
        (["dlq", "ls", "--lane", "realtim"], "did you mean 'realtime'"),
        (["dlq", "ls", "--since", "yesterday"], "2024-08-08T12:00"),
        (["dlq", "show", "17"], "lane:partition:offset"),
        (["dlq", "replay"], "Give IDs, a filter such as --lane, or --all"),
        (["dlq", "replay", "--all", "--lane", "realtime"], "--all stands for every letter"),
        (["dlq", "replay", "realtime:0:1", "--reason", "bad_avro"], "give one of the two"),
        (["dlq", "replay", "--all", "--rate", "0"], "--rate"),
        (["dlq", "purge"], "Give IDs, a filter such as --lane, or --all"),
    ],
    ids=lambda one: " ".join(one) if isinstance(one, list) else "",
)
def test_bad_use_is_one_sentence(arguments: list[str], naming: str, tmp_path: Path) -> None:
    assert_one_sentence(run_cli(*arguments, folder=tmp_path), naming=naming)


def test_an_unknown_setting_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "tapeline.toml").write_text("[kafka]\nbootstrap_server = 'x'\n")
    done = run_cli("lag", folder=tmp_path)
    assert_one_sentence(done, naming="did you mean 'bootstrap_servers'")


def test_an_unknown_command_is_a_usage_error(tmp_path: Path) -> None:
    done = run_cli("blah", folder=tmp_path)
    assert done.returncode == 2
    assert "No such command 'blah'" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_version_is_printed(tmp_path: Path) -> None:
    done = run_cli("--version", folder=tmp_path)
    assert (done.returncode, done.stdout.split()[0]) == (0, "tapeline")


def test_help_needs_neither_kafka_nor_torch_nor_rays_import(tmp_path: Path) -> None:
    """Imports, not seconds: what makes ``--help`` quick, on any machine."""
    heavy = ["torch", "ray", "confluent_kafka", "numpy", "pydantic", "pyarrow", "rich.markdown"]
    code = (
        "import sys\nfrom tapeline.cli import app\n"
        "try:\n    app(['--help'])\nexcept SystemExit:\n    pass\n"
        f"print([name for name in {heavy} if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"


def test_the_client_library_loads_neither_torch_nor_ray(tmp_path: Path) -> None:
    code = (
        "import sys, tapeline\n"
        "[getattr(tapeline, name) for name in tapeline.__all__]\n"
        "print([name for name in ('torch', 'ray') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"


def test_a_dry_run_needs_no_broker_and_counts_what_is_wrong(tmp_path: Path) -> None:
    """Exit 1 on more rejected rows than allowed, else 0."""
    rows = ["event_time_us,price,size", "1700000000000000,1.5,2", "1700000000001000,nan,2"]
    (tmp_path / "tape.csv").write_text("\n".join([*rows, ""]))
    command = ["produce", "tape.csv", "--symbol", "A", "--venue", "V", "--dry-run"]
    done = run_cli(*command, folder=tmp_path, environment=NOWHERE)
    assert done.returncode == 0, done
    assert "tape.csv:3" in done.stderr
    strict = run_cli(*command, "--max-rejected", "0", folder=tmp_path, environment=NOWHERE)
    assert strict.returncode == 1


def test_percentiles_are_nearest_ranks() -> None:
    assert percentiles({}, (50,)) == {"p50": None}
    assert percentiles({7: 1}, (50, 99)) == {"p50": 7, "p99": 7}
    hundred = dict.fromkeys(range(1, 101), 1)
    assert percentiles(hundred, (50, 95, 99)) == {"p50": 50, "p95": 95, "p99": 99}


@given(st.lists(st.integers(-5, 1000), min_size=1), st.integers(1, 100))
def test_a_percentile_is_a_value_that_so_many_do_not_exceed(
    values: list[int], percent: int
) -> None:
    histogram = {value: values.count(value) for value in values}
    [found] = percentiles(histogram, (percent,)).values()
    assert found in values
    assert sum(value <= found for value in values) * 100 >= percent * len(values)
    assert sum(value < found for value in values) * 100 < percent * len(values)


def test_a_mix_adds_up_to_one() -> None:
    assert parse_mix("realtime=2, batch=6") == {"realtime": 0.25, "batch": 0.75}


@pytest.mark.parametrize("text", ["", "a", "a=", "a=-1", "a=0", "a=inf", "a=nan", "a=1,a=1"])
def test_a_mix_that_says_nothing_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--mix"):
        parse_mix(text)


def test_flags_have_names() -> None:
    assert flag_names(Flags.GAP | Flags.STALE) == "gap, stale"
    assert flag_names(Flags(0)) == ""


def test_a_model_is_inspected_timed_and_optimised(tmp_path: Path) -> None:
    """Together, as a user would: each command of its own loads torch for seconds."""
    own_models = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    small = {"TAPELINE_MODEL__MAX_BATCH": "4"}
    seen = run_cli("model", "inspect", "--json", folder=tmp_path)
    assert seen.returncode == 0, seen.stderr
    facts = json.loads(seen.stdout)
    assert facts["model version"].startswith("cnn-lstm-seeded@0-")
    assert facts["parameters"] == 306_816
    assert "random" in facts["card"]

    arguments = ["--size", "1", "--size", "6", "--seconds", "0", "--csv", "table.csv", "--json"]
    arguments += ["--plot", "plot.png"]
    config = ModelConfig(
        architecture="own_models:Mixed", options={"num_in": 50, "num_out": 4}, num_features=4
    )
    network = build_network(config, Normalisation(np.zeros(50), np.ones(50)))
    artifact = Artifact.from_model(
        network.eval(), name="mixed", version="1", channels_version=MARKET50_V1, card=""
    )
    save_artifact(artifact, tmp_path / "mixed")
    mixed = small | {"TAPELINE_MODEL__ARTIFACT": "mixed", "PYTHONPATH": own_models}
    timed = run_cli("model", "bench", *arguments, folder=tmp_path, environment=mixed)
    assert timed.returncode == 0, timed.stderr
    assert "engine_rows_depend_on_batch" in timed.stderr, "and stdout is JSON all the same"
    assert [one["num_windows"] for one in json.loads(timed.stdout)["timings"]] == [1, 6]
    assert (tmp_path / "table.csv").read_text().splitlines()[0].startswith("windows,p50_ms")
    assert len((tmp_path / "table.csv").read_text().splitlines()) == 3

    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")

    arguments = ["model", "optimize", "fast", "--max-error", "1e-9", "--json"]
    tried = run_cli(*arguments, folder=tmp_path, environment=small)
    assert tried.returncode == 0, tried.stderr
    report = json.loads(tried.stdout)
    assert [one["kept"] for one in report["steps"]] == [False], "no variant is as exact as that"
    assert report["written"] is None
    assert not (tmp_path / "fast").exists()


def test_scaling_is_explained_and_replayed(tmp_path: Path) -> None:
    none = run_cli("autoscale", "explain", folder=tmp_path)
    assert_one_sentence(none, naming="autoscale.enabled")

    lane = LaneLoad("realtime", 100.0, 50, 10, 4)
    why = "up: 105/s to do, 1 x 80/s planned"
    decision = Decision(2, 2, 1, 105.0, 100.0, 5.0, why)
    trace = tmp_path / ".tapeline" / "autoscale.jsonl"
    for at_s in (100.0, 160.0):
        record(trace, Entry(at_s, "workers", 1, (lane,), decision))
        record(trace, Entry(at_s, "replicas", 1, (), None, held="no broker answers"))
    told = run_cli("autoscale", "explain", folder=tmp_path, environment={"COLUMNS": "200"})
    assert told.returncode == 0, told.stderr
    for part in ("realtime", why, "held: no broker answers"):
        assert part in told.stdout
    as_json = json.loads(run_cli("autoscale", "explain", "--json", folder=tmp_path).stdout)
    assert as_json["workers"]["decision"]["why"] == why

    played = run_cli(
        "autoscale", "replay", str(trace), "--plot", "plot.png", "--json", folder=tmp_path
    )
    assert played.returncode == 0, played.stderr
    assert len(json.loads(played.stdout)) == 3, "one for each scaler"
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_a_folder_that_is_no_model_is_named(tmp_path: Path) -> None:
    done = run_cli("model", "inspect", "nowhere", folder=tmp_path)
    assert_one_sentence(done, naming="there is no model artifact at nowhere")
