"""From messages to frames: what is sampled when, where a recording is cut, and what is counted."""

from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from bag_files import (
    GRIPPER,
    IMAGES,
    JOINTS,
    MS,
    ROBOT,
    SIZE,
    START_NS,
    TARGET,
    Arm,
    joint_positions,
    joints,
    kind,
    pixels,
    target_pose,
    write_bag,
)

from decoupled_policy_ros.data.bags.reader import Bag
from decoupled_policy_ros.data.conversion.streams import LAG_S, Frame, Gap, Resampler
from decoupled_policy_ros.errors import DatasetError
from decoupled_policy_ros.observation.contract import ObservationContract, StreamSpec
from decoupled_policy_ros.observation.proprioception import Proprioception
from decoupled_policy_ros.robot.kinematics import Kinematics

PROPRIOCEPTION = StreamSpec('proprioception', 'proprioception', (9,), 0.2)
CONTRACT = ObservationContract(
    20.0, 2, (*(StreamSpec(name, 'image', (*SIZE, 3), 0.2) for name in IMAGES), PROPRIOCEPTION), 0.1
)


def resampled(
    path: Path, contract: ObservationContract = CONTRACT, **options
) -> tuple[list[Frame], list[Gap], Resampler]:
    """All frames and all gaps of a recording, and what made them."""
    options = {'robot': ROBOT, 'commanded': True, 'max_command_age_s': 0.5, **options}
    results = []
    with Bag(path) as bag:
        resampler = Resampler(bag, contract=contract, **options)
        for message in bag.messages(resampler.intake.topics):
            resampler.take(message)
            results += resampler.ready()
        results += resampler.finish()
    frames = [result for result in results if isinstance(result, Frame)]
    return frames, [result for result in results if isinstance(result, Gap)], resampler


def latest(stamp_ns: int, rate_hz: float) -> int:
    """Stamp of the latest sample at or before a time of a stream at a rate."""
    k = int((stamp_ns - START_NS) * 1e-9 * rate_hz) + 1
    while START_NS + round(k * 1e9 / rate_hz) > stamp_ns:
        k -= 1
    return START_NS + round(k * 1e9 / rate_hz)


def test_a_frame_holds_the_latest_of_each_stream_and_the_command_in_force(tmp_path):
    arm = Arm()
    frames, gaps, _ = resampled(write_bag(tmp_path / 'bag', arm.messages()))
    assert gaps == []
    assert [f.stamp_ns for f in frames] == [START_NS + k * 50 * MS for k in range(len(frames))]
    assert len(frames) == 60
    proprioception = Proprioception(ROBOT, Kinematics(ROBOT))
    for frame in frames:
        arrays, t = frame.observation.arrays, frame.stamp_ns
        for name in IMAGES:
            shown_ns = latest(t, 30.0)
            np.testing.assert_array_equal(arrays[name], pixels(name, shown_ns)[None])
            assert frame.observation.ages_s[name] == pytest.approx((t - shown_ns) * 1e-9, abs=1e-12)
        positions = joint_positions(latest(t, 100.0))
        np.testing.assert_array_equal(frame.joint_positions, positions)
        np.testing.assert_array_equal(arrays['proprioception'][0], proprioception(positions))
        np.testing.assert_allclose(frame.target, target_pose(latest(t, 25.0)), atol=1e-12)
        assert frame.gripper == (-1.0 if t < START_NS + 1510 * MS else 1.0)


def test_what_arrives_late_is_waited_for(tmp_path):
    plain = resampled(write_bag(tmp_path / 'plain', Arm().messages()))[0]
    late = Arm(delay_ns={IMAGES['wrist']: 1900 * MS, TARGET: 400 * MS})
    frames, gaps, _ = resampled(write_bag(tmp_path / 'late', late.messages()))
    assert gaps == []
    assert_same(frames, plain)


def assert_same(frames: list[Frame], others: list[Frame]) -> None:
    """Equal bit for bit."""
    assert [f.stamp_ns for f in frames] == [f.stamp_ns for f in others]
    for frame, other in zip(frames, others, strict=True):
        assert frame.observation.ages_s == other.observation.ages_s
        for name, array in other.observation.arrays.items():
            np.testing.assert_array_equal(frame.observation.arrays[name], array)
        np.testing.assert_array_equal(frame.joint_positions, other.joint_positions)
        if other.target is not None:
            np.testing.assert_array_equal(frame.target, other.target)
        assert frame.gripper == other.gripper


def test_a_stream_that_lags_too_far_behind_is_cut_with_its_name(tmp_path):
    late = Arm(seconds=5.0, image_hz=10.0, delay_ns={IMAGES['wrist']: round((LAG_S + 1.0) * 1000) * MS})
    _, gaps, _ = resampled(write_bag(tmp_path / 'bag', late.messages()))
    stopped = [gap for gap in gaps if gap.reason == 'wrist stopped']
    assert stopped and f'more than {LAG_S:g} s behind' in stopped[0].detail


