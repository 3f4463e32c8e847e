"""Tables, pictures and pages of timings, from numbers alone."""

import pytest

from bitassay.report.columns import COLUMNS
from bitassay.report.figures.bench import context_figure, roofline_figure, throughput_figure
from bitassay.report.findings import busy, machine_line
from bitassay.report.pages import write_report
from bitassay.report.tables import render, shown_columns
from report import kinds


def row(model: str, kind: str, batch: int, tokens: int, **more) -> dict:
    timed = {
        "ttft_s": 0.5,
        "prefill_tok_s": 1234.5,
        "prefill_samples_s": 2.0,
        "decode_tok_s": 40.0 * batch,
        "decode_spread": 0.1,
        "cache_bytes": 1000 * batch * tokens,
        "peak_resident_bytes": 10**9,
        "peak_device_bytes": None,
        "prefill_flop": 1e9,
        "decode_flop": 1e7 * batch,
        "prefill_flop_per_byte": 100.0,
        "decode_flop_per_byte": 1.0 * batch,
        "prefill_share_of_bound": 0.5,
        "decode_share_of_bound": None,
    }
    return (
        {"model": model, "kind": kind, "batch": batch, "prompt_tokens": tokens, "new_tokens": 4}
        | timed
        | more
    )


@pytest.fixture
def run() -> dict:
    ratio = {
        "decode_ratio": 1.5,
        "decode_ratio_ci": (1.2, 1.8),
        "prefill_ratio": 0.9,
        "prefill_ratio_ci": None,
    }
    cells = [("batch", 1, 64), ("batch", 8, 64), ("context", 1, 512)]
    rows = [
        row(model, *cell, **more) for cell in cells for model, more in (("base", {}), ("<b>w4</b>", ratio))
    ]
    skipped = {
        "model": "base",
        "kind": "context",
        "batch": 1,
        "prompt_tokens": 8192,
        "skipped": "the model has 512 positions",
    }
    return kinds.BENCH | {
        "model": {"name": "m"},
        "settings": {"repeats": 3, "prompt_tokens": 64, "new_tokens": 4},
        "interval": "95 %",
        "machine": {"bandwidth": 1e10, "peaks": {"float32": 5e10, "bfloat16": 1e11}, "load": [0.5, 3.0]},
        "environment": {"threads": 2, "cores": 4, "cpu": "a processor", "cuda": None},
        "models": [
            {
                "model": "base",
                "bits_per_weight": 16.0,
                "checkpoint_bytes": 10**8,
                "kv_bytes_per_token": None,
                "dtype": "bfloat16",
            }
        ],
        "rows": [*rows, skipped],
        "pairs": [
            {"group": "<b>w4</b>", "role": "single", "control": "once", "batch": 1, "prompt_tokens": 64}
            | ratio
        ],
    }


def test_the_table_shows_ratios_with_intervals_and_why_a_cell_is_missing(run):
    columns = shown_columns(COLUMNS["bench"], run["rows"])
    text = render(run["rows"], columns, "table")
    assert "1.50 [1.20, 1.80]" in text
    assert "the model has 512 positions" in text
    assert "peak\ndevice" not in [column.title for column in columns]  # nothing has it on a CPU
    head, first, *_ = render(run["rows"], columns, "csv").splitlines()
    assert "decode_ratio_ci_low,decode_ratio_ci_high" in head
    assert len(head.split(",")) == len(first.split(","))


def test_pictures_have_a_line_for_each_model_and_no_more_than_was_timed(run):
    figure = throughput_figure(run)
    assert [len(axes.lines) for axes in figure.axes] == [2, 2]
    assert list(figure.axes[0].lines[0].get_xdata()) == [1, 8]
    assert [list(axes.lines[0].get_xdata()) for axes in context_figure(run).axes] == [[512]] * 3
    points = [line for line in roofline_figure(run).axes[0].lines if line.get_linestyle() == "None"]
    assert len(points) == 4  # two models, prefill and decode
    run["rows"] = run["rows"][-1:]
    assert throughput_figure(run) is context_figure(run) is roofline_figure(run) is None


def test_decode_lies_where_its_time_puts_it(run):
    decode = next(line for line in roofline_figure(run).axes[0].lines if line.get_label() == "base, decode")
    assert list(decode.get_ydata()) == pytest.approx([1e-2 / (1 / 40), 8e-2 / (8 / 320), 1e-2 / (1 / 40)])


def test_a_busy_machine_is_named(run):
    assert "load 0.5 to 3" in machine_line(run)
    assert "reached 3 where 2 threads were ours" in busy(run)
    run["machine"]["load"] = [2.1]
    assert busy(run) == ""


def test_the_page_opens_offline_and_escapes_names(run, tmp_path):
    write_report(run, tmp_path / "r.html")
    page = (tmp_path / "r.html").read_text()
    assert "<b>w4" not in page
    assert "&lt;b&gt;w4" in page
    assert page.count("<svg") == 3
    assert "http" not in page.replace("http-equiv", "").replace("http://www.w3.org", "")
    assert "compare ratios, not times" in page
    assert "Speed of replicas over their controls" in page
    run["pairs"] = []
    write_report(run, tmp_path / "r.html")
    assert "over their controls" not in (tmp_path / "r.html").read_text()


def test_the_page_of_products(tmp_path):
    one = {
        "shape": "16x512",
        "format": "int8",
        "scales": "tensor",
        "rounding_error": 0.01,
        "rounding_error_range": [0.009, 0.011],
        "documented": 0.0096,
    }
    one |= {"over_documented": 1.04, "product_error": 0.014, "weights_error": 0.01, "path": "int8 product"}
    write_report(kinds.MATMUL | {"rows": [one]}, tmp_path / "m.html")
    assert "0.0096" in (tmp_path / "m.html").read_text()
    assert "speed over" not in render([one], shown_columns(COLUMNS["matmul"], [one]), "table")
