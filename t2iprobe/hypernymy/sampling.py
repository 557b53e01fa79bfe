"""Samplers: plan entries → pictures, from a diffusers pipeline or a folder of pictures made elsewhere."""

import copy
import inspect
import itertools
import threading
import time
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from t2iprobe.acceleration import compile_networks, stop_compiling
from t2iprobe.config import DEFAULT_BATCH
from t2iprobe.devices import count_threads, inference_context, is_out_of_memory, release_memory
from t2iprobe.errors import UserError
from t2iprobe.hypernymy.batching import MOST, MOST_ON_CPU, BatchSizes, find_memory
from t2iprobe.pictures import picture_files, read_picture
from t2iprobe.pipelines import Pipeline, accepted_arguments, first_line, setting_arguments
from t2iprobe.runs import PlanEntry, picture_seed

if TYPE_CHECKING:
    import torch

    from t2iprobe.hypernymy.hierarchy import Hierarchy

__all__ = ["DiffusersSampler", "FolderSampler", "Sampler", "list_pictures", "picture_seed", "read_picture"]


MOST_LANES = 8  # each has its own activations in RAM
EMBEDDINGS_BYTES = 4 << 30  # of prompts' embeddings kept in RAM: 860 of Flux


class Stopped(Exception):
    """A batch was given up because the run is stopping."""


class Sampler(Protocol):
    """Whatever turns plan entries into pictures. `sample` is called from `workers` threads at once."""

    workers: int
    sizes: BatchSizes

    def stop(self) -> None:
        """Let batches under way end soon, with Stopped."""
        ...

    def resume(self) -> None:
        """Draw again after `stop`."""
        ...

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


