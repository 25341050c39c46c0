"""The training engine: several processes, accumulation, clipping, best weights, trackers, a dataset that changed."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import test_training
import torch
from accelerate import PartialState
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing import event_accumulator as accumulator
from test_training import LOOP, SMALL, losses, task_config

import decoupled_policy_ros
from decoupled_policy_ros.data.datasets.windows import Windows
from decoupled_policy_ros.errors import (
    ConfigError,
    DatasetError,
    DecoupledPolicyError,
    SimulationError,
    TrainingError,
)
from decoupled_policy_ros.policy import load_backbone, load_policy, save_backbone
from decoupled_policy_ros.policy.checkpoint import read_header
from decoupled_policy_ros.robot.description import load_robot
from decoupled_policy_ros.sim.environment import SimRobot
from decoupled_policy_ros.training import memory, processes, rollout, stage1
from decoupled_policy_ros.training.config import Optimisation, Stage1Config, ValidationConfig
from decoupled_policy_ros.training.loop import CHECKPOINT, Trainer
from decoupled_policy_ros.training.rollout import checkpoint_folder
from decoupled_policy_ros.training.runs import weights_sha256
from decoupled_policy_ros.training.scenes import EpisodeResult
from decoupled_policy_ros.training.stage1 import train_stage1
from decoupled_policy_ros.training.stage2 import train_task
from decoupled_policy_ros.training.validation import VALIDATION_SCENES, HeldOut

demonstrations = test_training.demonstrations
backbone = test_training.backbone

# Each process starts from weights of its own and leaves what it ended with beside the run.
RANK = """
import os, sys
import torch
from safetensors.torch import save_file
from decoupled_policy_ros import cli
from decoupled_policy_ros.training.loop import Trainer

run, rank, folder = Trainer.run, os.environ['RANK'], sys.argv[1]

def watched(trainer):
    run(trainer)
    save_file(trainer.module.state_dict(), f'{folder}/rank{rank}.safetensors')

