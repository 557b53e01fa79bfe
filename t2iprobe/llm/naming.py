"""A checkpoint's tensors as a model holds them: under Transformers' names, and some of them merged into one.

Checkpoints keep the names of their day; Transformers renames them when it loads a whole model, and stacks the
matrices of a layer's experts. So a model that is read layer by layer asks it for the same.
"""

import re
from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import torch

from t2iprobe.errors import UserError

__all__ = ["Naming", "list_names"]


class Naming:
    """How the tensors of a model, which may be empty, come from a checkpoint's.

    `place` is what its list of layers is called in it.
    """

    def __init__(self, model: Any, place: str) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        mapping = get_model_conversion_mapping(model)
        self._renamings = [each for each in mapping if isinstance(each, WeightRenaming)]
        self._converters = [each for each in mapping if isinstance(each, WeightConverter)]
        self._merging = {pattern: each for each in self._converters for pattern in each.source_patterns}
        self._model, self._place = model, place
        self._known = model.state_dict()
        self._ignored = [re.compile(each) for each in model._keys_to_ignore_on_load_unexpected or ()]

    def ignores(self, name: str) -> bool:
        """Whether Transformers leaves a checkpoint's tensor out: the model has no use for it."""
        new, _ = self._rename(name)
        return new not in self._known and any(each.search(new) for each in self._ignored)

    def convert(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return a checkpoint's tensors by the model's names, those that belong together as one.

        Whatever belongs together must be given together. Names that the model does not know stay.
        """
        from transformers.core_model_loading import dot_natural_key

        found: dict[str, torch.Tensor] = {}
        merged: dict[str, Any] = {}
        for old in sorted(tensors, key=dot_natural_key):  # the ninth expert before the tenth
            new, pattern = self._rename(old)
            if pattern is None:
                found[new] = tensors[old]
                continue
            if new not in merged:
                merged[new] = deepcopy(self._merging[pattern])
            merged[new].add_tensor(new, old, pattern, tensors[old])
        for new, converter in merged.items():
            for name, made in converter.convert(new, model=self._model, config=self._model.config).items():
                found[name] = made[0] if isinstance(made, list) else made
        return found

    def convert_layer(self, number: int, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return a layer's tensors by their names within it.

        Raises UserError where they are not all that the layer holds, or more: both would change the text.
        """
        start = f"{self._place}.{number}."
        wanted = {name: each.shape for name, each in self._known.items() if name.startswith(start)}
        try:
            found = self.convert(tensors)
        except (ValueError, LookupError, TypeError, RuntimeError) as error:
            reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
            raise UserError(f"the weights' layer {number} cannot be put together: {reason}") from None
        lacking = sorted(name for name in wanted if name not in found)
        foreign = sorted(name for name, each in found.items() if wanted.get(name) != each.shape)
        if lacking or foreign:
            kind = self._model.config.model_type
            has = f"hold {list_names(foreign)}, which {kind} models have no place for" if foreign else ""
            lack = f"lack {list_names(lacking)}" if lacking else ""
            raise UserError(
                f"the weights cannot be read by layer: they {' and '.join(filter(None, (lack, has)))}"
            )
        return {name.removeprefix(start): each for name, each in found.items()}

    def _rename(self, old: str) -> tuple[str, str | None]:
        """Return the model's name of a tensor, and the pattern by which it is merged with others, if any."""
        from transformers.core_model_loading import rename_source_key

        prefix = self._model.base_model_prefix
        new, pattern = rename_source_key(old, self._renamings, self._converters, prefix, self._known)
        return (old, None) if new not in self._known and old in self._known else (new, pattern)


def list_names(names: list[str], most: int = 3) -> str:
    """Return some names for a message, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
