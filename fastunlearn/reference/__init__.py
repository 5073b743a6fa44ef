"""Every op in plain PyTorch: the definition, the default anywhere, the oracle of the tests."""
