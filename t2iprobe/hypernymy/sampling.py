"""Samplers: plan entries → pictures, from a diffusers pipeline or a folder of pictures made elsewhere."""

import copy
import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self

import numpy as np

from t2iprobe.devices import inference_context
from t2iprobe.errors import UserError
from t2iprobe.pictures import picture_files, read_picture
from t2iprobe.pipelines import Pipeline, accepted_arguments, setting_arguments
from t2iprobe.runs import PlanEntry, picture_seed

if TYPE_CHECKING:
    import torch

    from t2iprobe.hypernymy.hierarchy import Hierarchy

__all__ = ["DiffusersSampler", "FolderSampler", "Sampler", "list_pictures", "picture_seed", "read_picture"]


class Sampler(Protocol):
    """Whatever turns plan entries into pictures."""

    def sample(self, entries: Sequence[PlanEntry]) -> Sequence[np.ndarray | None]:
        """Return a picture uint8 [H, W, 3] for each entry, None for one that was skipped."""
        ...


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
    "StableDiffusionXLPipeline": _POOLED,
    "StableDiffusion3Pipeline": _POOLED,
    "KolorsPipeline": _POOLED,
    "FluxPipeline": ("prompt_embeds", "pooled_prompt_embeds", None),
    "PixArtAlphaPipeline": _MASKED,
    "PixArtSigmaPipeline": _MASKED,
    "SanaPipeline": _MASKED,
    "AuraFlowPipeline": _MASKED,
}


class DiffusersSampler:
    """Draw pictures with a diffusers pipeline, in batches across prompts.

    Each picture has its own generator on the CPU, seeded by its entry, so that it is the same in any batch
    and on any device, to rounding. In float32 each picture is computed alone, which makes it exactly the
    same: kernels may sum in another order for another batch size.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        *,
        steps: int | None = None,
        guidance: float | None = None,
        size: int | None = None,
        dtype: str = "float32",
        average_lines: bool = False,
    ) -> None:
        """Take a pipeline that `place_pipeline` placed in `dtype`; None leaves a setting to the pipeline.

        With `average_lines` a prompt of several lines is drawn from the mean of its lines' embeddings. Raises
        UserError for a family whose embeddings have no mean.
        """
        self.pipeline = pipeline
        self.dtype = dtype
        self.average_lines = average_lines
        self._settings = setting_arguments(pipeline, steps, guidance, size)
        self._embeddings: dict[str, tuple[torch.Tensor | None, ...]] = {}
        self._names = ENCODED.get(type(pipeline).__name__, ())
        if average_lines and self._names not in (_GUIDED, _POOLED):
            raise UserError(
                f"the embeddings of a {type(pipeline).__name__} have no mean: leave mean_conditioning out"
            )

    @property
    def _device(self) -> "torch.device":
        return self.pipeline._execution_device

    def configure(self, *, steps: int | None, guidance: float | None, size: int | None) -> None:
        """Draw with other settings from now on; the embeddings of prompts are kept."""
        self._settings = setting_arguments(self.pipeline, steps, guidance, size)

    def sample(self, entries: Sequence[PlanEntry]) -> list[np.ndarray | None]:
        """Return a picture uint8 [H, W, 3] for each entry.

        Raises UserError naming the first picture that holds NaN even when its latents are decoded in float32.
        """
        size = 1 if self.dtype == "float32" else len(entries)
        drawn = [self._draw(entries[start : start + size]) for start in range(0, len(entries), size)]
        return [picture for batch in drawn for picture in batch]

    def _draw(self, entries: Sequence[PlanEntry]) -> np.ndarray:
        import torch

        generators = [torch.Generator("cpu").manual_seed(entry.seed) for entry in entries]
        prompts = self._encode([entry.prompt for entry in entries])
        with inference_context(self._device.type, self.dtype), _DecoderWatch(self.pipeline) as decoder:
            pictures = self.pipeline(
                **prompts,
                **self._settings,
                **accepted_arguments(self.pipeline, generator=generators, output_type="np"),
            ).images
        pictures = np.asarray(pictures, np.float32)
        broken = ~np.isfinite(pictures).all(axis=(1, 2, 3))
        if broken.any():
            with torch.inference_mode():
                pictures[broken] = decoder.decode_again(np.flatnonzero(broken))
            self._refuse_broken(pictures, entries)
        return (pictures * 255).round().clip(0, 255).astype(np.uint8)

    def _refuse_broken(self, pictures: np.ndarray, entries: Sequence[PlanEntry]) -> None:
        for picture, entry in zip(pictures, entries, strict=True):
            if not np.isfinite(picture).all():
                raise UserError(
                    f"the picture {entry.name} of {entry.synset} ({entry.prompt!r}) holds NaN "
                    f"in {self.dtype}: try --dtype bfloat16 or float32; what is drawn so far is kept"
                )

    def _encode(self, prompts: Sequence[str]) -> dict[str, Any]:
        """Return the call's arguments for `prompts`. Every distinct prompt is encoded once, and alone."""
        import torch

        if not self._names:
            return {"prompt": list(prompts)}
        with torch.inference_mode():
            for prompt in dict.fromkeys(prompts):
                lines = prompt.splitlines() if self.average_lines else [prompt]
                for line in lines:
                    if line not in self._embeddings:
                        self._embeddings[line] = self._encode_one(line)
                if prompt not in self._embeddings:
                    self._embeddings[prompt] = _average([self._embeddings[line] for line in lines])
            arguments: dict[str, Any] = {}
            for column, name in enumerate(self._names):
                parts = [self._embeddings[prompt][column] for prompt in prompts]
                if name is not None and parts[0] is not None:
                    arguments[name] = torch.cat(parts).to(self._device)  # type: ignore[arg-type]
        return arguments | accepted_arguments(self.pipeline, negative_prompt=None)

    def _encode_one(self, prompt: str) -> "tuple[torch.Tensor | None, ...]":
        import torch

        first = next(iter(self._embeddings.values()), None)
        # What the call would pass on by default, such as Sana's instruction to its language model.
        call = inspect.signature(self.pipeline.__call__).parameters
        defaults = {
            name: call[name].default for name in call if call[name].default is not inspect.Parameter.empty
        }
        arguments = defaults | {"device": self._device, "do_classifier_free_guidance": first is None}
        known = inspect.signature(self.pipeline.encode_prompt).parameters
        encoded = self.pipeline.encode_prompt(
            prompt, **{name: value for name, value in arguments.items() if name in known and name != "prompt"}
        )
        # Kept on the CPU: the embeddings of 860 prompts can be gigabytes. The unconditional ones are shared.
        parts = [part.cpu() if isinstance(part, torch.Tensor) else None for part in encoded]
        return tuple(
            first[column] if part is None and first is not None else part for column, part in enumerate(parts)
        )


