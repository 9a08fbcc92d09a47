"""Every field of the configs has a test that fails if the field is ignored."""

from dataclasses import fields
from pathlib import Path

import pytest

from homebrew import GPTConfig, TrainerConfig

TESTS = Path(__file__).parent
WORKER = TESTS / "support" / "ignore_field.py"
REFERENCE_LOOP = "training/test_reference_loop.py::test_trainer_equals_the_reference_loop"
SETTINGS_REACH = "training/test_setup.py::test_settings_reach_the_loader_and_the_checkpoint_manager"
LAUNCH_SETTINGS = "training/test_setup.py::test_the_launch_settings_of_the_config_reach_the_accelerator"
NEARLY_ALL = None
"""No single test: without this field, hardly any run of the tests works."""
TEST_OF_FIELD = {
    GPTConfig: {
        "block_size": NEARLY_ALL,
        "vocab_size": NEARLY_ALL,
        "n_layer": NEARLY_ALL,
        "n_head": NEARLY_ALL,
        "n_embd": NEARLY_ALL,
        "dropout": "model/test_dropout.py::test_each_place_drops_a_fraction_and_scales_the_rest",
        "eos_token_id": "hub/test_export.py::test_an_export_with_a_tokenizer_keeps_the_models_own_end_of_text",
    },
    TrainerConfig: {
        "output_dir": NEARLY_ALL,
        "max_steps": NEARLY_ALL,
        "global_batch_tokens": f"{REFERENCE_LOOP}[global_batch_tokens]",
        "micro_batch_size": "training/test_trainer_steps.py::test_micro_batch_size_does_not_change_the_step",
        "optimizer": f"{REFERENCE_LOOP}[muon]",
        "learning_rate": f"{REFERENCE_LOOP}[learning_rate]",
        "lr_schedule": f"{REFERENCE_LOOP}[linear]",
        "decay_fraction": f"{REFERENCE_LOOP}[decay_fraction]",
        "warmup_steps": f"{REFERENCE_LOOP}[warmup_steps]",
        "min_lr_ratio": f"{REFERENCE_LOOP}[min_lr_ratio]",
        "betas": f"{REFERENCE_LOOP}[beta1]",
        "ema_decay": "training/test_trainer_optimizers.py"
        "::test_the_average_of_the_weights_is_evaluated_and_saved[adamw]",
        "muon_momentum": f"{REFERENCE_LOOP}[muon_momentum]",
        "weight_decay": f"{REFERENCE_LOOP}[weight_decay]",
        "max_grad_norm": f"{REFERENCE_LOOP}[max_grad_norm]",
        "non_finite": "training/test_non_finite.py::test_a_non_finite_step_changes_no_weight_and_no_optimizer_state",
        "non_finite_limit": "training/test_non_finite.py"
        "::test_a_run_ended_by_non_finite_steps_cannot_be_saved_but_trained_again[skip]",
        "loss_spike_zscore": "training/test_non_finite.py::test_a_loss_spike_is_skipped_if_configured",
        "seed": f"{REFERENCE_LOOP}[seed]",
        "mixed_precision": LAUNCH_SETTINGS,
        "compile": "training/test_setup.py::test_compile_decides_whether_the_model_is_compiled",
        "activation_checkpointing": "training/test_trainer_steps.py"
        "::test_activation_checkpointing_runs_each_block_twice_and_changes_nothing_else",
        "collective_timeout_seconds": LAUNCH_SETTINGS,
        "eval_every": "training/test_trainer_evaluation.py::test_evaluates_every_eval_every_steps_and_at_the_end",
        "eval_batches": "training/test_trainer_evaluation.py::test_eval_batches_limits_the_evaluated_micro_batches",
        "log_every": f"{REFERENCE_LOOP}[seed]",
        "log_with": "callbacks/test_trackers.py::test_tensorboard_has_metrics_settings_and_samples",
        "save_every": "training/test_trainer_saving.py"
        "::test_checkpoints_are_saved_every_save_every_steps_and_at_the_end",
        "keep_last": "training/test_trainer_saving.py::test_the_newest_keep_last_checkpoints_are_kept",
        "keep_every": "training/test_trainer_evaluation.py"
        "::test_a_checkpoint_is_scored_only_by_an_evaluation_of_its_own_step",
        "gather_limit_bytes": f"{SETTINGS_REACH}[gather_limit_bytes]",
        "num_workers": f"{SETTINGS_REACH}[num_workers]",
        "loader_timeout_seconds": f"{SETTINGS_REACH}[loader_timeout_seconds]",
    },
}


@pytest.mark.parametrize("config", TEST_OF_FIELD, ids=lambda config: config.__name__)
def test_every_field_is_listed(config):
    assert TEST_OF_FIELD[config].keys() == {field.name for field in fields(config)}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "field", "test"),
    [
        (config.__name__, field, test)
        for config, tests in TEST_OF_FIELD.items()
        for field, test in tests.items()
        if test is not NEARLY_ALL
    ],
    ids=lambda value: value.partition("::")[0],
)
def test_the_listed_test_fails_if_the_field_is_ignored(forks, tmp_path, config, field, test):
    job = {"config": config, "field": field, "test": str(TESTS / test), "folder": str(tmp_path)}
    assert forks.run(job) == [0], forks.log.read_text()
