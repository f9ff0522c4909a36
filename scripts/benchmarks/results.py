"""What was measured: figures, what could not be measured, and what the words mean."""

import math
import statistics
from enum import Enum


class Better(Enum):
    """Which figures are better."""

    LOWER = "lower"
    HIGHER = "higher"


Lower, Higher = Better.LOWER, Better.HIGHER
# From so many on, the 99th percentile says something.
ENOUGH_FOR_P99 = 50


class Series:
    """All figures of one subject at one workload."""

    def __init__(self, group, workload, subject, unit, better, values=()):
        self.group = group
        self.workload = workload
        self.subject = subject
        self.unit = unit
        self.better = better
        self.values = list(values)

    @property
    def median(self):
        return statistics.median(self.values)

    @property
    def p99(self):
        """The 99th percentile, or `None` of too few figures."""
        if len(self.values) < ENOUGH_FOR_P99:
            return None
        ordered = sorted(self.values)
        return ordered[math.ceil(0.99 * len(ordered)) - 1]

    def compared_with(self, peer):
        """How ours (this) stands beside a peer's, in words."""
        factor = self.median / peer.median if peer.median else float("inf")
        low, high = ("less", "more") if self.unit in ("MB", "MiB") else ("faster", "slower")
        if self.better is Higher:
            factor = 1 / factor
        if factor < 1:
            return f"{ratio(1 / factor)}× {low}"
        return f"{ratio(factor)}× {high}"

    def to_json(self):
        return {"group": self.group, "workload": self.workload, "subject": self.subject,
                "unit": self.unit, "better": self.better.value, "runs": len(self.values),
                "median": self.median, "min": min(self.values), "max": max(self.values),
                "p99": self.p99, "values": self.values}


class Results:
    """Collects; knows nothing of how it was measured."""

    def __init__(self, environment):
        self.environment = environment
        self.series = []
        self.skipped = []
        self.failures = []
        self.notes = {}

    def add(self, group, workload, subject, unit, better, value):
        """One more figure."""
        for series in self.series:
            if (series.workload, series.subject) == (workload, subject):
                break
        else:
            series = Series(group, workload, subject, unit, better)
            self.series.append(series)
        series.values.append(value)

    def note(self, workload, text):
        """What exactly a workload measures."""
        self.notes[workload] = text

    def skip(self, what, why):
        """Something that could not be measured."""
        if (what, why) not in self.skipped:
            self.skipped.append((what, why))

    def failed(self, subject, why):
        """Something that did not do what it should while it was measured."""
        self.failures.append((subject, why))

    def workloads(self):
        """Series by group and workload, in the order in which they were measured."""
        grouped = {}
        for series in self.series:
            grouped.setdefault((series.group, series.workload), []).append(series)
        return grouped

    def to_json(self):
        return {"environment": self.environment,
                "results": [series.to_json() for series in self.series],
                "notes": self.notes,
                "skipped": [{"what": what, "why": why} for what, why in self.skipped],
                "failures": [{"subject": who, "why": why} for who, why in self.failures]}

    @classmethod
    def from_json(cls, document):
        results = cls(document["environment"])
        results.series = [
            Series(one["group"], one["workload"], one["subject"], one["unit"],
                   Better(one["better"]), one["values"]) for one in document["results"]]
        results.notes = document["notes"]
        results.skipped = [(one["what"], one["why"]) for one in document["skipped"]]
        results.failures = [(one["subject"], one["why"]) for one in document["failures"]]
        return results


def ratio(value):
    """A ratio with two figures that count."""
    return f"{value:.2f}" if value < 10 else f"{value:.0f}"


def figure(value):
    """A figure with three that count."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}" if value >= 1 else f"{value:.3f}"
