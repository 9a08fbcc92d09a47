"""Launch files: ours, and those `accelerate config` would write, run as they can be run without a GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from worlds import free_port

FOLDER = Path(__file__).parents[1] / "accelerate_configs"
OURS = sorted(path.stem for path in FOLDER.glob("*.yaml"))

LAUNCH = [sys.executable, "-m", "accelerate.commands.launch"]
SCRIPT = """
import sys, torch
from homebrew import GPTConfig, TokenDataset, Trainer, TrainerConfig
shape = GPTConfig(block_size=8, vocab_size=20, n_layer=1, n_head=1, n_embd=8)
data = TokenDataset.from_tokens(torch.arange(400) % 20, block_size=8, vocab_size=20)
trainer = Trainer(shape, data, config=TrainerConfig(output_dir=sys.argv[1], max_steps=1, micro_batch_size=2))
trainer.train()
if trainer.is_main_process:
    print("world", trainer.accelerator.num_processes, "step", trainer.step)
"""

COMMON = {
    "compute_environment": "LOCAL_MACHINE",
    "debug": False,
    "main_training_function": "main",
    "same_network": True,
    "rdzv_backend": "static",
}
ANSWERS = {
    "cpu": {"distributed_type": "NO", "use_cpu": True, "num_processes": 1, "mixed_precision": "no"},
    "one_gpu": {
        "distributed_type": "NO",
        "use_cpu": False,
        "num_processes": 1,
        "gpu_ids": "all",
        "mixed_precision": "bf16",
    },
    "many_gpus": {
        "distributed_type": "MULTI_GPU",
        "use_cpu": False,
        "num_processes": 8,
        "gpu_ids": "all",
        "mixed_precision": "bf16",
    },
    "fsdp2": {
        "distributed_type": "FSDP",
        "use_cpu": False,
        "num_processes": 8,
        "mixed_precision": "bf16",
        "fsdp_config": {
            "fsdp_version": 2,
            "fsdp_reshard_after_forward": True,
            "fsdp_offload_params": False,
            "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
            "fsdp_state_dict_type": "SHARDED_STATE_DICT",
            "fsdp_cpu_ram_efficient_loading": True,
            "fsdp_activation_checkpointing": False,
        },
    },
}


@pytest.fixture(params=[*OURS, *(f"answers/{name}" for name in ANSWERS)])
def config_file(request, tmp_path):
    folder, _, name = request.param.rpartition("/")
    if not folder:
        return FOLDER / f"{name}.yaml"
    path = tmp_path / f"{name}.yaml"
    ClusterConfig(**COMMON | ANSWERS[name]).to_yaml_file(path)
    return path


def test_it_parses(config_file):
    given = launch_command_parser().parse_args(["--config_file", str(config_file), "script.py"])
    args, defaults, _ = _validate_launch_command(given)
    assert args.num_processes == defaults.num_processes >= 1
    assert args.mixed_precision == defaults.mixed_precision
    assert args.use_fsdp == (defaults.distributed_type == "FSDP")
    assert args.multi_gpu == (defaults.distributed_type == "MULTI_GPU")
    assert args.fsdp_version == 2 or not args.use_fsdp
    assert defaults.num_processes % defaults.num_machines == 0


@pytest.mark.parametrize("config_file", [*OURS, "answers/many_gpus"], indirect=True)  # the others are as ours
def test_it_launches(config_file, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    config = load_config_from_file(str(config_file))
    options = ["--config_file", str(config_file), "--mixed_precision", "no"]
    if config.num_processes > 1:
        options += ["--num_processes", "2"]
    if config.num_machines > 1:
        options += ["--main_process_port", str(free_port())]
    running = [
        subprocess.Popen(
            [*LAUNCH, *options, "--machine_rank", str(rank), str(script), str(tmp_path / "run")],
            env=os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(config.num_machines)
    ]
    outputs = [process.communicate(timeout=120) for process in running]
    codes = [process.returncode for process in running]
    if "fsdp" in config_file.stem:
        assert set(codes) == {1}
        told = "LaunchError: The launcher asked for FSDP, but Accelerate runs"
        if config.parallelism_config:
            told = "LaunchError: The launcher's parallelism_config is for 2 × 8 processes"
        assert told in outputs[0][1]
    else:
        assert set(codes) == {0}, outputs
        world = 2 if config.num_processes > 1 else 1
        assert f"world {world} step 1" in outputs[0][0]
