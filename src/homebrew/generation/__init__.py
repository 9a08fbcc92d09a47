"""Text generation: decoding, sampling, the key-value cache and streaming."""
