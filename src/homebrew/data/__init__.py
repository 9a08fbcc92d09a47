"""Data: text, tokenizers, token files, and the micro-batches of a step."""
