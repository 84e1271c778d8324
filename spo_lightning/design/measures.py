"""Proposed designs' objectives in, how good and how far apart they are out.

Objectives are scaled by what was known (``Offline.scaled``), so that 1 is the worst that was known
of each and 0 the best; what is proposed may lie below 0.
"""

import numpy as np
from pymoo.indicators.hv import HV

Array = np.ndarray


def hypervolume(objectives: Array, reference: float) -> float:
    """The volume between the proposals and a point at ``reference`` in every objective."""
    found = HV(ref_point=np.full(objectives.shape[1], reference))(objectives)
    assert found is not None
    return float(found)


def diversity(objectives: Array) -> float:
    """The mean distance between two of the proposals."""
    apart = np.linalg.norm(objectives[:, None] - objectives[None], axis=2)
    return float(apart.sum() / max(1, len(objectives) * (len(objectives) - 1)))


def spread(objectives: Array) -> float:
    """Deb's delta without known ends: how uneven the gaps are between neighbours in the first
    objective; 0 where all are alike."""
    rising = objectives[np.argsort(objectives[:, 0], kind="stable")]
    gaps = np.linalg.norm(np.diff(rising, axis=0), axis=1)
    total = gaps.sum()
    return float(np.abs(gaps - gaps.mean()).sum() / total) if total > 0 else 0.0


def measured(objectives: Array, reference: float) -> dict[str, float]:
    """The numbers of a set of proposals."""
    return {
        "hypervolume": hypervolume(objectives, reference),
        "diversity": diversity(objectives),
        "spread": spread(objectives),
    }
