"""Contract, stamped buffers, sampler and proprioception; buffers and sampler against a brute-force model."""

import json
import threading

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from decoupled_policy_ros.errors import (
    ConfigError,
    MessageError,
    ObservationError,
    StreamMissing,
    StreamSkewed,
    StreamStale,
)
from decoupled_policy_ros.observation.contract import ObservationContract, StreamSpec
from decoupled_policy_ros.observation.proprioception import Proprioception
from decoupled_policy_ros.observation.sampler import Sampler
from decoupled_policy_ros.observation.streams import StreamBuffer
from decoupled_policy_ros.robot.description import load_robot
from decoupled_policy_ros.robot.kinematics import Kinematics

MS = 1_000_000


def contract(n_obs_steps=2, max_age_s=0.1, max_skew_s=0.06, names=('joints', 'camera'), rate_hz=20.0):
    streams = tuple(StreamSpec(name, 'vector', (1,), max_age_s) for name in names)
    return ObservationContract(rate_hz, n_obs_steps, streams, max_skew_s)


def filled(stamps_ms, capacity=64):
    buffer = StreamBuffer(capacity)
    for stamp in stamps_ms:
        assert buffer.push(stamp * MS, np.array([float(stamp)]))
    return buffer


def sampler(joints_ms, camera_ms, **settings_of_contract):
    return Sampler(
        contract(**settings_of_contract), {'joints': filled(joints_ms), 'camera': filled(camera_ms)}
    )


# Contract


def test_contract_round_trip_through_json():
    original = ObservationContract(
        20.0,
        2,
        (
            StreamSpec('wrist', 'image', (84, 84, 3), 0.2),
            StreamSpec('proprioception', 'proprioception', (9,), 0.05),
        ),
        0.1,
        (0.6, 0.0, -0.8, 0.0),
    )
    assert ObservationContract.from_dict(json.loads(json.dumps(original.to_dict()))) == original
    assert original.names == ('wrist', 'proprioception')
    assert original.stream('wrist').shape == (84, 84, 3)
    assert original.offset_ns(1) == 50 * MS
    with pytest.raises(ConfigError, match=r"'agentview'.*wrist, proprioception"):
        original.stream('agentview')


def test_a_contract_from_before_it_named_the_quaternion_is_read():
    values = contract().to_dict()
    del values['near_quat_xyzw']
    assert ObservationContract.from_dict(values) == contract()


@pytest.mark.parametrize(
    ('fields', 'named'),
    [
        ({'kind': 'sound'}, ["'joints'", "'sound'", 'image, proprioception, vector']),
        ({'shape': (0,)}, ["'joints'", '(0,)']),
        ({'shape': (2, 2)}, ['(n,)', '(2, 2)']),
        ({'shape': (9.0,)}, ['whole numbers']),
        ({'kind': 'image', 'shape': (84, 84)}, ['(H, W, 3)', '(84, 84)']),
        ({'kind': 'image', 'shape': (3, 84, 84)}, ['(H, W, 3)', '(3, 84, 84)']),
        ({'max_age_s': 0.0}, ['max_age_s', '0.0']),
        ({'max_age_s': float('nan')}, ['max_age_s', 'nan']),
        ({'name': ''}, ['name']),
    ],
)
def test_bad_stream_is_refused(fields, named):
    with pytest.raises(ConfigError) as error:
        StreamSpec(**{'name': 'joints', 'kind': 'vector', 'shape': (9,), 'max_age_s': 0.1, **fields})
    for text in named:
        assert text in str(error.value)


@pytest.mark.parametrize(
    ('change', 'named'),
    [
        ({'rate_hz': 0}, 'rate_hz'),
        ({'rate_hz': float('inf')}, 'rate_hz'),
        ({'n_obs_steps': 0}, 'n_obs_steps'),
        ({'n_obs_steps': True}, 'n_obs_steps'),
        ({'max_skew_s': -1}, 'max_skew_s'),
        ({'streams': []}, 'stream names'),
        ({'streams': 'wrist'}, 'streams must be a list'),
        ({'streams': [{'name': 'a', 'kind': 'vector', 'shape': [1], 'max_age_s': 1}] * 2}, 'differ'),
        ({'streams': [{'name': 'a', 'kind': 'vector', 'shape': [1]}]}, 'max_age_s'),
        ({'streams': [{'name': 'a', 'kind': 'vector', 'shape': 9, 'max_age_s': 1}]}, 'shape must be a list'),
        ({'colour': 'red'}, 'colour'),
        ({'near_quat_xyzw': [1.0, 1.0, 0.0, 0.0]}, 'norm 1'),
        ({'near_quat_xyzw': [1.0, 0.0, 0.0]}, 'four numbers'),
        ({'near_quat_xyzw': ['1', 0, 0, 0]}, 'four numbers'),
        ({'near_quat_xyzw': 'home'}, 'four numbers'),
    ],
)
def test_bad_contract_is_refused(change, named):
    with pytest.raises(ConfigError, match=named):
        ObservationContract.from_dict({**contract().to_dict(), **change})


