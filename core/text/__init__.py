"""Text and tokens: tokenizers, data sets, reading and writing them."""
