import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from homebrew import GPT, GPTConfig
from homebrew.model.adapters import load_adapter

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
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = str(listener.getsockname()[1])
    done = subprocess.run(
        [sys.executable, "-c", NOTEBOOK, str(tmp_path), str(processes), port],
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
    assert (tmp_path / "ladder.png").read_bytes().startswith(b"\x89PNG")
