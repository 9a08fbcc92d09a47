"""GPT-2: configuration, model and LoRA."""
