"""What reaches arms and grippers: joint trajectories and actions, and what becomes of it when nobody listens.

control_msgs, and any other package with actions, comes with a ROS installation only. So what lies between a goal and
its server is tested against a client that is played here, with the methods and futures of rclpy's.
"""

import time
from threading import Event, Thread
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from action_msgs.msg import GoalStatus
from rclpy.lifecycle import LifecycleNode, TransitionCallbackReturn
from rclpy.parameter import Parameter
from rclpy.task import Future
from spun_node import SpunNode
from std_msgs.msg import Float64
from trajectory_msgs.msg import JointTrajectory
from untrained import save_untrained_policy

from decoupled_policy_ros.errors import ConfigError, RobotDescriptionError
from decoupled_policy_ros.nodes import joint_output
from decoupled_policy_ros.nodes.actions import LatestGoal, control_action
from decoupled_policy_ros.nodes.common import COMMAND, time_message
from decoupled_policy_ros.nodes.gripper_output import GripperGoals, gripper_output
from decoupled_policy_ros.nodes.joint_output import joint_trajectory_message, joint_trajectory_topic
from decoupled_policy_ros.nodes.policy_node import PolicyNode
from decoupled_policy_ros.nodes.policy_settings import PolicySettings, loop_settings, policy_steering
from decoupled_policy_ros.nodes.sim_commands import Commands, joint_motion
from decoupled_policy_ros.robot.description import load_robot, robot_file
from decoupled_policy_ros.robot.gripper import GripperAction
from decoupled_policy_ros.robot.kinematics import Kinematics
from decoupled_policy_ros.runtime.chunks import Chunk
from decoupled_policy_ros.runtime.cycles import CycleLog
from decoupled_policy_ros.runtime.dependent import Dependent
from decoupled_policy_ros.runtime.direct import Direct
from decoupled_policy_ros.runtime.joint_motion import JointMotion
from decoupled_policy_ros.runtime.loop import PolicyLoop
from decoupled_policy_ros.runtime.steering import ChunkRejected

ROBOT = load_robot('panda_sim')
MS = 1_000_000


class Client:
    """An action client whose server says what the test says."""

    def __init__(self, ready: bool = True):
        self.ready = ready
        self.goals: list[object] = []
        self.answers: list[Future] = []

    def server_is_ready(self) -> bool:
        return self.ready

    def send_goal_async(self, goal: object) -> Future:
        self.goals.append(goal)
        self.answers.append(Future())
        return self.answers[-1]

    def answer(self, index: int, accepted: bool) -> Future:
        """Accept a goal or not; returns what its result is to be put into."""
        result = Future()
        handle = SimpleNamespace(accepted=accepted, get_result_async=lambda: result)
        self.answers[index].set_result(handle)
        for callback in self.answers[index]._callbacks or []:
            callback(self.answers[index])
        return result

    def end(self, result: Future, status: int) -> None:
        result.set_result(SimpleNamespace(status=status))
        for callback in result._callbacks or []:
            callback(result)

    def destroy(self) -> None:
        self.ready = False


def test_a_goal_waits_for_its_server_and_nobody_waits_for_the_goal():
    client = Client(ready=False)
    goals = LatestGoal(client, 'gripper_action', keep=True)
    goals.send('close')
    goals.send('open')
    assert goals.trouble() == 'no action server gripper_action' and not client.goals
    client.ready = True
    assert goals.missing() == '' and client.goals == ['open']  # the newest, once
    assert goals.missing() == '' and client.goals == ['open']


def test_a_motion_that_found_no_server_is_not_sent_later():
    client, lost = Client(ready=False), []
    goals = LatestGoal(client, 'follow_joint_trajectory', keep=False)
    goals.lost = lambda *what: lost.append(what)
    goals.send('now')
    client.ready = True
    assert goals.missing() == '' and not client.goals
    assert lost == [('no action server follow_joint_trajectory', False)]  # the arm has not done it


