"""Train from a notebook: paste this into a cell. It runs as a script too.

Everything that touches a GPU stays inside `train`: the processes are forks of the notebook, and a fork cannot use a
GPU that its parent has touched. For processes on CPUs, set ACCELERATE_USE_CPU=true before.
"""

from pathlib import Path

from accelerate import notebook_launcher

from homebrew import GPTConfig, TokenDataset, Trainer, TrainerConfig, load_corpus


def train(output_dir: Path, text: Path | None = None, max_steps: int = 100) -> None:
    """Train a small GPT on a text's characters and let it write; every process runs this."""
    corpus = load_corpus("tinyshakespeare", path=text)
    dataset = TokenDataset.from_text(corpus.text, block_size=64, tokenizer="char", source=corpus.source)
    shape = GPTConfig(block_size=64, vocab_size=dataset.vocab_size, n_layer=4, n_head=4, n_embd=128)
    config = TrainerConfig(
        output_dir=output_dir,
        max_steps=max_steps,
        global_batch_tokens=32 * 64,
        learning_rate=3e-3,
    )
    trainer = Trainer(shape, dataset, config=config)
    trainer.train(resume=True)
    said = trainer.sample("ROMEO:", max_new_tokens=80, seed=1)
    if trainer.is_main_process:
        print(said)


if __name__ == "__main__":
    # As many processes as there are GPUs; with one, `train` runs in the notebook itself.
    notebook_launcher(train, args=(Path("runs/notebook"),), num_processes=1)
