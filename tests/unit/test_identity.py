"""Lasting names: one worker each, and the same again after a kill."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from consumers.identity import claimed_name, replica_name
from schemas.errors import ConfigError
from schemas.settings import Settings, load_settings


def named(folder: Path, **worker: object) -> Settings:
    return load_settings(state_dir=folder, worker={"delivery": "exactly_once", **worker})


def test_no_name_is_claimed_where_none_is_needed(tmp_path: Path) -> None:
    with claimed_name(load_settings(state_dir=tmp_path)) as name:
        assert name is None
    assert not list(tmp_path.iterdir())


def test_a_given_name_is_taken(tmp_path: Path) -> None:
    with claimed_name(named(tmp_path, instance_id="worker-7")) as name:
        assert name == "worker-7"


def test_two_workers_have_two_names_and_a_free_one_is_taken_again(tmp_path: Path) -> None:
    settings = named(tmp_path)
    with claimed_name(settings) as first:
        with claimed_name(settings) as second:
            assert second != first
        with claimed_name(settings) as third:
            assert third == second
    with claimed_name(settings) as fourth:
        assert fourth == first


def test_a_killed_worker_leaves_its_name_to_the_next(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path\n"
        "from consumers.identity import claimed_name; from schemas.settings import load_settings\n"
        "worker = {'delivery': 'exactly_once'}\n"
        "with claimed_name(load_settings(state_dir=Path(sys.argv[1]), worker=worker)) as name:\n"
        "    print(name, flush=True); sys.stdin.read()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout
    its_name = process.stdout.readline().strip()
    with claimed_name(named(tmp_path)) as other:
        assert other != its_name
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    with claimed_name(named(tmp_path)) as name:
        assert name == its_name


def test_two_folders_of_one_machine_have_different_names(tmp_path: Path) -> None:
    with claimed_name(named(tmp_path / "a")) as one, claimed_name(named(tmp_path / "b")) as other:
        assert one != other


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "workers").write_text("in the way")
    with (
        pytest.raises(ConfigError, match=r"workers: .*worker\.instance_id"),
        claimed_name(named(tmp_path)),
    ):
        pass


def test_what_a_worker_raises_is_not_mistaken_for_the_claims_own(tmp_path: Path) -> None:
    with pytest.raises(ConnectionError), claimed_name(named(tmp_path)):
        raise ConnectionError


def test_replicas_are_named_by_rank(tmp_path: Path) -> None:
    assert replica_name(named(tmp_path), 3) == "tapeline-3"
    assert replica_name(named(tmp_path, instance_id="eu"), 3) == "eu-3"
    assert replica_name(load_settings(), 3) is None
