import dataclasses
import fcntl
import json
import os
import pty
import re
import shutil
import signal
import subprocess
import time
import typing
from pathlib import Path

import numpy as np
import pexpect
import pytest
import torch
from platforms import needs_linux
from token_files import llmc_shard
from transformers import pipeline

from homebrew import GPT, ConfigError, GPTConfig, TrainerConfig, load_model
from homebrew.cli.main import main
from homebrew.cli.train_command import Train
from homebrew.cli.train_options import Preset


def test_data_paths_may_be_symlinks(invoke, text, tmp_path, tiny):
    link = tmp_path / "link"
    link.symlink_to(text)
    options = ["--output-dir", tmp_path / "run", "--max-steps", 1, "--tokenizer", "bytes", *tiny]
    assert "step 1/1" in invoke("train", link, "--eval-data", link, *options)


@pytest.mark.parametrize("has_header", [False, True], ids=["nanoGPT", "llm.c"])
def test_token_files_of_other_programs(tmp_path, invoke, invoke_error, tiny, has_header):
    def write(name, ids):
        (tmp_path / name).write_bytes(llmc_shard(ids, 20240801, 7) if has_header else ids.astype("<u2").tobytes())

    ids = np.arange(1000) % 256
    for name in ("train_0.bin", "train_1.bin", "val.bin"):
        write(name, ids)
    options = ["--output-dir", tmp_path / "run", *tiny, *([] if has_header else ["--tokenizer", "bytes"])]
    options += ["--eval-data", tmp_path / "val.bin", "--max-steps", 2]
    output = invoke("train", tmp_path / "train_*.bin", *options)
    assert "step 2/2" in output
    assert "train_0.bin and 1 more." in output
    invoke("train", "--resume", "--output-dir", tmp_path / "run")
    write("train_1.bin", ids[::-1])
    files = [tmp_path / "train_0.bin", tmp_path / "train_1.bin"]
    assert "--accept-changes dataset" in invoke_error("train", *files, *options, "--resume")


def test_resume_must_be_requested_and_changes_accepted(text, tmp_path, invoke, invoke_error, tiny):
    train = ["train", text, "--output-dir", tmp_path / "run", "--tokenizer", "char", "--max-steps", 2, *tiny]
    invoke(*train)
    assert "already holds a run" in invoke_error(*train)
    assert "step 2/2" in invoke(*train, "--resume")

    accept = ["--accept-changes", "dataset", "--accept-changes", "seed"]
    assert " ".join(accept) in invoke_error(*train, "--resume", "--seed", 7)
    with pytest.warns(UserWarning, match="without its data position"):
        invoke(*train, "--resume", "--seed", 7, *accept)


def test_a_folder_with_a_run_is_refused_before_the_text_is_read(text, tmp_path, invoke, invoke_error, tiny):
    train = ["train", text, "--output-dir", tmp_path / "run", "--tokenizer", "char", "--max-steps", 1, *tiny]
    invoke(*train)
    text.write_bytes(b"\xff")  # is not UTF-8
    error = invoke_error(*train)
    assert all(option in error for option in ("--resume", "--overwrite"))
    assert "Remove one of them" in invoke_error(*train, "--resume", "--overwrite")


def test_overwrite_keeps_the_earlier_run(text, tmp_path, invoke, tiny):
    train = ["train", text, "--output-dir", tmp_path / "run", "--tokenizer", "char", "--max-steps", 1, *tiny]
    for _ in range(2):
        assert "step 1/1" in invoke(*train, "--overwrite")
    load_model(tmp_path / "run" / "old-1")


def test_an_eval_fraction_that_leaves_no_training_data_is_an_error(text, tmp_path, invoke_error, tiny):
    options = ["--output-dir", tmp_path / "run", "--max-steps", 1, "--tokenizer", "bytes", *tiny]
    assert "leaves one of the two datasets empty" in invoke_error("train", text, *options, "--eval-fraction", 0.9999)


