import contextlib
import io
import re
import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock, Mock

import pytest
import torch
from rich.console import Console

from homebrew import Callback, GPTConfig, ProgressDisplay, StepMetrics, TokenDataset, Trainer, TrainerConfig
from homebrew.callbacks.progress import describe_data, format_metrics

METRICS = StepMetrics(
    step=30, loss=2.5, learning_rate=3e-4, grad_norm=0.5, tokens_per_second=1000.0, mfu=None, memory_bytes=None,
    num_tokens=3000, elapsed_seconds=3.0,
)  # fmt: skip


def train(folder, *callbacks, **config):
    data = TokenDataset.from_text("To be, or not to be. " * 40, 16, tokenizer="bytes")
    config = TrainerConfig(
        output_dir=folder, max_steps=4, micro_batch_size=2, mixed_precision="no", log_every=1, eval_every=2, **config
    )
    model = GPTConfig(block_size=16, vocab_size=256, n_layer=1, n_head=1, n_embd=8)
    Trainer(model, data, data, config=config, callbacks=callbacks).train()


def terminal(width=80):
    return Console(file=io.StringIO(), force_terminal=True, width=width, color_system=None, soft_wrap=True)


def screen(output):
    """Return the lines that remain on a terminal after this output."""
    lines, row, column = [""], 0, 0
    for token in re.findall(r"\x1b\[[0-9;?]*[A-Za-z]|[\r\n]|[^\x1b\r\n]+", output):
        if token == "\n":
            row += 1
            lines += [""] * (row == len(lines))
        elif token == "\x1b[2K":  # erase the line
            lines[row] = ""
        elif up := re.fullmatch(r"\x1b\[(\d+)A", token):
            row -= int(up[1])
        elif not token.startswith("\x1b"):
            column = 0 if token == "\r" else column
            lines[row] = lines[row][:column].ljust(column) + token.strip("\r")
        column = 0 if token in "\r\n" else len(lines[row])
    return [line.rstrip() for line in lines if line]


def test_a_terminal_keeps_a_table_within_80_columns_and_gets_its_cursor_back(tmp_path):
    console = terminal()
    train(tmp_path, ProgressDisplay(console))
    output = console.file.getvalue()
    assert "taking the first step…" in output  # a short run is not compiled
    summary, data, header, *rest = screen(output)
    assert "float32" in summary
    assert "epochs" in data
    on_gpu = ["MFU", "memory"] if torch.cuda.is_available() else []
    assert header.split() == ["step", "loss", "lr", "norm", "tokens/s", *on_gpu, "ETA"]
    kinds = [line.split(" | ")[1].split()[0] if " | " in line else line.split()[0] for line in rest]
    assert kinds == ["1/4", "2/4", "validation", "3/4", "4/4", "validation", "saving", "curves:"]
    show_cursor, hide_cursor = "\x1b[?25h", "\x1b[?25l"
    assert output.rindex(show_cursor) > output.rindex(hide_cursor)
    assert "n/a" not in output


def show(steps, max_steps, *, console=None, **changes):
    """Return the screen after a run of which these steps were logged."""
    console = console or terminal()
    display = ProgressDisplay(console)
    trainer = Mock(is_main_process=True, step=0, compile_mode="kernels")
    trainer.config.max_steps, trainer.config.output_dir, trainer.accelerator.trackers = max_steps, "run", []
    trainer.model.parameters.return_value, trainer.train_dataset = [], range(1)
    trainer.model.num_parameters.return_value = trainer.batch.global_batch_size = 1
    display.on_train_begin(trainer)
    for step in steps:
        display.on_log(trainer, replace(METRICS, step=step, **changes))
    trainer.step = max_steps
    display.on_train_end(trainer)
    output = console.file.getvalue()
    assert "compiling" in output
    return screen(output)


