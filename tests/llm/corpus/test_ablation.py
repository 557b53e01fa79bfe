"""Ablations: real, tiny trainings that go on after a kill, and tables whose numbers follow from the runs."""

import json
import random
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from t2iprobe.cli import app
from t2iprobe.errors import UserError
from t2iprobe.llm.corpus import ablation
from t2iprobe.llm.corpus.ablation import (
    Arm,
    Training,
    draw_sequences,
    encode_file,
    find_disagreement,
    judge,
    parse_mix,
    summarize,
    train_model,
    train_tokenizer,
)
from t2iprobe.llm.corpus.arms import Plan, run_plan

TINY = Training(hidden=32, layers=1, tokens=6400, length=32, batch=4, vocabulary=512)
WORDS = ["fox", "snow", "sleeps", "runs", "red", "old", "tree", "under", "over", "the"]


def write(path: Path, count: int, seed: int, spam: bool = False) -> Path:
    rng = random.Random(seed)
    lines = []
    for _ in range(count):
        verbs = " ".join(
            f"the {rng.choice(WORDS)} fox runs over the {rng.choice(WORDS)} tree." for _ in range(8)
        )
        lines.append(json.dumps({"text": "8k 8k {x} " * 20 if spam and rng.random() < 0.5 else verbs}))
    path.write_text("\n".join(lines) + "\n")
    return path


def nothing(done: int, total: int) -> None:
    pass