def test_training_starts_from_pretrained_weights(run, text, tmp_path, invoke):
    base, _ = load_model(run)
    base.save_pretrained(tmp_path / "base")
    for name, source, options in (("run", run, []), ("base", tmp_path / "base", ["--tokenizer", "bytes"])):
        output_dir = tmp_path / f"from-{name}"
        train = ["train", text, "--output-dir", output_dir, "--max-steps", 1, "--init-from", source, *options]
        invoke(*train, "--eval-data", text, "--learning-rate", 1e-9, "--micro-batch-size", 8)
        model, tokenizer = load_model(output_dir)
        assert tokenizer.name == "bytes"
        torch.testing.assert_close(model.state_dict(), base.state_dict(), atol=1e-6, rtol=0)


def test_pretrained_weights_are_trained_and_resumed_with_another_dropout(run, text, tmp_path, invoke):
    train = ["train", text, "--output-dir", tmp_path / "run", "--init-from", run, "--dropout", 0.2]
    invoke(*train, "--max-steps", 1)
    assert load_model(tmp_path / "run")[0].config.dropout == 0.2
    resume = ["train", "--resume", "--output-dir", tmp_path / "run", "--accept-changes", "schedule"]
    assert "resumes at step 1/2" in invoke(*resume, "--max-steps", 2)


@pytest.mark.parametrize(
    ("options", "rate"), [([], "5e-5"), (["--lora-rank", 2], "1e-3"), (["--learning-rate", 1e-4], None)]
)
def test_a_lower_learning_rate_is_advised_for_pretrained_weights(run, text, tmp_path, invoke, options, rate):
    output = invoke("train", text, "--output-dir", tmp_path / "run", "--init-from", run, "--max-steps", 1, *options)
    assert ("try --learning-rate" in output) == (rate is not None)
    assert rate is None or f"try --learning-rate {rate}." in output


def test_initial_weights_are_an_option(text, tmp_path, invoke, tiny):
    options = ["--max-steps", 1, "--learning-rate", 1e-9, "--init", "local", *tiny]
    invoke("train", text, "--output-dir", tmp_path / "run", *options)
    model, _ = load_model(tmp_path / "run")
    expected = GPT(model.config, init="local").state_dict()
    torch.testing.assert_close(model.state_dict(), expected, atol=1e-6, rtol=0)


def test_pretrained_weights_are_not_initialized(run, text, invoke_error):
    options = ["--output-dir", run.with_name("other"), "--max-steps", 1, "--init-from", run, "--init", "local"]
    assert "Remove --init." in invoke_error("train", text, *options)


def test_an_adapter_is_trained_and_exported(run, invoke, invoke_error, text, tmp_path):
    base, moved_base, lora = tmp_path / "base", tmp_path / "moved", tmp_path / "lora"
    shutil.copytree(run, base)
    train = ["train", text, "--output-dir", lora, "--max-steps", 2, "--init-from", base, "--lora-rank", 2]
    train += ["--micro-batch-size", 8, "--learning-rate", 0.1]
    num_trainable = 2 * 2 * ((16 + 48) + (16 + 16) + (64 + 16))  # 2 blocks, rank 2: c_attn and both c_proj
    assert f"({num_trainable:,} trainable)" in invoke(*train)
    assert list(lora.rglob("adapter.safetensors"))
    assert not list(lora.rglob("model.safetensors"))
    assert "step 2/2" in invoke(*train, "--resume")

    base.rename(moved_base)
    greedy = ["sample", "--prompt", "Hello", "--temperature", 0, "--max-new-tokens", 10]
    assert "base" in invoke_error(*greedy, lora)
    sample = invoke(*greedy, lora, "--base", moved_base)
    assert sample != invoke(*greedy, run)
    invoke("export", lora, tmp_path / "merged", "--base", moved_base)
    generate = pipeline("text-generation", str(tmp_path / "merged"), device="cpu")
    assert sample == generate("Hello", max_new_tokens=10, do_sample=False)[0]["generated_text"] + "\n"
    invoke("export", lora, tmp_path / "adapter", "--base", moved_base, "--adapter")
    assert sample == invoke(*greedy, tmp_path / "adapter")


