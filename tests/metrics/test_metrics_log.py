import errno
import math
import os
import socket

import pytest

from homebrew.metrics.metrics_log import MetricsLog, past_eval_losses


def test_past_eval_losses_excludes_evaluations_discarded_by_a_resume(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert past_eval_losses(path, 9) == {}
    log = MetricsLog(path)
    for event, step, loss in [
        ("evaluate", 2, 9.0), ("begin", 0, None), ("evaluate", 2, 3.0), ("step", 3, 8.0), ("evaluate", 4, 7.0),
        ("resume", 3, None), ("evaluate", 5, math.inf), ("evaluate", 6, 2.0),
    ]:  # fmt: skip
        log.write(event, step=step, **({} if loss is None else {"loss": loss}))
    log.close()
    assert past_eval_losses(path, 6) == {2: 3.0, 5: math.inf, 6: 2.0}
    assert past_eval_losses(path, 5) == {2: 3.0, 5: math.inf}  # the "resume" event itself may be lost on a full disk


@pytest.mark.parametrize("end", ["", "{", '{"event": "step", "step": 1}', "\0\0\0", '{"ev\0\0'])
def test_what_a_killed_run_or_a_power_failure_leaves_is_removed(tmp_path, end):
    path = tmp_path / "metrics.jsonl"
    start = '{"event": "begin", "step": 0}\n'
    path.write_text(start + end)
    MetricsLog(path).close()
    assert path.read_text() == start


@pytest.mark.parametrize("end", ["notes, no newline", '{"a": 1}', "\0notes", "x" * 100_000])
@pytest.mark.parametrize("start", ["", "a line\n"])
def test_nothing_but_the_beginning_of_an_event_is_removed(tmp_path, start, end):
    path = tmp_path / "metrics.jsonl"
    path.write_text(start + end)
    log = MetricsLog(path)
    log.write("evaluate", step=3, loss=1.0)
    log.close()
    assert path.read_text().startswith(f"{start}{end}\n{{")
    assert past_eval_losses(path, 9) == {3: 1.0}


# --- files that are not a metrics log


@pytest.mark.parametrize("content", ["one line without an end", "a line\nand a half"])
@pytest.mark.parametrize("use", [MetricsLog, lambda path: past_eval_losses(path, 9)], ids=["write", "read"])
def test_a_link_is_not_followed(tmp_path, use, content):
    target = tmp_path / "precious"
    target.write_text(content)
    (tmp_path / "metrics.jsonl").symlink_to(target)
    with pytest.raises(OSError, match=r"symbolic link.*metrics\.jsonl"):
        use(tmp_path / "metrics.jsonl")
    assert target.read_text() == content


@pytest.mark.parametrize("kind", ["link to a device", "dangling link", "pipe", "socket", "folder"])
@pytest.mark.parametrize("use", [MetricsLog, lambda path: past_eval_losses(path, 9)], ids=["write", "read"])
def test_only_a_regular_file_is_opened(tmp_path, monkeypatch, use, kind):
    monkeypatch.chdir(tmp_path)  # the path of a socket is limited to 108 bytes
    path = tmp_path / "metrics.jsonl"
    with socket.socket(socket.AF_UNIX) as unix:
        {
            "link to a device": lambda: path.symlink_to("/dev/zero"),
            "dangling link": lambda: path.symlink_to(tmp_path / "new"),
            "pipe": lambda: os.mkfifo(path),
            "socket": lambda: unix.bind(path.name),
            "folder": path.mkdir,
        }[kind]()
        with pytest.raises(OSError, match=r"metrics\.jsonl"):
            use(path)
    assert not (tmp_path / "new").exists()


def test_a_log_is_read_in_bounded_memory(tmp_path, bounded_memory):
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    log.write("evaluate", step=1, loss=2.0)
    os.truncate(path, 300 * 2**20)  # a sparse line of zeros
    with path.open("ab") as file:
        file.write(b'\n{"event": "evaluate", "step": 2, "loss": 1.0}\n')
    log.close()
    with bounded_memory():
        assert past_eval_losses(path, 9) == {1: 2.0, 2: 1.0}
        MetricsLog(path).close()


def test_a_run_resumes_with_a_large_log(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with path.open("wb") as file:
        file.seek(2**32)
        file.write(b"\n")
    log = MetricsLog(path)
    log.write("step", step=1)
    log.close()
    assert path.stat().st_size > 2**32


@pytest.mark.parametrize(
    "line", [b"[" * 60_000, b"1" * 60_000, b"null", b'{"event": "evaluate", "step": "x"}', b"\xff"]
)
def test_lines_that_are_not_events_are_ignored(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(line + b'\n{"event": "evaluate", "step": 2, "loss": 1.0}\n')
    assert past_eval_losses(path, 9) == {2: 1.0}


# --- a file system that fails


@pytest.mark.parametrize("failing", [["write"], ["write", "ftruncate"], ["write", "ftruncate", "fstat", "close"]])
@pytest.mark.parametrize("number", [errno.EROFS, errno.ENOSPC, errno.EIO])
def test_a_file_system_that_fails_is_one_warning_with_the_path(tmp_path, monkeypatch, failing, number):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    with monkeypatch.context() as patch:
        for name in failing:
            patch.setattr(os, name, lambda *_: (_ for _ in ()).throw(OSError(number, os.strerror(number))))
        with pytest.warns(UserWarning, match=rf"metrics\.jsonl could not be written: {os.strerror(number)}"):
            log.write("step", step=1)
        log.write("step", step=2)  # warned of once
        log.close()
