"""The pages of a training and of a teaching: self-contained, with the numbers of their JSON."""

import itertools
import json
import math
from importlib.resources import files
from types import SimpleNamespace

import jsonschema
import pytest
from page_checks import check_page
from training_example import TOKEN, WORDS, make_curve, make_teaching, make_training

from t2iprobe.errors import UserError
from t2iprobe.inversion import teaching_page, training_page
from t2iprobe.inversion.report import write_report, write_teaching_report
from t2iprobe.pages import charts, format_seconds


def load_schema(name):
    text = (files("t2iprobe.pages") / f"{name}.schema.json").read_text(encoding="utf-8")
    return jsonschema.Draft202012Validator(json.loads(text))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained") / "out"
    training = make_training(folder)
    text = write_report(folder).read_text(encoding="utf-8")
    return SimpleNamespace(training=training, folder=folder, text=text, page=check_page(text))


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    folder = tmp_path_factory.mktemp("taught")
    results = make_teaching(folder)
    text = write_teaching_report(folder).read_text(encoding="utf-8")
    return SimpleNamespace(results=results, folder=folder, text=text, page=check_page(text))


def read(out):
    return json.loads((out / "training.json").read_text(encoding="utf-8"))


def test_examples_follow_the_stated_schemas(trained, taught):
    load_schema("training").validate(read(trained.folder))
    load_schema("teaching").validate(json.loads((taught.folder / "results.json").read_text()))
    assert not load_schema("training").is_valid({**trained.training, "stop": {"rule": "plateau"}})
    wrong = {**taught.results["words"][0], "after": {"value": 1.5, "interval": None}}
    assert not load_schema("teaching").is_valid({**taught.results, "words": [wrong]})


def test_numbers_in_the_training_page_are_those_of_its_json(trained):
    texts, training = trained.page.texts, trained.training
    evaluation = training["evaluation"]
    assert texts["headline-steps"] == "410"
    assert texts["headline-seconds"] == "1 min 23 s"
    assert texts["headline-likeness"] == f"{evaluation['likeness']['value']:.4f}"
    for measure in ("likeness", "obedience", "diversity"):
        for value in (evaluation[measure]["value"], *evaluation[measure]["before"]["interval"]):
            assert f"{value:.4f}" in texts["measures"]
    assert training["stop"]["reason"] in trained.text
    step, loss = training["curve"][0]
    assert f"{step}{loss:.6f}" in texts["curve-table"]
    assert "violin" in texts["settings"]


def test_every_grid_and_the_concept_are_shown(trained):
    pictures = [a["alt"] for tag, a in trained.page.tags if tag == "img"]
    assert len(pictures) == 4 + 5 * 4
    assert f"drawn at step 410 for “a rendering of a {TOKEN}”" in pictures


def test_the_stop_is_marked_where_it_was(trained):
    plots = {chart["id"]: chart for chart in training_page.draw_plots(trained.training)}
    assert list(plots) == ["curve", "statistic", "bands", "trained"]
    curve = plots["curve"]["plot"]
    assert curve["x_of"](410) == pytest.approx(curve["width"] / training_page.BEYOND)
    mark = f'class="stop" x1="{round(curve["x_of"](410), 1)}"'
    assert trained.text.count('class="stop" ') == 4
    assert mark in trained.text
    assert plots["statistic"]["threshold"] == (0.05, "stops below 0.05")


@pytest.mark.parametrize(
    ("rule", "method", "ids", "threshold"),
    [
        ("dvar", "dreambooth-lora", ["curve", "statistic", "bands", "trained"], "stops below 0.4"),
        ("clip", "textual-inversion", ["curve", "statistic", "bands", "trained"], "stops above 6"),
        ("budget", "custom-diffusion", ["curve", "bands", "trained"], None),
    ],
)
def test_each_rule_has_its_page(tmp_path, rule, method, ids, threshold):
    stop = {"rule": rule, "step": 410, "value": 0.1, "reason": "as it says"}
    training = make_training(tmp_path, stop=stop, method=method, grids=(410,))
    page = check_page(write_report(tmp_path).read_text(encoding="utf-8"))

    plots = training_page.draw_plots(training)
    assert [chart["id"] for chart in plots] == ids
    assert [chart["threshold"][1] for chart in plots if chart["threshold"]] == (
        [threshold] if threshold else []
    )
    assert set(ids) <= {id.removesuffix("-title") for id in page.ids}


