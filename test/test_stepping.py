"""The fast control period against robosuite's own step, for each arm and scene.

The Panda's are equal to round-off. The contacts within the linkages of the other arms' grippers leave the solver
room: there robosuite's own step moves as much if the physics is computed once more before it.
"""

import numpy as np
import pytest

from decoupled_policy_ros.robot.description import load_robot
from decoupled_policy_ros.sim.environment import SimRobot

pytestmark = pytest.mark.sim


def reach_down(sim: SimRobot, seed: int, steps: int = 20) -> np.ndarray:
    """Joint positions (steps, n) while the hand goes down and closes."""
    sim.reset(seed)
    target, states = sim.pose_base_ee, []
    for step in range(steps):
        target[:3, 3] += [0.004, -0.003, -0.008]
        sim.step(target, 1.0 if step > steps // 2 else -1.0)
        states.append(sim.joint_positions)
    return np.array(states)


@pytest.mark.parametrize(
    ('task', 'robot', 'tolerance_rad'),
    [
        ('stack', 'panda_sim', 1e-12),
        ('square', 'panda_sim', 1e-12),
        ('detour', 'iiwa_sim', 1e-4),
        ('lift', 'ur5e_sim', 1e-4),
        ('can', 'kinova3_sim', 1e-4),
    ],
)
def test_the_fast_period_is_robosuites_step(task, robot, tolerance_rad):
    with SimRobot(task, load_robot(robot), cameras={}) as sim:
        fast = reach_down(sim, seed=4)
        np.testing.assert_array_equal(reach_down(sim, seed=4), fast)
        sim._advance = sim._env.step
        np.testing.assert_allclose(fast, reach_down(sim, seed=4), rtol=0, atol=tolerance_rad)
    assert np.abs(fast[-1] - fast[0]).max() > 0.1
