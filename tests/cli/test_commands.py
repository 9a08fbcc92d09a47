import dataclasses
import importlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tomllib
import typing
from pathlib import Path

import pexpect
import pytest
import torch
from transformers import pipeline

from homebrew import GPTConfig, TrainerConfig
from homebrew.__main__ import run as run_program
from homebrew.checkpoint.compatibility import ASPECTS
from homebrew.cli.doctor_command import _compilation, examine
from homebrew.cli.main import main
from homebrew.cli.train_command import Preset, Train
from homebrew.constants import Aspect
from homebrew.data.prepare import prepare
from homebrew.generation.sampling import Sampling
from homebrew.generation.streaming import generate_text
from homebrew.hub.load import load_model

HOMEBREW = [sys.executable, "-m", "homebrew"]
TINY = ["--n-layer", "2", "--n-head", "2", "--n-embd", "16", "--block-size", "16", "--micro-batch-size", "8"]
TEXT = "ROMEO:\nBut soft, what light through yonder window breaks?\nIt is the east, and Juliet is the sun.\n\n" * 30


def homebrew(*arguments, code=0, **environment):
    """The program itself, and what it wrote."""
    done = subprocess.run(
        [*HOMEBREW, *map(str, arguments)], capture_output=True, text=True, env=os.environ | environment, check=False
    )
    assert done.returncode == code, done.stderr
    return done.stdout if code == 0 else done.stderr


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A trained byte model."""
    folder = tmp_path_factory.mktemp("cli")
    (folder / "text.txt").write_text(TEXT)
    arguments = [folder / "text.txt", "--output-dir", folder / "run", "--max-steps", 4, "--tokenizer", "bytes", *TINY]
    assert main(["train", *map(str, arguments)]) == 0
    return folder / "run"


@pytest.fixture
def within(capsys):
    """The program's main function, and what it wrote: quicker than a process each time."""

    def call(*arguments):
        assert main([str(word) for word in arguments]) == 0
        return capsys.readouterr().out

    return call


def test_the_whole_way(text, tmp_path):
    go_the_whole_way(homebrew, text, tmp_path, "gpt2")


def test_the_whole_way_in_bytes(within, text, tmp_path):
    go_the_whole_way(within, text, tmp_path, "bytes")


def go_the_whole_way(homebrew, text, tmp_path, tokenizer):
    tokens, run, exported = tmp_path / "text.tokens", tmp_path / "run", tmp_path / "exported"

    told = homebrew("prepare", text, "--output", tokens, "--tokenizer", tokenizer)
    assert f"{len(TEXT):,} bytes of text" in told

    told = homebrew("train", tokens, "--output-dir", run, "--max-steps", 30, "--learning-rate", 0.01, *TINY)
    assert "step 30/30" in told
    events = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [event["loss"] for event in events if event["event"] == "step"]
    assert losses[-1] < 0.8 * losses[0]

    said = homebrew("sample", run, "--prompt", "ROMEO:", "--temperature", 0, "--max-new-tokens", 10)
    assert said.startswith("ROMEO:")

    told = homebrew("eval", run, "--text", text)
    loss = float(re.search(r"^loss +([\d.]+)$", told, re.MULTILINE)[1])
    assert loss == pytest.approx(losses[-1], rel=0.2)

    homebrew("export", run, exported)
    pipe = pipeline("text-generation", str(exported), device="cpu")
    theirs = pipe("ROMEO:", max_new_tokens=10, do_sample=False)[0]["generated_text"]
    assert theirs == said.removesuffix("\n")
    assert said == homebrew("sample", exported, "--prompt", "ROMEO:", "--temperature", 0, "--max-new-tokens", 10)
    assert len(theirs) > len("ROMEO:")


def test_data_may_be_named_by_links(within, text, tmp_path):
    tokens, link = tmp_path / "text.tokens", tmp_path / "link"
    within("prepare", text, "--output", tokens, "--tokenizer", "bytes")
    for number, file in enumerate((text, tokens)):
        link.symlink_to(file)
        train = ["train", link, "--eval-data", link, "--output-dir", tmp_path / f"run{number}", "--max-steps", 1, *TINY]
        assert "step 1/1" in within(*train, "--tokenizer", "bytes")
        link.unlink()


