"""Teleoperation without ROS: the target and its limits, devices, clutch and gripper."""

import copy
from collections.abc import Callable

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from decoupled_policy_ros.errors import ConfigError, MessageError
from decoupled_policy_ros.resources import find
from decoupled_policy_ros.robot.description import load_robot
from decoupled_policy_ros.robot.poses import pose_from_position_rotation
from decoupled_policy_ros.teleop.devices import AxesDevice, LeaderDevice
from decoupled_policy_ros.teleop.gripper import standing_command
from decoupled_policy_ros.teleop.integrator import MAX_STEP_S, MotionLimits, TargetIntegrator
from decoupled_policy_ros.teleop.mapping import Mapping, load_mapping, read_mapping
from decoupled_policy_ros.teleop.teleoperator import ArmState, Teleoperator

MS = 1_000_000
TICK_NS = 20 * MS
ROBOT = load_robot('panda_sim')
LIMITS = MotionLimits(
    lower_m=np.array([0.25, -0.45, 0.0]),  # the floor is 0.0 and nothing else
    upper_m=np.array([0.80, 0.45, 0.60]),
    linear_m_s=0.3,
    angular_rad_s=0.8,
    linear_m_s2=1.0,
    angular_rad_s2=4.0,
    lead_m=0.1,
    lead_rad=0.5,
)
DOWN = np.diag([1.0, -1.0, -1.0])
CENTRE = pose_from_position_rotation([0.5, 0.0, 0.2], DOWN)

velocities = st.floats(-5.0, 5.0, allow_nan=False)
twists = st.lists(velocities, min_size=6, max_size=6)
steps = st.lists(st.tuples(twists, st.sampled_from([0.001, 0.01, 0.02, 0.05, 0.1])), min_size=1, max_size=60)


def turned(angle_rad: float, axis: str = 'z') -> np.ndarray:
    return Rotation.from_euler(axis, angle_rad).as_matrix()


def angle_between(a: np.ndarray, b: np.ndarray) -> float:
    return float(Rotation.from_matrix(a[:3, :3] @ b[:3, :3].T).magnitude())


def velocity_between(before: np.ndarray, after: np.ndarray, dt_s: float) -> tuple[np.ndarray, np.ndarray]:
    """Linear and angular velocity that lead from one pose to the next."""
    turn = Rotation.from_matrix(after[:3, :3] @ before[:3, :3].T).as_rotvec()
    return (after[:3, 3] - before[:3, 3]) / dt_s, turn / dt_s


