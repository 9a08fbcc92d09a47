import io
from types import SimpleNamespace

from rich.console import Console

from homebrew import GPTConfig, ProgressDisplay, StepMetrics, TokenDataset, Trainer, TrainerConfig
from homebrew.callbacks.progress import format_metrics

METRICS = StepMetrics(
    step=30, loss=2.5, learning_rate=3e-4, grad_norm=0.5, tokens_per_second=1000.0, mfu=None, memory_bytes=None,
    num_tokens=3000, elapsed_seconds=3.0,
)  # fmt: skip


def train(folder, *callbacks):
    data = TokenDataset.from_text("To be, or not to be. " * 40, 16, tokenizer="bytes")
    config = TrainerConfig(
        output_dir=folder, max_steps=4, micro_batch_size=2, mixed_precision="no", log_every=1, eval_every=2
    )
    model = GPTConfig(block_size=16, vocab_size=256, n_layer=1, n_head=1, n_embd=8)
    Trainer(model, data, data, config=config, callbacks=callbacks).train()


def test_a_terminal_shows_a_table_within_80_columns_and_gets_its_cursor_back(tmp_path):
    console = Console(file=io.StringIO(), force_terminal=True, width=80, color_system=None)
    train(tmp_path, ProgressDisplay(console))
    output = console.file.getvalue()
    assert "validation loss" in output
    assert all(label in output for label in ("tokens/s", "ETA", "val loss"))
    assert "…" not in output  # nothing is truncated
    show_cursor, hide_cursor = "\x1b[?25h", "\x1b[?25l"
    assert output.rindex(show_cursor) > output.rindex(hide_cursor)


def test_a_pipe_gets_plain_lines(tmp_path, capsys):
    train(tmp_path)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[0] for line in lines if "tokens/s" in line] == [f"step {n}/4" for n in range(1, 5)]
    assert not any("\x1b" in line for line in lines)


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
    assert shown["MFU"] == shown["memory"] == "n/a"
