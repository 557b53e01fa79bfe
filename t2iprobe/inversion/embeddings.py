"""The trainable rows: a concept's own vectors, beside a vocabulary that stays as it is."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from t2iprobe.errors import UserError

_TOKEN = re.compile(r"<[a-z0-9]([a-z0-9_.+-]*[a-z0-9])?>")


class RowEmbedding(nn.Module):
    """A frozen embedding matrix, and rows of its width for the token ids from `first` on.

    The rows are looked up at each forward, so the matrix needs no gradient, no copy and no restoring.
    """

    def __init__(self, vocabulary: nn.Embedding, first: int) -> None:
        super().__init__()
        self.vocabulary = vocabulary.requires_grad_(False)
        self.first = first
        self.rows = nn.ParameterList()

    @property
    def weight(self) -> torch.Tensor:
        """The vocabulary's own matrix: what asks an encoder for its width or dtype finds it."""
        return self.vocabulary.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the vectors [batch, tokens, d] of token ids [batch, tokens]."""
        known = self.vocabulary(ids.clamp(max=self.first - 1))
        if not len(self.rows):
            return known
        rows = torch.cat(list(self.rows)).to(known.dtype)
        taught = nn.functional.embedding((ids - self.first).clamp(min=0), rows)
        return torch.where((ids >= self.first)[..., None], taught, known)


class Rows:
    """The rows of some tokens in each text encoder of a pipeline. `remove` leaves the pipeline as it was.

    In the tokenizers the further vectors of ``<a>`` are ``<a>#1``, ``<a>#2``: diffusers expands only
    ``<a>_1`` itself, and would expand what we have expanded again.
    """

    def __init__(self, encoders: Mapping[str, tuple[Any, Any]], tokens: Mapping[str, int]) -> None:
        """Add `tokens` (token → number of vectors) to `encoders` (name → tokenizer, text encoder).

        Raises UserError for a token that cannot be one (see `check_token`).
        """
        self.tokens = dict(tokens)
        self._encoders = dict(encoders)
        self._embeddings: dict[str, RowEmbedding] = {}
        self._saved: dict[str, Any] = {}
        for tokenizer, _ in self._encoders.values():
            for token, count in self.tokens.items():
                if count < 1:
                    raise UserError(f"{token} needs at least one vector, not {count}")
                check_token(token, [*tokenizer.get_vocab(), *(other for other in tokens if other != token)])
        for name, (tokenizer, encoder) in self._encoders.items():
            vocabulary = encoder.get_input_embeddings()
            first = len(tokenizer)
            added = [part for token, count in self.tokens.items() for part in token_parts(token, count)]
            self._saved[name] = (vocabulary, tokenizer._tokenizer.to_str())
            tokenizer.add_tokens(added)
            pool_at_end(tokenizer, encoder)
            if tokenizer.convert_tokens_to_ids(added) != list(range(first, first + len(added))):
                raise UserError(f"the tokenizer {type(tokenizer).__name__} does not take new tokens")
            embedding = RowEmbedding(vocabulary, first).to(vocabulary.weight.device)
            for count in self.tokens.values():
                width = vocabulary.weight.shape[1]
                embedding.rows.append(
                    nn.Parameter(torch.zeros(count, width, device=vocabulary.weight.device))
                )
            encoder.set_input_embeddings(embedding)
            self._embeddings[name] = embedding

    def remove(self) -> None:
        """Take the tokens out of the tokenizers and give the encoders their own embeddings back."""
        from tokenizers import Tokenizer

        for name, (tokenizer, encoder) in self._encoders.items():
            vocabulary, stored = self._saved[name]
            encoder.set_input_embeddings(vocabulary)
            tokenizer._tokenizer = Tokenizer.from_str(stored)

    def parameters(self, token: str) -> dict[str, nn.Parameter]:
        """Return encoder name → the rows [n, d] of a token, float32, trainable."""
        index = list(self.tokens).index(token)
        return {name: embedding.rows[index] for name, embedding in self._embeddings.items()}

    def vectors(self, token: str) -> dict[str, torch.Tensor]:
        """Return encoder name → a copy of a token's rows [n, d], on the CPU."""
        return {name: rows.detach().float().cpu().clone() for name, rows in self.parameters(token).items()}

    @torch.no_grad()
    def set(self, token: str, vectors: Mapping[str, torch.Tensor]) -> None:
        """Give a token's rows these values (encoder name → [n, d])."""
        for name, rows in self.parameters(token).items():
            rows.copy_(vectors[name])

    def expand(self, prompt: str) -> str:
        """Write all vectors of every token into a prompt: ``<a>`` becomes ``<a> <a>#1 <a>#2``."""
        for token, count in self.tokens.items():
            if count > 1:
                prompt = prompt.replace(token, " ".join(token_parts(token, count)))
        return prompt

    def vocabulary_rms(self, name: str) -> float:
        """Return the root mean square of an encoder's own entries: the unit of a learning rate."""
        return float(self._embeddings[name].vocabulary.weight.float().square().mean().sqrt())

    @torch.no_grad()
    def from_words(self, token: str, words: Iterable[str]) -> dict[str, torch.Tensor]:
        """Return encoder name → rows [n, d] made of the vectors of `words`.

        The words' tokens are shared out over the n rows in their order, each row the mean of its share;
        where there are fewer tokens than rows, they are repeated.
        Raises UserError where the words make no token.
        """
        found, words = {}, list(words)
        for name, (tokenizer, _) in self._encoders.items():
            ids = [i for word in words for i in tokenizer(word, add_special_tokens=False).input_ids]
            if not ids or (
                tokenizer.unk_token_id in ids and tokenizer.unk_token_id != tokenizer.eos_token_id
            ):
                raise UserError(f"the model's vocabulary cannot spell {' '.join(words)!r}: use other words")
            count = self.tokens[token]
            ids = (ids * count)[: max(count, len(ids))] if len(ids) < count else ids
            matrix = self._embeddings[name].vocabulary.weight[torch.tensor(ids)].float()
            found[name] = torch.stack([part.mean(0) for part in matrix.tensor_split(count)])
        return found

    @torch.no_grad()
    def at_random(self, token: str, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """Return encoder name → rows [n, d] drawn from a normal with the vocabulary's mean and variance."""
        found = {}
        for name, embedding in self._embeddings.items():
            weight = embedding.weight.float()
            noise = torch.randn(self.tokens[token], weight.shape[1], generator=generator)
            found[name] = weight.mean(0) + weight.std(0) * noise.to(weight.device)
        return found


def pool_at_end(tokenizer: Any, encoder: Any) -> None:
    """Let a CLIP text encoder pool at the end of a text, wherever added tokens stand in it.

    SDXL's and Flux's published configurations say that texts end with id 2; transformers then pools at the
    largest id of a text, which is its end only as long as no token was added. Others stay as they are.
    """
    for module in encoder.modules():
        if getattr(module, "eos_token_id", None) == 2:
            module.eos_token_id = module.config.eos_token_id = tokenizer.eos_token_id


def token_parts(token: str, count: int) -> list[str]:
    """Return the names of a token's vectors in the tokenizer."""
    return [token, *(f"{token}#{number}" for number in range(1, count))]


def spell_tokens(prompt: str) -> str:
    """Return a prompt in plain words, a token's vectors as one: ``<my-cat> <my-cat>#1`` as ``my cat``."""
    prompt = re.sub(rf"\s*{_TOKEN.pattern}#\d+", "", prompt)
    return _TOKEN.sub(lambda token: token[0].strip("<>").replace("-", " "), prompt)


def check_token(token: str, others: Iterable[str]) -> None:
    """Raise UserError for a token that prompts could not hold safely beside `others`."""
    if any(letter.isspace() for letter in token):
        raise UserError(f"the token {token!r} contains a space: write one word, such as <my-cat>")
    if not _TOKEN.fullmatch(token):
        raise UserError(
            f"the token {token!r} is not <name> in lower-case letters, digits, - or _: loaders lower-case "
            "prompts and match tokens inside words"
        )
    for other in others:
        if other == token:
            raise UserError(f"the token {token} exists in the model's vocabulary: take another name")
        if other.startswith("<") and len(other) > 3 and (other.startswith(token) or token.startswith(other)):
            raise UserError(
                f"of the tokens {token} and {other} one begins the other: prompts would be misread"
            )