class DiffusersSampler:
    """Draw pictures with a diffusers pipeline, in batches across prompts, from several threads at once.

    Each picture has its own generator on the CPU, seeded by its entry, so that it is the same in any batch
    and on any device, to rounding. In float32 on a CPU each picture is computed alone, which makes it exactly
    the same: kernels may sum in another order for another batch size.

    A CPU has a lane for each of torch's threads, up to MOST_LANES: so many batches are drawn at the same
    time and never wait for each other. Elsewhere one batch is drawn while another is judged.
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
        batch_size: int | None = None,
        lanes: int | None = None,
        compiled: bool = False,
    ) -> None:
        """Take a pipeline that `place_pipeline` placed in `dtype`; None leaves a setting to the pipeline.

        With `average_lines` a prompt of several lines is drawn from the mean of its lines' embeddings. Raises
        UserError for a family whose embeddings have no mean. `batch_size` None is found while drawing,
        `lanes` None are as many as suit the device. `compiled` networks are compiled at their first batch;
        where that fails there is a warning, and they run as they are.
        """
        self.pipeline = pipeline
        self.dtype = dtype
        self.average_lines = average_lines
        self.configure(steps=steps, guidance=guidance, size=size)
        self._names = ENCODED.get(type(pipeline).__name__, ())
        if average_lines and self._names not in (_GUIDED, _POOLED):
            raise UserError(
                f"the embeddings of a {type(pipeline).__name__} have no mean: leave mean_conditioning out"
            )
        self._embeddings: dict[str, tuple[torch.Tensor | None, ...]] = {}
        self._embedded_bytes = 0
        self._unconditional: tuple[torch.Tensor | None, ...] | None = None
        self._encoding = threading.Lock()
        self._stopped = threading.Event()
        self._compiled = compiled
        if compiled:
            compile_networks(pipeline)
        kind = self._device.type
        self.lanes = lanes or (min(count_threads(), MOST_LANES) if kind == "cpu" else 1)
        self.workers = self.lanes if kind == "cpu" else self.lanes + 1
        self._free_lanes = threading.Semaphore(self.lanes)
        self._alone = dtype == "float32" and kind == "cpu"
        # There text encoders stay in float32, whose rounding bfloat16 does not see; prompts have no masks.
        self._together = kind == "cpu" and not self._alone and self._names == _GUIDED
        self.sizes = BatchSizes(
            batch_size or (DEFAULT_BATCH if self._alone else None),
            memory=find_memory(str(self._device)),
            lanes=self.lanes,
            most=MOST_ON_CPU if kind == "cpu" else MOST,
        )

    @property
    def _device(self) -> "torch.device":
        return self.pipeline._execution_device

    def configure(self, *, steps: int | None, guidance: float | None, size: int | None) -> None:
        """Draw with other settings from now on; the embeddings of prompts are kept."""
        self._settings = setting_arguments(self.pipeline, steps, guidance, size)

    def stop(self) -> None:
        """Let batches that other threads draw end at their next step, with Stopped."""
        self._stopped.set()

    def resume(self) -> None:
        """Draw again after `stop`."""
        self._stopped.clear()

    def sample(self, entries: Sequence[PlanEntry]) -> list[np.ndarray | None]:
        """Return a picture uint8 [H, W, 3] for each entry. A batch that does not fit the memory is halved.

        Raises UserError naming the first picture that holds NaN even when its latents are decoded in float32,
        and where not even one picture fits.
        """
        with self._free_lanes:
            begin = time.perf_counter()
            size = 1 if self._alone else len(entries)
            drawn = [self._draw(entries[start : start + size]) for start in range(0, len(entries), size)]
            self.sizes.learn(len(entries), time.perf_counter() - begin)
        return [picture for batch in drawn for picture in batch]

    def _draw(self, entries: Sequence[PlanEntry]) -> np.ndarray:
        """Draw a batch, uint8 [n, H, W, 3], in halves where the memory is too small."""
        compiled = self._compiled
        try:
            return self._draw_at_once(entries)
        except (UserError, Stopped):
            raise
        except Exception as error:
            if not is_out_of_memory(error):
                if not compiled:
                    raise
                self._stop_compiling(error)
                return self._draw(entries)
            if len(entries) == 1:
                raise UserError(
                    f"not even one picture fits the memory of {self._device} ({first_line(error)}): "
                    "draw smaller ones (--size), or on a larger device"
                ) from None
        # Out here nothing holds on to what the failed batch took.
        release_memory(str(self._device))
        self.sizes.shrink(len(entries))
        half = -(-len(entries) // 2)
        return np.concatenate([self._draw(entries[:half]), self._draw(entries[half:])])

    def _draw_at_once(self, entries: Sequence[PlanEntry]) -> np.ndarray:
        import torch

        generators = [torch.Generator("cpu").manual_seed(entry.seed) for entry in entries]
        prompts = self.encode([entry.prompt for entry in entries])
        pipeline = _copy_for_a_batch(self.pipeline)
        decoder = _DecoderWatch(pipeline)
        with inference_context(self._device.type, self.dtype):
            pictures = pipeline(
                **prompts,
                **self._settings,
                **accepted_arguments(
                    pipeline,
                    generator=generators,
                    output_type="np",
                    callback_on_step_end=self._end_step,
                ),
            ).images
        pictures = np.asarray(pictures, np.float32)
        broken = ~np.isfinite(pictures).all(axis=(1, 2, 3))
        if broken.any():
            with torch.inference_mode():
                pictures[broken] = decoder.decode_again(np.flatnonzero(broken))
            self._refuse_broken(pictures, entries)
        return (pictures * 255).round().clip(0, 255).astype(np.uint8)

    def _stop_compiling(self, error: Exception) -> None:
        with self._encoding:
            if self._compiled:
                self._compiled = False
                stop_compiling(self.pipeline, error)

    def _end_step(self, *_: Any) -> dict[str, Any]:
        if self._stopped.is_set():
            raise Stopped
        return {}

    def _refuse_broken(self, pictures: np.ndarray, entries: Sequence[PlanEntry]) -> None:
        for picture, entry in zip(pictures, entries, strict=True):
            if not np.isfinite(picture).all():
                raise UserError(
                    f"the picture {entry.name} of {entry.synset} ({entry.prompt!r}) holds NaN "
                    f"in {self.dtype}: try --dtype bfloat16 or float32; what is drawn so far is kept"
                )

    @property
    def known_prompts(self) -> Collection[str]:
        """The prompts whose embeddings are kept."""
        return self._embeddings.keys()

    def encode(self, prompts: Sequence[str]) -> dict[str, Any]:
        """Return the call's arguments for `prompts`. Every distinct prompt is encoded once."""
        import torch

        if not self._names:
            return {"prompt": list(prompts)}
        with self._encoding, torch.inference_mode():
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
                    arguments[name] = torch.cat(parts).to(self._device)  # type: ignore[arg-type]
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
        arguments = defaults | {"device": self._device, "do_classifier_free_guidance": shared is None}
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


