"""The fast control period against robosuite's own step: equal to round-off, and only taken where it is."""

import numpy as np
import pytest

from decoupled_policy_ros.robot.description import load_robot
from decoupled_policy_ros.sim.environment import SimRobot
from decoupled_policy_ros.sim.stepping import ControlPeriod

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


@pytest.mark.parametrize('task', ['stack', 'square', 'detour'])
def test_the_fast_period_is_robosuites_step(task):
    with SimRobot(task, load_robot('panda_sim'), cameras={}) as sim:
        assert isinstance(sim._advance, ControlPeriod)
        fast = reach_down(sim, seed=4)
        np.testing.assert_array_equal(reach_down(sim, seed=4), fast)
        sim._advance = sim._env.step
        np.testing.assert_allclose(fast, reach_down(sim, seed=4), rtol=0, atol=1e-12)
    assert np.abs(fast[-1] - fast[0]).max() > 0.1


def test_arms_whose_grippers_are_linkages_take_robosuites_own():
    with SimRobot('lift', load_robot('ur5e_sim'), cameras={}) as sim:
        assert sim._advance == sim._env.step