class TestTarget:
    @given(
        steps=steps,
        start=st.tuples(st.floats(0.25, 0.8), st.floats(-0.45, 0.45), st.floats(0.0, 0.6)),
        follow=st.floats(0.0, 1.0),
        shake=st.floats(0.0, 0.3),
    )
    @settings(max_examples=100, deadline=None)
    def test_never_outside_the_box_nor_above_any_limit_whatever_is_asked(self, steps, start, follow, shake):
        target = TargetIntegrator(LIMITS)
        measured = pose_from_position_rotation(start, DOWN)
        target.start(measured)
        pose, linear, angular = target.pose, np.zeros(3), np.zeros(3)
        random = np.random.default_rng(0)
        for twist, dt in steps:
            after = target.step(dt, twist, measured)
            assert np.all(after[:3, 3] >= LIMITS.lower_m) and np.all(after[:3, 3] <= LIMITS.upper_m)
            v, w = velocity_between(pose, after, dt)
            assert np.linalg.norm(v) <= LIMITS.linear_m_s * (1 + 1e-6)
            assert np.linalg.norm(w) <= LIMITS.angular_rad_s * (1 + 1e-6)
            assert np.linalg.norm(v - linear) <= LIMITS.linear_m_s2 * dt + 1e-9
            assert np.linalg.norm(w - angular) <= LIMITS.angular_rad_s2 * dt + 1e-9
            np.testing.assert_allclose(after[:3, :3] @ after[:3, :3].T, np.eye(3), atol=1e-9)
            pose, linear, angular = after, v, w
            # An arm that follows more or less, and is pushed about.
            measured = measured.copy()
            measured[:3, 3] += follow * (after[:3, 3] - measured[:3, 3]) + shake * random.normal(size=3)

    @given(steps=steps)
    @settings(max_examples=100, deadline=None)
    def test_does_not_run_away_from_an_arm_that_is_blocked(self, steps):
        target = TargetIntegrator(LIMITS)
        target.start(CENTRE)
        for twist, dt in steps:
            pose = target.step(dt, twist, CENTRE)
            assert np.all(np.abs(pose[:3, 3] - CENTRE[:3, 3]) <= LIMITS.lead_m + 1e-9)
            # Turning about one axis while ahead about another leaves the bound a little before it is noticed.
            assert angle_between(pose, CENTRE) <= 1.1 * LIMITS.lead_rad

    @given(steps=steps, dt=st.sampled_from([0.005, 0.02, 0.05]))
    @settings(max_examples=80, deadline=None)
    def test_stops_within_the_acceleration_limit(self, steps, dt):
        target = TargetIntegrator(LIMITS)
        target.start(CENTRE)
        for twist, step_s in steps:
            measured = target.step(step_s, twist, target.pose)
        slowest_s = max(
            np.linalg.norm(target.linear_m_s) / LIMITS.linear_m_s2,
            np.linalg.norm(target.angular_rad_s) / LIMITS.angular_rad_s2,
        )
        for _ in range(int(np.ceil(slowest_s / dt + 1e-6))):
            target.step(dt, np.zeros(6), measured)
        assert target.at_rest
        held = target.pose
        np.testing.assert_array_equal(target.step(dt, np.zeros(6), measured), held)

    def test_reaches_the_box_and_its_speed(self):
        """The limits are used, not just kept: down to the very floor, at full speed in between."""
        target = TargetIntegrator(LIMITS)
        target.start(CENTRE)
        speeds = []
        for _ in range(400):
            target.step(0.02, [0, 0, -1.0, 0, 0, 0], target.pose)
            speeds.append(-target.linear_m_s[2])
        assert max(speeds) == pytest.approx(LIMITS.linear_m_s)
        assert target.pose[2, 3] == pytest.approx(0.0, abs=1e-4)
        assert target.bounded == {'workspace'}

    def test_slides_along_a_wall(self):
        target = TargetIntegrator(LIMITS)
        target.start(pose_from_position_rotation([0.5, 0.0, 0.0], DOWN))
        for _ in range(100):
            target.step(0.02, [0.1, 0, -0.2, 0, 0, 0], target.pose)
        assert target.linear_m_s[0] == pytest.approx(0.1)
        assert target.pose[2, 3] == 0.0

    def test_a_late_step_does_not_leap(self):
        target = TargetIntegrator(LIMITS)
        target.start(CENTRE)
        for _ in range(50):
            target.step(0.02, [0.3, 0, 0, 0, 0, 0], target.pose)
        before = target.pose
        after = target.step(5.0, [0.3, 0, 0, 0, 0, 0], target.pose)
        assert np.linalg.norm(after[:3, 3] - before[:3, 3]) <= 0.3 * MAX_STEP_S + 1e-9
        np.testing.assert_array_equal(target.step(0.0, [0.3, 0, 0, 0, 0, 0], target.pose), after)

    def test_outside_the_box_only_the_way_back_is_free(self):
        target = TargetIntegrator(LIMITS)
        outside = pose_from_position_rotation([0.5, 0.0, -0.05], DOWN)
        target.start(outside)
        assert target.outside_m() == pytest.approx(0.05)
        for _ in range(50):
            assert target.step(0.02, [0, 0, -0.2, 0, 0, 0], target.pose)[2, 3] == -0.05
        heights = [target.step(0.02, [0, 0, 0.2, 0, 0, 0], target.pose)[2, 3] for _ in range(50)]
        assert np.all(np.diff(heights) > 0) and heights[-1] > 0.05
        assert target.outside_m() == 0.0

    @given(
        goal=st.tuples(st.floats(0.3, 0.75), st.floats(-0.4, 0.4), st.floats(0.05, 0.55)),
        angle=st.floats(-1.5, 1.5),
    )
    @settings(max_examples=20, deadline=None)
    def test_goes_to_a_goal_and_stops_there(self, goal, angle):
        target = TargetIntegrator(LIMITS)
        target.start(CENTRE)
        goal_pose = pose_from_position_rotation(goal, turned(angle) @ DOWN)
        far_m = np.linalg.norm(goal_pose[:3, 3] - CENTRE[:3, 3])
        for _ in range(250):
            pose = target.step_towards(0.02, goal_pose, target.pose)
            distance_m = np.linalg.norm(goal_pose[:3, 3] - pose[:3, 3])
            assert distance_m <= far_m + 1e-9  # straight there, never past it
            far_m = distance_m
        np.testing.assert_allclose(pose, goal_pose, atol=1e-3)

    @pytest.mark.parametrize('twist', [[np.nan] * 6, [np.inf, 0, 0, 0, 0, 0], [0.0] * 5])
    def test_refuses_what_is_no_twist(self, twist):
        target = TargetIntegrator(LIMITS)
        target.start(CENTRE)
        with pytest.raises(ValueError, match='six finite numbers'):
            target.step(0.02, twist, CENTRE)
        np.testing.assert_array_equal(target.pose, CENTRE)

    def test_the_smaller_of_robot_and_device_limits(self):
        def limits(fraction, speeds):
            return MotionLimits.of(ROBOT, fraction, speeds, (1.0, 4.0), (0.1, 0.5))

        assert limits(0.5, (9.0, 9.0)).linear_m_s == pytest.approx(0.85)
        assert limits(0.5, (0.2, 0.6)).linear_m_s == 0.2
        assert limits(0.1, (0.2, 0.6)).angular_rad_s == pytest.approx(0.25)
        np.testing.assert_array_equal(limits(1.0, (1, 1)).lower_m, ROBOT.limits.workspace_m[0])
        with pytest.raises(ConfigError, match=r'\(0, 1\], got 1.5'):
            limits(1.5, (1, 1))
        with pytest.raises(ConfigError, match='linear_m_s must be a positive number, got 0'):
            limits(0.5, (0.0, 1.0))