def test_a_run_goes_on_and_only_when_asked(text, tmp_path, capsys):
    train = [
        "train",
        str(text),
        "--output-dir",
        str(tmp_path / "run"),
        "--tokenizer",
        "char",
        "--max-steps",
        "2",
        *TINY,
    ]
    assert main(train) == 0
    assert main(train) == 1
    told = capsys.readouterr().err
    assert told.startswith("homebrew: output_dir=")
    assert told.count("\n") == 1
    assert main([*train, "--resume"]) == 0
    assert "step 2 of 2" in capsys.readouterr().out

    other = [*train, "--resume", "--seed", "7"]
    assert main(other) == 1
    accept = ["--accept-changes", "dataset", "--accept-changes", "seed"]
    assert f"With `homebrew train`: {' '.join(accept)}." in capsys.readouterr().err
    assert main([other[0], *accept, *other[1:]]) == 0
    assert typing.get_args(Aspect) == ASPECTS


def test_a_misspelt_folder_is_not_looked_for_on_the_hub(tmp_path, monkeypatch, capsys):
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    for name in ("runs/bok", "runs/book/checkpoints"):
        assert main(["sample", name]) == 1
        assert capsys.readouterr().err.startswith(f"homebrew: There is no folder {name}")


def test_prepare_takes_no_text_s_place(text, tmp_path, capsys):
    before = text.read_bytes()
    assert main(["prepare", str(text), "--output", str(text), "--tokenizer", "bytes"]) == 1
    assert f"{text} is there and is no token file" in capsys.readouterr().err
    assert text.read_bytes() == before
    for _ in range(2):  # a token file it does replace
        assert main(["prepare", str(text), "--output", str(tmp_path / "new" / "a.tokens"), "--tokenizer", "bytes"]) == 0
    capsys.readouterr()
    for given, told in (
        (tmp_path / "new" / "a.tokens", "is a token file already"),
        (tmp_path / "none", "cannot be read: No"),
    ):
        assert main(["prepare", str(given), "--output", str(tmp_path / "b.tokens")]) == 1
        assert told in capsys.readouterr().err


def test_a_run_outlives_who_reads_it(text, tmp_path):
    train = ["train", text, "--output-dir", tmp_path / "run", "--tokenizer", "char", "--max-steps", 30, *TINY]
    command = f"{' '.join(HOMEBREW)} {' '.join(map(str, train))} --log-every 1 | head -1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, check=True)
    assert done.stderr == b""
    assert (tmp_path / "run" / "checkpoints" / "step-00000030").is_dir()


def test_a_run_saves_when_its_terminal_is_closed(text, tmp_path):
    train = ["train", text, "--output-dir", tmp_path / "run", "--tokenizer", "char", "--max-steps", 10**6, *TINY]
    running = pexpect.spawn(HOMEBREW[0], [*HOMEBREW[1:], *map(str, train)], timeout=60)
    running.expect("step")
    running.expect("loss")
    os.close(running.child_fd)  # the terminal's end
    running.child_fd = -1
    assert os.waitstatus_to_exitcode(os.waitpid(running.pid, 0)[1]) == 129
    assert list((tmp_path / "run" / "checkpoints").glob("step-*"))


def test_settings_that_say_nothing(text, tmp_path, capsys):
    tokens = tmp_path / "a.tokens"
    prepare([text], tokens, tokenizer="bytes")
    run = ["--output-dir", str(tmp_path / "run"), "--max-steps", "1", *TINY]
    for data, options, told in (
        (tokens, ["--tokenizer", "char"], "--tokenizer is for a text: .* in the ids of bytes"),
        (tokens, ["--eval-fraction", "2"], "--eval-fraction 2: must be"),
        (tokens, ["--eval-fraction", "0.9999"], "--eval-fraction 0.9999 of .* leaves none"),
    ):
        assert main(["train", str(data), *run, *options]) == 1
        assert re.search(told, capsys.readouterr().err)


def test_an_export_is_not_put_into_a_run(run, capsys):
    assert main(["export", str(run), str(run)]) == 1
    assert "is a run's folder" in capsys.readouterr().err