# Buffers


@settings(max_examples=200)
@given(
    st.integers(1, 5), st.lists(st.integers(0, 30), max_size=20), st.lists(st.integers(-1, 31), max_size=6)
)
def test_buffer_equals_brute_force(capacity, stamps, questions):
    buffer, kept, rejected = StreamBuffer(capacity), [], 0
    for i, stamp in enumerate(stamps):
        newer = not kept or stamp > kept[-1][0]
        assert buffer.push(stamp, np.array([i])) == newer
        kept = [*kept, (stamp, i)] if newer else kept
        rejected += not newer
    held = kept[-capacity:]
    assert len(buffer) == len(held)
    assert (buffer.accepted, buffer.rejected) == (len(kept), rejected)
    assert buffer.latest_stamp_ns == (held[-1][0] if held else None)
    assert buffer.oldest_stamp_ns == (held[0][0] if held else None)
    for question in questions:
        earlier = [sample for sample in held if sample[0] <= question]
        found = buffer.at_or_before(question)
        assert (None if found is None else (found[0], int(found[1][0]))) == (earlier[-1] if earlier else None)


def test_cleared_buffer_takes_earlier_stamps():
    buffer = filled([100, 200])
    assert not buffer.push(50 * MS, np.zeros(1))
    buffer.clear()
    assert buffer.latest_stamp_ns is None
    assert buffer.at_or_before(10**12) is None
    assert buffer.push(50 * MS, np.zeros(1))


def test_buffered_array_can_not_be_written():
    buffer, array = StreamBuffer(2), np.zeros(3)
    buffer.push(1, array)
    with pytest.raises(ValueError, match='read-only'):
        buffer.at_or_before(1)[1][0] = 1.0
    array[0] = 2.0  # the caller's own view stays as it was


def test_buffer_without_room_is_refused():
    with pytest.raises(ValueError, match='capacity 0'):
        StreamBuffer(0)


def test_buffer_between_threads():
    """A reader never sees a sample that belongs to another stamp while writers push."""
    buffer, wrong, stop = StreamBuffer(8), [], threading.Event()

    def read():
        while not stop.is_set():
            latest = buffer.latest_stamp_ns
            found = buffer.at_or_before(latest) if latest is not None else None
            if found is not None and (found[0] != found[1][0] or found[0] > latest):
                wrong.append(found)

    readers = [threading.Thread(target=read) for _ in range(2)]
    writers = [
        threading.Thread(target=lambda: [buffer.push(i, np.array([i])) for i in range(1, 3000)])
        for _ in range(2)
    ]
    for thread in [*readers, *writers]:
        thread.start()
    for thread in writers:
        thread.join()
    stop.set()
    for thread in readers:
        thread.join()
    assert wrong == []
    assert buffer.latest_stamp_ns == 2999
    assert buffer.accepted + buffer.rejected == 2 * 2999


# Sampler


def test_latest_at_or_before_with_age_and_history():
    observation = sampler([40, 50, 60, 95, 100, 105], [45, 98]).sample(100 * MS)
    assert observation.arrays['joints'].tolist() == [[50.0], [100.0]]
    assert observation.arrays['camera'].tolist() == [[45.0], [98.0]]
    assert observation.ages_s == pytest.approx({'joints': 0.0, 'camera': 0.002})
    assert observation.stamp_ns == 100 * MS


def test_latest_common_stamp():
    assert sampler([40, 100], [45, 90]).latest_common_stamp_ns() == 90 * MS
    assert sampler([40, 100], []).latest_common_stamp_ns() is None


def test_what_is_stamped_later_than_now_does_not_count_yet():
    streams = sampler([40, 100], [45, 90, 130])
    assert streams.latest_common_stamp_ns(95 * MS) == 40 * MS
    assert streams.latest_common_stamp_ns(100 * MS) == 90 * MS
    assert streams.latest_common_stamp_ns(30 * MS) is None


def test_stream_without_samples_is_missing():
    with pytest.raises(StreamMissing, match=r"'camera'.*nothing has arrived.*0\.1 s") as error:
        sampler([50, 100], []).sample(100 * MS)
    assert (error.value.stream, error.value.age_s, error.value.limit_s) == ('camera', None, 0.1)


