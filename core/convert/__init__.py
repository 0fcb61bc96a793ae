"""Other formats and other forms of a trained model: factorized, int8, GPT-2, the exported MLA."""
