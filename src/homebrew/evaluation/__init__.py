"""Evaluation: mean loss over a dataset, perplexity of a text, HellaSwag accuracy.

- `mean_loss`: distributed mean loss, which `Trainer.evaluate` uses.
- `perplexity`: `score_text`, the loss, perplexity and bits per byte of a text by strided windows.
- `hellaswag`: `load_hellaswag` and `score_hellaswag`.

To add a benchmark, write a module with a `load_...` and a `score_...` function like `hellaswag`'s, export both in
`homebrew/__init__.py`, and add an option to `cli/eval_command.py`.
"""
