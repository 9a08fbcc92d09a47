"""Makes the examples of README and docs small enough for tests."""

import re

# What takes hours, the network or a GPU, and what takes its place in tests.
SUBSTITUTES = {
    'load_corpus("tinyshakespeare")': 'load_corpus(path="book.txt")',
    "load_hellaswag()": 'load_hellaswag("hellaswag.jsonl")',
    "openai-community/gpt2": "tiny-gpt2",
    "HuggingFaceTB/SmolLM2-135M": "tiny-gpt2",
    "batch, length = 8, 1_024": "batch, length = 2, 16",
    'GPTConfig.preset("gpt2")': "GPTConfig(block_size=16, n_layer=1, n_head=1, n_embd=8)",
    "GPTConfig()": "GPTConfig(block_size=16, n_layer=1, n_head=1, n_embd=8)",
    'GPTConfig.preset("baby")': "GPTConfig(block_size=16, n_layer=1, n_head=1, n_embd=8)",
    "global_batch_tokens=524_288": "global_batch_tokens=64",
    "global_batch_tokens=491_520": "global_batch_tokens=64",
}
SMALLER = [
    (r"block_size=(128|256|1024)", "block_size=16"),
    (r"(TrainerConfig\([^)]*)max_steps=[\d_]+", r"\1max_steps=2, micro_batch_size=2"),
    (r"(homebrew train book\.\w+)(?!.*--init-from)", r"\1 --n-layer 1 --n-head 1 --n-embd 8 --block-size 64"),
    (r"step-\d{8}", "step-00000002"),
    (r"--max-steps \d+", "--max-steps 2 --micro-batch-size 2"),
    (r"--vocab-size \d+", "--vocab-size 260"),
    (r"warmup_steps=[\d_]+", "warmup_steps=1"),
    (r"(dataset\[\"\w+\"\]), 1024", r"\1, 16"),
    (r"max_new_tokens=\d+", "max_new_tokens=4"),
    (r"--max-new-tokens \d+", "--max-new-tokens 4"),
    (r"stride=\d+", "stride=8"),
]


def small(example: str) -> str:
    """Return an example with a tiny model, few steps, and local files."""
    for text, substitute in SUBSTITUTES.items():
        example = example.replace(text, substitute)
    for pattern, substitute in SMALLER:
        example = re.sub(pattern, substitute, example)
    return example
