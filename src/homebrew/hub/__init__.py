"""Hugging Face formats: pretrained weights, exports, PEFT adapters and tokenizer files."""
