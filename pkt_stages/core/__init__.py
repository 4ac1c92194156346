"""The transfer science: tensors in, tensors out. Nothing here knows of models, files or the command line."""
