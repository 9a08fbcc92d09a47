import importlib
import re
import subprocess
import sys
import tomllib
import warnings
from pathlib import Path

import pytest
from platforms import needs_linux

import homebrew
from homebrew.__main__ import run as run_program
from homebrew.cli.main import main
from homebrew.data.preparation.prepare import prepare

ROOT = Path(__file__).parents[2]
COMMANDS = ["train", "tokenizer", "prepare", "sample", "eval", "plot", "export", "doctor"]
TRAIN = ["train", "TEXT", "--output-dir", "x", "--max-steps", "1"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "missing.txt", "--output-dir", "x", "--max-steps", "1"], r"missing\.txt"),
        (["train", "--output-dir", "x", "--max-steps", "1"], "No data"),
        (["train", "TEXT", "--output-dir", "x", "--max-steps", "0"], "max_steps=0"),
        ([*TRAIN, "--accept-changes", "seed"], "--resume"),
        ([*TRAIN, "--micro-batch-size", "auto"], "global_batch_tokens"),
        ([*TRAIN, "--micro-batch-size", "0"], "from 1 to 1000000000 or 'auto'"),
        ([*TRAIN, "--n-head", "3"], "n_head=3"),
        ([*TRAIN, "--eval-fraction", "2"], "--eval-fraction 2: must be"),
        ([*TRAIN, "--eval-fraction", "0.999"], "--eval-fraction 0.999"),
        ([*TRAIN, "--eval-data", "TEXT", "--eval-fraction", "0.2"], "--eval-fraction 0.2 has no effect"),
        ([*TRAIN, "--eval-batches", "2", "--eval-fraction", "0"], "--eval-batches.*--eval-data"),
        ([*TRAIN, "--eval-every", "1", "--eval-fraction", "0"], "--eval-every.*--eval-data"),
        ([*TRAIN, "--lora-rank", "8"], "--init-from"),
        ([*TRAIN, "--lora-dropout", "0.1"], "--lora-rank"),
        ([*TRAIN, "--init-from", "RUN", "--lora-rank", "0"], "lora_rank=0"),
        ([*TRAIN, "--init-from", "RUN", "--lora-rank", "1", "--lora-alpha", "-1"], "lora_alpha=-1.0"),
        ([*TRAIN, "--init-from", "RUN", "--block-size", "0"], "--block-size 0"),
        ([*TRAIN, "--init-from", "RUN", "--block-size", "32"], "--block-size 32: must be from 1 to 16"),
        ([*TRAIN, "--init-from", "RUN", "--n-layer", "3", "--preset", "baby"], "--preset, --n-layer"),
        ([*TRAIN, "--init-from", "RUN", "--tokenizer", "gpt2"], "tokenizer 'bytes', not 'gpt2'"),
        (["train", "TOKENS", "--output-dir", "x", "--max-steps", "1", "--init-from", "RUN"], "tokenizer 'bytes'"),
        (
            ["train", "TOKENS", "--output-dir", "x", "--max-steps", "1", "--tokenizer", "bytes"],
            r"has the tokenizer 'char', but 'bytes' was given",
        ),
        ([*TRAIN, "--sample-every", "0"], "sample_every=0"),
        ([*TRAIN, "--sample-every", "1", "--sample-max-new-tokens", "0"], "sample_max_new_tokens=0"),
        ([*TRAIN, "--sample-prompt", "a"], "need --sample-every"),
        ([*TRAIN, "--sample-every", "1", "--sample-prompt", "Zürich", "--tokenizer", "char"], "prompt 'Zürich'"),
        (["sample", "RUN", "--prompt", "a", "--tokenizer", "gpt2"], "tokenizer 'bytes', not 'gpt2'"),
        (["sample", "./missing"], "missing"),
        (["sample", "RUN", "--prompt", "a", "--top-k", "-1"], "--top-k -1"),
        (["sample", "RUN", "--prompt", "a", "--top-p", "2"], "top_p=2.0"),
        (["sample", "RUN", "--prompt", "a", "--base", "x"], "Remove base="),
        (["sample", "user/step-gpt"], "user/step-gpt"),
        (["sample", "RUN", "--prompt", "a", "--max-new-tokens", "-1"], "max_new_tokens=-1"),
        (["sample", "RUN", "--prompt", "a", "--device", "cuda:99"], "cuda:99.*homebrew doctor"),
        (["sample", "RUN", "--prompt", "a", "--device", "meta"], "'meta' cannot be used"),
        (["sample", "RUN", "--prompt", "a", "--device", "meta:1"], "'meta:1' cannot be used"),
        (["eval", "RUN", "--text", "TEXT", "--device", "hpu"], "'hpu' cannot be used"),
        (["sample", "RUN", "--prompt", "a", "--device", ""], "'' cannot be used"),
        (["sample", "RUN", "--prompt", "a\udcff"], "U\\+DCFF.*surrogate"),
        (["sample", ""], "empty string"),
        (["eval", "RUN"], "--text"),
        (["eval", "RUN", "--text", ""], "empty string"),
        (["eval", "RUN", "--text", "missing.txt"], r"missing\.txt"),
        (["eval", "RUN", "--text", "TEXT", "--stride", "0"], "stride=0"),
        (["eval", "RUN", "--hellaswag", "TEXT"], "--hellaswag .* line 1 must be a JSON object"),
        (["eval", "RUN", "--hellaswag", "missing"], "--hellaswag missing"),
        (["eval", "RUN", "--hellaswag", "TEXT", "--limit", "0"], "--limit 0"),
        (["eval", "RUN", "--text", "TEXT", "--limit", "2"], "--limit.*--hellaswag"),
        (["eval", "RUN", "--hellaswag", "TEXT", "--stride", "2"], "--stride.*--text"),
        (["export", "RUN"], "--push-to-hub"),
        (["export", "RUN", ""], "empty string"),
        (["export", "RUN", "--adapter", "--push-to-hub", "a/b"], "--adapter"),
        (["export", "RUN", "x", "--adapter"], "adapter"),
        (["export", "RUN", "x", "--private"], "--push-to-hub"),
        (["export", "RUN", "RUN"], "run"),
        (["export", "RUN", "CHECKPOINT"], "checkpoint"),
        (["prepare", "--output", "x.npy"], "list of files is empty"),
        (["prepare", "TEXT", "", "--output", "x.npy"], "empty string"),
        (["prepare", "TEXT", "--output", ""], "empty string"),
        (["train", "TEXT", "--output-dir", "", "--max-steps", "1"], "empty string"),
    ],
)
def test_an_error_is_one_line_and_exit_code_1(run, text, tmp_path, monkeypatch, invoke_error, arguments, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # do not wait 20 s for the network
    token_file = run.parent / "char.npy"
    if not token_file.exists():
        prepare([text], token_file, tokenizer="char")
    newest_checkpoint = max((run / "checkpoints").iterdir())
    paths = {"TEXT": text, "RUN": run, "TOKENS": token_file, "CHECKPOINT": newest_checkpoint}
    error = invoke_error(*(paths.get(argument, argument) for argument in arguments))
    assert re.search(message, error)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["text.txt"]  # nothing is written


def test_a_warning_is_one_line_without_the_source(text, tmp_path, invoke, tiny):
    options = ["--output-dir", tmp_path / "run", "--max-steps", 8, "--lr-schedule", "wsd", "--tokenizer", "bytes"]
    with pytest.warns(UserWarning, match="does not reach its peak") as caught:
        invoke("train", text, *options, *tiny)
    shown = warnings.formatwarning(caught[0].message, UserWarning, __file__, 1)
    assert re.fullmatch("homebrew: .*\n", shown)


@pytest.mark.parametrize(
    ("arguments", "suggestion"),
    [
        (["sample", "x", "--promt", "a"], "--prompt"),
        (["smaple"], "sample"),
        (["train", "x", "--output-dir", "y"], "--max-steps"),
        (["train", "x", "--output-dir", "y", "--max-steps", "1", "--compile", "True"], "'yes'"),
        (["train", "x", "--output-dir", "y", "--max-steps", "1", "--num-workers", "1"], "no option --num-workers"),
        ([], ", ".join(COMMANDS)),
    ],
)
def test_wrong_usage_is_exit_code_2_with_a_suggestion(capsys, arguments, suggestion):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert suggestion in " ".join(capsys.readouterr().err.replace("│", "").split())


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_describes_every_option(capsys, command):
    with pytest.raises(SystemExit) as caught:
        main([*([command] if command else []), "--help"])
    assert caught.value.code == 0
    output = capsys.readouterr().out
    assert len(output) > 300
    assert not re.search(r"default: *(None)?\)", output), "the default of an option is not described"
    assert not re.search(r"^\W*(STR|PATH)", output, re.MULTILINE), "a positional argument has no name"
    assert not re.search(r"--[a-z-]+ [A-Z]+ +\(", output), "an option has no description"


def test_help_of_train_describes_the_data_and_the_model_first(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")  # one column
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    options = re.findall(r"^\W{1,2}(DATA|--[a-z-]+)", capsys.readouterr().out, re.MULTILINE)
    expected = ["DATA", "--eval-data", "--preset", "--n-layer", "--output-dir", "--max-steps", "--keep-every"]
    assert [option for option in options if option in expected] == expected


@pytest.mark.parametrize(
    ("arguments", "choices"),
    [
        (["train", "x", "--preset", "nano"], "'auto', 'char', 'baby', 'gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl'"),
        (["train", "x", "--lora-targets", "q"], "'c_attn', 'c_proj', 'c_fc'"),
        (["train", "x", "--compile", "maybe"], "'auto', 'yes', 'no'"),
        (["eval", "x", "--dtype", "half"], "'auto', 'float32', 'bfloat16', 'float16'"),
        (["train", "x", "--optimizer", "sgd"], "'adamw', 'muon'"),
        (["train", "x", "--lr-schedule", "step"], "'cosine', 'linear', 'wsd'"),
        (["train", "x", "--lr-schedule", "None"], "'cosine', 'linear', 'wsd'"),
    ],
)
def test_an_unknown_choice_is_answered_by_the_choices_in_order(capsys, arguments, choices):
    with pytest.raises(SystemExit):
        main(arguments)
    error = " ".join(re.sub(r"[^\w',()-]", " ", capsys.readouterr().err).split())
    assert f"({choices})" in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*TRAIN, "--max-steps", "many"], "'many'"),
        ([*TRAIN, "--micro-batch-size", "large"], "'large' is not of the form INT|{auto}"),
        ([*TRAIN, "--micro-batch-size", "None"], "'None' is not of the form INT|{auto}"),
        ([*TRAIN, "--learning-rate", "None"], "'None'"),
        ([*TRAIN, "--n-layer", "1.5"], "'1.5'"),
        ([*TRAIN, "--betas", "0.9"], "Expected 2 values"),
        ([*TRAIN, "--betas", "0.9", "x"], "'0.9 x' is not of the form FLOAT FLOAT"),
        ([*TRAIN, "--betas", "0.9", "0.95", "0.99"], "Unrecognized options: 0.99"),
        ([*TRAIN, "--overwrite", "yes"], "Unrecognized options: yes"),
        (["sample", "x", "--top-p", "half"], "'half'"),
        (["sample", "x", "hello"], "Unrecognized options: hello"),
        (["eval", "x", "--batch-size", "all"], "'all'"),
        (["prepare", "x", "--output", "y.npy", "--shard-tokens", "1k"], "'1k'"),
        (["doctor", "x"], "Unrecognized options: x"),
    ],
)
def test_a_value_that_cannot_be_parsed_is_answered_by_the_help_of_the_command(capsys, arguments, message):
    with pytest.raises(SystemExit):
        main(arguments)
    error = " ".join(capsys.readouterr().err.replace("│", "").split())
    assert message in error
    assert not re.search("no type matching|class|tuple", error), "Python's types are named"
    assert f"homebrew {arguments[0]} --help" in error


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_completion_that_the_readme_names_is_printed(capsys, shell):
    with pytest.raises(SystemExit) as caught:
        main(["--tyro-print-completion", shell])
    assert not caught.value.code
    assert "homebrew" in capsys.readouterr().out


