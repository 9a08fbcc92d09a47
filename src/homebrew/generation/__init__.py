"""Text generation: decoding, sampling, the key-value cache, streaming, and other models' own `generate`."""