def test_training_goes_on_from_weights_and_adapts_them(run, text, tmp_path):
    base, _ = load_model(run)
    base.save_pretrained(tmp_path / "base")
    for name, source, more in (("run", run, []), ("base", tmp_path / "base", ["--tokenizer", "bytes"])):
        out = tmp_path / f"from-{name}"
        arguments = [text, "--output-dir", out, "--max-steps", 1, "--init-from", source, "--eval-data", text, *more]
        assert main(["train", *map(str, arguments), "--learning-rate", "1e-9", "--micro-batch-size", "8"]) == 0
        model, tokenizer = load_model(out)
        assert tokenizer.name == "bytes"
        torch.testing.assert_close(model.state_dict(), base.state_dict(), atol=1e-6, rtol=0)


def test_an_adapter_is_trained_on_a_base_and_merged_on_export(run, within, text, tmp_path):
    base, lora = tmp_path / "base", tmp_path / "lora"
    shutil.copytree(run, base)
    train = ["train", text, "--output-dir", lora, "--max-steps", 2, "--init-from", base, "--lora-rank", 2]
    train += ["--micro-batch-size", 8, "--learning-rate", 0.1]
    told = within(*train)
    trained = 2 * 2 * ((16 + 48) + (16 + 16) + (64 + 16))  # in two blocks, of rank 2
    assert f"({trained:,} trained)" in told
    assert [path.name for path in lora.rglob("adapter.safetensors")]
    assert not [path.name for path in lora.rglob("model.safetensors")]
    assert "step 2 of 2" in within(*train, "--resume")

    base.rename(tmp_path / "moved")
    assert main(["sample", str(lora), "--prompt", "Hello"]) == 1
    greedily = ["sample", "--prompt", "Hello", "--temperature", 0, "--max-new-tokens", 10]
    said = within(*greedily, lora, "--base", tmp_path / "moved")
    assert said != within(*greedily, run)
    within("export", lora, tmp_path / "exported", "--base", tmp_path / "moved")
    pipe = pipeline("text-generation", str(tmp_path / "exported"), device="cpu")
    assert said == pipe("Hello", max_new_tokens=10, do_sample=False)[0]["generated_text"] + "\n"
    within("export", lora, tmp_path / "adapter", "--base", tmp_path / "moved", "--adapter")
    assert said == within(*greedily, tmp_path / "adapter")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "none.txt", "--output-dir", "x", "--max-steps", "1"], r"none\.txt"),
        (["train", "TEXT", "TEXT", "--output-dir", "x", "--max-steps", "1"], "2 text files"),
        (["train", "--output-dir", "x", "--max-steps", "1"], "no data"),
        (["train", "TEXT", "--output-dir", "x", "--max-steps", "0"], "max_steps=0"),
        (
            ["train", "TEXT", "--output-dir", "x", "--max-steps", "1", "--micro-batch-size", "auto"],
            "global_batch_tokens",
        ),
        (["train", "TEXT", "--output-dir", "x", "--max-steps", "1", "--lora-rank", "8"], "--init-from"),
        (["train", "TEXT", "--output-dir", "x", "--max-steps", "1", "--init-from", "RUN", "--n-layer", "3"], "n_layer"),
        (
            ["train", "TEXT", "--output-dir", "x", "--max-steps", "1", "--init-from", "RUN", "--tokenizer", "gpt2"],
            "tokenizer 'bytes', not 'gpt2'",
        ),
        (["train", "TOKENS", "--output-dir", "x", "--max-steps", "1", "--init-from", "RUN"], "tokenizer 'bytes'"),
        (["sample", "RUN", "--prompt", "a", "--tokenizer", "gpt2"], "tokenizer 'bytes', not 'gpt2'"),
        (["train", "TEXT", "--output-dir", "x", "--max-steps", "1", "--lora-dropout", "0.1"], "--lora-rank"),
        (["sample", "./none"], "no folder"),
        (["sample", "RUN", "--prompt", "a", "--top-k", "-1"], "top_k=-1"),
        (["sample", "RUN", "--prompt", "a", "--base", "x"], "whole model, which has no base"),
        (["sample", "user/step-gpt"], "user/step-gpt"),
        (["sample", "RUN", "--prompt", "a", "--max-new-tokens", "-1"], "max_new_tokens=-1"),
        (["sample", "RUN", "--prompt", "a", "--device", "cuda:99"], "cuda:99.*homebrew doctor"),
        (["eval", "RUN"], "--text"),
        (["eval", "RUN", "--text", "none.txt"], r"none\.txt"),
        (["eval", "RUN", "--hellaswag", "TEXT"], "line 1 is not JSON"),
        (["eval", "RUN", "--hellaswag", "TEXT", "--limit", "0"], "--limit 0"),
        (["export", "RUN"], "Say where to"),
        (["export", "RUN", "--adapter", "--push-to-hub", "a/b"], "give one"),
        (["export", "RUN", "x", "--adapter"], "no adapter to save"),
        (["export", "RUN", "x", "--private"], "--push-to-hub"),
        (["export", "RUN", "CHECKPOINT"], "holds a checkpoint"),
        (["prepare", "--output", "x"], "no text"),
    ],
)
def test_an_error_is_one_line_and_exit_code_1(run, text, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # or it tries for 20 seconds
    tokens = run.parent / "char.tokens"
    prepare([text], tokens, tokenizer="char")
    newest = max((run / "checkpoints").iterdir())
    words = {"TEXT": text, "RUN": run, "TOKENS": tokens, "CHECKPOINT": newest}
    assert main([str(words.get(word, word)) for word in arguments]) == 1
    out, told = capsys.readouterr()
    assert out == ""
    assert told.startswith("homebrew: ")
    assert told.count("\n") == 1
    assert re.search(message, told)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["text.txt"]


@pytest.mark.parametrize(
    ("arguments", "suggestion"),
    [
        (["sample", "x", "--promt", "a"], "--prompt"),
        (["eval", "x", "--strid", "4"], "--stride"),
        (["smaple"], "sample"),
        (["train", "x", "--output-dir", "y"], "--max-steps"),
        (["train", "x", "--output-dir", "y", "--max-steps", "1", "--mirco-batch-size", "4"], "--micro-batch-size"),
        (["train", "x", "--output-dir", "y", "--max-steps", "1", "--compile", "True"], "'yes'"),
        (["train", "x", "--output-dir", "y", "--max-steps", "1", "--num-workers", "1"], "Unrecognized"),
        (["prepare", "x", "--output", "y", "--tokenizer", "gpt3"], "gpt2"),
        ([], "train, prepare, sample, eval, export, doctor"),
    ],
)
def test_wrong_usage_is_exit_code_2_and_says_what_was_meant(capsys, arguments, suggestion):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert suggestion in capsys.readouterr().err


def test_the_programs_own_exit_codes_and_no_traceback(tmp_path):
    assert re.fullmatch("homebrew: There is no folder .*\n", homebrew("sample", "./none", code=1))
    homebrew("sample", code=2)


@pytest.mark.parametrize("command", ["", "train", "prepare", "sample", "eval", "export", "doctor"])
def test_help_says_something_of_every_option(capsys, command):
    with pytest.raises(SystemExit) as caught:
        main([*([command] if command else []), "--help"])
    assert caught.value.code == 0
    told = capsys.readouterr().out
    assert len(told) > 300
    assert not re.search(r"^│ \[*(STR|PATH)", told, re.MULTILINE), "what stands without a name needs one"
    assert not re.search(r"--[a-z-]+ [A-Z]+ +\(", told), "an option has nothing but its default"


def test_help_needs_no_pytorch():
    subprocess.run([sys.executable, "-c", PROBE], check=True, capture_output=True)


PROBE = """
import sys
from homebrew.cli.main import main
try:
    main(["train", "--help"])
except SystemExit:
    assert "torch" not in sys.modules
"""


SETTINGS = {
    "output_dir": Path("runs/own"),
    "max_steps": 7,
    "global_batch_tokens": 64,
    "micro_batch_size": "auto",
    "learning_rate": 0.5,
    "warmup_steps": 3,
    "min_lr_ratio": 0.25,
    "betas": (0.8, 0.9),
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
    "keep_every": 13,
    "gather_limit_bytes": 14,
}
"""Of each field of TrainerConfig that the command line has, a value that is not its default."""


@pytest.fixture
def parsed(monkeypatch):
    """What `homebrew train` makes of its arguments."""
    found = []
    monkeypatch.setattr(Train, "run", lambda command: found.append(command))

    def parse(*arguments):
        assert main(["train", "text.txt", *arguments]) == 0
        return found.pop()

    return parse


def test_every_setting_of_a_run_is_an_option(parsed):
    words = []
    for name, value in SETTINGS.items():
        words.append(f"--{name.replace('_', '-')}")
        if name == "compile":
            words.append("yes")
        elif value is not True:
            words += map(str, value if isinstance(value, tuple) else [value])
    config = parsed(*words).settings
    assert dataclasses.asdict(config) == SETTINGS | {"num_workers": 0, "loader_timeout_seconds": 600.0}
    defaults = {field.name: field.default for field in dataclasses.fields(TrainerConfig)}
    assert not [name for name, value in SETTINGS.items() if value == defaults[name]]


def test_without_options_a_run_has_the_trainers_defaults(parsed):
    config = parsed("--output-dir", "x", "--max-steps", "1").settings
    assert dataclasses.asdict(config) == dataclasses.asdict(TrainerConfig(output_dir=Path("x"), max_steps=1))


@pytest.mark.parametrize(("word", "value"), [("auto", "auto"), ("yes", True), ("no", False)])
def test_whether_to_compile_is_said_in_words(parsed, word, value):
    assert parsed("--output-dir", "x", "--max-steps", "1", "--compile", word).settings.compile is value


def test_every_preset_there_is():
    for preset in typing.get_args(Preset):
        GPTConfig.preset(preset)


def test_a_conversation_in_turns(run, within, monkeypatch):
    def talk(lines, *options):
        monkeypatch.setattr("sys.stdin", io.StringIO(lines))
        return within("sample", run, "--max-new-tokens", 40, "--seed", 1, "--top-k", 256, *options)

    once, twice = talk("Hello\n"), talk("Hello\nA\n")
    so_far = f"Hello\n{once}\nA\n"  # the model sees the last 8 bytes: the reply must be among them
    again = generate_text(*load_model(run), so_far, 40, Sampling(top_k=256), seed=2, stop=["\n\n"])
    assert twice == once + "".join(again) + "\n"
    assert len(twice) > len(once) > 20
    stops = [character for character in once if character.isascii() and character.isalpha()][-2:]
    stopped = talk("Hello\n", *(word for stop in stops for word in ("--stop", stop)))
    assert once.startswith(stopped.removesuffix("\n"))
    assert not {*stops} & {*stopped}
    assert len(stopped) < len(once)


def test_a_conversation_in_an_alphabet_without_line_ends(tmp_path, within, monkeypatch):
    (tmp_path / "dna.txt").write_text("GATTACA" * 40)
    options = ["--output-dir", tmp_path / "run", "--tokenizer", "char", "--max-steps", 1, *TINY]
    within("train", tmp_path / "dna.txt", *options)
    monkeypatch.setattr("sys.stdin", io.StringIO("GAT\n\nTACA\n"))
    turns = within("sample", tmp_path / "run", "--max-new-tokens", 30, "--top-k", 0).split("\n")
    assert [len(turn) for turn in turns] == [30, 30, 30, 0]
    assert set("".join(turns)) <= set("GATC")
    assert len(within("sample", tmp_path / "run", "--prompt", "", "--max-new-tokens", 30)) == 31


def interrupt(arguments, until):
    """Ctrl-C a program once it has written `until`: its exit code, and what it wrote to both outputs."""
    program = subprocess.Popen([*HOMEBREW, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    told = b""
    while until not in told:
        told += (new := os.read(program.stdout.fileno(), 1000))
        assert new, program.stderr.read()
    program.send_signal(signal.SIGINT)
    rest, errors = program.communicate()
    return program.returncode, told + rest, errors


def test_ctrl_c_is_quiet(run, text, tmp_path):
    code, told, errors = interrupt(["sample", run, "--prompt", "Hello", "--max-new-tokens", 10**6], b"Hello")
    assert (code, errors) == (130, b"")

    arguments = [text, "--output-dir", tmp_path / "run", "--max-steps", 10**6, "--tokenizer", "bytes", *TINY]
    code, told, errors = interrupt(["train", *arguments, "--log-every", 1], b"step 3/")
    assert (code, errors) == (130, b"")
    assert b"saving" in told
    load_model(tmp_path / "run")


def test_ctrl_c_is_quiet_while_the_program_loads(monkeypatch, capsys):
    class Loading:
        @property
        def main(self):
            raise KeyboardInterrupt

    monkeypatch.setitem(sys.modules, "homebrew.cli.main", Loading())
    with pytest.raises(SystemExit) as caught:
        run_program()
    assert caught.value.code == 130
    assert capsys.readouterr() == ("", "")


def test_on_a_terminal(run):
    """A conversation as a person has it, on a terminal that cannot show all that is written."""
    program = [*HOMEBREW, "sample", str(run), "--max-new-tokens", "30", "--seed", "1"]
    environment = os.environ | {"PYTHONIOENCODING": "ascii:strict"}
    terminal = pexpect.spawn(program[0], program[1:], env=environment, encoding="utf-8", timeout=60)
    terminal.expect_exact("> ")
    for line in ("Hello", "", "Thou"):
        terminal.sendline(line)
        terminal.expect_exact(f"{line}\r\n")
        terminal.expect_exact("\r\n> ")
        assert terminal.before.isascii()
    terminal.sendintr()
    terminal.expect(pexpect.EOF)
    terminal.close()
    assert terminal.before == "^C\r\n"
    assert terminal.exitstatus == 130


def test_a_reader_that_has_had_enough_gets_no_complaint(run):
    command = f"{' '.join(HOMEBREW)} sample {run} --prompt Hello --max-new-tokens 3000 | head -c 5"
    done = subprocess.run(["bash", "-c", command], capture_output=True, check=True)
    assert (done.stdout, done.stderr) == (b"Hello", b"")


def test_hellaswag_from_a_file(run, tmp_path, capsys):
    question = {"ctx": "He", "endings": ["sat up", "ran", "sat", "was"], "label": 1}
    (tmp_path / "questions.jsonl").write_text(f"{json.dumps(question)}\n" * 3)
    assert main(["eval", str(run), "--hellaswag", str(tmp_path / "questions.jsonl"), "--limit", "2"]) == 0
    told = capsys.readouterr().out
    assert re.search(r"hellaswag accuracy +[01]\.0000\n", told)
    assert re.search(r"hellaswag questions +2\n", told)


def test_an_export_without_its_tokenizer(run, within, tmp_path, capsys):
    within("export", run, tmp_path, "--no-tokenizer")
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.safetensors"}
    greedily = ["--prompt", "Hello", "--temperature", 0, "--max-new-tokens", 10]
    assert main(["sample", str(tmp_path), "--prompt", "Hello"]) == 1
    assert "give --tokenizer" in capsys.readouterr().err
    assert within("sample", tmp_path, *greedily, "--tokenizer", "bytes") == within("sample", run, *greedily)


def test_the_doctor_says_what_a_run_would_get(tmp_path):
    told = homebrew("doctor", ACCELERATE_MIXED_PRECISION="bf16")
    for word in (torch.__version__, "bf16, as the launcher says", "cpu", "GPT-2's vocabulary", "at hand"):
        assert word in told


def test_the_doctor_looks_where_runs_are_to_be_written(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "runs"):
        assert "choose another" in list(examine(path))[-1].fix
    assert list(examine(tmp_path / ("a" * 300)))[-1].found.endswith(str(tmp_path))


def test_the_doctor_says_what_keeps_a_run_from_starting(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    launch = next(finding for finding in examine(tmp_path / "runs") if finding.topic == "launch")
    assert "started 2 processes" in launch.fix


def test_what_the_doctor_advises_is_printed_whole(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("homebrew.cli.doctor_command.version", lambda _: None)
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["doctor", "--output-dir", str(tmp_path)]) == 0
    assert "pip install 'homebrew-gpt[plot]'" in capsys.readouterr().out


def test_the_doctor_fails_where_a_run_would_not_start(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["doctor", "--output-dir", str(tmp_path)]) == 1
    assert "would not start" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("triton", "compiler", "found", "fix"),
    [
        (True, True, "on", ""),
        (False, True, "would fail: there is no triton package", "Install it, or train with --compile no, .*"),
        (True, False, "would fail, and so would --compile no: .* no C compiler", "Install one.*"),
        (False, False, "would fail: .* no triton package and no C compiler", "Install both, or .* --compile no, .*"),
    ],
)
def test_the_doctor_says_what_a_gpus_kernels_need(monkeypatch, triton, compiler, found, fix):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object() if triton else None)
    monkeypatch.setattr("shutil.which", lambda name: "/usr/bin/cc" if compiler else None)
    finding = _compilation(torch.device("cuda"))
    assert re.fullmatch(found, finding.found)
    assert re.fullmatch(fix, finding.fix)


def test_the_program_is_declared():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    module, function = project["scripts"]["homebrew"].split(":")
    assert callable(getattr(importlib.import_module(module), function))