# --- devices ------------------------------------------------------------------------------------


def values_of(name: str) -> dict:
    return yaml.safe_load((find('config/teleop') / f'{name}.yaml').read_text())


def changed(name: str, change: Callable[[dict], object]) -> Mapping:
    values = copy.deepcopy(values_of(name))
    change(values)
    return read_mapping(values, f'{name}.yaml')


class Pad:
    """A gamepad's messages, and the teleoperator behind it; time goes on tick by tick."""

    def __init__(self, mapping: Mapping | None = None, measured: np.ndarray = CENTRE):
        self.mapping = mapping or load_mapping('', 'joy')
        self.device = AxesDevice(self.mapping, timeout_s=0.3)
        self.teleop = Teleoperator(self.device, LIMITS, 0.3, lambda: 'nothing on joint_states')
        self.measured, self.gripper = measured, -1.0
        self.now_ns = 10**9
        self.commands = []

    def message(self, axes: dict | None = None, buttons: tuple = ()) -> None:
        values = np.zeros(8)
        values[[2, 5]] = 1.0
        for i, value in (axes or {}).items():
            values[i] = value
        self.device.on_joy(values, [int(i in buttons) for i in range(11)], self.now_ns)

    def tick(self, count: int = 1, axes: dict | None = None, buttons: tuple | None = ()):
        """Ticks with a message each; none with buttons=None. Returns the last command."""
        command = None
        for _ in range(count):
            self.now_ns += TICK_NS
            if buttons is not None:
                self.message(axes, buttons)
            arm = ArmState(self.now_ns, self.measured, self.gripper)
            command = self.teleop.tick(self.now_ns, arm)
            if command is not None:
                self.commands.append(command)
                self.measured = command.pose_base_ee
        return command


