"""Property tests: cases of every kind for every public op (draws.py), `make fuzz`."""

#: the files that hold them
FILES = ("test_layers", "test_lists", "test_losses", "test_matrices", "test_selection")