@pytest.mark.parametrize("rule", ["plateau", "clip"])
def test_a_capped_training_shows_what_its_rule_watched(tmp_path, rule):
    stop = {"rule": "cap", "step": 410, "value": 0.1, "reason": "the cap of 410 steps was reached"}
    training = make_training(tmp_path, stop=stop, grids=())
    training["settings"]["stop"] = rule
    load_schema("training").validate(training)
    capped, stopped = (
        [(chart["title"], chart["threshold"]) for chart in training_page.draw_plots(each)]
        for each in (training, {**training, "stop": {**stop, "rule": rule}})
    )
    assert capped == stopped


def test_a_training_that_broke_has_a_page(tmp_path):
    stop = {"rule": "nan", "step": 0, "value": None, "reason": "the loss was not a number at step 10"}
    make_training(
        tmp_path, stop=stop, steps=0, evaluation=False, grids=(), curve=[[0, 1.0]], train_loss=[],
        bands=[[0, 0.5, None, 0.1]], statistic=[[0, None]], pictures=["gone/0.png"],
        initial={"how": "random", "words": []},
    )  # fmt: skip
    text = write_report(tmp_path).read_text(encoding="utf-8")

    page = check_page(text)
    assert "The training broke off" in text
    assert "No pictures were drawn on the way" in text
    assert "gone/0.png" in page.texts["pictures"]
    assert "evaluation" not in page.ids


def test_an_evaluation_without_before_or_obedience_has_a_page(tmp_path):
    training = make_training(tmp_path, grids=(0,))
    evaluation = training["evaluation"]
    evaluation |= {"obedience": None, "diversity": None}
    evaluation["likeness"] |= {"before": None, "difference": None, "interval": None, "among_concept": None}
    (tmp_path / "training.json").write_text(json.dumps(training))

    page = check_page(write_report(tmp_path).read_text(encoding="utf-8"))

    assert "Diversity" not in page.texts["measures"]