def test_version_is_printed(invoke):
    assert invoke("--version") == f"homebrew {homebrew.__version__}\n"


def test_help_and_version_do_not_import_torch():
    script = """
import sys
from homebrew.cli.main import main
main(["--version"])
try:
    main(["train", "--help"])
except SystemExit:
    assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)


@pytest.mark.parametrize(("arguments", "code"), [(["eval", "x"], 1), (["sample"], 2)])
def test_exit_codes_of_the_process(program, arguments, code):
    process = subprocess.run([*program, *arguments], capture_output=True, text=True, check=False)
    assert process.returncode == code
    assert "Traceback" not in process.stderr


@needs_linux
@pytest.mark.parametrize("command", ["--version", "--help", "train --help"])
@pytest.mark.parametrize("redirection", ["<&- >&-", "2>&- >&-", ">/dev/full", ">/dev/full 2>/dev/full"])
def test_an_output_that_cannot_be_written_gives_no_traceback(program, command, redirection):
    script = f"{' '.join(program)} {command} {redirection}"
    process = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False)
    assert process.returncode == ("/dev/full" in redirection)
    if redirection == ">/dev/full":
        assert re.fullmatch("homebrew: .*No space left on device.*\n", process.stderr)
    else:
        assert process.stderr == ""


def test_ctrl_c_during_imports_prints_no_traceback(monkeypatch, capsys):
    class Interrupted:
        @property
        def main(self):
            raise KeyboardInterrupt

    monkeypatch.setitem(sys.modules, "homebrew.cli.main", Interrupted())
    with pytest.raises(SystemExit) as caught:
        run_program()
    assert caught.value.code == 130
    assert capsys.readouterr() == ("", "")


def test_pyproject_declares_the_program():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    module, function = project["scripts"]["homebrew"].split(":")
    assert callable(getattr(importlib.import_module(module), function))
