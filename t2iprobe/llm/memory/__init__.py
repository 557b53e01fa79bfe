"""Weights in slow memory: packed by layer, read ahead, held in few buffers."""
