"""Whether a table's entry is beaten: what is best over its cases is timed again, against it alone.

Of many candidates, one looks fast by chance.
"""

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lora_kernels.kernels.config import Config, When
from lora_kernels.tuning import candidates, cases, rows
from lora_kernels.tuning.candidates import source
from lora_kernels.tuning.cases import Case

__all__ = ["Verdict", "confirm"]


@dataclass(frozen=True)
class Verdict:
    """The best configuration of a table's entry over its cases, against the entry.

    ratio: of the sums over the cases; None if the table's own cannot be timed.
    by_case: of each case.
    """

    entry: str
    when: When
    table: Config
    best: Config
    ratio: rows.Ratio | None
    by_case: tuple[float, ...]

    @property
    def faster(self) -> bool:
        """Beyond doubt."""
        return self.best != self.table and (self.ratio is None or rows.faster(self.ratio))

    @property
    def pasted(self) -> str:
        """The line of the table."""
        return f"({source(self.when)}, {source(self.best)}),"

    def __str__(self) -> str:
        if self.best == self.table:
            return f"{self.entry}: keep {source(self.table)}, nothing looked faster"
        each = ", ".join(f"{ratio:.3f}" for ratio in self.by_case)
        took = f"{rows.ratio_text(self.ratio)} of the table's time (by case: {each})"
        if not self.faster:
            return f"{self.entry}: keep {source(self.table)}; {source(self.best)} takes {took}"
        if self.ratio is None:
            took = "the table's own does not run"
        return f"{self.entry}: {took}\n        {self.pasted}"


def confirm(
    group: Sequence[Case],
    samples: Sequence[Mapping[Config, Sequence[float]]],
    seconds: float,
) -> tuple[list[dict], Verdict | None]:
    """Times what is best over the cases of one entry again, with the table's alone.

    samples: the seconds of each case by configuration. None if nothing was timed in all cases.
    """
    case, best = group[0], _best(group, samples)
    if best is None:
        return [], None
    verdict = Verdict(case.entry, case.when, case.table, best, (1.0, 1.0, 1.0), ())
    if best == case.table:
        return [], verdict
    measured, ours, table = [], [], []
    for each in group:
        made, times = cases.measure(each, [each.table, best], {}, seconds, cases.CONFIRM)
        measured += made
        if best not in times:
            return measured, None
        ours.append(times[best])
        if each.table in times:
            table.append(times[each.table])
    if len(table) < len(ours):
        return measured, dataclasses.replace(verdict, ratio=None)
    by_case = tuple(rows.paired_ratio(*pair)[0] for pair in zip(ours, table, strict=True))
    sums = ([sum(times) for times in zip(*each, strict=False)] for each in (ours, table))
    ratio = rows.paired_ratio(*sums)
    return measured, dataclasses.replace(verdict, ratio=ratio, by_case=by_case)


def _best(
    group: Sequence[Case], samples: Sequence[Mapping[Config, Sequence[float]]]
) -> Config | None:
    """The configuration of the least geometric mean, among those that were timed in every case."""
    medians = [
        {
            candidates.as_run(case.name, case.shape, config): statistics.median(seconds)
            for config, seconds in times.items()
        }
        for case, times in zip(group, samples, strict=True)
    ]
    means = {}
    for config in dict.fromkeys(config for times in samples for config in times):
        same = [candidates.as_run(case.name, case.shape, config) for case in group]
        if all(each in known for each, known in zip(same, medians, strict=True)):
            pairs = zip(same, medians, strict=True)
            means[config] = statistics.geometric_mean(known[each] for each, known in pairs)
    return min(means, key=means.__getitem__, default=None)
