"""What writers of several processes tell the first one's, here from threads over a store like the launcher's."""

import json
import threading
import time
from types import SimpleNamespace

import pytest
from torch.distributed import TCPStore

from homebrew.checkpoint.manifest import Entry
from homebrew.checkpoint.reports import Reports
from homebrew.errors import CheckpointError, ConfigError, NonFiniteError


@pytest.fixture
def reports(monkeypatch):
    """Makes a process's, of three."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(store.port))
    yield lambda rank, seconds=30: Reports(SimpleNamespace(process_index=rank, num_processes=3), seconds)
    del store


def write(folder, name, size=4):
    (folder / name).write_bytes(bytes(size))
    return {name: Entry(size, "0" * 64)}


def fails(error):
    def work(*_):
        raise error

    return work


def test_the_first_process_learns_what_the_others_have_written(reports, tmp_path):
    first = reports(0)
    token = first.new_token()
    later = threading.Timer(0.1, lambda: reports(2).send(token, lambda: write(tmp_path, "b.safetensors", 5)))
    later.start()
    reports(1).send(token, dict)  # another copy's shard: nothing of its own
    assert first.collect(token, tmp_path) == {"b.safetensors": Entry(5, "0" * 64)}
    later.join()


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (CheckpointError("no space"), CheckpointError),
        (NonFiniteError("no space"), NonFiniteError),
        (OSError("no space"), CheckpointError),
        (KeyboardInterrupt("no space"), CheckpointError),
    ],
)
def test_another_processs_error_is_the_firsts_by_name(reports, tmp_path, error, kind):
    first = reports(0)
    with pytest.raises(type(error)):
        reports(1).send("token", fails(error))
    reports(2).send("token", dict)  # until it has, the first one waits
    with pytest.raises(kind, match=rf"Process 1 on .* could not write its part: {type(error).__name__}: no space"):
        first.collect("token", tmp_path)


def test_the_first_error_is_told_once_no_other_process_writes(reports, tmp_path):
    with pytest.raises(CheckpointError):
        reports(1).send("token", fails(CheckpointError("no space")))
    later = threading.Timer(0.2, lambda: reports(2).send("token", lambda: write(tmp_path, "b.safetensors")))
    later.start()
    with pytest.raises(CheckpointError, match=r"Process 1 on .* could not write its part: CheckpointError: no space"):
        reports(0).collect("token", tmp_path)
    assert (tmp_path / "b.safetensors").exists()
    later.join()


def test_a_process_that_does_not_report_is_named(reports, tmp_path):
    reports(1).send("token", dict)
    reports(2).send("an earlier token", dict)
    with pytest.raises(CheckpointError, match=r"Process 2 had not written its part .* within 0\.2 seconds"):
        reports(0, 0.2).collect("token", tmp_path)


def test_waiting_ends_when_a_process_is_lost(reports, tmp_path):
    first = reports(0)
    threading.Timer(0.1, first.give_up).start()
    with pytest.raises(CheckpointError, match=r"Process 1 had not written its part .* when the run ended"):
        first.collect("token", tmp_path)


@pytest.mark.parametrize("what", ["nothing", "less"])
def test_what_was_written_to_another_disk_is_missed(reports, tmp_path, what):
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir(), there.mkdir()
    if what == "less":
        write(here, "a.safetensors", 3)
    reports(1).send("token", lambda: write(there, "a.safetensors"))
    reports(2).send("token", dict)
    with pytest.raises(CheckpointError, match=r"Process 1 on .*a\.safetensors, but .* file system that all share"):
        reports(0).collect("token", here)


def test_a_store_that_has_ended(reports, tmp_path, monkeypatch):
    first = reports(0)
    monkeypatch.setattr(first, "_store", SimpleNamespace(check=fails(RuntimeError("Broken pipe"))))
    with pytest.raises(CheckpointError, match=r"store ended before .*Broken pipe"):
        first.collect("token", tmp_path)


def test_processes_that_met_by_other_means(monkeypatch):
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(ConfigError, match="gather_limit_bytes"):
        Reports(SimpleNamespace(process_index=0, num_processes=2), 1)


def test_reports_do_not_stay_in_the_store(reports, tmp_path):
    first, second, third = reports(0), reports(1), reports(2)
    second.send("token", dict), third.send("token", dict)
    while not second._store.check(["homebrew/saved/token/2"]):  # `set` returns before it has arrived
        time.sleep(0.01)
    before = second._store.num_keys()
    assert json.loads(second._store.get("homebrew/saved/token/1"))["files"] == {}
    first.collect("token", tmp_path)
    assert second._store.num_keys() == before - 2
