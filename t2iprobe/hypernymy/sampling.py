"""Samplers: plan entries → pictures, here from a diffusers pipeline."""

import threading
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from t2iprobe.compiling import compile_networks, stop_compiling
from t2iprobe.config import DEFAULT_BATCH
from t2iprobe.decoding import DecoderWatch, copy_for_a_batch
from t2iprobe.devices import count_threads, inference_context, is_out_of_memory, release_memory
from t2iprobe.errors import UserError
from t2iprobe.hypernymy.batching import MOST, MOST_ON_CPU, BatchSizes, find_memory
from t2iprobe.hypernymy.encoding import PromptEncoder
from t2iprobe.pipelines import (
    Pipeline,
    accepted_arguments,
    check_settings,
    first_line,
    setting_arguments,
)
from t2iprobe.runs import PlanEntry

if TYPE_CHECKING:
    import torch

MOST_LANES = 8  # each has its own activations in RAM


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
        self.device: torch.device = pipeline._execution_device  # found by looking through all networks
        self.dtype = dtype
        self.configure(steps=steps, guidance=guidance, size=size)
        kind = self.device.type
        self._alone = dtype == "float32" and kind == "cpu"
        # In bfloat16 text encoders stay in float32 on a CPU: what a group of prompts moves is not seen.
        self.encoder = PromptEncoder(
            pipeline, average_lines=average_lines, alone=self._alone or kind != "cpu"
        )
        self._stopped = threading.Event()
        self._compiled = compiled
        self._changing = threading.Lock()
        if compiled:
            compile_networks(pipeline)
        self.lanes = lanes or (min(count_threads(), MOST_LANES) if kind == "cpu" else 1)
        self.workers = self.lanes if kind == "cpu" else self.lanes + 1
        self._free_lanes = threading.Semaphore(self.lanes)
        self.sizes = BatchSizes(
            batch_size or (DEFAULT_BATCH if self._alone else None),
            memory=find_memory(str(self.device)),
            lanes=self.lanes,
            most=MOST_ON_CPU if kind == "cpu" else MOST,
        )

    def configure(self, *, steps: int | None, guidance: float | None, size: int | None) -> None:
        """Draw with other settings from now on; the embeddings of prompts are kept.

        Raises UserError for one that the pipeline does not take, as far as it can be asked.
        """
        check_settings(self.pipeline, steps, size)
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
                    f"not even one picture fits the memory of {self.device} ({first_line(error)}): "
                    "draw smaller ones (--size), or on a larger device"
                ) from None
        # Out here nothing holds on to what the failed batch took.
        release_memory(str(self.device))
        self.sizes.shrink(len(entries))
        half = -(-len(entries) // 2)
        return np.concatenate([self._draw(entries[:half]), self._draw(entries[half:])])

    def _draw_at_once(self, entries: Sequence[PlanEntry]) -> np.ndarray:
        import torch

        generators = [torch.Generator("cpu").manual_seed(entry.seed) for entry in entries]
        prompts = self.encoder.encode([entry.prompt for entry in entries])
        pipeline = copy_for_a_batch(self.pipeline)
        decoder = DecoderWatch(pipeline)
        arguments = accepted_arguments(
            pipeline, generator=generators, output_type="np", callback_on_step_end=self._end_step
        )
        with inference_context(self.device.type, self.dtype):
            try:
                pictures = pipeline(**prompts, **self._settings, **arguments).images
            except (TypeError, ValueError) as error:
                if self._compiled:
                    raise
                family, by = type(pipeline).__name__, type(getattr(pipeline, "scheduler", None)).__name__
                raise UserError(
                    f"{family} cannot draw with these settings, by {by}: {first_line(error)}"
                ) from error
        pictures = decoder.mend(pictures)
        self._refuse_broken(pictures, entries)
        return (pictures * 255).round().clip(0, 255).astype(np.uint8)

    def _stop_compiling(self, error: Exception) -> None:
        with self._changing:
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
