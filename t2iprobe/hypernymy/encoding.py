"""Prompts → the arguments of a pipeline's call: every distinct prompt is encoded once."""

import inspect
import itertools
import threading
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

from t2iprobe.errors import UserError
from t2iprobe.pipelines import Pipeline, accepted_arguments

if TYPE_CHECKING:
    import torch

EMBEDDINGS_BYTES = 4 << 30  # of prompts' embeddings kept in RAM: 860 of Flux

# What a family's encode_prompt returns, by the names under which its call takes it back (None: not taken).
# Families that are not here are given their prompts as text.
_GUIDED = ("prompt_embeds", "negative_prompt_embeds")
_POOLED = (*_GUIDED, "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
_MASKED = (
    "prompt_embeds",
    "prompt_attention_mask",
    "negative_prompt_embeds",
    "negative_prompt_attention_mask",
)
ENCODED: dict[str, tuple[str | None, ...]] = {
    "StableDiffusionPipeline": _GUIDED,
    "IFPipeline": _GUIDED,
    "LatentConsistencyModelPipeline": ("prompt_embeds", None),
    "StableDiffusionXLPipeline": _POOLED,
    "StableDiffusion3Pipeline": _POOLED,
    "KolorsPipeline": _POOLED,
    "FluxPipeline": ("prompt_embeds", "pooled_prompt_embeds", None),
    "PixArtAlphaPipeline": _MASKED,
    "PixArtSigmaPipeline": _MASKED,
    "SanaPipeline": _MASKED,
    "AuraFlowPipeline": _MASKED,
}


class PromptEncoder:
    """Encode prompts by a pipeline's own text encoders, from any thread, and keep their embeddings."""

    def __init__(self, pipeline: Pipeline, *, average_lines: bool = False, alone: bool = True) -> None:
        """With `average_lines` a prompt of several lines is the mean of its lines' embeddings.

        `alone` each prompt is encoded by itself, so that its embeddings do not depend on the others.
        Raises UserError for a family whose embeddings have no mean.
        """
        self.pipeline = pipeline
        self.device: torch.device = pipeline._execution_device
        self.average_lines = average_lines
        self._names = ENCODED.get(type(pipeline).__name__, ())
        if average_lines and self._names not in (_GUIDED, _POOLED):
            raise UserError(
                f"the embeddings of a {type(pipeline).__name__} have no mean: leave mean_conditioning out"
            )
        self._together = not alone and self._names == _GUIDED  # those have no masks
        self._embeddings: dict[str, tuple[torch.Tensor | None, ...]] = {}
        self._embedded_bytes = 0
        self._unconditional: tuple[torch.Tensor | None, ...] | None = None
        self._lock = threading.Lock()

    @property
    def known_prompts(self) -> Collection[str]:
        """The prompts whose embeddings are kept."""
        return self._embeddings.keys()

    def encode(self, prompts: Sequence[str]) -> dict[str, Any]:
        """Return the call's arguments for `prompts`. Every distinct prompt is encoded once."""
        import torch

        if not self._names:
            return {"prompt": list(prompts)}
        with self._lock, torch.inference_mode():
            lines = {
                prompt: (prompt.splitlines() if self.average_lines else None) or [prompt]
                for prompt in prompts
            }
            embedded = self._embed(list(itertools.chain(*lines.values())))
            found = {prompt: _average([embedded[line] for line in parts]) for prompt, parts in lines.items()}
        arguments: dict[str, Any] = {}
        for column, name in enumerate(self._names):
            parts = [found[prompt][column] for prompt in prompts]
            if name is not None and parts[0] is not None:
                with torch.inference_mode():
                    arguments[name] = torch.cat(parts).to(self.device)  # type: ignore[arg-type]
        return arguments | accepted_arguments(self.pipeline, negative_prompt=None)

    def _embed(self, texts: Sequence[str]) -> "dict[str, tuple[torch.Tensor | None, ...]]":
        """Return the texts' embeddings, kept from before where there was room."""
        found = {text: self._embeddings[text] for text in texts if text in self._embeddings}
        new = [text for text in dict.fromkeys(texts) if text not in found]
        size = max(1, len(new)) if self._together else 1
        for start in range(0, len(new), size):
            group = new[start : start + size]
            for text, embedded in zip(group, self._encode(group), strict=True):
                found[text] = embedded
                # What has no room is encoded again: a plan goes round its prompts, and whatever were thrown
                # out for it would be the next to be asked for.
                nbytes = sum(
                    part.numel() * part.element_size()
                    for part in embedded
                    if part is not None and not any(part is shared for shared in self._unconditional or ())
                )
                if self._embedded_bytes + nbytes <= EMBEDDINGS_BYTES:
                    self._embeddings[text] = embedded
                    self._embedded_bytes += nbytes
        return found

    def _encode(self, texts: Sequence[str]) -> "list[tuple[torch.Tensor | None, ...]]":
        import torch

        shared = self._unconditional
        # What the call would pass on by default, such as Sana's instruction to its language model.
        call = inspect.signature(self.pipeline.__call__).parameters
        defaults = {
            name: call[name].default for name in call if call[name].default is not inspect.Parameter.empty
        }
        arguments = defaults | {
            "device": self.device,
            "do_classifier_free_guidance": shared is None,
        }
        known = inspect.signature(self.pipeline.encode_prompt).parameters
        encoded = self.pipeline.encode_prompt(
            texts[0] if len(texts) == 1 else list(texts),
            **{name: value for name, value in arguments.items() if name in known and name != "prompt"},
        )
        # Kept on the CPU: the embeddings of 860 prompts can be gigabytes. The unconditional ones are shared.
        parts = [part.cpu() if isinstance(part, torch.Tensor) else None for part in encoded]
        if shared is None:
            self._unconditional = shared = tuple(
                part[:1] if part is not None and name is not None and name.startswith("negative") else None
                for part, name in zip(parts, self._names, strict=False)
            )
        rows = [parts]
        if len(texts) > 1:
            rows = [
                [part if part is None else part[row, None] for part in parts] for row in range(len(texts))
            ]
        return [
            tuple(
                part if other is None else other
                for part, other in itertools.zip_longest(row, shared, fillvalue=None)
            )
            for row in rows
        ]


def _average(
    embeddings: "Sequence[tuple[torch.Tensor | None, ...]]",
) -> "tuple[torch.Tensor | None, ...]":
    """Return the mean of prompts' embeddings, column by column."""
    import torch

    if len(embeddings) == 1:
        return embeddings[0]
    return tuple(
        None if column[0] is None else torch.stack(column).mean(dim=0)
        for column in zip(*embeddings, strict=True)
    )
