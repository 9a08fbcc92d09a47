"""Training: the Trainer, one optimizer step, and what they are built from."""