@pytest.mark.parametrize(
    ("first", "last", "every"), [(1, 1500, 1), (1, 100_000, 10), (1, 20, 1), (501, 1000, 1), (1, 77, 7), (1, 1, 1)]
)
def test_rows_stay_at_a_growing_interval(first, last, every):
    steps = [first, *(step for step in range(first + 1, last + 1) if step % every == 0 or step == last)]
    rows = [int(line.split("/")[0]) for line in show(steps, last) if re.match(r" *\d+/", line)]
    assert rows[:3] == steps[:3]
    assert rows[-1] == last
    assert len(rows) <= 45
    intervals = [b - a for a, b in pairwise(rows)]
    assert max(intervals, default=1) <= max(2 * every, last / 10)


def test_the_last_row_stays_when_a_run_is_stopped():
    rows = show(range(1, 778), 1000)
    assert any(line.startswith(" 777/1000") for line in rows)


def test_a_table_of_a_gpu_fits_in_80_columns():
    lines = show(range(1, 30), 19_073, mfu=0.381, memory_bytes=17 * 2**30, tokens_per_second=1.1e6)
    header, *rows = [line for line in lines if "/19073 " in line or "ETA" in line]
    assert header.split() == ["step", "loss", "lr", "norm", "tokens/s", "MFU", "memory", "ETA"]
    assert all(len(line) <= 80 for line in (header, *rows))
    assert len({len(line) for line in (header, *rows)}) == 1  # the columns are aligned


def test_the_live_row_is_one_line_of_a_narrow_terminal():
    console = terminal(width=40)
    show([1], 19_073, console=console)
    frames = re.findall(r"\x1b\[2K([^\x1b\r\n]*/19073[^\x1b\r\n]*)\r?(?=$|\x1b|\r)", console.file.getvalue())
    assert max(map(len, frames)) <= 40


def test_a_pipe_gets_plain_lines(tmp_path, capsys):
    train(tmp_path)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[0] for line in lines if "tokens/s" in line] == [f"step {n}/4" for n in range(1, 5)]
    assert not any("\x1b" in line for line in lines)
    assert "float32" in lines[0]
    assert lines[1] == "dataset 832 tokens | run 128 tokens, 0.15 epochs"
    assert not any("n/a" in line for line in lines)


TOKENS = TokenDataset.from_tokens([1] * 1601, 16)


@pytest.mark.parametrize(
    ("dataset", "max_steps", "expected"),
    [
        (TOKENS, 85, "dataset 1,600 tokens | run 5,440 tokens, 3.4 epochs"),
        (TOKENS, 100_000, "dataset 1,600 tokens | run 6,400,000 tokens, 4,000.0 epochs"),
        (TOKENS.split(0.5)[0], 1, "dataset 800 tokens | run 64 tokens, 0.08 epochs"),
        (torch.utils.data.Subset(TOKENS, range(50)), 25, "dataset 50 samples | run 100 samples, 2.0 epochs"),
        ([{"input_ids": [1, 2, 3]}] * 3, 1, "dataset 3 samples | run 4 samples, 1.3 epochs"),
    ],
)
def test_the_number_of_epochs(dataset, max_steps, expected):
    trainer = Mock(train_dataset=dataset)
    trainer.config.max_steps, trainer.batch.global_batch_size = max_steps, 4
    assert describe_data(trainer) == expected


def test_the_size_of_a_huge_dataset_fits_in_80_columns():
    trainer = Mock(train_dataset=MagicMock(num_tokens=15 * 10**12))
    trainer.train_dataset.__len__.return_value = 10**10
    trainer.config.max_steps, trainer.batch.global_batch_size = 10**6, 4096
    assert len(describe_data(trainer)) <= 80


def test_only_the_main_process_prints(capsys):
    display = ProgressDisplay()
    other_rank = SimpleNamespace(is_main_process=False, step=1, config=SimpleNamespace(max_steps=2))
    display.on_train_begin(other_rank)
    display.on_log(other_rank, METRICS)
    display.on_train_end(other_rank)
    assert capsys.readouterr().out == ""


def test_format_metrics_estimates_the_time_remaining():
    shown = dict(format_metrics(METRICS, max_steps=100))
    assert shown["ETA"] == "0:00:07"  # 70 steps of 100 tokens at 1,000 tokens/s


