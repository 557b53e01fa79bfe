from pathlib import Path

import pytest

from t2iprobe.config import Study, dump_study, list_presets, load_study, parse_settings, read_share
from t2iprobe.errors import UserError


def test_every_preset_is_a_study() -> None:
    presets = list_presets()

    assert {"tiny", "embedded", "paper", "sd15", "sdxl", "flux"} <= presets.keys()
    assert all(load_study(name) for name in presets)


def test_paper_preset_is_the_published_protocol() -> None:
    paper = load_study("paper")

    assert (paper.steps, paper.guidance, paper.samples, paper.resize) == (50, 7.5, 32, 224)
    assert (paper.templates, paper.classifiers) == (["base"], ["torchvision:vit_b_16"])


def test_settings_win_over_file_and_file_over_preset(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("preset: sd15\nsteps: 7\nsamples: 5\n")

    study = load_study(str(file), {"samples": 6})

    assert (study.guidance, study.steps, study.samples) == (7.5, 7, 6)


def test_another_model_starts_from_its_own_defaults() -> None:
    assert load_study(None, {"model": "some/model"}).steps is None
    assert load_study(None, {}).steps == load_study("embedded").steps


@pytest.mark.parametrize(
    ("config", "settings", "message"),
    [
        ("sd5", {}, "did you mean sd15"),
        (None, {"stepz": 3}, "unknown key 'stepz'.*did you mean steps"),
        (None, {"samples": 0}, "bad value for samples: 0"),
        (None, {"keep": "some"}, "bad value for keep: 'some'.*'thumbnails'"),
        (None, {"templates": []}, "bad value for templates"),
        (None, {"guidance": "much"}, "bad value for guidance: 'much'"),
    ],
)
def test_bad_settings_are_told_in_one_line(config: str | None, settings: dict, message: str) -> None:
    with pytest.raises(UserError, match=message) as raised:
        load_study(config, settings)

    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("text", ["- a\n- b\n", "steps: [", "steps: 3\nunknwon: 4\n", "preset: nothing\n"])
def test_bad_files_are_told_in_one_line(tmp_path: Path, text: str) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(text)

    with pytest.raises(UserError) as raised:
        load_study(str(file))

    assert "\n" not in str(raised.value)


def test_set_reads_values_as_yaml_does() -> None:
    settings = parse_settings(["steps=3", "guidance=null", "templates=[base, photo]", "model=a/b"])

    assert settings == {"steps": 3, "guidance": None, "templates": ["base", "photo"], "model": "a/b"}
    with pytest.raises(UserError, match="key=value"):
        parse_settings(["steps"])


def test_dumped_study_builds_the_same_study() -> None:
    study = load_study("paper", {"synsets": ["dog.n.01", "cat.n.01"]})

    assert study.synsets == "dog.n.01,cat.n.01"
    assert Study(**dump_study(study)) == study


def test_shares_are_decimal_numbers() -> None:
    assert read_share("0/4") == (0, 4)
    for text in ("4/4", "1", "a/b", "\u00b9/\u00b2"):
        with pytest.raises(UserError, match="--shard takes i/n"):
            read_share(text)