def test_pictures_are_found_from_where_the_training_ran(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(trained.folder.parent)
    assert len(training_page.load_pictures(["concept/0.png", "none.png"], tmp_path)) == 1


def test_commands_repeat_what_differs_from_the_defaults(trained, taught):
    command = training_page.write_command(trained.training)
    folder = trained.folder / "../concept"
    assert command == (
        f"t2iprobe inversion train {folder} --token '{TOKEN}' --model embedded "
        "--method textual-inversion --stop plateau --seed 3 --out OUT"
    )
    settings = {**trained.training["settings"], "row_rate": 0.1, "flip": False}
    command = training_page.write_command({**trained.training, "settings": settings})
    assert "--set row_rate=0.1 --set flip=false --out" in command
    command = teaching_page.write_command(taught.results)
    assert f"teach runs/embedded {' '.join(WORDS)} --pictures concepts --method textual-inversion" in command
    assert command.endswith("--samples 16 --set row_rate=0.02 --out OUT")


def test_the_training_command_is_one_that_the_program_takes(trained):
    import shlex

    from typer.main import get_command

    from t2iprobe.cli_inversion import inversion

    words = shlex.split(training_page.write_command(trained.training))
    parsed = get_command(inversion).commands["train"].make_context("train", words[3:])
    assert (parsed.params["token"], parsed.params["seed"]) == (TOKEN, 3)


@pytest.mark.parametrize(
    ("method", "files"),
    [
        ("textual-inversion", ["learned_embeds.safetensors"]),
        ("textual-inversion", ["learned_embeds.safetensors", "learned_embeds_2.safetensors"]),
        ("dreambooth-lora", [training_page.LORA, "learned_embeds.safetensors"]),
        ("custom-diffusion", [training_page.CUSTOM_DIFFUSION, "learned_embeds.safetensors"]),
    ],
)
def test_usage_is_python_that_loads_every_file(trained, method, files):
    training = {**trained.training, "method": method, "files": [*files, "harp.safetensors"]}
    lines = training_page.write_usage({**training, "model": "org/model"})

    compile(lines, "usage", "exec")
    assert all(name in lines for name in files)
    assert ("text_encoder_2" in lines) == ("learned_embeds_2.safetensors" in files)
    assert 'from_pretrained("org/model")' in lines
    interfaces = training_page.list_interfaces(training)
    page = check_page(training_page.render({**training, "grids": []}, trained.folder))
    assert all(line in page.texts["use"] for entry in interfaces for line in entry["commands"].split("\n"))
    assert len(interfaces) == (0 if method == "custom-diffusion" else 2)
    assert all(("--to kohya" in entry["commands"]) == (method == "dreambooth-lora") for entry in interfaces)
    assert all(entry["commands"].startswith("cp OUT/harp.safetensors ") for entry in interfaces)


def test_a_model_without_a_loader_gets_ours(trained):
    training = {**trained.training, "files": ["learned_embeds.safetensors"]}
    lines = training_page.write_usage(training)

    compile(lines, "usage", "exec")
    assert "load_into(pipe" in lines
    assert training_page.list_interfaces(training) == []


def test_fluxs_t5_is_given_plain_words(trained):
    lines = training_page.write_usage({**trained.training, "token": "<my-cat>", "pipeline": "FluxPipeline"})
    compile(lines, "usage", "exec")
    assert 'pipe("a photo of a <my-cat>", prompt_2="a photo of a my cat")' in lines


def test_no_command_is_told_for_adapters_that_kohya_has_no_names_for(trained):
    files = [training_page.LORA, "learned_embeds.safetensors", "harp.safetensors"]
    training = {**trained.training, "pipeline": "FluxPipeline"}
    assert training_page.list_interfaces({**training, "files": files}) == []
    assert training_page.list_interfaces({**training, "files": files[1:]})
    assert training_page.list_interfaces({**trained.training, "files": files})


def test_the_written_lines_draw(tmp_path, tiny_model):
    """A row that a training wrote, loaded by the page's own lines."""
    import torch

    from t2iprobe.inversion.formats import Embedding, write_embedding

    rows = {"clip_l": torch.randn(2, 32)}
    written = write_embedding(
        tmp_path / "learned_embeds.safetensors", Embedding(TOKEN, rows, {}), "diffusers"
    )
    training = make_training(tmp_path, grids=(), model=str(tiny_model), vectors=2)
    lines = training_page.write_usage(training).replace("OUT", str(tmp_path))
    lines = lines.replace("picture.png", str(tmp_path / "drawn.png"))
    exec(lines.replace(f'"a photo of a {TOKEN}"', f'"a photo of a {TOKEN}", num_inference_steps=1'))

    assert [path.name for path in written] == ["learned_embeds.safetensors"]
    assert (tmp_path / "drawn.png").stat().st_size > 100


def test_the_written_lines_pool_prompts_as_the_training_did(tmp_path):
    """SDXL, saved as it is published: with 2 as the end of a text."""
    import torch

    from t2iprobe.inversion.formats import Embedding, write_embedding
    from t2iprobe.testing import tiny_pipeline

    pipeline = tiny_pipeline("sdxl")
    for encoder in (pipeline.text_encoder, pipeline.text_encoder_2):
        encoder.config.eos_token_id = 2
    pipeline.save_pretrained(tmp_path)
    rows = {name: torch.randn(1, 32) for name in ("clip_l", "clip_g")}
    written = write_embedding(tmp_path / "learned_embeds.safetensors", Embedding(TOKEN, rows), "diffusers")
    names = [path.name for path in written]
    training = make_training(tmp_path, grids=(), model=str(tmp_path), files=[*names, "harp.safetensors"])
    ends = []
    for family in ("StableDiffusionPipeline", "StableDiffusionXLPipeline"):
        lines = training_page.write_usage({**training, "pipeline": family}).replace("OUT", str(tmp_path))
        exec(lines.rpartition("\n")[0], found := {})  # all but the drawing
        pipe = found["pipe"]
        ends.append([pipe.text_encoder.eos_token_id, pipe.text_encoder_2.text_model.eos_token_id])

    assert ends == [[2, 2], [pipeline.tokenizer.eos_token_id] * 2]


def test_the_written_lines_load_custom_diffusion(tmp_path, tiny_model):
    import torch

    from t2iprobe.inversion.backbones import make_backbone
    from t2iprobe.inversion.methods import CustomDiffusion
    from t2iprobe.pipelines import load_pipeline

    method = CustomDiffusion(make_backbone(load_pipeline(str(tiny_model), dtype="float32")), {TOKEN: 1})
    with torch.no_grad():
        for weight in method.weights():
            weight += torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    saved = method.save(TOKEN, tmp_path, {})
    training = make_training(
        tmp_path, grids=(), model=str(tiny_model), method="custom-diffusion", files=saved
    )
    *lines, _ = training_page.write_usage(training).replace("OUT", str(tmp_path)).splitlines()
    exec("\n".join(lines), names := {})

    given = torch.ones(1, 4, 16, 16), 500, torch.ones(1, 77, 32)
    with torch.no_grad():
        trained, loaded = (unet(*given).sample for unet in (method.backbone.denoiser, names["pipe"].unet))
        method.remove()
        assert not torch.allclose(method.backbone.denoiser(*given).sample, trained, atol=1e-3)
    assert torch.allclose(loaded, trained, atol=1e-5)


def test_numbers_in_the_teaching_page_are_those_of_its_json(taught):
    texts, rows = taught.page.texts, taught.results["words"]
    for method in taught.results["methods"]:
        risen = sum(row["significant"] for row in rows if row["method"] == method)
        assert texts[f"headline-{method}"] == f"{risen} of {len(WORDS)}"
    for row in rows:
        for value in (row["before"]["value"], row["after"]["value"], *row["after"]["interval"]):
            assert f"{value:.4f}" in texts["number-table"]
    drift = taught.results["others"]["custom-diffusion"]
    assert f"{drift['after']['value']:.4f}" in texts["other-table"]
    pictures = [a["alt"] for tag, a in taught.page.tags if tag == "img"]
    assert len(pictures) == len(WORDS) * (3 + 4 + 3 * 4)


def test_the_page_says_where_a_row_alone_failed(taught):
    def results(**risen):
        rows = [
            {"word": word, "method": method.replace("_", "-"), "significant": word in taught_words}
            for method, taught_words in risen.items()
            for word in ("harp", "pretzel", "tiger")
        ]
        return {"methods": [method.replace("_", "-") for method in risen], "words": rows}

    find = teaching_page.write_findings
    (one,) = find(results(textual_inversion={"tiger"}, dreambooth_lora={"harp", "pretzel", "tiger"}))
    assert one == (
        "A row alone can only combine what the model already draws: it could not teach harp and pretzel. "
        "Of these, by training weights of the denoiser too, DreamBooth-LoRA taught all."
    )
    row, never = find(results(textual_inversion=set(), custom_diffusion={"harp"}))
    assert "Custom Diffusion taught harp." in row
    assert never == "No method taught pretzel and tiger so that the classifier could tell."
    (enough,) = find(results(textual_inversion={"harp", "pretzel", "tiger"}))
    assert enough.startswith("A row alone was enough")
    (none,) = find(results(dreambooth_lora=set()))
    assert none.startswith("No method taught harp, pretzel and tiger")
    assert teaching_page.join_words(list("abcdefgh")) == "a, b, c, d, e and 3 others"
    assert teaching_page.join_words(["a"]) == "a"


def test_one_word_one_method_one_picture_has_a_page(tmp_path):
    results = make_teaching(tmp_path, words=WORDS[:1], methods=["dreambooth-lora"], samples=1, others=False)
    load_schema("teaching").validate(json.loads(json.dumps(results)))
    page = check_page(write_teaching_report(tmp_path).read_text(encoding="utf-8"))

    assert page.texts["headline-dreambooth-lora"] == "0 of 1"
    assert "others" not in page.ids


def test_hostile_names_stay_text(tmp_path):
    evil = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\u2028\"'&"
    make_training(tmp_path / "a", token=evil, model=evil, grids=())
    make_teaching(tmp_path / "b", run=evil, model=evil, words=WORDS[:1])
    for text in (write_report(tmp_path / "a").read_text(), write_teaching_report(tmp_path / "b").read_text()):
        page = check_page(text)
        assert sum(tag == "script" for tag, _ in page.tags) == 4
        assert not any(a.get("src") == "x" for _, a in page.tags)


def test_what_is_missing_or_damaged_is_told_in_one_line(tmp_path):
    with pytest.raises(UserError, match=r"holds no training.json: finish `t2iprobe inversion train`"):
        write_report(tmp_path)
    (tmp_path / "results.json").write_text("{")
    with pytest.raises(UserError, match="damaged: repeat `t2iprobe inversion teach`"):
        write_teaching_report(tmp_path)
    training = make_training(tmp_path, grids=(0,))
    (tmp_path / training["grids"][0]["files"][0]).write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"cannot read .*step_000000/0.png"):
        write_report(tmp_path)


