"""The files in accelerate_configs/, and files as `accelerate config` writes them, launched without GPUs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from worlds import ON_CPUS, free_port

FOLDER = Path(__file__).parents[1] / "accelerate_configs"
CONFIG_FILES = sorted(path.stem for path in FOLDER.glob("*.yaml"))

LAUNCH = [sys.executable, "-m", "accelerate.commands.launch"]
SCRIPT = """
import sys, torch
from homebrew import GPTConfig, TokenDataset, Trainer, TrainerConfig
shape = GPTConfig(block_size=8, vocab_size=20, n_layer=1, n_head=1, n_embd=8)
data = TokenDataset.from_tokens(torch.arange(400) % 20, block_size=8, vocab_size=20)
trainer = Trainer(shape, data, config=TrainerConfig(output_dir=sys.argv[1], max_steps=1, micro_batch_size=2))
trainer.train()
if trainer.is_main_process:
    print("world size", trainer.accelerator.num_processes, "step", trainer.step)
"""

COMMON = {
    "compute_environment": "LOCAL_MACHINE",
    "debug": False,
    "main_training_function": "main",
    "same_network": True,
    "rdzv_backend": "static",
}
GENERATED = {  # what `accelerate config` writes for these answers
    "cpu": {"distributed_type": "NO", "use_cpu": True, "num_processes": 1, "mixed_precision": "no"},
    "one_gpu": {
        "distributed_type": "NO",
        "use_cpu": False,
        "num_processes": 1,
        "gpu_ids": "all",
        "mixed_precision": "bf16",
    },
    "multi_gpu": {
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


@pytest.fixture(params=[*CONFIG_FILES, *(f"generated/{name}" for name in GENERATED)])
def config_file(request, tmp_path):
    folder, _, name = request.param.rpartition("/")
    if not folder:
        return FOLDER / f"{name}.yaml"
    path = tmp_path / f"{name}.yaml"
    ClusterConfig(**COMMON | GENERATED[name]).to_yaml_file(path)
    return path


def test_config_file_parses(config_file):
    options = launch_command_parser().parse_args(["--config_file", str(config_file), "script.py"])
    args, defaults, _ = _validate_launch_command(options)
    assert args.num_processes == defaults.num_processes >= 1
    assert args.mixed_precision == defaults.mixed_precision
    assert args.use_fsdp == (defaults.distributed_type == "FSDP")
    assert args.multi_gpu == (defaults.distributed_type == "MULTI_GPU")
    assert args.fsdp_version == 2 or not args.use_fsdp
    assert defaults.num_processes % defaults.num_machines == 0


def launch(config_file, folder, num_processes):
    """Launch SCRIPT once for each machine of the file, and return (exit code, output, errors) of each launcher."""
    script = folder / "script.py"
    script.write_text(SCRIPT)
    config = load_config_from_file(str(config_file))
    options = ["--config_file", str(config_file), "--mixed_precision", "no", "--num_processes", str(num_processes)]
    if config.num_machines > 1:
        options += ["--main_process_port", str(free_port())]
    launchers = [
        subprocess.Popen(
            [*LAUNCH, *options, "--machine_rank", str(rank), str(script), str(folder / "run")],
            env=os.environ | ON_CPUS,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(config.num_machines)
    ]
    outputs = [launcher.communicate(timeout=120) for launcher in launchers]
    return [(launcher.returncode, *output) for launcher, output in zip(launchers, outputs, strict=True)]


@pytest.mark.parametrize(
    ("config_file", "world_size"),
    [
        ("multi_gpu", 2),
        pytest.param("cpu", 1, marks=pytest.mark.slow),
        pytest.param("multi_node", 2, marks=pytest.mark.slow),
    ],
    indirect=["config_file"],
)
def test_launch_trains_on_cpu_processes(config_file, tmp_path, world_size):
    results = launch(config_file, tmp_path, world_size)
    assert {code for code, _, _ in results} == {0}, results
    assert f"world size {world_size} step 1" in results[0][1]


@pytest.mark.slow
@pytest.mark.parametrize("config_file", ["fsdp2"], indirect=True)
def test_launch_of_fsdp_without_gpus_is_an_error(config_file, tmp_path):
    [(code, _, errors)] = launch(config_file, tmp_path, num_processes=2)
    assert code == 1
    assert "LaunchError: The launcher asked for FSDP, but Accelerate runs" in errors
