"""Training: configurations, exact resume after a kill, a backbone that stays frozen, EMA."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from decoupled_policy_ros import cli
from decoupled_policy_ros.data.datasets.dataset import Dataset, DatasetSpec, DatasetWriter
from decoupled_policy_ros.data.motions.motions import synth_motions
from decoupled_policy_ros.data.motions.recorder import MotionRecorder, MotionSettings
from decoupled_policy_ros.errors import ConfigError, DatasetError, FingerprintMismatch, TrainingError
from decoupled_policy_ros.observation.proprioception import Proprioception
from decoupled_policy_ros.policy import load_backbone, load_policy, save_backbone
from decoupled_policy_ros.policy.encoders import ObservationEncoder
from decoupled_policy_ros.robot.description import load_robot
from decoupled_policy_ros.robot.kinematics import Kinematics
from decoupled_policy_ros.training import stage2
from decoupled_policy_ros.training.config import Stage1Config, Stage2Config, load_config
from decoupled_policy_ros.training.loop import Trainer, ema_decay, learning_rate
from decoupled_policy_ros.training.runs import diffusion_loss
from decoupled_policy_ros.training.sources import load_demonstrations, load_motion_windows
from decoupled_policy_ros.training.stage1 import train_stage1
from decoupled_policy_ros.training.stage2 import train_task

SMALL = {'kind': 'dp_mlp', 'width': 32, 'hidden': 64, 'blocks': 2, 'time_width': 16}
LOOP = {'steps': 6, 'batch_size': 4, 'warmup_steps': 2, 'checkpoint_every': 2, 'threads': 1}


@pytest.fixture(scope='module')
def demonstrations(tmp_path_factory) -> Path:
    """Four short episodes whose motion is synthetic and whose pictures are noise."""
    robot = load_robot('panda_sim')
    proprioception = Proprioception(robot, Kinematics(robot))
    root = tmp_path_factory.mktemp('data') / 'demos'
    rng = np.random.default_rng(0)
    writer = DatasetWriter(root, DatasetSpec.of(robot, 20.0, {'wrist': (84, 84)}, {'object_state': 3}))
    for motion in synth_motions(robot, 4, 0, 20.0):
        n = min(len(motion), 20)
        width = robot.gripper.width_from_normalised(motion.joint_positions[:n, -1])
        joints = np.column_stack([motion.joint_positions[:n, :7], width / 2, -width / 2]).astype(float)
        writer.add_episode(
            'do nothing in particular',
            True,
            {
                'observation.joint_positions': joints,
                'observation.proprioception': proprioception.many(joints),
                'observation.pose': motion.actions[:n],
                'action': motion.actions[:n],
                'observation.object_state': rng.normal(size=(n, 3)).astype(np.float32),
                'observation.images.wrist': rng.integers(0, 256, (n, 84, 84, 3), np.uint8),
            },
        )
    writer.close()
    return root


@pytest.fixture(scope='module')
def backbone(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp('backbone') / 'small'
    config = Stage1Config.model_validate(
        {
            'name': 'small',
            'robot': 'panda_sim',
            'sources': [{'synthetic': 5}],
            'backbone': SMALL,
            'optimisation': LOOP,
        }
    )
    train_stage1(config, out)
    return out


def task_config(demonstrations: Path, backbone: Path | dict | None, **changes) -> Stage2Config:
    values = {
        'name': 'task',
        'robot': 'panda_sim',
        'dataset': str(demonstrations),
        'backbone': str(backbone) if isinstance(backbone, Path) else backbone,
        'vectors': ['proprioception', 'object_state'],
        'optimisation': LOOP,
        **changes,
    }
    return Stage2Config.model_validate(values)


def losses(folder: Path) -> list[float]:
    return json.loads((folder / 'run.json').read_text())['losses']


def test_stage1_leaves_a_backbone_that_says_where_it_comes_from(backbone):
    loaded = load_backbone(backbone)
    assert loaded.provenance['stage'] == 'stage1'
    assert loaded.provenance['data']['sources'][0]['synthetic'] == 5
    assert loaded.provenance['computed_in'] == ['cpu, float32']
    assert loaded.provenance['data']['sources'][0]['frames'] > 20
    assert len(losses(backbone)) == LOOP['steps']
    assert (backbone / 'loss.png').stat().st_size > 1000
    low, high = loaded.normaliser.position_range_m
    assert all(a < b for a, b in zip(low, high, strict=True))


def test_stage1_learns_from_demonstrations_too(demonstrations, tmp_path):
    config = Stage1Config.model_validate(
        {
            'name': 'b',
            'robot': 'panda_sim',
            'sources': [{'demonstrations': str(demonstrations)}],
            'backbone': SMALL,
            'optimisation': LOOP | {'steps': 300, 'batch_size': 32, 'learning_rate': 1e-3},
        }
    )
    train_stage1(config, tmp_path)
    assert np.mean(losses(tmp_path)[-20:]) < 0.7 * np.mean(losses(tmp_path)[:20])


def record(folder: Path, rate_hz: float, max_gap_s: float = 10.0) -> Path:
    """Six seconds of a moving arm whose joint states come at this rate, as the recorder keeps them."""
    robot = load_robot('panda_sim')
    time_s = np.arange(0, 6, 1 / rate_hz)
    joints = np.tile(np.append(robot.home_rad, -1.0), (len(time_s), 1))
    joints[:, 0] += 0.2 * np.sin(time_s)
    recorder = MotionRecorder(folder, robot, MotionSettings(max_gap_s=max_gap_s))
    recorder.push((time_s * 1e9).astype(np.int64), joints)
    recorder.finish()
    return folder


def recorded_config(folder: Path) -> Stage1Config:
    return Stage1Config.model_validate(
        {'name': 'b', 'robot': 'panda_sim', 'sources': [{'recorded': str(folder)}], 'optimisation': LOOP}
    )


def test_what_the_recorder_joins_into_one_motion_training_does_not_cut(tmp_path):
    folder = record(tmp_path, 7.0, MotionSettings().max_gap_s)
    windows, (provenance,) = load_motion_windows(recorded_config(folder), load_robot('panda_sim'))
    assert provenance['motions'] == 1
    assert 90 < len(windows.actions) <= 120


def test_recordings_without_a_usable_piece_are_refused_with_the_reason(tmp_path):
    folder = record(tmp_path, 5.0)
    with pytest.raises(
        DatasetError, match=r'samples are 0\.2 s apart.* no two samples are more than 0\.15 s apart'
    ):
        load_motion_windows(recorded_config(folder), load_robot('panda_sim'))


def test_stage2_trains_the_task_and_leaves_every_byte_of_the_backbone(demonstrations, backbone, tmp_path):
    before = (backbone / 'backbone.safetensors').read_bytes()
    train_task(
        task_config(
            demonstrations, backbone, cameras=['wrist'], encoder={'base_channels': 16, 'keypoints': 4}
        ),
        tmp_path / 'task',
    )
    assert (backbone / 'backbone.safetensors').read_bytes() == before
    run = json.loads((tmp_path / 'task' / 'run.json').read_text())
    assert run['backbone_weights_sha256']['before'] == run['backbone_weights_sha256']['after']
    policy = load_policy(tmp_path / 'task', load_robot('panda_sim'), backbone)
    assert policy.task.instruction == 'do nothing in particular'
    assert policy.contract.names == ('wrist', 'proprioception', 'object_state')
    assert policy.contract.stream('wrist').shape == (84, 84, 3)


def test_a_backbone_that_changes_in_stage2_is_noticed(demonstrations, backbone, tmp_path, monkeypatch):
    original = diffusion_loss

    def meddling(backbone, *rest):
        with torch.no_grad():
            backbone.denoiser.head.bias += 1e-3
        return original(backbone, *rest)

    monkeypatch.setattr(stage2, 'diffusion_loss', meddling)
    with pytest.raises(TrainingError, match='the frozen backbone changed'):
        train_task(task_config(demonstrations, backbone), tmp_path)
    assert not (tmp_path / 'task.json').exists()


@pytest.mark.parametrize('normal', [True, False], ids=['normal', 'random-frozen'])
def test_a_backbone_without_stage1_is_written_beside_its_task(demonstrations, tmp_path, normal):
    config = task_config(demonstrations, SMALL, random_backbone=not normal)
    train_task(config, tmp_path, normal=normal)
    policy = load_policy(tmp_path, load_robot('panda_sim'))
    trained = json.loads((tmp_path / 'run.json').read_text())['trained_parameters']
    sizes = [sum(p.numel() for p in module.parameters()) for module in (policy.task, policy.backbone)]
    assert trained == (sum(sizes) if normal else sizes[0])


DYING = """
import os, signal, sys
from decoupled_policy_ros import cli
from decoupled_policy_ros.training.loop import Trainer

