"""The GPT-2 model: configuration, network, LoRA and the operations below them; and interfaces of other models."""