def test_recipes_are_compared_and_a_stopped_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = write(tmp_path / "in.jsonl", 150, 0, spam=True)
    recipe = tmp_path / "clean.yaml"
    recipe.write_text("rules: [{signal: rps_doc_curly_bracket, max: 0}]")
    plan = Plan(texts, ["none", str(recipe)], [], [], [], None)
    trained, train = [], ablation.train_model

    def stop_at_the_third(*arguments):
        trained.append(1)
        if len(trained) == 3:
            raise KeyboardInterrupt
        return train(*arguments)

    monkeypatch.setattr(ablation, "train_model", stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        run_plan(plan, tmp_path / "out", TINY, 2, nothing)
    found = run_plan(plan, tmp_path / "out", TINY, 2, nothing)
    again = run_plan(plan, tmp_path / "out", TINY, 2, nothing)

    assert len(trained) == 5  # four, and the one that was stopped
    assert found == again
    none, clean = found["arms"]
    assert (none["arm"], clean["arm"]) == ("none", "clean")
    assert none["seeds"] == 2
    assert clean["tokens_there"] < 0.8 * none["tokens_there"]
    assert clean["epochs"] == pytest.approx(6400 / clean["tokens_there"])
    assert 0 < none["bits_per_byte"]["value"] < 8
    assert clean["bits_per_byte_difference"]["interval"] is not None


def test_a_recipe_that_needs_a_target(tmp_path: Path) -> None:
    texts = write(tmp_path / "in.jsonl", 150, 0, spam=True)
    good = write(tmp_path / "good.jsonl", 40, 5)
    with pytest.raises(UserError, match="dsir needs rps_doc_target_importance: give --target FILE"):
        Plan(texts, ["none", "dsir"], [], [], [], None)
    plan = Plan(texts, ["none", "dsir"], [good], [], [], None)
    found = run_plan(plan, tmp_path / "out", TINY, 1, nothing)

    kept = (tmp_path / "out" / "dsir.jsonl").read_text().splitlines()
    train = (tmp_path / "out" / "train.jsonl").read_text().splitlines()
    assert len(kept) == pytest.approx(len(train) / 2, abs=1)
    assert sum("8k" in line for line in kept) < 0.1 * sum("8k" in line for line in train)
    assert [row["arm"] for row in found["arms"]] == ["none", "dsir"]


def test_a_word_of_any_length_is_no_obstacle(tmp_path: Path) -> None:
    path = tmp_path / "in.txt"
    path.write_text("a red fox\n" * 50 + "x" * 400_000)
    begin = time.monotonic()
    tokenizer = train_tokenizer([path], 512)

    assert time.monotonic() - begin < 60  # all at once it would be several minutes
    assert tokenizer.decode(tokenizer.encode("a red fox xxx").ids) == "a red fox xxx"


def test_training_learns_and_a_seed_repeats(tmp_path: Path) -> None:
    path = write(tmp_path / "in.jsonl", 60, 1)
    tokenizer = train_tokenizer([path], TINY.vocabulary)
    tokens = encode_file(path, tokenizer, 0)
    texts = [
        json.loads(line)["text"] for line in write(tmp_path / "judge.jsonl", 20, 2).read_text().splitlines()
    ]
    short = Training(**{**TINY.__dict__, "tokens": 128})
    models = [train_model([(tokens, 1.0)], training, 3, nothing) for training in (TINY, TINY, short)]
    scores = [judge(model, tokenizer, texts, TINY) for model in models]

    assert scores[0] == scores[1]
    assert scores[0]["bits_per_byte"] < 0.8 * scores[2]["bits_per_byte"]
    assert scores[0]["word_order"] > 0.8


def test_bits_are_those_of_the_whole_text(tmp_path: Path) -> None:
    path = write(tmp_path / "in.jsonl", 20, 1)
    tokenizer = train_tokenizer([path], TINY.vocabulary)
    model = train_model([(encode_file(path, tokenizer, 0), 1.0)], TINY, 0, nothing)
    text = "the red fox sleeps"
    ids = torch.tensor([[tokenizer.token_to_id("<|end|>"), *tokenizer.encode(text).ids]])
    with torch.inference_mode():
        loss = model(input_ids=ids, labels=ids).loss
    expected = float(loss) * (ids.shape[1] - 1) / np.log(2) / len(text)

    assert judge(model, tokenizer, [text], TINY)["bits_per_byte"] == pytest.approx(expected, rel=1e-5)


def test_sequences_follow_each_other_by_weight() -> None:
    one, other = np.arange(100, dtype=np.uint16), np.arange(1000, 1400, dtype=np.uint16)
    training = Training(tokens=64_000, length=16, batch=4)
    batches = list(draw_sequences([(one, 3.0), (other, 1.0)], training, 0))

    assert len(batches) == training.steps == 1000
    rows = np.concatenate(batches)
    assert (np.diff(rows) == 1).all()  # no sequence crosses an end
    assert abs((rows[:, 0] < 1000).mean() - 0.75) < 0.03
    of_other = rows[rows[:, 0] >= 1000][:, 0]
    assert of_other[:3].tolist() == [1000, 1016, 1032]


def test_differences_are_paired_and_disagreement_is_told() -> None:
    def run(bits: float, right: float) -> dict:
        tasks = {"word_order": right, "word_choice": right}
        return {"bits_per_byte": bits, **tasks, "accuracy": right, "tokens_there": 10}

    found = summarize(
        {"none": [run(3, 0.5), run(4, 0.6), run(5, 0.7)], "x": [run(2.5, 0.4), run(3.5, 0.5), run(4.5, 0.6)]},
        Training(),
    )
    first, second = found["arms"]

    assert first["bits_per_byte"]["value"] == 4
    # Student's t of 2 degrees of freedom: 4.3027 · 1 / √3
    assert first["bits_per_byte"]["interval"] == pytest.approx([4 - 2.4841, 4 + 2.4841], abs=1e-3)
    assert second["accuracy_difference"]["interval"] == pytest.approx([-0.1, -0.1])
    assert found["warning"].startswith("x has the fewest bits per byte, none the highest accuracy")
    assert find_disagreement(found["arms"][:1]) is None
    arms = [
        {"arm": name, "bits_per_byte": {"value": bits}, "accuracy": {"value": right}}
        for name, bits, right in (("a", 3.0, 0.5), ("b", 3.1, 0.6), ("c", 2.9, 0.7))
    ]
    assert find_disagreement(arms) == "perplexity and accuracy both choose c, but disagree on a and b"
    assert find_disagreement(arms[::2]) is None


def test_mixes(tmp_path: Path) -> None:
    files = {"en": tmp_path / "en.jsonl", "es": tmp_path / "es.jsonl"}

    assert parse_mix("en:1,es:2.5", files) == Arm("en:1,es:2.5", ((files["en"], 1.0), (files["es"], 2.5)))
    assert parse_mix("es", files).parts == ((files["es"], 1.0),)
    for mix, message in (("fr:1", "names 'fr'"), ("en:x", "a weight is a number"), ("en:-1", "a weight")):
        with pytest.raises(UserError, match=message):
            parse_mix(mix, files)


def test_commands(tmp_path: Path) -> None:
    for name in ("en", "es", "judge"):
        write(tmp_path / f"{name}.jsonl", 30, len(name))
    words = [
        *("--texts", f"en={tmp_path / 'en.jsonl'}", "--texts", f"es={tmp_path / 'es.jsonl'}"),
        *(
            "--mix",
            "en",
            "--mix",
            "en:1,es:1",
            "--judge",
            tmp_path / "judge.jsonl",
            "--hidden",
            32,
            "--layers",
            1,
        ),
        *("--tokens", 8192, "--seeds", 2, "-o", tmp_path / "out"),
    ]

    def ablate(*more: object) -> str:
        given = ["llm", "corpus", "ablate", *map(str, (*words, *more))]
        return CliRunner().invoke(app, given, catch_exceptions=False).stdout

    assert ablate("--dry-run") == "2 × 2 models of 2 steps: en, en:1,es:1\n"
    assert not (tmp_path / "out").exists()
    table = ablate()
    assert table.startswith("| texts | tokens |")
    assert "| en:1,es:1 |" in table
    with pytest.raises(UserError, match="a multiple of 32"):
        ablate("--hidden", 33)
    with pytest.raises(UserError, match="give a file of texts and --recipes"):
        ablate(tmp_path / "en.jsonl")
    with pytest.raises(UserError, match="did you mean gopher"):
        Plan(tmp_path / "en.jsonl", ["none", "gophr"], [], [], [], None)