DEADMAN, GRIP, SLOW = 5, 0, 4
FORWARD = {1: 1.0}


class TestOperator:
    def test_begins_at_the_measured_pose_once_the_deadman_is_pressed(self):
        pad = Pad()
        assert pad.tick(5, FORWARD) is None  # no deadman, no command
        assert pad.teleop.state == 'ready'
        first = pad.tick(1, FORWARD, (DEADMAN,))
        np.testing.assert_array_equal(first.pose_base_ee, CENTRE)
        assert first.gripper == -1.0  # what the gripper does already
        pad.tick(30, FORWARD, (DEADMAN,))
        assert pad.teleop.integrator.linear_m_s[0] == pytest.approx(0.2)
        assert pad.teleop.state == 'moving'

    def test_a_deadman_that_was_never_seen_released_does_not_count(self):
        pad = Pad()
        assert pad.tick(5, FORWARD, (DEADMAN,)) is None
        assert pad.teleop.reason == 'release the deadman first'
        pad.tick()
        assert pad.tick(1, FORWARD, (DEADMAN,)) is not None

    @pytest.mark.parametrize(('buttons', 'reason'), [((), 'deadman released'), (None, 'joy is silent for')])
    def test_released_or_silent_stops_and_goes_on_commanding(self, buttons, reason):
        pad = Pad()
        pad.tick()
        pad.tick(50, FORWARD, (DEADMAN,))
        commands = len(pad.commands)
        pad.tick(40, FORWARD, buttons)
        assert len(pad.commands) == commands + 40
        assert pad.teleop.state == 'holding' and reason in pad.teleop.reason
        stopped_m = np.diff([command.pose_base_ee[0, 3] for command in pad.commands[-10:]])
        np.testing.assert_array_equal(stopped_m, 0.0)
        # It goes on where it stands.
        before = pad.commands[-1].pose_base_ee
        np.testing.assert_allclose(pad.tick(1, {}, (DEADMAN,)).pose_base_ee, before)

    def test_nothing_is_commanded_without_the_state_of_the_arm(self):
        pad = Pad()
        pad.tick()
        pad.now_ns += TICK_NS
        assert pad.teleop.tick(pad.now_ns, None) is None
        assert pad.teleop.reason == 'nothing on joint_states'
        old = ArmState(pad.now_ns - 400 * MS, CENTRE, None)
        assert pad.teleop.tick(pad.now_ns + 1, old) is None
        assert "the arm's state is 0.40 s old, limit 0.3 s" in pad.teleop.reason

    def test_after_a_gap_in_the_state_it_starts_anew_where_the_arm_is(self):
        pad = Pad()
        pad.tick()
        pad.tick(50, FORWARD, (DEADMAN,))
        # A simulator's reset: both clocks leap, and the arm is somewhere else.
        pad.now_ns += 500 * MS
        pad.measured = pose_from_position_rotation([0.3, 0.3, 0.3], DOWN)
        assert pad.tick(1, FORWARD, (DEADMAN,)) is None
        assert "the arm's state was gone for 0.52 s" in pad.teleop.reason
        assert pad.tick(5, FORWARD, (DEADMAN,)) is None  # held all the time
        pad.tick()
        np.testing.assert_array_equal(pad.tick(1, FORWARD, (DEADMAN,)).pose_base_ee[:3, 3], [0.3, 0.3, 0.3])

    def test_disabled_means_no_commands_once_the_target_has_come_to_rest(self):
        pad = Pad()
        pad.tick()
        pad.tick(10, FORWARD, (DEADMAN,))
        moved_m_s = pad.teleop.integrator.linear_m_s[0]
        pad.teleop.enable(True)  # as it is
        assert (
            pad.tick(1, FORWARD, (DEADMAN,)) is not None and pad.teleop.integrator.linear_m_s[0] > moved_m_s
        )
        pad.teleop.enable(False)
        assert (pad.teleop.state, pad.teleop.reason) == ('holding', 'coming to rest')
        poses = [pad.tick(1, FORWARD, (DEADMAN,)) for _ in range(40)]
        positions_m = np.array([command.pose_base_ee[:3, 3] for command in poses if command is not None])
        assert poses[-1] is None and pad.teleop.state == 'disabled'
        changes_m_s2 = np.diff(positions_m, 2, axis=0) / 0.02**2
        assert np.linalg.norm(changes_m_s2, axis=1).max() <= pad.teleop.integrator.limits.linear_m_s2 * 1.001
        pad.teleop.enable(False)
        assert pad.teleop.state == 'disabled'
        pad.teleop.enable(True)
        assert pad.tick(5, FORWARD, (DEADMAN,)) is None
        pad.tick()
        assert pad.tick(1, FORWARD, (DEADMAN,)) is not None

    def test_slow_and_tool_frame(self):
        pad = Pad(changed('gamepad', lambda values: values.update(frame='tool')))
        pad.tick()
        pad.tick(60, {4: 1.0}, (DEADMAN, SLOW))  # up in the tool's frame is down
        np.testing.assert_allclose(pad.teleop.integrator.linear_m_s, [0, 0, -0.06], atol=1e-12)

    @given(
        stream=st.lists(
            st.tuples(
                st.lists(st.floats(-1.0, 1.0), min_size=8, max_size=8),
                st.booleans(),
                st.integers(1, 30),
            ),
            min_size=1,
            max_size=15,
        )
    )
    @settings(max_examples=30, deadline=None)
    def test_no_stream_of_messages_makes_a_jump(self, stream):
        pad = Pad()
        pad.tick()
        for axes, held, count in stream:
            pad.tick(count, dict(enumerate(axes)), (DEADMAN,) if held else ())
        path = np.array([command.pose_base_ee[:3, 3] for command in pad.commands])
        if len(path) > 2:
            velocity = np.diff(path, axis=0, prepend=path[:1]) / 0.02
            change = np.linalg.norm(np.diff(velocity, axis=0), axis=1)
            assert change.max() <= LIMITS.linear_m_s2 * 0.02 + 1e-9
            assert np.linalg.norm(velocity, axis=1).max() <= 0.2 * np.sqrt(3) + 1e-9

    def test_episode_buttons_work_without_the_deadman_and_once_per_press(self):
        pad = Pad()
        pad.tick(1, None, (7,))  # held in the first message: nobody saw it pressed
        pad.tick()
        pad.tick(10, None, (7,))
        pad.tick()
        pad.tick(1, None, (3, DEADMAN))
        assert list(pad.device.pressed) == ['start', 'keep_success']

    @pytest.mark.parametrize(
        ('axes', 'buttons', 'reason'),
        [
            ([0.0] * 6, [0] * 11, 'Joy message has 6 axes, gamepad.yaml needs at least 8'),
            ([0.0] * 8, [0] * 4, 'Joy message has 4 buttons, gamepad.yaml needs at least 11'),
            ([0.0, np.nan, *[0.0] * 6], [0] * 11, 'axes must be finite, number 1 is nan'),
            ([*[0.0] * 7, -np.inf], [0] * 11, 'axes must be finite, number 7 is -inf'),
        ],
    )
    def test_a_message_that_is_none_is_refused_and_counts_as_silence(self, axes, buttons, reason):
        pad = Pad()
        pad.tick()
        pad.tick(10, FORWARD, (DEADMAN,))
        for _ in range(30):
            with pytest.raises(MessageError, match=reason):
                pad.device.on_joy(axes, buttons, pad.now_ns)
            pad.tick(1, None, None)
        assert pad.teleop.state == 'holding' and 'joy is silent' in pad.teleop.reason

    def test_a_deflection_is_a_deadman_of_its_own(self):
        device = AxesDevice(load_mapping('spacemouse_twist', 'twist'), 0.3)
        teleop = Teleoperator(device, LIMITS, 0.3, str)
        now_ns = 10**9

        def state(count, twist=None):
            nonlocal now_ns
            for _ in range(count):
                now_ns += TICK_NS
                if twist is not None:
                    device.on_twist(twist, now_ns)
                teleop.tick(now_ns, ArmState(now_ns, CENTRE, None))
            return teleop.state, teleop.silent

        assert state(1, [0.05] * 6) == ('ready', False)  # within the dead bands
        assert state(5, [0, 0, 0.5, 0, 0, 0]) == ('moving', False)
        assert state(5, [0.0] * 6) == ('holding', False)
        # A cap at rest may say nothing at all, and that is no trouble; one that says nothing while pushed is.
        assert state(50) == ('holding', False)
        assert state(1, [0.5] * 6) == ('moving', False)
        assert state(50) == ('holding', True)
        with pytest.raises(MessageError, match='a twist has 6 values, got 5'):
            device.on_twist([0.0] * 5, 1)

    def test_buttons_that_a_message_does_not_hold_are_as_they_were(self):
        """Messages as of spacenav: six axes, and a button only in the message of its press or release."""
        device = AxesDevice(load_mapping('spacemouse', 'joy'), 0.3)
        for buttons in ([], [1], [], [], [0], [], [0, 1], [], [0, 0], []):
            device.on_joy([0.0] * 6, buttons, TICK_NS)
        assert list(device.pressed) == ['start_or_keep']
        assert device.gripper.take() == 1.0  # pressed once, however long it was held
        with pytest.raises(MessageError, match='Joy message has 3 axes'):
            device.on_joy([0.0] * 3, [], TICK_NS)


