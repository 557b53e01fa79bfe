"""The pictures of a run, reduced to what every statistic needs, and a metric's estimate with its errors."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from t2iprobe.hypernymy import resampling
from t2iprobe.hypernymy.hierarchy import Hierarchy
from t2iprobe.hypernymy.metrics import Floats, check_logits, scs_normaliser
from t2iprobe.hypernymy.resampling import PictureValues, interval, nanmean


@dataclass(frozen=True)
class Sample:
    """The pictures of the synsets of one run, reduced: arrays are in the order of `synsets`.

    Attributes:
        synsets: [S] names, sorted.
        subtrees: [S, C] their classifiable subtrees.
        pictures: [S] their pictures' values.
        normaliser: what SCS is divided by.
    """

    synsets: list[str]
    subtrees: NDArray[np.bool_]
    pictures: list[PictureValues]
    normaliser: float

    def subset(self, names: Sequence[str]) -> "Sample":
        """The same for some of its synsets."""
        rows = [self.synsets.index(name) for name in names]
        pictures = [self.pictures[row] for row in rows]
        return Sample(list(names), self.subtrees[rows], pictures, self.normaliser)

    @cached_property
    def samples(self) -> NDArray[np.int64]:
        """[S] number of pictures."""
        return np.array([len(pictures.values) for pictures in self.pictures])

    @cached_property
    def means(self) -> Floats:
        """[S, 3] mean of each picture value."""
        return np.array([pictures.values.mean(axis=0) for pictures in self.pictures])

    @cached_property
    def stderrs(self) -> Floats:
        """[S, 4] standard error of each mean and of SCS (raw), by the jackknife; NaN for one picture.

        The last two also for two pictures, see `bootstrap`.
        """
        rows = []
        for pictures in self.pictures:
            known = _clear_pairs(pictures.values)
            values = np.c_[known, known[:, 2] - known[:, 1]]
            several = len(values) > 1
            rows.append(values.std(axis=0, ddof=1) / np.sqrt(len(values)) if several else np.full(4, np.nan))
        return np.array(rows)

    @cached_property
    def plug_in_shift(self) -> Floats:
        """[S] plug-in minus corrected marginal entropy."""
        plug_in = np.array([pictures.marginal_entropy for pictures in self.pictures])
        return plug_in - np.where(self.samples > 1, self.means[:, 2], plug_in)

    def bootstrap(self, resamples: int, rng: np.random.Generator) -> Floats:
        """[resamples, S, 3] means of each synset's resampled pictures.

        Two pictures say nothing of the error of their marginal entropy, nor of SCS: the pseudo-values of SCS
        are then one number twice.
        """
        each = [resampling.bootstrap_means(_clear_pairs(p.values), resamples, rng) for p in self.pictures]
        return np.stack(each, axis=1)

    def contributions(self, means: Floats) -> dict[str, Floats]:
        """What each synset adds to each metric, [..., S], from picture means [..., S, 3].

        A metric is the mean of its contributions; NaN marks synsets that have none (one class).
        """
        isp, within, corrected = means[..., 0], means[..., 1], means[..., 2]
        # With one picture there is no corrected value, but the plug-in is the picture's own entropy.
        marginal = np.where(self.samples > 1, corrected, within) + self.plug_in_shift
        sizes = self.subtrees.sum(axis=1)
        scs, scs_corrected = _clear_rounding(marginal - within), _clear_rounding(corrected - within)
        return {
            "isp": isp,
            "scs": scs / self.normaliser,
            "scs_corrected": scs_corrected / self.normaliser,
            "scs_mean_of_ratios": scs / np.log(np.where(sizes > 1, sizes, np.nan)),
            "scs_isp_weighted": isp * scs / self.normaliser,
            "subtree_entropy": within,
            "marginal_entropy": marginal,
        }


def reduce_logits(logits: Mapping[str, ArrayLike], hierarchy: Hierarchy) -> Sample:
    """Reduce the logits [N, C] of every synset to its picture values; UserError for bad logits."""
    checked = check_logits(logits, hierarchy)
    subtrees = hierarchy.subtrees_of(list(checked))
    pictures = [
        resampling.describe_pictures(values, subtree)
        for values, subtree in zip(checked.values(), subtrees, strict=True)
    ]
    return Sample(list(checked), subtrees, pictures, scs_normaliser(hierarchy))


def estimate(values: Floats, replicates: Floats, rows: NDArray[np.int64]) -> dict[str, Any]:
    """Mean of contributions [S] with its errors, from resampled pictures [R, S] and rows of synsets [R, S−1].

    Returns value, and stderr and interval by pictures and by synsets; None for what cannot be told.
    """
    there = ~np.isnan(values)
    nothing = np.full(len(rows), np.nan)
    # A synset of one picture has no spread: its NaN makes the error unknown rather than too small.
    pictures = replicates[:, there].mean(axis=1) if there.any() else nothing
    synsets = nanmean(values[rows]) if there.sum() > 1 else nothing
    return {
        "value": to_number(nanmean(values)),
        "stderr": to_number(pictures.std(ddof=1)),
        "interval": to_numbers(interval(pictures)),
        "stderr_synsets": to_number(np.nanstd(synsets, ddof=1) if there.sum() > 1 else np.nan),
        "interval_synsets": to_numbers(interval(synsets)),
    }


def _clear_pairs(values: Floats) -> Floats:
    """Picture values [N, 3], without the marginal entropy's pseudo-values where there are two."""
    return np.c_[values[:, :2], np.full(2, np.nan)] if len(values) == 2 else values


def _clear_rounding(values: Floats) -> Floats:
    """Zero for what is only rounding: equal pictures have no divergence at all."""
    return np.where(np.abs(values) < 1e-12, 0.0, values)


def to_number(value: Any) -> float | None:
    """A float for JSON, None for NaN."""
    return None if np.isnan(value) else float(value)


def to_numbers(pair: tuple[float, float]) -> list[float] | None:
    """An interval for JSON, None for NaN."""
    return None if np.isnan(pair[0]) else [float(pair[0]), float(pair[1])]
