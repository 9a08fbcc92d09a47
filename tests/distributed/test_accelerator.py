"""The Accelerator of a run."""

import pytest
import torch
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker
from accelerate.utils import LoggerType

from homebrew.distributed.accelerator import build_accelerator, check_accelerator
from homebrew.errors import ConfigError


@pytest.mark.parametrize("beside_a_gpu", [False, True])
@pytest.mark.parametrize(("has_instructions", "expected"), [(True, "bf16"), (False, "no")])
def test_a_cpu_that_multiplies_bf16_does(tmp_path, monkeypatch, has_instructions, expected, beside_a_gpu):
    if beside_a_gpu:
        monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    for kind in (torch.accelerator, torch.cuda):
        monkeypatch.setattr(kind, "is_available", lambda: beside_a_gpu)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: not has_instructions)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has_instructions)
    assert build_accelerator(output_dir=tmp_path).mixed_precision == expected


def test_the_launcher_s_precision_comes_first(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    assert build_accelerator(output_dir=tmp_path).mixed_precision == "no"


def test_one_precision_a_process(tmp_path):
    build_accelerator(output_dir=tmp_path, mixed_precision="bf16")
    assert build_accelerator(output_dir=tmp_path, mixed_precision="bf16")
    with pytest.raises(ConfigError, match="mixed_precision='no' is not what an earlier"):
        build_accelerator(output_dir=tmp_path, mixed_precision="no")


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"mixed_precision": "bf16"}, r"has mixed_precision='no'.*Accelerator\(mixed_precision='bf16'\)"),
        ({"log_with": "tensorboard"}, r"Accelerator\(log_with='tensorboard', project_dir=…\)"),
    ],
)
def test_an_accelerator_of_your_own_is_given_its_settings_itself(tmp_path, settings, told):
    with pytest.raises(ConfigError, match=told):
        check_accelerator(Accelerator(cpu=True), **settings)


@pytest.mark.parametrize("wanted", ["auto", "no"])
def test_an_accelerator_of_your_own_is_taken_as_it_is(tmp_path, wanted):
    own = Accelerator(cpu=True)
    assert check_accelerator(own, mixed_precision=wanted) is own


@pytest.fixture
def only_tensorboard(monkeypatch):
    monkeypatch.setattr("accelerate.tracking._available_trackers", [LoggerType.TENSORBOARD])


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("wandb", r"log_with='wandb': it is not installed. Run `pip install wandb`. .*: tensorboard\."),
        ("tensorbord", r"log_with='tensorbord': Accelerate knows no such tracker. Choose one of .*: tensorboard\."),
        (["tensorboard"], r"log_with=\['tensorboard'\]: Accelerate knows no such tracker"),
    ],
)
def test_a_tracker_that_is_not_there(tmp_path, only_tensorboard, name, told):
    with pytest.raises(ConfigError, match=told):
        build_accelerator(output_dir=tmp_path, log_with=name)


def test_all_trackers_where_there_are_none(tmp_path, monkeypatch):
    monkeypatch.setattr("accelerate.tracking._available_trackers", [])
    with pytest.raises(ConfigError, match=r"log_with='all': none is installed.* Ready for use: none"):
        build_accelerator(output_dir=tmp_path, log_with="all")


@pytest.mark.parametrize("name", ["tensorboard", "all", "mine"])
def test_a_tracker_that_is_there(tmp_path, monkeypatch, only_tensorboard, name):
    class Mine(GeneralTracker):
        name, requires_logging_directory = "mine", False

    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "mine", Mine)
    accelerator = build_accelerator(output_dir=tmp_path, log_with=name)
    assert list(map(str, accelerator.log_with)) == ["mine" if name == "mine" else "tensorboard"]