def test_what_a_server_does_with_the_newest_goal_is_told():
    client, lost = Client(), []
    goals = LatestGoal(client, 'gripper_action', keep=True)
    goals.lost = lambda *what: lost.append(what)
    for goal in 'abc':
        goals.send(goal)
    first = client.answer(0, accepted=True)
    client.end(first, GoalStatus.STATUS_ABORTED)  # replaced: of no interest
    assert goals.trouble() == ''
    client.answer(1, accepted=False)
    assert goals.trouble() == ''
    result = client.answer(2, accepted=True)
    assert goals.trouble() == ''
    client.end(result, GoalStatus.STATUS_ABORTED)
    assert goals.trouble() == 'gripper_action gave the goal up' and goals.missing() == ''
    goals.send('d')
    assert goals.trouble() == ''
    client.answer(3, accepted=False)
    assert goals.trouble() == 'gripper_action refused the goal'
    goals.send('e')
    client.end(client.answer(4, accepted=True), GoalStatus.STATUS_CANCELED)
    assert goals.trouble() == 'gripper_action cancelled the goal'
    goals.send('f')
    client.end(client.answer(5, accepted=True), GoalStatus.STATUS_SUCCEEDED)
    assert goals.trouble() == ''
    assert lost == [
        ('gripper_action gave the goal up', False),
        ('gripper_action refused the goal', False),
        ('gripper_action cancelled the goal', True),
    ]


def test_goals_of_two_threads_reach_the_server_in_their_order():
    sends, goes_on = Event(), Event()

    class SlowClient(Client):
        def send_goal_async(self, goal: object) -> Future:
            if goal == 'open':
                sends.set()
                goes_on.wait(0.2)
            return super().send_goal_async(goal)

    client = SlowClient(ready=False)
    goals = LatestGoal(client, 'gripper_action', keep=True)
    goals.send('open')
    client.ready = True
    worker = Thread(target=goals.missing)  # finds the server, and sends what has been waiting
    worker.start()
    assert sends.wait(10)
    goals.send('close')
    goes_on.set()
    worker.join()
    assert client.goals == ['open', 'close']


def test_a_goal_may_be_answered_before_anybody_asks():
    class QuickClient(Client):
        def send_goal_async(self, goal: object) -> Future:
            answer = super().send_goal_async(goal)
            answer.set_result(SimpleNamespace(accepted=False))
            return answer

    goals = LatestGoal(QuickClient(), 'gripper_action', keep=True)
    goals.send('open')
    assert goals.trouble() == 'gripper_action refused the goal'


@pytest.mark.parametrize(('half', 'position'), [(True, 0.04), (False, 0.08)])
def test_a_width_is_what_the_gripper_understands_by_it(half, position):
    class Kind:
        class Goal:
            def __init__(self):
                self.command = SimpleNamespace()

    client = Client()
    action = GripperAction('gripper_action', half, 20.0)
    GripperGoals(Kind, LatestGoal(client, action.name, keep=True), action).send(0.08)
    (goal,) = client.goals
    assert (goal.command.position, goal.command.max_effort) == (position, 20.0)


