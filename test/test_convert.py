"""decoupled-policy convert as a whole: what is in the dataset, resuming, labels, contracts, reports, workers."""

import fcntl
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import yaml
from bag_files import (
    IMAGES,
    INSTRUCTION,
    MS,
    ROBOT,
    START_NS,
    Arm,
    joint_positions,
    pixels,
    target_pose,
    write_bag,
)
from ray_cluster import ray_cluster
from rich.console import Console
from test_convert_streams import CONTRACT, latest

from decoupled_policy_ros.cli_data import contract_of
from decoupled_policy_ros.data.conversion.bag import BagTask, convert_bag
from decoupled_policy_ros.data.conversion.convert import _Work, convert
from decoupled_policy_ros.data.conversion.plan import ConvertSettings, make_plan
from decoupled_policy_ros.data.conversion.report import failure_lines, notes, report_table
from decoupled_policy_ros.data.datasets.dataset import Dataset
from decoupled_policy_ros.data.parallel import run_tasks
from decoupled_policy_ros.errors import ConfigError, DatasetError, FingerprintMismatch
from decoupled_policy_ros.observation.image import fit_image
from decoupled_policy_ros.robot.description import load_robot, robot_file
from decoupled_policy_ros.robot.fingerprint import Fingerprint
from decoupled_policy_ros.robot.kinematics import Kinematics
from decoupled_policy_ros.robot.poses import GRIPPER, action_from_pose

SETTINGS = ConvertSettings('panda_sim', CONTRACT, instruction=INSTRUCTION)


def hole(topic: str, stamp_ns: int) -> bool:
    """Keeps all but the wrist camera's pictures from 1.0 s to 1.7 s."""
    return topic != IMAGES['wrist'] or not 1000 * MS <= stamp_ns - START_NS < 1700 * MS


def add_episode_file(bag: Path, **values) -> Path:
    """The file that the episode recorder puts beside its bags."""
    content = {
        'format': 1,
        'instruction': INSTRUCTION,
        'success': True,
        'robot': {'name': 'panda_sim', 'yaml': '', 'description': None},
        'fingerprint': Fingerprint.of(ROBOT, 20.0).to_dict(),
        'contract': CONTRACT.to_dict(),
    }
    (bag / 'episode.json').write_text(json.dumps(content | values))
    return bag


def task_for(bag: Path, folder: Path, settings: ConvertSettings = SETTINGS) -> BagTask:
    """What a worker gets for one recording."""
    plan = make_plan([bag], settings)
    return BagTask(
        bag, folder, settings.robot, None, plan.contract, plan.spec, settings.on_gap, settings.min_frames,
        settings.max_command_age_s, settings.trim_idle, settings.namespace,
    )  # fmt: skip


def beside(folder: Path) -> list[str]:
    """Names of what is in a folder."""
    return sorted(entry.name for entry in folder.iterdir())


def test_a_dataset_holds_what_was_seen_and_commanded(tmp_path):
    bags = [
        write_bag(tmp_path / 'plain', Arm().messages()),
        write_bag(tmp_path / 'cut', Arm(keep=hole).messages(), 'sqlite3'),
    ]
    report = convert(bags, tmp_path / 'out', SETTINGS, workers=2)
    dataset = Dataset.open(tmp_path / 'out')
    assert dataset.n_episodes == 3  # the second one is cut at the hole
    assert dataset.lengths.tolist()[0] == 60
    assert dataset.fingerprint == Fingerprint.of(ROBOT, 20.0)
    assert dataset.cameras == list(IMAGES)
    assert set(dataset.tasks) == {INSTRUCTION}
    conventions = dataset.info['decoupled_policy']
    assert conventions['action'] == 'absolute pose_base_ee, commanded'
    assert conventions['gripper_source'] == 'commanded'
    kinematics, arrays = Kinematics(ROBOT), dataset.episode(0).arrays
    for k in range(60):
        t = START_NS + k * 50 * MS
        positions = joint_positions(latest(t, 100.0))
        np.testing.assert_array_equal(arrays['observation.joint_positions'][k], positions.astype('f'))
        achieved = action_from_pose(
            kinematics.forward(positions[:7]), ROBOT.gripper.normalised(positions[7:])
        )
        np.testing.assert_array_equal(arrays['observation.pose'][k], achieved.astype('f'))
        commanded = action_from_pose(target_pose(latest(t, 25.0)), -1.0 if t < START_NS + 1510 * MS else 1.0)
        np.testing.assert_allclose(arrays['action'][k], commanded, atol=1e-6)
    for camera in IMAGES:
        shown = [pixels(camera, latest(START_NS + k * 50 * MS, 30.0)) for k in range(60)]
        np.testing.assert_array_equal(dataset.images(camera, 0), np.stack(shown))
    first, second = report['bags'][1]['pieces']
    second_start_ms = (second['start_ns'] - START_NS) // MS
    assert second_start_ms == 1700
    second_image = dataset.images('wrist', 2)[0]
    np.testing.assert_array_equal(second_image, pixels('wrist', latest(START_NS + 1700 * MS, 30.0)))
    assert dataset.lengths.tolist()[1:] == [first['frames'], second['frames']]
    check_report(report, tmp_path / 'out')
    assert beside(tmp_path) == ['cut', 'out', 'plain']


