"""The points that Optuna proposes for a phase of a sweep.

The study is in memory: its sampler is seeded, so that an interrupted sweep is proposed the same points again, whose runs have
their records.
"""

from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import Trial, TrialState

from ds_optforge.experiments.changes import described
from ds_optforge.experiments.spec import Experiment, RangeSection, Search


class Searcher:
    """Optuna's TPE sampler on the ranges of a phase: it proposes experiments, and is told what came of them.

    Args:
        search: of the phase.
        seed: of the sampler.
    """

    def __init__(self, search: Search, seed: int) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        sampler = optuna.samplers.TPESampler(seed=seed, constant_liar=True)  # liar: points of a batch keep apart
        self._study = optuna.create_study(sampler=sampler)
        self._ranges = search.ranges
        self._asked: dict[str, Trial] = {}

    def propose(self, count: int) -> list[Experiment]:
        """Return the next points, named trial-1, trial-2 and so on."""
        proposed = []
        for _ in range(count):
            trial = self._study.ask({path: _distribution(values) for path, values in self._ranges.items()})
            changes = {}
            for path, values in self._ranges.items():
                chosen = trial.params[path]
                changes[path] = values[chosen] if isinstance(values, list) else chosen
            experiment = Experiment(f"trial-{trial.number + 1}", changes, "medium", False, described(changes))
            self._asked[experiment.name] = trial
            proposed.append(experiment)
        return proposed

    def tell(self, name: str, value: float | None) -> None:
        """Tell the metric of a proposed experiment; None counts as worse than any number."""
        state = TrialState.COMPLETE if value is not None else TrialState.PRUNED
        self._study.tell(self._asked.pop(name), value, state=state)


def _distribution(values: RangeSection | list[Any]) -> BaseDistribution:
    if isinstance(values, list):
        return CategoricalDistribution(range(len(values)))  # of the places in the list, whose values may be anything
    if isinstance(values.low, int) and isinstance(values.high, int):
        return IntDistribution(values.low, values.high, log=values.log)
    return FloatDistribution(values.low, values.high, log=values.log)
