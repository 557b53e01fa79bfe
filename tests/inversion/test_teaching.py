"""The closed loop: what is drawn before and after differs by what was learned, and by nothing else."""

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from concept_pictures import draw_concept
from PIL import Image
from real_command import call, start
from scipy.special import softmax

from t2iprobe import wordnet
from t2iprobe.config import load_study
from t2iprobe.errors import UserError
from t2iprobe.hypernymy.hierarchy import Hierarchy
from t2iprobe.hypernymy.study import load_scorers, run_study
from t2iprobe.inversion import teaching
from t2iprobe.inversion.commands import load_training
from t2iprobe.inversion.settings import Training
from t2iprobe.inversion.teaching import find_pictures, plan_lessons, put_token, teach
from t2iprobe.runs import Run

RUN = {
    "synsets": "dog.n.01,bird.n.01",
    "samples": 2,
    "steps": 2,
    "guidance": 3.0,
    "dtype": "float32",
    "keep": "all",
    "scheduler": "DPMSolverMultistepScheduler",
}
QUICK = ("stop=budget", "max_steps=2", "items=2", "batch=1")


def settings_for(*more: str) -> Training:
    return load_training({}, [*QUICK, *more])


@pytest.fixture(scope="module")
def run(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A probe's run of two words, with another scheduler than the model's own."""
    study = load_study(None, {"model": str(tiny_model), **RUN})
    return run_study(study, tmp_path_factory.mktemp("runs") / "tiny").path


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for seed, name in enumerate(("dog", "bird.n.01")):
        draw_concept(folder / name, seed)
    return folder


@pytest.fixture
def knows_birds(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run whose results say that birds are known: a tiny model knows nothing."""
    results = {"synsets": [{"synset": "bird.n.01", "known": True, "isp": 0.5}]}
    monkeypatch.setattr(teaching, "read_results", lambda _: results)


def read_pictures(folder: Path) -> list[np.ndarray]:
    files = sorted(folder.glob("*.png"), key=lambda path: int(path.stem))
    return [np.asarray(Image.open(file)) for file in files]


def same(one: list[np.ndarray], other: list[np.ndarray]) -> bool:
    return len(one) == len(other) and all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("method", ["textual-inversion", "dreambooth-lora", "custom-diffusion"])
@pytest.mark.usefixtures("knows_birds")
def test_a_token_that_equals_its_word_changes_no_picture(
    run: Path, pictures: Path, tmp_path: Path, method: str
) -> None:
    # Words of the tiny vocabulary are single letters: three vectors are those of "dog".
    settings = settings_for("init=dog", "vectors=3", "row_rate=1e-20", "rate=1e-30")

    found = teach(run, ["dog"], pictures, tmp_path / "out", methods=[method], samples=3, settings=settings)

    (row,) = found["words"]
    assert (row["prompt_before"], row["prompt_after"]) == ("An image of a dog.", "An image of a <dog>.")
    probe = tmp_path / "out" / "probe" / "dog.n.01"
    assert same(read_pictures(probe / "before"), read_pictures(probe / method))
    assert row["before"] == row["after"]
    assert row["difference"] == {"value": 0.0, "interval": [0.0, 0.0], "p": 1.0, "q": 1.0}
    assert not row["significant"]
    others = found["others"][method]
    if method == "textual-inversion":
        assert others is None  # which changes no other word
    else:
        assert others["words"] == ["bird.n.01"]
        assert others["difference"]["value"] == 0.0


@pytest.fixture(scope="module")
def taught(run: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two words taught roughly, so that the pictures change."""
    out = tmp_path_factory.mktemp("taught") / "out"
    found = teach(run, ["dog", "bird"], pictures, out, samples=3, settings=settings_for("init=thing"))
    assert found == json.loads((out / "results.json").read_text())
    return out


def test_pictures_before_are_those_of_the_run(run: Path, taught: Path) -> None:
    for synset in ("dog.n.01", "bird.n.01"):
        drawn = [np.asarray(Image.open(path)) for path in Run.open(run).pictures(synset)]
        before = read_pictures(taught / "probe" / synset / "before")
        # In another batch, so the same but for the processor's rounding.
        assert all(np.abs(a.astype(int) - b).max() <= 1 for a, b in zip(drawn, before[:2], strict=True))
        assert not same(before, read_pictures(taught / "probe" / synset / "textual-inversion"))


def test_the_results_are_those_of_the_pictures(run: Path, taught: Path) -> None:
    import jsonschema

    results = json.loads((taught / "results.json").read_text())
    schema = json.loads((Path(teaching.__file__).parents[1] / "pages" / "teaching.schema.json").read_text())
    jsonschema.validate(results, schema)
    assert (taught / "report.html").exists()
    study = load_study(None, {"model": "tiny", **RUN})
    scorer = load_scorers(study, "cpu", 1000)["embedded"]
    assert [row["synset"] for row in results["words"]] == ["dog.n.01", "bird.n.01"]
    for row in results["words"]:
        subtree = Hierarchy.imagenet().subtree(row["synset"])
        probe = taught / "probe" / row["synset"]
        isp = {}
        for label in ("before", "textual-inversion"):
            logits = scorer.score(read_pictures(probe / label))
            isp[label] = softmax(logits.astype(np.float64), axis=1)[:, subtree].sum(axis=1)
        assert row["before"]["value"] == pytest.approx(isp["before"].mean(), rel=0.02)
        assert row["after"]["value"] == pytest.approx(isp["textual-inversion"].mean(), rel=0.02)
        difference = row["difference"]
        assert difference["value"] == pytest.approx(row["after"]["value"] - row["before"]["value"], abs=1e-12)
        low, high = difference["interval"]
        assert low <= difference["value"] <= high
        assert 0 < difference["p"] <= 1
        assert row["steps"] == 2
        assert all((taught / file).exists() for file in [*row["pictures_before"], *row["pictures_after"]])
    first, second = sorted((row["difference"] for row in results["words"]), key=lambda each: each["p"])
    assert first["q"] == min(1, 2 * first["p"])  # Holm 1979
    assert second["q"] == max(first["q"], second["p"])


def test_the_same_call_draws_nothing_again_and_another_method_joins(
    run: Path, taught: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taught = Path(shutil.copytree(taught, tmp_path / "out"))
    before = {path: path.stat().st_mtime_ns for path in (taught / "probe").rglob("*.npz")}
    old = json.loads((taught / "results.json").read_text())
    drawn: list[str] = []
    original = teaching._Prober._judge

    def judge(self: Any, entries: Any, method: Any) -> Any:
        drawn.append(method.name)
        return original(self, entries, method)

    monkeypatch.setattr(teaching._Prober, "_judge", judge)
    new = teach(run, ["dog", "bird"], pictures, taught, samples=3, settings=settings_for("init=thing"))

    assert drawn == []
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert {**new, "seconds": 0, "created": ""} == {**old, "seconds": 0, "created": ""}
    both = teach(
        run, ["dog"], pictures, taught, methods=["textual-inversion", "dreambooth-lora"], samples=3,
        settings=settings_for("init=thing"),
    )  # fmt: skip
    assert drawn == ["dreambooth-lora"]
    assert [row["method"] for row in both["words"]] == ["textual-inversion", "dreambooth-lora"]


def test_a_killed_teaching_ends_as_an_unbroken_one(
    run: Path, pictures: Path, taught: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    words = [
        *("inversion", "teach", run, "dog", "bird", "--pictures", pictures, "--samples", 3, "--out", out),
        *(f"--set={pair}" for pair in (*QUICK, "init=thing")),
    ]
    probe = out / "probe" / "dog.n.01" / "before.npz"
    assert start(*words).kill_when(probe.exists).code == -signal.SIGKILL
    kept = probe.stat().st_mtime_ns
    assert not (out / "results.json").exists()
    stopped = start(*words).kill_when((out / "textual-inversion" / "dog.n.01").exists, signal.SIGTERM)
    assert (stopped.code, stopped.out) == (130, "")
    assert stopped.err == f"t2iprobe: stopped: the same command continues what is in {out}\n"

    done = call(*words)

    assert "An image" not in done.out
    assert "dog" in done.out
    assert probe.stat().st_mtime_ns == kept
    assert not list(out.rglob("*.tmp"))
    rows = [json.loads((folder / "results.json").read_text())["words"] for folder in (out, taught)]
    for one, other in zip(*rows, strict=True):
        for key in ("before", "after", "difference", "significant"):
            assert one[key] == other[key]


def test_mistakes_are_told(run: Path, taught: Path, pictures: Path, tmp_path: Path) -> None:
    def refuse(message: str, where: Path, words: list[str], folder: Path | None, out: Path) -> None:
        with pytest.raises(UserError, match=message) as raised:
            teach(where, words, folder, out, settings=settings_for())
        assert "\n" not in str(raised.value)

    out = tmp_path / "out"
    refuse("dgo", run, ["dgo"], pictures, out)
    refuse(
        r"no pictures of tiger.* it has bird\.n\.01, dog\.n\.01; give --pictures",
        run,
        ["tiger"],
        pictures,
        out,
    )
    refuse("there is no folder", run, ["dog"], tmp_path / "none", out)
    (tmp_path / "empty" / "dog").mkdir(parents=True)
    refuse("it has none", run, ["dog"], tmp_path / "empty", out)
    (tmp_path / "file").write_text("mine")
    refuse("is a file", run, ["dog"], pictures, tmp_path / "file")
    refuse("not a run directory", tmp_path, ["dog"], pictures, out)
    assert not out.exists()

    made = tmp_path / "made"
    draw_concept(made / "dog.n.01")
    judged = run_study(load_study(None, {"model": "folder"}), tmp_path / "judged", folder=made)
    refuse("judged pictures made elsewhere", judged.path, ["dog"], pictures, out)


def test_pictures_that_cannot_be_read_are_told_before_anything_is_drawn(run: Path, tmp_path: Path) -> None:
    for seed, name in enumerate(("dog", "bird")):
        draw_concept(tmp_path / "pictures" / name, seed)
    bad = tmp_path / "pictures" / "bird" / "1.png"
    bad.write_bytes(bad.read_bytes()[:60])
    out = tmp_path / "out"
    with pytest.raises(UserError, match=f"cannot read the picture {bad}"):
        teach(
            run, ["dog", "bird"], tmp_path / "pictures", out, samples=1, settings=settings_for("init=thing")
        )
    assert not out.exists()


def test_of_several_methods_those_without_a_use_for_a_prior_go_without_it(
    run: Path, pictures: Path, tmp_path: Path
) -> None:
    settings = settings_for("init=thing", "prior=bird", "prior_pictures=1")
    out = tmp_path / "out"
    with pytest.raises(UserError, match="leave --prior out"):
        teach(run, ["dog"], pictures, out, samples=1, settings=settings)
    assert not out.exists()  # told before anything is drawn

    methods = ["textual-inversion", "custom-diffusion", "textual-inversion"]
    found = teach(run, ["dog"], pictures, out, methods=methods, samples=1, settings=settings)

    assert found["methods"] == [row["method"] for row in found["words"]] == methods[:2]
    priors = {
        name: json.loads((out / name / "dog.n.01" / "training.json").read_text())["settings"]["prior"]
        for name in methods
    }
    assert priors == {"textual-inversion": None, "custom-diffusion": "bird"}


def test_another_run_does_not_take_the_folder(
    tiny_model: Path, taught: Path, pictures: Path, tmp_path: Path
) -> None:
    study = load_study(None, {"model": str(tiny_model), **RUN, "seed": 1, "synsets": "dog", "samples": 1})
    other = run_study(study, tmp_path / "run")
    with pytest.raises(UserError, match=r"holds another teaching \(seed: 0 there, 1 now\)"):
        teach(other.path, ["dog"], pictures, taught, samples=3, settings=settings_for("init=thing"))


def test_damaged_probabilities_are_named(run: Path, pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    teach(run, ["dog"], pictures, out, samples=2, settings=settings_for("init=thing"))
    file = out / "probe" / "dog.n.01" / "before.npz"
    file.write_bytes(file.read_bytes()[:-30])
    with pytest.raises(UserError, match=r"before\.npz is damaged.*remove it"):
        teach(run, ["dog"], pictures, out, samples=2, settings=settings_for("init=thing"))


def test_unknown_words_of_which_there_are_pictures_are_taught(tmp_path: Path) -> None:
    hierarchy = Hierarchy.imagenet()
    study = load_study(None, {"model": "tiny"})
    for name in ("dog", "n01503061"):  # a bird
        draw_concept(tmp_path / name)
    (tmp_path / "cat").mkdir()  # without pictures
    results = {"synsets": [{"synset": "bird.n.01", "known": True}, {"synset": "dog.n.01", "known": False}]}

    (lesson,) = plan_lessons(study, results, hierarchy, [], tmp_path, samples=2)
    assert (lesson.synset, lesson.word, lesson.token) == ("dog.n.01", "dog", "<dog>")
    assert lesson.pictures == tmp_path / "dog"
    both = plan_lessons(study, {"synsets": []}, hierarchy, [], tmp_path, samples=2)
    assert {each.synset for each in both} == {"dog.n.01", "bird.n.01"}
    known = {"synsets": [{"synset": name, "known": True} for name in ("bird.n.01", "dog.n.01")]}
    with pytest.raises(UserError, match="knows every word"):
        plan_lessons(study, known, hierarchy, [], tmp_path, samples=2)
    (named,) = plan_lessons(study, known, hierarchy, ["dog"], tmp_path / "dog", samples=2)
    assert named.pictures == tmp_path / "dog"


def test_the_packaged_concepts_are_words_of_the_hierarchy() -> None:
    hierarchy = Hierarchy.imagenet()
    study = load_study(None, {"model": "tiny"})
    found = find_pictures(None, hierarchy)
    lessons = plan_lessons(study, {"synsets": []}, hierarchy, [], None, samples=1)
    assert len(found) == len(lessons) == len({each.token for each in lessons}) == 14
    for lesson in lessons:
        assert lesson.token in lesson.taught()[0].prompt
        assert lesson.taught()[0].seed == lesson.entries[0].seed


def test_words_of_one_name_get_tokens_of_their_own(tmp_path: Path) -> None:
    for name in ("crane.n.04", "crane.n.05"):
        draw_concept(tmp_path / name)
    study = load_study(None, {"model": "tiny"})
    lessons = plan_lessons(study, {"synsets": []}, Hierarchy.imagenet(), [], tmp_path, samples=1)
    assert {each.word for each in lessons} == {"crane"}
    assert {each.token for each in lessons} == {"<crane-n-04>", "<crane-n-05>"}
    assert wordnet.synset("crane.n.04") != wordnet.synset("crane.n.05")


def test_a_token_takes_the_place_of_its_word_alone() -> None:
    assert put_token("a sharp photo of a harp", "harp", "<harp>") == "a sharp photo of a <harp>"
    assert put_token("An image of a soccer ball.", "soccer ball", "<x>") == "An image of a <x>."
    with pytest.raises(UserError, match="does not name 'harp'"):
        put_token("a sharp photo", "harp", "<harp>")
