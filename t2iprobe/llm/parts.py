"""A text that grows token by token, told in parts."""

from collections.abc import Sequence

from t2iprobe.llm.models import Tokenizer

__all__ = ["Parts"]


class Parts:
    """Cuts a growing text into parts that later tokens cannot change."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str]) -> None:
        self._tokenizer, self._stop = tokenizer, stop
        self._tokens: list[int] = []
        self._told = 0

    def extend(self, tokens: Sequence[int]) -> str:
        """Return the part that has become sure with these tokens."""
        self._tokens += tokens
        text = self._tokenizer.decode(self._tokens, skip_special_tokens=True)
        return self.cut(text[: _sure_length(text, self._stop)])

    def cut(self, text: str) -> str:
        """Return what was not told of a text that begins with what was."""
        part = text[self._told :]
        self._told += len(part)
        return part


def _sure_length(text: str, stop: Sequence[str]) -> int:
    """Return how much of a growing text stays: not half a character, nor what may become a stop string."""
    if found := [place for each in stop if (place := text.find(each)) >= 0]:
        return min(found)
    text = text.rstrip("\N{REPLACEMENT CHARACTER}")
    begun = (
        size
        for each in stop
        for size in range(min(len(each) - 1, len(text)), 0, -1)
        if text.endswith(each[:size])
    )
    return len(text) - max(begun, default=0)