def test_grids_are_chosen_evenly():
    assert training_page.choose_evenly(list(range(20)), 5) == [0, 5, 10, 14, 19]
    assert training_page.choose_evenly([1, 2], 5) == [1, 2]


def test_fall_of_the_loss_is_that_of_its_curve():
    at, curve, _ = make_curve(600, 10, fall=0.05, jitter=0.0)
    fall = training_page.measure_fall(list(zip(at, curve, strict=True)))
    assert fall == pytest.approx(0.05 * (1 - math.exp(-575 / 110)), abs=1e-4)
    assert training_page.measure_fall([(0, 1.0)]) is None


def test_lines_cover_their_data_and_break_where_there_is_none():
    plot = charts.plot_lines({"a": [(0, 1.0), (10, None), (20, 3.0), (30, 2.0)]}, last_x=30, width=300)
    assert plot["lines"][0]["path"].count("M") == 2
    places = [plot["y_of"](value) for value in (3.0, 2.0, 1.0)]
    assert places == sorted(places)
    assert 0 < places[0] < places[-1] < plot["height"]
    assert all(0 <= place <= plot["height"] for place, _ in plot["y_ticks"])
    assert charts.plot_lines({"a": []}, last_x=0)["lines"][0]["path"] == ""
    late = charts.plot_lines({"a": [(5, 1.0), (10, 2.0)]}, first_x=5, last_x=10, width=300)
    assert [late["x_of"](x) for x in (5, 7.5, 10)] == [0, 150, 300]
    assert all(0 <= place <= 300 for place, _ in late["x_ticks"])
    flat = charts.plot_lines({"a": [(0, 0.5), (1, 0.5)]}, last_x=1, include=[0.25])
    assert 0 < flat["y_of"](0.5) < flat["y_of"](0.25) < flat["height"]


