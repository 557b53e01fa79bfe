"""The engine in lm-evaluation-harness: scores and texts of the harness's own Hugging Face model."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from language_toys import make_toy, save_toy
from page_checks import check_page
from typer.testing import CliRunner

from t2iprobe.cli import app
from t2iprobe.errors import UserError
from t2iprobe.llm.commands import load_engine
from t2iprobe.llm.engine.generation import Trees

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")

LETTERS = "abcdefghijklmnopqrstuvwxyz"


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_toy(tmp_path_factory.mktemp("target") / "toy", make_toy(layers=4, context=1024))


def make_rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(seed)

    def word(size: int) -> str:
        return "".join(LETTERS[int(i)] for i in torch.randint(26, (size,), generator=generator))

    return [
        {
            "question": f"{word(6)} {word(5)}",
            "choices": [word(3), word(4), word(2)],
            "label": int(torch.randint(3, (), generator=generator)),
            "answer": word(3),
        }
        for _ in range(count)
    ]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of tasks over a local JSONL: choices, generation, perplexity."""
    folder = tmp_path_factory.mktemp("tasks")
    for split, seed in (("train", 1), ("test", 2)):
        text = "".join(json.dumps(row) + "\n" for row in make_rows(200, seed))
        (folder / f"{split}.jsonl").write_text(text)
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {s: str(folder / f"{s}.jsonl") for s in ("train", "test")},
            "cache_dir": str(folder / "cache"),
        },
        "test_split": "test",
        "fewshot_split": "train",
        "doc_to_text": "q.{{question}}.a.",
        "target_delimiter": "",
        "metadata": {"version": 1.0},
    }
    several = {
        "toy_choices": {
            "output_type": "multiple_choice",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "label",
            "num_fewshot": 2,
            "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}, {"metric": "acc_mutual_info"}],
        },
        "toy_generation": {
            "output_type": "generate_until",
            "doc_to_target": "{{answer}}",
            "num_fewshot": 1,
            "generation_kwargs": {"until": ["z", "qq"], "do_sample": False, "max_gen_toks": 24},
            "metric_list": [{"metric": "exact_match"}],
        },
        "toy_perplexity": {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{question}}",
            "metric_list": [{"metric": "byte_perplexity"}],
        },
    }
    for name, task in several.items():
        (folder / f"{name}.yaml").write_text(json.dumps({"task": name} | common | task))
    return folder


def run(model: Any, tasks: Path, name: str, limit: int) -> Any:
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    return simple_evaluate(
        model=model, tasks=[name], limit=limit, task_manager=manager, bootstrap_iters=0, log_samples=True
    )


def plain_model(target: Path) -> Any:
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=str(target), device="cpu", dtype="float64", batch_size=8)


@pytest.mark.parametrize(
    ("name", "limit"), [("toy_choices", 200), ("toy_generation", 24), ("toy_perplexity", 20)]
)
def test_results_are_those_of_the_harness_own_model(target: Path, tasks: Path, name: str, limit: int) -> None:
    from t2iprobe.llm.harness import EngineLM

    wanted = run(plain_model(target), tasks, name, limit)
    with load_engine(str(target), "early-exit:2", dtype="float64") as engine:
        model = EngineLM(engine, Trees("best-first", 8), batch=4)
        found = run(model, tasks, name, limit)
    assert found["results"][name] == pytest.approx(wanted["results"][name])
    pairs = list(zip(found["samples"][name], wanted["samples"][name], strict=True))
    assert len(pairs) == limit
    for ours, theirs in pairs:
        assert ours["doc_id"] == theirs["doc_id"]
        for own, other in zip(ours["resps"], theirs["resps"], strict=True):
            if name == "toy_choices":
                (value, best), (wanted_value, wanted_best) = own[0], other[0]
                assert float(value) == pytest.approx(float(wanted_value), abs=1e-6)
                assert best == wanted_best
            elif name == "toy_generation":
                assert own == other
    cost = model.cost.describe()
    if name == "toy_generation":
        assert cost["tokens_per_pass"] > 1
        assert cost["scored_tokens"] == 0
        assert len({ours["resps"][0][0] for ours, _ in pairs}) > 1
    else:
        assert cost["scored_tokens"] > 0
        assert cost["written_tokens"] == 0


def test_text_is_drawn_anew_for_each_request(target: Path) -> None:
    from lm_eval.api.instance import Instance

    from t2iprobe.llm.harness import EngineLM

    def ask(settings: dict[str, Any], times: int) -> list[str]:
        requests = [
            Instance("generate_until", {}, ("tea", settings), number, metadata=("t", number, 1))
            for number in range(times)
        ]
        with load_engine(str(target), "none", dtype="float64") as engine:
            return EngineLM(engine, batch=3).generate_until(requests)

    drawn = {"do_sample": True, "temperature": 2.0, "max_gen_toks": 12, "until": []}
    texts = ask(drawn, 5)
    assert len(set(texts)) > 1
    assert texts == ask(drawn, 5)
    assert len(set(ask({"max_gen_toks": 12, "until": []}, 4))) == 1
    with pytest.raises(UserError, match="cannot generate with num_beams"):
        ask({"num_beams": 4}, 1)
    with pytest.raises(UserError, match="leaves no room"):
        ask({"max_gen_toks": 2000}, 1)