def _average(
    embeddings: "Sequence[tuple[torch.Tensor | None, ...]]",
) -> "tuple[torch.Tensor | None, ...]":
    """Return the mean of prompts' embeddings, column by column."""
    import torch

    return tuple(
        None if column[0] is None else torch.stack(column).mean(dim=0)
        for column in zip(*embeddings, strict=True)
    )


class _DecoderWatch:
    """Remember the latents that the pipeline's autoencoder was last given, to decode them again in float32.

    The autoencoders of SD 1 and SDXL overflow float16 on some latents, and the picture is NaN.
    """

    def __init__(self, pipeline: Pipeline) -> None:
        names = [
            name for name in ("vae", "vqvae", "movq") if hasattr(getattr(pipeline, name, None), "decode")
        ]
        self._autoencoder: Any = getattr(pipeline, names[0]) if names else None
        self._latents: torch.Tensor | None = None

    def __enter__(self) -> Self:
        if self._autoencoder is not None:
            decode = self._autoencoder.decode

            def remember(latents: "torch.Tensor", *arguments: Any, **named: Any) -> Any:
                self._latents = latents
                decoded = decode(latents, *arguments, **named)
                if isinstance(decoded, tuple):
                    return (decoded[0].float(), *decoded[1:])
                decoded.sample = decoded.sample.float()  # numpy, which some families ask for, has no bfloat16
                return decoded

            self._autoencoder.decode = remember  # hides the class's method until __exit__
        return self

    def __exit__(self, *error: object) -> None:
        if self._autoencoder is not None:
            del self._autoencoder.decode

    def decode_again(self, rows: np.ndarray) -> np.ndarray | float:
        """Return the pictures float32 [n, H, W, 3] of the batch's `rows`, or NaN where it cannot be done."""
        import torch

        if self._latents is None:
            return np.nan
        autoencoder = copy.deepcopy(self._autoencoder).float()
        latents = self._latents[torch.from_numpy(rows).to(self._latents.device)].float()
        decoded = autoencoder.decode(latents, return_dict=False)[0]
        return (decoded / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).cpu().numpy()


class FolderSampler:
    """Read pictures made elsewhere, ``DIR/<synset>/*``, so that any model can be probed.

    Transparent parts become white; the orientation that a camera noted is applied.
    """

    def __init__(self, folder: str | Path, *, skip_bad: bool = False) -> None:
        self.folder = Path(folder)
        self.skip_bad = skip_bad

    def sample(self, entries: Sequence[PlanEntry]) -> list[np.ndarray | None]:
        """Return a picture uint8 [H, W, 3] for each entry, whose prompt is its file's path in the folder.

        Raises UserError naming an unreadable file; with `skip_bad` its picture is None.
        """
        return [self._read(self.folder / entry.prompt) for entry in entries]

    def _read(self, path: Path) -> np.ndarray | None:
        try:
            return read_picture(path)
        except UserError:
            if self.skip_bad:
                return None
            raise


def list_pictures(folder: str | Path, hierarchy: "Hierarchy") -> dict[str, list[str]]:
    """Return synset name → its pictures' paths in `folder`, both sorted.

    Subfolders are synset names, wnids or lemmas.
    Raises UserError where a subfolder's name is no synset of the hierarchy, or there is no picture at all.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}: give one with a subfolder of pictures for each synset")
    pictures: dict[str, list[str]] = {}
    for subfolder in sorted(path for path in folder.iterdir() if path.is_dir() and path.name[0] != "."):
        if found := picture_files(subfolder):
            name = hierarchy.resolve(subfolder.name)
            pictures.setdefault(name, []).extend(path.relative_to(folder).as_posix() for path in found)
    if not pictures:
        raise UserError(f"{folder} holds no pictures: they are looked for in {folder}/<synset>/*")
    return {name: pictures[name] for name in sorted(pictures)}


def resize_picture(picture: np.ndarray, side: int) -> np.ndarray:
    """Resize a picture uint8 [H, W, 3] to a square by Pillow's bicubic filter, as was published."""
    from PIL import Image

    return np.array(Image.fromarray(picture).resize((side, side), Image.Resampling.BICUBIC))
