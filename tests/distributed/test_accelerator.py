import pytest
import torch
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker
from accelerate.utils import LoggerType

from homebrew.distributed.accelerator import build_accelerator, check_accelerator
from homebrew.distributed.precision import describe_precision
from homebrew.errors import ConfigError, LaunchError


@pytest.fixture(params=[False, True], ids=["no_gpu", "gpu_present"])
def on_cpu(request, monkeypatch):
    """A run on the CPU, either without a GPU or with `ACCELERATE_USE_CPU`."""
    if request.param:
        monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    for module in (torch.accelerator, torch.cuda):
        monkeypatch.setattr(module, "is_available", lambda: request.param)


@pytest.mark.parametrize(("native", "expected"), [(True, "bf16"), (False, "no")])
def test_auto_precision_is_bf16_on_a_cpu_with_native_bf16(tmp_path, monkeypatch, on_cpu, native, expected):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: not native)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: native)
    assert build_accelerator(output_dir=tmp_path).mixed_precision == expected


@pytest.mark.parametrize(
    ("launcher", "requested", "native", "expected", "reason"),
    [
        ("no", "auto", True, "bf16", "bfloat16 (the default on this device)"),  # "no" is the launcher's default
        ("no", "auto", False, "no", "float32 (the device has no native bfloat16)"),
        ("no", "no", True, "no", "float32 (mixed_precision='no')"),
        ("bf16", "auto", False, "bf16", "bfloat16 (chosen by the launcher)"),
        ("bf16", "no", True, "no", "float32 (mixed_precision='no')"),
    ],
)
def test_precision_under_accelerate_launch(tmp_path, monkeypatch, launcher, requested, native, expected, reason):
    monkeypatch.setattr("homebrew.distributed.precision.has_native_bf16", lambda: native)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launcher)
    accelerator = build_accelerator(output_dir=tmp_path, mixed_precision=requested)
    assert accelerator.mixed_precision == expected
    assert describe_precision(accelerator, requested) == reason


def test_precision_of_a_given_accelerator(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    assert describe_precision(Accelerator(cpu=True), "auto") == "float32 (chosen by the given Accelerator)"


def test_second_accelerator_with_another_precision_is_an_error(tmp_path):
    build_accelerator(output_dir=tmp_path, mixed_precision="bf16")
    assert build_accelerator(output_dir=tmp_path, mixed_precision="bf16")
    with pytest.raises(ConfigError, match=r"mixed_precision='no' differs .* 'bf16'"):
        build_accelerator(output_dir=tmp_path, mixed_precision="no")


def test_fp16_on_cpu_is_an_error(tmp_path, on_cpu):
    with pytest.raises(LaunchError, match="'fp16' is not supported on cpu"):
        build_accelerator(output_dir=tmp_path, mixed_precision="fp16")
    build_accelerator(output_dir=tmp_path, mixed_precision="no")  # the error left no Accelerator with fp16 behind


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mixed_precision": "bf16"}, r"has mixed_precision='no'.*Accelerator\(mixed_precision='bf16'\)"),
        ({"log_with": "tensorboard"}, r"Accelerator\(log_with='tensorboard', project_dir=…\)"),
    ],
)
def test_settings_that_contradict_a_given_accelerator(settings, message):
    with pytest.raises(ConfigError, match=message):
        check_accelerator(Accelerator(cpu=True), **settings)


@pytest.mark.parametrize("precision", ["auto", "no"])
def test_a_given_accelerator_is_returned(precision):
    accelerator = Accelerator(cpu=True)
    assert check_accelerator(accelerator, mixed_precision=precision) is accelerator


def test_world_size_differs_from_the_launcher(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(LaunchError, match="started 2 processes, but Accelerate sees 1"):
        build_accelerator(output_dir=tmp_path)


@pytest.fixture
def only_tensorboard(monkeypatch):
    monkeypatch.setattr("accelerate.tracking._available_trackers", [LoggerType.TENSORBOARD])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("wandb", r"log_with='wandb': the tracker is not installed. Run `pip install wandb`. .*: tensorboard\."),
        ("tensorbord", r"log_with='tensorbord': Accelerate has no such tracker. Choose one of .*: tensorboard\."),
        (["tensorboard"], r"log_with=\['tensorboard'\]: must be the name of one tracker, or 'all'"),
    ],
)
def test_unavailable_tracker(tmp_path, only_tensorboard, name, message):
    with pytest.raises(ConfigError, match=message):
        build_accelerator(output_dir=tmp_path, log_with=name)


def test_all_trackers_without_any_installed(tmp_path, monkeypatch):
    monkeypatch.setattr("accelerate.tracking._available_trackers", [])
    with pytest.raises(ConfigError, match=r"log_with='all': no tracker is installed.* Available: none"):
        build_accelerator(output_dir=tmp_path, log_with="all")


@pytest.mark.parametrize("name", ["tensorboard", "all", "custom"])
def test_available_tracker(tmp_path, monkeypatch, only_tensorboard, name):
    class Custom(GeneralTracker):
        name, requires_logging_directory = "custom", False

    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "custom", Custom)
    accelerator = build_accelerator(output_dir=tmp_path, log_with=name)
    assert list(map(str, accelerator.log_with)) == ["custom" if name == "custom" else "tensorboard"]
