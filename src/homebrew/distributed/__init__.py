"""Training on several processes through Accelerate.

- `accelerator`: builds or checks the run's Accelerator.
- `launch`: checks the launcher's settings, and shares the CPU cores among the processes.
- `precision`: chooses the run's precision, and describes what decided it.
- `fsdp`: configures FSDP2 for a model and gathers full weights.
- `collectives`: loss weights, flags, bytes and JSON over all ranks.
- `signals`: records signals for the training loop to handle between steps.
"""
