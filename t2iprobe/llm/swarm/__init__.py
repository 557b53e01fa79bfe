"""A model served by several machines that come and go (Petals, arXiv 2209.01188)."""