NON_DEFAULT_OPTIONS = {
    "output_dir": Path("/runs/own"),
    "max_steps": 7,
    "global_batch_tokens": 64,
    "micro_batch_size": "auto",
    "optimizer": "muon",
    "learning_rate": 0.5,
    "lr_schedule": "wsd",
    "warmup_steps": 3,
    "decay_fraction": 0.75,
    "min_lr_ratio": 0.25,
    "betas": (0.8, 0.9),
    "ema_decay": 0.9,
    "muon_momentum": 0.5,
    "weight_decay": 0.0,
    "max_grad_norm": 2.0,
    "non_finite": "skip",
    "non_finite_limit": 4,
    "loss_spike_zscore": 5.0,
    "seed": 1,
    "mixed_precision": "no",
    "compile": True,
    "activation_checkpointing": True,
    "collective_timeout_seconds": 30.0,
    "eval_every": 2,
    "eval_batches": 9,
    "log_every": 8,
    "log_with": "tensorboard",
    "save_every": 6,
    "keep_last": 12,
    "keep_every": 18,
    "gather_limit_bytes": 14,
}
"""A non-default value of every field of TrainerConfig that is an option of the command line."""


@pytest.fixture
def parse(monkeypatch):
    """Parse the arguments of `homebrew train` and return its TrainerConfig."""
    commands = []
    monkeypatch.setattr(Train, "run", lambda command: commands.append(command))

    def parse(*arguments):
        assert main(["train", "text.txt", *arguments]) == 0
        return commands.pop().trainer

    return parse


def test_every_trainer_config_field_is_an_option(parse):
    arguments = []
    for name, value in NON_DEFAULT_OPTIONS.items():
        arguments.append(f"--{name.replace('_', '-')}")
        if name == "compile":
            arguments.append("yes")
        elif value is not True:
            arguments += map(str, value if isinstance(value, tuple) else [value])
    hidden = {"num_workers": 0, "loader_timeout_seconds": 600.0}
    assert dataclasses.asdict(parse(*arguments)) == NON_DEFAULT_OPTIONS | hidden
    defaults = {field.name: field.default for field in dataclasses.fields(TrainerConfig)}
    assert not [name for name, value in NON_DEFAULT_OPTIONS.items() if value == defaults[name]]


def test_options_have_the_defaults_of_trainer_config(parse):
    config = parse("--output-dir", "x", "--max-steps", "1").validated()
    assert dataclasses.asdict(config) == dataclasses.asdict(TrainerConfig(output_dir=Path("x"), max_steps=1))


@pytest.mark.parametrize(("word", "value"), [("auto", "auto"), ("yes", True), ("no", False)])
def test_compile_option(parse, word, value):
    assert parse("--output-dir", "x", "--max-steps", "1", "--compile", word).compile is value


def test_every_preset_is_an_option():
    with pytest.raises(ConfigError) as caught:
        GPTConfig.preset("auto")
    presets = re.search(r"one of: (.*)\.", str(caught.value))[1].split(", ")
    assert list(typing.get_args(Preset)) == ["auto", *presets]