def test_joint_states_at_a_kilohertz_beside_a_slow_camera(tmp_path):
    arm = Arm(seconds=6.0, image_hz=10.0, joint_hz=1000.0, delay_ns={IMAGES['agentview']: 2500 * MS})
    frames, gaps, resampler = resampled(write_bag(tmp_path / 'bag', arm.messages()))
    assert gaps == []
    assert len(frames) == 119
    np.testing.assert_array_equal(frames[60].joint_positions, joint_positions(frames[60].stamp_ns))
    held = {name: len(source.buffer) for name, source in resampler.intake.sources.items()}
    assert held['proprioception'] < 200 and held['wrist'] < 5  # what was sampled is not kept


def test_a_gap_is_cut_exactly_and_never_filled(tmp_path):
    def keep(topic: str, stamp_ns: int) -> bool:
        return topic != IMAGES['wrist'] or not 1000 * MS <= stamp_ns - START_NS < 1700 * MS

    frames, gaps, _ = resampled(write_bag(tmp_path / 'bag', Arm(keep=keep).messages()))
    # The last picture is of 967 ms; it may stand in for 200 ms, but 100 ms after the other camera's: skewed.
    reasons = {gap.reason for gap in gaps}
    assert reasons == {'wrist too old', 'wrist skewed'}
    stamps_ms = [(frame.stamp_ns - START_NS) // MS for frame in frames]
    assert not [t for t in stamps_ms if 1067 < t < 1700]
    assert {1050, 1700} <= set(stamps_ms)
    assert len(frames) + sum(gap.frames for gap in gaps) == 60


def test_a_dead_stream_costs_arithmetic_not_memory(tmp_path):
    def keep(topic: str, stamp_ns: int) -> bool:
        return topic != JOINTS or not 500 * MS <= stamp_ns - START_NS < 9000 * MS

    arm = Arm(seconds=10.0, image_hz=20.0, keep=keep)
    frames, gaps, _ = resampled(write_bag(tmp_path / 'bag', arm.messages()))
    assert len(frames) + sum(gap.frames for gap in gaps) == 200
    assert len(gaps) < 130
    assert {gap.reason for gap in gaps} <= {
        'proprioception stopped',
        'proprioception too old',
        'proprioception skewed',
    }


def test_beginnings_and_ends_that_are_lost_are_counted(tmp_path):
    def keep(topic: str, stamp_ns: int) -> bool:
        t = stamp_ns - START_NS
        if topic == IMAGES['wrist']:
            return t >= 1000 * MS
        return topic != JOINTS or t < 2000 * MS

    frames, gaps, _ = resampled(write_bag(tmp_path / 'bag', Arm(keep=keep).messages()))
    first, last = gaps[0], gaps[-1]
    assert (first.reason, first.frames) == ('wrist not begun', 20)
    assert '1.000 s after the others' in first.detail
    assert last.reason == 'proprioception stopped' and last.frames == pytest.approx(20, abs=1)
    assert frames[0].stamp_ns == START_NS + 1000 * MS
    assert frames[-1].stamp_ns <= START_NS + 1990 * MS


def test_frames_without_a_command_are_cut(tmp_path):
    def keep(topic: str, stamp_ns: int) -> bool:
        return topic != TARGET or 600 * MS <= stamp_ns - START_NS < 1400 * MS

    path = write_bag(tmp_path / 'bag', Arm(keep=keep).messages())
    frames, gaps, _ = resampled(path)
    assert {gap.reason for gap in gaps} == {'no command'}
    assert frames[0].stamp_ns == START_NS + 600 * MS
    assert frames[-1].stamp_ns == START_NS + 1850 * MS  # the last command is of 1360 ms, in force for 500 ms
    longer, _, _ = resampled(path, max_command_age_s=1.0)
    assert longer[-1].stamp_ns == START_NS + 2350 * MS


def test_without_commands_achieved_frames_need_none(tmp_path):
    arm = Arm(target_hz=0.0, gripper_at_s=())
    frames, gaps, _ = resampled(write_bag(tmp_path / 'bag', arm.messages()), commanded=False)
    assert gaps == [] and len(frames) == 60
    assert all(frame.target is None and frame.gripper is None for frame in frames)


def test_gripper_commands_of_a_log_on_another_clock_are_placed_by_their_order(tmp_path):
    """`ros2 bag record` without use_sim_time: stamps count simulated seconds, log times are today's."""
    shift_ns = 10**17
    plain = Arm(gripper_at_s=((0.0, 0.08), (1.531, 0.0))).messages()
    shifted = [(log_ns + shift_ns, topic, message) for log_ns, topic, message in plain]
    expected = resampled(write_bag(tmp_path / 'plain', plain))[0]
    frames, _, _ = resampled(write_bag(tmp_path / 'shifted', shifted))
    assert_same(frames, expected)


def test_refused_messages_are_counted_by_topic_with_the_last_reason(tmp_path):
    def change(topic: str, stamp_ns: int, message):
        t = (stamp_ns - START_NS) // MS
        if topic == JOINTS and t == 500:
            return joints(0)
        if topic == JOINTS and t == 600:
            return joints(stamp_ns, np.full(9, np.nan))
        if topic == IMAGES['wrist'] and t == 500:
            message.encoding = 'yuv9'
        if topic == TARGET and t == 520:
            message.header.frame_id = 'camera'
        return message

    frames, gaps, resampler = resampled(write_bag(tmp_path / 'bag', Arm(change=change).messages()))
    assert gaps == [] and len(frames) == 60  # one lost message is no gap
    counts = resampler.intake.counts
    assert {topic: count.refused for topic, count in counts.items()} == {
        JOINTS: 2, IMAGES['agentview']: 0, IMAGES['wrist']: 1, TARGET: 1, GRIPPER: 0,
    }  # fmt: skip
    assert 'not finite' in counts[JOINTS].last_refusal
    assert "unknown image encoding 'yuv9'" in counts[IMAGES['wrist']].last_refusal
    assert "frame 'camera', expected 'panda_base'" in counts[TARGET].last_refusal
    assert counts[JOINTS].received == 300


def test_a_repeated_message_is_left_out_as_the_live_buffer_does(tmp_path):
    plain = Arm().messages()
    doubled = sorted(
        [*plain, *((t + 1, topic, m) for t, topic, m in plain if topic == JOINTS)], key=lambda e: e[0]
    )
    frames, gaps, resampler = resampled(write_bag(tmp_path / 'bag', doubled))
    assert gaps == []
    assert resampler.intake.counts[JOINTS].not_newer == 300
    assert_same(frames, resampled(write_bag(tmp_path / 'plain', plain))[0])


def test_two_publishers_on_one_topic_are_refused(tmp_path):
    plain = Arm().messages()
    other = [(t + MS, topic, joints(t - 7 * MS)) for t, topic, _ in plain if topic == JOINTS]
    path = write_bag(tmp_path / 'bag', sorted([*plain, *other], key=lambda entry: entry[0]))
    with pytest.raises(
        DatasetError, match=r'of 600 messages of /joint_states are stamped before their predecessor'
    ):
        resampled(path)


def test_stamps_that_go_back_are_refused_with_both_values(tmp_path):
    def change(topic: str, stamp_ns: int, message):
        if topic == IMAGES['agentview'] and stamp_ns - START_NS >= 2000 * MS:
            message.header.stamp.sec -= 100
        return message

    path = write_bag(tmp_path / 'bag', Arm(change=change).messages())
    with pytest.raises(
        DatasetError,
        match=r'stamps of /agentview/image_raw go back from 1700000001\.966666667 s to 1699999902',
    ):
        resampled(path)


def test_a_robot_in_a_namespace(tmp_path):
    moved = [(t, f'/left{topic}', message) for t, topic, message in Arm().messages()]
    frames, _, _ = resampled(write_bag(tmp_path / 'bag', moved), namespace='/left')
    assert len(frames) == 60


def compressed(topic: str, stamp_ns: int, message, size: tuple[int, int] = SIZE):
    """A picture as PNG; other messages as they are."""
    if topic not in IMAGES.values():
        return message
    camera = next(name for name in IMAGES if IMAGES[name] == topic)
    png = cv2.imencode('.png', cv2.cvtColor(pixels(camera, stamp_ns, size), cv2.COLOR_RGB2BGR))[1]
    return kind('sensor_msgs/msg/CompressedImage')(message.header, 'png', png.reshape(-1))


def test_a_compressed_camera_that_changes_its_size_is_refused(tmp_path):
    def change(topic: str, stamp_ns: int, message):
        return compressed(topic, stamp_ns, message, SIZE if stamp_ns < START_NS + 500 * MS else (48, 64))

    cameras = {name: replace(camera, compressed=True) for name, camera in ROBOT.cameras.items()}
    bag = write_bag(tmp_path / 'bag', Arm(seconds=1.0, change=change).messages())
    with pytest.raises(
        DatasetError, match=r'the images of /\S+/image_raw change from 24 x 32 to 48 x 64 pix'
    ):
        resampled(bag, robot=replace(ROBOT, cameras=cameras))


def test_compressed_cameras(tmp_path):
    cameras = {name: replace(camera, compressed=True) for name, camera in ROBOT.cameras.items()}
    bag = write_bag(tmp_path / 'bag', Arm(seconds=1.0, change=compressed).messages())
    plain, _, _ = resampled(write_bag(tmp_path / 'plain', Arm(seconds=1.0).messages()))
    frames, gaps, _ = resampled(bag, robot=replace(ROBOT, cameras=cameras))
    assert gaps == []
    assert_same(frames, plain)
    with pytest.raises(
        DatasetError, match=r'is of type sensor_msgs/msg/CompressedImage, expected sensor_msgs/msg/Im'
    ):
        resampled(bag)