def check_report(report: dict, out: Path) -> None:
    assert json.loads((out / 'conversion' / 'report.json').read_text()) == json.loads(json.dumps(report))
    totals = report['totals']
    assert totals['frames'] + sum(totals['cut'].values()) == 120
    assert set(totals['cut']) == {'wrist too old', 'wrist skewed'}
    ages = report['histograms']
    assert set(ages) == {'agentview', 'wrist', 'proprioception', 'skew'}
    assert all(sum(entry['counts']) == totals['frames'] for entry in ages.values())
    assert ages['proprioception']['maximum_s'] == 0.0
    assert 0.03 < ages['wrist']['maximum_s'] < 0.2
    assert cv2.imread(str(out / 'conversion' / 'report.png')).shape[1] > 800


def test_achieved_actions_are_the_next_pose(tmp_path):
    bag = write_bag(tmp_path / 'bag', Arm(target_hz=0.0, gripper_at_s=()).messages())
    settings = replace(SETTINGS, size=(12, 16), images='h264')
    convert([bag], tmp_path / 'out', settings, workers=1)
    dataset = Dataset.open(tmp_path / 'out')
    arrays = dataset.episode(0).arrays
    assert dataset.lengths.tolist() == [59]  # the last frame has no next pose
    np.testing.assert_array_equal(arrays['action'][:-1], arrays['observation.pose'][1:])
    assert dataset.info['decoupled_policy']['action'] == 'absolute pose_base_ee, achieved'
    assert dataset.info['decoupled_policy']['gripper_source'] == 'measured'
    expected = fit_image(pixels('wrist', latest(START_NS + 500 * MS, 30.0)), (12, 16))
    found = dataset.images('wrist', 0)[10]
    assert found.shape == (12, 16, 3)
    assert np.corrcoef(found.ravel(), expected.ravel())[0, 1] > 0.4  # video loses noise first


def test_a_gripper_that_nobody_commanded_is_that_of_the_next_frame_beside_commanded_poses_too(tmp_path):
    bag = write_bag(tmp_path / 'bag', Arm(gripper_at_s=()).messages())
    convert([bag], tmp_path / 'out', SETTINGS, workers=1)
    dataset = Dataset.open(tmp_path / 'out')
    arrays = dataset.episode(0).arrays
    assert dataset.info['decoupled_policy']['action'] == 'absolute pose_base_ee, commanded'
    np.testing.assert_array_equal(arrays['action'][:-1, GRIPPER], arrays['observation.pose'][1:, GRIPPER])
    assert np.ptp(arrays['action'][:, GRIPPER]) > 0.5


def test_a_recording_that_can_not_be_used_does_not_settle_the_kind_of_actions(tmp_path):
    commanded = write_bag(tmp_path / 'commanded', Arm(seconds=1.5).messages())
    achieved = write_bag(tmp_path / 'achieved', Arm(seconds=1.5, target_hz=0.0, gripper_at_s=()).messages())
    add_episode_file(commanded, instruction='')  # it does not say what was done
    add_episode_file(achieved)
    settings = replace(SETTINGS, instruction=None)
    plan = make_plan([commanded, achieved], settings, skip_bad=True)
    assert (plan.spec.action, plan.spec.gripper_source) == ('achieved', 'measured')
    report = convert([commanded, achieved], tmp_path / 'out', settings, workers=1, skip_bad=True)
    assert list(report['failed']) == [str(commanded)] and report['totals']['frames'] > 0