@pytest.mark.parametrize(
    ("on_cpu", "data", "options", "preset", "tokenizer"),
    [
        (True, "text.txt", [], "char", "char"),
        (True, "text.txt", ["--tokenizer", "gpt2"], "baby", "gpt2"),
        (True, "text.txt", ["--tokenizer", "bytes"], "char", "bytes"),
        (True, "gpt2.npy", [], "baby", "gpt2"),
        (True, "bytes.npy", [], "char", "bytes"),
        (False, "text.txt", [], "gpt2", "gpt2"),
        (False, "text.txt", ["--tokenizer", "char"], "gpt2", "char"),
        (False, "bytes.npy", [], "gpt2", "bytes"),
    ],
)
def test_the_model_is_chosen_by_device_and_named(
    on_cpu, data, options, preset, tokenizer, text, tmp_path, invoke, tiny, monkeypatch
):
    monkeypatch.setattr("homebrew.distributed.precision.uses_cpu", lambda: on_cpu)
    if data.endswith(".npy"):
        invoke("prepare", text, "--output", tmp_path / data, "--tokenizer", tokenizer)
    run = tmp_path / "run"
    output = invoke("train", tmp_path / data, "--output-dir", run, "--max-steps", 1, *options, *tiny)
    assert f"--preset {preset}" in output
    assert ("on a CPU" in output) == on_cpu
    assert load_model(run)[1].name == tokenizer


@pytest.mark.parametrize(
    ("preset", "tokenizer"), [("char", "char"), ("baby", "gpt2"), ("gpt2", "gpt2"), ("gpt2-xl", "gpt2")]
)
def test_a_given_preset_is_used_on_any_device(preset, tokenizer, text, tmp_path, invoke, tiny):
    run = tmp_path / "run"
    output = invoke("train", text, "--output-dir", run, "--max-steps", 1, "--preset", preset, *tiny)
    assert "--preset" not in output
    assert load_model(run)[1].name == tokenizer


def test_the_default_on_a_cpu_is_a_small_character_model(text, tmp_path, invoke):
    invoke("train", text, "--output-dir", tmp_path / "run", "--max-steps", 1, "--micro-batch-size", 1)
    model, tokenizer = load_model(tmp_path / "run")
    assert model.config == GPTConfig.preset("char", vocab_size=tokenizer.vocab_size)


@pytest.mark.parametrize("kind", ["a folder", "several files"])
@pytest.mark.parametrize("suffix", [".txt", ".npy"])
def test_data_may_be_folders_or_several_files(kind, suffix, invoke, text, tmp_path, tiny):
    files = [tmp_path / "data" / f"{name}{suffix}" for name in ("a", "b")]
    for file in files:
        if suffix == ".npy":
            invoke("prepare", text, "--output", file, "--tokenizer", "bytes")
        else:
            file.parent.mkdir(exist_ok=True)
            file.write_text(text.read_text())
    data = [tmp_path / "data"] if kind == "a folder" else files
    eval_data = [word for path in data for word in ("--eval-data", path)]
    tokenizer = ["--tokenizer", "bytes"] if suffix == ".txt" else []
    invoke("train", *data, *eval_data, "--output-dir", tmp_path / "run", "--max-steps", 1, *tokenizer, *tiny)
    description = json.loads((tmp_path / "run" / "run.json").read_text())
    for name in ("train_dataset", "eval_dataset"):
        assert "and 1 more" in description[name]["source"]
        assert description[name]["num_samples"] == pytest.approx(2 * text.stat().st_size / 16, abs=2)


def test_ctrl_c_saves_a_checkpoint_and_prints_no_traceback(program, text, tmp_path, tiny):
    options = ["--output-dir", tmp_path / "run", "--max-steps", 10**6, "--tokenizer", "bytes", "--log-every", 1, *tiny]
    command = [*program, "train", *map(str, [text, *options])]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        try:
            output = b""
            while b"step 3/" not in output:
                output += (chunk := os.read(process.stdout.fileno(), 1000))
                assert chunk, process.stderr.read()
            process.send_signal(signal.SIGINT)
            rest, errors = process.communicate(timeout=120)
        finally:
            process.kill()
    assert process.returncode == 130
    assert re.fullmatch(b"Ctrl-C: .*\n", errors)
    assert b"saving" in output + rest
    load_model(tmp_path / "run")


