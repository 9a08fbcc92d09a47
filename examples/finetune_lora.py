"""Fine-tune OpenAI's GPT-2 on your text with LoRA: the weights stay, a small adapter trains."""

from dataclasses import dataclass
from pathlib import Path

import tyro

from homebrew import GPT, Sampling, TokenDataset, Trainer, TrainerConfig, load_corpus
from homebrew.hub.peft import save_adapter
from homebrew.model.lora import LoRAConfig


@dataclass
class Options:
    """Fine-tune a GPT-2 with LoRA."""

    text: Path | None = None
    """A text file to learn; Tiny Shakespeare if not given."""
    base: str = "openai-community/gpt2"
    """The weights to start from: a hub repository, or a folder in transformers' format."""
    rank: int = 8
    """The adapter's inner width."""
    output_dir: Path = Path("runs/lora")
    """Where checkpoints, metrics and the adapter go."""
    max_steps: int = 100
    """Optimizer steps."""
    block_size: int = 256
    """Tokens in a training sequence: fewer need less memory."""
    micro_batch_size: int = 16
    """Sequences a step."""
    resume: bool = False
    """Go on from the newest checkpoint in the output folder."""


def main(options: Options) -> None:
    model = GPT.from_pretrained(options.base, lora=LoRAConfig(rank=options.rank))
    corpus = load_corpus(path=options.text)
    dataset = TokenDataset.from_text(corpus.text, options.block_size, source=corpus.source)
    train, val = dataset.split(0.9, seed=42)
    config = TrainerConfig(
        output_dir=options.output_dir,
        max_steps=options.max_steps,
        micro_batch_size=options.micro_batch_size,
        learning_rate=1e-3,  # an adapter takes more than weights that are already good
        eval_batches=16,
        save_every=50,
    )
    trainer = Trainer(model, train, eval_dataset=val, config=config)
    trainer.train(resume=options.resume)
    said = trainer.sample("ROMEO:", max_new_tokens=100, sampling=Sampling(top_k=50), seed=42)
    if trainer.is_main_process:
        adapter = options.output_dir / "adapter"
        save_adapter(model, adapter, base_model=options.base)
        print(f"\n{said}\n\nThe adapter is in {adapter}; PEFT loads it onto transformers' GPT-2.")


if __name__ == "__main__":
    main(tyro.cli(Options))
