"""Measurements on trained models: tensors in, arrays, tables and figures out."""
