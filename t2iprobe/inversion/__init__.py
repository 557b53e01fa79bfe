"""Teach a model a word: textual inversion, DreamBooth-LoRA and Custom Diffusion, stopped in time."""
