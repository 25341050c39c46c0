"""Bad input, each as a real file: a clear error with the topic and the values, and nothing half-written."""

import json
import resource
import signal
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from bag_files import IMAGES, INSTRUCTION, JOINTS, MS, SIZE, START_NS, TARGET, Arm, image, joints, write_bag
from rich.console import Console
from test_convert import CONTRACT, SETTINGS, beside, command, task_for

from decoupled_policy_ros.data.conversion.bag import convert_bag
from decoupled_policy_ros.data.conversion.convert import convert
from decoupled_policy_ros.data.conversion.plan import ConvertSettings, make_plan
from decoupled_policy_ros.data.datasets.dataset import Dataset
from decoupled_policy_ros.data.parallel import Result
from decoupled_policy_ros.errors import DatasetError
from decoupled_policy_ros.robot.description import robot_file

SHORT = Arm(seconds=1.5)


def bag_with(folder: Path, **options) -> Path:
    return write_bag(folder / 'bag', replace(SHORT, **options).messages())


def changed(folder: Path, topic: str, change: Callable[[int, object], object]) -> Path:
    """A bag in which every message of a topic is another."""
    return bag_with(folder, change=lambda name, t, message: change(t, message) if name == topic else message)


def truncated(folder: Path) -> Path:
    bag = bag_with(folder)
    file = next(bag.glob('*.mcap'))
    file.write_bytes(file.read_bytes()[:-5000])
    return bag


def without_camera(folder: Path) -> Path:
    return bag_with(folder, keep=lambda topic, _: topic != IMAGES['wrist'])


def of_another_type(folder: Path) -> Path:
    messages = [(t, '/wrist/image_raw' if topic == TARGET else topic, m) for t, topic, m in SHORT.messages()
                if topic != IMAGES['wrist']]  # fmt: skip
    return write_bag(folder / 'bag', messages)


def clock_back(folder: Path) -> Path:
    def back(topic: str, stamp_ns: int, message):
        if stamp_ns - START_NS >= 1000 * MS and topic != TARGET:
            message.header.stamp.sec -= 5
        return message

    return bag_with(folder, change=back)


def zero_stamps(folder: Path) -> Path:
    return changed(folder, JOINTS, lambda t, _: joints(0, np.zeros(9)))


def nan_joints(folder: Path) -> Path:
    return changed(folder, JOINTS, lambda t, _: joints(t, np.full(9, np.nan)))


def missing_joints(folder: Path) -> Path:
    names = ['joint1', 'joint2', 'joint3']
    return changed(folder, JOINTS, lambda t, _: joints(t, np.zeros(3), names))


def unknown_encoding(folder: Path) -> Path:
    return changed(folder, IMAGES['agentview'], lambda t, _: image('agentview', t, SIZE, 'yuv422'))


def size_and_data_contradict(folder: Path) -> Path:
    def taller(t: int, message):
        message.height += 1
        return message

    return changed(folder, IMAGES['agentview'], taller)


def size_changes(folder: Path) -> Path:
    later = START_NS + 700 * MS
    return changed(folder, IMAGES['wrist'], lambda t, m: image('wrist', t, (48, 64)) if t > later else m)


def commands_in_another_frame(folder: Path) -> Path:
    def moved(t: int, message):
        message.header.frame_id = 'world'
        return message

    return changed(folder, TARGET, moved)


@pytest.mark.parametrize(
    ('make', 'reason'),
    [
        (truncated, r'truncated or damaged.*`decoupled-policy recover`'),
        (
            without_camera,
            r'has no topic /wrist/image_raw; its topics: .*/agentview/image_raw \(sensor_msgs/msg/Im',
        ),
        (
            of_another_type,
            r'/wrist/image_raw is of type geometry_msgs/msg/PoseStamped, expected sensor_msgs/msg/Image',
        ),
        (clock_back, r'stamps of /\S+ go back from 17000000\d\d\.\d+ s to 1699999\d+\.\d+ s'),
        (zero_stamps, r'none of the 150 messages of /joint_states .*zero stamp is no stamp'),
        (nan_joints, r'none of the 150 messages of /joint_states .*not finite: .*joint1'),
        (missing_joints, r'none of the .* lacks joint4, .*finger_joint2; it has joint1, joint2, joint3'),
        (
            unknown_encoding,
            r"none of the 45 messages of /agentview/image_raw .*encoding 'yuv422'; known: rgb8",
        ),
        (
            size_and_data_contradict,
            r'none of the 45 .*image data has 2304 bytes, 25 rows of step 96 have 2400',
        ),
        (size_changes, r'images of /wrist/image_raw change from 24 x 32 to 48 x 64'),
        (
            commands_in_another_frame,
            r"none of the 37 messages of /target_pose .*'world', expected 'panda_base'",
        ),
    ],
)
def test_a_bad_recording_is_refused_and_nothing_is_left(tmp_path, make, reason):
    bag = make(tmp_path)
    with pytest.raises(DatasetError, match=reason):
        convert_bag(task_for(bag, tmp_path / 'parts' / 'bag'))
    assert beside(tmp_path / 'parts') == []


