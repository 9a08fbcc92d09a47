"""Evaluation: mean loss, perplexity and HellaSwag."""