def test_a_name_with_dollar_signs_is_no_formula(tmp_path):
    bag = write_bag(tmp_path / 'cup_$5_{$', Arm(seconds=1.5).messages())
    convert([bag], tmp_path / 'out', SETTINGS, workers=1)
    assert (tmp_path / 'out' / 'conversion' / 'report.png').is_file()


def test_a_gap_is_refused_where_it_is_to_be(tmp_path):
    bag = write_bag(tmp_path / 'bag', Arm(keep=hole).messages())
    task = task_for(bag, tmp_path / 'parts' / 'bag', replace(SETTINGS, on_gap='refuse'))
    with pytest.raises(DatasetError, match=r"no frame at 1700000001\d+ ns: stream 'wrist' .* --on-gap cut"):
        convert_bag(task)
    assert beside(tmp_path / 'parts') == []


def test_short_pieces_are_left_out_and_counted(tmp_path):
    bag = write_bag(tmp_path / 'bag', Arm(keep=hole).messages())
    record = convert_bag(task_for(bag, tmp_path / 'part', replace(SETTINGS, min_frames=24)))
    assert [piece['frames'] for piece in record['pieces']] == [26]
    assert (
        record['cut']['short piece']
        == 60 - record['cut']['wrist too old'] - record['cut']['wrist skewed'] - 26
    )


def test_a_part_whose_process_was_killed_before_it_could_say_so_is_made_again(tmp_path):
    task = task_for(write_bag(tmp_path / 'bag', Arm(seconds=1.0).messages()), tmp_path / 'parts' / 'bag')
    first = convert_bag(task)
    # One of another process that was killed in the middle.
    shutil.copytree(task.folder, task.folder.with_name(f'{task.folder.name}.part-0f0f0f0f'))
    again = convert_bag(task)
    assert again['pieces'] == first['pieces']
    assert beside(tmp_path / 'parts') == ['bag']


def test_standing_still_at_both_ends_is_trimmed_only_on_request(tmp_path):
    def change(topic: str, stamp_ns: int, message):
        if topic == '/joint_states':  # stands, moves from 1 s to 2 s, stands
            moved = np.clip((stamp_ns - START_NS) * 1e-9 - 1.0, 0.0, 1.0)
            message.position[:] = [*(ROBOT.home_rad + 0.3 * moved), 0.04, -0.04]
        return message

    arm = Arm(target_hz=0.0, gripper_at_s=(), change=change)
    bag = write_bag(tmp_path / 'bag', arm.messages())
    whole = convert_bag(task_for(bag, tmp_path / 'whole'))
    assert whole['frames'] == 59 and not whole['cut'].get('idle')
    trimmed = convert_bag(task_for(bag, tmp_path / 'trimmed', replace(SETTINGS, trim_idle=True)))
    assert 20 <= trimmed['frames'] <= 24
    assert trimmed['frames'] + trimmed['cut']['idle'] == 59


def test_contract_and_labels_come_from_the_episodes(tmp_path):
    folder = tmp_path / 'session'
    folder.mkdir()
    short = Arm(seconds=1.5)
    labels = {'episode_000000': True, 'episode_000001': False, 'episode_000002': None}
    for name, success in labels.items():
        add_episode_file(write_bag(folder / name, short.messages()), success=success)
    (folder / '.episode_000003.partial').mkdir()
    plan = make_plan([folder], ConvertSettings('panda_sim'))
    assert [bag.path.name for bag in plan.bags] == sorted(labels)
    assert plan.contract == replace(CONTRACT, n_obs_steps=1)
    assert [bag.success for bag in plan.bags] == [True, False, None]
    assert 'unfinished' in plan.left_out[0] and 'recover' in plan.left_out[0]
    plan = make_plan([folder], ConvertSettings('panda_sim', success=True, only_successful=True))
    assert [bag.path.name for bag in plan.bags] == ['episode_000000', 'episode_000002']
    assert any('episode_000001: not labelled a success' in line for line in plan.left_out)
    report = convert([folder], tmp_path / 'out', ConvertSettings('panda_sim'), workers=1)
    assert report['totals']['episodes'] == 3
    assert report['totals']['labels'] == {'success': 1, 'failure': 1, 'unlabelled': 1}
    note = '1 failures and 1 unlabelled are in it; --only-successful leaves them out'
    assert note in notes(report)
    assert report_table(report).caption == 'episodes: 1 success, 1 failure, 1 unlabelled'
    dataset = Dataset.open(tmp_path / 'out')
    assert [dataset.episode(i).success for i in range(3)] == [True, False, None]
    options = ConvertSettings('panda_sim', rate_hz=10.0, size=(48, 64), cameras=('wrist',), max_age_s=0.3)
    contract = make_plan([folder], options).contract
    assert contract.rate_hz == 10.0 and contract.names == ('wrist', 'proprioception')
    assert (
        contract.stream('wrist').shape == (48, 64, 3) and contract.stream('proprioception').max_age_s == 0.3
    )