class TestGripper:
    def gripper_values(self, pad: Pad) -> list[float]:
        return [command.gripper for command in pad.commands if command.gripper is not None]

    def test_toggle_is_an_edge_under_the_deadman(self):
        pad = Pad()
        pad.tick(1, None, (GRIP,))
        pad.tick()
        for buttons in (
            (DEADMAN,),
            (DEADMAN, GRIP),
            (DEADMAN, GRIP),
            (DEADMAN,),
            (GRIP,),
            (),
            (DEADMAN, GRIP),
        ):
            pad.tick(3, None, buttons)
        assert self.gripper_values(pad) == [-1.0, 1.0, -1.0]

    def test_a_hand_that_holds_something_goes_on_holding_it(self):
        pad = Pad()
        pad.gripper = 0.2  # fingers around a cube
        pad.tick()
        assert pad.tick(1, None, (DEADMAN,)).gripper == 1.0
        assert standing_command(-1.0) == standing_command(-0.85) == -1.0
        pad.tick(1, None, (DEADMAN, GRIP))
        assert self.gripper_values(pad) == [1.0, -1.0]

    def test_hold_moves_on_press_and_release_only(self):
        pad = Pad(changed('gamepad', lambda v: v.update(gripper={'mode': 'hold', 'press': {'button': 0}})))
        pad.tick()
        pad.tick(1, None, (DEADMAN,))
        pad.tick(2, None, (DEADMAN, GRIP))
        # Let go of everything, and take the deadman again: the gripper stays as it was.
        pad.tick(2)
        pad.tick(2, None, (DEADMAN,))
        assert self.gripper_values(pad) == [-1.0, 1.0]
        pad.tick(2, None, (DEADMAN, GRIP))
        pad.tick(2, None, (DEADMAN,))
        assert self.gripper_values(pad) == [-1.0, 1.0, -1.0]

    def test_an_axis_moves_it_in_steps(self):
        gripper = {'mode': 'axis', 'axis': 5, 'open_value': 1.0, 'closed_value': -1.0, 'resolution': 0.1}
        pad = Pad(changed('gamepad', lambda values: values.update(gripper=gripper)))
        pad.tick(2, {5: 0.0})  # a trigger that was never moved
        pad.tick(2, {5: 0.0}, (DEADMAN,))
        for value in np.linspace(1.0, -1.0, 101):
            pad.tick(1, {5: value}, (DEADMAN,))
        values = self.gripper_values(pad)
        assert values[0] == -1.0 and values[-1] == 1.0
        assert 10 <= len(values) <= 12
        assert np.all(np.diff(values) > 0)

    def test_one_button_opens_and_one_closes(self):
        both = {'mode': 'buttons', 'open': {'button': 1}, 'close': {'button': 0}}

        def change(values):
            values.update(gripper=both, episode={})

        pad = Pad(changed('gamepad', change))
        pad.tick()
        for button in (0, 0, 1, 1, 0):
            pad.tick(1, None, (DEADMAN,))
            pad.tick(1, None, (DEADMAN, button))
        assert self.gripper_values(pad) == [-1.0, 1.0, -1.0, 1.0]


