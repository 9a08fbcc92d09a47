"""The Accelerator of a run."""

import pytest
import torch
from accelerate import Accelerator

from homebrew import TrainerConfig
from homebrew.errors import ConfigError
from homebrew.training.launch import adopt_accelerator, build_accelerator


@pytest.mark.skipif(torch.cuda.is_available() or torch.backends.mps.is_available(), reason="is about CPUs")
@pytest.mark.parametrize(("has_instructions", "expected"), [(True, "bf16"), (False, "no")])
def test_a_cpu_that_multiplies_bf16_does(tmp_path, monkeypatch, has_instructions, expected):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has_instructions)
    assert build_accelerator(TrainerConfig(output_dir=tmp_path, max_steps=1)).mixed_precision == expected


def test_the_launcher_s_precision_comes_first(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    assert build_accelerator(TrainerConfig(output_dir=tmp_path, max_steps=1)).mixed_precision == "no"


def test_one_precision_a_process(tmp_path):
    build_accelerator(TrainerConfig(output_dir=tmp_path, max_steps=1, mixed_precision="bf16"))
    assert build_accelerator(TrainerConfig(output_dir=tmp_path, max_steps=1, mixed_precision="bf16"))
    with pytest.raises(ConfigError, match="mixed_precision='no' is not what an earlier"):
        build_accelerator(TrainerConfig(output_dir=tmp_path, max_steps=1, mixed_precision="no"))


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"mixed_precision": "bf16"}, r"has mixed_precision='no'.*Accelerator\(mixed_precision='bf16'\)"),
        ({"log_with": "tensorboard"}, r"Accelerator\(log_with='tensorboard', project_dir=…\)"),
    ],
)
def test_an_accelerator_of_your_own_is_given_its_settings_itself(tmp_path, settings, told):
    with pytest.raises(ConfigError, match=told):
        adopt_accelerator(Accelerator(cpu=True), TrainerConfig(output_dir=tmp_path, max_steps=1, **settings))


@pytest.mark.parametrize("wanted", ["auto", "no"])
def test_an_accelerator_of_your_own_is_taken_as_it_is(tmp_path, wanted):
    own = Accelerator(cpu=True)
    assert adopt_accelerator(own, TrainerConfig(output_dir=tmp_path, max_steps=1, mixed_precision=wanted)) is own
