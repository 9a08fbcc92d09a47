"""Train from a notebook. Paste this into a cell, or run it as a script.

Everything that uses a GPU is inside `train`: `notebook_launcher` forks the notebook, and a forked process cannot use a
GPU that its parent has initialized. To train on CPUs, set ACCELERATE_USE_CPU=true first.
"""

from pathlib import Path

from accelerate import notebook_launcher

from homebrew import GPTConfig, TokenDataset, Trainer, TrainerConfig, load_corpus


def train(output_dir: Path, text: Path | None = None, max_steps: int = 100) -> None:
    """Train a small character-level GPT and print a sample. Every process runs this function.

    `text` is a file or a folder; the default is Tiny Shakespeare.
    """
    corpus = load_corpus("tinyshakespeare", path=text)
    dataset = TokenDataset.from_text(corpus.text, block_size=64, tokenizer="char", source=corpus.source)
    model = GPTConfig(block_size=64, vocab_size=dataset.vocab_size, n_layer=4, n_head=4, n_embd=128)
    config = TrainerConfig(
        output_dir=output_dir,
        max_steps=max_steps,
        global_batch_tokens=32 * 64,
        learning_rate=3e-3,
    )
    trainer = Trainer(model, dataset, config=config)
    trainer.train(resume=True)
    sample = trainer.sample("ROMEO:", max_new_tokens=80, seed=1)
    if trainer.is_main_process:
        print(sample)


if __name__ == "__main__":
    # Set num_processes to the number of GPUs. With 1, `train` runs in the notebook's own process.
    notebook_launcher(train, args=(Path("runs/notebook"),), num_processes=1)
