"""Dead letters on a real broker: listed, shown, replayed and purged by the commands."""

import itertools
import json
import os
import re
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
from confluent_kafka import Consumer, Message, Producer, TopicPartition
from confluent_kafka.admin import (
    AdminClient,
    AlterConfigOpType,
    ConfigEntry,
    ConfigResource,
    ResourceType,
)
from late_leader import late_leader
from typer.testing import CliRunner
from waiting import wait_until

from consumers.envelopes import ATTEMPTS_HEADER, REPLAYED_FROM_HEADER, Envelopes
from consumers.records import Record
from schemas.codec import Codec
from schemas.errors import PoisonRecord, Stage
from schemas.messages import Headers, MarketEvent, Trade
from schemas.settings import Settings, as_environment
from tapeline.cli import app
from tapeline.clients import check_kafka, list_offsets, make_admin
from tapeline.dlq import LetterId, fold, read_index, read_letters, replay, replaying
from tapeline.dlq.reading import read_records, snapshot
from tapeline.stack import Stack
from tapeline.topics import ensure_topics

MakeSettings = Callable[..., Settings]
PAGE = Path(__file__).parents[2] / "docs" / "dlq.md"
LONG_S = 30.0
HOUR_US = 3600 * 10**6
NOON_US = 1_723_118_400 * 10**6  # 2024-08-08T12:00Z
HEADERS: Headers = [("b", b"\x00\xff"), ("a", None), ("b", b"again"), ("traceparent", b"00-1")]


class Original(NamedTuple):
    """A record that failed, and why."""

    key: bytes | None
    value: bytes | None
    headers: Headers = ()
    lane: str = "realtime"
    stage: Stage = "decode"
    reason: str = "bad_avro"
    failed_at_us: int = NOON_US


class Sent(NamedTuple):
    """Any record for a DLQ topic."""

    topic: str
    key: bytes | None
    value: bytes | None
    headers: Headers


class Dlq:
    """The letters of one test, and the commands on them."""

    def __init__(self, settings: Settings) -> None:
        ensure_topics(settings)
        self.settings = settings
        self._codec = Codec(settings.schema_registry)

    def letter(self, original: Original, offset: int = 7) -> Sent:
        """What a worker would send."""
        lane = self.settings.lane(original.lane)
        record = Record(
            *(lane.name, (lane.topic, 1), offset, original.key, original.value),
            *(original.headers, NOON_US),
        )
        poison = PoisonRecord(original.stage, original.reason, f"{original.reason}: it is bad")
        envelopes = Envelopes(self._codec, "c1", ())
        return Sent(*envelopes.dead_letter(lane, record, poison, original.failed_at_us, "m1"))

    def bury(self, *originals: Original) -> list[LetterId]:
        """Dead letters as a worker sends them; returns their IDs."""
        return self.put(*(self.letter(one, number) for number, one in enumerate(originals)))

    def put(self, *messages: Sent) -> list[LetterId]:
        """Any records on DLQ topics; returns their IDs."""
        producer = Producer(
            self.client() | {"partitioner": "murmur2_random", "message.max.bytes": 3_000_000}
        )
        lanes = {lane.dlq_topic: lane.name for lane in self.settings.active_lanes}
        ids: dict[int, LetterId] = {}

        def note(number: int, message: Message) -> None:
            lane = lanes[message.topic() or ""]
            ids[number] = LetterId(lane, message.partition() or 0, message.offset() or 0)

        for number, (topic, key, value, headers) in enumerate(messages):
            producer.produce(
                topic,
                value,
                key,
                headers=[*headers],
                on_delivery=lambda _, message, number=number: note(number, message),
            )
            assert producer.flush(LONG_S) == 0
        return [ids[number] for number in range(len(messages))]

    def client(self) -> dict[str, Any]:
        return {"bootstrap.servers": self.settings.kafka.bootstrap_servers}

    def run(self, *arguments: object, exit_code: int = 0) -> Any:
        """What ``tapeline dlq`` gives; fails unless it ends with that exit code."""
        words = ["dlq", *map(str, arguments)]
        result = CliRunner().invoke(app, words, env=as_environment(self.settings))
        assert result.exit_code == exit_code, (result.output, result.exception)
        return result

    def json(self, *arguments: object, exit_code: int = 0) -> Any:
        return json.loads(self.run(*arguments, "--json", exit_code=exit_code).stdout)

    def states(self, *arguments: object) -> dict[str, str]:
        return {one["id"]: one["state"] for one in self.json("ls", *arguments)["letters"]}

    def records(self, topic: str) -> list[Message]:
        """All that is on a topic and committed."""
        consumer = Consumer(self.client() | {"group.id": "reader", "auto.offset.reset": "earliest"})
        partitions = [TopicPartition(topic, n) for n in range(check_kafka(self.settings)[topic])]
        ends = list_offsets(make_admin(self.settings), self.settings, partitions, latest=True)
        found: list[Message] = []
        for partition in partitions:
            partition.offset = 0
            consumer.assign([partition])
            end = ends[topic, partition.partition]

            def all_read(end: int = end) -> bool:
                message = consumer.poll(0.1)
                if message is not None:
                    assert message.error() is None
                    found.append(message)
                return consumer.position(consumer.assignment())[0].offset >= end

            if end > consumer.get_watermark_offsets(partition, LONG_S)[0]:
                wait_until(all_read, LONG_S, f"the end of {partition}")
        consumer.close()
        return found

    def num_everywhere(self) -> int:
        """Records on all topics of the lanes."""
        lanes = self.settings.active_lanes
        topics = [topic for lane in lanes for topic in (lane.topic, lane.dlq_topic)]
        return sum(len(self.records(topic)) for topic in topics)


