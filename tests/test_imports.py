"""What importing homebrew does, and its public names."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import homebrew

PACKAGE = Path(homebrew.__file__).parent

PROBE = """
import os, sys, json, logging
before = dict(os.environ)
import homebrew, torch
print(json.dumps({
    "environment": dict(os.environ) == before,
    "cuda": torch.cuda.is_initialized(),
    "handlers": len(logging.getLogger().handlers),
    "heavy": [name for name in "transformers tokenizers tensorboard matplotlib peft".split() if name in sys.modules],
    "threads": __import__("threading").active_count(),
}))
"""


def test_importing_prints_nothing_and_starts_nothing():
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, check=True, env=os.environ)
    assert done.stderr == ""
    assert json.loads(done.stdout) == {"environment": True, "cuda": False, "handlers": 0, "heavy": [], "threads": 1}


FACE = "import sys; from homebrew import GPT, GPTConfig, TokenDataset, Trainer, TrainerConfig; print(*sys.modules)"
SLOW = """
sympy torch._dynamo torch._inductor torch.fx.experimental.symbolic_shapes torch.distributed.checkpoint
torch.distributed.fsdp torch.distributed.tensor huggingface_hub.hf_api huggingface_hub.errors tyro transformers
""".split()
"""What would take the import half as long again: the functions that need it import it."""


def test_importing_costs_little_more_than_torch_and_accelerate():
    done = subprocess.run([sys.executable, "-c", FACE], capture_output=True, text=True, check=True)
    assert set(SLOW) & set(done.stdout.split()) == set()


def test_a_model_on_the_meta_device_costs_no_imports():
    program = "import sys, torch; from homebrew import GPT, GPTConfig\nwith torch.device('meta'): GPT(GPTConfig())"
    done = subprocess.run(
        [sys.executable, "-c", f"{program}\nprint(*sys.modules)"], capture_output=True, text=True, check=True
    )
    assert set(SLOW) & set(done.stdout.split()) == set()


def test_preparing_text_imports_no_torch():
    program = "import sys, homebrew.cli.main, homebrew.data.preparation.prepare; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert {"torch", "accelerate", "transformers"} & set(done.stdout.split()) == set()


def test_every_public_name_can_be_imported():
    assert sorted(homebrew.__all__) == sorted(homebrew._MODULE_OF)
    assert all(hasattr(homebrew, name) for name in homebrew.__all__)


def test_no_two_modules_share_a_name():
    names = [path.name for path in PACKAGE.rglob("*.py") if path.name != "__init__.py"]
    assert sorted(names) == sorted(set(names))


def test_no_module_imports_private_names_of_another():
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("homebrew"):
                private = {alias.name for alias in node.names if alias.name.startswith("_")} - {"__version__"}
                assert not private, f"{path.relative_to(PACKAGE)} imports {private} from {node.module}"