def test_a_robot_without_a_file_comes_from_its_recording(tmp_path):
    values = yaml.safe_load(robot_file('fr3').read_text())
    urdf = (robot_file('fr3').parent / values.pop('urdf')).read_text()
    (tmp_path / 'arm.yaml').write_text(yaml.safe_dump(values))
    arm = {'name': 'fr3', 'yaml': '', 'description': urdf}
    fingerprint = Fingerprint.of(load_robot('fr3'), 20.0).to_dict()
    bag = write_bag(tmp_path / 'bag', Arm(seconds=0.2).messages())
    settings = ConvertSettings(str(tmp_path / 'arm.yaml'), cameras=())
    add_episode_file(bag, robot=arm, fingerprint=fingerprint)
    assert make_plan([bag], settings).bags[0].robot_xml == urdf
    other = urdf.replace('0.333', '0.433')
    assert other != urdf
    add_episode_file(bag, robot={**arm, 'description': other}, fingerprint=fingerprint)
    with pytest.raises(FingerprintMismatch, match='description_sha256'):
        make_plan([bag], settings)


@pytest.mark.parametrize('first', ['with', 'without'])
def test_a_recording_without_a_description_is_of_the_arm_that_another_describes(first, tmp_path):
    urdf = (robot_file('fr3').parent / yaml.safe_load(robot_file('fr3').read_text())['urdf']).read_text()
    other = urdf.replace('0.333', '0.433')
    fingerprint = Fingerprint.of(load_robot('fr3', other), 20.0)
    bags = {name: write_bag(tmp_path / name, Arm(seconds=0.2).messages()) for name in ('with', 'without')}
    arm = {'name': 'fr3', 'yaml': '', 'description': other}
    add_episode_file(bags['with'], robot=arm, fingerprint=fingerprint.to_dict())
    settings = ConvertSettings('fr3', cameras=(), instruction=INSTRUCTION)
    plan = make_plan(sorted(bags.values(), key=lambda bag: bag.name != first), settings)
    assert [bag.robot_xml for bag in plan.bags] == [other, other]
    assert plan.spec.fingerprint == fingerprint
    task = replace(task_for(bags['without'], tmp_path / 'part'), robot='fr3', robot_xml=None, spec=plan.spec)
    with pytest.raises(FingerprintMismatch, match=r'without with robot fr3 has .*the dataset has'):
        convert_bag(task)


def test_recordings_that_contradict_each_other_are_refused(tmp_path):
    short = Arm(seconds=0.5)
    one = add_episode_file(write_bag(tmp_path / 'one', short.messages()))
    slower = replace(CONTRACT, rate_hz=10.0)
    other = add_episode_file(write_bag(tmp_path / 'other', short.messages()), contract=slower.to_dict())
    with pytest.raises(DatasetError, match=r'other was recorded for another contract .*--policy'):
        make_plan([one, other], ConvertSettings('panda_sim'))
    silent = write_bag(tmp_path / 'silent', Arm(seconds=0.5, target_hz=0.0).messages())
    with pytest.raises(
        DatasetError, match=r'one has commanded poses and .*silent has none: --action commanded --skip-bad'
    ):
        make_plan([one, silent], SETTINGS)
    assert make_plan([one, silent], replace(SETTINGS, action='achieved')).spec.action == 'achieved'
    report = convert(
        [one, silent], tmp_path / 'out', replace(SETTINGS, min_frames=4), workers=1, skip_bad=True
    )
    assert list(report['failed']) == [str(silent)] and report['totals']['bags'] == 1
    with pytest.raises(DatasetError, match='given twice'):
        make_plan([one, one], SETTINGS)
    with pytest.raises(DatasetError, match=r'one, .*one: the same recording is given twice'):
        make_plan([one, Path(os.path.relpath(one))], SETTINGS)


