"""What a person looks at when a run ends: tables, an answer as it appears, and the learning curve."""

import math

import torch

from support.runs import say, whole


def print_report(table, split):
    """Accuracy of base and trained model, one row per number of sampling steps and policy."""
    say(f"\n{split} accuracy    policy         base    trained")
    for steps, row in table.items():
        for policy in row["base"]:
            say(f"{steps:>5} steps       {policy:<9}{row['base'][policy]:>10.1%}{row['final'][policy]:>11.1%}")


def print_evaluation(row=None):
    """One line of the evaluation table: accuracy with its standard error, length, time; or its head."""
    if row is None:
        return say("\nsampling steps   policy      accuracy           tokens per answer   seconds per answer")
    error = math.sqrt(row["accuracy"] * (1 - row["accuracy"]) / row["answers"])
    accuracy = f"{row['accuracy']:.1%} +- {error:.1%}"
    say(f"{row['steps']:>14}   {row['policy']:<12}{accuracy:<19}{row['length']:>17.1f}{row['seconds']:>21.4f}")


def print_trajectory(run, tokenizer, answer, row=0, states=9):
    """One answer (B, L) bool as it appears: `_` is [MASK], `.` is <eos>. Of a long one, about `states` states."""

    def text(ids):
        special = {run.mask_token_id: "_", run.eos_token_id: "."}
        return "".join(special.get(i) or tokenizer.decode([i]) for i in ids[row][answer[row]].tolist())

    taken = int(run.steps_taken[row])
    for t in range(0, taken, max(1, taken // states)):
        say(f"    before step {t}".ljust(20) + text(run.state_at(torch.full_like(run.steps_taken, t))))
    say(f"    finished        {text(run.ids)}")


def draw_curve(history, base, final, split, path):
    """curve.png: accuracy above; entropy and the share of groups with signal, which explain where it stops, below."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        return "no picture: it needs matplotlib (pip install matplotlib)"
    steps = [metrics["step"] for metrics in history]
    figure = Figure(figsize=(7, 6), layout="tight")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    top.plot(steps, [metrics["accuracy"] for metrics in history], color="0.8", label="rollouts, training prompts")
    checked = {metrics["step"]: metrics["validation"] for metrics in history if "validation" in metrics}
    for i, kind in enumerate(base):
        values = [accuracies[kind] for accuracies in checked.values()]
        top.plot(list(checked), values, "o-", ms=3, color=f"C{i}", label=f"{kind}, validation prompts")
        label = f"{kind}, {split} prompts"
        top.plot([0, len(history)], [base[kind], final[kind]], "*", ms=15 - 6 * i, color=f"C{i}", label=label)
    top.set(ylabel="share of correct answers", ylim=(0, 1))
    top.legend(fontsize=8)
    bottom.plot(steps, [metrics["entropy"] for metrics in history], color="C2", label="entropy, nats per token")
    bottom.plot(steps, [metrics["signal"] for metrics in history], color="C3", label="share of groups with signal")
    bottom.set(xlabel="policy-gradient updates", ylim=(0, None))
    bottom.legend(fontsize=8)
    with whole(path) as unfinished:
        figure.savefig(unfinished, dpi=120, format="png")
    return f"learning curve: {path}"