@pytest.fixture
def dlq(make_settings: MakeSettings) -> Dlq:
    """Two lanes of two partitions are enough to mix them up."""
    others = {name: {"enabled": False} for name in ("market-data", "historical", "background")}
    return Dlq(make_settings(lanes=others, kafka={"num_partitions": 2}))


def trade(event_id: str = "e1", symbol: str = "BTCUSDT") -> MarketEvent:
    return MarketEvent(event_id, symbol, "V", NOON_US, Trade(1.5, 2.0, "sell"))


def test_ls_shows_every_letter_and_counts_the_causes(dlq: Dlq) -> None:
    early, late, other = dlq.bury(
        Original(b"A", b"\x00"),
        Original(b"B", None, reason="no_value", failed_at_us=NOON_US + 1),
        Original(b"A", b"x", lane="batch", stage="window", reason="bad_sample"),
    )
    listed = dlq.json("ls")
    assert {one["id"] for one in listed["letters"]} == {str(early), str(late), str(other)}
    newest = listed["letters"][0]
    assert newest == {
        "id": str(late),
        "failed_at": "2024-08-08T12:00:00.000Z",
        "lane": "realtime",
        "stage": "decode",
        "reason": "no_value",
        "attempts": 1,
        "source": f"{dlq.settings.lane('realtime').topic}:1:1",
        "message": "no_value: it is bad",
        "state": "open",
        "symbol": "B",
    }
    assert [(one["reason"], one["open"]) for one in listed["summary"]] == [
        ("bad_sample", 1),
        ("bad_avro", 1),
        ("no_value", 1),
    ]
    limited = dlq.json("ls", "--limit", 1)
    assert ([one["id"] for one in limited["letters"]], limited["num_letters"]) == ([str(late)], 3)
    assert "1 of 3 dead letters" in dlq.run("ls", "--limit", 1).stdout
    assert "no_value: it is bad" in dlq.run("ls").stdout