def test_a_recording_of_another_arm_is_refused_with_both_values(tmp_path):
    fingerprint = Fingerprint.of(ROBOT, 20.0).to_dict()
    bag = write_bag(tmp_path / 'bag', Arm(seconds=0.5).messages())
    add_episode_file(bag, fingerprint={**fingerprint, 'ee_frame': 'flange'})
    with pytest.raises(
        FingerprintMismatch, match=r"ee_frame: .*bag has 'flange', robot panda_sim has 'grip_site'"
    ):
        make_plan([bag], ConvertSettings('panda_sim'))


def test_a_simulated_arm_is_not_parsed_as_the_urdf_of_a_robot(tmp_path):
    values = yaml.safe_load(robot_file('fr3').read_text())
    values.pop('urdf')
    (tmp_path / 'arm.yaml').write_text(yaml.safe_dump(values))
    bag = write_bag(tmp_path / 'bag', Arm(seconds=0.2).messages())
    for description in ('<mujoco model="panda"/>', 'no xml'):
        add_episode_file(bag, robot={'name': 'panda_sim', 'yaml': '', 'description': description})
        with pytest.raises(
            FingerprintMismatch, match=r'arm.yaml do not belong together: .* robot panda_sim,'
        ):
            make_plan([bag], ConvertSettings(str(tmp_path / 'arm.yaml')))


@pytest.mark.parametrize(
    ('options', 'reason'),
    [
        ({'on_gap': 'fill'}, 'on_gap must be one of cut, refuse'),
        ({'images': 'gif'}, 'images must be one of png, h264, av1'),
        ({'action': 'wished'}, 'action must be one of commanded, achieved'),
        ({'rate_hz': 0.0}, 'rate_hz must be positive, got 0'),
        ({'size': (0, 84)}, r'size must be positive, got \(0, 84\)'),
        ({'max_age_s': float('nan')}, 'max_age_s must be positive, got nan'),
        ({'max_skew_s': -1.0}, 'max_skew_s must be positive, got -1'),
        ({'min_frames': 0}, 'min_frames must be at least 1'),
    ],
)
def test_settings_out_of_range(options, reason):
    with pytest.raises(ConfigError, match=reason):
        ConvertSettings('panda_sim', **options)


def test_a_camera_that_the_robot_does_not_have(tmp_path):
    bag = write_bag(tmp_path / 'bag', Arm(seconds=0.5).messages())
    with pytest.raises(ConfigError, match=r"camera 'overhead', robot 'panda_sim' has agentview, wrist"):
        make_plan([bag], replace(SETTINGS, cameras=('overhead',)))


def test_the_contract_of_a_policy_is_taken(small_policy_folders, image_contract, tmp_path):
    backbone, task = small_policy_folders
    bag = add_episode_file(write_bag(tmp_path / 'bag', Arm(seconds=0.5).messages()))
    plan = make_plan([bag], ConvertSettings('panda_sim', contract_of(str(task))))
    assert plan.contract == replace(image_contract, n_obs_steps=1)
    with pytest.raises(ConfigError, match='no task: its header has no observation contract'):
        contract_of(str(backbone))


def command(bags: list[Path], out: Path, *options: str) -> list[str]:
    """The command line of a conversion."""
    return [
        sys.executable, '-m', 'decoupled_policy_ros.cli', 'convert', *map(str, bags), '--robot', 'panda_sim',
        '--out', str(out), '--instruction', INSTRUCTION, '--size', '24', '32', '--workers', '1', *options,
    ]  # fmt: skip


