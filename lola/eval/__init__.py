"""What LoLA remembers, measured: RULER's needle tasks and the comparison that ``lola eval`` prints.

>>> from lola.eval import evaluate                                            # doctest: +SKIP
>>> rows = evaluate(model="needle", tasks=["niah_single_1"], samples=10)      # doctest: +SKIP
>>> [(row["attention"], row["mixing"], row["accuracy"]) for row in rows]      # doctest: +SKIP
[('softmax', None, 1.0), ('base', 'lolcats', 0.0), ('base', 'gated', 0.0), ...]
"""

from .run import ATTENTIONS, Comparison, Needle, evaluate, wilson
from .tasks import TASKS, Sample, Task, fixed_samples, make_sample, score

__all__ = [
    "ATTENTIONS",
    "TASKS",
    "Comparison",
    "Needle",
    "Sample",
    "Task",
    "evaluate",
    "fixed_samples",
    "make_sample",
    "score",
    "wilson",
]