def test_history_is_never_filled_from_the_first_sample():
    with pytest.raises(StreamMissing, match=r"'camera'.*0\.010 s later") as error:
        sampler([50, 100], [60, 100]).sample(100 * MS)
    assert error.value.stream == 'camera'


def test_history_that_has_left_the_buffer_is_missing():
    streams = Sampler(
        contract(), {'joints': filled(range(0, 200, 10), capacity=3), 'camera': filled([90, 140, 190])}
    )
    with pytest.raises(StreamMissing, match="'joints'"):
        streams.sample(190 * MS)


def test_stream_that_stopped_is_stale():
    with pytest.raises(StreamStale, match=r"'camera' is 0\.120 s old.*limit 0\.1 s") as error:
        sampler(range(0, 240, 10), [30, 80], max_skew_s=1.0).sample(200 * MS)
    assert error.value.stream == 'camera'
    assert error.value.age_s == pytest.approx(0.12)
    assert error.value.limit_s == 0.1


def test_history_frame_has_the_age_limit_too():
    with pytest.raises(StreamStale, match=f'at {100 * MS} ns'):
        sampler(range(0, 160, 10), [0, 145], max_age_s=0.09, max_skew_s=1.0).sample(150 * MS)


@pytest.mark.parametrize('limit_ms', [7, 70, 100, 110, 150, 290])
def test_age_and_skew_of_exactly_the_limit_are_taken(limit_ms):
    limits = {'n_obs_steps': 1, 'max_age_s': limit_ms / 1000, 'max_skew_s': limit_ms / 1000}
    streams = sampler([0, limit_ms], [0], **limits)
    assert streams.sample(limit_ms * MS).ages_s['camera'] == pytest.approx(limit_ms / 1000)
    with pytest.raises(StreamStale):
        streams.sample(limit_ms * MS + 1)


def test_skewed_streams():
    with pytest.raises(
        StreamSkewed, match=r"'camera' is 0\.070 s behind stream 'joints', limit 0\.06 s"
    ) as error:
        sampler([50, 100], [0, 30], max_skew_s=0.06).sample(100 * MS)
    assert error.value.stream == 'camera'
    assert error.value.age_s == pytest.approx(0.07)
    assert error.value.limit_s == 0.06


def test_now_names_the_stream_that_stopped_first():
    streams = sampler([50, 100, 150, 200, 250], [50, 100], max_skew_s=1.0)
    t = streams.latest_common_stamp_ns()
    assert streams.sample(t, now_ns=150 * MS).stamp_ns == 100 * MS
    with pytest.raises(StreamStale, match=r"'camera' is 0\.160 s old now, limit 0\.1 s") as error:
        streams.sample(t, now_ns=260 * MS)
    assert (error.value.stream, error.value.limit_s) == ('camera', 0.1)
    assert error.value.age_s == pytest.approx(0.16)


def test_now_refuses_an_old_time_of_live_streams():
    streams = sampler(range(50, 400, 50), range(50, 400, 50))
    assert streams.sample(100 * MS).stamp_ns == 100 * MS
    with pytest.raises(StreamStale, match='at the time asked for'):
        streams.sample(100 * MS, now_ns=350 * MS)


def test_now_refuses_stamps_of_the_future():
    with pytest.raises(StreamStale, match=r'0\.900 s in the future'):
        sampler([50, 1000], [50, 1000]).sample(1000 * MS, now_ns=100 * MS)


def test_now_with_a_silent_stream():
    with pytest.raises(StreamMissing, match="'joints'"):
        sampler([], [100]).sample(100 * MS, now_ns=100 * MS)


def test_wrong_shape_is_refused():
    streams = sampler([50], [50])
    streams._buffers['camera'].push(100 * MS, np.zeros(2))
    streams._buffers['joints'].push(100 * MS, np.zeros(1))
    with pytest.raises(ObservationError, match=r"'camera' delivers shape \(2,\), the contract says \(1,\)"):
        streams.sample(100 * MS)


def test_missing_buffer_is_refused():
    with pytest.raises(ConfigError, match=r'camera.*there are joints'):
        Sampler(contract(), {'joints': StreamBuffer(1)})


stamps = st.lists(st.integers(0, 60), unique=True, max_size=15).map(sorted)


