"""Names of the arguments of models in other programs, such as transformers and PEFT."""

from homebrew.unknown_arguments import ArgumentNames

CONFIG_NAMES = ArgumentNames(
    {
        "block_size": "context_length n_ctx n_positions max_position_embeddings max_seq_len seq_len sequence_len",
        "dropout": "attn_pdrop embd_pdrop resid_pdrop attention_dropout",
        "n_embd": "d_model dim embedding_dim emb_dim hidden_size n_embed width",
        "n_head": "heads num_heads num_attention_heads",
        "n_layer": "depth layers num_layers num_hidden_layers",
    },
    advice={
        "bias": "All layers have biases, as GPT-2's; load_nanogpt sets missing ones to zero.",
        "init": "It is an argument of GPT: GPT(config, init=...).",
        "seed": "It is an argument of GPT: GPT(config, seed=...).",
    },
)
"""For `GPTConfig`."""

MODEL_NAMES = ArgumentNames(
    advice={
        name: f"It is a setting of GPTConfig: GPT(GPTConfig({name}=...))."
        for name in ("block_size", "dropout", "n_embd", "n_head", "n_layer", "vocab_size")
    }
)
"""For `GPT`."""

LORA_NAMES = ArgumentNames(
    {
        "rank": "r lora_r lora_rank",
        "alpha": "lora_alpha",
        "dropout": "lora_dropout",
        "target_modules": "modules layers",
    },
    advice={
        "bias": "Biases are not trained, as with bias='none' in PEFT.",
        "task_type": "The model is always a causal language model: leave it out.",
    },
)
"""For `LoRAConfig`."""

GENERATE_NAMES = ArgumentNames(
    {"max_new_tokens": "max_length max_tokens num_tokens length", "sampling": "generation_config"},
    advice={
        "attention_mask": "Pass several prompts as lists of different lengths, without padding.",
        "do_sample": "Pass sampling=Sampling(temperature=0) for greedy decoding.",
        "num_beams": "Beam search is not supported.",
        **{
            name: f"Pass sampling=Sampling({name}=...)."
            for name in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
        },
    },
)
"""For functions that generate."""
