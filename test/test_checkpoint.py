"""Backbone and task files: what was saved comes back, and everything that does not fit is refused."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from decoupled_policy_ros.errors import CheckpointError, ConfigError, FingerprintMismatch
from decoupled_policy_ros.policy import (
    Task,
    load_backbone,
    load_policy,
    load_task,
    save_backbone,
    save_task,
)
from decoupled_policy_ros.policy.checkpoint import find_model, summarise_task
from decoupled_policy_ros.policy.model_files import identity
from decoupled_policy_ros.robot.description import load_robot
from decoupled_policy_ros.robot.fingerprint import Fingerprint


def rewrite(folder: Path, kind: str, weights: dict[str, torch.Tensor]) -> None:
    """Replace the weights and make the hashes fit again, as a careful forger would."""
    save_file(weights, folder / f'{kind}.safetensors')
    header = json.loads((folder / f'{kind}.json').read_text())
    header['weights_sha256'] = hashlib.sha256((folder / f'{kind}.safetensors').read_bytes()).hexdigest()
    header['sha256'] = identity(header)
    (folder / f'{kind}.json').write_text(json.dumps(header))


def test_a_backbone_comes_back_bit_for_bit_and_frozen(small_backbone, tmp_path):
    sha256 = save_backbone(tmp_path, small_backbone)
    loaded = load_backbone(tmp_path)
    assert loaded.sha256 == sha256
    assert loaded.fingerprint == small_backbone.fingerprint
    assert loaded.denoiser.config == small_backbone.denoiser.config
    for name, value in small_backbone.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    assert not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())


def test_a_task_in_half_precision_is_half_the_size_and_keeps_its_statistics(small_policy, tmp_path):
    task = small_policy.task
    task.encoder.streams['proprioception'].normaliser.fit([[0.123456] * 9, [0.654321] * 9])
    save_task(tmp_path / 'whole', task)
    save_task(tmp_path / 'half', task, 'float16')
    whole, half = ((tmp_path / which / 'task.safetensors').stat().st_size for which in ('whole', 'half'))
    assert half < 0.55 * whole
    loaded = load_task(tmp_path / 'half', small_policy.backbone)
    for name, value in task.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], value, rtol=1e-3, atol=1e-7)
    assert torch.equal(
        loaded.encoder.streams['proprioception'].normaliser.scale,
        task.encoder.streams['proprioception'].normaliser.scale,
    )


@pytest.mark.parametrize('kind', ['backbone', 'task'])
@pytest.mark.parametrize('suffix', ['json', 'safetensors'])
def test_one_changed_byte_is_refused_with_both_hashes(small_policy_folders, kind, suffix):
    folder = small_policy_folders[0 if kind == 'backbone' else 1]
    path = folder / f'{kind}.{suffix}'
    data = bytearray(path.read_bytes())
    at = data.rindex(b'"name"') + 9 if suffix == 'json' else len(data) - 5
    data[at] ^= 1
    path.write_bytes(data)
    with pytest.raises(
        CheckpointError, match=r'changed or truncated: sha256 is [0-9a-f]{64}, .* [0-9a-f]{64}'
    ):
        load_policy(small_policy_folders[1], load_robot('panda_sim'), small_policy_folders[0])


def test_a_truncated_file_is_refused(small_policy_folders):
    path = small_policy_folders[1] / 'task.safetensors'
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match='changed or truncated'):
        load_policy(small_policy_folders[1], load_robot('panda_sim'))


@pytest.mark.parametrize('missing', ['backbone.json', 'backbone.safetensors'])
def test_a_missing_file_is_named(small_policy_folders, missing):
    (small_policy_folders[0] / missing).unlink()
    with pytest.raises(CheckpointError, match=f'{missing} is missing'):
        load_policy(small_policy_folders[1], load_robot('panda_sim'))


def test_missing_unknown_and_misshapen_weights_are_named(small_policy_folders):
    folder = small_policy_folders[0]
    weights = load_file(folder / 'backbone.safetensors')
    head = weights.pop('denoiser.head.weight')
    rewrite(folder, 'backbone', {**weights, 'foreign': torch.ones(1)})
    with pytest.raises(CheckpointError, match=r"missing weights \['denoiser.head.weight'\].*\['foreign'\]"):
        load_backbone(folder)
    rewrite(folder, 'backbone', {**weights, 'denoiser.head.weight': head[:5].contiguous()})
    with pytest.raises(CheckpointError, match=r'head.weight has shape \(5, 32\), expected \(10, 32\)'):
        load_backbone(folder)


def test_a_task_on_another_backbone_is_refused_with_both_hashes(
    small_policy_folders, small_backbone, tmp_path
):
    right = small_backbone.sha256
    with torch.no_grad():
        small_backbone.denoiser.head.bias += 1
    wrong = save_backbone(tmp_path / 'other', small_backbone)
    with pytest.raises(CheckpointError, match=f'{right}.*{wrong}'):
        load_policy(small_policy_folders[1], load_robot('panda_sim'), tmp_path / 'other')


def test_another_arm_is_refused_with_both_values(small_policy_folders):
    with pytest.raises(FingerprintMismatch) as caught:
        load_policy(small_policy_folders[1], load_robot('fr3'))
    for value in ('panda_base', 'fr3_link0', 'joint1', 'fr3_joint1'):
        assert value in str(caught.value)


def test_a_foreign_format_or_kind_is_refused(small_policy_folders):
    folder = small_policy_folders[0]
    original = (folder / 'backbone.json').read_text()
    for key, value, message in (
        ('format', 'pickle', 'format and version'),
        (
            'network',
            {'kind': 'os.system'},
            "unknown backbone kind 'os.system'; valid: dp_mlp, dp_mixer, dp_c, dp_t",
        ),
        ('network', {'kind': 'dp_mlp', 'depth': 3}, 'does not describe a model'),
    ):
        header = json.loads(original) | {key: value}
        header['sha256'] = identity(header)
        (folder / 'backbone.json').write_text(json.dumps(header))
        with pytest.raises(CheckpointError, match=message):
            load_backbone(folder)


def test_a_name_that_is_no_model_lists_what_there_is():
    with pytest.raises(CheckpointError, match="'no_such_task'"):
        load_policy('no_such_task', load_robot('panda_sim'))


def test_a_backbone_given_as_a_task_is_named_as_such(small_policy_folders):
    for backbone in (None, small_policy_folders[0]):
        with pytest.raises(CheckpointError, match=r'small is a backbone; .* task\.json'):
            load_policy(small_policy_folders[0], load_robot('panda_sim'), backbone)


def test_a_task_takes_the_backbone_in_its_own_folder_first(small_policy_folders, small_backbone):
    """As normal training leaves it; the one beside has the same name and other weights."""
    beside, task = small_policy_folders
    beside.rename(task / 'backbone')
    with torch.no_grad():
        small_backbone.denoiser.head.bias += 1
    save_backbone(beside, small_backbone)
    policy = load_policy(task, load_robot('panda_sim'))
    assert policy.backbone.sha256 == json.loads((task / 'backbone' / 'backbone.json').read_text())['sha256']


def test_best_weights_take_the_backbone_that_the_last_ones_take(small_policy_folders):
    backbone, task = small_policy_folders
    shutil.copytree(task, task / 'best')
    policy = load_policy(task / 'best', load_robot('panda_sim'))
    assert policy.backbone.sha256 == json.loads((backbone / 'backbone.json').read_text())['sha256']


def test_a_task_can_only_be_saved_over_a_saved_backbone(small_policy, tmp_path):
    small_policy.task.backbone_sha256 = None
    with pytest.raises(CheckpointError, match='only after its backbone was'):
        save_task(tmp_path, small_policy.task)


def edit(folder: Path, kind: str, **values: object) -> None:
    """Replace values of a header and make its hash fit again."""
    header = json.loads((folder / f'{kind}.json').read_text()) | values
    header['sha256'] = identity(header)
    (folder / f'{kind}.json').write_text(json.dumps(header))


def test_a_task_is_summarised_from_its_header(small_policy_folders, small_backbone, image_contract):
    summary = summarise_task(small_policy_folders[1], small_backbone)
    assert (summary.name, summary.instructions, summary.has_language) == (
        'small_task',
        ('lift the red cube',),
        False,
    )
    assert (summary.folder, summary.contract) == (small_policy_folders[1].resolve(), image_contract)
    weights = small_policy_folders[1] / 'task.safetensors'
    weights.write_bytes(b'broken')  # nobody looks at it
    assert summarise_task(small_policy_folders[1], small_backbone) == summary
    weights.unlink()
    with pytest.raises(CheckpointError, match=r'task\.safetensors is missing'):
        summarise_task(small_policy_folders[1], small_backbone)


def test_a_header_that_does_not_fit_is_refused_without_the_weights(small_policy_folders, small_backbone):
    backbone, folder = small_policy_folders
    original = (folder / 'task.json').read_text()
    fr3 = Fingerprint.of(load_robot('fr3'), 20.0)
    for values, error, message in (
        ({'backbone': {'name': 'other', 'sha256': 'f00'}}, CheckpointError, 'f00.*' + small_backbone.sha256),
        ({'backbone': 'other'}, CheckpointError, 'trained on backbone other'),
        ({'fingerprint': fr3.to_dict()}, FingerprintMismatch, 'fr3_link0.*panda_base'),
        ({'contract': {}}, CheckpointError, 'does not describe a model'),
        ({'format': 'pickle'}, CheckpointError, 'format and version'),
    ):
        edit(folder, 'task', **values)
        with pytest.raises(error, match=message):
            summarise_task(folder, small_backbone)
        (folder / 'task.json').write_text(original)
    for text, message in (('{"format": ', "can't be read"), (original.replace('84', '85', 1), 'changed')):
        (folder / 'task.json').write_text(text)
        with pytest.raises(CheckpointError, match=message):
            summarise_task(folder, small_backbone)
    for name, message in (('x' * 300, 'neither a folder'), ('x' * 100_000, 'at most 1000 characters')):
        with pytest.raises(CheckpointError, match=message):
            summarise_task(name, small_backbone)
    with pytest.raises(CheckpointError, match=r'task\.json is missing'):
        summarise_task(backbone, small_backbone)


@pytest.mark.parametrize('n_execute', [0, 16])
def test_a_task_that_executes_more_than_a_chunk_has_is_refused(small_backbone, image_contract, n_execute):
    longest = small_backbone.denoiser.horizon - image_contract.n_obs_steps + 1
    with pytest.raises(ConfigError, match=f'n_execute is {n_execute}, .* 1 to {longest} can be executed'):
        Task(image_contract, small_backbone, {'base_channels': 16}, n_execute=n_execute)


def test_a_model_in_the_home_folder_is_found_by_its_tilde(tmp_path, monkeypatch):
    """A shell leaves task:=~/mine alone."""
    monkeypatch.setenv('HOME', str(tmp_path))
    (tmp_path / 'mine').mkdir()
    assert find_model('tasks', '~/mine') == (tmp_path / 'mine').resolve()
    with pytest.raises(CheckpointError, match="'~nobody-of-this-name/mine' is neither a folder nor a model"):
        find_model('tasks', '~nobody-of-this-name/mine')


@pytest.mark.parametrize('instruction', [None, 3, ['lift', 'it']])
def test_an_instruction_that_is_no_text_is_refused(small_policy_folders, small_backbone, instruction):
    edit(small_policy_folders[1], 'task', instruction=instruction)
    for load in (load_task, summarise_task):
        with pytest.raises(CheckpointError, match='instruction is no text'):
            load(small_policy_folders[1], small_backbone)


def test_sizes_that_no_network_has_are_refused(small_policy_folders, small_backbone):
    encoder = json.loads((small_policy_folders[1] / 'task.json').read_text())['encoder']
    edit(small_policy_folders[1], 'task', encoder=encoder | {'step_dim': -1})
    with pytest.raises(CheckpointError, match='does not describe a model'):
        load_task(small_policy_folders[1], small_backbone)
