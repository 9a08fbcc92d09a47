"""`homebrew train --resume` takes the options that are not given from the command in `run.json`."""

import json
import shlex
import shutil
import subprocess

import pytest

from homebrew import load_model
from homebrew.cli.main import main
from homebrew.cli.saved_command import command_line
from homebrew.cli.train_command import Train
from homebrew.plotting.run_record import read_run

DATA_OPTIONS = ["a file.txt", "b.txt", "--eval-data", "c.txt", "--eval-data", "d.txt", "--eval-fraction", "0.25"]
MODEL_OPTIONS = "--tokenizer bytes --preset gpt2-xl --n-layer 2 --n-head 2 --n-embd 8 --block-size 4 --dropout 0.125"
LORA_OPTIONS = "--init-from user/name --lora-rank 2 --lora-alpha 3 --lora-dropout 0.5 --lora-targets c_fc c_attn"
TRAINER_OPTIONS = (
    "--global-batch-tokens 64 --micro-batch-size auto --learning-rate 1e-5 --betas 0.5 0.75 --compile yes "
    "--activation-checkpointing --log-with tensorboard --loss-spike-zscore 4 --mixed-precision bf16"
)
SAMPLE_OPTIONS = [
    "--sample-every",
    "5",
    "--sample-prompt",
    "a b",
    "--sample-prompt=--lr",
    "--sample-max-new-tokens",
    "7",
]


@pytest.fixture
def parse(monkeypatch):
    """Parse a command line and return the options of `homebrew train`."""
    commands = []
    monkeypatch.setattr(Train, "run", lambda command: commands.append(command))

    def parse(*arguments):
        assert main(["train", *arguments]) == 0
        return commands.pop()

    return parse


