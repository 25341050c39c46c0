"""Stage 1: a backbone from motion alone."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from decoupled_policy_ros.errors import CheckpointError
from decoupled_policy_ros.policy.checkpoint import save_backbone
from decoupled_policy_ros.policy.conditioning import conditioning_for
from decoupled_policy_ros.policy.encoders import VectorEncoder
from decoupled_policy_ros.policy.model_files import read_model
from decoupled_policy_ros.policy.policy import Backbone
from decoupled_policy_ros.robot.description import load_robot
from decoupled_policy_ros.robot.fingerprint import Fingerprint
from decoupled_policy_ros.training.config import Stage1Config
from decoupled_policy_ros.training.loop import Trainer
from decoupled_policy_ros.training.network import new_backbone
from decoupled_policy_ros.training.report import write_report
from decoupled_policy_ros.training.runs import (
    data_sha256,
    diffusion_loss,
    identity_of,
    prepare,
    provenance_of,
)
from decoupled_policy_ros.training.sources import MotionWindows, load_motion_windows


def train_stage1(config: Stage1Config, out: Path) -> str:
    """Pretrain a backbone on motion; its conditioning network is thrown away.

    The target is a window of poses (16 x 10). The condition is the aligned window of joint positions (16 x 8), of
    the poses themselves, or nothing; see `Stage1Config.condition`.

    Returns:
        sha256 of the backbone written to `out`; '' in all but the first of several processes.
    """
    robot = load_robot(config.robot)
    optimisation = prepare(config.optimisation)
    windows, provenance = load_motion_windows(config, robot)
    torch.manual_seed(optimisation.seed)
    fingerprint = Fingerprint.of(robot, config.rate_hz)
    backbone = new_backbone(config.backbone, config.conditioning, config.objective, fingerprint, config.name)
    backbone.normaliser.fit(windows.actions, config.position_range_m)
    conditions = _conditions(config.condition, windows)
    encoder = VectorEncoder(conditions.shape[1])
    encoder.normaliser.fit(conditions)
    conditioning = conditioning_for(backbone.denoiser, config.backbone.horizon, conditions.shape[1])
    module = nn.ModuleDict({'backbone': backbone, 'encoder': encoder, 'conditioning': conditioning})
    module.to(optimisation.device)
    actions = torch.from_numpy(windows.actions)

    def loss() -> Tensor:
        batch = windows.draw(optimisation.batch_size)
        features = encoder(conditions[batch].to(optimisation.device)).flatten(1)
        return diffusion_loss(backbone, conditioning, actions[batch].to(optimisation.device), features)

    content = data_sha256({'joints': windows.joints, 'actions': windows.actions})
    cut = data_sha256({'ends': windows.windows.ends})  # the same rows may be of other motions
    identity = identity_of(config, data_sha256=content, episodes_sha256=cut)
    trainer = Trainer(module, loss, optimisation, out, identity)
    trainer.run()
    if not trainer.is_main:
        return ''
    backbone.provenance = provenance_of(
        'stage1', {'sources': provenance, 'condition': config.condition}, trainer
    )
    sha256 = _written(out, backbone.cpu()) or save_backbone(out, backbone)
    write_report(out, 'stage1', config, trainer, {'backbone_sha256': sha256, 'sources': provenance})
    return sha256


def _written(out: Path, backbone: Backbone) -> str | None:
    """sha256 of the backbone in a folder, if it is this one, by its weights.

    Written anew by another version it would have another hash, and the tasks that were trained on it would be refused.
    """
    try:
        header, weights = read_model(out, 'backbone')
    except CheckpointError:
        return None
    ours = backbone.state_dict()
    same = weights.keys() == ours.keys() and all(torch.equal(weights[name], ours[name]) for name in ours)
    return header['sha256'] if same else None


def _conditions(kind: str, windows: MotionWindows) -> Tensor:
    """What a frame of each motion is conditioned by, (F, n)."""
    if kind == 'none':
        return torch.zeros(1, 1).expand(len(windows.actions), 1)
    return torch.from_numpy(windows.joints if kind == 'joint_positions' else windows.actions)
