"""Textual inversion (arXiv 2208.01618): the rows alone."""

from t2iprobe.inversion.methods.base import Method


class TextualInversion(Method):
    """Train nothing but the token's rows: the model stays as it is, and several concepts share a pass."""

    name = "textual-inversion"
    families = (
        "StableDiffusionPipeline",
        "StableDiffusionXLPipeline",
        "LDMTextToImagePipeline",
        "FluxPipeline",
    )
    shares_pass = True
    max_steps = 6100
    batch = 2  # four teach a row no better (benchmarks/inversion.py), and fewer concepts fit into a pass
    rate = 0.0
    row_rate = 0.05
