"""Measurements of trained models: models and tensors in; arrays, tables and figures out. No training, no config."""
