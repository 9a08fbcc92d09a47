"""The house's floors, and what importing it does."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import homebrew

ROOT = Path(homebrew.__file__).parent
ORDER = """
errors files
data.files data.sources data.tokenizer data.corpora data.shards data.tokens data.order data.dataset data.check
data.draws data.loader data.hellaswag data.prepare
model.config model.attention model.kernels model.loss model.mlp model.lora model.files model.adapters model.pretrained
model.cache model.sampling model.generate model.tokenizer_files model.export model.text model.gpt
training.schedule training.optim training.config training.guard training.launch training.compilation training.metrics
training.meter training.collective training.files training.pieces training.manifest training.tensors training.writing
training.background training.checkpoint training.rng training.state training.resume training.optimizer_numbers
training.reports training.sharding training.graph training.step training.heartbeat training.saver training.evaluation
training.signals training.allocation training.micro_batch training.callbacks training.record training.trainer
training.tokenizers training.saved training.perplexity training.hellaswag
cli.opened cli.train cli.prepare cli.sample cli.evaluate cli.export cli.doctor cli.main __main__
""".split()


def modules():
    return {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in ROOT.rglob("*.py")}


def imports_of(path):
    """Modules of ours that are imported when it is, type-checking blocks left out."""
    found = set()
    body = list(ast.parse(path.read_text()).body)
    while body:
        node = body.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("homebrew."):
            found.add(node.module.removeprefix("homebrew."))
        body += [child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt)]
    return found


def test_each_file_imports_only_what_stands_above_it():
    for name, path in modules().items():
        if name.endswith("__init__"):
            continue
        above = ORDER[: ORDER.index(name)]
        floor = name.split(".")[0]
        for imported in imports_of(path):
            assert imported in above, f"{name} imports {imported}, which does not stand above it"
            if floor in ("data", "model"):
                assert imported.split(".")[0] in ("errors", "files", floor), (
                    f"{name} imports {imported} from another floor"
                )


def test_the_order_names_every_module():
    named = {name for name in modules() if not name.endswith("__init__")}
    assert named == set(ORDER)


PROBE = """
import os, sys, json, logging
before = dict(os.environ)
import homebrew, torch
print(json.dumps({
    "environment": dict(os.environ) == before,
    "cuda": torch.cuda.is_initialized(),
    "handlers": len(logging.getLogger().handlers),
    "heavy": [name for name in ("transformers", "tensorboard", "matplotlib", "peft") if name in sys.modules],
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
"""What would take the import half as long again: the functions that need it import it. See `benchmarks/startup.py`."""


def test_importing_costs_little_more_than_torch_and_accelerate():
    done = subprocess.run([sys.executable, "-c", FACE], capture_output=True, text=True, check=True)
    assert set(SLOW) & set(done.stdout.split()) == set()


def test_the_public_face():
    assert set(homebrew.__all__) == {
        "GPT",
        "Callback",
        "EarlyStopping",
        "GPTConfig",
        "HomebrewError",
        "TokenDataset",
        "Trainer",
        "TrainerConfig",
        "get_tokenizer",
        "load_corpus",
        "warmup_cosine",
    }
    assert all(hasattr(homebrew, name) for name in homebrew.__all__)
