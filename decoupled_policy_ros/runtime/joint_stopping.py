"""Coming to rest along a motion of the joints, as `stopping.Stop` does along one of the end effector."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from decoupled_policy_ros.runtime.joint_motion import JointMotion
from decoupled_policy_ros.runtime.motion import NS_PER_S
from decoupled_policy_ros.runtime.stopping import ROUNDING, SAMPLE_S, slowed, ways_to_slow

Array = NDArray[np.float64]

#: Least intervals of a stop: where its velocity is a cubic, the error of the curve between them is below 0.1 mm.
STOP_INTERVALS = 8
#: Longest time from one point of a stop to the next (ns).
STOP_NS = 20_000_000
#: What would take less than this (s) to slow down is at rest.
RESTS_S = 1e-6


def slowed_to_rest(
    motion: JointMotion, since_ns: int, start_ns: int, acceleration_rad_s2: Array
) -> JointMotion:
    """Along a motion, ever more slowly, to rest: through no positions that the motion would not have led to.

    Args:
        motion: what was commanded, at rest at its end.
        since_ns: where on it the stop begins.
        start_ns: when the stop begins.
        acceleration_rad_s2: (joints,) that they keep, but for what the motion itself has above it.
    """
    left_s = max(0.0, (motion.stamps_ns[-1] - since_ns) / NS_PER_S)
    at_s = SAMPLE_S * np.arange(int(left_s / SAMPLE_S) + 3)
    rates = np.stack([motion.at(since_ns + round(time_s * NS_PER_S))[1] for time_s in at_s])
    limits = np.maximum(acceleration_rad_s2, np.abs(np.diff(rates, axis=0)).max(0) / SAMPLE_S)

    def keeps(delay_s: float, duration_s: float) -> bool:
        u = np.linspace(0.0, 1.0, int(np.ceil(duration_s / SAMPLE_S)) + 4)
        way, share = slowed(u)
        known = np.stack([np.interp(delay_s + duration_s * way, at_s, each) for each in rates.T])
        change = np.abs(np.diff(share * known))
        return bool((change <= ROUNDING * limits[:, None] * duration_s * u[1]).all())

    least_s = float(np.max(1.5 * np.abs(rates[0]) / acceleration_rad_s2))
    tried = ways_to_slow(left_s, least_s) if least_s > RESTS_S else iter([(0.0, 0.0)])
    delay_s, slowing_s = next((way for way in tried if keeps(*way)), (left_s, 0.0))
    return _along(motion, since_ns, start_ns, delay_s, slowing_s)


def _along(
    motion: JointMotion, since_ns: int, start_ns: int, delay_s: float, slowing_s: float
) -> JointMotion:
    lasts_s = max(delay_s + slowing_s, 1e-3)
    count = max(STOP_INTERVALS, int(np.ceil(lasts_s * NS_PER_S / STOP_NS)))
    times_s = np.linspace(0.0, lasts_s, count + 1)
    u = np.clip((times_s - delay_s) / slowing_s, 0.0, 1.0) if slowing_s > 0.0 else 1.0 * (times_s >= delay_s)
    u[-1] = 1.0  # not less by rounding: it ends at rest
    way, share = slowed(u)
    passed_s = np.minimum(times_s, delay_s) + slowing_s * way
    points = [motion.at(since_ns + round(time_s * NS_PER_S)) for time_s in passed_s]
    return JointMotion(
        [start_ns + round(time_s * NS_PER_S) for time_s in times_s],
        np.stack([positions for positions, _ in points]),
        share[:, None] * np.stack([velocities for _, velocities in points]),
    )
