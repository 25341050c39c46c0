"""policy_node as a process, with a test that plays the robot: it publishes what it likes and watches the commands."""

import itertools
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml
from geometry_msgs.msg import PoseStamped
from nav_msgs.msg import Path as PathMessage
from numpy.typing import NDArray
from ros_harness import NodeProcess, PolicyPeer, node_process
from rosgraph_msgs.msg import Clock
from sensor_msgs.msg import Image, JointState
from std_msgs.msg import String
from std_srvs.srv import SetBool
from trajectory_msgs.msg import MultiDOFJointTrajectory
from untrained import INSTRUCTION, save_untrained_policy

from decoupled_policy_ros.nodes.common import STATE, floats, image_message, time_message, time_ns
from decoupled_policy_ros.nodes.policy_settings import PolicySettings
from decoupled_policy_ros.observation.messages import pose_from_message
from decoupled_policy_ros.observation.proprioception import Proprioception
from decoupled_policy_ros.policy.checkpoint import load_policy
from decoupled_policy_ros.robot.description import load_robot, robot_file
from decoupled_policy_ros.robot.kinematics import Kinematics
from decoupled_policy_ros.runtime.chunks import Chunk, GripperLatch, interpolate_waypoints
from decoupled_policy_ros.runtime.engine import Engine

pytestmark = [
    pytest.mark.process,
    pytest.mark.unguarded('commands are compared with those of the policy called directly'),
]

PERIOD_NS = 50_000_000
STEPS = 4
SEED = 11
#: Ticks after which an arm that goes where an untrained network says is at rest, from when its camera stops.
BRAKING = 200
ROBOT = load_robot('panda_sim')
CAMERAS = ('agentview', 'wrist')


