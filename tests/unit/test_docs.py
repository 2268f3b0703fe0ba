"""The documentation is true: what it names exists, what it shows is what the code gives."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fastavro
import numpy as np
import pytest
import typer
from columns import columns_of
from confluent_kafka import Consumer, Message, Producer
from waiting import wait_until

from consumers.channels import Market50
from schemas import messages
from schemas.codec import Codec, fingerprint, released_schemas, schema_text
from schemas.messages import Book, FeatureVector, MarketEvent, Sample, Trade
from schemas.settings import (
    SchemaRegistrySettings,
    Settings,
    load_settings,
    reference_tables,
)
from tapeline.cli import app
from tapeline.producer import MarketEventProducer
from tapeline.topics import ensure_topics

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
CODEC = Codec(SchemaRegistrySettings())
LONG_S = 30.0
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)

MESSAGES = {
    "MarketEvent": "market_event",
    "FeatureVector": "feature_vector",
    "DeadLetter": "dead_letter",
}
TRADE = MarketEvent(
    "t-1", "BTCUSDT", "mine", 1_723_161_254_087_891, Trade(61837.63, 0.02, "sell"), 1
)


def text_of(name: str) -> str:
    return (ROOT / "docs" / name).read_text()


def blocks(page: str, language: str) -> list[str]:
    """The fenced blocks of a language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text_of(page), re.MULTILINE | re.DOTALL)


def table_rows(text: str, header: str) -> Iterator[list[str]]:
    """The cells of each row of the table that begins with ``header``."""
    _, found, rest = text.partition(f"\n{header}")
    assert found, f"there is no table {header!r}"
    for line in rest.splitlines()[2:]:
        if not line.startswith("|"):
            return
        yield [cell.strip() for cell in line.strip("|").split(" | ")]


@each_page
def test_relative_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text())
    relative = [link for link in links if "://" not in link and not link.startswith("mailto:")]
    assert [link for link in relative if not (page.parent / link).exists()] == []


@each_page
def test_paths_in_backticks_exist(page: Path) -> None:
    """A path begins with a folder or file of the repository's root."""
    heads = {path.name for path in ROOT.iterdir()}
    quoted = re.findall(r"`([\w.*-]+(?:/[\w.*-]+)*/?)`", page.read_text())
    paths = [one for one in quoted if one.partition("/")[0] in heads and ("/" in one or "." in one)]
    own_files = [one for one in quoted if re.fullmatch(r"[\w-]+\.(toml|yml|lock)", one)]
    named = {*paths, *own_files} - {"tapeline.toml"}  # the user's
    assert [one for one in sorted(named) if not any(ROOT.glob(one.rstrip("/")))] == []


@each_page
def test_commands_and_options_exist(page: Path) -> None:
    """``tapeline <command>`` in backticks or on a line of a console block."""
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    consoles = "".join(re.findall(r"```console\n(.*?)```", page.read_text(), re.DOTALL))
    shown = re.findall(r"tapeline ([^\n`#&|]+)", consoles)
    shown += re.findall(r"`(?:TAPELINE_\S+ )*tapeline ([^`\n]+)`", page.read_text())
    for line in shown:
        words = line.split()
        if not words[0].isalpha() or words[0].isupper():
            continue  # an option of tapeline itself, a placeholder, a rule of layers
        assert words[0] in commands, line
        command = commands[words[0]]
        if (family := getattr(command, "commands", None)) and len(words) > 1:
            assert words[1] in family, line
            command = family[words[1]]
        options = {name for one in command.params for name in one.opts}
        given = {word.partition("=")[0] for word in words if word.startswith("--")}
        assert given <= {*options, "--help"}, line


def test_some_commands_are_found_at_all() -> None:
    """The test above reads something: every command has its place in one page or another."""
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    shown = "".join(page.read_text() for page in PAGES)
    assert [name for name in commands if f"tapeline {name}" not in shown] == []


# docs/settings.md


def test_settings_page_is_up_to_date() -> None:
    """``python -m schemas.settings`` prints its tables."""
    assert text_of("settings.md").rstrip().endswith(reference_tables())


def test_every_setting_is_explained() -> None:
    rows = list(table_rows(reference_tables().join(["\n", ""]), "| key |"))
    assert len(rows) > 40
    assert [key for key, _, meaning in rows if not meaning] == []


@pytest.fixture
def settings_example(tmp_path: Path) -> Path:
    (example,) = blocks("settings.md", "toml")
    path = tmp_path / "tapeline.toml"
    path.write_text(example)
    return path


