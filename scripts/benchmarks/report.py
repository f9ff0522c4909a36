"""The results as a table for people, and as the page of the documentation."""

from results import figure

OURS = "cortex mesh"
TITLES = {"exec": "Commands", "sandbox": "Sandbox", "sync": "Sync", "hub": "Hub"}


def role(subject):
    """What stands in parentheses: which of a subject's processes or connections it is."""
    return subject.partition(" (")[2]


def compared(series, other):
    """How ours stands beside this one, the same role beside the same; else our first."""
    ours = [one for one in series if one.subject.startswith(OURS)]
    if not ours or other in ours:
        return ""
    same = [one for one in ours if role(one.subject) == role(other.subject)]
    return (same or ours)[0].compared_with(other)


def cells(series, one):
    """A row of the table."""
    spread = f"{figure(min(one.values))}–{figure(max(one.values))}"
    p99 = figure(one.p99) if one.p99 is not None else ""
    return [one.subject, f"{figure(one.median)} {one.unit}", spread, p99, str(len(one.values)),
            compared(series, one)]


HEADINGS = ["", "median", "min–max", "p99", "runs", f"{OURS} is"]


def table(results):
    """For a terminal."""
    lines = [environment_line(results)]
    for (_, workload), series in results.workloads().items():
        rows = [HEADINGS] + [cells(series, one) for one in series]
        widths = [max(len(row[column]) for row in rows) for column in range(len(HEADINGS))]
        lines += ["", workload]
        for row in rows:
            padded = [row[0].ljust(widths[0])] + [
                cell.rjust(width) for cell, width in zip(row[1:], widths[1:])]
            lines.append("  " + "  ".join(padded).rstrip())
    for what, why in results.skipped:
        lines.append(f"not measured: {what}: {why}")
    for who, why in results.failures:
        lines.append(f"FAILED: {who}: {why}")
    return "\n".join(lines)


def environment_line(results):
    """Where and when, in a line."""
    about = results.environment
    return (f"{about['date']}, commit {about['commit']}, {about['cores']} cores ({about['cpu']}), "
            f"{about['memory_gib']} GiB, Linux {about['kernel']}, load of other programs at the "
            f"start {about['load_at_start']}")


def page(results):
    """`docs/benchmarks.md`."""
    about = results.environment
    lines = [
        "# Benchmarks", "",
        "Made by a run of the command below; `scripts/bench --write-docs` makes this page anew. "
        "Everything",
        "ran on one machine over loopback, the subjects taking turns (A B C A B C), on files made "
        "from fixed",
        "seeds. So the ratios say more than the figures: another machine, a real network and a "
        "quiet or busy",
        "neighbourhood change the latter.", "",
        "| | |", "|---|---|",
        f"| date | {about['date']} |", f"| commit | {about['commit']} |",
        f"| command | `{about['command']}` |",
        f"| machine | {about['cores']} cores ({about['cpu']}), {about['memory_gib']} GiB memory, "
        f"Linux {about['kernel']}, {about['filesystem']} |",
        f"| load of other programs at the start | {about['load_at_start']} |",
        f"| versions | {'; '.join(about['versions'])} |", "",
        f"The last column tells how {OURS} stands beside that row."]
    group_before = None
    for (group, workload), series in results.workloads().items():
        if group != group_before:
            lines += ["", f"## {TITLES[group]}"]
            group_before = group
        lines += ["", f"### {workload[0].upper()}{workload[1:]}", ""]
        if workload in results.notes:
            note = results.notes[workload]
            lines += [f"{note[0].upper()}{note[1:]}.", ""]
        lines += [f"| {' | '.join(HEADINGS)} |", "|---|--:|--:|--:|--:|---|"]
        lines += [f"| {' | '.join(cells(series, one))} |" for one in series]
    if results.skipped:
        lines += ["", "## Not measured", ""]
        lines += [f"- {what}: {why}" for what, why in results.skipped]
    if results.failures:
        lines += ["", "## Failed while measured", ""]
        lines += [f"- {who}: {' '.join(why.split())}" for who, why in results.failures]
    return "\n".join(lines) + "\n"
