"""Transformers' GPT-2 with given weights, to compare with; not a test."""

import torch
from transformers import GPT2Config, GPT2LMHeadModel


def reference_gpt2(state_dict, *, block_size, vocab_size, n_layer, n_head, n_embd, dropout=0.0, eos_token_id=None):
    """Return transformers' GPT-2 in evaluation mode, with a GPT's weights, copied by name."""
    config = GPT2Config(
        vocab_size=vocab_size,
        n_positions=block_size,
        n_embd=n_embd,
        n_layer=n_layer,
        n_head=n_head,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
        resid_pdrop=dropout,
        bos_token_id=None,  # the default is outside a small vocabulary
        eos_token_id=eos_token_id,
    )
    reference = GPT2LMHeadModel(config).eval()
    state = state_dict | {"transformer.wte.weight": state_dict["transformer.wte.weight"][:vocab_size]}
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            parameter.copy_(_transposed_if_conv1d(name, state[name]))
    return reference


def gpt_weights(reference):
    """Return the reference's parameters with the names and shapes of a GPT's, without the vocabulary padding."""
    return {name: _transposed_if_conv1d(name, value.detach()) for name, value in reference.named_parameters()}


def _transposed_if_conv1d(name, value):
    is_conv1d = name.split(".")[-2] in {"c_attn", "c_proj", "c_fc"} and name.endswith("weight")
    return value.T if is_conv1d else value
