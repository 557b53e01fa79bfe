"""From logits to the distribution that is sampled: temperature, top-k, top-p, min-p, penalties.

All of them are Transformers' own, in the order in which its `generate` applies them. A processor that reads
the history gets that of the node: the text and the path in the tree.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from t2iprobe.errors import UserError

# A tree asks for many continuations of one text, in any order and also such that are thrown away: only pure
# functions of (history, scores), row by row, can answer.
REPLAYABLE = frozenset(
    {
        "EncoderNoRepeatNGramLogitsProcessor",
        "EncoderRepetitionPenaltyLogitsProcessor",
        "EpsilonLogitsWarper",
        "EtaLogitsWarper",
        "ExponentialDecayLengthPenalty",
        "ForcedBOSTokenLogitsProcessor",
        "ForcedEOSTokenLogitsProcessor",
        "InfNanRemoveLogitsProcessor",
        "LogitNormalization",
        "MinLengthLogitsProcessor",
        "MinNewTokensLengthLogitsProcessor",
        "MinPLogitsWarper",
        "NoBadWordsLogitsProcessor",
        "NoRepeatNGramLogitsProcessor",
        "RepetitionPenaltyLogitsProcessor",
        "SequenceBiasLogitsProcessor",
        "SuppressTokensAtBeginLogitsProcessor",
        "SuppressTokensLogitsProcessor",
        "TemperatureLogitsWarper",
        "TopHLogitsWarper",
        "TopKLogitsWarper",
        "TopPLogitsWarper",
        "TypicalLogitsWarper",
    }
)


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn. The defaults change nothing: the most probable token, no filter.

    At `temperature` 0 the token is the most probable one after the penalties, and the filters top-k, top-p
    and min-p have no effect. Raises UserError for a value out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    no_repeat_ngram: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        self._require(0 <= self.temperature < math.inf, "temperature", "0 (greedy) or more")
        self._require(self.top_k >= 0, "top_k", "0 (all) or more tokens")
        self._require(0 < self.top_p <= 1, "top_p", "above 0 and at most 1")
        self._require(0 <= self.min_p <= 1, "min_p", "from 0 to 1")
        self._require(0 < self.repetition_penalty < math.inf, "repetition_penalty", "above 0; 1 is none")
        self._require(self.no_repeat_ngram >= 0, "no_repeat_ngram", "0 (off) or more tokens")
        self._require(0 <= self.seed < 2**63, "seed", "from 0 to 2**63 - 1")

    def _require(self, right: bool, name: str, wanted: str) -> None:
        if not right:
            raise UserError(f"{name} is {getattr(self, name)}: it must be {wanted}")


class Processing:
    """Turns logits into the log-probabilities that a token is drawn from."""

    def __init__(self, sampling: Sampling, processors: Sequence[Any] = ()) -> None:
        """Take Transformers logits processors beside the `sampling`'s own.

        They run after the penalties and before the temperature, as in Transformers. Raises UserError for one
        that is not known to be replayable.
        """
        from transformers.generation import logits_process as hf

        for processor in processors:
            name = type(processor).__name__
            if name not in REPLAYABLE or type(processor) is not getattr(hf, name, None):
                raise UserError(
                    f"the logits processor {name} cannot be replayed on the paths of a draft tree: "
                    "leave it out, or generate without a tree"
                )
        readers: list[Callable[..., Tensor]] = []
        warpers: list[Callable[..., Tensor]] = []  # these ignore the history
        if sampling.repetition_penalty != 1:
            readers.append(hf.RepetitionPenaltyLogitsProcessor(float(sampling.repetition_penalty)))
        if sampling.no_repeat_ngram:
            readers.append(hf.NoRepeatNGramLogitsProcessor(sampling.no_repeat_ngram))
        if sampling.temperature not in (0, 1):
            warpers.append(hf.TemperatureLogitsWarper(float(sampling.temperature)))
        if sampling.temperature and sampling.top_k:
            warpers.append(hf.TopKLogitsWarper(sampling.top_k))
        if sampling.temperature and sampling.top_p < 1:
            warpers.append(hf.TopPLogitsWarper(float(sampling.top_p)))
        if sampling.temperature and sampling.min_p:
            warpers.append(hf.MinPLogitsWarper(float(sampling.min_p)))
        self.sampling = sampling
        self._readers, self._warpers = [*readers, *processors], warpers

    @property
    def reads_history(self) -> bool:
        """Whether the histories matter; if not, none need be given."""
        return bool(self._readers)

    def __call__(self, logits: Tensor, paths: Sequence[Tensor]) -> Tensor:
        """Return log-probabilities float64, as `logits` [V] of one node or [m, V] of several.

        `paths` holds for each of them its whole history, the node's token last: int64 [length]. float64, so
        that no two logits become equal.
        """
        scores = logits if logits.dtype == torch.float64 else logits.float()
        scores = scores.view(-1, logits.shape[-1])
        if self._readers:
            scores = scores.clone()
            rows: dict[int, list[int]] = {}
            for row, path in enumerate(paths):
                rows.setdefault(len(path), []).append(row)
            for same_length in rows.values():
                history = torch.stack([paths[row] for row in same_length]).to(scores.device)
                part = scores[same_length]
                for reader in self._readers:
                    part = reader(history, part)
                scores[same_length] = part
        for warper in self._warpers:
            scores = warper(None, scores)
        return scores.double().log_softmax(-1).view(logits.shape)
