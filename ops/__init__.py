"""What the two models call: fast kernels, decoding, optimizers. Knows no model, no command line and no file."""