@pytest.mark.process
def test_a_gripper_that_listens_late_hears_the_newest_width(rclpy_context):
    node = LifecycleNode('teller', context=rclpy_context, namespace='late')  # nobody of an earlier test
    output = gripper_output(node, ROBOT, 'topic')
    node.trigger_configure()
    node.trigger_activate()
    holding = Dependent(Direct(), {'gripper': output}, hold=True)
    going_on = Dependent(Direct(), {'gripper': output}, hold=False)
    chunk = Chunk(np.tile([0.4, 0, 0.3, 1, 0, 0, 0, 1, 0, -1], (16, 1)), 10**9, 20.0)
    heard: list[float] = []
    gripper = SpunNode('gripper')
    gripper.spin_in_background()

    def wait_for(condition):
        deadline = time.monotonic() + 30.0
        while not condition():
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def listen():
        return gripper.create_subscription(
            Float64, '/late/gripper_command', lambda m: heard.append(m.data), COMMAND
        )

    try:
        for width_m in (0.08, 0.0):
            output.send(width_m)
        with pytest.raises(ChunkRejected, match='gripper: nobody listens on gripper_command'):
            holding.plan(chunk, 10**9)
        assert going_on.plan(chunk, 10**9).chunk is chunk
        assert going_on.values() == {'gripper': 'nobody listens on gripper_command'}
        subscription = listen()
        wait_for(lambda: going_on.values() == {'gripper': 'ready'})
        assert holding.plan(chunk, 10**9).chunk is chunk
        output.send(0.08)
        wait_for(lambda: heard[-1:] == [0.08])
        assert heard in ([0.0, 0.08], [0.08])  # the newest counts, and nothing is queued
        gripper.destroy_subscription(subscription)
        wait_for(output.missing)
        output.send(0.0)
        going_on.reset()  # disabled, or an operator took over
        listen()
        wait_for(lambda: not output.missing())
        output.send(0.04)
        wait_for(lambda: heard[-1:] == [0.04])
        assert 0.0 not in heard[1:]
    finally:
        gripper.close()
        output.close()
        node.destroy_node()


def test_fr3_is_wired_as_franka_ros2_brings_it_up():
    fr3 = load_robot('fr3')
    assert fr3.gripper_action == GripperAction('franka_gripper/gripper_action', True, 20.0)
    assert joint_trajectory_topic(fr3) == 'fr3_arm_controller/joint_trajectory'


def test_actions_are_named_where_control_msgs_is_missing(monkeypatch):
    monkeypatch.setitem(__import__('sys').modules, 'control_msgs', None)
    with pytest.raises(ConfigError, match='GripperCommand needs the ROS package control_msgs'):
        control_action('GripperCommand')


def robot_without(tmp_path, change):
    """panda_sim with its file changed."""
    values = yaml.safe_load(robot_file('panda_sim').read_text())
    change(values)
    path = tmp_path / 'robot.yaml'
    path.write_text(yaml.safe_dump(values))
    return load_robot(path)


def test_a_robot_without_a_topic_for_joint_trajectories_is_refused(tmp_path):
    robot = robot_without(tmp_path, lambda values: values['topics'].pop('joint_trajectory'))
    with pytest.raises(ConfigError, match="'panda_sim' names no topic 'joint_trajectory'"):
        joint_trajectory_topic(robot)


@pytest.mark.parametrize(
    ('action', 'reason'),
    [
        ({'name': 'a', 'max_effort_n': -1.0}, 'must not be negative'),
        ({'name': 'a'}, "missing key 'max_effort_n'"),
        ({'name': 'a', 'max_effort_n': 1.0, 'halved': True}, 'unknown key halved'),
    ],
)
def test_a_wrong_gripper_action_is_refused(tmp_path, action, reason):
    with pytest.raises(RobotDescriptionError, match=reason):
        robot_without(tmp_path, lambda values: values['gripper'].update(action=action))


def test_joints_are_not_commanded_without_the_guard():
    outputs = SimpleNamespace(joints=object(), parts=dict)
    settings = PolicySettings(guard=False, output='joint_trajectory')
    with pytest.raises(ConfigError, match='needs the guard'):
        policy_steering(ROBOT, settings, outputs, lambda: 0, CycleLog())


@pytest.mark.parametrize(
    ('values', 'reason'),
    [
        ({'spread_hold_m': 0.02}, 'spread_hold_m 0.02 needs samples of at least 2, got 1'),
        ({'spread_slow_m': 0.02}, 'spread_slow_m 0.02 needs samples of at least 2, got 1'),
        ({'ensemble': -0.5}, r'ensemble must be -1 \(off\), 0 or positive, got -0.5'),
        ({'guard': False, 'guard_file': 'cell.yaml'}, "guard_file 'cell.yaml' needs the guard"),
        ({'trajectory_action': True}, "needs output 'joint_trajectory' or 'both', got 'pose'"),
    ],
)
def test_settings_that_nothing_would_come_of_are_refused(values, reason):
    with pytest.raises(ConfigError, match=reason):
        loop_settings(PolicySettings(**values), frozenset())


