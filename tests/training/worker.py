"""A run in a process of its own, told what to do by JSON; not a test.

Prints one line of JSON: each step's loss, what the weights hash to, and the world it saw.
"""

import hashlib
import json
import sys
from pathlib import Path

import torch
from torch.utils.data import Dataset

from homebrew import GPTConfig, TokenDataset, Trainer, TrainerConfig
from homebrew.training.callbacks import Callback


class Ragged(Dataset):
    """Samples with very different numbers of scored targets."""

    def __init__(self):
        rows = torch.randint(0, 50, (96, 17), generator=torch.Generator().manual_seed(3))
        self.input_ids, self.targets = rows[:, :-1].clone(), rows[:, 1:].clone()
        for i, row in enumerate(self.targets):
            row[: (i * 7) % 17] = -100

    def __len__(self):
        return len(self.input_ids)

    def __getitem__(self, i):
        return self.input_ids[i], self.targets[i]


class Losses(Callback):
    def __init__(self):
        self.losses, self.evaluations = [], []

    def on_step_end(self, trainer, metrics):
        self.losses.append(metrics.loss)

    def on_evaluate(self, trainer, metrics):
        self.evaluations.append([metrics.loss, metrics.num_tokens])


def main():
    task = json.loads(sys.argv[1])
    losses = Losses()
    tokens = torch.randint(0, 50, (1200,), generator=torch.Generator().manual_seed(0))
    data = Ragged() if task.get("ragged") else TokenDataset.from_tokens(tokens, block_size=16, vocab_size=50)
    trainer = Trainer(
        GPTConfig(
            block_size=16, vocab_size=50, n_layer=2, n_head=2, n_embd=16, dropout=task.get("dropout", 0.0)
        ),
        data,
        Ragged(),
        config=TrainerConfig(
            output_dir=task["output_dir"],
            max_steps=task.get("max_steps", 20),
            global_batch_tokens=8 * 16,
            micro_batch_size=task.get("micro_batch_size", 2),
            learning_rate=1e-2,
            log_every=1,
            save_every=task.get("save_every"),
            eval_every=task.get("eval_every"),
            mixed_precision="no",
        ),
        callbacks=[losses],
    )
    trainer.train(resume=task.get("resume", False))
    if trainer.is_main_process:
        digest = hashlib.sha256()
        for _, tensor in sorted(trainer.model.state_dict().items()):
            digest.update(tensor.contiguous().numpy().tobytes())
        result = {
            "losses": losses.losses,
            "evaluations": losses.evaluations,
            "weights": digest.hexdigest(),
            "world": trainer.accelerator.num_processes,
        }
        Path(task["result"]).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