seed = torch.manual_seed
torch.manual_seed = lambda value: seed(value + (1000 * int(rank) if value == 0 else 0))
Trainer.run = watched
sys.argv[:2] = ['decoupled-policy']
cli.main()
"""


def test_two_processes_compute_what_one_does_that_accumulates_two_batches(demonstrations, tmp_path):
    """Really two processes, over gloo; a single one recognises their checkpoint as its own."""
    loop = LOOP | {'steps': 4, 'checkpoint_every': 2}
    config, script = tmp_path / 'config.json', tmp_path / 'rank.py'
    config.write_text(task_config(demonstrations, SMALL, optimisation=loop).model_dump_json())
    script.write_text(RANK)
    launch = [
        sys.executable,
        '-m',
        'torch.distributed.run',
        '--standalone',
        '--nproc_per_node=2',
        str(script),
    ]
    command = ['train', 'normal', str(config), '--out', str(tmp_path / 'two')]
    run = subprocess.run([*launch, str(tmp_path), *command], capture_output=True, text=True, timeout=200)
    assert run.returncode == 0, run.stderr
    first, second = (load_file(tmp_path / f'rank{rank}.safetensors') for rank in (0, 1))
    assert all(torch.equal(first[name], value) for name, value in second.items())
    assert run.stdout.count('sha256') == 1  # one of them wrote the files

    one = task_config(demonstrations, SMALL, optimisation=loop | {'accumulate': 2})
    train_task(one, tmp_path / 'one', normal=True)
    assert losses(tmp_path / 'one') == pytest.approx(losses(tmp_path / 'two'), rel=1e-5)
    for name, value in load_file(tmp_path / 'one' / 'task.safetensors').items():
        assert torch.allclose(first[f'task.{name}'], value, atol=1e-5), name
    assert read_header(tmp_path / 'two')['provenance']['batch_size'] == 2 * LOOP['batch_size']
    assert (tmp_path / 'two' / CHECKPOINT).exists()
    train_task(one, tmp_path / 'two', normal=True)  # nothing is left to do, and it is the same run
    with pytest.raises(TrainingError, match='accumulate: 2 there, None here'):
        train_task(task_config(demonstrations, SMALL, optimisation=loop), tmp_path / 'two', normal=True)


def gradient(folder: Path, **changes) -> tuple[list[float], torch.Tensor]:
    """Losses of the batches of step 3, and the gradient that the trainer makes of them."""
    torch.manual_seed(0)
    module = torch.nn.Linear(4, 1)
    seen = []

    def loss() -> torch.Tensor:
        seen.append(torch.randn(8, 4))
        return module(seen[-1]).square().mean()

    trainer = Trainer(module, loss, Optimisation(steps=9, **changes), folder, {})
    trainer._gradients(3)
    return seen, module.weight.grad.clone()


def test_accumulated_gradients_are_the_mean_over_batches_that_all_differ(tmp_path):
    (first, second), both = gradient(tmp_path, accumulate=2)
    assert not torch.equal(first, second)
    torch.manual_seed(0)
    module = torch.nn.Linear(4, 1)
    module(torch.cat([first, second])).square().mean().backward()
    assert torch.allclose(both, module.weight.grad, rtol=1e-5)
    (alone,), _ = gradient(tmp_path)
    assert torch.equal(alone, first)


def test_bfloat16_is_float32_on_a_processor_that_does_not_multiply_it(tmp_path, monkeypatch):
    _, exact = gradient(tmp_path)
    for supported in (False, True):
        monkeypatch.setattr(torch.ops.mkldnn, '_is_mkldnn_bf16_supported', lambda has=supported: has)
        _, rounded = gradient(tmp_path, precision='bfloat16')
        assert torch.equal(rounded, exact) is not supported
        assert torch.allclose(rounded, exact, atol=0.1)
        assert trained_in(tmp_path / str(supported)) == ['cpu, bfloat16' if supported else 'cpu, float32']


def trained_in(folder: Path) -> list[str]:
    """What a run says of where it was trained, once its checkpoint is read again."""
    module, config = torch.nn.Linear(1, 1), Optimisation(steps=1, precision='bfloat16')

    def loss() -> torch.Tensor:
        return module(torch.ones(1)).sum()

    Trainer(module, loss, config, folder, {}).run()
    return Trainer(module, loss, config, folder, {}).computed_in


def test_encoders_have_a_weight_decay_of_their_own(tmp_path):
    """Without a gradient AdamW does nothing but decay: by lr times the weight decay in a step."""
    torch.manual_seed(0)
    module = torch.nn.ModuleDict({'encoder': torch.nn.Linear(4, 1), 'rest': torch.nn.Linear(4, 1)})
    before = {name: value.clone() for name, value in module.state_dict().items()}
    loop = Optimisation(
        steps=9, learning_rate=0.1, warmup_steps=0, weight_decay=0.5, encoder_weight_decay=0.02
    )
    loss_ = lambda: 0.0 * sum(p.sum() for p in module.parameters())  # noqa: E731
    trainer = Trainer(module, loss_, loop, tmp_path, {}, module['encoder'])
    trainer._step(0)
    for part, kept in (('encoder', 1 - 0.1 * 0.02), ('rest', 1 - 0.1 * 0.5)):
        for name in ('weight', 'bias'):
            torch.testing.assert_close(getattr(module[part], name), kept * before[f'{part}.{name}'])
    trainer._save()
    again = Trainer(module, loss_, loop, tmp_path, {}, module['encoder'])
    assert [group['weight_decay'] for group in again.optimiser.param_groups] == [0.5, 0.02]


def test_the_gradient_is_clipped_to_its_norm(tmp_path):
    module = torch.nn.Linear(4, 1)
    loss_ = lambda: 100 * module(torch.ones(1, 4)).square().sum()  # noqa: E731
    Trainer(module, loss_, Optimisation(steps=1, clip=0.5), tmp_path, {})._step(0)
    norm = torch.stack([p.grad.norm() for p in module.parameters()]).norm()
    assert float(norm) == pytest.approx(0.5, rel=1e-4)


HELD_OUT = {'every': 2, 'held_out': 0.25}


@pytest.mark.parametrize('normal', [False, True])
def test_the_best_weights_by_held_out_demonstrations_are_a_policy_of_their_own(
    demonstrations, backbone, tmp_path, normal
):
    """The last weights are made bad on purpose: a huge learning rate after a good start."""
    loop = LOOP | {'steps': 8, 'learning_rate': 1.0, 'warmup_steps': 8, 'batch_size': 16}
    start = SMALL if normal else backbone
    config = task_config(demonstrations, start, optimisation=loop, validation=HELD_OUT)
    train_task(config, tmp_path, normal=normal)
    scores = {row['step']: row['score'] for row in json.loads((tmp_path / 'run.json').read_text())['scores']}
    assert list(scores) == [2, 4, 6, 8]
    best = min(scores, key=scores.get)
    assert best != 8
    folder = checkpoint_folder(str(tmp_path), 'best')
    assert folder == tmp_path / 'best' and not (tmp_path / 'best.part').exists()
    provenance = read_header(folder)['provenance']
    assert (provenance['validation']['step'], provenance['validation']['score']) == (best, scores[best])
    assert provenance['data']['held_out'] == 1
    policies = [
        load_policy(f, load_robot('panda_sim'), None if normal else backbone) for f in (tmp_path, folder)
    ]
    last, good = (policy.task.conditioning.weight for policy in policies)
    assert not torch.equal(last, good)
    # These are the weights of a run that ends at that step, up to its learning rates: the average, not the last.
    assert load_file(folder / 'task.safetensors').keys() == load_file(tmp_path / 'task.safetensors').keys()


def test_validation_changes_nothing_and_a_resumed_run_has_the_same_scores(
    demonstrations, backbone, tmp_path, monkeypatch
):
    config = task_config(demonstrations, backbone, validation=HELD_OUT)
    train_task(config, tmp_path / 'whole')
    original = Trainer._step

    def dying(trainer: Trainer, step: int) -> None:
        if step == 5:
            raise KeyboardInterrupt
        original(trainer, step)

    monkeypatch.setattr(Trainer, '_step', dying)
    with pytest.raises(KeyboardInterrupt):
        train_task(config, tmp_path / 'killed')
    monkeypatch.setattr(Trainer, '_step', original)
    train_task(config, tmp_path / 'killed')
    whole, killed = (json.loads((tmp_path / name / 'run.json').read_text()) for name in ('whole', 'killed'))
    assert (killed['scores'], killed['losses']) == (whole['scores'], whole['losses'])
    for file in ('task.safetensors', 'best/task.safetensors'):
        assert (tmp_path / 'killed' / file).read_bytes() == (tmp_path / 'whole' / file).read_bytes()
    more = task_config(demonstrations, backbone, validation=HELD_OUT | {'every': 1})
    train_task(more, tmp_path / 'often')
    assert losses(tmp_path / 'often') == whole['losses']
    assert whole['scores'] == json.loads((tmp_path / 'often' / 'run.json').read_text())['scores'][1::2]


def test_what_is_held_out_is_not_drawn(demonstrations, backbone):
    robot = load_robot('panda_sim')
    config = task_config(demonstrations, backbone)
    data = test_training.load_demonstrations(config, 16, robot, 20.0)
    held = data.hold_out(0.5)
    episodes = set(data.windows.episodes(held.numpy()))
    drawn = set(data.windows.episodes(data.draw(500).numpy()))
    assert (len(episodes), len(drawn), episodes & drawn) == (2, 2, set())
    with pytest.raises(DatasetError, match=r'held_out 0.95 takes all 4 episodes'):
        data.hold_out(0.95)


@pytest.mark.sim
def test_the_best_weights_by_rollouts(demonstrations, backbone, tmp_path, monkeypatch):
    """Nothing succeeds after so few steps: of equal scores the latest weights are kept, which are the last."""
    validation = {'every': 1, 'task': 'lift', 'episodes': 1}
    loop = LOOP | {'steps': 2}
    config = task_config(
        demonstrations, backbone, vectors=['proprioception'], optimisation=loop, validation=validation
    )
    built = []
    monkeypatch.setattr(rollout, 'SimRobot', lambda *a, **k: built.append(SimRobot(*a, **k)) or built[-1])
    train_task(config, tmp_path)
    assert len(built) == 1  # before training, for all validations
    run = json.loads((tmp_path / 'run.json').read_text())
    assert [row['score'] for row in run['scores']] == [0, 0]
    note = read_header(tmp_path / 'best')['provenance']['validation']
    assert note == {'step': 2, 'score': 0.0, 'seed': 0, **validation}
    last, best = (load_file(folder / 'task.safetensors') for folder in (tmp_path, tmp_path / 'best'))
    assert all(torch.equal(best[name], value) for name, value in last.items())
    assert not list(tmp_path.glob('.validation*'))


@pytest.mark.sim
def test_the_best_weights_may_be_those_that_succeed_most_often_in_several_tasks(
    demonstrations, backbone, tmp_path, monkeypatch
):
    """Three episodes of two tasks each, of which all of one succeed: half."""
    validation = {'every': 2, 'task': ['lift', 'lift_red'], 'episodes': 3}
    loop = LOOP | {'steps': 2}
    config = task_config(
        demonstrations, backbone, vectors=['proprioception'], optimisation=loop, validation=validation
    )
    played = []

    def run_all(self, seeds):
        played.append((self.task.name, seeds))
        return [EpisodeResult(seed, self.task.name == 'lift', 1) for seed in seeds]

    monkeypatch.setattr(rollout.Rollout, 'run_all', run_all)
    train_task(config, tmp_path)
    scenes = range(VALIDATION_SCENES, VALIDATION_SCENES + 3)
    assert played == [('lift', scenes), ('lift_red', scenes)]
    note = read_header(tmp_path / 'best')['provenance']['validation']
    assert note == {'step': 2, 'score': 0.5, 'seed': 0, **validation}


@pytest.mark.sim
@pytest.mark.parametrize(
    ('task', 'message'),
    [
        (['liftt', 'lift'], "unknown simulated task 'liftt'"),
        ('liftt', "unknown simulated task 'liftt'"),
        ('mimicgen/stack_d1', 'NVlabs/mimicgen'),
    ],
)
def test_a_validation_that_can_not_work_is_refused_before_any_training(
    demonstrations, backbone, tmp_path, monkeypatch, task, message
):
    monkeypatch.setitem(sys.modules, 'mimicgen', None)
    config = task_config(demonstrations, backbone, validation={'every': 1, 'task': task})
    monkeypatch.setattr(Trainer, '_step', lambda *_: pytest.fail('it trains'))
    with pytest.raises(SimulationError, match=message):
        train_task(config, tmp_path)


@pytest.mark.sim
def test_a_policy_that_does_not_fit_the_arm_is_refused_before_any_training(
    demonstrations, backbone, tmp_path, monkeypatch
):
    """The simulator measures other objects than these demonstrations say; what a killed run left goes."""
    (tmp_path / '.validation-old').mkdir()
    config = task_config(demonstrations, backbone, validation={'every': 1, 'task': 'stack'})
    monkeypatch.setattr(Trainer, '_step', lambda *_: pytest.fail('it trains'))
    with pytest.raises(DecoupledPolicyError, match='object_state'):
        train_task(config, tmp_path)
    assert not list(tmp_path.glob('.validation*'))


@pytest.mark.sim
def test_validation_takes_no_more_steps_than_there_are(demonstrations, tmp_path):
    few = {'kind': 'squared_cosine', 'training_steps': 5}
    validation = {'every': 1, 'task': 'lift', 'episodes': 1}
    loop = LOOP | {'steps': 1}
    config = task_config(
        demonstrations,
        SMALL,
        vectors=['proprioception'],
        objective=few,
        optimisation=loop,
        validation=validation,
    )
    train_task(config, tmp_path, normal=True)
    assert len(json.loads((tmp_path / 'run.json').read_text())['scores']) == 1


def test_weights_whose_score_is_no_number_are_never_the_best(tmp_path):
    validation = ValidationConfig(every=1, held_out=0.5)
    validator = HeldOut(validation, tmp_path, lambda *_: None, torch.arange(2), lambda _: torch.zeros(()), 2)
    nan = float('nan')
    assert not validator.is_best(nan, [])
    assert validator.is_best(3.0, [nan])
    assert not validator.is_best(4.0, [nan, 3.0])


def test_the_control_is_not_trained(demonstrations, tmp_path):
    with pytest.raises(TrainingError, match='random_backbone freezes a backbone'):
        train_task(task_config(demonstrations, SMALL, random_backbone=True), tmp_path, normal=True)


def test_a_process_trains_on_one_device_after_the_other(tmp_path, monkeypatch):
    """accelerate, once it has seen a GPU, refuses to be told that a later run is to use none."""
    processes.accelerator_for(Optimisation(steps=1, device='cuda'), tmp_path)
    monkeypatch.setitem(PartialState._shared_state, 'device', torch.device('cuda'))
    assert processes.accelerator_for(Optimisation(steps=1), tmp_path).num_processes == 1


def test_a_finished_backbone_keeps_its_hash_under_another_version(backbone, tmp_path, monkeypatch):
    """Tasks hold it."""
    config = Stage1Config.model_validate(json.loads((backbone / 'run.json').read_text())['config'])
    shutil.copytree(backbone, tmp_path / 'copy')
    monkeypatch.setattr(decoupled_policy_ros, '__version__', '99')
    before = read_header(backbone)['sha256']
    assert train_stage1(config, tmp_path / 'copy') == before == read_header(tmp_path / 'copy')['sha256']
    # Another one's file in the same folder, such as from before its checkpoint was deleted, is replaced.
    other = load_backbone(backbone)
    with torch.no_grad():
        next(other.parameters()).add_(1.0)
    save_backbone(tmp_path / 'copy', other)
    written = train_stage1(config, tmp_path / 'copy')
    assert written not in (before, other.sha256)
    assert weights_sha256(load_backbone(tmp_path / 'copy')) == weights_sha256(load_backbone(backbone))


def test_stage1_notices_that_the_same_rows_are_other_motions(backbone, tmp_path, monkeypatch):
    config = Stage1Config.model_validate(json.loads((backbone / 'run.json').read_text())['config'])
    shutil.copytree(backbone, tmp_path / 'copy')
    load = stage1.load_motion_windows

    def cut_otherwise(*arguments):
        windows, provenance = load(*arguments)
        ends = windows.windows.ends.copy()
        ends[0] -= 1
        return replace(windows, windows=Windows(np.diff(ends, prepend=0), 16, 1)), provenance

    monkeypatch.setattr(stage1, 'load_motion_windows', cut_otherwise)
    with pytest.raises(TrainingError, match='episodes_sha256'):
        train_stage1(config, tmp_path / 'copy')
    older = tmp_path / 'copy' / CHECKPOINT  # from a time when that was not noted
    with safe_open(older, 'pt') as file:
        metadata, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    identity = json.loads(metadata['identity'])
    del identity['episodes_sha256']
    save_file(tensors, older, metadata | {'identity': json.dumps(identity)})
    assert train_stage1(config, tmp_path / 'copy')


def test_the_best_weights_come_back_where_a_run_was_killed_between_two_names(tmp_path):
    validation = ValidationConfig(every=1, held_out=0.5)
    validator = HeldOut(validation, tmp_path, lambda *_: None, torch.arange(2), lambda _: torch.zeros(()), 2)
    (tmp_path / 'best.before').mkdir()
    (tmp_path / 'best.before' / 'task.json').touch()
    validator.prepare()
    assert [path.name for path in tmp_path.iterdir()] == ['best']
    (tmp_path / 'best.before').mkdir()  # killed a moment later
    validator.prepare()
    assert [path.name for path in tmp_path.iterdir()] == ['best']
    assert (tmp_path / 'best' / 'task.json').exists()


@pytest.mark.parametrize('validation', [{'every': 1}, {'every': 1, 'task': 'lift', 'held_out': 0.1}])
def test_validation_is_by_one_thing(demonstrations, validation):
    with pytest.raises(ValueError, match='exactly one of task'):
        task_config(demonstrations, None, validation=validation)


def test_tensorboard_has_the_losses_and_the_scores(demonstrations, backbone, tmp_path):
    loop = LOOP | {'trackers': ['tensorboard']}
    train_task(task_config(demonstrations, backbone, optimisation=loop, validation=HELD_OUT), tmp_path)
    events = accumulator.EventAccumulator(str(tmp_path / processes.PROJECT)).Reload()
    assert [event.value for event in events.Scalars('loss')] == pytest.approx(losses(tmp_path), rel=1e-5)
    assert [event.step for event in events.Scalars('score')] == [2, 4, 6]


def test_wandb_writes_a_run_that_stays_here(demonstrations, backbone, tmp_path, monkeypatch):
    pytest.importorskip('wandb')
    monkeypatch.setenv('WANDB_MODE', 'online')  # what the run says of itself counts
    loop = LOOP | {'trackers': ['wandb']}
    train_task(task_config(demonstrations, backbone, optimisation=loop), tmp_path)
    (written,) = tmp_path.glob('wandb/offline-run-*/run-*.wandb')
    assert b'loss' in written.read_bytes()


@pytest.mark.parametrize('name', ['tensorboard', 'wandb'])
def test_a_tracker_that_is_not_installed_is_named(demonstrations, backbone, tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    config = task_config(demonstrations, backbone, optimisation=LOOP | {'trackers': [name]})
    with pytest.raises(ConfigError, match=f"'{name}' is not installed; 'pip install {name}' brings it"):
        train_task(config, tmp_path)


def test_a_dataset_that_changed_under_the_same_path_is_noticed(demonstrations, backbone, tmp_path):
    copied = tmp_path / 'demos'
    shutil.copytree(demonstrations, copied)
    config = task_config(copied, backbone)
    train_task(config, tmp_path / 'task')
    train_task(config, tmp_path / 'task')
    (file,) = copied.glob('data/*/*.parquet')
    table = pyarrow.parquet.read_table(file)
    column = table.schema.get_field_index('action')
    rows = np.stack(table['action'].to_pylist()).astype(np.float32)
    rows[17, 9] = -rows[17, 9]
    changed = pyarrow.array(rows.tolist(), type=table.schema.field(column).type)
    pyarrow.parquet.write_table(table.set_column(column, table.schema.field(column), changed), file)
    with pytest.raises(TrainingError, match=r'data_sha256: .* there, .* here'):
        train_task(config, tmp_path / 'task')
    checkpoint = tmp_path / 'task' / CHECKPOINT  # as it was written before checkpoints knew their data
    with safe_open(checkpoint, 'pt') as opened:
        metadata = opened.metadata()
    identity = json.loads(metadata['identity'])
    identity.pop('data_sha256')
    identity.pop('episodes_sha256')
    save_file(load_file(checkpoint), checkpoint, metadata | {'identity': json.dumps(identity)})
    train_task(config, tmp_path / 'task')


def test_pictures_that_do_not_fit_into_memory_are_refused_before_they_are_read(
    demonstrations, backbone, tmp_path, monkeypatch
):
    meminfo = tmp_path / 'meminfo'
    meminfo.write_text('MemTotal: 4000 kB\nMemAvailable: 1000 kB\n')
    monkeypatch.setattr(memory, 'MEMINFO', meminfo)
    config = task_config(demonstrations, backbone, cameras=['wrist'])
    with pytest.raises(
        DatasetError, match=r'frames with pictures of 84x84x3 take 0.0 GB of memory, and 0.0 GB'
    ):
        train_task(config, tmp_path / 'task')
    meminfo.write_text('MemAvailable: 2000 kB\n')  # 80 frames are 1.7 MB
    data = test_training.load_demonstrations(config, 16, load_robot('panda_sim'), 20.0)
    assert data.streams['wrist'].numel() < 2_000_000