@pytest.mark.parametrize(
    'values',
    [
        {'spread_slow_m': 0.01, 'spread_hold_m': 0.02, 'samples': 2},
        {'trajectory_action': True, 'output': 'none'},  # a dry run of what is to be commanded by the action
        {'trajectory_action': True, 'shadow': True},
        {'trajectory_action': True, 'output': 'both'},
        {'guard': False, 'ensemble': 0.0},
    ],
)
def test_settings_that_something_comes_of_are_taken(values):
    assert loop_settings(PolicySettings(**values), frozenset()).lockstep is False


@pytest.mark.parametrize('hold', [True, False])
def test_a_missing_server_is_reported_and_may_hold_the_arm(hold):
    client = Client(ready=False)
    steering = Dependent(Direct(), {'gripper': LatestGoal(client, 'grip', keep=True)}, hold)
    chunk = Chunk(np.tile([0.4, 0, 0.3, 1, 0, 0, 0, 1, 0, -1], (16, 1)), 10**9, 20.0)
    if hold:
        with pytest.raises(ChunkRejected, match='gripper: no action server grip'):
            steering.plan(chunk, 10**9)
    else:
        assert steering.plan(chunk, 10**9).chunk is chunk
    assert steering.values() == {'gripper': 'no action server grip'}
    client.ready = True
    assert steering.plan(chunk, 10**9).chunk is chunk and steering.values() == {'gripper': 'ready'}


def test_a_goal_that_waits_for_a_server_is_dropped_with_what_was_commanded():
    client = Client(ready=False)
    goals = LatestGoal(client, 'grip', keep=True)
    steering = Dependent(Direct(), {'gripper': goals}, hold=False)
    goals.send('close')
    steering.reset()  # disabled, or an operator took over
    client.ready = True
    assert steering.values() == {'gripper': 'ready'} and not client.goals


# --- joint trajectories, from message to motion and back ----------------------------------------------


def motion(start_ns: int = 2_000 * MS) -> JointMotion:
    stamps_ns = [start_ns + k * 100 * MS for k in range(4)]
    positions = ROBOT.home_rad + 0.05 * np.arange(4)[:, None] * np.arange(1, 8) / 7
    return JointMotion(stamps_ns, positions, np.full((4, 7), 0.3))


def test_a_motion_survives_its_message():
    message = joint_trajectory_message(motion(), ROBOT)
    order = np.random.default_rng(0).permutation(7)
    message.joint_names = [ROBOT.joint_names[i] for i in order]
    for point in message.points:
        point.positions = [point.positions[i] for i in order]
    again = joint_motion(message, ROBOT.joint_names, 2_000 * MS)
    assert list(again.stamps_ns) == list(motion().stamps_ns)
    np.testing.assert_array_equal(again.positions_rad, motion().positions_rad)
    np.testing.assert_array_equal(again.velocities_rad_s, motion().velocities_rad_s)


def nan(message: JointTrajectory) -> None:
    message.points[1].positions[2] = float('nan')


def swap(message: JointTrajectory) -> None:
    message.points[0], message.points[1] = message.points[1], message.points[0]


BAD = {
    'not finite': nan,
    'must increase': swap,
    'one position for each joint': lambda m: [p.positions.pop() for p in m.points],
    'inhomogeneous': lambda m: m.points[1].positions.pop(),
    'valid: at least one of': lambda m: m.joint_names.__setitem__(0, 'elbow'),
    '0 points': lambda m: m.points.clear(),
}


class Log(list):
    """Collects warnings."""

    def warning(self, text: str, **_options: object) -> None:
        self.append(text)


