"""Names of the Trainer's arguments and settings in other programs, such as nanoGPT and transformers."""

OTHER_NAMES = {
    "activation_checkpointing": "gradient_checkpointing",
    "betas": "beta1 beta2 adam_beta1 adam_beta2",
    "collective_timeout_seconds": "ddp_timeout",
    "compile": "torch_compile",
    "eval_batches": "eval_iters",
    "eval_every": "eval_interval eval_steps eval_strategy evaluation_strategy",
    "global_batch_tokens": "batch batch_tokens gradient_accumulation_steps",
    "keep_last": "save_total_limit",
    "learning_rate": "lr rate",
    "log_every": "log_interval logging_steps",
    "log_with": "report_to tracker wandb wandb_log tensorboard",
    "lr_schedule": "lr_scheduler_type decay_lr scheduler",
    "max_grad_norm": "grad_clip clip clip_norm",
    "max_steps": "steps num_steps iters iterations max_iters lr_decay_iters epochs num_epochs num_train_epochs",
    "micro_batch_size": "batch bs batch_size per_device_train_batch_size auto_find_batch_size",
    "min_lr_ratio": "min_lr",
    "mixed_precision": "precision dtype bf16 fp16 tf32 amp",
    "num_workers": "dataloader_num_workers",
    "optimizer": "optim",
    "output_dir": "out out_dir output save_dir",
    "save_every": "save_interval save_steps save_strategy checkpoint_every always_save_checkpoint",
    "warmup_steps": "warmup warmup_iters warmup_ratio",
    "weight_decay": "decay wd",
}
"""Names of the settings of `TrainerConfig` in other programs, such as nanoGPT and transformers."""

OTHER_ARGUMENTS = {
    "model": "model_init",
    "config": "args",
    "train_dataset": "train_data data",
    "eval_dataset": "val_dataset eval_data val_data",
    "optimizer": "optim optimizers optimizer_cls_and_kwargs",
    "schedule": "scheduler lr_scheduler optimizers",
    "callbacks": "compute_metrics",
}
"""Names of the arguments of `Trainer` in other programs."""

_FSDP2 = "use FSDP2, with accelerate launch --config_file accelerate_configs/fsdp2.yaml."
_LORA = "Add an adapter to the model: add_lora(model, LoRAConfig(...)), or PEFT's get_peft_model."

ADVICE = {
    **dict.fromkeys(OTHER_NAMES, "It is a setting of TrainerConfig."),
    **dict.fromkeys(("n_layer", "n_head", "n_embd", "dropout", "vocab_size"), "It is a setting of GPTConfig."),
    "backend": "Accelerate chooses it.",
    "bias": "A GPT has biases, as GPT-2 does; load_nanogpt sets missing ones to zero.",
    "block_size": "The sequence length is that of train_dataset.",
    "data_collator": "The Trainer pads and batches the samples of train_dataset itself.",
    "dataset": "Pass the data to the Trainer, as train_dataset.",
    "decay_lr": "Choose the decay with lr_schedule, or use none with Trainer(..., schedule=lambda step: 1.0).",
    "deepspeed": f"DeepSpeed is not supported: {_FSDP2}",
    "device": "Accelerate chooses the device; to train on the CPU, set ACCELERATE_USE_CPU=true.",
    "eval_only": "Use trainer.evaluate().",
    "fsdp": f"The launcher decides: {_FSDP2}",
    "gradient_accumulation_steps": "Use global_batch_tokens, the tokens of a step over all processes.",
    "init_from": "Use train(resume=True) to resume, or GPT.from_pretrained for the weights of GPT-2.",
    "load_best_model_at_end": "The best checkpoint is kept: open it with load_model(path).",
    "lora_config": _LORA,
    "min_lr": "Use min_lr_ratio, which is min_lr / learning_rate.",
    "num_train_epochs": "Use max_steps, which is epochs * tokens / global_batch_tokens.",
    "overwrite_output_dir": "Use train(overwrite=True).",
    "peft_config": _LORA,
    "processing_class": "The Trainer uses the tokenizer of train_dataset.",
    "push_to_hub": "After training, use model.push_to_hub(name).",
    "resume_from_checkpoint": "Use train(resume=True), or train(resume=...) with the path of a checkpoint.",
    "run_name": "Trackers show the name of the folder output_dir.",
    "tokenizer": "The Trainer uses the tokenizer of train_dataset.",
    "wandb_project": 'Use log_with="wandb", and set the environment variable WANDB_PROJECT.',
    "wandb_run_name": 'Use log_with="wandb", and set the environment variable WANDB_NAME.',
}
"""What to do instead, for arguments without an equal counterpart."""
