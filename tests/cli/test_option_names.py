import re

import pytest

from homebrew.cli.main import COMMANDS, main
from homebrew.cli.option_names import _OTHER_NAMES, explain_unknown_name, option_names


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
