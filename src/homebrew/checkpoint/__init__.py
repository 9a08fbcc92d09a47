"""Checkpoints: what a run saves, how a save is committed to disk, and how a run resumes.

A checkpoint is a folder `checkpoints/step-00000500/` of a run:

- `model.safetensors`: the weights, under the names of the model without wrappers; with LoRA `adapter.safetensors`.
- `optimizer.safetensors`: the optimizer's tensors, as `<parameter>//<key>`.
- `guard.safetensors` and `rng-<rank>.safetensors`: the update guard, and each rank's random states.
- `state.json`: the position in the data, the optimizer's plain numbers, the run's identity, the tokenizer, the base
  model of an adapter, the number of processes and the precision.
- `manifest.json`: step, evaluation loss, and the size and SHA-256 of each file above. It is written last.

Checkpoints larger than `gather_limit_bytes` have folders `model/` and `optimizer/` with one file per rank instead.

`restore.load_run` runs all checks in order: `manifest` validates the files, `compatibility` checks that they belong to
the run, and `RunState.check` checks names, shapes, random states and, with `tensor_check`, that values are finite.
State that accepted changes have made invalid is not loaded.

The Trainer uses `manager.CheckpointManager`. `state_dict.RunState` gathers the state of a run, and restores it;
`store.CheckpointStore` lists, opens and prunes checkpoints; `run_folder` locks the folder of a run, and moves an
earlier run in it aside.
"""
