"""Lossless draft trees: grow guesses, verify them in one pass of the target, keep what it confirms."""