def test_an_empty_dlq_is_good(dlq: Dlq) -> None:
    assert dlq.json("ls") == {"num_letters": 0, "summary": [], "letters": []}
    assert "0 open of 0" in dlq.run("ls").stdout
    assert dlq.json("replay", "--all")["chosen"] == 0


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        (["--lane", "realtime"], "0123"),
        (["--lane", "batch", "--lane", "realtime"], "01234"),
        (["--stage", "window"], "34"),
        (["--reason", "bad_avro", "--reason", "no_value"], "012"),
        (["--symbol", "A"], "03"),
        (["--symbol", "A", "--stage", "decode"], "0"),
        (["--since", "2024-08-08T13:00"], "1234"),
        (["--since", "2024-08-08T15:00+02:00", "--until", "2024-08-08T15:00"], "12"),
        (["--until", "2024-08-08T12:00:00"], ""),
        (["--since", "1h"], ""),
    ],
    ids=str,
)
def test_filters_choose(dlq: Dlq, filters: list[str], expected: str) -> None:
    """Letters 0 to 4, each failed an hour after the one before it."""
    originals = [
        Original(b"A", b"0"),
        Original(b"B", b"1"),
        Original(None, b"2", reason="no_value"),
        Original(b"A", b"3", stage="window", reason="bad_sample"),
        Original(b"C", b"4", lane="batch", stage="window", reason="bad_sample"),
    ]
    late = [
        one._replace(failed_at_us=NOON_US + hour * HOUR_US) for hour, one in enumerate(originals)
    ]
    ids = dlq.bury(*late)
    assert dlq.states(*filters) == {str(ids[int(number)]): "open" for number in expected}
    if expected:
        assert dlq.json("replay", *filters, "--dry-run")["chosen"] == len(expected)
    dlq.json("purge", *filters, "--yes")
    purged = {id for id, state in dlq.states().items() if state == "purged"}
    assert purged == {str(ids[int(number)]) for number in expected}


def test_show_gives_the_event_if_there_is_one(dlq: Dlq) -> None:
    value = Codec(dlq.settings.schema_registry).encode_event(trade())
    [id] = dlq.bury(Original(b"BTCUSDT", value, HEADERS, stage="infer", reason="model_error"))
    shown = dlq.json("show", id)
    assert shown["event"]["payload"] == {"type": "trade", "price": 1.5, "size": 2.0, "side": "sell"}
    assert (shown["key"], shown["hex"], shown["value_bytes"]) == ("BTCUSDT", None, len(value))
    assert ["b", "0x00ff"] in shown["headers"]
    assert ["a", None] in shown["headers"]
    text = dlq.run("show", id).stdout
    assert '"event_id": "e1"' in text
    assert "traceparent: 00-1" in text


def test_show_dumps_what_is_no_event_and_writes_it_raw(dlq: Dlq, tmp_path: Any) -> None:
    value = bytes(range(256)) * 8
    [id] = dlq.bury(Original(b"\xff", value))
    text = dlq.run("show", id, "--raw", tmp_path / "value").stdout
    assert (tmp_path / "value").read_bytes() == value
    assert "00000010  10 11 12" in text
    assert "1,024 bytes more" in text
    assert "0xff" in text
    assert dlq.json("show", id)["hex"] == value.hex()


def test_show_of_what_is_not_there_exits_1(dlq: Dlq, tmp_path: Any) -> None:
    [id] = dlq.bury(Original(b"A", None))
    for absent in (f"realtime:{id.partition}:99", "realtime:77:0", "batch:0:0"):
        assert "there is no letter" in dlq.run("show", absent, exit_code=1).stderr
    assert "no value" in dlq.run("show", id, "--raw", tmp_path / "x", exit_code=2).stderr


