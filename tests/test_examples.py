import os
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command_parser
from worlds import free_port

from homebrew import GPT, GPTConfig
from homebrew.distributed.accelerator import has_native_bf16
from homebrew.hub.peft import load_adapter

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_finetune_lora(tmp_path):
    base, text, out = tmp_path / "base", tmp_path / "text.txt", tmp_path / "run"
    GPT(GPTConfig(block_size=32, n_layer=1, n_head=1, n_embd=16)).save_pretrained(base)
    text.write_text("It is the east, and Juliet is the sun.\n" * 60)
    options = ["--base", base, "--text", text, "--output-dir", out, "--max-steps", 2, "--block-size", 16]
    done = subprocess.run(
        [sys.executable, EXAMPLES / "finetune_lora.py", *map(str, options)], capture_output=True, text=True, check=True
    )
    assert "ROMEO:" in done.stdout
    model = GPT.from_pretrained(base)
    load_adapter(model, out / "adapter")


NOTEBOOK = """
import sys
from pathlib import Path
from accelerate import notebook_launcher
from notebook import train
folder, processes, port = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
notebook_launcher(train, args=(folder / "run", folder / "text.txt", 3), num_processes=processes, use_port=port)
"""


@pytest.mark.parametrize("processes", [1, 2])
def test_from_a_notebook(tmp_path, processes):
    (tmp_path / "text.txt").write_text("ROMEO:\nTo be, or not to be: that is the question.\n" * 200)
    done = subprocess.run(
        [sys.executable, "-c", NOTEBOOK, str(tmp_path), str(processes), str(free_port())],
        cwd=EXAMPLES,
        env=os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert f" × {processes}, " in done.stdout
    assert done.stdout.count("ROMEO:") == 1
    assert (tmp_path / "run" / "checkpoints" / "step-00000003").is_dir()


@pytest.mark.slow
def test_speed_ladder(tmp_path):
    options = ["--block-size", "8", "--steps", "1", "--plot", tmp_path / "ladder.png"]
    command = [sys.executable, EXAMPLES / "speed_ladder.py", *map(str, options)]
    quick = os.environ | {"TORCHDYNAMO_DISABLE": "1"}  # compiling takes most of a minute
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=quick)
    rungs = [line.split("│")[1].strip() for line in done.stdout.splitlines() if line.startswith("│")]
    assert rungs[0] == "float32"
    assert rungs[-1] == "fused head and loss"
    assert ("bfloat16" in rungs) == has_native_bf16()
    assert (tmp_path / "ladder.png").read_bytes().startswith(b"\x89PNG")


STUBS = {
    "scontrol": 'test "$*" = "show hostnames $SLURM_JOB_NODELIST" && printf "node7\\nnode9\\n"',
    "srun": 'shift; for SLURM_NODEID in 0 1; do export SLURM_NODEID; "$@"; done',
    "accelerate": 'printf "%s\\n" "$@" > "$SLURM_SUBMIT_DIR/launched-$SLURM_NODEID"',
}


def test_slurm_starts_one_launcher_a_node(tmp_path):
    for name, script in STUBS.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{script}\n")
        (tmp_path / name).chmod(0o755)
    variables = {"JOB_NODELIST": "node[7,9]", "JOB_ID": "1234567", "NNODES": "2", "SUBMIT_DIR": str(tmp_path)}
    environment = {f"SLURM_{name}": value for name, value in variables.items()} | {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    subprocess.run(["bash", EXAMPLES / "slurm.sh"], cwd=EXAMPLES.parent, env=environment, check=True)
    for rank in (0, 1):
        command, *arguments = (tmp_path / f"launched-{rank}").read_text().splitlines()
        asked = launch_command_parser().parse_args(arguments)
        assert (command, asked.machine_rank, asked.num_machines, asked.num_processes) == ("launch", rank, 2, 16)
        assert (asked.main_process_ip, asked.main_process_port) == ("node7", 24567)
        assert (EXAMPLES.parent / asked.config_file).exists()
        assert (EXAMPLES.parent / asked.training_script).exists()
        assert asked.training_script_args == ["--output-dir", f"{tmp_path}/runs/shakespeare", "--resume"]
