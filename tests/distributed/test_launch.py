"""`accelerate launch` sets environment variables; which of them did a user choose?"""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import psutil
import pytest
import torch
from accelerate import Accelerator

from homebrew.cores import num_available_cores
from homebrew.distributed.accelerator import build_accelerator
from homebrew.distributed.launch import set_num_threads
from homebrew.errors import LaunchError

REPORT = """
import json, torch
from homebrew.distributed.accelerator import build_accelerator
print(json.dumps([build_accelerator().mixed_precision, torch.get_num_threads()]))
"""


@pytest.fixture
def launched(monkeypatch):
    """Return a function that makes this process look like the child of an `accelerate launch`."""

    def launch(environment, *arguments, **chosen):
        parent = SimpleNamespace(environ=lambda: chosen, cmdline=lambda: ["accelerate", "launch", *arguments])
        monkeypatch.setattr(psutil.Process, "parent", lambda _: parent)
        for name, value in ({"ACCELERATE_MIXED_PRECISION": "no", "OMP_NUM_THREADS": "1"} | environment).items():
            monkeypatch.setenv(name, value)

    return launch


RENDEZVOUS = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize("exported", [{}, {"MASTER_ADDR": "node-7"}])
def test_launcher_started_one_of_several_processes(tmp_path, launched, exported):
    launched(RENDEZVOUS, **exported)
    with pytest.raises(LaunchError, match="asked for several processes but started one"):
        build_accelerator(output_dir=tmp_path)


@pytest.mark.parametrize("exported", [{"MASTER_ADDR": "node-7"}, RENDEZVOUS, {"MASTER_PORT": "1234"}])
def test_an_exported_rendezvous_address_is_not_a_request_for_several_processes(tmp_path, launched, exported):
    launched(exported, **exported)
    assert build_accelerator(output_dir=tmp_path).num_processes == 1


@pytest.mark.parametrize(
    ("environment", "arguments", "chosen", "shared"),
    [
        ({}, [], {}, True),
        ({}, [], {"OMP_NUM_THREADS": "1"}, False),
        ({}, ["--num_cpu_threads_per_process", "1"], {}, False),
        ({"OMP_NUM_THREADS": "3"}, [], {"OMP_NUM_THREADS": "3"}, False),
        ({"LOCAL_WORLD_SIZE": "2"}, [], {}, True),
    ],
)
def test_chosen_numbers_of_threads_are_kept(monkeypatch, launched, environment, arguments, chosen, shared):
    launched(environment, *arguments, **chosen)
    monkeypatch.setattr("homebrew.distributed.launch.num_available_cores", lambda: 6)
    set_num_threads(Accelerator(cpu=True))
    assert torch.get_num_threads() == (6 // int(environment.get("LOCAL_WORLD_SIZE", "1")) if shared else 1)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs CPU affinity")
def test_available_cores_follow_the_affinity():
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        assert num_available_cores() == 1
    finally:
        os.sched_setaffinity(0, before)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("chosen", "num_threads"), [({}, num_available_cores()), ({"OMP_NUM_THREADS": "1"}, 1)], ids=["default", "one"]
)
def test_a_real_launch_runs_as_python_does(tmp_path, chosen, num_threads):
    script = tmp_path / "report.py"
    script.write_text(REPORT)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "ACCELERATE_"))}
    environment |= chosen | {"MASTER_ADDR": "127.0.0.1", "HF_HOME": str(tmp_path)}  # no config file of the user's
    for command in ([], ["-m", "accelerate.commands.launch"]):
        done = subprocess.run(
            [sys.executable, *command, str(script)], env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
        precision, threads = json.loads(done.stdout.splitlines()[-1])
        assert threads == num_threads
        assert precision == ("bf16" if torch.cpu._is_avx512_bf16_supported() else "no")


def test_an_incomplete_launch_is_named():
    """In a process of its own: PyTorch and Accelerate keep the state of a launch."""
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    result = subprocess.run(
        [sys.executable, "-c", REPORT],
        env=environment | {"LOCAL_RANK": "0"},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert "LaunchError" in result.stderr
    assert "RANK expected, but not set" in result.stderr
