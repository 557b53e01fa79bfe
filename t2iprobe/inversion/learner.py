"""One concept in training: its inputs, its optimiser, its stopper, and the state that survives a kill."""

import json
import math
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch

from t2iprobe.errors import UserError
from t2iprobe.inversion.concepts import Concept, Moments
from t2iprobe.inversion.methods import Method
from t2iprobe.inversion.objective import FixedInputs, Inputs, draw_inputs
from t2iprobe.inversion.settings import Training
from t2iprobe.inversion.stopping import make_stopper
from t2iprobe.storage import explain_full_disk, write_atomically

# Between two states: what a kill can cost.
STATE_SECONDS = float(os.environ.get("T2IPROBE_STATE_SECONDS", 5.0))
LOG_STEPS = 10
KEPT = ("step", "seconds", "seconds_grids", "curve", "bands", "statistic", "train_loss", "grids", "initial")


class Learner:
    """One concept in training: its inputs, optimiser, stopper and what has been seen so far."""

    def __init__(
        self,
        concept: Concept,
        out: Path,
        settings: Training,
        method: Method,
        moments: Moments,
        prior: tuple[Concept, Moments] | None,
        identity: dict[str, Any],
    ) -> None:
        self.concept, self.out, self.settings, self.method = concept, out, settings, method
        self.moments, self.prior, self.identity = moments, prior, identity
        options = {} if settings.every is None else {"every": settings.every}
        self.stopper = make_stopper(settings.stop, method.name, settings.max_steps, **options)
        published = settings.stop == "dvar"  # four inputs, as they fall
        self.items = 4 if published and "items" not in settings.model_fields_set else settings.items
        self.shape = moments.mean.shape[2:]
        self.fixed = FixedInputs(
            concept, self.shape, self.items, settings.seed,
            code=settings.fixed, stratified=not published, flip=settings.flip,
        )  # fmt: skip
        self.cap = settings.max_steps or method.max_steps
        self.batch = settings.batch or method.batch
        self.decay = settings.average if settings.average is not None else 0.0 if published else 0.95
        self.step = 0
        self.seconds = self.seconds_grids = 0.0
        self.curve: list[list[float]] = []
        self.bands: list[list[float]] = []
        self.statistic: list[list[float | None]] = []
        self.train_loss: list[list[float]] = []
        self.grids: list[dict[str, Any]] = []
        self.first_losses: torch.Tensor | None = None
        self.stopped: dict[str, Any] | None = None
        self.initial: dict[str, Any] = {}
        groups = method.parameter_groups(concept.token, settings.rate, settings.row_rate)
        self.parameters = [parameter for group in groups for parameter in group["params"]]
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999))
        self._sum = torch.zeros((), device=method.backbone.device)
        self._written = -math.inf
        self._good: list[torch.Tensor] = []

    def begin(self) -> None:
        """Remember the parameters as they are before training."""
        self.initial_values = self._copy()
        self.averages = self._copy()
        self._good = self._copy()

    def _copy(self) -> list[torch.Tensor]:
        return [parameter.detach().clone() for parameter in self.parameters]

    @contextmanager
    def _holding(self, values: Sequence[torch.Tensor]) -> Iterator[None]:
        """Put other values into the parameters, for a while."""
        trained = self._copy()
        self._assign(values)
        try:
            yield
        finally:
            self._assign(trained)

    def untrained(self) -> AbstractContextManager[None]:
        """Put the parameters back to what they were before training, for a while."""
        return self._holding(self.initial_values)

    def averaged(self) -> AbstractContextManager[None]:
        """Put the running average into the parameters, for a while: what is watched, drawn and kept.

        The last steps' noise is not part of what was learned (Polyak & Juditsky 1992).
        """
        return self._holding(self.averages)

    def settle(self) -> None:
        """Let the running average be the outcome."""
        self._assign(self.averages)

    @torch.no_grad()
    def _assign(self, values: Sequence[torch.Tensor]) -> None:
        for parameter, value in zip(self.parameters, values, strict=True):
            parameter.copy_(value)

    def training_inputs(self) -> list[Inputs]:
        """Return the inputs of the next step: the concept's, and the prior's where there is one."""
        key, flip = (self.settings.seed, self.concept.token, self.step), self.settings.flip
        own = draw_inputs(self.concept, self.shape, self.batch, key, flip=flip)
        if self.prior is None:
            return [own]
        return [own, draw_inputs(self.prior[0], self.shape, self.batch, (*key, "prior"), flip=flip)]

    def training_moments(self) -> list[Moments]:
        """Return the moments that go with `training_inputs`."""
        return [self.moments] if self.prior is None else [self.moments, self.prior[1]]

    def training_loss(self, losses: torch.Tensor) -> torch.Tensor:
        """Return this concept's loss of its part [items] of the losses of a pass."""
        own = losses[: self.batch].mean()
        self._sum += own.detach()
        if self.prior is None:
            return own
        return own + self.settings.prior_weight * losses[self.batch :].mean()

    def finish_step(self) -> None:
        """Step the optimiser, after the pass's backward."""
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        decay = min(self.decay, self.step / (10 + self.step))
        torch._foreach_lerp_(self.averages, [p.detach() for p in self.parameters], 1 - decay)
        if self.step % LOG_STEPS == 0:
            self.train_loss.append([self.step, self._sum / LOG_STEPS])  # type: ignore[list-item]
            self._sum = torch.zeros_like(self._sum)

    @property
    def due(self) -> bool:
        """Whether the watched loss is to be looked at now."""
        return self.step % self.stopper.every == 0 or self.step >= self.cap

    def look(self, losses: torch.Tensor, value: float | None = None) -> None:
        """Take the watched losses [items] at this step, or a rule's own `value`; decide whether to stop."""
        found = losses.detach().float().cpu()
        self.train_loss = [[step, float(loss)] for step, loss in self.train_loss]
        broken = not torch.isfinite(found).all() or not all(math.isfinite(x) for _, x in self.train_loss)
        if broken:
            self.averages = self._good
            good = int(self.curve[-1][0]) if self.curve else 0
            self.train_loss = [pair for pair in self.train_loss if math.isfinite(pair[1])]
            self.stopped = {
                "rule": "nan", "step": good, "value": None,
                "reason": f"the loss was not a number at step {self.step}: the state of step {good} is kept",
            }  # fmt: skip
            self.step = good
            return
        self._good = [value.clone() for value in self.averages]
        thirds = self.fixed.at(self.step).quantiles.mul(3).long().clamp(max=2)
        self.bands.append(
            [
                self.step,
                *(float(found[thirds == t].mean()) if (thirds == t).any() else math.nan for t in range(3)),
            ]
        )
        if self.first_losses is None:
            self.first_losses = found
        if value is None:
            # Each stratum by its own first value: else a few noise levels with a large loss hide the others.
            normal = self.settings.stop == "plateau"
            value = float((found / self.first_losses).mean() if normal else found.mean())
        self.curve.append([self.step, value])
        stop = self.stopper.update(value)
        self.statistic.append([self.step, self.stopper.value])
        if stop or self.step >= self.cap:
            reason = self.stopper.stopper.reason  # the rule's own
            self.stopped = {
                "rule": self.stopper.rule if reason else "cap",
                "step": self.step,
                "value": self.stopper.value,
                "reason": reason or f"the cap of {self.cap} steps was reached",
            }

    # -- state ---------------------------------------------------------------------------------------------

    def store(self, force: bool = False) -> None:
        """Write the state, if enough time has passed since the last one."""
        from safetensors.torch import save

        began = time.monotonic()
        if not force and began - self._written < STATE_SECONDS:
            return
        tensors = {}
        for number, parameter in enumerate(self.parameters):
            tensors[f"value.{number}"] = parameter.detach().cpu().contiguous()
            tensors[f"average.{number}"] = self.averages[number].cpu().contiguous()
            state = self.optimizer.state.get(parameter, {})
            for name in ("exp_avg", "exp_avg_sq", "step"):
                if name in state:
                    tensors[f"{name}.{number}"] = state[name].detach().cpu().contiguous()
        if self.first_losses is not None:
            tensors["first_losses"] = self.first_losses
        tensors["sum"] = self._sum.detach().cpu()
        told = {name: getattr(self, name) for name in KEPT}
        told["train_loss"] = [[step, float(loss)] for step, loss in self.train_loss]
        with explain_full_disk(self.out):
            write_atomically(
                self.out / "state.safetensors", save(tensors, {"state": json.dumps(told), "format": "pt"})
            )
        # writing a large state must not become the main work
        self._written = time.monotonic() + 20 * (time.monotonic() - began)

    def restore(self) -> bool:
        """Continue from the state in the folder. Returns whether there was one."""
        from safetensors import SafetensorError

        path = self.out / "state.safetensors"
        if not path.exists():
            return False
        try:
            self._restore(path)
        except (SafetensorError, OSError, RuntimeError, ValueError, LookupError, TypeError) as error:
            reason = str(error).partition("\n")[0]
            raise UserError(
                f"the state {path} is damaged ({type(error).__name__}: {reason}): "
                "remove it to train from the start"
            ) from None
        return True

    def _restore(self, path: Path) -> None:
        from safetensors import safe_open

        with safe_open(path, "pt") as file:
            told = json.loads((file.metadata() or {})["state"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        for name in KEPT:
            setattr(self, name, told[name])
        device = self.method.backbone.device
        self.first_losses = tensors.get("first_losses")
        self._sum = tensors["sum"].to(device)
        count = range(len(self.parameters))
        self._assign([tensors[f"value.{number}"] for number in count])
        self.averages = [tensors[f"average.{number}"].to(device).clone() for number in count]
        for number, parameter in enumerate(self.parameters):
            if f"step.{number}" in tensors:
                self.optimizer.state[parameter] = {
                    "step": tensors[f"step.{number}"],
                    **{
                        name: tensors[f"{name}.{number}"].to(device).clone()
                        for name in ("exp_avg", "exp_avg_sq")
                    },
                }
        for _, value in self.curve:
            self.stopper.update(value)
        self._good = [value.clone() for value in self.averages]
