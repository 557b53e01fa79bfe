"""Lossless draft trees: guesses grown into a tree, verified in one pass of the target, kept where confirmed."""
