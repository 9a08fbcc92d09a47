"""Real processes under gloo, launched as a user would."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

WORKER = Path(__file__).with_name("worker.py")
CONFIG = "compute_environment: LOCAL_MACHINE\n"


def launch(folder, processes, **task):
    """Run the worker under `accelerate launch`; what it found."""
    folder.mkdir(exist_ok=True)
    config = folder / "launch.yaml"
    config.write_text(CONFIG)
    result = folder / "result.json"
    task = {"output_dir": str(folder / "run"), "result": str(result)} | task
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    command += ["--num_processes", str(processes), "--num_machines", "1", "--mixed_precision", "no"]
    command += ["--dynamo_backend", "no", "--main_process_port", "0"]
    command += ["--multi_gpu"] if processes > 1 else ["--cpu"]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(WORKER), json.dumps(task)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(result.read_text())


@pytest.mark.parametrize("ragged", [False, True], ids=["even", "uneven"])
def test_two_processes_are_one(tmp_path, ragged):
    one = launch(tmp_path / "one", 1, ragged=ragged, eval_every=10)
    two = launch(tmp_path / "two", 2, ragged=ragged, eval_every=10)
    assert (one["world"], two["world"]) == (1, 2)
    assert len(one["losses"]) == 20
    assert one["losses"] == pytest.approx(two["losses"], abs=1e-5)
    for (loss_1, count_1), (loss_2, count_2) in zip(one["evaluations"], two["evaluations"], strict=True):
        assert loss_1 == pytest.approx(loss_2, abs=1e-4)
        assert count_1 == count_2
