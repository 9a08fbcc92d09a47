import re
import warnings

import pytest

from homebrew.cli.main import COMMANDS, main
from homebrew.cli.option_names import _OTHER_NAMES, explain_unknown_name, in_terms_of_options, option_names
from homebrew.cli.train_command import Train


@pytest.mark.parametrize("command", COMMANDS)
def test_option_names_are_those_of_the_help(command, capsys):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    listed = set(re.findall(r"^\W*(?:-h, )?(--[a-z][a-z-]*)", capsys.readouterr().out, re.MULTILINE))
    assert {*option_names(COMMANDS[command]), "--help"} == listed


def test_suggested_options_exist():
    existing = {option[2:] for command in COMMANDS.values() for option in option_names(command)}
    assert set(_OTHER_NAMES) - existing == {"num-workers"}  # which is hidden


@pytest.mark.parametrize(
    ("arguments", "suggestion"),
    [
        ("train x --lr 1e-3", "--learning-rate?"),
        ("train x --lr=1e-3", "--learning-rate?"),
        ("train x --learningrate 1e-3", "--learning-rate?"),
        ("train x --max_iters 5", "--max-steps?"),
        ("train x --num_train_epochs 5", "--max-steps?"),
        ("train x --max-step 5", "--max-steps"),
        ("train x --batch-size 8", "--micro-batch-size?"),
        ("train x --n_layers 8", "--n-layer?"),
        ("train x --out_dir y", "--output-dir?"),
        ("train x --output y", "--output-dir?"),
        ("train x --grad_clip 1", "--max-grad-norm?"),
        ("train x --eval_interval 1", "--eval-every?"),
        ("train x --dtype bf16", "--mixed-precision?"),
        ("train x --per_device_train_batch_size 3", "--micro-batch-size?"),
        ("train x --lr_scheduler_type linear", "--lr-schedule?"),
        ("train x --resume_from_checkpoint y", "--resume?"),
        ("train x --Seed 3", "--seed"),
        ("train x --num-worker 3", "--n"),  # not --num-workers, which is hidden
        ("train x --sample-prompts a", "--sample-prompt?"),
        ("train x --sample-interval 5", "--sample-every?"),
        ("sample x --temp 1", "--temperature?"),
        ("sample x --max-tokens 1", "--max-new-tokens?"),
        ("sample --prmpt=x", "--prompt?"),
        ("eval x --data y", "--text?"),
        ("prepare x --output-dir y", "--output?"),
        ("doctor --out y", "--output-dir?"),
        ("train x --quux", "homebrew train --help"),
        ("trian x", "train?"),
        ("Train x", "train?"),
        ("smaple", "sample?"),
        ("evaluate x", "eval?"),
        ("finetune x", ", ".join(COMMANDS)),
    ],
)
def test_an_unknown_name_is_answered_by_the_one_that_was_meant(arguments, suggestion, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments.split())
    out, err = capsys.readouterr()
    assert (caught.value.code, out, err.count("\n")) == (2, "", 1)
    assert suggestion in err
    assert "--num-workers" not in err
    assert "--min-lr-ratio" not in err


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--help"],
        ["train", "--lr", "--help"],
        ["train", "x", "--max_steps=3", "--lora-targets", "c_attn", "-1"],
        ["sample", "x", "--prompt=--lr", "--prompt", "-- dashes"],
    ],
)
def test_known_names_pass(arguments):
    assert explain_unknown_name(arguments, COMMANDS) is None


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("max_steps=0: must be 1.", "--max-steps 0: must be 1."),
        ("seed=-1: wrong.", "--seed -1: wrong."),
        ("output_dir='runs/r' holds a run.", "--output-dir 'runs/r' holds a run."),
        ("Needs global_batch_tokens.", "Needs --global-batch-tokens."),
        ("Use a larger block_size, or less.", "Use a larger --block-size, or less."),
        ("Resume it with train(resume=True), or not.", "Resume it with --resume, or not."),
        ("Start over with train(overwrite=True).", "Start over with --overwrite."),
        ("Use resume=True.", "Use --resume."),
        (
            "Call train(resume=True, accept_changes=('seed', 'global_batch_size')).",
            "Call --resume --accept-changes seed --accept-changes global_batch_size.",
        ),
        ("train(resume=True, accept_changes=('seed',))", "--resume --accept-changes seed"),
        ('train(resume=True, accept_changes=["seed"])', "--resume --accept-changes seed"),
        ("accept_changes=['x']: must be known.", "--accept-changes ['x']: must be known."),
        # Python code stays.
        (
            "Open it with TokenDataset.from_file('a.bin', …, tokenizer='gpt2'), or set tokenizer='gpt2'.",
            "Open it with TokenDataset.from_file('a.bin', …, tokenizer='gpt2'), or set --tokenizer 'gpt2'.",
        ),
        ("The batch (micro_batch_size=4) is too large.", "The batch (--micro-batch-size 4) is too large."),
        # None, which the command line does not take.
        ("eval_every=0: must be at least 1, or None.", "--eval-every 0: must be at least 1."),
        ("seed=0: must be 1, or None; betas=1: bad.", "--seed 0: must be 1; --betas 1: bad."),
        ("Use a number of at most 1, or None to keep all tokens.", "Use a number of at most 1."),
        # Names in paths, in other words and of other things stay.
        ("/data/seed=1/max_steps/x.txt cannot be read", "/data/seed=1/max_steps/x.txt cannot be read"),
        ("'max_steps' in my_max_steps and max_steps.txt", "'max_steps' in my_max_steps and max_steps.txt"),
        ("The model, its seed and the tokenizer differ.", "The model, its seed and the tokenizer differ."),
        ("global_batch_size: was 8, is 4", "global_batch_size: was 8, is 4"),
    ],
)
def test_errors_speak_of_options(message, expected):
    assert in_terms_of_options(message, Train) == expected


def test_a_warning_names_the_options(text, tmp_path, invoke, tiny):
    options = ["--output-dir", tmp_path / "run", "--max-steps", 8, "--lr-schedule", "wsd", "--tokenizer", "bytes"]
    with pytest.warns(UserWarning, match="does not reach its peak") as caught:
        invoke("train", text, *options, *tiny)
    shown = warnings.formatwarning(caught[0].message, UserWarning, __file__, 1)
    assert shown.startswith("homebrew: ")
    assert all(option in shown for option in ("--lr-schedule 'wsd'", "--max-steps 8", "Set --warmup-steps"))
    assert not re.search(r"\w=", shown)
