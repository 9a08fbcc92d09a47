"""Data: from a text to the micro-batches of a training step.

- `tokenizer`, `gpt2_vocabulary`: the `Tokenizer` protocol and the built-in tokenizers.
- `corpora`, `download`, `text_file`: texts by name, cached downloads, text files.
- `prepare`, `token_file`, `token_metadata`, `token_ids`: tokenize text files of any size into token files (`.npy`).
- `dataset`, `windows`, `token_source`: `TokenDataset`, windows over tokens in memory or in token files.
- `sampler`, `sample_rng`, `loader`, `validation`: sample order, random numbers of datasets, batches, checks.

To train on another format, use one of three ways:

- Pass the `Trainer` any map-style dataset whose samples are `(input_ids, targets)`, two int64 tensors of equal length.
  `validation.check_dataset` states the rules. Nothing needs to be registered.
- Convert the data to token files with `token_file.write_tokens`, and read them by `TokenDataset.from_shards`.
- Implement `token_source.TokenSource` and pass it to `TokenDataset`, to read tokens directly from another format.
"""
