"""What a probe is compared with: the stock loop, and metrics that walk WordNet again for each synset.

Both are written from the description of the published system (arXiv 2310.09247).
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from t2iprobe import wordnet
from t2iprobe.classifiers import LITE_MEAN, LITE_STD, lite_weights, rename_lite_weights
from t2iprobe.pipelines import setting_arguments

STOCK_BATCH = 16  # pictures that the classifier sees at once


class StockLoop:
    """One diffusers call a synset, its pictures to PNG, all of them read again by ImageFolder, classified."""

    def __init__(
        self,
        model: Path,
        device: str,
        dtype: str,
        steps: int | None,
        guidance: float | None,
        size: int | None,
    ) -> None:
        from diffusers import DiffusionPipeline

        pipeline: Any = DiffusionPipeline.from_pretrained(
            str(model), dtype=getattr(torch, dtype), local_files_only=True
        )
        pipeline.set_progress_bar_config(disable=True)
        self.pipeline = pipeline.to(device)
        self.device = device
        self.settings = setting_arguments(pipeline, steps, guidance, size)
        self.classifier = load_plain_lite().to(device)

    def run(self, prompts: Mapping[str, str], samples: int, folder: Path) -> Tensor:
        """Draw so many pictures of each synset's prompt and judge them: logits float32 [n, C]."""
        for synset, prompt in prompts.items():
            (folder / synset).mkdir(parents=True)
            drawn = self.pipeline(prompt, num_images_per_prompt=samples, **self.settings).images
            for number, picture in enumerate(drawn):
                picture.save(folder / synset / f"{number}.png")
        return self.classify(folder)

    @torch.no_grad()
    def classify(self, folder: Path) -> Tensor:
        """Judge ``folder/<synset>/*.png``: logits float32 [n, C], sorted by path."""
        from torch.utils.data import DataLoader
        from torchvision.datasets import ImageFolder
        from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Normalize, Resize, ToTensor

        transform = Compose(
            [
                Resize(224, InterpolationMode.BICUBIC),
                CenterCrop(224),
                ToTensor(),
                Normalize([LITE_MEAN] * 3, [LITE_STD] * 3),
            ]
        )
        loader: Any = DataLoader(ImageFolder(str(folder), transform), batch_size=STOCK_BATCH)
        return torch.cat([self.classifier(pictures.to(self.device)).cpu() for pictures, _ in loader])


_stock: StockLoop | None = None  # of a process that runs nothing else


def load_stock(*words: Any) -> None:
    """Load the stock loop in a process of its own."""
    global _stock
    _stock = StockLoop(*words)


def time_stock(prompts: Mapping[str, str], samples: int, folder: Path) -> tuple[np.ndarray, float]:
    """Return logits float32 [n, C] of what is drawn to `folder`, and the seconds that it took."""
    assert _stock is not None
    begin = time.perf_counter()
    logits = _stock.run(prompts, samples, folder)
    return logits.numpy(), time.perf_counter() - begin


def load_plain_lite() -> Any:
    """Return the packaged EfficientNet-Lite0 as timm runs it."""
    import timm

    network: Any = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    weights = torch.load(lite_weights("0"), map_location="cpu", weights_only=True)
    network.load_state_dict(rename_lite_weights(weights, [len(stage) for stage in network.blocks]))
    return network.eval()


METRICS = ("isp", "scs", "subtree entropy", "marginal entropy")


class PublishedMetrics:
    """Each metric on its own, each synset's classes found by growing its tree of hyponyms again."""

    def __init__(self, classes: Sequence[str]) -> None:
        self.places = {name: place for place, name in enumerate(classes)}

    def measure(self, metric: str, logits: Mapping[str, np.ndarray]) -> dict[str, float]:
        """Return synset → value of one metric, from logits [N, C]; nothing for subtrees of one class."""
        found = {}
        for name, values in logits.items():
            subtree = self._list_classes(name)
            if metric == "isp":
                found[name] = float(torch.from_numpy(values).softmax(-1)[:, subtree].sum(-1).mean())
            elif len(subtree) > 1:
                within = torch.from_numpy(values)[:, subtree].softmax(-1)
                mean = float(torch.special.entr(within).sum(-1).mean())
                marginal = float(torch.special.entr(within.mean(0)).sum())
                values_by_name = {
                    "scs": marginal - mean,
                    "subtree entropy": mean,
                    "marginal entropy": marginal,
                }
                found[name] = values_by_name[metric]
        return found

    def _list_classes(self, name: str) -> list[int]:
        pending = [wordnet.synset(name).tree(lambda synset: synset.hyponyms())]
        found = set()
        while pending:
            root, *below = pending.pop()
            if root.name() in self.places:
                found.add(self.places[root.name()])
            pending.extend(below)
        return sorted(found)