@pytest.mark.parametrize('reason', BAD)
def test_the_simulated_arm_refuses_what_no_controller_would_take(reason):
    log = Log()
    commands = Commands(ROBOT, log, lambda: 1_000 * MS)
    message = joint_trajectory_message(motion(), ROBOT)
    BAD[reason](message)
    commands.on_joint_trajectory(message)
    assert commands.refused == 1 and reason in log[0] and commands.received == 0


def test_a_newer_trajectory_replaces_the_older_from_its_own_times_on():
    now = [2_150 * MS]
    commands = Commands(ROBOT, Log(), lambda: now[0])
    commands.on_joint_trajectory(joint_trajectory_message(motion(2_100 * MS), ROBOT))
    forward = Kinematics(ROBOT).forward
    np.testing.assert_allclose(commands.at(2_150 * MS)[0], forward(motion(2_100 * MS).at(2_150 * MS)[0]))
    newer = JointMotion([2_250 * MS, 2_350 * MS], ROBOT.home_rad + np.array([[0.1], [0.2]]))
    commands.on_joint_trajectory(joint_trajectory_message(newer, ROBOT))
    np.testing.assert_allclose(commands.at(2_300 * MS)[0], forward(newer.at(2_300 * MS)[0]))
    # Until then on the way from where it was.
    halfway = (motion(2_100 * MS).at(2_150 * MS)[0] + newer.positions_rad[0]) / 2
    np.testing.assert_allclose(commands.at(2_200 * MS)[0], forward(halfway), atol=1e-9)
    assert commands.covers(2_350 * MS) and not commands.covers(2_351 * MS)
    now[0] = 3_000 * MS
    commands.on_joint_trajectory(joint_trajectory_message(motion(2_100 * MS), ROBOT))
    assert commands.refused == 1  # its end is past


def test_without_a_stamp_it_starts_when_it_arrives():
    commands = Commands(ROBOT, Log(), lambda: 5_000 * MS)
    message = joint_trajectory_message(motion(), ROBOT)
    message.header.stamp = time_message(0)
    commands.on_joint_trajectory(message)
    assert commands.covers(5_300 * MS) and not commands.take_engaged()


class Kind:
    class Goal:
        def __init__(self, trajectory: object = None):
            self.trajectory = trajectory


@pytest.mark.parametrize(('other_commanders', 'gives_way'), [('give_way', True), ('go_on', False)])
def test_the_node_hears_of_a_trajectory_that_was_not_done(
    rclpy_context, tmp_path, monkeypatch, other_commanders, gives_way
):
    """Given up: begin anew. Cancelled by somebody: give way, unless it was told to go on."""
    client, heard = Client(), []
    monkeypatch.setattr(PolicyLoop, 'interrupt', lambda loop, *what: heard.append(what))
    monkeypatch.setattr(joint_output, 'control_action', lambda name: Kind)
    monkeypatch.setattr(LatestGoal, 'to', lambda node, kind, name, keep: LatestGoal(client, name, keep))
    told = {
        'task': str(save_untrained_policy(tmp_path)), 'output': 'joint_trajectory', 'trajectory_action': True,
        'gripper': 'topic', 'other_commanders': other_commanders, 'denoising_steps': 2,
    }  # fmt: skip
    node = PolicyNode(
        context=rclpy_context, parameter_overrides=[Parameter(name, value=v) for name, v in told.items()]
    )
    try:
        assert node.trigger_configure() == TransitionCallbackReturn.SUCCESS
        for status in (GoalStatus.STATUS_ABORTED, GoalStatus.STATUS_CANCELED):
            node.outputs.joints.send(JointMotion([MS], ROBOT.home_rad[None], None))
            client.end(client.answer(len(client.goals) - 1, accepted=True), status)
        given_up, cancelled = heard
        assert given_up[1] is False and given_up[0].endswith('gave the goal up')
        assert cancelled[1] is gives_way and cancelled[0].endswith('~/enable starts again') == gives_way
    finally:
        node.destroy_node()
