"""Faults of the network: numbers that are not finite, chunks that come too late, chunks that the arm can't follow."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml
from diagnostic_msgs.msg import DiagnosticStatus
from fault_cell import Cell, running_policy
from live_robot import ROBOT
from numpy.typing import NDArray
from ros_harness import NodeProcess
from test_guard import FOLDED, stretched_out
from told_policy import HOME, circle, save_told_policy, stay

from decoupled_policy_ros.policy.backbones import DPMLPSize
from decoupled_policy_ros.robot.kinematics import Kinematics
from decoupled_policy_ros.runtime.guard.settings import IGNORED

pytestmark = pytest.mark.process

KINEMATICS = Kinematics(ROBOT)
Configure = Callable[..., None]
#: From the arm folded onto itself to where it just does not touch.
UNFOLDING = np.array([0.0, 0.0, 0.0, 0.25, 0.0, 0.6, 0.0])


@pytest.fixture(scope='module')
def node(tmp_path_factory) -> Iterator[NodeProcess]:
    with running_policy(tmp_path_factory.mktemp('faults'), autostart=False) as node:
        yield node


@pytest.fixture
def follow(node, cell, tmp_path) -> Iterator[Configure]:
    """Start to follow a policy that says `actions`, from joints and with a guard of one's own."""

    def follow(
        actions: NDArray[np.float64],
        joints_rad: NDArray[np.float64] = ROBOT.home_rad,
        guard: dict | None = None,
        steps: int = 2,
        **options: object,
    ) -> None:
        cell.body.joints_rad = np.array(joints_rad)
        cell.forget()
        file = tmp_path / 'guard.yaml'
        file.write_text(yaml.safe_dump(guard or {}))
        task: Path = save_told_policy(tmp_path, actions, **options)  # type: ignore[arg-type]
        for name, value in (('task', str(task)), ('denoising_steps', steps), ('guard_file', str(file))):
            assert cell.set_parameter('policy_node', name, value) == (True, '')
        assert cell.change_state('configure') and cell.change_state('activate')

    yield follow
    assert cell.change_state('deactivate') and cell.change_state('cleanup')


def only(rule: str, **settings: float) -> dict:
    """Guard settings without what would refuse the same motion for another reason."""
    others = {'workspace', 'join', 'singularity', 'self_collision'} - {rule}
    return {'ignored_rules': sorted(others | IGNORED), **settings}


def test_nan_from_the_network(follow, cell):
    """Files whose weights overflow on anything but the zeros of the warm-up."""
    follow(circle(), not_finite=True)
    cell.status('waiting', 'the chunk has 160 values that are not finite')
    assert int(cell.diagnostics('policy')['rejected_chunks']) > 0
    assert cell.received('target_pose') == []


def test_inference_slower_than_the_chunk(follow, cell):
    """Every chunk is over before it is there: nothing of it is followed."""
    follow(
        circle(),
        size=DPMLPSize(width=32, hidden=64, blocks=40, time_width=32),
        training_steps=1000,
        steps=1000,
    )
    cell.status('waiting', 'passed')
    values = cell.diagnostics('policy')
    assert int(values['guard_reject_passed']) > 0
    assert cell.received('target_pose') == []


def test_a_target_outside_the_box(follow, cell):
    """Positions are moved to the border."""
    floor_m = float(HOME[0, 3])
    follow(circle(), guard={'workspace_m': {'lower': [floor_m, -0.4, -0.1], 'upper': [0.8, 0.4, 0.6]}})
    cell.is_moving()
    values = cell.reported('policy', 'following')
    assert int(values['guard_clamp_workspace']) > 0
    assert cell.positions()[:, 0].min() > floor_m - 1e-3


def test_too_fast(follow, cell):
    """A circle at 1.6 m/s and 25 m/s2: the same way, more slowly."""
    follow(circle(0.1), guard=only('linear_acceleration'))
    cell.is_moving()
    values = cell.reported('policy', 'following')
    assert int(values['guard_time_scale_linear_acceleration']) > 0
    assert float(values['guard_largest_time_scale']) > 1.2


def refused(
    follow: Configure, cell: Cell, rule: str, joints_rad: NDArray, pose: NDArray, **settings: float
) -> None:
    """From these joints to this pose: never, for one rule; and where the arm is it may stay."""
    follow(stay(pose), joints_rad, only(rule, **settings))
    cell.status('waiting', rule)
    assert int(cell.reported('policy', rule, DiagnosticStatus.WARN)[f'guard_reject_{rule}']) > 0
    assert cell.received('target_pose') == []


def test_an_unreachable_pose(follow, cell):
    joints_rad = stretched_out(-0.6)
    pose = KINEMATICS.forward(joints_rad)
    pose[0, 3] += 0.12
    refused(follow, cell, 'reach', joints_rad, pose)


def test_a_joint_limit(follow, cell):
    joints_rad, beyond_rad = ROBOT.home_rad.copy(), ROBOT.home_rad.copy()
    joints_rad[5], beyond_rad[5] = ROBOT.limits.upper_rad[5] + (-0.03, 0.3)
    refused(follow, cell, 'joint_position', joints_rad, KINEMATICS.forward(beyond_rad))


def test_a_singular_pose(follow, cell):
    pose = KINEMATICS.forward(stretched_out(-0.6))
    limits = {'singularity_slow': 0.2, 'singularity_floor': 0.03}
    refused(follow, cell, 'singularity', stretched_out(-0.7), pose, **limits)


def test_a_self_collision(follow, cell):
    pose = KINEMATICS.forward(FOLDED + 0.9 * UNFOLDING)
    refused(follow, cell, 'self_collision', FOLDED + UNFOLDING, pose)