def test_format_metrics_leaves_out_what_is_unknown():
    assert not {"MFU", "memory"} & dict(format_metrics(METRICS, max_steps=100)).keys()
    on_gpu = dict(format_metrics(replace(METRICS, mfu=0.4, memory_bytes=2**30), max_steps=100))
    assert (on_gpu["MFU"], on_gpu["memory"]) == ("40.0%", "1.0 GiB")


def run_output(tmp_path, capsys, *callbacks, resume=False):
    data = TokenDataset.from_text("To be, or not to be. " * 40, 16, tokenizer="bytes")
    config = TrainerConfig(output_dir=tmp_path, max_steps=4, micro_batch_size=2, mixed_precision="no", save_every=2)
    model = GPTConfig(block_size=16, vocab_size=256, n_layer=1, n_head=1, n_embd=8)
    with contextlib.suppress(KeyboardInterrupt):
        Trainer(model, data, config=config, callbacks=callbacks).train(resume=resume)
    return capsys.readouterr().out


class Interrupt(Callback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, trainer):
        if trainer.step == self.step:
            raise KeyboardInterrupt


def test_the_end_of_a_stopped_run_says_what_is_saved(tmp_path, capsys):
    assert "stopped early; there is no checkpoint to resume" in run_output(tmp_path / "a", capsys, Interrupt(1))
    assert "stopped early; resume to continue from step 2" in run_output(tmp_path / "b", capsys, Interrupt(3))
    lost = run_output(tmp_path / "c", capsys, LosesCheckpoints(), ProgressDisplay(), Interrupt(3))
    assert "stopped early; there is no checkpoint to resume" in lost


class LosesCheckpoints(Callback):
    """Stands for a disk on which no checkpoint could be written."""

    def on_train_end(self, trainer):
        shutil.rmtree(trainer.config.output_dir / "checkpoints")


def test_a_path_in_the_current_folder_is_relative(tmp_path, capsys, monkeypatch):
    here, removed = tmp_path / "here", tmp_path / "removed"
    for folder in (here, removed):
        folder.mkdir()
    monkeypatch.chdir(here)
    path = Path("checkpoints/step-00000004")
    assert f"saving {Path('run') / path}\n" in run_output(here / "run", capsys)
    assert f"saving {tmp_path / 'other' / path}\n" in run_output(tmp_path / "other", capsys)
    monkeypatch.chdir(removed)
    removed.rmdir()
    assert f"saving {here / 'again' / path}\n" in run_output(here / "again", capsys)


def test_resuming_says_where_and_that_a_run_is_finished(tmp_path, capsys):
    run_output(tmp_path, capsys, Interrupt(3))
    assert "resumes at step 2/4" in run_output(tmp_path, capsys, resume=True)
    output = run_output(tmp_path, capsys, resume=True)
    assert "already finished" in output
    assert "first step…" not in output


def test_the_end_of_a_run_says_how_to_see_its_curves(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train(tmp_path / "a run", log_with="tensorboard")
    lines = capsys.readouterr().out.splitlines()
    (plot,) = [line for line in lines if "homebrew plot" in line]
    (tensorboard,) = [line for line in lines if "tensorboard" in line]
    assert plot.endswith("homebrew plot 'a run'")
    assert tensorboard.endswith("tensorboard --logdir 'a run/logs/homebrew'")
    assert list((tmp_path / "a run/logs/homebrew").glob("events*"))


def test_a_run_ends_even_if_the_current_folder_is_gone(tmp_path, capsys, monkeypatch):
    class RemovesCurrentFolder(Callback):
        def on_step_end(self, trainer):
            if trainer.step == 4:
                (tmp_path / "here").rmdir()

    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert f"homebrew plot {tmp_path / 'run'}" in run_output(tmp_path / "run", capsys, RemovesCurrentFolder())


def test_a_run_without_steps_has_no_curves(tmp_path, capsys):
    class Fails(Callback):
        def on_train_begin(self, trainer):
            raise KeyboardInterrupt

    assert "homebrew plot" not in run_output(tmp_path, capsys, Fails())
