"""Training on several processes through Accelerate.

- `accelerator`: builds or checks the run's Accelerator, and checks the launch.
- `fsdp`: configures FSDP2 for a model and gathers full weights.
- `collectives`: loss weights, flags, bytes and JSON over all ranks.
- `signals`: records signals for the training loop to handle between steps.
"""