def _copy_for_a_batch(pipeline: Pipeline) -> Pipeline:
    """Copy what a call changes (scheduler, decoder's method, the pipeline's own notes), not the networks."""
    own = copy.copy(pipeline)
    for name in ("scheduler", "prior_scheduler", "decoder_scheduler"):
        if getattr(own, name, None) is not None:
            setattr(own, name, copy.deepcopy(getattr(own, name)))
    autoencoder = _name_autoencoder(own)
    if autoencoder is not None:
        setattr(own, autoencoder, copy.copy(getattr(own, autoencoder)))
    return own


def _name_autoencoder(pipeline: Pipeline) -> str | None:
    names = (name for name in ("vae", "vqvae", "movq") if hasattr(getattr(pipeline, name, None), "decode"))
    return next(names, None)


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


class _DecoderWatch:
    """Remember the latents that a batch's autoencoder was last given, to decode them again in float32.

    The autoencoders of SD 1 and SDXL overflow float16 on some latents, and the picture is NaN.
    """

    def __init__(self, pipeline: Pipeline) -> None:
        name = _name_autoencoder(pipeline)
        self._latents: torch.Tensor | None = None
        if name is None:
            return
        self._autoencoder: Any = getattr(pipeline, name)
        decode = self._autoencoder.decode

        def remember(latents: "torch.Tensor", *arguments: Any, **named: Any) -> Any:
            self._latents = latents
            decoded = decode(latents, *arguments, **named)
            if isinstance(decoded, tuple):
                return (decoded[0].float(), *decoded[1:])
            decoded.sample = decoded.sample.float()  # numpy, which some families ask for, has no bfloat16
            return decoded

        self._autoencoder.decode = remember  # of this batch's own copy

    def decode_again(self, rows: np.ndarray) -> np.ndarray | float:
        """Return the pictures float32 [n, H, W, 3] of the batch's `rows`, or NaN where it cannot be done."""
        import torch

        if self._latents is None:
            return np.nan
        del self._autoencoder.decode
        autoencoder = copy.deepcopy(self._autoencoder).float()
        latents = self._latents[torch.from_numpy(rows).to(self._latents.device)].float()
        decoded = autoencoder.decode(latents, return_dict=False)[0]
        return (decoded / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).cpu().numpy()


class FolderSampler:
    """Read pictures made elsewhere, ``DIR/<synset>/*``, so that any model can be probed.

    Transparent parts become white; the orientation that a camera noted is applied.
    """

    def __init__(self, folder: str | Path, *, skip_bad: bool = False, batch_size: int | None = None) -> None:
        self.folder = Path(folder)
        self.skip_bad = skip_bad
        self.workers = count_threads()
        self.sizes = BatchSizes(batch_size or DEFAULT_BATCH, lanes=self.workers)

    def stop(self) -> None:
        """Nothing: reading a batch of files is short."""

    def resume(self) -> None:
        """Nothing."""

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
