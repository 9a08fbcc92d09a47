"""Checkpoints: what a run saves, how a save is committed to disk, and how a run resumes.

A checkpoint is a folder `checkpoints/step-00000500/` of a run:

- `model.safetensors`: the weights, under the names of the model without wrappers; with LoRA `adapter.safetensors`.
- `optimizer.safetensors`: the optimizer's tensors, as `<parameter>//<key>`.
- `guard.safetensors` and `rng-<rank>.safetensors`: the update guard, and each rank's random states.
- `state.json`: the position in the data, the optimizer's plain numbers, the run's identity, the tokenizer, the base
  model of an adapter, the number of processes and the precision.
- `manifest.json`: step, evaluation loss, and the size and SHA-256 of each of these files. It is written last.

Checkpoints larger than `gather_limit_bytes` have folders `model/` and `optimizer/` with one file per rank instead.

`restore.load_run` runs all checks in order: `manifest` validates the files, `compatibility` that they belong to the
run, `tensor_check` that values are finite, and `RunState.check` names, shapes and random states. It leaves out what
accepted changes have made invalid.

`manager.CheckpointManager` is what the Trainer uses. `state_dict.RunState` gathers the state of a run, and restores it;
`store.CheckpointStore` lists, opens and prunes checkpoints; `run_folder` locks the folder of a run, and moves an
earlier run in it aside.
"""