def test_a_replay_brings_back_the_original(dlq: Dlq) -> None:
    """Key, value and headers as they were; the key's partition; attempts and where it failed."""
    originals = [
        Original(b"BTCUSDT", b"\x00\xff", HEADERS),
        Original(b"ETHUSDT", None),
        Original(None, b""),
        Original(b"", b"x" * 2_000_000),
    ]
    dlq.bury(*originals)
    assert dlq.json("replay", "--all")["replayed"] == 4
    topic = dlq.settings.lane("realtime").topic
    records = {record.key(): record for record in dlq.records(topic)}
    assert len(records) == 4
    for number, (key, value, headers, *_) in enumerate(originals):
        record = records[key]
        assert record.value() == value
        failed = f"{topic}:1:{number}".encode()
        added = [(ATTEMPTS_HEADER, b"1"), (REPLAYED_FROM_HEADER, failed)]
        assert record.headers() == [*headers, *added]
    # docs/wire.md: of 4 partitions BTCUSDT is in 2 and ETHUSDT in 1, so of 2 in 0 and 1.
    assert (records[b"BTCUSDT"].partition(), records[b"ETHUSDT"].partition()) == (0, 1)


def test_a_letter_that_failed_again_names_where_it_failed_last(dlq: Dlq) -> None:
    earlier = [(ATTEMPTS_HEADER, b"1"), ("x", b"y"), (REPLAYED_FROM_HEADER, b"first:0:5")]
    topic = dlq.settings.lane("realtime").topic
    [id] = dlq.bury(Original(b"A", b"v", earlier))
    assert dlq.json("show", id)["attempts"] == 2
    dlq.json("replay", id)
    [record] = dlq.records(topic)
    assert record.headers() == [
        ("x", b"y"),
        (ATTEMPTS_HEADER, b"2"),
        (REPLAYED_FROM_HEADER, f"{topic}:1:0".encode()),
    ]


def test_a_replay_keeps_the_order_of_a_symbol(dlq: Dlq) -> None:
    dlq.bury(*(Original(b"AB"[n % 2 : n % 2 + 1], str(n).encode()) for n in range(40)))
    dlq.json("replay", "--all")
    records = dlq.records(dlq.settings.lane("realtime").topic)
    for key in (b"A", b"B"):
        numbers = [int(record.value() or b"") for record in records if record.key() == key]
        assert numbers == sorted(numbers)
        assert len(numbers) == 20


def test_a_replayed_letter_is_closed_unless_asked_for_again(dlq: Dlq) -> None:
    first, second = dlq.bury(Original(b"A", b"1"), Original(b"A", b"2"))
    dlq.json("replay", first)
    assert dlq.states() == {str(first): "replayed", str(second): "open"}
    assert dlq.json("replay", "--all", "--dry-run")["chosen"] == 1
    refused = dlq.json("replay", first, exit_code=1)
    assert refused["missing"] == [f"{first}: it is replayed"]
    assert dlq.json("replay", "--all", "--again")["replayed"] == 2
    assert len(dlq.records(dlq.settings.lane("realtime").topic)) == 3
    absent = dlq.json("replay", "realtime:0:999", exit_code=1)
    assert absent["missing"] == ["realtime:0:999: there is no such letter"]


def test_a_dry_run_changes_nothing(dlq: Dlq) -> None:
    ids = dlq.bury(Original(b"A", b"1"), Original(b"B", b"2"))
    before = dlq.num_everywhere()
    planned = dlq.json("replay", "--all", "--dry-run")
    assert {one["id"] for one in planned["letters"]} == set(map(str, ids))
    assert dlq.json("purge", "--all", "--replayed", "--dry-run")["would_delete"] == 2
    assert "dry run" in dlq.run("purge", "--all", "--dry-run").stdout
    assert dlq.num_everywhere() == before == 2
    assert set(dlq.states().values()) == {"open"}


def test_a_replay_that_the_topic_refuses_leaves_the_letter_open(dlq: Dlq) -> None:
    """The broker refuses the large one; the others arrive."""
    small, large, last = dlq.bury(
        Original(b"A", b"1"), Original(b"A", b"x" * 200_000), Original(b"A", b"2")
    )
    topic = dlq.settings.lane("realtime").topic
    set_config(dlq, topic, "max.message.bytes", "100000")
    report = dlq.json("replay", "--all", exit_code=1)
    assert (report["replayed"], report["failed"], report["left_open"]) == (2, 1, 1)
    assert report["first_failures"][0].startswith(f"{large}: ")
    expected = {str(small): "replayed", str(large): "open", str(last): "replayed"}
    assert dlq.states() == expected
    set_config(dlq, topic, "max.message.bytes", "1000000")
    assert dlq.json("replay", "--all")["replayed"] == 1
    assert set(dlq.states().values()) == {"replayed"}


