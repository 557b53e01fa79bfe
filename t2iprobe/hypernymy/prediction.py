"""How long a run will take: from measured steps, at its own batch size, of its own networks."""

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
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
        bench = Bench(study, dict(manifest), missing, sampler, scorers, Path(folder))
        drawn, seconds = bench.settle()
        known = set(sampler.encoder.known_prompts)  # encoded while that was measured
        per_prompt = bench.measure_prompts()
        wanted = study.steps or default_steps(sampler.pipeline)
        (few, each), step = bench.measure_pictures([FEW, wanted])
        _, report = bench.write_report(finish)
    plan = Run(Path("."), dict(manifest)).plan
    prompts = per_prompt * len({plan[position].prompt for position in missing} - known)
    # The run, too, sets its kernels up and begins with small batches.
    pictures = each * len(missing) + max(0.0, seconds - few * drawn)
    parts = {"start": start, "prompts": prompts, "pictures": pictures, "report": report}
    return {
        "predicted_seconds": sum(parts.values()),
        "seconds": parts,
        "batch_size": sampler.sizes.size,
        "lanes": sampler.lanes,
        "step_seconds": step,
    }


class Bench:
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

    def settle(self) -> tuple[int, float]:
        """Draw until the batches have their size, or all pictures were drawn once: how many, and seconds."""
        sizes, count, seconds = self.sampler.sizes, 0, 0.0
        while count < len(self.missing):
            round_ = min(sizes.size * self.sampler.lanes, len(self.missing))
            seconds += self.draw(round_, FEW)
            count += round_
            if sizes.settled:
                break
        sizes.settled = True
        return count, seconds

    def measure_prompts(self) -> float:
        """Return the seconds for each prompt that is new, over at most 32 of them."""
        prompts = dict.fromkeys(self.run.plan[position].prompt for position in self.missing)
        new = [prompt for prompt in prompts if prompt not in self.sampler.encoder.known_prompts][:32]
        begin = time.perf_counter()
        if new:
            self.sampler.encoder.encode(new)
        return (time.perf_counter() - begin) / len(new) if new else 0.0

    def measure_pictures(self, steps: Sequence[int | None]) -> tuple[list[float], float | None]:
        """Return the seconds of a picture in each number of steps, without its prompt, and of a batch's step.

        The step is None where they are drawn as they are: few, or nobody knows how many.
        """
        lanes = self.sampler.lanes
        batch = min(self.sampler.sizes.size, -(-len(self.missing) // lanes))
        count = min(len(self.missing), 2 * batch * lanes)
        self.sampler.encoder.encode([self.run.plan[position].prompt for position in self.missing[:count]])

        def measure(steps: int | None) -> float:
            return float(np.mean([self.draw(count, steps) for _ in range(2)])) / count

        known = [each for each in steps if each is not None]
        if len(known) < len(steps) or max(known) <= FEW + MORE:
            times = {each: measure(each) for each in dict.fromkeys(steps)}
            return [times[each] for each in steps], None
        short, long = measure(FEW), measure(FEW + MORE)
        step = (long - short) / MORE
        return [short + (each - FEW) * step for each in known], step * lanes * batch

    def write_report(self, finish: Callable[[Run], None], seed: int = 0) -> tuple[Run, float]:
        """Report on as many pictures, with logits made of those that were drawn; the run, and the seconds."""
        run = Run.create(self.folder / f"whole{seed}", self.manifest)
        rng = np.random.default_rng(seed)
        logits = {}
        for name in run.classifiers:
            drawn = np.concatenate(list(self.run.logits(name).values()))
            logits[name] = drawn[rng.integers(len(drawn), size=len(run.plan))]
        run.write_shard(range(len(run.plan)), logits)
        begin = time.perf_counter()
        finish(run)
        return run, time.perf_counter() - begin
