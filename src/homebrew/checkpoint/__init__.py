"""Checkpoints: what a run saves, how a save is committed to disk, and how a run resumes.

A checkpoint is a folder `checkpoints/step-00000500/` of a run:

- `model.safetensors`: the weights, under the names of the model without wrappers; with LoRA `adapter.safetensors`.
- `optimizer.safetensors`: the optimizer's tensors, as `<parameter>//<key>`.
- `guard.safetensors` and `rng-<rank>.safetensors`: the update guard, and each rank's random states.
- `state.json`: the optimizer's plain numbers, the run's identity, and the tokenizer.
- `manifest.json`: step, evaluation loss, and the size and SHA-256 of each of these files. It is written last.

Checkpoints that are too large for rank 0 have folders `model/` and `optimizer/` with one file per rank instead.

`manifest` validates files, `state_dict.check_files` their tensors, and `compatibility` that they belong to the run.
`manager.CheckpointManager` is what the Trainer uses; `store.CheckpointStore` lists, opens and prunes checkpoints.
"""
