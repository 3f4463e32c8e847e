"""The page and the picture of an analysis, from numbers alone."""

import re

import numpy as np
import pytest
from matplotlib.image import imread

from bitassay.report.columns import COLUMNS
from bitassay.report.figures.heat_maps import MEASURES, heat_map_figure, heat_maps
from bitassay.report.pages import page_of, write_heat_map, write_report
from bitassay.report.tables import render
from report.kinds import ANALYSIS

KEYS = (
    "mean",
    "variance",
    "kurtosis",
    "outlier_columns",
    "beyond_3_sigma",
    "beyond_100_medians",
    "largest_in_medians",
)


def matrix(layer: int, kind: str, value: float, expert: int | None = None, **more) -> dict:
    name = f"model.layers.{layer}.{kind}" + ("" if expert is None else f".{expert}")
    stats = {f"{of}_{key}": value for of in ("weight", "input") for key in KEYS}
    own = {"name": name, "layer": layer, "kind": kind, "bits": 3.25, "tokens": 64, "kl": None}
    return own | {"weight_error": value, "output_error": value, "kl_predicted": value} | stats | more


@pytest.fixture
def run() -> dict:
    layer = {"kl": 0.5, "kl_se": None, "kl_predicted": 0.4} | {f"hidden_{key}": 1.0 for key in KEYS}
    return ANALYSIS | {
        "model": {"name": "<b>model</b>"},
        "recipe": {"name": "w3"},
        "text": {"corpus": "c4-train", "samples": 2, "tokens": 32},
        "run_id": "0123456789ab",
        "created": "2026-01-01T00:00:00+00:00",
        "whole": {"bits_per_weight": 3.25, "matrices": 4, "kl": 0.7, "kl_se": 0.1},
        "layers": [{"layer": index} | layer for index in range(2)],
        "matrices": [
            matrix(0, "self_attn.q_proj", 0.01),
            matrix(1, "self_attn.q_proj", 1.0),
            matrix(1, "mlp.experts.down_proj", 0.1, expert=0),
            matrix(1, "mlp.experts.down_proj", 0.3, expert=1, output_error=None),
        ],
        "routing": [],
    }


def values(run: dict, key: str) -> np.ndarray:
    return next(found for found in heat_maps(run) if found.measure.key == key).values


def test_cells_are_layers_by_kinds(run):
    assert [found.measure.key for found in heat_maps(run)] == [m.key for m in MEASURES if m.key != "kl"]
    np.testing.assert_allclose(values(run, "kl_predicted"), [[0.01, np.nan], [1.0, 0.4]])  # slices add up
    np.testing.assert_allclose(values(run, "weight_error"), [[0.01, np.nan], [1.0, 0.2]])  # or are averaged
    np.testing.assert_allclose(values(run, "output_error"), [[0.01, np.nan], [1.0, 0.1]])
    run["matrices"][0]["kl"] = 0.2
    assert heat_maps(run)[0].measure.key == "kl"


def test_shades_follow_the_logarithm(run):
    found = next(found for found in heat_maps(run) if found.measure.key == "weight_error")
    assert [found.shade(value) for value in (0.01, 0.1, 1.0)] == pytest.approx([0, 0.5, 1])
    assert found.shade(float("nan")) == found.shade(0.0) == 0


def test_the_page_opens_offline_and_escapes(run, tmp_path):
    write_report(run, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "&lt;b&gt;model&lt;/b&gt;" in page
    assert "<b>model" not in page
    assert not re.search(r"https?://|<script|src=", page)
    assert page.count(' heat"') == 6 * 3  # a layer has one of the two kinds only
    assert "Routing" not in page
    run["routing"] = [
        {
            "module": "model.layers.1.mlp.experts",
            "tokens": 64,
            "experts_per_token": 2,
            "fewest_tokens": 3,
            "largest_share": 0.5,
            "changed_fraction": 0.125,
        }
    ]
    write_report(run, tmp_path / "report.html")
    assert ">12.5 %</td>" in (tmp_path / "report.html").read_text()


def test_the_picture_is_a_png_with_a_panel_for_each_measure(run, tmp_path):
    titles = [axes.get_title() for axes in heat_map_figure(run).axes]
    assert sum(bool(title) for title in titles) == 4
    write_heat_map(run, tmp_path / "map.png")
    assert imread(tmp_path / "map.png").std() > 0


def test_maps_of_equal_or_missing_values_are_drawn(run, tmp_path):
    for row in run["matrices"]:
        row |= {"output_error": 0.0, "weight_kurtosis": 3.0, "input_largest_in_medians": None}
    write_heat_map(run, tmp_path / "map.png")
    write_report(run, tmp_path / "report.html")


def test_tables(run):
    worst = page_of(run).sections[-3].rows
    assert [row["name"] for row in worst[:2]] == [run["matrices"][1]["name"], run["matrices"][3]["name"]]
    assert "KL, only this" in render(run["layers"], COLUMNS["layers"], "table")
    assert render(run["layers"], COLUMNS["layers"], "csv").splitlines()[0].startswith("layer,kl,kl_se,")
