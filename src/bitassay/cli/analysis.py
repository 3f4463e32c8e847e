"""What `bitassay quantize --analyze` does."""

import sys
from pathlib import Path

from bitassay.cli.output import Format, emit
from bitassay.cli.parameters import Loading


def run_analysis(
    model: str,
    recipe: str,
    out: Path | None,
    dtype: str,
    samples: int,
    each_matrix: bool,
    loading: Loading,
    format: Format,
) -> int:
    """Analyze, write run.json, report.html and heat-map.png into the run folder, and print the layers."""
    from bitassay.cli.progress import show_progress
    from bitassay.engines.load import load
    from bitassay.quantization.analysis import AnalysisPlan, analyze
    from bitassay.quantization.export.fits import check_fit
    from bitassay.quantization.recipe.calibration import Calibration
    from bitassay.quantization.recipe.recipe import find_recipe
    from bitassay.report.analysis import (
        LAYER_COLUMNS,
        MATRIX_COLUMNS,
        ROUTING_COLUMNS,
        worst_matrices,
        write_analysis_report,
        write_heat_map,
    )

    found = find_recipe(recipe)
    given = found.calibration or Calibration.model_validate({})
    text = given.model_copy(update={"samples": samples})
    with show_progress() as progress:
        name, options = loading.of(model), loading.options
        check_fit(name, [found], trust_remote_code=loading.trust_remote_code, progress=progress)
        base = load(name, dtype=dtype, progress=progress, **options)
        run, folder = analyze(base, found, AnalysisPlan(text, each_matrix), out=out, progress=progress)
    write_analysis_report(run, folder / "report.html")
    write_heat_map(run, folder / "heat-map.png")
    if format in ("table", "md"):
        emit(run["layers"], LAYER_COLUMNS, format)
        if run["routing"]:
            print()
            emit(run["routing"], ROUTING_COLUMNS, format)
        print()
        emit(worst_matrices(run, 10), MATRIX_COLUMNS[:7], format)
    else:
        emit(run["matrices"], MATRIX_COLUMNS, format, whole=run)
    print(f"report: {folder / 'report.html'}, heat map: {folder / 'heat-map.png'}", file=sys.stderr)
    return 0
