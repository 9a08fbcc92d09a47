import math

import numpy as np
import pytest
from accelerate import Accelerator
from accelerate.utils import set_seed

from homebrew.errors import ConfigError
from homebrew.training.trainer_config import TrainerConfig


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_steps", None),
        ("max_steps", "5"),
        ("max_steps", 0),
        ("log_every", 2.0),
        ("micro_batch_size", "Auto"),
        ("learning_rate", "3e-4"),
        ("learning_rate", -1.0),
        ("learning_rate", math.inf),
        ("learning_rate", True),
        ("learning_rate", np.float32(3e-4)),  # not JSON-serializable
        ("weight_decay", math.nan),
        ("max_grad_norm", math.nan),
        ("min_lr_ratio", "0.1"),
        ("betas", 0.9),
        ("betas", (0.9,)),
        ("betas", (0.9, 1.0)),
        ("betas", ("0.9", 0.95)),
        ("loss_spike_zscore", math.inf),
        ("seed", 2**32),
        ("seed", 1.5),
        ("collective_timeout_seconds", math.inf),
        ("loader_timeout_seconds", math.nan),
        ("activation_checkpointing", "no"),
        ("mixed_precision", ["bf16"]),
        ("compile", None),
        ("compile", 1),
        ("compile", np.array(["auto", "no"])),
        ("mixed_precision", np.array(["bf16", "no"])),
        ("non_finite", np.array(["skip", "raise"])),
        ("micro_batch_size", np.array([2, 4])),
        ("micro_batch_size", 10**12),
        ("global_batch_tokens", 10**12),
        ("betas", np.array([0.9, 0.95])),
        ("max_grad_norm", 10**400),
        ("weight_decay", 10**400),
        ("learning_rate", 10**400),
    ],
)
def test_one_error_lists_all_invalid_settings(name, value):
    with pytest.raises(ConfigError) as error:
        TrainerConfig(**{"output_dir": "x", "max_steps": 1, "keep_last": 0, name: value})
    assert f"\n  {name}={value!r}: must be " in str(error.value)
    assert "\n  keep_last=0: must be " in str(error.value)


@pytest.mark.parametrize(
    ("settings", "needed"),
    [
        ({"decay_fraction": 0.5}, "lr_schedule='wsd'"),  # also the value that "wsd" has by default
        ({"decay_fraction": 0.2, "lr_schedule": "linear"}, "lr_schedule='wsd'"),
        ({"decay_fraction": 0, "lr_schedule": "cosine"}, "lr_schedule='wsd'"),
        ({"muon_momentum": 0.95}, "optimizer='muon'"),
        ({"muon_momentum": 0.0, "optimizer": "adamw"}, "optimizer='muon'"),
    ],
)
def test_a_setting_that_would_not_be_used_is_an_error(settings, needed):
    name, value = next(iter(settings.items()))
    with pytest.raises(ConfigError, match=f"{name}={value}: needs {needed}"):
        TrainerConfig(output_dir="x", max_steps=1, **settings)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("learning_rate", 1),
        ("max_grad_norm", math.inf),  # disables clipping
        ("max_grad_norm", None),
        ("betas", [0, 0.95]),
        ("seed", 4_000_000_000),
        ("warmup_steps", 0),
    ],
)
def test_unusual_valid_settings_are_accepted(name, value):
    assert getattr(TrainerConfig(**{"output_dir": "x", "max_steps": 1, name: value}), name) == value


def test_the_largest_seed_leaves_room_for_the_rank_and_the_step():
    Accelerator()
    set_seed(4_000_000_000 + 10**8, device_specific=True)


@pytest.mark.parametrize(("keep_every", "save_every"), [(100, None), (100, 500), (750, 500), (1, 2)])
def test_a_step_that_is_not_saved_cannot_be_kept(keep_every, save_every):
    with pytest.raises(ConfigError, match=f"keep_every={keep_every}: .*save_every={save_every}"):
        TrainerConfig(output_dir="x", max_steps=1000, keep_every=keep_every, save_every=save_every)
    assert TrainerConfig(output_dir="x", max_steps=1, keep_every=1000).keep_every == 1000


@pytest.mark.parametrize("name", ["ema_decay", "keep_every", "eval_every", "max_steps", "global_batch_tokens"])
def test_the_effective_value_of_a_setting_without_other_default_is_its_own(name):
    config = TrainerConfig(output_dir="x", max_steps=7)
    assert config.effective(name) == getattr(config, name)