class FakeRobot(PolicyPeer):
    """A robot and a clock, played by the test. What it shows is a function of the time since `begin`."""

    def __init__(self, namespace: str = '') -> None:
        super().__init__(namespace)
        self.record(MultiDOFJointTrajectory, 'policy_node/trajectory')
        self.record(PathMessage, 'policy_node/path')
        self.joints = self.create_publisher(JointState, 'joint_states', STATE)
        self.images = {name: self.create_publisher(Image, f'{name}/image_raw', STATE) for name in CAMERAS}
        self.clock = self.create_publisher(Clock, '/clock', STATE)
        self.now_ns = self.epoch_ns = 1_000 * 1_000_000_000

    def joint_positions(self, stamp_ns: int) -> NDArray[np.float64]:
        phase = (stamp_ns - self.epoch_ns) * 1e-9
        arm = ROBOT.home_rad + 0.1 * np.sin(phase + np.arange(7))
        return np.append(arm, [0.04, -0.04])

    def image(self, name: str, stamp_ns: int) -> NDArray[np.uint8]:
        seed = [(stamp_ns - self.epoch_ns) // PERIOD_NS, CAMERAS.index(name)]
        return np.random.default_rng(seed).integers(0, 256, (84, 84, 3), dtype=np.uint8)

    def observe(self, skip: tuple[str, ...] = (), shuffled: bool = False, nan: bool = False) -> None:
        """Publish joints and pictures of now, or some of them."""
        if 'joint_states' not in skip:
            order = np.arange(9)
            if shuffled:
                order = np.random.default_rng(self.now_ns // PERIOD_NS).permutation(9)
            positions = self.joint_positions(self.now_ns)
            if nan:
                positions[3] = np.nan
            message = JointState(
                name=[ROBOT.all_joint_names[i] for i in order], position=floats(positions[order])
            )
            message.header.stamp = time_message(self.now_ns)
            self.joints.publish(message)
        for name, publisher in self.images.items():
            if name not in skip:
                publisher.publish(image_message(self.image(name, self.now_ns), f'{name}_frame', self.now_ns))

    def tick(self, **options: object) -> int:
        """Let 50 ms pass: publish what there is to see, then the clock; returns the stamp."""
        self.now_ns += PERIOD_NS
        self.observe(**options)  # type: ignore[arg-type]
        self.clock.publish(Clock(clock=time_message(self.now_ns)))
        return self.now_ns

    def command(self, stamp_ns: int) -> NDArray[np.float64]:
        """The commanded pose for a stamp, waited for."""
        return pose_from_message(self.stamped('target_pose', stamp_ns), ROBOT.base_frame)

    def run(self, ticks: int, **options: object) -> NDArray[np.float64]:
        """Ticks, each followed by its command, as a simulator in lockstep does; returns the poses (ticks, 4, 4)."""
        return np.stack([self.command(self.tick(**options)) for _ in range(ticks)])

    def enable(self, enabled: bool) -> str:
        response = self.call(SetBool, 'policy_node/enable', SetBool.Request(data=enabled))
        assert response.success
        return str(response.message)

    def diagnosed_ns(self) -> int:
        """The node's own time, in its latest diagnostics."""
        return max((time_ns(m.header.stamp) for m in self._received['/diagnostics']), default=0)

    def begin(self, **options: object) -> None:
        """Start the same world once more, with one frame of history behind it."""
        self.enable(False)
        self.forget()
        self.now_ns += 20 * PERIOD_NS  # older frames are too old for the history now
        self.clock.publish(Clock(clock=time_message(self.now_ns)))  # first: frames of the future are refused
        self.wait_for(lambda: self.diagnosed_ns() >= self.now_ns, 'the clock to be seen')
        self.epoch_ns = self.now_ns
        self.tick(**options)
        self.enable(True)


@pytest.fixture(scope='module')
def task_folder(tmp_path_factory) -> Path:
    return save_untrained_policy(tmp_path_factory.mktemp('models'))


@pytest.fixture(scope='module')
def node(tmp_path_factory, task_folder) -> Iterator[NodeProcess]:
    parameters = {
        'use_sim_time': True, 'lockstep': True, 'task': str(task_folder), 'denoising_steps': STEPS, 'seed': SEED,
        'threads': 1, 'guard': False,
    }  # fmt: skip
    log = tmp_path_factory.mktemp('policy_node') / 'policy_node.log'
    with node_process('policy_node', log, parameters) as process:
        yield process
    assert 'Traceback' not in process.output()


@pytest.fixture(scope='module')
def peer() -> Iterator[FakeRobot]:
    peer = FakeRobot()
    yield peer
    peer.close()


@pytest.fixture
def robot(node, peer) -> FakeRobot:
    """The node, active and enabled, with a history of one frame."""
    state = peer.lifecycle_state()
    if state == 'unconfigured':
        assert peer.change_state('configure'), node.output()
        state = 'inactive'
    if state == 'inactive':
        peer.wait_for_subscribers(peer.joints, peer.clock, *peer.images.values())
        assert peer.change_state('activate')
    peer.begin()
    return peer


def expected_poses(robot: FakeRobot, task_folder: Path, first_ns: int, ticks: int) -> NDArray[np.float64]:
    """What the same policy commands when it is called in this process."""
    policy = load_policy(task_folder, ROBOT)
    engine = Engine(policy, STEPS, SEED)
    proprioception = Proprioception(ROBOT, Kinematics(ROBOT))
    poses, chunk = [], None
    for tick in range(ticks):
        now_ns = first_ns + tick * PERIOD_NS
        if chunk is None or now_ns >= chunk.replan_stamp_ns:
            frames = (now_ns - PERIOD_NS, now_ns)
            arrays = {name: np.stack([robot.image(name, t) for t in frames]) for name in CAMERAS}
            arrays['proprioception'] = np.stack([proprioception(robot.joint_positions(t)) for t in frames])
            engine.reset(SEED, now_ns)
            chunk = Chunk(engine(arrays).actions, now_ns, 20.0)
        poses.append(chunk.sample(now_ns)[0])
    return np.stack(poses)


def require_expected(robot: FakeRobot, task_folder: Path, poses: NDArray[np.float64]) -> None:
    """Require that the poses (n, 4, 4) of a fresh start until now are what the policy says of what was shown."""
    first_ns = robot.now_ns - (len(poses) - 1) * PERIOD_NS
    np.testing.assert_allclose(poses, expected_poses(robot, task_folder, first_ns, len(poses)), atol=1e-6)


def test_commands_are_those_of_the_policy_called_directly(robot, task_folder):
    poses = robot.run(20)
    first_ns = robot.now_ns - 19 * PERIOD_NS
    require_expected(robot, task_folder, poses)
    assert len(np.unique(poses.reshape(20, 16), axis=0)) == 20  # it moves: no pose was merely repeated
    # One command for each tick and no other; a chunk each 8 ticks, stamped with its observation.
    assert robot.stamps_ns('target_pose') == [first_ns + i * PERIOD_NS for i in range(20)]
    assert robot.stamps_ns('policy_node/trajectory') == [first_ns + i * PERIOD_NS for i in (0, 8, 16)]
    assert robot.status('following') == 'following'


def test_trajectory_and_path_hold_the_whole_chunk(robot):
    pose = robot.run(4)[-1]
    trajectory = robot.last('policy_node/trajectory')
    assert trajectory.header.frame_id == ROBOT.base_frame
    assert list(trajectory.joint_names) == [ROBOT.ee_frame]
    # 16 waypoints, the first of which lies before the observation.
    assert [time_ns(p.time_from_start) for p in trajectory.points] == [i * PERIOD_NS for i in range(15)]
    translation = trajectory.points[3].transforms[0].translation
    np.testing.assert_allclose([translation.x, translation.y, translation.z], pose[:3, 3], atol=1e-12)
    path = robot.last('policy_node/path')
    start_ns = time_ns(trajectory.header.stamp)
    assert [time_ns(p.header.stamp) for p in path.poses] == [start_ns + i * PERIOD_NS for i in range(15)]
    np.testing.assert_allclose(pose_from_message(path.poses[3], ROBOT.base_frame), pose, atol=1e-12)


def test_gripper_is_commanded_on_edges(robot, task_folder):
    robot.run(20)
    widths = [message.data for message in robot.received('gripper_command')]
    assert set(widths) <= {ROBOT.gripper.open_width_m, ROBOT.gripper.closed_width_m}
    assert all(a != b for a, b in itertools.pairwise(widths))
    engine, latch = Engine(load_policy(task_folder, ROBOT), STEPS, SEED), GripperLatch()
    first_ns = robot.now_ns - 19 * PERIOD_NS
    frames = (first_ns - PERIOD_NS, first_ns)
    arrays = {name: np.stack([robot.image(name, t) for t in frames]) for name in CAMERAS}
    state = Proprioception(ROBOT, Kinematics(ROBOT))
    arrays['proprioception'] = np.stack([state(robot.joint_positions(t)) for t in frames])
    engine.reset(SEED, first_ns)
    latch.update(float(engine(arrays).actions[1, 9]))
    assert widths[0] == (
        ROBOT.gripper.closed_width_m if latch.state == 'closed' else ROBOT.gripper.open_width_m
    )


def test_joints_in_another_order_give_the_same_commands(robot, task_folder):
    robot.begin(shuffled=True)
    require_expected(robot, task_folder, robot.run(10, shuffled=True))


def test_not_enough_observations_is_said_and_commands_nothing(robot):
    robot.begin(skip=('wrist',))
    for _ in range(6):
        robot.tick(skip=('wrist',))
    assert robot.status('waiting', "'wrist': nothing has arrived")
    assert robot.received('target_pose') == []
    robot.tick()  # a first picture: there is no history yet
    first_ns = robot.tick()
    robot.command(first_ns)
    assert robot.stamps_ns('target_pose') == [first_ns]
    assert robot.status('following') == 'following'


@pytest.mark.parametrize('camera', CAMERAS)
def test_a_camera_that_stops_is_held_against_and_recovered_from(robot, camera):
    robot.run(12)
    followed = robot.run(4, skip=(camera,))  # the chunk lasts for 16 ticks
    # The next chunk is due now. The frames in hand age, and after 0.2 s the arm is brought to rest.
    blind = [robot.tick(skip=(camera,)) for _ in range(BRAKING)]
    held = robot.command(blind[-1])
    assert not np.array_equal(held, followed[-1])
    assert robot.status('holding', f"stream '{camera}' is").endswith('now, limit 0.2 s')
    np.testing.assert_array_equal(robot.run(3, skip=(camera,)), [held] * 3)
    values = robot.diagnostics('policy')
    assert int(values['holds']) >= 1
    assert int(values[f'refusals_{camera}']) >= 1
    robot.tick()
    moving = robot.run(7)[-4:]  # until the chunk takes over, as reckoned, the arm stays held
    assert robot.status('following') == 'following'
    assert len(np.unique(moving.reshape(4, 16), axis=0)) == 4


def test_nan_in_joint_states_is_refused_held_against_and_recovered_from(robot):
    robot.run(12)
    followed = robot.run(4, nan=True)
    blind = [robot.tick(nan=True) for _ in range(BRAKING)]
    held = robot.command(blind[-1])
    assert not np.array_equal(held, followed[-1])
    status = robot.status('holding', "stream 'proprioception' is")
    assert "last message refused: joint state has positions that are not finite: {'joint4': nan}" in status
    np.testing.assert_array_equal(robot.run(3, nan=True), [held] * 3)
    streams = robot.diagnostics('streams')
    assert int(streams['proprioception_refused']) >= 7
    assert 'joint4' in streams['proprioception_last_refusal']
    robot.tick()
    robot.run(2)
    assert robot.status('following') == 'following'


def test_a_missing_joint_is_refused_and_named(robot):
    message = JointState(name=list(ROBOT.all_joint_names[:-1]), position=floats(np.zeros(8)))
    message.header.stamp = time_message(robot.now_ns + 1)
    robot.joints.publish(message)
    assert 'lacks finger_joint2' in robot.diagnostics('streams', after=2)['proprioception_last_refusal']
    robot.run(2)  # one bad message among good ones stops nothing


def test_disabled_means_no_command_and_enabled_means_a_fresh_start(robot, task_folder):
    robot.run(10)
    robot.enable(False)
    assert robot.status('disabled') == 'disabled: no commands'
    robot.forget()
    for _ in range(10):
        robot.tick()
    robot.diagnostics('policy', after=2)  # two seconds have passed: whatever was to come has come
    assert robot.received('target_pose') == []
    assert robot.received('gripper_command') == []
    assert robot.received('policy_node/trajectory') == []
    robot.begin()
    require_expected(robot, task_folder, robot.run(10))


def test_deactivate_ends_the_commands_and_activate_brings_them_back(robot, task_folder):
    robot.run(5)
    assert robot.change_state('deactivate')
    assert robot.lifecycle_state() == 'inactive'
    robot.forget()
    for _ in range(10):
        robot.tick()
    assert robot.diagnostics('policy', after=2)['lifecycle'] == 'inactive'
    assert robot.received('target_pose') == []
    assert robot.received('policy_node/trajectory') == []
    refused = robot.call(SetBool, 'policy_node/enable', SetBool.Request(data=True))
    assert not refused.success
    assert 'inactive: activate it first' in refused.message
    assert robot.change_state('activate')
    robot.begin()
    require_expected(robot, task_folder, robot.run(5))


def test_a_clock_that_goes_back_is_a_fresh_start(robot, node, task_folder):
    robot.run(5)
    before_ns = robot.now_ns
    robot.now_ns -= 100 * PERIOD_NS
    robot.epoch_ns = robot.now_ns - PERIOD_NS  # the frame that `begin` shows
    robot.forget()
    robot.clock.publish(Clock(clock=time_message(robot.now_ns)))
    robot.wait_for(lambda: 'the clock went back by 5.000 s' in node.output(), 'the warning')
    begin_ns, robot.now_ns = robot.now_ns, before_ns
    robot.observe()  # what was under way when the clock went back bars nothing that comes after it
    robot.now_ns = begin_ns
    robot.observe()
    require_expected(robot, task_folder, robot.run(5))


def test_another_instruction_is_refused_and_counted(robot):
    publisher = robot.create_publisher(String, 'policy_node/instruction', 10)
    robot.wait_for_subscribers(publisher)
    before = int(robot.diagnostics('policy')['refused_instructions'])
    publisher.publish(String(data=INSTRUCTION))
    publisher.publish(String(data='juggle'))
    values = robot.diagnostics('policy', after=2)
    assert int(values['refused_instructions']) == before + 1
    assert values['instruction'] == INSTRUCTION


def test_parameters_are_refused_while_a_policy_is_loaded(robot):
    success, reason = robot.set_parameter('policy_node', 'denoising_steps', 3)
    assert not success
    assert 'denoising_steps: read by configure, and the node is active' in reason


def test_every_documented_topic_parameter_and_service_is_there(robot):
    def names(pairs: list[tuple[str, list[str]]]) -> dict[str, str]:
        return {name: kinds[0] for name, kinds in pairs}

    published = names(robot.get_publisher_names_and_types_by_node('policy_node', '/'))
    subscribed = names(robot.get_subscriber_names_and_types_by_node('policy_node', '/'))
    services = names(robot.get_service_names_and_types_by_node('policy_node', '/'))
    assert {
        '/target_pose': 'geometry_msgs/msg/PoseStamped',
        '/gripper_command': 'std_msgs/msg/Float64',
        '/policy_node/trajectory': 'trajectory_msgs/msg/MultiDOFJointTrajectory',
        '/policy_node/path': 'nav_msgs/msg/Path',
        '/policy_node/cycles': 'std_msgs/msg/String',
        '/policy_node/status': 'diagnostic_msgs/msg/DiagnosticStatus',
        '/diagnostics': 'diagnostic_msgs/msg/DiagnosticArray',
    }.items() <= published.items()
    assert {
        '/joint_states': 'sensor_msgs/msg/JointState',
        '/agentview/image_raw': 'sensor_msgs/msg/Image',
        '/wrist/image_raw': 'sensor_msgs/msg/Image',
        '/policy_node/instruction': 'std_msgs/msg/String',
    }.items() <= subscribed.items()
    assert services['/policy_node/enable'] == 'std_srvs/srv/SetBool'
    assert services['/policy_node/change_state'] == 'lifecycle_msgs/srv/ChangeState'
    commands = robot.get_publishers_info_by_topic('target_pose')
    assert [(str(c.qos_profile.reliability.name), c.topic_type) for c in commands] == [
        ('RELIABLE', 'geometry_msgs/msg/PoseStamped')
    ]
    described = robot.described_parameters('policy_node')
    assert set(PolicySettings.__dataclass_fields__) <= set(described)
    for name in PolicySettings.__dataclass_fields__:
        assert described[name].description, name
    assert described['control_rate_hz'].floating_point_range[0].to_value == 1000.0
    assert described['autostart'].read_only


def test_diagnostics_name_rates_ages_latencies_and_counters(robot):
    robot.run(10)
    values, streams = robot.diagnostics('policy'), robot.diagnostics('streams')
    for stage in ('sample', 'encode', 'modulate', 'denoise', 'total'):
        assert 0 < float(values[f'latency_{stage}_p50_ms']) <= float(values[f'latency_{stage}_p99_ms'])
    assert int(values['cycles']) >= 2
    assert int(values['commands']) >= 10
    assert {'holds', 'underruns', 'bridged_ticks', 'rejected_chunks'} <= set(values)
    for name in (*CAMERAS, 'proprioception'):
        assert float(streams[f'{name}_rate_hz']) > 0
        assert float(streams[f'{name}_age_s']) == 0.0
        assert float(streams[f'{name}_observed_age_s']) == 0.0


# --- what configure refuses ------------------------------------------------------------------------


@pytest.fixture
def unconfigured(node, peer) -> Iterator[FakeRobot]:
    """The node without a policy; afterwards its parameters are what they were."""
    state = peer.lifecycle_state()
    if state == 'active':
        assert peer.change_state('deactivate')
    if state != 'unconfigured':
        assert peer.change_state('cleanup')
    names = ('robot', 'task', 'backbone', 'instruction', 'cores')
    before = {name: peer.parameter('policy_node', name).string_value for name in names}
    yield peer
    for name, value in before.items():
        assert peer.set_parameter('policy_node', name, value) == (True, '')


def refused(peer: FakeRobot, node: NodeProcess, **parameters: str) -> str:
    """Set parameters, configure in vain, and return what the node logged meanwhile."""
    for name, value in parameters.items():
        assert peer.set_parameter('policy_node', name, value) == (True, '')
    length = len(node.output())
    assert not peer.change_state('configure')
    assert peer.lifecycle_state() == 'unconfigured'
    log = node.output()[length:]
    assert 'Traceback' not in log
    return log


def test_a_policy_for_another_robot_is_refused_with_both_values(unconfigured, node, tmp_path):
    description = yaml.safe_load(robot_file('panda_sim').read_text())
    description['frames']['ee'] = 'other_tool'
    other = tmp_path / 'other_panda.yaml'
    other.write_text(yaml.safe_dump(description))
    log = refused(unconfigured, node, robot=str(other))
    assert 'other_tool' in log
    assert ROBOT.ee_frame in log
    # The node is still good for the right robot.
    assert unconfigured.set_parameter('policy_node', 'robot', 'panda_sim') == (True, '')
    assert unconfigured.change_state('configure')
    assert unconfigured.change_state('cleanup')


@pytest.mark.parametrize('kind', ['task', 'backbone'])
def test_a_truncated_file_is_refused(unconfigured, node, task_folder, tmp_path, kind):
    models = tmp_path / 'models'
    shutil.copytree(task_folder.parent.parent, models)
    weights = models / f'{kind}s' / 'tiny' / f'{kind}.safetensors'
    weights.write_bytes(weights.read_bytes()[:-1000])
    log = refused(unconfigured, node, task=str(models / 'tasks' / 'tiny'))
    assert f'the weights of this {kind} were changed or truncated' in log


def test_a_transition_that_does_not_fit_is_refused(unconfigured, node):
    assert not unconfigured.change_state('deactivate')
    assert unconfigured.lifecycle_state() == 'unconfigured'
    assert "no transition 4 from state 'unconfigured'" in node.output()


def test_an_unknown_robot_or_task_is_refused_with_the_valid_ones(unconfigured, node):
    log = refused(unconfigured, node, robot='pandora')
    assert "'pandora'" in log
    assert 'panda_sim' in log
    assert 'juggling' in refused(unconfigured, node, robot='panda_sim', task='juggling')


def test_cores_that_are_not_there_are_refused_with_the_valid_ones(unconfigured, node):
    log = refused(unconfigured, node, cores='4096')
    assert f'may not run on 4096; valid: {min(os.sched_getaffinity(0))}' in log


def test_an_instruction_that_the_task_was_not_trained_on_is_refused(unconfigured, node):
    log = refused(unconfigured, node, instruction='juggle')
    assert "'juggle'" in log
    assert f"'{INSTRUCTION}'" in log


# --- with a clock that waits for nobody ------------------------------------------------------------


def test_in_real_time_commands_interpolate_the_chunks(tmp_path, task_folder):
    """No simulated time: a robot at 20 Hz, commands at 50 Hz, each on the chunk that was current."""
    parameters = {
        'task': str(task_folder), 'control_rate_hz': 50.0, 'autostart': True, 'denoising_steps': STEPS, 'threads': 1,
        'guard': False,
    }  # fmt: skip
    robot = FakeRobot('live')
    try:
        with node_process('policy_node', tmp_path / 'real_time.log', parameters, 'live') as process:
            robot.status('waiting')

            def show() -> None:
                robot.now_ns = robot.get_clock().now().nanoseconds
                robot.observe()

            timer = robot.create_timer(0.05, show)
            robot.wait_for(lambda: len(robot.received('target_pose')) > 60, 'commands')
            before = len(robot.received('target_pose'))
            said = robot.wait_for(lambda: counted(robot, 'holds'), 'a count of holds')
            holds = int(said[-1])
            assert robot.change_state('deactivate')
            returned_ns = robot.get_clock().now().nanoseconds
            reports = len(robot.received('/diagnostics'))
            robot.wait_for(lambda: len(robot.received('/diagnostics')) > reports + 1, 'a second to pass')
            timer.cancel()
            commands, chunks = robot.received('target_pose'), robot.received('policy_node/trajectory')
            assert 'Traceback' not in process.output()
    finally:
        robot.close()
    stamps_ns = [time_ns(command.header.stamp) for command in commands]
    assert max(stamps_ns) < returned_ns
    assert all(a < b for a, b in itertools.pairwise(stamps_ns))
    on_a_chunk = [min(_distances(command, chunks)) < 1e-9 for command in commands[:before]]
    # On a busy machine a picture may come too late, and the arm slows down to rest; as it does at the end.
    assert all(on_a_chunk) or (holds and sum(on_a_chunk) > 20)


def counted(robot: FakeRobot, name: str) -> list[str]:
    """A value of ~/status, as often as it was said."""
    said = robot.received('policy_node/status')
    return [pair.value for message in said for pair in message.values if pair.key == name]


def _distances(command: PoseStamped, chunks: list[MultiDOFJointTrajectory]) -> list[float]:
    """Distance (m) of a command from each chunk at the command's stamp; infinite outside a chunk."""
    stamp_ns, pose = time_ns(command.header.stamp), pose_from_message(command, ROBOT.base_frame)
    distances = [np.inf]
    for chunk in chunks:
        start_ns = time_ns(chunk.header.stamp)
        stamps_ns = [start_ns + time_ns(point.time_from_start) for point in chunk.points]
        if stamps_ns[0] <= stamp_ns <= stamps_ns[-1]:
            waypoints = np.tile(np.eye(4), (len(stamps_ns), 1, 1))
            translations = [point.transforms[0].translation for point in chunk.points]
            waypoints[:, :3, 3] = [(t.x, t.y, t.z) for t in translations]
            at = interpolate_waypoints(stamps_ns, waypoints, stamp_ns)
            distances.append(float(np.linalg.norm(at[:3, 3] - pose[:3, 3])))
    return distances
