"""Several processes: the Accelerator, FSDP2, collectives and signals."""
