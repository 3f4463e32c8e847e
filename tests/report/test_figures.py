"""The plots: what is drawn where. Positions are read back from matplotlib's objects."""

from itertools import combinations, pairwise

import numpy as np
import pytest
from matplotlib.figure import Figure

from bitassay.report.figures.assay import (
    draw_divergence,
    draw_layers,
    draw_perplexity,
    draw_speed,
    layers_figure,
    quality_figure,
    speed_figure,
)
from bitassay.report.figures.bench import roofline_figure
from bitassay.report.figures.drawing import label_points
from bitassay.report.figures.studies import LIMITS, distribution_figure
from report.example import BASE, NO_SPEED, NO_VERDICT, RUN, W1, W4, W8
from report.kinds import BENCH, THRESHOLDS


@pytest.fixture
def axes():
    return Figure(figsize=(9, 4), layout="constrained").subplots()


def bars(axes):
    """x, low end and high end of every error bar."""
    return [
        (segment[0][0], segment[0][1], segment[1][1])
        for container in axes.containers
        for line in container.lines[2]
        for segment in line.get_segments()
    ]


def test_divergence_with_its_interval(axes):
    labels = draw_divergence(axes, [BASE, W8, W4])
    assert labels == [(163.0, 0.00412, "w8"), (114.0, 0.0671, "w4")]
    assert np.allclose(bars(axes), [(163.0, 0.00333, 0.00519), (114.0, 0.0612, 0.0724)])
    assert axes.get_yscale() == "log"


def test_a_divergence_of_zero_is_named_and_one_that_reaches_zero_is_drawn(axes):
    labels = draw_divergence(axes, [BASE, W8 | {"kl_mean": 0.0}, W4 | {"kl_ci": [0.0, 0.1]}])
    assert [name for _, _, name in labels] == ["w4"]
    assert [text.get_text() for text in axes.texts] == ["exactly 0: w8"]
    assert np.allclose(bars(axes), [(114.0, 0.00671, 0.1)])


def test_perplexity_is_drawn_as_the_paired_difference(axes):
    labels = draw_perplexity(axes, [BASE, W8, W1])
    assert labels == [(163.0, 0.12, "w8"), (77.0, 4.1e6, "w1")]
    assert np.allclose(bars(axes), [(163.0, -0.13, 0.34), (77.0, 3.2e6, 5.3e6)])
    assert axes.get_yscale() == "symlog"


def test_distances_by_layer_and_the_honest_band(axes):
    labels = draw_layers(axes, RUN)
    lines = {tuple(line.get_ydata()) for line in axes.lines}
    assert lines == {(0.0083, 0.0161), (0.0214, 0.0517)}
    assert [tuple(line.get_xdata()) for line in axes.lines] == [(8, 16)] * 4
    assert labels[0] == (16, 0.0161, "honest")
    (band,) = axes.collections
    corners = band.get_paths()[0].vertices
    assert corners[:, 0].min() == 8
    assert np.isclose(corners[:, 1].max(), 0.0183)
    assert 0 < corners[:, 1].min() < 0.0083  # an honest distance of exactly zero, on a log axis


def test_one_layer_has_a_band_too(axes):
    one = {"hidden_distance_by_layer": [0.016], "hidden_distance_range_by_layer": [[0.014, 0.018]]}
    run = RUN | {"verification": {"alpha": 0.01, "layers": [5]}, "rows": [BASE | one, W8 | one]}
    draw_layers(axes, run)
    low, high = axes.collections[0].get_paths()[0].get_extents().intervalx
    assert low < 5 < high


def test_speed_and_its_ratio_to_the_base(axes):
    timed = list(enumerate([BASE, W8, W4]))
    draw_speed(axes, timed, "prefill_tok_s")
    assert [bar.get_width() for bar in axes.patches] == [905.0, 452.0, 452.0]
    assert [text.get_text() for text in axes.texts] == ["905", "452  (0.5×)", "452  (0.5×)"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["base", "w8", "w4"]


def test_names_do_not_cover_each_other(axes):
    points = [(x, 1 + x / 1000, f"recipe-{x}") for x in range(12)]
    axes.plot([x for x, _, _ in points], [y for _, y, _ in points])
    axes.set_ylim(0, 10)
    label_points(axes, points)
    figure = axes.get_figure()
    figure.draw_without_rendering()
    boxes = {text.get_text(): text.get_window_extent() for text in axes.texts}
    # An annotation's extent holds its line too; the text alone is what must stay free.
    boxes = {name: box for name, box in boxes.items() if box.height < 20}
    assert len(axes.texts) == 12
    for (one, a), (other, b) in combinations(boxes.items(), 2):
        assert not a.overlaps(b), (one, other)
    assert max(text.get_window_extent().x1 for text in axes.texts) <= axes.get_window_extent().x1 + 1


def test_a_histogram_begins_and_ends_with_values():
    """Of equal values, numpy puts most bins where none can be: an accept rate below 0."""
    histogram = {"counts": [0, 0, 4, 0], "edges": [-0.5, -0.25, 0.0, 0.25, 0.5]}
    statistics = {name: {"n": 4, "histogram": histogram} for name in LIMITS}
    row = THRESHOLDS["rows"][0] | {"distributions": {"w4": statistics}}
    for axes in distribution_figure(row).axes[:5]:
        values, edges, _ = axes.patches[0].get_data()
        assert (values.tolist(), list(edges)) == ([1.0], [0.0, 0.25])


def test_names_of_near_peaks_do_not_cover_each_other():
    machine = BENCH["machine"] | {"peaks": {"float32": 7.8e10, "bfloat16": 8.3e10, "int8": 8.2e10}}
    figure = roofline_figure(BENCH | {"machine": machine})
    figure.draw_without_rendering()
    heights = sorted(text.get_window_extent().y1 for text in figure.axes[0].texts)
    assert len(heights) == 3
    assert all(b - a > 8 for a, b in pairwise(heights))


def test_nothing_is_drawn_of_what_was_not_measured():
    bare = RUN | {"verification": None, "rows": [row | NO_VERDICT | NO_SPEED for row in (BASE, W8)]}
    assert layers_figure(bare) is None
    assert speed_figure(bare) is None
    assert quality_figure(RUN | {"rows": [BASE]}) is None
