"""From events on a topic to a trained model, and its scores through Kafka: the trainer's own."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from market import book_events
from pipeline import features, produce, running_worker
from typer.testing import CliRunner

from inference.artifact import load_artifact, save_artifact
from inference.engine import build_engine
from inference.model import ModelConfig
from inference.training.labels import split
from inference.training.recipe import Origin, outputs_of, train
from inference.training.tape import Part
from inference.training.trainer import TrainingOptions
from schemas.settings import Settings, as_environment
from tapeline.cli import app
from tapeline.topics import ensure_topics
from tapeline.training.tapes import record_lane

MakeSettings = Callable[..., Settings]
LANE = "realtime"
HORIZONS = (3, 5)
TINY = ModelConfig(conv_channels=(8,), lstm_hidden=8, lstm_layers=1, num_features=4)
NUM_EVENTS = 1_200


def test_what_serves_gives_the_trainer_s_scores(
    make_settings: MakeSettings, tmp_path: Path
) -> None:
    """Recorded from the topic, trained, and served on the same events: within 1e-5."""
    settings = make_settings(model={"max_batch": 32, "device": "cpu"})
    ensure_topics(settings)
    events = book_events(NUM_EVENTS, symbols=2)
    # What comes again, and what is no event, is no window of the tape either.
    produce(settings, [*events[:300], *events[280:320], *events[300:]], LANE)
    tape = record_lane(settings, LANE)
    parts = split(tape, HORIZONS, (0.4, 0.3))
    options = TrainingOptions(epochs=2, batch_size=64)
    origin = Origin("served", "1", "market50-v1", ("a lane",))
    save_artifact(train(parts, TINY, HORIZONS, options, origin, settings.model), tmp_path / "model")

    artifact = load_artifact(tmp_path / "model", channels_version="market50-v1", num_steps=60)
    engine = build_engine(artifact, settings.model)
    whole = Part(tape, tape.ends(), np.zeros((len(tape.ends()), 0), np.int8))
    of_trainer = {
        (symbol, time_us): outputs
        for symbol, time_us, outputs in zip(
            tape.symbols_at(whole.ends),
            tape.times_us[whole.ends],
            outputs_of(engine, whole),
            strict=True,
        )
    }
    assert len(of_trainer) == NUM_EVENTS - 2 * 59
    with running_worker(settings, engine) as worker:
        worker.wait_until_ended(LANE, NUM_EVENTS + 40)
        served = features(settings, limit=len(of_trainer))
    assert len(served) == len(of_trainer)
    for record in served:
        feature = record.feature
        key = f"{feature.venue}:{feature.symbol}", feature.event_time_us
        outputs = of_trainer.pop(key)
        found = np.concatenate([feature.features, list(feature.scores.values())])
        assert found == pytest.approx(outputs, abs=1e-5)
        assert [*feature.scores] == [*artifact.config.score_names]
    assert not of_trainer


def test_train_judge_promote_by_their_commands(
    make_settings: MakeSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The walk of docs/training.md, on a lane; judged and compared on the same events."""
    settings = make_settings(model={"max_batch": 16, "device": "cpu"})
    ensure_topics(settings)
    produce(settings, book_events(NUM_EVENTS, symbols=1), LANE)
    monkeypatch.chdir(tmp_path)
    environment = as_environment(settings) | {"TAPELINE_MODEL__STORE": "store"}

    def tapeline(*arguments: str, code: int = 0) -> str:
        done = CliRunner().invoke(app, arguments, env=environment)
        assert done.exit_code == code, done.output
        return done.stdout

    options = ["--small", "--epochs", "1", "--horizon", "3", "--horizon", "5", "--stride", "2"]
    trained = tapeline("model", "train", "mine", "--lane", LANE, "--since", "2h", *options)
    assert "wrote mine: mine@1-" in trained
    assert "baseline" in trained
    assert not list(tmp_path.glob("*.checkpoint"))
    assert "down_3, flat_3, up_3" in tapeline("model", "inspect", "mine")
    judged = tapeline("model", "evaluate", "mine", "--lane", LANE, "--plot", "judged.png")
    assert "last_move" in judged
    assert (tmp_path / "judged.png").read_bytes().startswith(b"\x89PNG")
    tapeline("model", "drift", "mine", "--lane", LANE, "--max-index", "1000")
    tapeline("model", "drift", "mine", "--lane", LANE, "--max-index", "0", code=1)
    tapeline("model", "promote", "mine")
    assert "serves" in tapeline("model", "ls")
    for wrong in ([], ["--lane", LANE, "tape.jsonl"], ["tape.jsonl", "--since", "2h"]):
        tapeline("model", "train", "other", *wrong, code=2)
    tapeline("model", "train", "mine", "--lane", LANE, code=2)
