"""Hugging Face formats: pretrained weights, exports, PEFT adapters and tokenizer files.

load.py                opens a model and its tokenizer from any supported source
from_pretrained.py     reads weights in the format of transformers' GPT-2
nanogpt.py             converts checkpoints of nanoGPT
export.py              writes, verifies and uploads models in the format of transformers' GPT-2
save_model.py          saves a model of any kind
hf_config.py           configuration files in the format of transformers' GPT-2
peft.py                reads and writes LoRA adapters in PEFT's format
read_tokenizer.py      reads a folder's tokenizer
tokenizer_settings.py  checks a tokenizer's settings other than vocabulary and merges
tokenizer_files.py     writes a tokenizer's files
model_folder.py        Hub downloads, and bounded reads of JSON, text and safetensors files
"""
