"""Training learns what is there and nothing else, goes on where it was cut off, and says so."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from market import IMBALANCE, planted_tape
from sklearn.metrics import f1_score, log_loss, precision_recall_fscore_support

from inference.artifact import load_artifact, save_artifact
from inference.deeplob import DeepLob
from inference.model import ModelConfig, Normalisation
from inference.training.baselines import fit_baselines
from inference.training.card import verdict
from inference.training.drift import LARGE, NOTABLE, distributions, drifts
from inference.training.evaluation import evaluate, macro_f1
from inference.training.labels import UNKNOWN, Split, score_names, split
from inference.training.recipe import Origin, config_for, drift_on, judge_on, train
from inference.training.record import training_record
from inference.training.tape import Part, Tape
from inference.training.trainer import Trainer, TrainingOptions, fit_normalisation
from schemas.errors import ConfigError
from schemas.settings import ModelSettings
from tapeline.training.fi2010 import read_fi2010

HORIZONS = (3, 5)
TINY = ModelConfig(conv_channels=(8,), lstm_hidden=8, lstm_layers=1, num_features=4)
OPTIONS = TrainingOptions(epochs=3, batch_size=64, learning_rate=5e-3, seed=3)
SETTINGS = ModelSettings(device="cpu", max_batch=64)
CHANNELS = "market50-v1"
CPU = torch.device("cpu")
MAJORITY_F1 = 0.3  # of three classes one has an F1 above 0, and it is below 0.75


@pytest.fixture(scope="module")
def parts() -> Split:
    """The signal is in a channel that no baseline looks at."""
    return split(planted_tape(4_000, channel=7), HORIZONS, (0.6, 0.15))


def trainer(parts: Split, options: TrainingOptions = OPTIONS, path: Path | None = None) -> Trainer:
    tape = parts.train.tape
    return Trainer(
        config_for(TINY, tape, HORIZONS),
        fit_normalisation(tape.rows),
        parts.train,
        parts.validation,
        options,
        device=CPU,
        checkpoint=path,
    )


def test_it_learns_what_is_there(parts: Split, tmp_path: Path) -> None:
    """And the artifact, read again, says so of itself; features say what the scores do."""
    origin = Origin("planted", "1", CHANNELS, ("a tape",))
    artifact = train(parts, TINY, HORIZONS, OPTIONS, origin, SETTINGS)
    save_artifact(artifact, tmp_path / "model")
    again = load_artifact(tmp_path / "model", channels_version=CHANNELS, num_steps=8)
    assert again.model_version == artifact.model_version
    record = training_record(again)
    for report in record.test:
        assert report.macro_f1.low > 0.6
        assert report.baselines["majority"].model_ahead.low > 0
        assert report.baselines["majority"].macro_f1.value < MAJORITY_F1
        assert report.baselines["imbalance"].model_ahead.low > 0
        assert report.by_symbol.keys() == {"venue:S0"}
    assert record.parts["test"].num_windows == len(parts.test)
    assert "beats" in verdict(record.test)
    assert artifact.model_version in artifact.card
    for part in record.parts.values():
        assert str(part) in artifact.card
    assert artifact.config.score_names == score_names(HORIZONS)
    scores = artifact.reference.scores.reshape(-1, len(HORIZONS), 3)
    assert scores.sum(axis=2) == pytest.approx(1, abs=1e-5)
    features = np.concatenate(
        [
            again.build_model()(torch.from_numpy(part.windows(slice(None))))[0].detach().numpy()
            for part in (parts.train, parts.test)
        ]
    )
    probe = np.linalg.lstsq(
        np.c_[features, np.ones(len(features))][: len(parts.train)],
        parts.train.labels[:, 0] - 1.0,
        rcond=None,
    )[0]
    guessed = np.c_[features, np.ones(len(features))][len(parts.train) :] @ probe
    told = np.corrcoef(guessed, parts.test.labels[:, 0])[0, 1]
    assert told > 0.6, "four features hold, linearly, where the price goes"


def test_shuffled_labels_teach_nothing(parts: Split) -> None:
    """A leak from label to window would show here: there is nothing else to learn from."""
    chance = np.random.default_rng(0)
    mixed = replace(
        parts, train=replace(parts.train, labels=chance.permutation(parts.train.labels))
    )
    origin = Origin("shuffled", "1", CHANNELS, ("a tape",))
    artifact = train(mixed, TINY, HORIZONS, OPTIONS, origin, SETTINGS)
    for report in training_record(artifact).test:
        assert report.macro_f1.value < 0.42
        assert report.log_loss > 0.99 * np.log(3) - 0.05


def test_a_run_that_was_cut_off_goes_on_to_the_same_bits(parts: Split, tmp_path: Path) -> None:
    straight = trainer(parts).run().state_dict()
    path = tmp_path / "run.checkpoint"

    class CutOff(Exception):
        pass

    def cut_off(epoch: object) -> None:
        raise CutOff

    with pytest.raises(CutOff):
        trainer(parts, path=path).run(on_epoch=cut_off)
    resumed = trainer(parts, path=path)
    assert [one.number for one in resumed.history] == [1]
    weights = resumed.run().state_dict()
    assert all(torch.equal(weights[key], straight[key]) for key in straight)
    with pytest.raises(ConfigError, match="other events or options"):
        trainer(parts, replace(OPTIONS, seed=4), path)
    path.write_bytes(b"torn")
    with pytest.raises(ConfigError, match="no checkpoint"):
        trainer(parts, path=path)


def test_a_network_that_does_not_fit_is_refused_before_it_is_trained(parts: Split) -> None:
    tape = parts.train.tape
    for architecture, options, why in (
        ("nowhere.networks:Net", {}, "install the package"),
        ("own_models:Pooled", {"num_in": 50, "num_out": 3}, "ask for"),
        ("own_models:Pooled", {"num_in": 7, "num_out": 10}, "channels"),
        ("exported", {}, "no program"),
    ):
        base = ModelConfig(architecture=architecture, options=options, num_features=4)
        with pytest.raises(ConfigError, match=f"(?s)cannot be trained.*{why}"):
            Trainer(
                config_for(base, tape, HORIZONS),
                fit_normalisation(tape.rows),
                parts.train,
                parts.validation,
                OPTIONS,
                device=CPU,
            )


def test_it_stops_when_validation_gets_no_better(parts: Split) -> None:
    noise = replace(
        parts,
        validation=replace(
            parts.validation,
            labels=np.random.default_rng(1).permutation(parts.validation.labels),
        ),
    )
    one = trainer(noise, replace(OPTIONS, epochs=50, patience=1))
    one.run()
    assert len(one.history) == one.best_epoch + 2
    best = min(one.history, key=lambda epoch: epoch.validation_loss)
    assert best.number == one.best_epoch


def test_figures_are_scikit_learn_s() -> None:
    chance = np.random.default_rng(5)
    num = 600
    tape = Tape(
        np.zeros((num, 1), np.float32), np.arange(num) * 10**6, np.zeros(num),
        np.arange(num) // 300, ("v:A", "v:B"), 1,
    )  # fmt: skip
    labels = chance.integers(0, 3, (num, 1)).astype(np.int8)
    labels[chance.random(num) < 0.1] = UNKNOWN
    scores = chance.dirichlet((1, 1, 1), num)
    scores[np.arange(num), np.maximum(labels[:, 0], 0)] += 0.4
    scores = (scores / scores.sum(axis=1, keepdims=True)).astype(np.float32)
    part = Part(tape, np.arange(num), labels)
    guesses = {"zero": np.zeros((num, 1), np.int64)}
    [report] = evaluate(part, scores, (7,), guesses)
    known = labels[:, 0] != UNKNOWN
    true, guessed = labels[known, 0], scores[known].argmax(axis=1)
    assert report.num == known.sum()
    assert report.macro_f1.value == pytest.approx(f1_score(true, guessed, average="macro"))
    assert report.log_loss == pytest.approx(log_loss(true, scores[known]), rel=1e-5)
    expected = precision_recall_fscore_support(true, guessed)
    for one, *figures in zip(report.classes.values(), *expected, strict=True):
        assert [one.precision, one.recall, one.f1, one.num] == pytest.approx(figures)
    for symbol, those in (("v:A", slice(0, 300)), ("v:B", slice(300, None))):
        of_symbol = macro_f1(labels[those, 0], scores[those].argmax(axis=1))
        assert report.by_symbol[symbol] == of_symbol
    assert sum(one.num for one in report.calibration) == report.num
    assert report.macro_f1.low < report.macro_f1.value < report.macro_f1.high
    ahead = report.baselines["zero"].model_ahead
    zero = f1_score(true, np.zeros_like(true), average="macro")
    assert ahead.value == pytest.approx(report.macro_f1.value - zero)
    # The interval of 600 independent windows is about that of the mean of so many.
    assert 0.04 < report.macro_f1.high - report.macro_f1.low < 0.14


def test_an_interval_is_wider_where_neighbours_are_alike() -> None:
    """Thirty windows of one block count as one."""
    chance = np.random.default_rng(6)
    widths = []
    for repeat in (1, 30):
        labels = np.repeat(chance.integers(0, 3, 900 // repeat), repeat).astype(np.int8)
        right = np.repeat(chance.random(900 // repeat) < 0.6, repeat)
        scores = np.eye(3, dtype=np.float32)[np.where(right, labels, (labels + 1) % 3)]
        tape = Tape(
            np.zeros((900, 1), np.float32), np.arange(900) * 5_000_000 // 30, np.zeros(900),
            np.zeros(900, np.int64), ("v:A",), 1,
        )  # fmt: skip
        [report] = evaluate(Part(tape, np.arange(900), labels[:, None]), scores, (1,), {})
        widths.append(report.macro_f1.high - report.macro_f1.low)
    assert widths[1] > 3 * widths[0]


def test_baselines_are_for_other_tapes_too() -> None:
    parts = split(planted_tape(4_000), HORIZONS, (0.6, 0.15))
    fitted = fit_baselines(parts.train, CHANNELS)
    other = planted_tape(500, seed=9)
    part = Part(other, other.ends(), np.zeros((len(other.ends()), 2), np.int8))
    found = fitted.guesses(part, HORIZONS, parts.thresholds_bps, CHANNELS)
    assert found.keys() == {"majority", "last_move", "imbalance"}
    pull = np.sign(other.rows[part.ends, IMBALANCE])
    assert (found["imbalance"][pull > 0, 0] == 0).mean() < 0.02
    assert len(set(found["majority"][:, 0])) == 1
    assert fit_baselines(parts.train, "other").imbalance == ()
    one_class = replace(parts.train, labels=np.full_like(parts.train.labels, 2))
    guessed = fit_baselines(one_class, CHANNELS).guesses(part, HORIZONS, (), CHANNELS)
    assert (guessed["imbalance"] == 2).all()
    assert "last_move" not in guessed


def test_drift_is_seen_and_none_where_there_is_none(parts: Split) -> None:
    origin = Origin("planted", "1", CHANNELS, ("a tape",))
    options = replace(OPTIONS, epochs=1)
    artifact = train(parts, TINY, HORIZONS, options, origin, SETTINGS)
    same = drift_on(artifact, planted_tape(4_000, seed=8, channel=7), SETTINGS)
    assert max(same.channels.values()) < NOTABLE
    moved = planted_tape(4_000, seed=8, channel=7)
    moved.rows[:, 3] += 2
    other = drift_on(artifact, moved, SETTINGS)
    assert max(other.channels, key=lambda name: other.channels[name]) == "channel 3"
    assert other.channels["channel 3"] > LARGE
    assert len(other.outputs) == 4 + 6
    reports = judge_on(artifact, planted_tape(800, seed=8), SETTINGS)
    assert [one.horizon for one in reports] == [*HORIZONS]
    later = judge_on(artifact, planted_tape(4_000, seed=8, channel=7), SETTINGS, later=True)
    begins = 4_000 * 0.75
    assert later[0].num == pytest.approx(4_000 - begins, abs=30)
    with pytest.raises(ConfigError, match="longer and later tapes"):
        judge_on(artifact, planted_tape(800, seed=8), SETTINGS, later=True)
    with pytest.raises(ConfigError, match=r"window\.num_steps"):
        judge_on(artifact, planted_tape(100, num_steps=9), SETTINGS)
    plain = replace(artifact, training=None)
    with pytest.raises(ConfigError, match="no record"):
        judge_on(plain, planted_tape(800), SETTINGS)


def test_values_that_repeat_have_a_bin_of_their_own() -> None:
    values = np.array([[0.0]] * 80 + [[1.0]] * 20, np.float32)
    before = distributions(values)
    assert drifts(before, values)[0] == pytest.approx(0)
    assert drifts(before, 1 - values)[0] > LARGE


def test_deeplob_has_the_published_size() -> None:
    """About 60 thousand parameters at 100 steps of 40 channels; its head of three scores."""
    config = ModelConfig(
        architecture="deeplob", num_channels=40, num_steps=100, num_features=1,
        score_names=("down", "flat", "up"), score_activation="softmax",
    )  # fmt: skip
    network = DeepLob(config, Normalisation(np.zeros(40), np.ones(40)))
    features = sum(one.numel() for one in network.parameters()) - 65  # our feature's
    assert features == 60_947
    _, scores = network(torch.randn(2, 40, 100))
    assert scores.sum(dim=1).tolist() == pytest.approx([1, 1])
    with pytest.raises(ValueError, match="40 channels"):
        DeepLob(
            ModelConfig(architecture="deeplob", num_channels=30),
            Normalisation(np.zeros(30), np.ones(30)),
        )


def test_deeplob_learns_what_is_in_the_book(parts: Split) -> None:
    base = ModelConfig(architecture="deeplob", num_features=4)
    options = TrainingOptions(epochs=9, batch_size=64, learning_rate=1e-3, patience=9)
    one = Trainer(
        config_for(base, parts.train.tape, HORIZONS),
        fit_normalisation(parts.train.tape.rows),
        parts.train,
        parts.validation,
        options,
        device=CPU,
    )
    one.run()
    assert min(one.history[-1].macro_f1) > 0.7


def test_deeplob_reads_a_book_level_by_level() -> None:
    """Its first convolution sees the price and the size of one side of one level together."""
    config = ModelConfig(architecture="deeplob", num_channels=50, num_steps=1)
    network = DeepLob(config, Normalisation(np.zeros(50), np.ones(50)))
    pairs = network.order.reshape(-1, 2).tolist()
    assert pairs[:4] == [[20, 30], [0, 10], [21, 31], [1, 11]]
    assert sorted(network.order.tolist()) == list(range(40))


def write_fi2010(path: Path, num: int, seed: int) -> np.ndarray:
    chance = np.random.default_rng(seed)
    matrix = chance.standard_normal((149, num))
    matrix[144:] = chance.integers(1, 4, (5, num))
    path.write_text("\n".join("   ".join(f"{one:.7e}" for one in row) for row in matrix) + "\n")
    return matrix


def test_fi2010_is_read_as_published(tmp_path: Path) -> None:
    known = write_fi2010(tmp_path / "train.txt", 90, 0)
    asked = [write_fi2010(tmp_path / f"test{n}.txt", 40, 1 + n) for n in range(2)]
    tests = [tmp_path / "test0.txt", tmp_path / "test1.txt"]
    parts = read_fi2010(
        tmp_path / "train.txt", tests, (10, 50), num_steps=10, validation_share=0.3
    )  # fmt: skip
    ask_price, ask_size, bid_price, bid_size = (known[kind:40:4] for kind in range(4))
    expected = np.concatenate([bid_price, bid_size, ask_price, ask_size]).T
    assert parts.train.tape.rows == pytest.approx(expected, rel=1e-5)
    # 1 is up, 3 is down.
    rows = [144, 147]
    assert (parts.train.labels == 3 - known[rows][:, parts.train.ends].T).all()
    both = np.concatenate(asked, axis=1)
    assert (parts.test.labels == 3 - both[rows][:, parts.test.ends].T).all()
    assert len(parts.test) == 2 * (40 - 10 + 1), "no window spans two files"
    assert parts.train.ends.max() + 50 < parts.validation.ends.min() - 9
    with pytest.raises(ConfigError, match="labels at 10, 20, 30, 50, 100"):
        read_fi2010(tests[0], tests, (11,), num_steps=5, validation_share=0.2)
    (tmp_path / "short.txt").write_text("1 2 3\n4 5 6\n")
    with pytest.raises(ConfigError, match="has 2 rows"):
        read_fi2010(tmp_path / "short.txt", tests, (10,), num_steps=5, validation_share=0.2)


@pytest.mark.parametrize(
    ("base", "precision"),
    [
        (ModelConfig(architecture="deeplob", num_features=4), "fp32"),
        (
            ModelConfig(
                architecture="own_models:Pooled",
                options={"num_in": 50, "num_out": 10},
                num_features=4,
            ),
            "fp32",
        ),
        (TINY, "bf16"),
    ],
    ids=["deeplob", "own", "bf16"],
)
def test_what_is_trained_serves(parts: Split, base: ModelConfig, precision: str) -> None:
    """The engine that judges it checks its reference windows first."""
    origin = Origin("any", "1", CHANNELS, ("a tape",))
    options = replace(OPTIONS, epochs=1, stride=8, precision=precision)
    artifact = train(parts, base, HORIZONS, options, origin, SETTINGS)
    record = training_record(artifact)
    assert record.options.precision == precision
    assert np.isfinite(record.epochs[0].validation_loss)
    assert artifact.config.architecture == base.architecture


def test_an_artifact_s_record_is_plain_json(parts: Split) -> None:
    origin = Origin("planted", "1", CHANNELS, ("a tape",))
    artifact = train(parts, TINY, HORIZONS, replace(OPTIONS, epochs=1), origin, SETTINGS)
    assert artifact.training
    assert json.loads(artifact.training)["horizons"] == [*HORIZONS]
