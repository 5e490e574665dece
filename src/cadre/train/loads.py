"""What a load says: how evenly a layer's router spreads its choices. One definition each, for the run's metrics, its alarm,
its report and `cadre routes` alike.

Letters in names: E expert. Loads are counts or shares of the routed choices, in arrays [..., E]; every function takes any
number of layers at once and gives nan where nothing was routed.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]

# An expert with less than this share of the mean load is dead: it learns from next to nothing.
DEAD_BELOW = 0.01


def load_ratio(load: ArrayLike) -> Floats:
    """Load over its mean along the last axis: 1 is balance."""
    load_E = np.asarray(load, dtype=float)
    mean = load_E.mean(axis=-1, keepdims=True)
    return np.divide(load_E, mean, out=np.full_like(load_E, np.nan), where=mean > 0)


def max_violation(load: ArrayLike) -> Floats:
    """MaxVio: how far the busiest expert is above the mean, as a share of the mean (arXiv 2408.15664, section 4.1); from 0
    at balance to experts / choices - 1 where all tokens choose the same."""
    return load_ratio(load).max(axis=-1) - 1


def evenness(load: ArrayLike) -> Floats:
    """The entropy of the load over that of an even one: 1 at balance, 0 where one expert has everything."""
    ratio = load_ratio(load)
    experts = ratio.shape[-1]
    share = ratio / experts
    entropy = -(share * np.log(np.where(share > 0, share, 1))).sum(axis=-1)
    return entropy / np.log(experts) if experts > 1 else entropy + 1


def effective_share(load: ArrayLike) -> Floats:
    """exp(entropy) / experts: the share of the experts that would, if evenly used, make a load of the same entropy."""
    experts = np.shape(load)[-1]
    return experts ** (evenness(load) - 1)


def dead_experts(load: ArrayLike) -> NDArray[np.int64]:
    """How many experts are dead; 0 where nothing was routed."""
    return (load_ratio(load) < DEAD_BELOW).sum(axis=-1)