@pytest.mark.parametrize(
    "options",
    [
        [],
        DATA_OPTIONS[:1],
        [*DATA_OPTIONS, *MODEL_OPTIONS.split()],
        [*DATA_OPTIONS, *LORA_OPTIONS.split()],
        [*DATA_OPTIONS, *TRAINER_OPTIONS.split()],
        [*DATA_OPTIONS, "--compile", "no"],
        [*DATA_OPTIONS, *SAMPLE_OPTIONS],
    ],
)
def test_the_recorded_command_has_the_same_options_in_any_folder(parse, options, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = parse(*options, "--output-dir", "a run", "--max-steps", "7")
    words = shlex.split(command_line(options))
    assert words[:2] == ["homebrew", "train"]
    monkeypatch.chdir(tmp_path.parent)
    again = parse(*words[2:])
    assert command_line(again) == shlex.join(words)
    assert (again.model, again.samples, again.data.tokenizer) == (
        options.model,
        options.samples,
        options.data.tokenizer,
    )
    assert again.data.files == tuple(tmp_path / file for file in options.data.files)
    assert again.data.eval_data == tuple(tmp_path / file for file in options.data.eval_data)


@pytest.fixture
def small_run(text, tmp_path, invoke, tiny, monkeypatch):
    """A run of 2 steps, started with relative paths in a folder that is not the working directory any more."""
    monkeypatch.chdir(tmp_path)
    invoke("train", text.name, "--output-dir", "run", "--max-steps", 2, "--tokenizer", "char", "--seed", 5, *tiny)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return tmp_path / "run"


def test_a_run_resumes_by_its_folder_alone_from_anywhere(small_run, invoke, monkeypatch):
    moved = small_run.rename(small_run.parent / "moved")
    description = json.loads((moved / "run.json").read_text())
    monkeypatch.setenv("HOME", str(moved.parent))
    for spelling in (f"--output-dir {moved}", f"--output-dir={moved}", "--output_dir ../moved", "--output-dir=~/moved"):
        assert "step 2/2" in invoke("train", "--resume", *spelling.split())
    assert "step 3/3" in invoke(
        "train", "--resume", "--output-dir", moved, "--max-steps", 3, "--accept-changes", "schedule"
    )
    resumed = json.loads((moved / "run.json").read_text())
    assert resumed["config"] == description["config"] | {"max_steps": 3, "output_dir": str(moved)}
    assert resumed["train_dataset"]["fingerprint"] == description["train_dataset"]["fingerprint"]
    assert "step 3/3" in invoke("train", "--resume", "--output-dir", moved)  # the accepted change is recorded


@pytest.mark.filterwarnings("ignore:The learning rate does not reach its peak")
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_run_in_its_stable_phase_is_extended_by_max_steps_alone(
    text, tmp_path, invoke, invoke_error, tiny, optimizer
):
    options = ["--lr-schedule", "wsd", "--decay-fraction", 0.25, "--optimizer", optimizer, "--tokenizer", "char", *tiny]
    invoke("train", text, "--output-dir", tmp_path / "run", "--max-steps", 4, *options)  # step 3 has the full rate
    resume = ["train", "--resume", "--output-dir", tmp_path / "run"]
    assert "step 40/40" in invoke(*resume, "--max-steps", 40)
    assert "--accept-changes schedule" in invoke_error(*resume, "--max-steps", 50)


def test_values_given_again_may_agree(small_run, text, invoke, tiny):
    arguments = [text, "--tokenizer", "char", "--seed", 5, *tiny, "--max-steps", 2, "--learning-rate", 6e-4]
    assert "step 2/2" in invoke("train", "--resume", "--output-dir", small_run, *arguments)


@pytest.mark.parametrize(
    ("options", "aspects"),
    [
        (["--seed", 7], ["seed", "dataset"]),
        (["other.txt"], ["dataset"]),
        (["--eval-fraction", 0.2], ["dataset"]),
        (["--dropout", 0.5], ["model"]),
        (["--max-steps", 3], ["schedule"]),
        (["--learning-rate", 1e-5], ["schedule"]),
        (["--weight-decay", 0.5], ["optimizer"]),
        (["--micro-batch-size", 4], ["global_batch_size"]),
    ],
)
def test_another_value_is_a_change_to_accept(small_run, text, invoke_error, options, aspects):
    (small_run.parent / "elsewhere" / "other.txt").write_text(text.read_text()[::-1])
    error = invoke_error("train", "--resume", "--output-dir", small_run, *options)
    assert all(f"--accept-changes {aspect}" in error for aspect in aspects)


@pytest.mark.parametrize("options", [["--n-layer", 1], ["--tokenizer", "bytes"], ["--preset", "baby", "--n-head", 1]])
def test_a_model_that_does_not_fit_is_an_error(small_run, invoke_error, options):
    error = invoke_error("train", "--resume", "--output-dir", small_run, *options)
    assert "model: " in error
    assert "another run" in error


def test_eval_data_given_again_replaces_that_of_the_run(text, tmp_path, invoke, tiny):
    options = ["--max-steps", 1, "--tokenizer", "bytes", *tiny]
    invoke("train", text, "--output-dir", tmp_path / "run", "--eval-data", text, *options)
    for _ in range(2):
        invoke("train", "--resume", "--output-dir", tmp_path / "run", "--eval-data", text, "--eval-data", text)
        assert "and 1 more" in json.loads((tmp_path / "run" / "run.json").read_text())["eval_dataset"]["source"]


def test_eval_data_replaces_the_fraction_of_the_run(text, tmp_path, invoke, invoke_error, tiny):
    options = ["--max-steps", 1, "--tokenizer", "bytes", "--eval-fraction", 0.25]
    invoke("train", text, "--output-dir", tmp_path / "run", *options, *tiny)
    error = invoke_error("train", "--resume", "--output-dir", tmp_path / "run", "--eval-data", text)
    assert "--accept-changes dataset" in error  # all of the text is training data


def test_prompts_given_again_replace_those_of_the_run(text, tmp_path, invoke, tiny):
    folder = tmp_path / "run"
    sampling = ["--sample-every", 1, "--sample-prompt", "ROMEO:", "--sample-max-new-tokens", 4]
    invoke("train", text, "--output-dir", folder, "--max-steps", 2, "--tokenizer", "bytes", *tiny, *sampling)
    resume = ["train", "--resume", "--output-dir", folder, "--accept-changes", "schedule", "--max-steps"]
    invoke(*resume, 3)
    invoke(*resume, 4, "--sample-prompt", "JULIET:")
    samples = read_run(folder).samples
    assert [(sample.step, sample.prompt) for sample in samples] == [
        (1, "ROMEO:"), (2, "ROMEO:"), (3, "ROMEO:"), (4, "JULIET:")
    ]  # fmt: skip


def test_an_adapter_resumes_with_its_base_from_anywhere(run, text, tmp_path, invoke, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(run, tmp_path / "base")
    options = ["--lora-rank", 2, "--max-steps", 1, "--micro-batch-size", 8]
    invoke("train", text, "--output-dir", "lora", "--init-from", "base", *options)
    monkeypatch.chdir(tmp_path.parent)
    assert "step 1/1" in invoke("train", "--resume", "--output-dir", tmp_path / "lora")


def test_another_pretrained_model_is_an_error(run, small_run, text, tmp_path, invoke, invoke_error):
    output_dir = tmp_path / "tuned"
    invoke("train", text, "--output-dir", output_dir, "--init-from", run, "--max-steps", 1, "--micro-batch-size", 8)
    assert "step 1/1" in invoke("train", "--resume", "--output-dir", output_dir, "--init-from", run)
    for started, other in ((output_dir, small_run), (output_dir, "user/name"), (small_run, run)):
        assert "has started from" in invoke_error("train", "--resume", "--output-dir", started, "--init-from", other)


def test_other_initial_weights_are_an_error(run, small_run, text, tmp_path, invoke, invoke_error, tiny):
    resume = ["train", "--resume", "--output-dir"]
    assert "step 2/2" in invoke(*resume, small_run, "--init", "gpt2")
    error = invoke_error(*resume, small_run, "--init=local")
    assert "--init local: the run has started from new weights (--init gpt2)" in error
    invoke("train", text, "--output-dir", tmp_path / "local", "--init", "local", "--max-steps", 1, *tiny)
    assert "step 1/1" in invoke(*resume, tmp_path / "local", "--init", "local")
    assert "--init gpt2: the run has started" in invoke_error(*resume, tmp_path / "local", "--init", "gpt2")
    tuned = tmp_path / "tuned"
    invoke("train", text, "--output-dir", tuned, "--init-from", run, "--max-steps", 1, "--micro-batch-size", 8)
    assert f"--init local: the run has started from {run}" in invoke_error(*resume, tuned, "--init", "local")


@pytest.mark.slow
def test_processes_train_and_resume_from_another_folder(program, text, tmp_path, tiny):
    train = [*program, "train", "--output-dir", tmp_path / "run"]
    subprocess.run([*train, text.name, "--max-steps", "2", *tiny], cwd=tmp_path, check=True)
    resume = [*train, "--resume", "--max-steps", "3"]
    refused = subprocess.run(resume, cwd="/", capture_output=True, text=True, check=False)
    assert (refused.returncode, "--accept-changes schedule" in refused.stderr) == (1, True)
    accept = [*resume, "--accept-changes", "schedule"]
    assert "step 3/3" in subprocess.run(accept, cwd="/", capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("command", ["missing", None, 3, []])
def test_without_a_recorded_command_all_options_are_needed(small_run, text, invoke, invoke_error, tiny, command):
    description = json.loads((small_run / "run.json").read_text())
    if command == "missing":
        (small_run / "run.json").unlink()
    else:
        (small_run / "run.json").write_text(json.dumps(description | {"command": command}))
    for options in (
        [],
        ["--max-steps", 3],
        ["--max-steps", 3, "--accept-changes", "schedule"],
        ["--max-steps=3", "--seed", 5],
    ):
        error = invoke_error("train", "--resume", "--output-dir", small_run, *options)
        assert "all options" in error
        assert ("'resume=True' of `trainer.train`" in error) == (command != "missing")
    options = ["--max-steps", 2, "--tokenizer", "char", "--seed", 5, *tiny]
    invoke("train", text, "--resume", "--output-dir", small_run, *options)


@pytest.mark.parametrize(
    "command", ["", "homebrew train 'x", "homebrew train --steps 3", "rm -rf /", "homebrew train x"]
)
def test_a_damaged_command_is_an_error(small_run, invoke_error, command):
    description = json.loads((small_run / "run.json").read_text())
    (small_run / "run.json").write_text(json.dumps(description | {"command": command}))
    assert "run.json is not valid" in invoke_error("train", "--resume", "--output-dir", small_run)


def test_a_mistyped_folder_is_an_error(small_run, invoke_error):
    assert "Check --output-dir" in invoke_error("train", "--resume", "--output-dir", small_run.parent / "rnu")
    assert load_model(small_run)
