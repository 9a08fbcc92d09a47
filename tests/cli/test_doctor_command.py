import re
import tomllib
from pathlib import Path

import pytest
import torch

from homebrew.cli.doctor_command import _EXTRAS, check_attention, check_compilation, run_checks


def test_doctor_shows_what_a_run_would_use(invoke, monkeypatch, tmp_path):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setenv("COLUMNS", "200")
    output = invoke("doctor", "--output-dir", tmp_path)
    for expected in (torch.__version__, "bfloat16 (chosen by the launcher)", "cpu", "GPT-2's vocabulary", "available"):
        assert expected in output


def test_doctor_prints_how_to_install_missing_extras(tmp_path, monkeypatch, invoke):
    monkeypatch.setattr("homebrew.cli.doctor_command.installed_version", lambda _: None)
    monkeypatch.setenv("COLUMNS", "240")
    assert "pip install -e '.[fast,offline,plot,prepare,tokenizers]'" in invoke("doctor", "--output-dir", tmp_path)


def test_doctor_knows_all_extras_and_says_that_they_are_installed(tmp_path, monkeypatch):
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    extras = {
        name: [re.match(r"[\w-]+", requirement)[0] for requirement in requirements]
        for name, requirements in project["optional-dependencies"].items()
        if name not in ("docs", "hopper", "test")
    }
    assert extras == _EXTRAS
    monkeypatch.setattr("homebrew.cli.doctor_command.installed_version", lambda _: "1.0")
    finding = next(finding for finding in run_checks(tmp_path) if finding.topic == "extras")
    assert (finding.value, finding.fix) == (", ".join(extras), "")


def test_doctor_fails_if_a_run_cannot_start(tmp_path, monkeypatch, capsys):
    from homebrew.cli.main import main

    monkeypatch.setenv("WORLD_SIZE", "2")
    launch = next(finding for finding in run_checks(tmp_path / "runs") if finding.topic == "launch")
    assert "2 processes" in launch.fix
    assert main(["doctor", "--output-dir", str(tmp_path)]) == 1
    assert "cannot start" in capsys.readouterr().err


def test_an_unwritable_output_dir_is_found(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "runs"):
        assert "not writable" in list(run_checks(path))[-1].value
    assert list(run_checks(tmp_path / ("a" * 300)))[-1].topic == "Tiny Shakespeare"


@pytest.mark.parametrize(
    ("has_triton", "has_compiler", "value", "fix"),
    [
        (True, True, "on", ""),
        (False, True, "fails: no triton", "--compile no"),
        (True, False, "fails, also with --compile no", "gcc"),
    ],
)
def test_requirements_of_compilation_on_a_gpu(monkeypatch, has_triton, has_compiler, value, fix):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object() if has_triton else None)
    monkeypatch.setattr("shutil.which", lambda name: "/usr/bin/cc" if has_compiler else None)
    finding = check_compilation(torch.device("cuda"))
    assert finding.value.startswith(value)
    assert fix in finding.fix
    assert bool(fix) == bool(finding.fix)


@pytest.mark.parametrize(
    ("device", "capability", "version", "works", "value", "fix"),
    [
        ("cpu", None, None, None, None, None),
        ("cuda", (8, 0), None, None, None, None),
        ("cuda", (9, 0), None, None, "not installed", "hopper"),
        ("cuda", (9, 0), "1.2", True, "1.2", ""),
        ("cuda", (9, 0), "1.2", False, "1.2 does not work with cuDNN 91900", "hopper"),
    ],
)
def test_attention_is_checked_on_hopper_gpus(monkeypatch, device, capability, version, works, value, fix):
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda _: capability)
    monkeypatch.setattr("torch.backends.cudnn.version", lambda: 91900)
    monkeypatch.setattr("homebrew.cli.doctor_command.installed_version", lambda _: version)
    monkeypatch.setattr("homebrew.model.ops.cudnn_attention.is_available", lambda _: works)
    findings = list(check_attention(torch.device(device)))
    assert len(findings) == (value is not None)
    for finding in findings:
        assert finding.value.endswith(value)
        assert fix in finding.fix
        assert bool(fix) == bool(finding.fix)
