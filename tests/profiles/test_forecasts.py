"""Schedules of forecasts: which are tried, which is chosen, and that a bundle holds it afterwards."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import runtime.placing.loading
from calibration.requests.exams import Case, Judged
from calibration.requests.tasks.image import PROMPTS
from profiles import cli
from profiles.forecasts import Drawn, Floors, Trial, cases_of, chosen, table, tried
from profiles.tasks.image import PictureExam
from runtime.bundle.manifest import Bundle
from runtime.bundle.signing import generate, require_signature, sign
from runtime.diffusion.config import DiffusionConfig
from runtime.errors import BundleError, InvalidInput, QualityError
from runtime.pipeline import Note, drive
from runtime.pipelines.diffusion import DiffusionPipeline
from runtime.placing.loading import LoadedModel
from runtime.tasks.image import ImageReady, ImageRequest
from samples.exams import Pictures

SETTING = PictureExam(count=3, steps=12, guidance_scale=3.0, batch=2)
PLAIN = Drawn("none", 12, 2.0, 90.0, 300.0, ())


def drawn(forecast: str, calls: int, psnr: float, right: float | None = 90.0) -> Drawn:
    return Drawn(forecast, calls, 1.0, right, psnr, ())


def judged(as_said: Judged, picture: object) -> Judged:
    return as_said


@pytest.fixture
def trial(drawing: LoadedModel) -> Trial:
    return Trial(drawing, cases_of(drawing, 3), SETTING, None)


def test_a_model_without_an_exam_draws_general_prompts(drawing: LoadedModel) -> None:
    first, second, third = (case.request for case in cases_of(drawing, 3))
    assert (first.prompt, first.negative_prompt) in PROMPTS and first.seed < second.seed < third.seed
    assert len({first.prompt, second.prompt, third.prompt}) == 3
    assert all(drawing.pipeline(case.request) for case in cases_of(drawing, 8)), "none is too long for the tokenizer"


def test_a_sample_draws_cases_that_are_not_held_out(drawing: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("profiles.forecasts.exam_of", lambda fingerprint: Pictures())
    found = {case.request.prompt for case in cases_of(drawing, 20)}
    held = {case.request.prompt for case in Pictures().cases(Pictures.size, 0, True)}
    assert len(found) == 20 and not found & held


def test_rules_are_tried_from_the_fewest_calls_on(trial: Trial) -> None:
    texts = trial.candidates()
    assert texts[:2] == ["every 5 after 2", "every 4 after 2"] and texts[-1] == "every 2 after 4"
    assert trial.ordered(["1-11", "every 2 after 1", "1", "1,2-11", "none"]) == ["1", "every 2 after 1", "1-11"]
    with pytest.raises(InvalidInput, match="steps: are 12, of which none leave out none"):
        trial.ordered(["none"])
    with pytest.raises(InvalidInput, match="forecast: names step 13"):
        trial.ordered(["1,13"])


def test_pictures_of_a_schedule_are_compared_with_those_of_every_step(trial: Trial, drawing: LoadedModel) -> None:
    assert (trial.plain.forecast, trial.plain.calls, trial.plain.right) == ("none", 12, None)
    few, many = trial.draw("1,6"), trial.draw("1-11")
    assert (few.calls, many.calls) == (2, 11) and few.psnr < many.psnr < trial.plain.psnr
    request = replace(cases_of(drawing, 1)[0].request, steps=12, guidance_scale=3.0, forecast="1,6")
    *_, ready, note = drive(drawing.pipeline(request), drawing.engines)
    assert isinstance(ready, ImageReady) and isinstance(note, Note) and "in 10 of 12 steps" in note.text
    np.testing.assert_array_equal(few.pictures[0], ready.image)


def test_an_exam_counts_what_is_right(drawing: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("profiles.forecasts.exam_of", lambda fingerprint: Pictures())
    right = [Judged(number == 0, {}) for number in range(4)]
    cases = [Case(ImageRequest("a circle", seed=number), partial(judged, right[number])) for number in range(4)]
    found = Trial(drawing, cases, SETTING, "euler")
    stored = found.stored(found.draw("every 3 after 2"))
    assert (stored.forecast, stored.sampler, stored.steps) == ("every 3 after 2", "euler", 12)
    assert {name: stored.figures[name] for name in ("right", "right_of_every_step", "pictures", "calls")} == {
        "right": 25.0, "right_of_every_step": 25.0, "pictures": 4.0, "calls": 6.0,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("one", "met"),
    [
        (drawn("a", 4, 35.0), True),
        (drawn("a", 4, 34.9), False),
        (drawn("a", 4, 40.0, 89.0), True),
        (drawn("a", 4, 40.0, 88.9), False),
        (drawn("a", 4, 40.0, None), True),
    ],
)
def test_floors(one: Drawn, met: bool) -> None:
    assert Floors(35.0, 1.0).met(one, PLAIN) == met


def test_the_first_that_meets_the_floors_is_chosen(trial: Trial) -> None:
    texts, told = trial.candidates(), list[Drawn]()
    everyone = list(tried(trial, texts, Floors(1000.0, 1.0), told.append))
    assert [one.forecast for one in everyone] == texts == [one.forecast for one in told]
    with pytest.raises(QualityError, match=r"no schedule meets the floors, 1000 dB and 1 points: 'every 2 after"):
        chosen(trial, everyone, Floors(1000.0, 1.0))
    floors = Floors(everyone[2].psnr, 1.0)
    again = list(tried(trial, texts, floors, told.append))
    assert chosen(trial, again, floors) is again[-1] and again[-1].psnr >= everyone[2].psnr and len(again) <= 3


def test_table() -> None:
    shown = table(PLAIN, [drawn("every 3 after 2", 6, 41.25), drawn("1", 1, 20.0, None)])
    columns = [list(column.cells) for column in shown.columns]
    assert columns == [
        ["none", "every 3 after 2", "1"], ["12", "6", "1"], ["90.0 %", "90.0 %", "-"], ["", "41.2", "20.0"],
        ["2", "1", "1"], ["1.00", "0.50", "0.50"],
    ]  # fmt: skip


# The command


@pytest.fixture
def loads(drawing: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> LoadedModel:
    monkeypatch.setattr(runtime.placing.loading, "load_model", lambda root, target, options: drawing)
    return drawing


def run(*arguments: str | Path) -> str:
    ended = CliRunner().invoke(cli.app, ["forecast", *map(str, arguments)], catch_exceptions=False)
    assert ended.exit_code == 0, ended.output
    return ended.output


def test_the_bundle_draws_with_what_was_chosen(loads: LoadedModel, tmp_path: Path) -> None:
    root, key = loads.bundle.root, loads.bundle.manifest.key
    said = run(root, "--steps", "8", "--count", "2", "--floor", "1", "--try", "1-3,8", "--try", "1,8")
    assert "stored, draw with --forecast stored: 1,8" in said and "1-3,8" not in said, "the fewest calls come first"
    after = Bundle(root)
    after.verify()
    config = DiffusionConfig.parse(after.manifest.config)
    assert config.forecast is not None and config.forecast.steps == 8 and config.forecast.sampler == "ddim"
    assert config.forecast.figures["calls"] == 2 and after.manifest.key != key
    request = ImageRequest("a circle", steps=8, seed=0, forecast="stored")
    pipeline = DiffusionPipeline(config, Path(__file__).parents[2] / "samples" / "shapes-diffusion" / "tokenizer")
    unet: Any = loads.engines["unet"]
    before = len(unet.calls)
    list(drive(pipeline(request), loads.engines))
    assert len(unet.calls) - before == 2


def test_below_the_floors_nothing_is_stored(loads: LoadedModel) -> None:
    with pytest.raises(QualityError, match="no schedule meets the floors"):
        run(loads.bundle.root, "--steps", "8", "--count", "1", "--floor", "301", "--try", "1")
    assert DiffusionConfig.parse(Bundle(loads.bundle.root).manifest.config).forecast is None


def test_a_signed_bundle_is_signed_anew_or_refused(loads: LoadedModel, tmp_path: Path) -> None:
    root = loads.bundle.root
    generate(tmp_path / "private.pem", tmp_path / "public.pem")
    sign(Bundle(root), tmp_path / "private.pem")
    with pytest.raises(InvalidInput, match="key: is missing"):
        run(root, "--try", "1")
    options = ("--steps", "4", "--count", "1", "--floor", "0", "--try", "1")
    run(root, *options, "--key", tmp_path / "private.pem")
    require_signature(Bundle(root), tmp_path / "public.pem")
    assert "is no longer signed" in run(root, *options, "--force")
    with pytest.raises(BundleError, match="is not signed"):
        require_signature(Bundle(root), tmp_path / "public.pem")


def test_score_takes_a_forecast_for_bundles_alone(loads: LoadedModel, tmp_path: Path) -> None:
    from profiles.tasks.image import exam_settings

    setting = exam_settings(None, [loads.bundle.root], 2, {"forecast": "1,2", "steps": None})
    assert setting.request(Case(ImageRequest("x"), lambda picture: Judged(True, {}))).forecast == "1,2"
    with pytest.raises(InvalidInput, match="forecast: is of bundles alone: leave --source out"):
        exam_settings(tmp_path, [], 2, {"forecast": "1,2"})
