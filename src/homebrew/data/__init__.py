"""Text to tokens to the batches of a step."""
