"""`Announcement`: prints a sentence when training begins."""

from typing import TYPE_CHECKING

from homebrew.callbacks.base import Callback

if TYPE_CHECKING:
    from homebrew.training.trainer import Trainer


class Announcement(Callback):
    """Prints a sentence when training begins, thus not if the run cannot start. Only rank 0 prints."""

    def __init__(self, sentence: str) -> None:
        self._sentence = sentence

    def on_train_begin(self, trainer: "Trainer") -> None:
        """Print the sentence."""
        trainer.accelerator.print(self._sentence)