def test_a_replay_that_the_broker_lost_leaves_the_letter_open(dlq: Dlq) -> None:
    """See test_late_leader: librdkafka calls it delivered."""
    ids = dlq.bury(*(Original(b"A", str(number).encode()) for number in range(40)))
    topic = dlq.settings.lane("realtime").topic
    with late_leader(dlq.settings.kafka.bootstrap_servers, topic) as late:
        report = replay(late.through(dlq.settings), read_letters(dlq.settings, ids))
    assert late.num_refused == 1
    kept = {record.value() for record in dlq.records(topic)}
    assert report.num_failed > 0
    assert report.num_replayed == len(kept)
    assert list(dlq.states().values()).count("open") == 40 - len(kept)


def test_a_letter_of_no_topic_stays_open_and_makes_none(dlq: Dlq) -> None:
    [id] = dlq.bury(Original(b"A", b"1"))
    admin = AdminClient(dlq.client())
    topic = dlq.settings.lane("realtime").topic
    admin.delete_topics([topic])[topic].result(LONG_S)
    wait_until(lambda: topic not in check_kafka(dlq.settings), LONG_S, "the topic to be gone")
    result = dlq.run("replay", id, exit_code=1)
    assert f"its topic {topic} does not exist" in result.stderr
    assert dlq.states() == {str(id): "open"}
    assert topic not in check_kafka(dlq.settings)


