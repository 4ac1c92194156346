"""The embedded pair of profile `tiny`: seeded data, one shared tokenizer, a trained source and a trained target."""
