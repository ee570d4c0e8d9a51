"""What keeps the guarantee of Cycle-SDE: Theorem 3.3 of arXiv 2311.01410, where it holds, and where it ends.

The argument behind, for any data, solver and number of steps: x_s = F(x_t0, W) with W the recorded noise, and replay
is x~_s = F(x~_t0, W). If W is independent of x_t0, then F(x, W) has the law of x_s given x_t0 = x, the exact reverse
kernel, and an edit of x_t0 alone ends in the law of the SDE. W need not be white for that. `theory.cycles` has the
laws; the rows say which solvers, edits, masks and prompts do, and how far the others are off.
"""

from collections.abc import Iterator

from theory.checks import Check, Study
from theory.cycle_edits import edits_that_read_the_source, masks, prompts
from theory.cycle_laws import law, other_levels
from theory.cycle_noise import another_way_to_record, noise


def cycle_contraction(study: Study) -> Iterator[Check]:
    """Theorem 3.3: noise that is independent of x_t0 gives Cycle-SDE the marginals of the SDE; and without it?"""
    yield from noise(study)
    yield from law(study)
    yield from other_levels(study)
    yield from edits_that_read_the_source(study)
    yield from masks(study)
    yield from prompts(study)
    yield from another_way_to_record(study)
