"""From the words of ``corpus ablate`` to arms: a corpus and recipes, or named files and mixes of them."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from t2iprobe.errors import UserError
from t2iprobe.llm.corpus.ablation import Arm, Training, ablate, make_arms, parse_mix, split_corpus
from t2iprobe.llm.corpus.annotation import load_any_target, make_annotation
from t2iprobe.llm.corpus.classifiers import ENDINGS
from t2iprobe.llm.corpus.documents import Source
from t2iprobe.llm.corpus.filters import load_recipe
from t2iprobe.llm.corpus.importance import find_target_name, train_target
from t2iprobe.llm.corpus.minhash import SHINGLE
from t2iprobe.llm.corpus.streaming import stream


@dataclass(frozen=True)
class Plan:
    """What is to be compared: recipes over `documents`, or `mixes` of the files that `texts` names.

    targets: files that `importance.train_target` or fastText wrote, or texts to train a target called target
    on, against those that train. judge: texts to judge by; of `documents` a tenth is kept for that otherwise.
    Raises UserError where neither or both are given, or something of them is not there.
    """

    documents: Path | None
    recipes: list[str]
    targets: list[Path]
    texts: list[str]
    mixes: list[str]
    judge: Path | None
    language: str = "en"
    field: str = "text"

    def __post_init__(self) -> None:
        if (self.documents is None) == (not self.mixes):
            raise UserError("give a file of texts and --recipes, or --texts NAME=FILE and --mix")
        if self.mixes and self.judge is None:
            raise UserError("mixes are judged by texts of their own: give --judge FILE")
        for path in self.targets:
            if not path.is_file():
                raise UserError(f"there is no file {path}")
        known = {"target" if _holds_texts(path) else load_any_target(path).name for path in self.targets}
        for name in self.recipes:
            for rule in load_recipe(name).rules if name != "none" else ():
                if (target := find_target_name(rule.signal)) not in (None, *known):
                    raise UserError(
                        f"the recipe {name} needs {rule.signal}: give --target FILE, texts as they should "
                        f"be or what llm corpus train --name {target} made of them"
                    )
        for mix in self.mixes:
            parse_mix(mix, self.files)
        if len(set(self.names)) < len(self.names):
            raise UserError(f"the same twice: {', '.join(self.names)}")

    @property
    def files(self) -> dict[str, Path]:
        """Return name → file of the texts that are mixed."""
        files = {}
        for text in self.texts:
            name, equals, path = text.partition("=")
            if not equals or not name:
                raise UserError(f"--texts takes NAME=FILE, not {text!r}")
            files[name] = Source.open(Path(path), self.field).path
        return files

    @property
    def names(self) -> list[str]:
        """Return the arms' names, the one that others are compared with first."""
        return self.mixes or [Path(name).stem for name in self.recipes]


def _holds_texts(path: Path) -> bool:
    return path.suffix not in (".npz", *ENDINGS)


def _train(texts: Path, train: Path, out: Path) -> Path:
    """Train a target on texts as they should be; those that judge have no part in it."""
    train_target("target", Source.open(texts), Source.open(train), out / "target.npz")
    return out / "target.npz"


def run_plan(
    plan: Plan, out: Path, training: Training, seeds: int, show: Callable[[int, int], None]
) -> dict[str, Any]:
    """Split, annotate, filter, train and judge in the folder `out`. Returns `ablation.summarize`."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {out}: {error.strerror}") from None
    arms: list[Arm]
    if plan.documents is None:
        assert plan.judge is not None
        arms, judges = [parse_mix(mix, plan.files) for mix in plan.mixes], Source.open(plan.judge).path
    else:
        train, judges = split_corpus(Source.open(plan.documents, plan.field), out)
        signals = out / "signals.jsonl"
        targets = [_train(path, train, out) if _holds_texts(path) else path for path in plan.targets]
        stage = make_annotation(plan.language, None, True, "embedded", SHINGLE, targets)
        stream(stage, Source.open(train), signals)
        arms = make_arms(train, signals, plan.recipes, out)
        judges = Source.open(plan.judge).path if plan.judge else judges
    return ablate(arms, judges, out, training, seeds, show)
