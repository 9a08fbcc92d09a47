"""GPT-2: its shape, its loss, its weights and what it says."""
