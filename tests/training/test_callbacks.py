import subprocess
import sys
from types import SimpleNamespace

import pexpect
import pytest

from homebrew import EarlyStopping
from homebrew.errors import ConfigError
from homebrew.training.callbacks import figures
from homebrew.training.metrics import StepMetrics

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
        sys.executable, ["-c", SCRIPT, str(tmp_path)], dimensions=(24, 80), encoding="utf-8", timeout=60
    )
    shown = child.read()
    child.close()
    assert child.exitstatus == 0
    assert "validation loss" in shown
    assert all(word in shown for word in ("tokens/s", "left", "n/a"))  # MFU and memory of a CPU are not known
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
    stopping, trainer = EarlyStopping(patience=2, min_delta=0.1), SimpleNamespace(should_stop=False)
    stopped = []
    for loss in (3.0, 2.5, 2.45, 2.2, 2.15, 2.3):
        stopping.on_evaluate(trainer, SimpleNamespace(loss=loss))
        stopped.append(trainer.should_stop)
    assert stopped == [False, False, False, False, False, True]


@pytest.mark.parametrize("arguments", [{"patience": 0}, {"patience": 1, "min_delta": -0.1}])
def test_early_stopping_that_makes_no_sense(arguments):
    with pytest.raises(ConfigError, match="must be"):
        EarlyStopping(**arguments)
