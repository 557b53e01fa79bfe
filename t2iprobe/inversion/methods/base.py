"""What a method is."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch

from t2iprobe.errors import UserError
from t2iprobe.inversion.backbones import Backbone
from t2iprobe.inversion.embeddings import Rows
from t2iprobe.inversion.formats import Embedding, fit_vectors, read_embedding, write_embedding


class Method:
    """Parameters put into a backbone, to be trained for one concept, or for several whose rows alone differ.

    `remove` takes them out again; the pipeline is then what it was.
    """

    name: ClassVar[str]
    families: ClassVar[tuple[str, ...]]
    shares_pass: ClassVar[bool] = False  # several concepts in one pass of the denoiser
    uses_prior: ClassVar[bool] = False
    # Of the published runs (arXiv 2302.04841, appendix): steps at most.
    max_steps: ClassVar[int]
    batch: ClassVar[int] = 4  # pictures a step
    rate: ClassVar[float]  # of the weights, AdamW
    # Of the rows, in units of the vocabulary's root mean square: what suits SD's .014 suits no other model.
    row_rate: ClassVar[float]

    def __init__(self, backbone: Backbone, tokens: Mapping[str, int], rank: int = 4, seed: int = 0) -> None:
        """Put rows for `tokens` (token → number of vectors) and the method's weights into the backbone.

        `rank` and `seed` are those of adapters.
        """
        self.check(backbone)
        self.backbone = backbone
        self.rank = rank
        self.rows = Rows(backbone.encoders, tokens)

    @classmethod
    def check(cls, backbone: Backbone) -> None:
        """Raise UserError where the method cannot train this pipeline."""
        family = type(backbone.pipeline).__name__
        if family not in cls.families:
            raise UserError(f"{cls.name} cannot train a {family}: {', '.join(cls.families)} can be")

    def weights(self) -> list[torch.nn.Parameter]:
        """Return the trainable weights beside the rows, float32."""
        return []

    def parameter_groups(
        self, token: str, rate: float | None, row_rate: float | None
    ) -> list[dict[str, Any]]:
        """Return AdamW's groups for one token; None takes the method's own rate."""
        relative = self.row_rate if row_rate is None else row_rate
        groups: list[dict[str, Any]] = [
            {"params": [rows], "lr": relative * self.rows.vocabulary_rms(name), "weight_decay": 0.0}
            for name, rows in self.rows.parameters(token).items()
        ]
        if weights := self.weights():
            groups.append(
                {"params": weights, "lr": self.rate if rate is None else rate, "weight_decay": 0.01}
            )
        return groups

    def save(self, token: str, folder: Path, metadata: Mapping[str, str]) -> list[str]:
        """Write what was trained for `token` into `folder`. Returns the files' names.

        The rows are written twice: for diffusers, and under the token's name as the UIs load them.
        """
        vectors = self.rows.vectors(token)
        embedding = Embedding(token, vectors, dict(metadata))
        written = write_embedding(folder / "learned_embeds.safetensors", embedding, "diffusers")
        if "bert" not in vectors:  # no UI runs LDM
            written += write_embedding(folder / name_interface_file(token), embedding, "kohya")
        return [path.name for path in written]

    def load(self, token: str, folder: Path) -> None:
        """Put what `save` wrote back into the backbone."""
        (embedding,) = read_embedding(folder / "learned_embeds.safetensors", token)
        self.rows.set(token, fit_vectors(embedding, self.backbone.encoders))

    def remove(self) -> None:
        """Take rows and weights out of the backbone."""
        self.rows.remove()


def name_interface_file(token: str) -> str:
    """Return the file's name by which user interfaces know a token: its own, where no other file has that."""
    name = token.strip("<>")
    taken = name == "state" or name.startswith(("learned_embeds", "pytorch_"))
    return f"{'token-' if taken else ''}{name}.safetensors"
