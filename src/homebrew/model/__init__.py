"""The GPT-2 model: configuration, network, LoRA and operations; and interfaces to other models."""
