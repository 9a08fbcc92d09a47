"""Fine-tune OpenAI's GPT-2 on a text with LoRA."""

from dataclasses import dataclass
from pathlib import Path

import tyro

from homebrew import (
    GPT,
    HomebrewError,
    LoRAConfig,
    Sampling,
    TokenDataset,
    Trainer,
    TrainerConfig,
    load_corpus,
    save_adapter,
)


@dataclass
class Options:
    """Fine-tune GPT-2 with LoRA: the pretrained weights are frozen, and a small adapter is trained."""

    text: Path | None = None
    """Text to train on: a file or a folder. Default: Tiny Shakespeare."""
    base: str = "openai-community/gpt2"
    """Pretrained weights: a Hub repository, or a folder in Transformers' format."""
    rank: int = 8
    """Rank of the adapter."""
    output_dir: Path = Path("runs/lora")
    """Folder for checkpoints, metrics and the adapter."""
    max_steps: int = 100
    """Number of optimizer steps."""
    block_size: int = 256
    """Tokens per training sequence. Shorter sequences need less memory."""
    micro_batch_size: int = 16
    """Sequences per micro-batch."""
    resume: bool = False
    """Resume from the newest valid checkpoint in the output folder."""


def main(options: Options) -> None:
    model = GPT.from_pretrained(options.base, lora=LoRAConfig(rank=options.rank))
    corpus = load_corpus(path=options.text)
    dataset = TokenDataset.from_text(corpus.text, options.block_size, source=corpus.source)
    train, val = dataset.split(0.9, seed=42)
    config = TrainerConfig(
        output_dir=options.output_dir,
        max_steps=options.max_steps,
        micro_batch_size=options.micro_batch_size,
        learning_rate=1e-3,  # adapters start at zero and need a higher learning rate than pretrained weights
        eval_batches=16,
        save_every=50,
    )
    trainer = Trainer(model, train, eval_dataset=val, config=config)
    trainer.train(resume=options.resume)
    sample = trainer.sample("ROMEO:", max_new_tokens=100, sampling=Sampling(top_k=50), seed=42)
    if trainer.is_main_process:
        adapter = options.output_dir / "adapter"
        save_adapter(model, adapter, base_model=options.base)
        print(f"\n{sample}\n\nThe adapter is in {adapter}. PEFT can load it into Transformers' GPT-2.")


if __name__ == "__main__":
    try:
        main(tyro.cli(Options))
    except HomebrewError as error:  # its message says what to do
        raise SystemExit(str(error)) from None
