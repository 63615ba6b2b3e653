"""How a finding is told: intervals over seeds, one table printer, the verdict in words; numbers and a picture, kept."""

import statistics
from dataclasses import asdict
from functools import partial
from pathlib import Path

from support.runs import write_json

RESULTS = Path(__file__).parent / "results"
POLICIES, EQUAL = ("sampled", "greedy"), "equal updates"
T_975 = {2: 12.71, 4: 3.182, 5: 2.776, 10: 2.262}  # Student's t, by number of seeds or batches


def interval(values):
    """[mean, half the width of its 95% interval] over seeds, by Student's t."""
    values = list(values)
    return [statistics.mean(values), T_975[len(values)] * statistics.stdev(values) / len(values) ** 0.5]


def at_end(result, measure="sampled", steps=None):
    """Of a finished run: accuracy on test questions, sampled or greedy, decoded in its own or the given number of
    steps; pass@16; entropy or signal of the last updates; or what was added to it under the measure's name."""
    decoded = result["test"][str(steps or result["sampling_steps"])]
    return (result | result["curve"][-1] | result["diversity"] | decoded)[measure]


def after(result, updates):
    """Share of right answers to validation questions, sampled, after so many updates: on a line between two checks."""
    curve = result["curve"]
    for left, right in zip(curve, curve[1:]):
        if left["updates"] <= updates <= right["updates"]:
            share = (updates - left["updates"]) / (right["updates"] - left["updates"])
            return left["sampled"] + share * (right["sampled"] - left["sampled"])
    return curve[-1]["sampled"]


def paired(seeds, reference, measure="sampled", steps=None):
    """The interval of the difference at the end to the reference's runs of the same seeds."""
    return interval(at_end(a, measure, steps) - at_end(b, measure, steps) for a, b in zip(seeds, reference))


def learning_row(seeds, reference):
    """The runs of an estimator: how they end, their difference to the reference's of the same seeds, the curve."""
    points = list(zip(*(result["curve"] for result in seeds)))
    curve = [{name: statistics.mean(x[name] for x in point) for name in point[0]} for point in points]
    for means, point in zip(curve, points):
        means["sampled"] = interval(x["sampled"] for x in point)
    return {
        **{name: interval(at_end(x, name) for x in seeds) for name in (*POLICIES, "pass@16", "distinct")},
        **{f"{policy} minus reference": paired(seeds, reference, policy) for policy in POLICIES},
        **{name: statistics.mean(x[name] for x in seeds) for name in ("updates", "cpu_seconds")},
        "seeds": {policy: [at_end(x, policy) for x in seeds] for policy in POLICIES},
        "decoded": {m: {p: interval(at_end(x, p, m) for x in seeds) for p in POLICIES} for m in seeds[0]["test"]},
        "curve": curve,
    }


# --------------------------------------------------------------------------------------------- in words
def plus_minus(pair, sign=""):
    """An interval of shares in per cent: "+8.1 +- 7.3"."""
    mean, half = (100 * x for x in pair)
    return f"{mean:{sign}.1f} +- {half:.1f}"


def print_table(columns, rows, title=""):
    """rows {label: cells}, each cell under the name of its column."""
    rows = {title: columns} | {label: list(cells) for label, cells in rows.items()}
    widths = [max(map(len, column)) + 3 for column in zip(*rows.values())]
    print()
    for label, cells in rows.items():
        print(f"{label:<{max(map(len, rows))}}" + "".join(f"{cell:>{w}}" for cell, w in zip(cells, widths)))


def verdict(claim, difference, unit="points"):
    """Say of a claim, which holds if the difference [mean, half] is positive, whether its interval excludes 0."""
    mean, half = difference
    word = "yes" if mean > half else "no, the opposite" if mean < -half else "not settled"
    print(f"{claim}: {word} ({plus_minus(difference, '+')} {unit})")


def tell(name, scale, results, families, claims):
    """Tables, verdicts, numbers and picture of runs {label: seeds}. families {title: variants}, each compared with its
    first; claims [(text, variant, another that it exceeds, measure of at_end or both policies, steps)]. EQUAL is a
    measure too: sampled answers to validation questions after as many updates as the shortest run made."""
    rows, judged, runs = {}, {}, [result for seeds in results.values() for result in seeds]
    updates = min(result["updates"] for result in runs if result["updates"])  # all made so many
    for result in runs:
        result[EQUAL] = after(result, updates)
    for title, labels in families.items():
        rows |= {label: learning_row(results[label], results[labels[0]]) for label in labels}
        table = {}
        for label in labels:
            rows[label][EQUAL] = interval(result[EQUAL] for result in results[label])
            cells = [rows[label][x] for x in ("sampled", "sampled minus reference", "greedy", EQUAL, "pass@16")]
            last = [rows[label]["curve"][-1].get(x, 0) for x in ("entropy", "signal")]
            table[label] = [*map(plus_minus, cells), *(f"{x:.2f}" for x in last)]
        columns = ["sampled, %", "less the first's", "greedy, %", f"after {updates} updates", "pass@16, %"]
        print_table([*columns, "entropy", "signal"], table, title)
    print()
    for text, one, other, *how in claims:
        for measure in how[:1] or POLICIES:
            judged[f"{text}, {measure}"] = paired(results[one.label], results[other.label], measure, *how[1:])
            verdict(f"{text}, {measure}", judged[f"{text}, {measure}"])
    value = {"scale": asdict(scale), "equal updates": updates, "claims": judged, "rows": rows}
    panels = (1, len(families) + 1)
    finish(name, value, partial(draw, rows, families), (5 * panels[1], 4), panels)
    return rows


# ------------------------------------------------------------------------------------------ kept and drawn
def finish(name, value, draw, size, panels):
    """Write estimators-NAME.json and .png; draw(axes) fills the panels (rows, columns)."""
    from matplotlib.figure import Figure

    RESULTS.mkdir(parents=True, exist_ok=True)
    file = RESULTS / f"estimators-{name}.json"
    write_json(file, {"command": f"python experiments/{name.partition('-')[0]}.py"} | value)
    figure = Figure(size)
    draw(figure.subplots(*panels, squeeze=False).flatten())
    figure.tight_layout()
    unfinished = file.with_suffix(".tmp.png")
    figure.savefig(unfinished, dpi=110)
    unfinished.replace(file.with_suffix(".png"))
    print(f"\n{file} and .png")


def draw(rows, families, axes):
    """The learning curves of each family with the bands of their intervals, and all accuracies at the end."""
    for axis, (title, labels) in zip(axes, families.items()):
        for label in labels:
            x = [point["evaluations"] / 1000 for point in rows[label]["curve"]]
            mean, half = zip(*([100 * y for y in point["sampled"]] for point in rows[label]["curve"]))
            line = axis.plot(x, mean, label=label)[0]
            low, high = ([y + sign * h for y, h in zip(mean, half)] for sign in (-1, 1))
            axis.fill_between(x, low, high, color=line.get_color(), alpha=0.12, lw=0)
        axis.set(title=title, xlabel="model evaluations, thousands", ylabel="% right, sampled, validation")
        axis.legend(fontsize=7)
    for policy in POLICIES:
        mean, half = zip(*([100 * y for y in row[policy]] for row in rows.values()))
        axes[-1].errorbar(mean, list(rows), xerr=half, fmt="o", capsize=3, label=policy)
    axes[-1].invert_yaxis()
    axes[-1].set(xlabel="% right at the end, test")
    axes[-1].legend(fontsize=7)
