"""Data: from a text to the micro-batches of a training step.

- `tokenizer`, `gpt2_tokenizer`, `byte_pair_tokenizer`: the `Tokenizer` protocol and homebrew's tokenizers.
- `train_tokenizer`, `tokenizer_json`: train a byte-level BPE; read and write its `tokenizer.json`.
- `corpora`, `download`, `text_file`: texts by name, cached downloads, text files.
- `preparation`: tokenize texts of any size into token files; `fast_tokenizer` makes it faster.
- `token_file`, `token_metadata`, `token_ids`: write and check token files (`.npy`).
- `token_formats`: token files of homebrew, nanoGPT and llm.c.
- `dataset`, `window_dataset`, `windows`, `token_source`: `TokenDataset`, windows over tokens in memory or token files.
- `samples`, `dict_dataset`, `text_column`: what samples of other datasets may be, their labels and texts.
- `sampler`, `sample_rng`, `collate`, `loader`, `validation`: sample order, reading, padding, batches, checks.

To train on another format, use one of four ways:

- Pass the `Trainer` any map-style dataset. `samples.as_sample` says what a sample may be.
- Convert the data to token files with `token_file.write_tokens`, and read them with `TokenDataset.from_shards`.
- Add a reader of another program's token files to `token_formats`.
- Implement `token_source.TokenSource` and pass it to `TokenDataset`, to read tokens directly from another format.
"""
