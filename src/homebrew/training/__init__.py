"""Training: the Trainer, one optimizer step, and what they are built from.

trainer.py holds the loop, train_step.py one step, and setup.py assembles the parts. To add

- an optimizer: optimizer.py builds it, `build_parts` in setup.py chooses it, trainer_config.py has its settings;
- a schedule: schedule.py has the functions, `TrainerConfig.schedule` chooses one;
- a precision: `mixed_precision` in trainer_config.py, and `build_accelerator` in distributed/accelerator.py.
"""