def test_a_killed_run_is_taken_up_by_the_same_command_only(tmp_path):
    arms = [Arm(seconds=2.0), Arm(seconds=2.0), Arm(seconds=25.0, image_hz=20.0)]
    bags = [write_bag(tmp_path / f'bag{i}', arm.messages()) for i, arm in enumerate(arms)]
    out, work = tmp_path / 'out', tmp_path / '.out.converting'
    process = subprocess.Popen(command(bags, out), stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while len(list(work.glob('bags/*/bag.json'))) < 2:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    workers = Path(f'/proc/{process.pid}/task/{process.pid}/children').read_text().split()
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not out.exists()
    finished = {path: path.stat().st_mtime_ns for path in work.glob('bags/*/bag.json')}
    while any(Path(f'/proc/{pid}/stat').exists() and _runs(pid) for pid in workers):
        assert time.monotonic() < deadline, 'a worker outlived its parent'
        time.sleep(0.05)
    other = subprocess.run(command(bags, out, '--min-frames', '8'), capture_output=True, text=True)
    assert other.returncode == 2
    assert 'min_frames was 16, is now 8' in other.stderr
    again = subprocess.run(command(bags, out), capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert f'taking up {len(finished)} of 3 recordings' in again.stdout
    assert beside(tmp_path) == ['bag0', 'bag1', 'bag2', 'out']
    dataset = Dataset.open(out)
    assert dataset.lengths.tolist() == [40, 40, 500]
    walls = [
        record['wall_s'] for record in json.loads((out / 'conversion' / 'report.json').read_text())['bags']
    ]
    assert len(walls) == 3


def _runs(pid: str) -> bool:
    """Whether a process is more than a zombie."""
    try:
        return Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[0] != 'Z'
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_one_bad_recording_does_not_take_the_others_with_it(tmp_path):
    good = write_bag(tmp_path / 'good', Arm(seconds=2.0).messages())
    bad = write_bag(tmp_path / 'bad', Arm(seconds=2.0, keep=lambda t, _: t != IMAGES['wrist']).messages())
    with pytest.raises(
        DatasetError, match=r'bad has no topic /wrist/image_raw(.|\n)*1 finished .* --skip-bad'
    ):
        convert([bad, good], tmp_path / 'out', SETTINGS, workers=1)
    assert beside(tmp_path) == ['.out.converting', 'bad', 'good']
    report = convert([bad, good], tmp_path / 'out', SETTINGS, workers=1, skip_bad=True)
    assert list(report['failed']) == [str(bad)]
    assert report['totals']['bags'] == 1
    assert beside(tmp_path) == ['bad', 'good', 'out']


def test_a_recording_that_changes_while_it_is_converted_is_in_the_dataset(tmp_path, monkeypatch):
    bag = write_bag(tmp_path / 'bag', Arm(seconds=1.5).messages())

    def touched(*arguments):
        for result in run_tasks(*arguments):
            (bag / 'note.txt').write_text('seen')
            yield result

    monkeypatch.setattr('decoupled_policy_ros.data.conversion.convert.run_tasks', touched)
    report = convert([bag], tmp_path / 'out', SETTINGS, workers=1)
    assert report['totals']['bags'] == Dataset.open(tmp_path / 'out').n_episodes == 1


def test_a_recording_that_nothing_came_of_is_named(tmp_path, monkeypatch):
    bags = [write_bag(tmp_path / name, Arm(seconds=1.5).messages()) for name in ('first', 'second')]

    def forgetful(function, tasks, *others):
        return run_tasks(function, tasks[:1], *others)

    monkeypatch.setattr('decoupled_policy_ros.data.conversion.convert.run_tasks', forgetful)
    with pytest.raises(DatasetError, match='second is neither converted nor refused'):
        convert(bags, tmp_path / 'out', SETTINGS, workers=1)
    assert not (tmp_path / 'out').exists()


def test_the_reason_of_a_failure_is_said_once(tmp_path):
    bad = write_bag(tmp_path / 'bad', Arm(seconds=1.0, keep=lambda t, _: t != IMAGES['wrist']).messages())
    console = Console(file=io.StringIO(), width=400)
    with pytest.raises(DatasetError, match='no topic /wrist/image_raw'):
        convert([bad], tmp_path / 'out', SETTINGS, workers=1, console=console)
    assert 'bad can not be converted' in console.file.getvalue()
    assert 'no topic' not in console.file.getvalue()
    assert failure_lines({'a/b': 'a worker died', 'a/c': '/x/a/c is bad'}) == [
        'a/b: a worker died',
        '/x/a/c is bad',
    ]
    good = write_bag(tmp_path / 'good', Arm(seconds=1.0).messages())
    console = Console(file=io.StringIO(), width=400)
    convert([bad, good], tmp_path / 'out', SETTINGS, workers=1, skip_bad=True, console=console)
    assert console.file.getvalue().count('no topic /wrist/image_raw') == 1


def test_two_conversions_into_one_place(tmp_path):
    bag = write_bag(tmp_path / 'bag', Arm(seconds=1.0).messages())
    work = tmp_path / '.out.converting'
    work.mkdir()
    held = os.open(work, os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)  # as another conversion does
    with pytest.raises(DatasetError, match='is being converted by another process'):
        convert([bag], tmp_path / 'out', SETTINGS, workers=1)
    os.close(held)


def test_an_interrupted_run_leaves_no_unfinished_part(tmp_path):
    bag = write_bag(tmp_path / 'bag', Arm(seconds=30.0, image_hz=20.0).messages())
    process = subprocess.Popen(
        command([bag], tmp_path / 'out'),
        stdout=subprocess.DEVNULL,
        # Whoever starts tests in the background may have them ignore Ctrl-C, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob('.out.converting/bags/*.part-*')):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)  # Ctrl-C, but for this process alone
    assert process.wait(60) == 130
    assert beside(tmp_path) == ['bag']


@pytest.mark.parametrize('library', ['matplotlib', 'av'])
def test_what_is_not_installed_is_said_before_the_work(library, tmp_path, monkeypatch):
    bag = write_bag(tmp_path / 'bag', Arm(seconds=0.5).messages())
    for name in [name for name in sys.modules if name.partition('.')[0] == library]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, library, None)
    monkeypatch.setattr('decoupled_policy_ros.data.conversion.convert.make_plan', None)  # is not come to
    with pytest.raises(ModuleNotFoundError, match=library):
        convert([bag], tmp_path / 'out', replace(SETTINGS, images='h264'), workers=1)
    assert beside(tmp_path) == ['bag']


def test_a_worker_finds_a_robot_that_is_given_by_a_relative_path(tmp_path, monkeypatch):
    values = yaml.safe_load(robot_file('fr3').read_text())
    values['urdf'] = str(robot_file('fr3').parent / values['urdf'])
    (tmp_path / 'arm.yaml').write_text(yaml.safe_dump(values))
    bag = write_bag(tmp_path / 'bag', Arm(seconds=0.2).messages())
    monkeypatch.chdir(tmp_path)
    plan = make_plan([bag], ConvertSettings('arm.yaml', cameras=(), instruction=INSTRUCTION))
    task = _Work(tmp_path / 'out', plan)._task(plan.bags[0])
    monkeypatch.chdir('/')
    assert load_robot(task.robot).name == load_robot(str(tmp_path / 'arm.yaml')).name


@pytest.mark.slow
def test_a_ray_cluster_gives_the_same_dataset(tmp_path):
    pytest.importorskip('ray')
    good = write_bag(tmp_path / 'good', Arm(seconds=1.5).messages())
    bad = write_bag(tmp_path / 'bad', Arm(seconds=1.0, keep=lambda t, _: t != '/joint_states').messages())
    with ray_cluster() as (address, environment):
        clustered = subprocess.run(
            command([good, bad], tmp_path / 'clustered', '--ray', address, '--skip-bad'),
            capture_output=True,
            text=True,
            env=environment,
        )
        assert clustered.returncode == 0, clustered.stderr
        assert 'bad has no topic /joint_states' in ' '.join(clustered.stdout.split())
    convert([good], tmp_path / 'alone', replace(SETTINGS, contract=None, size=(24, 32)), workers=1)
    one, other = Dataset.open(tmp_path / 'clustered'), Dataset.open(tmp_path / 'alone')
    for name in ('action', 'observation.proprioception'):
        np.testing.assert_array_equal(one.column(name), other.column(name))
    np.testing.assert_array_equal(one.images('wrist'), other.images('wrist'))


def test_an_address_without_a_cluster(tmp_path):
    pytest.importorskip('ray')
    bag = write_bag(tmp_path / 'bag', Arm(seconds=1.0).messages())
    result = subprocess.run(
        command([bag], tmp_path / 'out', '--ray', '127.0.0.1:9'),
        capture_output=True,
        text=True,
        env={**os.environ, 'RAY_USAGE_STATS_ENABLED': '0'},
    )
    assert result.returncode == 2
    assert "no Ray cluster at '127.0.0.1:9'" in result.stderr
    assert beside(tmp_path) == ['bag']