step_of_trainer = Trainer._step

def step(self, number):
    if number == 17:
        os.kill(os.getpid(), signal.SIGKILL)
    step_of_trainer(self, number)

Trainer._step = step
cli.main()
"""


def test_a_killed_run_resumes_with_the_same_losses(demonstrations, backbone, tmp_path, monkeypatch):
    """The process dies by SIGKILL between two checkpoints, and the same command is given again."""
    settings = tmp_path / 'task.yaml'
    config = task_config(demonstrations, backbone, optimisation=LOOP | {'steps': 24, 'checkpoint_every': 7})
    settings.write_text(config.model_dump_json())
    command = ['train', 'stage2', str(settings), '--out']
    process = subprocess.run(
        [sys.executable, '-c', DYING, *command, str(tmp_path / 'killed')], stdout=subprocess.DEVNULL
    )
    assert process.returncode == -signal.SIGKILL
    assert not (tmp_path / 'killed' / 'task.json').exists()
    trained, original = [], Trainer._step

    def watched(trainer: Trainer, step: int) -> None:
        trained.append(step)
        original(trainer, step)

    monkeypatch.setattr(Trainer, '_step', watched)
    for name in ('killed', 'whole'):
        assert command_line(monkeypatch, *command, str(tmp_path / name)) == 0
    assert trained == [*range(14, 24), *range(24)]
    assert losses(tmp_path / 'killed') == losses(tmp_path / 'whole')
    assert (tmp_path / 'killed' / 'task.safetensors').read_bytes() == (
        tmp_path / 'whole' / 'task.safetensors'
    ).read_bytes()


def test_a_checkpoint_of_another_configuration_is_refused_naming_what_differs(
    demonstrations, backbone, tmp_path
):
    train_task(task_config(demonstrations, backbone), tmp_path)
    with pytest.raises(TrainingError, match='batch_size: 4 there, 5 here'):
        train_task(task_config(demonstrations, backbone, optimisation=LOOP | {'batch_size': 5}), tmp_path)


def test_a_damaged_checkpoint_is_named(demonstrations, backbone, tmp_path):
    (tmp_path / 'checkpoint.safetensors').write_bytes(b'nothing of use')
    with pytest.raises(TrainingError, match='damaged'):
        train_task(task_config(demonstrations, backbone), tmp_path)


def test_a_dataset_without_the_camera_is_refused(demonstrations, backbone, tmp_path):
    with pytest.raises(DatasetError, match='overhead'):
        train_task(task_config(demonstrations, backbone, cameras=['overhead']), tmp_path)


@pytest.mark.parametrize(
    ('robot', 'rate_hz', 'values'),
    [('fr3', 20.0, ('panda_base', 'fr3_link0')), ('panda_sim', 10.0, ('has 20.0', 'has 10.0'))],
    ids=['arm', 'rate'],
)
def test_a_dataset_of_another_arm_or_rate_is_refused_with_both_values(demonstrations, robot, rate_hz, values):
    with pytest.raises(FingerprintMismatch) as caught:
        load_demonstrations(task_config(demonstrations, None), 16, load_robot(robot), rate_hz)
    for value in (str(demonstrations), *values):
        assert value in str(caught.value)


def turned_home(robot):
    """The robot with a home whose hand is turned by a third of a turn, and whose quaternion is on the other side."""
    return replace(robot, home_rad=robot.home_rad - np.eye(7)[3] * 2.0)


def test_a_task_keeps_the_quaternion_that_it_was_trained_with(demonstrations, backbone, tmp_path):
    train_task(task_config(demonstrations, backbone), tmp_path / 'task')
    robot = load_robot('panda_sim')
    contract = load_policy(tmp_path / 'task', robot, backbone).contract
    seen = Dataset.open(demonstrations).column('observation.proprioception', 0)
    joints = Dataset.open(demonstrations).column('observation.joint_positions', 0)
    moved = turned_home(robot)
    assert Proprioception(moved, Kinematics(moved))(joints[0])[3:7] @ seen[0, 3:7] < 0
    kept = Proprioception(moved, Kinematics(moved), contract.near_quat_xyzw)
    np.testing.assert_allclose(kept.many(joints), seen, atol=1e-6)


def test_a_dataset_with_the_other_quaternions_is_refused(demonstrations):
    moved = turned_home(load_robot('panda_sim'))
    with pytest.raises(DatasetError, match=r'the first is 0, the quaternion.*another home_rad') as caught:
        load_demonstrations(task_config(demonstrations, None), 16, moved, 20.0)
    assert str(demonstrations) in str(caught.value)
    load_demonstrations(task_config(demonstrations, None, vectors=['object_state']), 16, moved, 20.0)


def test_a_backbone_of_another_arm_is_refused_before_training(demonstrations, backbone, tmp_path):
    with pytest.raises(FingerprintMismatch, match=r"backbone 'small'.*robot 'fr3'"):
        train_task(task_config(demonstrations, backbone, robot='fr3'), tmp_path)


@pytest.mark.parametrize('beyond_m', [-0.0015, 0.0015], ids=['below', 'above'])
def test_demonstrations_outside_the_backbones_range_are_refused(demonstrations, backbone, tmp_path, beyond_m):
    """Sampling clips to the range, so a policy could never go where these demonstrations go."""
    loaded, actions = load_backbone(backbone), Dataset.open(demonstrations).column('action')
    row = actions[:, 1].argmin() if beyond_m < 0 else actions[:, 1].argmax()
    corners = np.zeros((2, 10))
    corners[:, :3] = actions[:, :3].min(0), actions[:, :3].max(0)
    corners[0 if beyond_m < 0 else 1, 1] -= beyond_m
    loaded.normaliser.fit(corners)
    save_backbone(tmp_path / 'narrow', loaded)
    with pytest.raises(TrainingError, match=rf'y [^,]*{actions[row, 1]:.3f}.*can express'):
        train_task(task_config(demonstrations, tmp_path / 'narrow'), tmp_path / 'task')
    corners[0 if beyond_m < 0 else 1, 1] += beyond_m / 2
    loaded.normaliser.fit(corners)
    save_backbone(tmp_path / 'narrow', loaded)
    train_task(task_config(demonstrations, tmp_path / 'narrow'), tmp_path / 'task')


def test_a_device_that_is_not_there_is_refused_before_data_is_read(tmp_path):
    loop = LOOP | {'device': 'cuda:99'}
    missing = {'name': 'b', 'robot': 'panda_sim', 'sources': [{'recorded': 'no/such/folder'}]}
    with pytest.raises(ConfigError, match=r"device 'cuda:99' is not usable here .*valid: cpu"):
        train_stage1(Stage1Config.model_validate({**missing, 'optimisation': loop}), tmp_path)
    with pytest.raises(ConfigError, match=r"device 'cuda:99' is not usable here .*valid: cpu"):
        train_task(task_config(tmp_path / 'missing', None, optimisation=loop), tmp_path)


def test_a_crop_larger_than_the_image_is_refused(demonstrations, backbone, tmp_path):
    config = task_config(
        demonstrations, backbone, cameras=['wrist'], encoder={'crop': 85, 'base_channels': 16}
    )
    with pytest.raises(ConfigError, match=r"encoder.crop is 85 pixels.*'wrist' are 84x84; valid: 1 to 84"):
        train_task(config, tmp_path)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    module = torch.nn.Linear(1, 1)
    loop = task_config(tmp_path, None).optimisation
    with pytest.raises(TrainingError, match='loss of step 0 is nan'):
        Trainer(module, lambda: module.weight.sum() * float('nan'), loop, tmp_path, {}).run()


def test_the_average_follows_the_weights_with_the_papers_decay(tmp_path):
    """After n updates the average equals the recursion, computed here by hand."""
    module = torch.nn.Linear(1, 1, bias=False)
    loop = task_config(tmp_path, None).optimisation
    trainer = Trainer(module, lambda: module.weight.sum(), loop, tmp_path, {})
    expected, seen = None, []
    original = trainer._step

    def recorded(step: int) -> None:
        original(step)
        seen.append(float(module.weight.detach()))

    trainer._step = recorded
    trainer.run()
    for n, weight in enumerate(seen):
        decay = ema_decay(n, 0.75, 0.9999)
        expected = weight if expected is None else decay * expected + (1 - decay) * weight
    assert float(module.weight.detach()) == pytest.approx(expected, rel=1e-5)
    assert seen[-1] != pytest.approx(expected, rel=1e-5)


def test_decay_and_learning_rate_at_the_ends():
    loop = Stage2Config.model_validate(
        {'name': 'x', 'robot': 'r', 'dataset': 'd', 'optimisation': {'steps': 1000, 'warmup_steps': 100}}
    ).optimisation
    assert ema_decay(0, 0.75, 0.9999) == 0
    assert ema_decay(10**9, 0.75, 0.9999) == 0.9999
    assert learning_rate(0, loop) == pytest.approx(1e-6)
    assert learning_rate(100, loop) == pytest.approx(1e-4)
    assert learning_rate(999, loop) < 1e-9


@pytest.mark.parametrize(
    ('values', 'message'),
    [
        ('name: x', 'robot: Field required'),
        (
            '{name: x, robot: r, dataset: d, optimisation: {steps: 0}}',
            r'optimisation.steps: .*greater than 0 \(got 0\)',
        ),
        ('{name: x, robot: r, dataset: d, optimisation: {steps: 1}, camras: [a]}', 'camras: Extra inputs'),
        (
            '{name: x, robot: r, dataset: d, optimisation: {steps: 1}, encoder: {base_channels: 20}}',
            'multiple of 16',
        ),
        ('[]', 'must hold a mapping'),
        ('{', "can't be read"),
    ],
)
def test_bad_configurations_are_refused_by_key(tmp_path, values, message):
    path = tmp_path / 'config.yaml'
    path.write_text(values)
    with pytest.raises(ConfigError, match=message):
        load_config(path, Stage2Config)


def test_a_configuration_that_is_not_utf8_is_refused(tmp_path):
    path = tmp_path / 'config.yaml'
    path.write_bytes('name: Gänsemarsch'.encode('latin-1'))
    with pytest.raises(ConfigError, match=r"config.yaml can't be read: 'utf-8'"):
        load_config(path, Stage2Config)


@pytest.mark.parametrize(
    ('override', 'message'),
    [
        ('name.x=1', r"name.x: name is no section with keys but 'x'"),
        ('sources.0.recorded=x', r'sources.0.recorded: sources is no section'),
        ('optimisation.seed.deeper.still=1', r'optimisation.seed is no section with keys but 3'),
        ('optimisation.seed=[', r"--set optimisation.seed: '\[' is not YAML"),
        (
            'optimisation.seed=2026-02-31',
            r"--set optimisation.seed: '2026-02-31' is not YAML: day is out of range",
        ),
        ('optimisation.seed=one', r"optimisation.seed: .*integer.*\(got 'one'\)"),
        ('optimisation.sede=1', 'optimisation.sede: Extra inputs'),
        ('optimisation.seed=-1', r'optimisation.seed: .*greater than or equal to 0 \(got -1\)'),
        ('optimisation.betas=[1.5, 0.9]', r'optimisation.betas.0: .*less than 1 \(got 1.5\)'),
    ],
)
def test_overrides_that_do_not_fit_are_refused_by_key(tmp_path, override, message):
    path = tmp_path / 'config.yaml'
    path.write_text('{name: x, robot: r, sources: [{synthetic: 3}], optimisation: {steps: 1, seed: 3}}')
    with pytest.raises(ConfigError, match=message):
        load_config(path, Stage1Config, cli.parse_overrides((override,)))


def test_overrides_reach_into_sections_and_make_those_that_are_missing(tmp_path):
    path = tmp_path / 'config.yaml'
    path.write_text('{name: x, robot: r, sources: [{synthetic: 3}], optimisation: {steps: 1}}')
    overrides = cli.parse_overrides(('optimisation.seed=42', 'backbone.width=8'))
    config = load_config(path, Stage1Config, overrides)
    assert (config.optimisation.seed, config.backbone.width) == (42, 8)


def test_a_source_is_exactly_one_thing(tmp_path):
    path = tmp_path / 'config.yaml'
    path.write_text(
        '{name: x, robot: r, sources: [{synthetic: 3, recorded: here}], optimisation: {steps: 1}}'
    )
    with pytest.raises(ConfigError, match='exactly one of'):
        load_config(path, Stage1Config)


def test_shipped_configurations_are_valid(repository):
    for path in sorted((repository / 'config' / 'training').glob('*.yaml')):
        load_config(path, Stage1Config if path.name.startswith('backbone') else Stage2Config)


def command_line(monkeypatch, *arguments: str) -> int:
    """Exit status of the command in this process: importing everything anew takes longer than any of the tests."""
    monkeypatch.setattr(sys, 'argv', ['decoupled-policy', *arguments])
    try:
        cli.main()
    except SystemExit as leaving:
        return int(leaving.code or 0)
    return 0


def test_a_folder_with_brackets_in_its_name_is_named_as_it_is(tmp_path, monkeypatch, capsys):
    """rich would take them for its markup."""
    monkeypatch.setenv('COLUMNS', '500')
    config = {
        'name': 'x',
        'robot': 'panda_sim',
        'sources': [{'synthetic': 2}],
        'backbone': SMALL,
        'optimisation': LOOP,
    }
    (tmp_path / 'config.yaml').write_text(json.dumps(config))
    out = tmp_path / '[stack]' / '[/x]'
    assert command_line(monkeypatch, 'train', 'stage1', str(tmp_path / 'config.yaml'), '--out', str(out)) == 0
    assert f'{out}: sha256 ' in capsys.readouterr().out


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['train', 'stage2', 'missing.yaml', '--out', 'here'], 'missing.yaml'),
        (['inspect', '.'], 'no backbone.json or task.json'),
        (['train', 'stage1', 'x.yaml', '--out', 'y', '--set', 'nonsense'], "got 'nonsense'"),
        (
            ['train', 'stage1', 'x.yaml', '--out', 'y', '--set', 'optimisation.seed=['],
            "optimisation.seed: '['",
        ),
    ],
)
def test_the_command_line_reports_a_mistake_in_one_line(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert command_line(monkeypatch, *arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith('error: ') and error.count('\n') == 1
    assert message in error


def test_an_output_folder_that_can_not_be_made_is_reported_before_training(
    demonstrations, backbone, tmp_path, monkeypatch, capsys
):
    settings, file = tmp_path / 'task.yaml', tmp_path / 'a_file'
    file.write_text('in the way')
    settings.write_text(task_config(demonstrations, backbone).model_dump_json())
    monkeypatch.setattr(Trainer, '_step', lambda trainer, step: pytest.fail('a step was trained'))
    assert command_line(monkeypatch, 'train', 'stage2', str(settings), '--out', str(file / 'out')) == 2
    assert capsys.readouterr().err == f'error: {file / "out"}: Not a directory\n'


def test_a_checkpoint_that_can_not_be_written_is_named(tmp_path):
    module = torch.nn.Linear(1, 1)
    (tmp_path / 'checkpoint.safetensors.part').mkdir()
    with pytest.raises(TrainingError, match=r"checkpoint.safetensors.part can't be written"):
        Trainer(
            module, lambda: module.weight.sum(), task_config(tmp_path, None).optimisation, tmp_path, {}
        ).run()


@pytest.mark.parametrize(
    ('module', 'arguments', 'extra'),
    [
        ('pydantic', ['train', 'stage1', 'x.yaml', '--out', 'y'], '[train]'),
        ('rclpy', ['demo'], '[ros]'),
    ],
)
def test_a_missing_module_is_named_with_the_extra_that_brings_it(tmp_path, module, arguments, extra):
    code = f'import sys; sys.modules[{module!r}] = None; from decoupled_policy_ros import cli; cli.main()'
    run = subprocess.run(
        [sys.executable, '-c', code, *arguments], capture_output=True, text=True, cwd=tmp_path
    )
    assert run.returncode == 2
    assert run.stderr.startswith('error: ') and run.stderr.count('\n') == 1
    assert module in run.stderr and extra in run.stderr


def test_inspect_prints_the_whole_header(backbone, monkeypatch, capsys):
    assert command_line(monkeypatch, 'inspect', str(backbone)) == 0
    assert json.loads(capsys.readouterr().out) == json.loads((backbone / 'backbone.json').read_text())


def test_each_chunk_is_trained_beside_its_own_observations(demonstrations, backbone, tmp_path, monkeypatch):
    """A chunk begins with the frame of the first observation: its first two waypoints are of the two frames seen."""
    seen, trained = [], []
    forward, loss = ObservationEncoder.forward, stage2.diffusion_loss

    def watched(encoder, observation):
        seen.append(observation['object_state'])
        return forward(encoder, observation)

    def learned(backbone, conditioning, actions, features, samples):
        trained.append(actions)
        return loss(backbone, conditioning, actions, features, samples)

    monkeypatch.setattr(ObservationEncoder, 'forward', watched)
    monkeypatch.setattr(stage2, 'diffusion_loss', learned)
    train_task(task_config(demonstrations, backbone), tmp_path)
    assert len(trained) == LOOP['steps']
    data = load_demonstrations(task_config(demonstrations, backbone), 16, load_robot('panda_sim'), 20.0)
    states, actions = data.streams['object_state'], data.actions
    for observed, chunk in zip(torch.cat(seen), torch.cat(trained), strict=True):
        frames = [int((states == state).all(dim=1).nonzero()) for state in observed]  # no two are the same
        assert torch.equal(chunk[:2], actions[frames].float())
