"""Real processes under gloo, launched as a user would."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

WORKER = Path(__file__).with_name("worker.py")
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--mixed_precision", "no", "--dynamo_backend", "no"]
LAYOUTS = {  # processes, machines, whether sharded, copies of the shards
    "one": (1, 1, False, 1),
    "ddp2": (2, 1, False, 1),
    "ddp4": (4, 1, False, 1),
    "nodes": (4, 2, False, 1),
    "fsdp2": (2, 1, True, 1),
    "hybrid": (4, 1, True, 2),
}


def start(folder, layout, *tasks):
    """Launch the worker on these tasks; its launchers, one a machine."""
    processes, machines, sharded, replicas = LAYOUTS[layout]
    folder.mkdir(exist_ok=True)
    tasks = [{"output_dir": str(folder / f"task{i}")} | task for i, task in enumerate(tasks)]
    job = {"sharded": sharded, "replicas": replicas, "tasks": tasks, "result": str(folder / "result.json")}
    options = ["--num_processes", str(processes), "--num_machines", str(machines), "--main_process_ip", "127.0.0.1"]
    options += ["--multi_gpu"] if processes > 1 else ["--cpu"]
    options += ["--main_process_port", str(free_port()), "--same_network"]
    return [
        subprocess.Popen(
            [*LAUNCH, *options, "--machine_rank", str(rank), str(WORKER), json.dumps(job)],
            env=os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(machines)
    ]


def launch(folder, layout, *tasks):
    """Run the worker on these tasks; what it found of each."""
    launchers = start(folder, layout, *tasks)
    outputs = [launcher.communicate(timeout=200) for launcher in launchers]
    assert [launcher.returncode for launcher in launchers] == [0] * len(launchers), outputs
    return json.loads((folder / "result.json").read_text())


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
