import math
import os
import subprocess
import sys
from types import SimpleNamespace

import pexpect
import pytest

from homebrew import EarlyStopping, GPTConfig, TokenDataset, Trainer, TrainerConfig
from homebrew.callbacks.base import Callback, figures
from homebrew.errors import ConfigError
from homebrew.metrics.step_metrics import EvalMetrics, MetricsLog, StepMetrics, past_eval_losses

SCRIPT = """
import sys, warnings
from homebrew import GPTConfig, TokenDataset, Trainer, TrainerConfig
data = TokenDataset.from_text("To be, or not to be. " * 40, 16, tokenizer="bytes")
config = TrainerConfig(output_dir=sys.argv[1], max_steps=4, micro_batch_size=2, log_every=1, eval_every=2)
Trainer(GPTConfig(block_size=16, vocab_size=256, n_layer=1, n_head=1, n_embd=8), data, data, config=config).train()
print("after")
"""
METRICS = StepMetrics(
    step=30, loss=2.5, learning_rate=3e-4, grad_norm=0.5, tokens_per_second=1000.0, mfu=None, memory_bytes=None,
    num_tokens=3000, elapsed_seconds=3.0,
)  # fmt: skip


def test_a_terminal_gets_a_table_that_fits_and_is_left_as_it_was(tmp_path):
    child = pexpect.spawn(
        sys.executable,
        ["-c", SCRIPT, str(tmp_path)],
        env=os.environ | {"ACCELERATE_USE_CPU": "true"},  # whose MFU and memory are not known
        dimensions=(24, 80),
        encoding="utf-8",
        timeout=60,
    )
    shown = child.read()
    child.close()
    assert child.exitstatus == 0
    assert "validation loss" in shown
    assert all(word in shown for word in ("tokens/s", "left", "n/a"))
    assert "\x1b[?25l" in shown  # the cursor is hidden while the table is live
    assert shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l")  # and comes back
    assert shown.rstrip().endswith("after")


def test_elsewhere_there_are_plain_lines(tmp_path):
    command = [sys.executable, "-c", SCRIPT, str(tmp_path)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert [line.split(" | ")[0] for line in lines if "tokens/s" in line] == [f"step {n}/4" for n in range(1, 5)]
    assert not any("\x1b" in line for line in lines)


def test_the_time_left_and_what_is_not_known():
    shown = dict(figures(METRICS, max_steps=100))
    assert shown["left"] == "0:00:07"  # 70 steps of 100 tokens at 1,000 tokens a second
    assert shown["MFU"] == shown["memory"] == "n/a"


def test_early_stopping():
    stopping = EarlyStopping(patience=2, min_delta=0.1)
    trainer = SimpleNamespace(should_stop=False, is_main_process=True)
    stopped = []
    for loss in (3.0, 2.5, 2.45, 2.2, 2.15, 2.3):
        stopping.on_evaluate(trainer, SimpleNamespace(loss=loss))
        stopped.append(trainer.should_stop)
    assert stopped == [False, False, False, False, False, True]


@pytest.mark.parametrize("arguments", [{"patience": 0}, {"patience": 1, "min_delta": -0.1}])
def test_early_stopping_that_makes_no_sense(arguments):
    with pytest.raises(ConfigError, match="must be"):
        EarlyStopping(**arguments)


class Breaks(Callback):
    """After the evaluation of a step."""

    def __init__(self, step):
        self.step = step

    def on_evaluate(self, trainer, metrics):
        if metrics.step == self.step:
            raise KeyboardInterrupt


def stopped_early(folder, *callbacks, **settings):
    """A run whose evaluations find 3.0, 2.0 and then more, if less and less; the step it ends at."""
    data = TokenDataset.from_text("To be, or not to be. " * 40, 16, tokenizer="bytes")
    settings = {"max_steps": 12, "micro_batch_size": 2, "mixed_precision": "no", "eval_every": 1} | settings
    config = TrainerConfig(output_dir=folder, save_every=2, **settings)
    shape = GPTConfig(block_size=16, vocab_size=256, n_layer=1, n_head=1, n_embd=8)
    trainer = Trainer(shape, data, data, config=config, callbacks=callbacks)
    trainer.evaluate = lambda: EvalMetrics.of(
        step=trainer.step, loss={1: 3.0, 2: 2.0}.get(trainer.step, 2.9 - trainer.step / 20), num_tokens=1,
        bytes_per_token=None,
    )  # fmt: skip
    trainer.train(resume=True)
    return trainer.step


def test_early_stopping_begins_anew_with_each_run(tmp_path):
    stopping = EarlyStopping(patience=3)
    assert stopped_early(tmp_path / "first", stopping) == 5
    assert stopped_early(tmp_path / "second", stopping) == 5


@pytest.mark.filterwarnings("ignore:.*figures of a run that saved no checkpoint")
@pytest.mark.parametrize("breaks", [1, 2, 3, 4])
def test_early_stopping_of_a_resumed_run_is_the_unbroken_ones(tmp_path, breaks):
    with pytest.raises(KeyboardInterrupt):
        stopped_early(tmp_path, EarlyStopping(patience=3), Breaks(breaks))
    assert stopped_early(tmp_path, EarlyStopping(patience=3)) == 5


def test_early_stopping_does_not_count_what_a_resume_went_back_behind(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        stopped_early(tmp_path, EarlyStopping(patience=3), Breaks(3))  # the checkpoint is of step 2
    with pytest.raises(KeyboardInterrupt):
        stopped_early(tmp_path, EarlyStopping(patience=3), Breaks(6), eval_every=2)
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b"\x00\x00\n")  # what a disk that lost power may have
    assert stopped_early(tmp_path, EarlyStopping(patience=3), eval_every=2) == 8


def test_the_losses_a_file_has_of_the_course_a_run_took(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert past_eval_losses(path, 9) == []
    log = MetricsLog(path)
    for event, step, loss in [
        ("evaluate", 2, 9.0), ("begin", 0, None), ("evaluate", 2, 3.0), ("step", 3, 8.0), ("evaluate", 4, 7.0),
        ("resume", 3, None), ("evaluate", 5, math.inf), ("evaluate", 6, 2.0),
    ]:  # fmt: skip
        log.write(event, step=step, **({} if loss is None else {"loss": loss}))
    log.close()
    assert past_eval_losses(path, 6) == [3.0, math.inf, 2.0]
    assert past_eval_losses(path, 5) == [3.0, math.inf]  # there was no space to tell of a resume
