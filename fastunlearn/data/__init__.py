"""Data sets: what a model learns, forgets and keeps."""