def test_settings_example_says_what_the_page_says(settings_example: Path) -> None:
    settings = load_settings(settings_example)
    assert (settings.kafka.num_partitions, settings.kafka.replication_factor) == (12, 3)
    assert settings.kafka.client["security.protocol"] == "SASL_SSL"
    names = [lane.name for lane in settings.active_lanes]
    assert names == ["realtime", "market-data", "batch", "historical", "research"]
    realtime, default = settings.lane("realtime"), load_settings().lane("realtime")
    assert realtime == default.model_copy(update={"deadline_ms": 20})
    assert settings.lane("research").topic == "market-events.research"
    assert settings.model.artifact == Path("models/mine-2024.08")


def test_settings_variables_set_what_the_page_says(
    settings_example: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = load_settings(settings_example)
    for variable, _ in table_rows(text_of("settings.md"), "| variable |"):
        monkeypatch.setenv(*variable.strip("`").split("=", 1))
    settings = load_settings(settings_example, kafka={"num_partitions": 8})
    assert settings.kafka.bootstrap_servers == "broker:9092"
    assert settings.kafka.client == {**file.kafka.client, "sasl.password": "secret"}
    assert settings.kafka.num_partitions == 8
    assert (settings.lane("realtime").stride, settings.lane("realtime").deadline_ms) == (2, 20)
    assert "market-data" not in [lane.name for lane in settings.active_lanes]
    assert not settings.redis.url


# docs/channels.md


def test_channel_table_names_each_channel_once() -> None:
    """Ranges add up to 0 … 49, in order."""
    numbers: list[int] = []
    for channels, *_ in table_rows(text_of("channels.md"), "| channel | name |"):
        first, _, last = channels.partition("–")  # noqa: RUF001
        numbers += range(int(first), int(last or first) + 1)
    assert numbers == list(range(Market50.num_channels))


def test_channel_example_is_what_the_code_gives() -> None:
    (example,) = blocks("channels.md", "python")
    names: dict[str, Any] = {}
    exec(example, vars(messages).copy(), names)
    tape = names["tape"]
    events = [
        MarketEvent(str(number), "S", "V", 10**15 + time_us, payload)
        for number, (time_us, payload) in enumerate(tape)
    ]
    market, num_events = Market50(), len(events)
    rows, _ = market.rows(
        columns_of(events),
        np.arange(num_events),
        np.zeros(num_events, np.int64),
        np.zeros(num_events, bool),
        market.empty(),
    )
    heading = " | ".join(type(payload).__name__ for _, payload in tape)
    shown = list(table_rows(text_of("channels.md"), f"| channel | {heading} |"))
    assert len(shown) == 18
    for name, *cells in shown:
        values = [float(cell.replace("−", "-")) for cell in cells]  # noqa: RUF001
        np.testing.assert_allclose(rows[:, int(name.split()[0])], values, atol=6e-4, err_msg=name)


def test_emptying_defaults_are_the_settings() -> None:
    window = load_settings().window
    for setting, default, _ in table_rows(text_of("channels.md"), "| setting | default |"):
        value = getattr(window, setting.strip("`").removeprefix("window."))
        assert value == float(default.replace(",", "")), setting


# docs/wire.md


def test_fingerprints_are_those_of_the_current_schemas() -> None:
    shown = {
        message: shown_fingerprint.strip("`").encode()
        for message, _, shown_fingerprint in table_rows(text_of("wire.md"), "| message | schema |")
    }
    current = {
        message: fingerprint(json.loads(schema_text(name)))  # type: ignore[arg-type]
        for message, name in MESSAGES.items()
    }
    assert shown == current
    for name in MESSAGES.values():
        newest = released_schemas(name)[-1]  # type: ignore[arg-type]
        assert newest == json.loads(schema_text(name))  # type: ignore[arg-type]


def test_fingerprints_are_what_the_avro_specification_says() -> None:
    """CRC-64-AVRO from the specification's own few lines; its bytes in little-endian order."""
    empty = 0xC15D213AA4D7A795
    table = []
    for number in range(256):
        for _ in range(8):
            number = (number >> 1) ^ (empty & -(number & 1))
        table.append(number)
    for name in MESSAGES.values():
        schema = json.loads(schema_text(name))  # type: ignore[arg-type]
        crc = empty
        for byte in fastavro.schema.to_parsing_canonical_form(schema).encode():
            crc = (crc >> 8) ^ table[(crc ^ byte) & 0xFF]
        assert fingerprint(schema).decode() == crc.to_bytes(8, "little").hex()


def test_reasons_are_those_that_the_code_gives() -> None:
    raised = set()
    for folder in ("schemas", "consumers"):
        for path in (ROOT / folder).glob("*.py"):
            raised |= set(
                re.findall(
                    r'(?:InvalidEvent\(|_poison\(|PoisonRecord\(\s*"\w+",)\s*"(\w+)"',
                    path.read_text(),
                )
            )
    sentence = re.search(r"Its `dlq-reason` is one of (.*?)\. ", text_of("wire.md"), re.DOTALL)
    assert sentence
    assert set(re.findall(r"`(\w+)`", sentence[1])) == raised


def test_bytes_of_arrays_are_what_the_code_gives() -> None:
    shown = [
        row[-1].strip("`").replace(" ", "")
        for row in table_rows(text_of("wire.md"), "| field | holds |")
    ]
    features = np.array([0.5, -1.25, 3.0], np.float32)
    vector = FeatureVector("e", "S", "V", 1, "l", "m", "c", "t", 0, 0, features)
    value = CODEC.encode_feature(vector)
    assert shown == [
        Book.from_levels([(61837.63, 3.79)], []).bids.hex(),
        Sample.from_values([0.1, -0.2, 0.3]).values.hex(),
        features.astype("<f4").tobytes().hex(),
    ]
    assert bytes.fromhex(shown[-1]) in value


def test_bytes_of_an_event_are_what_the_code_gives() -> None:
    (example,) = blocks("wire.md", "")[:1]
    shown = "".join(line.split("  ")[0].replace(" ", "") for line in example.splitlines())
    value = CODEC.encode_event(TRADE)
    assert shown == value.hex()
    assert f"these {len(value)} bytes" in text_of("wire.md")


def example_for(settings: Settings, number: int) -> str:
    """A Python block of docs/wire.md, with this test's broker, topics and group in it."""
    text = blocks("wire.md", "python")[number]
    lane = settings.lane("realtime")
    for shown, ours in {
        "127.0.0.1:9092": settings.kafka.bootstrap_servers,
        "market-events.realtime": lane.topic,
        "features.realtime": lane.output_topic,
        "my-strategy": lane.group,
    }.items():
        text = text.replace(f'"{shown}"', f'"{ours}"')
    return text


def read_all(settings: Settings, topic: str, num_messages: int) -> list[Message]:
    consumer = Consumer(
        {
            "bootstrap.servers": settings.kafka.bootstrap_servers,
            "group.id": f"{topic}.reader",
            "auto.offset.reset": "earliest",
        }
    )
    consumer.subscribe([topic])
    found: list[Message] = []

    def enough() -> bool:
        found.extend(consumer.consume(num_messages, 0.2))
        return len(found) >= num_messages

    wait_until(enough, LONG_S, f"{num_messages} messages of {topic}")
    consumer.close()
    return found


def test_producer_example_makes_an_event_that_we_read(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same bytes and the same partition as our own producer's."""
    ensure_topics(settings)
    monkeypatch.chdir(ROOT)
    exec(example_for(settings, 0), {})
    with MarketEventProducer(settings) as producer:
        producer.produce(TRADE, lane="realtime")
    theirs, ours = read_all(settings, settings.lane("realtime").topic, 2)
    assert CODEC.decode_event(theirs.value(), theirs.headers() or []) == TRADE
    assert (theirs.key(), theirs.value()) == (ours.key(), ours.value())
    assert (theirs.partition(), dict(theirs.headers() or [])) == (
        ours.partition(),
        dict(ours.headers() or []),
    )


def test_partitions_of_keys_are_those_that_the_page_names(settings: Settings) -> None:
    ensure_topics(settings)
    assert settings.kafka.num_partitions == 4
    named = re.findall(r"`(\w+)` (?:is )?in partition (\d)", text_of("wire.md"))
    assert len(named) == 2
    with MarketEventProducer(settings) as producer:
        for symbol, _ in named:
            event = MarketEvent(symbol, symbol, "V", 1, Trade(1.0, 1.0))
            producer.produce(event, lane="realtime")
    messages_read = read_all(settings, settings.lane("realtime").topic, len(named))
    actual = {
        (message.key() or b"").decode(): str(message.partition()) for message in messages_read
    }
    assert actual == dict(named)


class _Enough(Exception):
    """Ends the example, which would wait for more."""


def test_reader_example_reads_our_feature(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    ensure_topics(settings)
    monkeypatch.chdir(ROOT)
    features = np.arange(64, dtype=np.float32)
    vector = FeatureVector("e-1", "S", "V", 1, "realtime", "m", "c", "t", 0, 0, features)
    value = CODEC.encode_feature(vector)
    producer = Producer({"bootstrap.servers": settings.kafka.bootstrap_servers})
    producer.produce(settings.lane("realtime").output_topic, value, "S")
    assert producer.flush(LONG_S) == 0

    def end(*values: Any) -> None:
        raise _Enough(*values)

    names: dict[str, Any] = {"print": end}
    with pytest.raises(_Enough) as printed:
        exec(example_for(settings, 1), names)
    names["consumer"].close()
    event_id, flags, shown = printed.value.args
    assert (event_id, flags) == ("e-1", 0)
    np.testing.assert_array_equal(shown, features)