def test_a_crash_before_the_receipt_leaves_the_letter_open(
    dlq: Dlq, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It then goes out a second time, under the same first source: a duplicate for the worker."""
    [id] = dlq.bury(Original(b"A", b"1"))

    class Crash(Exception):
        pass

    def crash(self: Any) -> int:
        if self._waiting:
            raise Crash
        return 0

    with monkeypatch.context() as patch:
        patch.setattr("tapeline.dlq.replaying.Receipts.write", crash)
        with pytest.raises(Crash):
            replay(dlq.settings, read_letters(dlq.settings, [id]))
    assert dlq.states() == {str(id): "open"}
    dlq.json("replay", id)
    first, second = dlq.records(dlq.settings.lane("realtime").topic)
    assert (first.value(), first.headers()) == (second.value(), second.headers())


def test_ctrl_c_leaves_the_rest_open(dlq: Dlq) -> None:
    ids = dlq.bury(*(Original(b"A", str(n).encode()) for n in range(5)))
    letters = read_letters(dlq.settings, ids)

    def interrupted() -> Any:
        for _ in range(2):
            yield next(letters)
        raise KeyboardInterrupt

    report = replay(dlq.settings, interrupted())
    assert (report.num_replayed, report.num_unmarked, report.interrupted) == (2, 0, True)
    states = [dlq.states()[str(id)] for id in ids]
    assert states == ["replayed"] * 2 + ["open"] * 3


def test_a_signal_ends_a_replay_in_order(dlq: Dlq) -> None:
    """What the summary says is what the receipts say."""
    dlq.bury(*(Original(b"A", str(n).encode()) for n in range(60)))
    process = subprocess.Popen(
        [*(sys.executable, "-m", "tapeline", "dlq", "replay"), "--all", "--rate", "10", "--json"],
        env=os.environ | as_environment(dlq.settings),
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        topic = dlq.settings.lane("realtime").topic
        wait_until(lambda: dlq.records(topic), LONG_S, "the first letters")
        process.send_signal(signal.SIGTERM)
        stdout, _ = process.communicate(timeout=LONG_S)
    finally:
        process.kill()
    assert process.returncode == 130
    report = json.loads(stdout)
    assert report["interrupted"]
    states = Counter(dlq.states("--limit", 0).values())
    assert states == {"replayed": report["replayed"], "open": report["left_open"]}
    assert 0 < states["replayed"] < 60
    assert len(dlq.records(topic)) == states["replayed"]


def test_a_failing_cluster_ends_a_replay(dlq: Dlq, stack: Stack) -> None:
    """The broker hangs: nothing is acknowledged, no more is sent, all stays open."""
    ids = dlq.bury(*(Original(b"A", str(n).encode()) for n in range(60)))
    letters = list(read_letters(dlq.settings, ids))
    broker = stack.start("kafka").pid
    assert broker is not None

    def hanging() -> Iterator[Any]:
        os.kill(broker, signal.SIGSTOP)
        yield from letters

    try:
        report = replay(dlq.settings, hanging(), delivery_timeout_s=1, rate_hz=10)
    finally:
        os.kill(broker, signal.SIGCONT)
    assert (report.num_replayed, report.interrupted) == (0, True)
    assert 1 <= report.num_failed < 60
    assert report.first_failures[0].startswith(f"{ids[0]}: ")
    assert set(dlq.states().values()) == {"open"}


def test_a_rate_spreads_the_letters(dlq: Dlq, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each waits for its turn, on a clock that moves half a second whenever it is looked at."""
    ids = dlq.bury(*(Original(b"A", str(n).encode()) for n in range(5)))
    clock = itertools.count(step=0.5)
    letters = list(read_letters(dlq.settings, ids))
    asked: list[float] = []

    def asking() -> Iterator[Any]:
        for letter in letters:
            asked.append(next(clock))
            yield letter
        asked.append(next(clock))

    monkeypatch.setattr(replaying, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    assert replay(dlq.settings, asking(), rate_hz=0.2).num_replayed == 5
    gaps = [later - earlier for earlier, later in itertools.pairwise(asked)]
    assert all(4 <= gap <= 6.5 for gap in gaps[1:]), gaps


def test_transactions_are_read_to_their_end(dlq: Dlq) -> None:
    """Markers and aborted letters leave gaps, also at the end; no letter hides behind them."""
    letter = dlq.letter(Original(b"A", b"v"))
    producer = Producer(dlq.client() | {"transactional.id": letter.topic})
    producer.init_transactions(LONG_S)
    for committed in (True, False, True, False):
        producer.begin_transaction()
        for _ in range(3):
            headers = [*letter.headers]
            producer.produce(letter.topic, letter.value, partition=0, headers=headers)
        assert producer.flush(LONG_S) == 0
        if committed:
            producer.commit_transaction(LONG_S)
        else:
            producer.abort_transaction(LONG_S)
    assert list(dlq.states("--limit", 0)) == [
        f"realtime:0:{offset}" for offset in (10, 9, 8, 2, 1, 0)
    ]
    assert dlq.json("replay", "--all")["replayed"] == 6
    assert set(dlq.states().values()) == {"replayed"}
    assert dlq.json("purge", "--replayed", "--yes")["deleted"] == 12
    assert dlq.states() == {}


def test_strangers_are_listed_and_harm_nothing(dlq: Dlq) -> None:
    topic = dlq.settings.lane("realtime").dlq_topic
    future_receipt = [("dlq-receipt", b"99"), ("dlq-state", b"replayed")]
    strangers = dlq.put(
        *(Sent(topic, b"A", b"\x00\x01", []), Sent(topic, b"A", b"", [("x", None)])),
        Sent(topic, None, None, []),
        Sent(topic, b"A", None, future_receipt),
        Sent(topic, b"A", b"{}", [("avro-fingerprint", b"b43e12e54308ea13")]),
    )
    [letter] = dlq.bury(Original(b"A", b"v"))
    expected = dict.fromkeys(map(str, strangers), "unreadable") | {str(letter): "open"}
    assert dlq.states() == expected
    assert "unreadable" in dlq.run("ls").stdout
    for stranger in strangers:
        dlq.run("show", stranger)
    assert dlq.json("replay", "--all")["replayed"] == 1
    refused = dlq.json("replay", strangers[0], exit_code=1)
    assert refused["missing"] == [f"{strangers[0]}: it is unreadable"]
    # It is in the way of a deletion until it is marked by its ID.
    dlq.json("purge", "--all", "--yes")
    assert dlq.states()[str(strangers[0])] == "unreadable"
    dlq.json("purge", *strangers, "--yes")
    dlq.json("purge", "--replayed", "--yes")
    assert dlq.states() == {}


def test_purge_marks_and_deletes_up_to_the_first_open_letter(dlq: Dlq) -> None:
    """All keys are one, so all letters are in one partition."""
    ids = dlq.bury(*(Original(b"A", str(n).encode(), reason=f"r{n}") for n in range(4)))
    assert dlq.json("purge", ids[0], "--yes")["marked"] == 1
    dlq.json("replay", ids[1])
    dlq.json("replay", ids[3])
    result = dlq.json("purge", "--replayed", "--yes")
    assert (result["chosen"], result["deleted"], result["closed_kept"]) == (0, 2, 1)
    assert dlq.states() == {str(ids[2]): "open", str(ids[3]): "replayed"}
    # Lane alone says where: nothing is marked.
    assert dlq.json("purge", "--replayed", "--lane", "realtime", "--yes")["chosen"] == 0
    assert dlq.states()[str(ids[2])] == "open"
    planned = dlq.json("purge", "--reason", "r2", "--replayed", "--dry-run")
    result = dlq.json("purge", "--reason", "r2", "--replayed", "--yes")
    assert (result["marked"], result["closed_kept"]) == (1, 0)
    assert (planned["would_delete"], result["deleted"]) == (5, 6)  # its receipt came on top
    assert dlq.states() == {}
    assert dlq.json("replay", ids[2], exit_code=1)["missing"][0].endswith("no such letter")


def test_purge_without_anybody_to_ask_wants_a_yes(dlq: Dlq) -> None:
    [id] = dlq.bury(Original(b"A", b"v"))
    assert "give --yes" in dlq.run("purge", "--all", exit_code=2).stderr
    assert dlq.states() == {str(id): "open"}


def test_letters_that_come_meanwhile_are_for_the_next_time(dlq: Dlq) -> None:
    """A read ends where its snapshot ends, in each partition, however far the topic has grown."""
    ids = dlq.bury(*(Original(b"BTCUSDT", b"v") for _ in range(3)), Original(b"ETHUSDT", b"v"))
    spans = snapshot(dlq.settings)
    dlq.bury(*(Original(key, b"w") for key in (b"BTCUSDT", b"ETHUSDT") for _ in range(20)))
    assert set(fold(read_records(dlq.settings, spans)).ids("open")) == set(ids)
    assert len(read_index(dlq.settings).ids("open")) == 44


def set_config(dlq: Dlq, topic: str, name: str, value: str) -> None:
    entry = ConfigEntry(name, value, incremental_operation=AlterConfigOpType.SET)
    resource = ConfigResource(ResourceType.TOPIC, topic, incremental_configs=[entry])
    admin = AdminClient(dlq.client())
    admin.incremental_alter_configs([resource])[resource].result(LONG_S)

    def applied() -> bool:
        described = admin.describe_configs([ConfigResource(ResourceType.TOPIC, topic)])
        [future] = described.values()
        return bool(future.result(LONG_S)[name].value == value)

    wait_until(applied, LONG_S, f"{name} of {topic}")


def test_the_pages_example_replays(dlq: Dlq, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted, other = dlq.bury(
        Original(b"A", b"v", stage="infer", reason="model_error"), Original(b"A", b"v")
    )
    [example] = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    for name, value in as_environment(dlq.settings).items():
        monkeypatch.setenv(name, value)
    exec(example, {"print": lambda report: None})
    assert dlq.states() == {str(wanted): "replayed", str(other): "open"}