def test_the_wordnet_suite_is_run_continued_and_aggregated(target: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = [
        "llm",
        "evaluate",
        "--suite",
        "wordnet",
        "--limit",
        "6",
        "--model",
        str(target),
        "--draft",
        "none",
    ]
    words += ["--out", str(out), "--device", "cpu", "--json"]
    result = CliRunner().invoke(app, words, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found == json.loads((out / "results.json").read_text())
    assert {"results", "configs", "versions", "n-shot", "n-samples", "higher_is_better"} <= set(found)
    by_kind: dict[str, list[float]] = {}
    for line in found["t2iprobe"]:
        assert 0 <= line["value"] <= 1
        assert line["documents"] == 6
        assert line["task"] in found["results"]
        by_kind.setdefault(line["kind"], []).append(line["value"])
    for kind, values in by_kind.items():
        assert found[kind]["value"] == pytest.approx(sum(values) / len(values))
    assert {kind: len(values) for kind, values in by_kind.items()} == {"factuality": 2, "faithfulness": 3}
    check_page((out / "report.html").read_text())

    lost = out / "parts" / "caption_trap.json"
    times = {path: path.stat().st_mtime_ns for path in lost.parent.iterdir()}
    lost.unlink()
    CliRunner().invoke(app, words, catch_exceptions=False)
    assert {path for path in times if path.stat().st_mtime_ns != times[path]} == {lost}
    with pytest.raises(UserError, match="results of another limit"):
        CliRunner().invoke(app, [*words, "--limit", "7"], catch_exceptions=False)
    lost.write_text("{")
    with pytest.raises(UserError, match="is damaged"):
        CliRunner().invoke(app, words, catch_exceptions=False)


def test_mistakes_are_told_in_a_line(tmp_path: Path) -> None:
    out = ["--out", str(tmp_path / "out")]
    for words, match in (
        (["--tasks", "t2iprobe_wn_swp"], "did you mean t2iprobe_wn_swap"),
        (["--tasks", "helaswag"], "did you mean hellaswag"),
        (["--suite", "halucination"], "did you mean hallucination"),
        (["--suite", "wordnet", "--data", "disk"], "not from 'disk'"),
        ([], "give --tasks"),
        (["--tasks", "a", "--suite", "b"], "give --tasks"),
        (["--suite", "wordnet", "--limit", "0"], "1 document or more"),
    ):
        with pytest.raises(UserError, match=match):
            CliRunner().invoke(app, ["llm", "evaluate", *words, *out], catch_exceptions=False)
    assert not (tmp_path / "out").exists()


def test_data_that_cannot_be_had_is_told_in_a_line(target: Path, tmp_path: Path) -> None:
    words = ["llm", "evaluate", "--tasks", "hellaswag", "--model", str(target), "--draft", "none"]
    with pytest.raises(UserError, match="'hellaswag' cannot be had here: .* install from packages"):
        CliRunner().invoke(app, [*words, "--out", str(tmp_path / "out")], catch_exceptions=False)


def test_a_task_that_needs_another_package_names_it(
    target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from t2iprobe.llm import evaluation

    (tmp_path / "odd.py").write_text("import no_such_package\n")
    (tmp_path / "odd.yaml").write_text("task: odd\ndataset_path: json\nprocess_docs: !function odd.read\n")
    monkeypatch.setattr(evaluation, "TASKS", tmp_path)
    words = ["llm", "evaluate", "--tasks", "odd", "--model", str(target), "--draft", "none"]
    with pytest.raises(UserError, match="the task 'odd' needs no_such_package: pip install no_such_package"):
        CliRunner().invoke(app, [*words, "--out", str(tmp_path / "out")], catch_exceptions=False)


def test_the_harness_is_quiet(target: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from t2iprobe.llm.evaluation import evaluate, plan_tasks

    with load_engine(str(target), "none", dtype="float64") as engine:
        capfd.readouterr()
        found = evaluate(engine, plan_tasks(["t2iprobe_wn_trap"]), tmp_path / "out", limit=3)
    assert capfd.readouterr() == ("", "")
    assert found["factuality"] is None
    assert found["results"]["t2iprobe_wn_trap"]["acc,none"] in (0, 1 / 3, 2 / 3, 1)


def test_the_plan_names_what_is_left_out(tmp_path: Path) -> None:
    words = [
        "llm",
        "evaluate",
        "--suite",
        "hallucination",
        "--out",
        str(tmp_path / "out"),
        "--dry-run",
        "--json",
    ]
    plan = json.loads(CliRunner().invoke(app, words, catch_exceptions=False).stdout)
    assert plan["tasks"]["fever11"] == "t2iprobe_fever"
    assert "hub" in plan["left_out"]["race"]
    assert len(plan["tasks"]) + len(plan["left_out"]) == 22
    hub = CliRunner().invoke(app, [*words, "--data", "hub"], catch_exceptions=False)
    assert json.loads(hub.stdout)["tasks"]["race"] == "race"


def test_without_the_harness_the_command_says_what_to_install(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['lm_eval'] = sys.modules['lm_eval.tasks'] = None\n"
        "from t2iprobe.cli import main\n"
        f"sys.argv = ['t2iprobe', 'llm', 'evaluate', '--tasks', 'x', '--out', {str(tmp_path / 'out')!r}]\n"
        "main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "pip install 't2iprobe[harness]'" in done.stderr