def test_cameras_of_other_sizes_than_declared(tmp_path):
    """The robot's file may say what size its cameras have."""
    robot = yaml.safe_load(robot_file('panda_sim').read_text())
    for camera in robot['cameras'].values():
        camera['size'] = [480, 640]
    (tmp_path / 'arm.yaml').write_text(yaml.safe_dump(robot))
    settings = ConvertSettings(str(tmp_path / 'arm.yaml'), CONTRACT, instruction=INSTRUCTION)
    bag = bag_with(tmp_path)
    reason = r"camera 'agentview' has 24 x 32 pixels \(height x width\), its description says 480 x 640"
    with pytest.raises(DatasetError, match=reason):
        convert_bag(task_for(bag, tmp_path / 'parts' / 'bag', settings))
    robot['cameras']['wrist']['size'] = 'large'
    (tmp_path / 'arm.yaml').write_text(yaml.safe_dump(robot))
    result = subprocess.run(
        [*command([bag], tmp_path / 'out'), '--robot', str(tmp_path / 'arm.yaml')],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 2
    assert 'size must be' in result.stderr
    assert beside(tmp_path) == ['arm.yaml', 'bag', 'parts']


def test_the_whole_command_names_each_bad_recording_and_leaves_nothing(tmp_path):
    bags = []
    for make in (truncated, without_camera, nan_joints):
        (tmp_path / make.__name__).mkdir()
        bags.append(make(tmp_path / make.__name__))
    (tmp_path / 'work').mkdir()
    with pytest.raises(DatasetError) as raised:
        convert(bags, tmp_path / 'work' / 'out', SETTINGS, workers=1, console=Console(quiet=True))
    for name, reason in (
        ('truncated', 'recover'),
        ('without_camera', 'no topic'),
        ('nan_joints', 'not finite'),
    ):
        line = next(line for line in str(raised.value).splitlines() if name in line)
        assert reason in line
    assert beside(tmp_path / 'work') == []


def test_an_output_that_exists_is_refused_before_any_work(tmp_path):
    bag = bag_with(tmp_path)
    (tmp_path / 'out').mkdir()
    with pytest.raises(DatasetError, match=r'out exists already'):
        convert([bag], tmp_path / 'out', SETTINGS)
    assert beside(tmp_path) == ['bag', 'out'] and beside(tmp_path / 'out') == []


def test_a_folder_of_packed_files_alone_is_refused_with_what_helps(tmp_path):
    folder = tmp_path / 'packed'
    folder.mkdir()
    (folder / 'packed_0.mcap.zstd').touch()
    with pytest.raises(
        DatasetError, match=r'packed_0\.mcap\.zstd but no .*`decoupled-policy recover` completes it'
    ):
        convert([folder], tmp_path / 'dataset', ConvertSettings('panda_sim'))


def test_recordings_without_words_or_without_a_frame(tmp_path):
    bag = bag_with(tmp_path)
    with pytest.raises(DatasetError, match=r'does not say what was done: give --instruction'):
        convert([bag], tmp_path / 'out', ConvertSettings('panda_sim', CONTRACT))
    with pytest.raises(
        DatasetError, match=r'not one frame of 1 recordings can be used; cut: short piece: 30'
    ):
        convert([bag], tmp_path / 'out', replace(SETTINGS, min_frames=100), workers=1)
    with pytest.raises(DatasetError, match=r'nowhere does not exist'):
        convert([tmp_path / 'nowhere'], tmp_path / 'out', SETTINGS)
    (tmp_path / 'empty').mkdir()
    with pytest.raises(DatasetError, match=r'empty is no bag and has none in it'):
        convert([tmp_path / 'empty'], tmp_path / 'out', SETTINGS)
    assert beside(tmp_path) == ['bag', 'empty']


def test_a_damaged_episode_file(tmp_path):
    bag = bag_with(tmp_path)
    (bag / 'episode.json').write_text(json.dumps({'format': 7}))
    with pytest.raises(DatasetError, match=r'episode\.json: format 7 is not 1'):
        convert([bag], tmp_path / 'out', SETTINGS)
    with pytest.raises(DatasetError, match=r'episode\.json: format 7 is not 1'):  # there is no other
        convert([bag], tmp_path / 'out', SETTINGS, skip_bad=True)
    good = write_bag(tmp_path / 'good', SHORT.messages())
    report = convert([bag, good], tmp_path / 'out', SETTINGS, workers=1, skip_bad=True)
    assert 'format 7 is not 1' in report['failed'][str(bag)]
    assert report['totals']['bags'] == 1


@pytest.mark.parametrize(
    ('field', 'reason'),
    [
        ({'robot': 'panda_sim'}, "robot is 'panda_sim'"),
        ({'robot': {'description': 5}}, 'robot.description is 5'),
        ({'instruction': 5}, 'instruction is 5'),
        ({'success': 'yes'}, "success is 'yes'"),
        ({'fingerprint': {}}, 'a fingerprint has the fields'),
        ({'contract': []}, 'observation contract: needs the keys'),
    ],
)
def test_an_episode_file_with_a_wrong_field_is_damaged(field, reason, tmp_path):
    bag, good = bag_with(tmp_path), write_bag(tmp_path / 'good', SHORT.messages())
    (bag / 'episode.json').write_text(json.dumps({'format': 1, **field}))
    with pytest.raises(DatasetError, match=r'episode\.json is damaged: ' + reason):
        make_plan([bag, good], SETTINGS)
    plan = make_plan([bag, good], SETTINGS, skip_bad=True)
    assert [planned.problem is None for planned in plan.bags] == [True, False]


def test_a_part_of_a_recording_that_can_no_longer_be_converted_is_not_taken_up(tmp_path):
    """Its instruction came by an option that is not given any more: it fails, and is in no dataset."""
    first, second = (write_bag(tmp_path / name, SHORT.messages()) for name in ('first', 'second'))
    damaged = bag_with(tmp_path)
    (damaged / 'episode.json').write_text(json.dumps({'format': 1, 'instruction': 'lift'}))
    (second / 'episode.json').write_text(json.dumps({'format': 1, 'instruction': 'lift'}))
    cut = next(damaged.glob('*.mcap'))
    cut.write_bytes(cut.read_bytes()[:2000])
    out = tmp_path / 'out'
    with pytest.raises(DatasetError, match='finished recordings are kept'):
        convert([first, damaged], out, SETTINGS, workers=1)
    report = convert(
        [first, second, damaged], out, replace(SETTINGS, instruction=None), workers=1, skip_bad=True
    )
    assert 'give --instruction' in report['failed'][str(first)] and report['totals']['bags'] == 1
    assert Dataset.open(out).tasks == ['lift']


def limit_files() -> None:
    """No file of this process may exceed 300 kB: writes fail as on a full disk."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))


@pytest.mark.parametrize('options', [(), ('--skip-bad',)])
def test_a_disk_that_takes_no_more(tmp_path, options):
    """It is no fault of the recording's: it is not left out either."""
    small = write_bag(tmp_path / 'small', Arm(seconds=1.0).messages())
    large = write_bag(tmp_path / 'large', Arm(seconds=8.0).messages())
    (tmp_path / 'work').mkdir()
    out = tmp_path / 'work' / 'out'
    result = subprocess.run(
        command([small, large], out, *options), capture_output=True, text=True, preexec_fn=limit_files
    )
    assert result.returncode == 2
    assert 'can not be written: [Errno 27] File too large' in result.stderr
    assert '1 finished recordings are kept' in result.stderr
    assert 'Traceback' not in result.stderr
    assert beside(tmp_path / 'work') == ['.out.converting']
    assert not list((tmp_path / 'work').rglob('*.part-*'))
    resumed = subprocess.run(command([small, large], out), capture_output=True, text=True)
    assert resumed.returncode == 0, resumed.stderr
    assert 'taking up 1 of 2 recordings' in resumed.stdout
    assert beside(tmp_path / 'work') == ['out']


@pytest.mark.parametrize(
    'reason',
    [
        '{folder}.part-1 can not be written: [Errno 122] Disk quota exceeded',
        '{bag} is truncated or damaged ([Errno 28] No space left on device)',  # unpacked into the temporary folder
    ],
)
def test_after_a_full_disk_nothing_is_tried_or_published(tmp_path, monkeypatch, reason):
    tried = []

    def run_tasks(function, tasks, *_):
        for index, task in enumerate(tasks):
            tried.append(index)
            error = reason.format(folder=task.folder, bag=task.bag) if index == 1 else None
            yield Result(index, None if error else function(task), error)

    monkeypatch.setattr('decoupled_policy_ros.data.conversion.convert.run_tasks', run_tasks)
    bags = [write_bag(tmp_path / f'bag{i}', SHORT.messages()) for i in range(3)]
    with pytest.raises(
        DatasetError, match=r'(quota exceeded|No space left)(.|\n)*1 finished recordings are kept'
    ):
        convert(bags, tmp_path / 'out', SETTINGS, workers=1, skip_bad=True)
    assert tried == [0, 1]
    assert beside(tmp_path) == ['.out.converting', 'bag0', 'bag1', 'bag2']
