import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate import notebook_launcher
from accelerate.commands.launch import launch_command_parser
from worlds import LOOPBACK, free_port

from homebrew import GPT, GPTConfig, load_adapter

EXAMPLES = Path(__file__).parents[1] / "examples"
TEXT = "ROMEO:\nTo be, or not to be: that is the question.\n" * 200


@pytest.fixture
def load_example(monkeypatch):
    """Return a function that imports an example by name."""
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module


def test_finetune_lora(load_example, tmp_path, capsys):
    base, text, output_dir = tmp_path / "base", tmp_path / "text.txt", tmp_path / "run"
    GPT(GPTConfig(block_size=32, n_layer=1, n_head=1, n_embd=16)).save_pretrained(base)
    text.write_text("It is the east, and Juliet is the sun.\n" * 60)
    example = load_example("finetune_lora")
    example.main(
        example.Options(
            base=str(base), text=text, output_dir=output_dir, max_steps=2, block_size=16, micro_batch_size=2
        )
    )
    assert "ROMEO:" in capsys.readouterr().out
    load_adapter(GPT.from_pretrained(base), output_dir / "adapter")


@pytest.mark.parametrize(("name", "option"), [("train_shakespeare", "--text"), ("finetune_lora", "--base")])
def test_a_wrong_path_gives_one_message(tmp_path, name, option):
    command = [sys.executable, EXAMPLES / f"{name}.py", option, tmp_path / "missing"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert str(tmp_path / "missing") in result.stderr
    assert "Traceback" not in result.stderr


NOTEBOOK = """
import sys
from pathlib import Path
from accelerate import notebook_launcher
from notebook import train
folder, port = Path(sys.argv[1]), sys.argv[2]
notebook_launcher(train, args=(folder / "run", folder / "text.txt", 3), num_processes=2, use_port=port)
"""


def test_notebook(load_example, tmp_path, capsys):
    (tmp_path / "text.txt").write_text(TEXT)
    train = load_example("notebook").train
    notebook_launcher(train, args=(tmp_path / "run", tmp_path / "text.txt", 3), num_processes=1)
    assert capsys.readouterr().out.count("ROMEO:") == 1
    assert (tmp_path / "run" / "checkpoints" / "step-00000003").is_dir()


@pytest.mark.slow
def test_notebook_with_two_processes(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    process = subprocess.run(
        [sys.executable, "-c", NOTEBOOK, str(tmp_path), str(free_port())],
        cwd=EXAMPLES,
        env=os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": LOOPBACK},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    assert process.stdout.count("ROMEO:") == 1
    assert json.loads((tmp_path / "run" / "run.json").read_text())["num_processes"] == 2


STUBS = {
    "scontrol": 'test "$*" = "show hostnames $SLURM_JOB_NODELIST" && printf "node7\\nnode9\\n"',
    "srun": 'shift; for SLURM_NODEID in 0 1; do export SLURM_NODEID; "$@"; done',
    "accelerate": 'printf "%s\\n" "$@" > "$SLURM_SUBMIT_DIR/launched-$SLURM_NODEID"',
}


def test_slurm_starts_one_launcher_per_node(tmp_path):
    for name, script in STUBS.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{script}\n")
        (tmp_path / name).chmod(0o755)
    variables = {"JOB_NODELIST": "node[7,9]", "JOB_ID": "1234567", "NNODES": "2", "SUBMIT_DIR": str(tmp_path)}
    environment = {f"SLURM_{name}": value for name, value in variables.items()} | {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    subprocess.run(["bash", EXAMPLES / "slurm.sh"], cwd=EXAMPLES.parent, env=environment, check=True)
    for rank in (0, 1):
        command, *arguments = (tmp_path / f"launched-{rank}").read_text().splitlines()
        options = launch_command_parser().parse_args(arguments)
        assert (command, options.machine_rank, options.num_machines, options.num_processes) == ("launch", rank, 2, 16)
        assert (options.main_process_ip, options.main_process_port) == ("node7", 24567)
        assert (EXAMPLES.parent / options.config_file).exists()
        assert (EXAMPLES.parent / options.training_script).exists()
        assert options.training_script_args == ["--output-dir", f"{tmp_path}/runs/shakespeare", "--resume"]
