"""The only door to transformers and peft: loading, where neurons lie, capturing activations, merging deltas."""
