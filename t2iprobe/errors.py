"""What a person did wrong, and what to do about it."""

from collections.abc import Iterable
from difflib import get_close_matches


class UserError(Exception):
    """A mistake in the input, told in one line: what is wrong and what to do.

    The command line prints it without a traceback and exits with code 2.
    """


def suggest(name: str, names: Iterable[str], n: int = 3) -> str:
    """Return ``", did you mean a, b or c?"`` for the names nearest to `name`, or an empty string."""
    near = get_close_matches(name, list(names), n=n)
    if not near:
        return ""
    listed = near[0] if len(near) == 1 else f"{', '.join(near[:-1])} or {near[-1]}"
    return f", did you mean {listed}?"
