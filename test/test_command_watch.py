"""The eye that all process tests are under: it sees each kind of breach over DDS, and nothing where there is none."""

import threading
from collections.abc import Iterator
from types import SimpleNamespace

import numpy as np
import pytest
from command_watch import CommandWatch
from diagnostic_msgs.msg import DiagnosticStatus
from geometry_msgs.msg import PoseStamped
from ros_harness import Peer
from std_msgs.msg import Float64
from trajectory_msgs.msg import JointTrajectory

from decoupled_policy_ros.nodes.common import COMMAND, LATCHED, pose_stamped
from decoupled_policy_ros.nodes.joint_output import joint_trajectory_message
from decoupled_policy_ros.robot.description import load_robot
from decoupled_policy_ros.robot.kinematics import Kinematics
from decoupled_policy_ros.runtime.joint_motion import JointMotion

pytestmark = pytest.mark.process

ROBOT = load_robot('panda_sim')
HOME = Kinematics(ROBOT).forward(ROBOT.home_rad)
S = 1_000_000_000
PERIOD_NS = S // 50


@pytest.fixture(scope='module')
def told() -> Iterator[SimpleNamespace]:
    """A watch, and a peer that commands what it likes."""
    watch, peer = CommandWatch(), Peer('watched')
    watch.listen('watched', 'somebody', ROBOT, guarded=True)
    publishers = {
        kind: peer.create_publisher(message, topic, qos)
        for kind, message, topic, qos in (
            ('pose', PoseStamped, 'target_pose', COMMAND),
            ('joints', JointTrajectory, 'joint_trajectory', COMMAND),
            ('gripper', Float64, 'gripper_command', COMMAND),
            ('status', DiagnosticStatus, 'somebody/status', LATCHED),
        )
    }
    peer.wait_for_subscribers(*publishers.values())
    told = SimpleNamespace(watch=watch, peer=peer, now_ns=100 * S, **publishers)
    yield told
    peer.close()
    watch.close()


def go(told: SimpleNamespace, *offsets_m: float, period_ns: int = PERIOD_NS) -> list[str]:
    """Command x offsets from home; what the watch has to say about them."""
    looked_at = told.watch.counts('/watched')[0]
    for offset_m in offsets_m:
        told.now_ns += period_ns
        pose = HOME.copy()
        pose[0, 3] += offset_m
        told.pose.publish(pose_stamped(pose, ROBOT.base_frame, told.now_ns))
        seen(told, looked_at := looked_at + 1)  # a queue of one: the next may not overtake it
    return told.found


def seen(told: SimpleNamespace, count: int) -> None:
    found: list[str] = []

    def there() -> bool:
        found.extend(told.watch.breaches())
        return told.watch.counts('/watched')[0] >= count

    told.peer.wait_for(there, f'{count} commands')
    told.found = found


def test_a_calm_motion_breaks_nothing(told):
    assert go(told, 0.0, 0.0005, 0.001, 0.001) == []
    assert told.watch.largest('/watched')['linear_m_s'] == pytest.approx(0.025)


def test_a_jump_a_tremble_a_place_outside_and_an_old_stamp_are_seen(told):
    assert 'linear_m_s ' in ''.join(go(told, 0.0, 0.1))
    go(told, *[0.1] * 3)
    assert 'linear_m_s2 ' in ''.join(go(told, 0.1, 0.11))
    go(told, *[0.11] * 3)
    assert 'outside_m' in ''.join(go(told, 0.6, period_ns=10 * S))
    assert 'is not after' in ''.join(go(told, 0.6, period_ns=0))


def test_after_a_pause_that_was_said_a_motion_begins_anew(told):
    go(told, 0.0, 0.0)
    told.status.publish(DiagnosticStatus(message='waiting: no observation yet'))
    threading.Event().wait(0.05)
    assert go(told, 0.1) == []


def test_joints_and_grippers_out_of_range_are_seen(told):
    def motion(*positions_rad: np.ndarray, at_ns: int) -> None:
        stamps_ns = [at_ns + i * S // 10 for i in range(len(positions_rad))]
        rest = np.zeros((len(positions_rad), 7))
        motion = JointMotion(stamps_ns, np.stack(positions_rad), rest)
        told.joints.publish(joint_trajectory_message(motion, ROBOT))

    before = told.watch.counts('/watched')[1]

    def found(count: int, what: str) -> None:
        breaches: list[str] = []

        def there() -> bool:
            breaches.extend(told.watch.breaches())
            return told.watch.counts('/watched')[1] >= before + count

        told.peer.wait_for(there, 'trajectories')
        assert (what in ''.join(breaches)) if what else not breaches, breaches

    home = ROBOT.home_rad
    motion(home, home + 0.01, at_ns=S)
    found(1, '')
    motion(home + 0.01, home + 0.5, at_ns=S + S // 10)
    found(2, 'joint_velocity')
    motion(home, home, at_ns=2 * S)
    found(3, 'join_rad 0.5')
    motion(home + 3.0, at_ns=2 * S + S // 10)
    found(4, 'outside_rad')
    near = home.copy()
    near[6] = ROBOT.limits.upper_rad[6] - 1e-3
    swing = JointMotion([3 * S, 3 * S + S // 10], np.stack([near, near]), np.zeros((2, 7)))
    swing.velocities_rad_s[:, 6] = 0.4, -0.4  # out of the range and back, from one point inside to the next
    told.joints.publish(joint_trajectory_message(swing, ROBOT))
    found(5, 'outside_rad')
    told.gripper.publish(Float64(data=0.2))
    told.peer.wait_for(lambda: 'gripper width 0.2' in ''.join(told.watch.breaches()), 'the gripper')


def test_without_the_guard_only_what_is_no_command_at_all_counts(told):
    told.watch.listen('watched', 'somebody', ROBOT, guarded=False)
    assert go(told, 0.0, 0.1) == []
    message = pose_stamped(HOME, ROBOT.base_frame, told.now_ns + 1)
    message.pose.position.x = float('nan')
    told.pose.publish(message)
    told.peer.wait_for(lambda: 'must be finite' in ''.join(told.watch.breaches()), 'the NaN')
