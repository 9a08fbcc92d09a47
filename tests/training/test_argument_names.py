"""Names of other programs as keyword arguments are errors that name homebrew's."""

import inspect
import pickle
import re
from dataclasses import fields, replace
from pathlib import Path

import pytest
from tiny_runs import ONE_LAYER, make_trainer, token_dataset

from homebrew import ArgumentError, ConfigError, Trainer, TrainerConfig
from homebrew.training.argument_names import OTHER_NAMES

CONFIG = [
    # transformers
    ({"lr_scheduler_type": "linear"}, "lr_schedule"),
    ({"per_device_train_batch_size": 8}, "micro_batch_size"),
    ({"gradient_accumulation_steps": 4}, "global_batch_tokens"),
    ({"num_train_epochs": 3}, "max_steps"),
    ({"bf16": True}, "mixed_precision"),
    ({"fp16": True}, "mixed_precision"),
    ({"optim": "adamw_torch"}, "optimizer"),
    ({"warmup_ratio": 0.1}, "warmup_steps"),
    ({"logging_steps": 5}, "log_every"),
    ({"eval_strategy": "steps"}, "eval_every"),
    ({"save_total_limit": 2}, "keep_last"),
    ({"adam_beta2": 0.95}, "betas"),
    ({"report_to": "wandb"}, "log_with"),
    ({"gradient_checkpointing": True}, "activation_checkpointing"),
    ({"overwrite_output_dir": True}, "overwrite=True"),
    ({"deepspeed": "ds.json"}, "FSDP2"),
    ({"fsdp": "full_shard"}, "FSDP2"),
    ({"load_best_model_at_end": True}, "load_model"),
    ({"push_to_hub": True}, r"model\.push_to_hub"),
    ({"run_name": "first"}, "output_dir"),
    # nanoGPT
    ({"max_iters": 100}, "max_steps"),
    ({"batch_size": 12}, "micro_batch_size"),
    ({"block_size": 128}, "train_dataset"),
    ({"n_layer": 12}, "GPTConfig"),
    ({"dtype": "bfloat16"}, "mixed_precision"),
    ({"wandb_log": True}, "log_with"),
    ({"always_save_checkpoint": True}, "save_every"),
    ({"decay_lr": True}, "lr_schedule"),
    ({"lr_decay_iters": 100}, "max_steps"),
    ({"min_lr": 1e-5}, "min_lr_ratio"),
    ({"beta1": 0.9}, "betas"),
    ({"grad_clip": 1.0}, "max_grad_norm"),
    ({"eval_iters": 20}, "eval_batches"),
    ({"init_from": "gpt2"}, "GPT.from_pretrained"),
    ({"device": "cuda"}, "Accelerate"),
    ({"bias": False}, "biases"),
    ({"wandb_project": "x"}, "WANDB_PROJECT"),
    # spelling
    ({"learningrate": 1e-3}, "learning_rate"),
    ({"Seed": 1}, "seed"),
    ({"quux": 1}, "weight_decay"),  # the list of all
]


@pytest.mark.parametrize(("settings", "ours"), CONFIG, ids=[next(iter(settings)) for settings, _ in CONFIG])
def test_an_unknown_setting_is_answered_by_the_one_that_was_meant(settings, ours):
    name = next(iter(settings))
    with pytest.raises(ArgumentError, match=rf"TrainerConfig has no argument '{name}'.*{ours}") as caught:
        TrainerConfig(output_dir="x", max_steps=1, **settings)
    assert isinstance(caught.value, TypeError)
    assert isinstance(caught.value, ConfigError)


@pytest.mark.parametrize(
    ("page", "heading", "target"),
    [
        ("from-nanogpt.md", "nanoGPT", TrainerConfig),
        ("from-hf-trainer.md", "`TrainingArguments`", TrainerConfig),
        ("from-hf-trainer.md", "`Trainer`", Trainer),
    ],
)
def test_each_argument_in_the_tables_for_users_of_other_programs_has_an_answer(page, heading, target):
    text = (Path(__file__).parents[2] / "docs" / page).read_text()
    (table,) = re.findall(rf"^\| {heading} \|.*\n\|---.*\n((?:\|.*\n)+)", text, re.M)
    first_column = " ".join(row.split("|")[1] for row in table.splitlines())
    names = set(re.findall(r"`([a-z]\w+)(?:=[^`]*)?`", first_column)) - inspect.signature(target).parameters.keys()
    assert len(names) >= 5
    for name in names:
        with pytest.raises(ArgumentError) as caught:
            target(**{name: None})
        assert "The arguments are" not in str(caught.value)


def test_one_error_names_all_unknown_settings():
    with pytest.raises(ArgumentError, match=r"'bf16'.*mixed_precision.*'max_iters'.*max_steps"):
        TrainerConfig(output_dir="x", bf16=True, max_iters=5)


TRAINER = [
    ({"args": None}, "config"),
    ({"data_collator": None}, "pads and batches"),
    ({"processing_class": None}, "tokenizer of train_dataset"),
    ({"optimizers": (None, None)}, "optimizer or schedule"),
    ({"compute_metrics": None}, "callbacks"),
    ({"val_dataset": None}, "eval_dataset"),
    ({"train_datasets": None}, "train_dataset"),
    ({"peft_config": None}, "LoRAConfig"),
    ({"max_steps": 1}, "setting of TrainerConfig"),
]


@pytest.mark.parametrize(("arguments", "ours"), TRAINER, ids=[next(iter(arguments)) for arguments, _ in TRAINER])
def test_an_unknown_argument_of_the_trainer_is_answered_by_the_one_that_was_meant(tmp_path, arguments, ours):
    config = TrainerConfig(output_dir=tmp_path, max_steps=1)
    with pytest.raises(ArgumentError, match=f"Trainer has no argument '{next(iter(arguments))}'.*{ours}"):
        Trainer(ONE_LAYER, token_dataset(), config=config, **arguments)
    with pytest.raises(ArgumentError, match=next(iter(arguments))):
        Trainer(model=ONE_LAYER, **arguments)


def test_an_unknown_argument_of_train_is_answered_by_the_one_that_was_meant(tmp_path):
    with pytest.raises(ArgumentError, match=r"Trainer.train has no argument 'resume_from_checkpoint'.*resume=True"):
        make_trainer(tmp_path).train(resume_from_checkpoint=True)


def test_signatures_and_copies_are_those_of_a_dataclass():
    assert list(inspect.signature(TrainerConfig).parameters) == [field.name for field in fields(TrainerConfig)]
    assert "train_dataset" in inspect.signature(Trainer).parameters
    config = TrainerConfig(output_dir="x", max_steps=1)
    assert pickle.loads(pickle.dumps(config)) == config
    assert replace(config, seed=3).seed == 3
    with pytest.raises(TypeError, match="max_steps"):
        TrainerConfig(output_dir="x")


def test_suggested_settings_exist():
    assert OTHER_NAMES.keys() <= {field.name for field in fields(TrainerConfig)}