@pytest.mark.slow
def test_a_terminal_shows_that_the_loss_falls_and_that_ctrl_c_saves(program, text, tmp_path, tiny):
    options = ["--output-dir", tmp_path / "run", "--tokenizer", "char", "--max-steps", 10**6, "--log-every", 1, *tiny]
    arguments = [*program[1:], "train", *map(str, [text, *options])]
    terminal = pexpect.spawn(program[0], arguments, encoding="utf-8", timeout=120, dimensions=(30, 80))
    try:
        terminal.expect_exact("first step…")
        terminal.expect(r"step +loss +lr +norm +tokens/s +ETA")
        for step in (1, 2, 3):
            terminal.expect(rf" {step}/1000000 [^\r\n]+\r\n")  # a row that stays
        terminal.sendintr()
        terminal.expect_exact("Press Ctrl-C again")
        terminal.expect_exact("saving")
        terminal.expect(pexpect.EOF)
    finally:
        terminal.close(force=True)
    assert terminal.exitstatus == 130
    assert "Traceback" not in terminal.before


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "stop"), [("pipe", True), ("terminal", False)])
def test_a_reader_that_has_stopped_holds_up_neither_a_run_nor_its_end(program, text, tmp_path, tiny, kind, stop):
    read, write = pty.openpty() if kind == "terminal" else os.pipe()
    if kind == "pipe":
        fcntl.fcntl(write, fcntl.F_SETPIPE_SZ, 4096)  # as little as a terminal holds: about 50 lines
    options = ["--output-dir", tmp_path, "--tokenizer", "char", "--log-every", 1, "--save-every", 100, *tiny]
    command = [*program, "train", *map(str, [text, *options, "--max-steps", 10**6 if stop else 300])]
    with subprocess.Popen(command, stdout=write, stderr=write) as process:
        try:
            while stop and not list(tmp_path.glob("checkpoints/step-*[3-9]00")):
                assert process.poll() is None
                time.sleep(0.1)
            if stop:
                process.terminate()
            code = process.wait(120)
        finally:
            process.kill()
    os.close(read)
    os.close(write)
    assert code == (143 if stop else 0)
    load_model(tmp_path)


@needs_linux
@pytest.mark.slow
@pytest.mark.parametrize("redirection", ["<&- >&- 2>&-", ">/dev/full 2>&1"])
def test_a_run_is_complete_whatever_its_output_is(shell, text, tmp_path, tiny, redirection):
    options = ["--output-dir", tmp_path / "run", "--tokenizer", "char", "--max-steps", 2, *tiny]
    assert shell(["train", text, *options], redirection).stderr == b""  # with exit code 0
    load_model(tmp_path / "run")


def test_a_closed_terminal_saves_a_checkpoint(program, text, tmp_path, tiny):
    options = ["--output-dir", tmp_path / "run", "--tokenizer", "char", "--max-steps", 10**6, *tiny]
    process = pexpect.spawn(
        program[0],
        [*program[1:], "train", *map(str, [text, *options])],
        timeout=120,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # under nohup, it is inherited as ignored
    )
    exit_code = None
    try:
        process.expect("loss")
        os.close(process.child_fd)  # closes the terminal
        process.child_fd = -1
        exit_code = os.waitstatus_to_exitcode(os.waitpid(process.pid, 0)[1])
    finally:
        if exit_code is None:
            os.kill(process.pid, signal.SIGKILL)
    assert exit_code == 128 + signal.SIGHUP
    assert list((tmp_path / "run" / "checkpoints").glob("step-*"))


@pytest.mark.slow
def test_a_run_continues_after_its_output_pipe_is_closed(shell, text, tmp_path, tiny):
    options = ["--output-dir", tmp_path / "run", "--tokenizer", "char", "--max-steps", 30, "--log-every", 1, *tiny]
    assert shell(["train", text, *options], "| head -1").stderr == b""
    assert (tmp_path / "run" / "checkpoints" / "step-00000030").is_dir()