@pytest.mark.parametrize(("low", "high"), [(0.1788, 0.1812), (-3, 40), (0.99, 1.001), (0, 6100)])
def test_range_ticks_are_round_and_inside(low, high):
    ticks = charts.choose_range_ticks(low, high)
    steps = {round(b - a, 9) for a, b in itertools.pairwise(ticks)}
    assert 2 <= len(ticks) <= 6
    assert len(steps) == 1
    assert low <= ticks[0] < ticks[-1] <= high
    assert len(set(charts.write_ticks(ticks))) == len(ticks)


def test_labels_keep_apart_in_their_order():
    placed = charts.spread([50, 52, 10], gap=15)
    assert placed[1] - placed[0] >= 15
    assert placed[0] - placed[2] >= 15
    assert charts.spread([0, 100]) == [0, 100]


def test_thinned_points_keep_the_last():
    points = [[step, step] for step in range(1001)]
    thin = charts.thin(points, 50)
    assert thin[0] == [0, 0]
    assert thin[-1] == [1000, 1000]
    assert 50 <= len(thin) <= 55
    assert charts.thin([], 5) == []


def test_durations_are_written_for_people():
    assert [format_seconds(s) for s in (0.42, 42, 59.6, 200, 3900)] == [
        "0.4 s", "42 s", "1 min 0 s", "3 min 20 s", "1 h 5 min",
    ]  # fmt: skip
