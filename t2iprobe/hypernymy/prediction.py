"""How long a run will take: from measured steps, at its own batch size, of its own networks."""

import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from t2iprobe.config import Study
from t2iprobe.devices import resolve_device
from t2iprobe.hypernymy.drawing import draw
from t2iprobe.hypernymy.sampling import DiffusersSampler
from t2iprobe.hypernymy.scoring import Scorer
from t2iprobe.pipelines import default_steps
from t2iprobe.runs import Run

FEW, MORE = 2, 4  # steps of the short batches; as many more tell what a step costs


def predict(
    study: Study, manifest: Mapping[str, Any], missing: Sequence[int], before: float = 0.0
) -> dict[str, Any]:
    """Predict the seconds that a run needs for the plan positions `missing`, and for its report.

    `before` it came here it took so many seconds already, which the run will take, too.

    Batches of few steps are drawn, judged and stored as the run will do it, in a folder that is thrown away:
    first until their size is settled, then with FEW and with MORE steps. Returns {predicted_seconds,
    batch_size, lanes, seconds: {start, prompts, pictures, report}, step_seconds: of a batch}.
    """
    from t2iprobe.hypernymy.study import finish, load_hierarchy, load_sampler, load_scorers

    begin = time.perf_counter()
    device = resolve_device(study.device)
    scorers = load_scorers(study, device, len(load_hierarchy(study).classes))
    sampler = load_sampler(study, device, manifest["identity"]["dtype"])
    start = before + time.perf_counter() - begin
    with tempfile.TemporaryDirectory() as folder:
        bench = _Bench(study, dict(manifest), missing, sampler, scorers, Path(folder))
        bench.settle()
        per_prompt = bench.measure_prompts()
        pictures, step = bench.measure_pictures(study.steps or default_steps(sampler.pipeline))
        report = bench.measure_report(finish)
    plan = Run(Path("."), dict(manifest)).plan
    prompts = per_prompt * len({plan[position].prompt for position in missing})
    parts = {"start": start, "prompts": prompts, "pictures": pictures, "report": report}
    return {
        "predicted_seconds": sum(parts.values()),
        "seconds": parts,
        "batch_size": sampler.sizes.size,
        "lanes": sampler.lanes,
        "step_seconds": step,
    }


class _Bench:
    """A run that is thrown away, drawn from in pieces and timed."""

    def __init__(
        self,
        study: Study,
        manifest: dict[str, Any],
        missing: Sequence[int],
        sampler: DiffusersSampler,
        scorers: Mapping[str, Scorer],
        folder: Path,
    ) -> None:
        self.study, self.manifest, self.missing = study, manifest, missing
        self.sampler, self.scorers, self.folder = sampler, scorers, folder
        self.run = Run.create(folder / "drawn", manifest)

    def draw(self, count: int, steps: int | None) -> float:
        """Draw the first `count` missing pictures in so many steps; returns seconds."""
        study = self.study
        self.sampler.configure(steps=steps, guidance=study.guidance, size=study.size)
        begin = time.perf_counter()
        draw(self.run, self.missing[:count], self.sampler, self.scorers, study)
        return time.perf_counter() - begin

    def settle(self) -> None:
        """Draw until the batches have their size, or all pictures were drawn once."""
        sizes, count = self.sampler.sizes, 0
        while count < len(self.missing):
            round_ = sizes.next(len(self.missing)) * self.sampler.lanes
            self.draw(round_, FEW)
            count += round_
            if sizes.settled:
                break
        sizes.settled = True

    def measure_prompts(self) -> float:
        """Return the seconds for each prompt that is new, over at most 32 of them."""
        prompts = dict.fromkeys(self.run.plan[position].prompt for position in self.missing)
        new = [prompt for prompt in prompts if prompt not in self.sampler.known_prompts][:32]
        begin = time.perf_counter()
        for prompt in new:
            self.sampler.encode([prompt])
        return (time.perf_counter() - begin) / len(new) if new else 0.0

    def measure_pictures(self, steps: int | None) -> tuple[float, float | None]:
        """Return the seconds of all missing pictures, without their prompts, and of a step of a batch."""
        lanes = self.sampler.lanes
        batch = min(self.sampler.sizes.size, -(-len(self.missing) // lanes))
        count = min(len(self.missing), 2 * batch * lanes)
        rounds = len(self.missing) / count
        self.sampler.encode([self.run.plan[position].prompt for position in self.missing[:count]])
        if steps is None or steps <= FEW + MORE:
            return rounds * float(np.mean([self.draw(count, steps) for _ in range(2)])), None
        short = [self.draw(count, FEW) for _ in range(2)]
        long = [self.draw(count, FEW + MORE) for _ in range(2)]
        step = float(np.mean(long) - np.mean(short)) / MORE
        step_of_a_batch = step * lanes * batch / count
        return rounds * (float(np.mean(short)) + (steps - FEW) * step), step_of_a_batch

    def measure_report(self, finish: Any) -> float:
        """Return the seconds of a report on as many pictures, their logits made of those that were drawn."""
        run = Run.create(self.folder / "whole", self.manifest)
        rng = np.random.default_rng(0)
        logits = {}
        for name in run.classifiers:
            drawn = np.concatenate(list(self.run.logits(name).values()))
            logits[name] = drawn[rng.integers(len(drawn), size=len(run.plan))]
        run.write_shard(range(len(run.plan)), logits)
        begin = time.perf_counter()
        finish(run)
        return time.perf_counter() - begin
