"""The engine as a model of lm-evaluation-harness: log-likelihoods in forests, generation by speculation.

Greedy text and scores are those of the harness's own Hugging Face model, to rounding; what differs is the
cost: texts that begin alike share their beginning, and a tree of guesses is verified a pass.
"""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from t2iprobe.errors import UserError
from t2iprobe.llm.commands import Engine
from t2iprobe.llm.engine.generation import Trees, generate
from t2iprobe.llm.engine.processing import Sampling
from t2iprobe.llm.scoring import ROWS, Request, score_continuations

try:
    from lm_eval import utils
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
except ImportError:
    raise UserError("evaluating needs lm-evaluation-harness: pip install 't2iprobe[harness]'") from None

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

__all__ = ["Cost", "EngineLM"]

#: Tokens of an answer where a task does not say.
MOST_NEW_TOKENS = 256
#: Rows of a scoring pass with layers in slow memory, which each pass reads again.
STREAMED_ROWS = 4096
_KNOWN = frozenset(
    ("do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "no_repeat_ngram_size")
)


@dataclass
class Cost:
    """What the requests so far have cost: tokens scored and written, passes of the target, seconds."""

    scored_tokens: int = 0
    scored_seconds: float = 0.0
    written_tokens: int = 0
    written_seconds: float = 0.0
    passes: int = 0

    def describe(self) -> dict[str, Any]:
        """Return it with tokens a second, and tokens written a pass of the target (acceptance, and one)."""
        return asdict(self) | {
            "scored_tokens_per_second": _divide(self.scored_tokens, self.scored_seconds),
            "written_tokens_per_second": _divide(self.written_tokens, self.written_seconds),
            "tokens_per_pass": _divide(self.written_tokens, self.passes),
        }


def _divide(amount: float, by: float) -> float | None:
    return amount / by if by else None


@register_model("t2iprobe")
class EngineLM(TemplateLM):
    """A harness model around an engine that is loaded.

    Args:
        engine: target, tokenizer and draft.
        trees: how trees grow; by default the generation's own.
        batch: prompts that share each pass of a generation.
        seed: of sampled text; each request has noise of its own, by its number.
    """

    backend = "causal"

    def __init__(self, engine: Engine, trees: Trees | None = None, batch: int = 8, seed: int = 0) -> None:
        super().__init__()
        self.engine, self.trees, self.batch, self.seed = engine, trees, batch, seed
        self.tokenizer = engine.tokenizer
        self.cost = Cost()
        self._drawn = 0

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without context."""
        first = self.tokenizer.bos_token_id
        return self.eot_token_id if first is None else first

    @property
    def max_length(self) -> int:
        """Tokens of a text at most."""
        return self.engine.target.context_length or 2048

    @property
    def max_gen_toks(self) -> int:
        """Tokens of an answer where a task does not say."""
        return MOST_NEW_TOKENS

    @property
    def tokenizer_name(self) -> str:
        """The model's name."""
        return self.engine.files.name.replace("/", "__")

    def get_model_info(self) -> dict[str, Any]:
        """Return what the results say of the model."""
        return {
            "model_source": "t2iprobe",
            "model_name": self.engine.files.name,
            "model_sha": self.engine.files.hash,
        }

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Return token ids, special ones as the tokenizer has it unless told."""
        if add_special_tokens is None:
            first = self.tokenizer.decode(self.prefix_token_id)
            add_special_tokens = False if first and string.startswith(first) else None
        settings = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return self.tokenizer.encode(string, **settings)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Return a conversation as text."""
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **options: Any
    ) -> list[tuple[float, bool]]:
        began = time.perf_counter()
        pairs: list[Request] = [(context, continuation) for _, context, continuation in requests]
        rows = ROWS if self.engine.store is None else STREAMED_ROWS
        scores = score_continuations(self.engine.target, pairs, rows=rows)
        self.cost.scored_seconds += time.perf_counter() - began
        self.cost.scored_tokens += sum(len(context) + len(continuation) for context, continuation in pairs)
        found = [(score.total, score.is_greedy) for score in scores]
        for (text, *_), answer in zip(requests, found, strict=True):
            if text is not None:
                self.cache_hook.add_partial("loglikelihood", text, answer)
        return found

    def loglikelihood_rolling(self, requests: "list[Instance]", disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood of whole texts, in windows of the model's context."""
        windows: list[Any] = []
        owners = []
        for number, (text,) in enumerate(request.args for request in requests):
            for context, continuation in map(
                utils.make_disjoint_window,
                utils.get_rolling_token_windows(
                    token_list=self.tok_encode(text),
                    prefix_token=self.prefix_token_id,
                    max_seq_len=self.max_length,
                    context_len=1,
                ),
            ):
                windows.append((None, context, continuation))
                owners.append(number)
        totals = [0.0] * len(requests)
        for number, (value, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[number] += value
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: "list[Instance]", disable_tqdm: bool = False) -> list[str]:
        """Return continuations, each to its first stop string."""
        answers: list[str | None] = [None] * len(requests)
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(repr(sorted(request.args[1].items())), []).append(number)
        for numbers in groups.values():
            settings = normalize_gen_kwargs(requests[numbers[0]].args[1], self.max_gen_toks)
            contexts = [self.tok_encode(requests[number].args[0]) for number in numbers]
            # Longest first, so that a batch's prompts are about as long.
            order = sorted(range(len(numbers)), key=lambda place: -len(contexts[place]))
            for start in range(0, len(order), self.batch):
                part = order[start : start + self.batch]
                texts = self._continue([contexts[place] for place in part], dict(settings))
                for place, text in zip(part, texts, strict=True):
                    answers[numbers[place]] = text
                    self.cache_hook.add_partial("generate_until", requests[numbers[place]].args, text)
        return answers  # type: ignore[return-value]  # each was in a group

    def _continue(self, contexts: Sequence[list[int]], settings: dict[str, Any]) -> list[str]:
        most = settings.pop("max_gen_toks")
        stop = settings.pop("until", None)
        end = self.tokenizer.decode(self.eot_token_id)
        stop = [text for text in handle_stop_sequences(stop, eos=end) if text]
        if unknown := sorted(settings.keys() - _KNOWN):
            raise UserError(f"the engine cannot generate with {unknown[0]}: leave it out of the task")
        room = self.max_length - most
        if room <= 0:
            raise UserError(f"an answer of {most} tokens leaves no room in a context of {self.max_length}")
        made = generate(
            self.engine.target,
            self.engine.draft,
            [torch.tensor(context[-room:]) for context in contexts],
            sampling=self._sampling(settings),
            trees=self.trees,
            max_new_tokens=most,
            eos_token_ids=self.engine.eos_token_ids,
            stop=[text for text in stop if text != end],
            tokenizer=self.tokenizer,
            first=self._drawn,
        )
        self._drawn += len(contexts)
        self.cost.passes += sum(each.target_passes for each in made)
        self.cost.written_tokens += sum(len(each.token_ids) for each in made)
        self.cost.written_seconds += max(each.seconds for each in made)
        return [postprocess_generated_text(each.text or "", stop, None) for each in made]

    def _sampling(self, settings: dict[str, Any]) -> Sampling:
        drawn = settings.get("do_sample", False)
        return Sampling(
            temperature=float(settings.get("temperature", 1.0)) if drawn else 0.0,
            top_k=int(settings.get("top_k", 0) or 0) if drawn else 0,
            top_p=float(settings.get("top_p", 1.0)) if drawn else 1.0,
            min_p=float(settings.get("min_p", 0.0) or 0.0) if drawn else 0.0,
            repetition_penalty=float(settings.get("repetition_penalty", 1.0)),
            no_repeat_ngram=int(settings.get("no_repeat_ngram_size", 0)),
            seed=self.seed,
        )