class Leader:
    """A leader pose with a clutch, and the teleoperator behind it."""

    def __init__(self, mapping: Mapping | None = None):
        self.device = LeaderDevice(mapping or load_mapping('', 'leader_pose'), timeout_s=0.3)
        self.teleop = Teleoperator(self.device, LIMITS, 0.3, str)
        self.measured = CENTRE
        self.now_ns = 10**9
        self.path = []

    def tick(self, pose: np.ndarray, clutch: bool, count: int = 1):
        command = None
        for _ in range(count):
            self.now_ns += TICK_NS
            self.device.on_buttons([], [int(clutch), *[0] * 6], self.now_ns)
            self.device.on_pose(pose, self.now_ns, self.now_ns)
            command = self.teleop.tick(self.now_ns, ArmState(self.now_ns, self.measured, -1.0))
            if command is not None:
                self.measured = command.pose_base_ee
                self.path.append(command.pose_base_ee)
        return command


def leader_mapping(**leader) -> Mapping:
    frame = leader.pop('frame', 'base')
    return changed(
        'leader_pose', lambda values: (values.update(frame=frame), values['leader'].update(leader))
    )


class TestLeader:
    ORIGIN = pose_from_position_rotation([3.0, -2.0, 1.0], turned(0.7, 'x'))

    def moved(self, by_m, angle=0.0, axis='z'):
        return pose_from_position_rotation(
            self.ORIGIN[:3, 3] + by_m, turned(angle, axis) @ self.ORIGIN[:3, :3]
        )

    def test_repeats_the_motion_since_the_clutch_took_hold(self):
        leader = Leader()
        leader.tick(self.ORIGIN, False)
        np.testing.assert_array_equal(leader.tick(self.ORIGIN, True).pose_base_ee, CENTRE)
        for share in np.linspace(0, 1, 50):
            leader.tick(self.moved(share * np.array([0.1, -0.05, 0.08]), share * 0.4), True)
        pose = leader.tick(leader.device._pose, True, 100).pose_base_ee
        np.testing.assert_allclose(pose[:3, 3], CENTRE[:3, 3] + [0.1, -0.05, 0.08], atol=1e-4)
        np.testing.assert_allclose(pose[:3, :3], turned(0.4) @ DOWN, atol=1e-3)

    def test_scale_and_alignment(self):
        quarter = [0.0, 0.0, np.sqrt(0.5), np.sqrt(0.5)]  # the leader's x is the base's y
        leader = Leader(leader_mapping(scale=0.5, rotation_scale=0.0, alignment_quat_xyzw=quarter))
        leader.tick(self.ORIGIN, False)
        leader.tick(self.ORIGIN, True)
        for share in np.linspace(0, 1, 50):
            leader.tick(self.moved(share * np.array([0.2, 0.0, 0.0]), share), True)
        pose = leader.tick(leader.device._pose, True, 100).pose_base_ee
        np.testing.assert_allclose(pose[:3, 3], CENTRE[:3, 3] + [0.0, 0.1, 0.0], atol=1e-4)
        np.testing.assert_allclose(pose[:3, :3], DOWN, atol=1e-9)

    def test_in_the_tool_frame_its_own_axes_count(self):
        leader = Leader(leader_mapping(frame='tool'))
        leader.tick(self.ORIGIN, False)
        leader.tick(self.ORIGIN, True)
        along_own_z = 0.1 * self.ORIGIN[:3, 2]
        for share in np.linspace(0, 1, 50):
            leader.tick(self.moved(share * along_own_z), True)
        pose = leader.tick(leader.device._pose, True, 100).pose_base_ee
        np.testing.assert_allclose(pose[:3, 3], CENTRE[:3, 3] + [0.0, 0.0, -0.1], atol=1e-4)

    @given(
        holds=st.lists(
            st.tuples(
                st.booleans(),
                st.tuples(*[st.floats(-0.03, 0.03)] * 3),
                st.floats(-0.15, 0.15),
                st.integers(1, 12),
            ),
            min_size=2,
            max_size=20,
        )
    )
    @settings(max_examples=30, deadline=None)
    def test_taking_hold_anew_never_jumps(self, holds):
        leader, pose = Leader(), self.ORIGIN
        leader.tick(pose, False)
        for clutch, step_m, turn, count in holds:
            for _ in range(count):
                pose = pose_from_position_rotation(pose[:3, 3] + step_m, turned(turn) @ pose[:3, :3])
                leader.tick(pose, clutch)
        for before, after in zip(leader.path, leader.path[1:], strict=False):
            v, w = velocity_between(before, after, 0.02)
            assert np.linalg.norm(v) <= LIMITS.linear_m_s + 1e-6
            assert np.linalg.norm(w) <= LIMITS.angular_rad_s + 1e-6

    def test_carrying_the_leader_back_moves_nothing(self):
        leader = Leader()
        leader.tick(self.ORIGIN, False)
        leader.tick(self.ORIGIN, True)
        leader.tick(self.moved([0.02, 0, 0]), True, 50)
        held = leader.tick(self.moved([0.02, 0, 0]), False, 20).pose_base_ee
        leader.tick(self.moved([0.0, 0.03, 0]), False, 5)
        np.testing.assert_allclose(
            leader.tick(self.moved([0.0, 0.03, 0]), True, 20).pose_base_ee, held, atol=1e-9
        )

    @pytest.mark.parametrize(
        ('by_m', 'angle', 'reason'),
        [
            ([0.3, 0, 0], 0.0, 'leader jumped 0.300 m in 0.020 s, limit 2.5 m/s'),
            ([0, 0, 0], 1.5, 'leader jumped 1.50 rad in 0.020 s, limit 10 rad/s'),
        ],
    )
    def test_a_jump_is_refused_and_moves_nothing(self, by_m, angle, reason):
        leader = Leader()
        leader.tick(self.ORIGIN, False)
        before = leader.tick(self.ORIGIN, True, 10).pose_base_ee
        with pytest.raises(MessageError, match=reason):
            leader.tick(self.moved(by_m, angle), True)
        assert leader.device.jumps == 1
        after = leader.tick(self.moved(by_m, angle), True, 20).pose_base_ee
        np.testing.assert_allclose(after, before, atol=1e-9)
        with pytest.raises(MessageError, match='jumped'):
            leader.tick(self.ORIGIN, True)
        np.testing.assert_allclose(leader.tick(self.ORIGIN, True, 20).pose_base_ee, before, atol=1e-9)

    def test_stamps_must_increase_and_poses_be_finite(self):
        leader = Leader()
        leader.tick(self.ORIGIN, False)
        with pytest.raises(MessageError, match='before the last one'):
            leader.device.on_pose(self.ORIGIN, leader.now_ns - MS, leader.now_ns)
        with pytest.raises(MessageError, match='not finite'):
            leader.device.on_pose(np.full((4, 4), np.nan), leader.now_ns + MS, leader.now_ns)

    def test_a_clutch_with_a_topic_of_its_own_must_be_repeated(self):
        def change(values):
            for key in ('buttons_topic', 'layout', 'gripper', 'episode'):
                del values[key]
            values['deadman'] = 'topic'

        device = LeaderDevice(changed('leader_pose', change), 0.3)
        device.on_pose(self.ORIGIN, 1, 0)
        assert device.intent(0, CENTRE).reason == 'nothing on ~/deadman yet'
        device.on_deadman(True, 0)
        assert device.intent(0, CENTRE).engaged
        device.on_pose(self.ORIGIN, 2, 400 * MS)
        assert device.intent(400 * MS, CENTRE).reason == '~/deadman is silent for 0.4 s'
