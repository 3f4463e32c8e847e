"""What the intervals and verdicts of a run support, in sentences, and nothing more."""

from collections.abc import Sequence

from bitassay.report.tables import Row, Run, significant

ALPHA = 0.05
_few = significant(2)


def headline(run: Run) -> str:
    """Return what an assay shows of its recipes, in a few clauses."""
    recipes = run["rows"][1:]
    compared = [(row["recipe"], *row["ppl_delta_ci"]) for row in recipes if row.get("ppl_delta_ci")]
    equal = [name for name, low, high in compared if low == high == 0]
    undecided = [_with_reach(row) for row in recipes if _holds_zero(row)]
    higher = [name for name, low, _ in compared if low > 0]
    lower = [name for name, _, high in compared if high < 0]
    clauses = [
        f"{text} {_listed(names)}"
        for text, names in (
            ("perplexity is the base model's on every window for", equal),
            ("no difference in perplexity is visible for", undecided),
            ("perplexity is higher than the base model's for", higher),
            ("perplexity is lower than the base model's for", lower),
        )
        if names
    ]
    clauses += _verdicts(run)
    nothing = "only the base model was measured" if not recipes else "no interval supports a comparison"
    return _sentence("; ".join(clauses) or nothing)


def _holds_zero(row: Row) -> bool:
    """Where it is not (0, 0), which is that of equal losses."""
    low, high = row.get("ppl_delta_ci") or (0.0, 0.0)
    return low <= 0 <= high and low < high


def _with_reach(row: Row) -> str:
    """The name, and what could have been seen; of older runs, which do not say, what the interval allows."""
    if row.get("ppl_delta_visible") is not None:
        visible = _few(row["ppl_delta_visible"])
        reach = f"; one of {visible} would show with a probability of 80 %"
    else:
        reach = f", and {_few(max(map(abs, row['ppl_delta_ci'])))} too"
    return f"{row['recipe']} (the 95 % interval holds zero{reach})"


def _verdicts(run: Run) -> list[str]:
    base, *recipes = run["rows"]
    says = {
        "FAIL": "rejects {}",
        "PASS": "cannot tell {} from it",
        "INCONCLUSIVE": "comes to no decision on {}",
    }
    by_verdict = {name: [row["recipe"] for row in recipes if row.get("verdict") == name] for name in says}
    decisions = [says[name].format(_listed(names)) for name, names in by_verdict.items() if names]
    clauses = [f"a verifier that expects the base model {_listed(decisions)}"] if decisions else []
    if base.get("verdict") == "FAIL":
        clauses.append("it also rejected the honest base model, so its verdicts are in doubt")
    return clauses


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def machine_line(run: Run) -> str:
    """Return what the machine of a benchmark could do, and how busy it was."""
    machine, environment = run["machine"], run["environment"]
    peaks = ", ".join(f"{dtype} {peak / 1e9:.3g} GFLOP/s" for dtype, peak in machine["peaks"].items())
    load = machine["load"]
    return (
        f"Measured on the spot: reading {machine['bandwidth'] / 1e9:.3g} GB/s; products {peaks}. "
        f"Threads: {environment['threads']} of {environment['cores']} cores; "
        f"load {min(load):g} to {max(load):g}."
    )


def busy(run: Run) -> str:
    """Return a warning where other work kept the machine of a benchmark busy; empty otherwise."""
    load, threads = max(run["machine"]["load"]), run["environment"]["threads"]
    if load <= threads + 0.5:
        return ""
    ours = "1 thread was" if threads == 1 else f"{threads} threads were"
    return f"The load reached {load:g} where {ours} ours: compare ratios, not times."


def supported(run: Run) -> list[str]:
    """Return the comparisons of an INT8/FP8 study that an interval bears out; nothing else is a ranking."""
    sentences = []
    for row in run["pairs"]:
        second, first = row["second"], row["first"]
        if (pair := row.get("kl_ci")) and not pair[0] <= 0 <= pair[1]:
            where = "nearer to" if pair[1] < 0 else "farther from"
            sentences.append(f"{second} is {where} the base than {first} (KL)")
        if (pair := row.get("ppl_ci")) and not pair[0] <= 0 <= pair[1]:
            sentences.append(f"{second} has a {'lower' if pair[1] < 0 else 'higher'} perplexity than {first}")
        for method in ("direct", "generate"):
            if row[f"{method}_p_holm"] < ALPHA:
                more = "more" if row[f"{method}_difference"] > 0 else "less"
                sentences.append(f"{second} is {more} accurate than {first} ({method})")
    return sentences


def largest_spread(run: Run) -> float:
    """Return how far repeats of a measurement of an assay differed, as a share of their median; 0 of none."""
    return max(row.get(f"{phase}_spread") or 0.0 for row in run["rows"] for phase in ("prefill", "decode"))


def left_out_notes(run: Run) -> str:
    """Return a line for everything that could not be measured here, and for what stood in."""
    lines = [
        f"{row['study']}: {'lacks' if row.get('impossible') else 'waits for'} {row['missing']}"
        for row in run.get("missing", [])
    ]
    for row in run.get("left_out", []):
        instead = f"{row['instead']} stands in" if row["instead"] else "left out"
        lines.append(f"{row['numerics']} cannot run here ({row['problem']}): {instead}")
    return "\n".join(lines)


def eight_bit_lead(run: Run) -> str:
    """Return paragraphs: what was done in an INT8/FP8 study, and what the intervals support."""
    protocols = run["protocols"]
    text = f"Text: {protocols['text']}. " if protocols["text"] else ""
    visible = [
        row["generate_visible_difference"] for row in run["rows"] if "generate_visible_difference" in row
    ]
    lead = [
        f"{_sentence(run['about'])} {text}"
        f"Questions: {protocols['questions']} ({protocols['questions_source']}). "
        f"Arithmetic in {run['settings']['dtype']}; losses in fp32, KL in nats a token. "
        f"Intervals: {run['interval']}."
    ]
    if visible:
        ends = dict.fromkeys(f"{end(visible) * 100:.1f}" for end in (min, max))
        lead.append(
            f"Differences of accuracy from the base that these questions show: {' to '.join(ends)} points."
        )
    sentences = "; ".join(supported(run)) or "no comparison of two variants"
    lead.append(f"What the intervals support: {sentences}.")
    lead += [f"{row['variant']} was not run: {row['refused']}." for row in run["rows"] if row.get("refused")]
    lead += [
        f"In groups of {group[1:]}, rows of {', '.join(map(str, columns))} end in a shorter group."
        for group, columns in run["uneven_groups"].items()
    ]
    return "\n".join(lead)


def replication_lead(run: Run) -> str:
    """Return paragraphs: what was done in a study of replication, and what the intervals decide."""
    pairs = run["pairs"]

    def named(beats: bool) -> str:
        names = [f"{pair['group']} ({pair['role']})" for pair in pairs if pair["beats"] is beats]
        return ", ".join(names) or "no replica"

    undecided = sum(pair["beats"] is None for pair in pairs)
    lead = [
        f"{_sentence(run['about'])} Text: {run['protocol']} ({run['corpus_source']}). "
        f"Arithmetic in {run['settings']['dtype']}; losses in fp32, KL in nats a token. "
        f"Intervals: {run['interval']}.",
        f"KL lower than a control's beyond doubt: {named(True)}.",
        f"Higher beyond doubt: {named(False)}.",
    ]
    if pairs:
        lead.append(f"Not decided by these windows: {undecided} of {len(pairs)} comparisons.")
    return "\n".join(lead)