@settings(max_examples=300)
@given(stamps, stamps, st.integers(0, 60), st.integers(1, 3), st.integers(1, 40), st.integers(1, 30))
def test_sampler_equals_brute_force(joints, camera, t, n_obs_steps, max_age, max_skew):
    """In units of 10 ms: whatever arrives, the sampler gives what a plain search gives, or its refusal."""
    held = {'joints': joints, 'camera': camera}
    streams = Sampler(
        contract(n_obs_steps, max_age_s=(max_age + 0.5) / 100, max_skew_s=(max_skew + 0.5) / 100),
        {name: filled([10 * stamp for stamp in held[name]]) for name in held},
    )
    expected, frames = None, {name: [] for name in held}
    for back in range(n_obs_steps - 1, -1, -1):
        earlier = {name: [stamp for stamp in held[name] if stamp <= t - 5 * back] for name in held}
        picked = {name: values[-1] for name, values in earlier.items() if values}
        stale = any(t - 5 * back - stamp > max_age for stamp in picked.values())
        if len(picked) < 2 or stale:
            expected = (StreamMissing, StreamStale)  # which of the two depends on the order of the streams
        elif abs(picked['joints'] - picked['camera']) > max_skew:
            expected = StreamSkewed
        if expected is not None:
            break
        for name in held:
            frames[name].append([10.0 * picked[name]])
    if expected is not None:
        with pytest.raises(expected):
            streams.sample(10 * t * MS)
        return
    observation = streams.sample(10 * t * MS)
    for name in held:
        assert observation.arrays[name].tolist() == frames[name]
        assert observation.ages_s[name] == pytest.approx((10 * t - frames[name][-1][0]) / 1e3)


@given(stamps, stamps)
def test_latest_common_stamp_is_one_that_no_stream_waits_for(joints, camera):
    assume(joints and camera)
    streams = Sampler(
        contract(1, max_age_s=10.0, max_skew_s=10.0),
        {'joints': filled([10 * s for s in joints]), 'camera': filled([10 * s for s in camera])},
    )
    t = streams.latest_common_stamp_ns()
    assert t == 10 * min(joints[-1], camera[-1]) * MS


def test_rate_without_a_whole_period():
    third = contract(n_obs_steps=3, rate_hz=30.0)
    assert [third.offset_ns(k) for k in (0, 1, 2)] == [0, 33_333_333, 66_666_667]


# Proprioception


@pytest.fixture(scope='module', params=['panda_sim', 'fr3'])
def arm(request):
    robot = load_robot(request.param)
    return robot, Kinematics(robot)


def joint_vectors(robot, count):
    limits = robot.limits
    q = np.random.default_rng(1).uniform(limits.lower_rad, limits.upper_rad, (count, 7))
    return np.concatenate([q, np.full((count, 2), 0.03) * robot.gripper.joint_signs], 1)


def test_proprioception_is_pose_and_fingers(arm):
    robot, kinematics = arm
    vectors = joint_vectors(robot, 10)
    result = Proprioception(robot, kinematics).many(vectors)
    assert result.shape == (10, 9)
    assert result.dtype == np.float32
    pose = kinematics.forward_many(vectors[:, :7])
    np.testing.assert_allclose(result[:, :3], pose[:, :3, 3], atol=1e-6)
    np.testing.assert_allclose(Rotation.from_quat(result[:, 3:7]).as_matrix(), pose[:, :3, :3], atol=1e-6)
    np.testing.assert_array_equal(result[:, 7:], vectors[:, 7:].astype(np.float32))


def test_one_and_many_give_the_same_bits(arm):
    proprioception, vectors = Proprioception(*arm), joint_vectors(arm[0], 20)
    np.testing.assert_array_equal(
        proprioception.many(vectors), np.stack([proprioception(row) for row in vectors])
    )


def test_quaternion_does_not_jump_as_the_wrist_turns(arm):
    robot, kinematics = arm
    turns = np.linspace(robot.limits.lower_rad[6], robot.limits.upper_rad[6], 2000)
    vectors = np.tile(np.concatenate([robot.home_rad, [0.0, 0.0]]), (len(turns), 1))
    vectors[:, 6] = turns
    within = np.abs(turns - robot.home_rad[6]) < np.pi
    quat_xyzw = Proprioception(robot, kinematics).many(vectors[within])[:, 3:7]
    assert np.linalg.norm(np.diff(quat_xyzw, axis=0), axis=-1).max() < 0.01


@pytest.mark.parametrize('shape', [(7,), (10,)])
def test_wrong_joint_vector_is_refused(arm, shape):
    with pytest.raises(MessageError, match='joint'):
        Proprioception(*arm)(np.zeros(shape))


def test_the_newest_samples_are_those_that_an_observation_may_yet_be_made_of():
    streams = sampler([40, 50, 60, 95, 100, 105], [45, 98])
    newest = streams.newest(0)
    assert {name: array.tolist() for name, array in newest.items()} == {'joints': [105.0], 'camera': [98.0]}
    assert newest['camera'] is streams.sample(100 * MS).frames['camera'][-1]  # the very same array
    assert set(streams.newest(99 * MS)) == {'joints'}
    assert streams.newest(106 * MS) == {}
