"""Where waypoints look in Stage 1: a frame's waypoint at that frame's joints, or at all of them alike.

    python bench/token_attention.py out/studies/stage1/dp_t-bfe20f4af6 out/studies/stage1/dp_t-799a00a192

For folders of finished Stage 1 runs of DP-T by cross-attention or with a prefix, whose condition is one token for the
timestep and one for each frame of the window. Of the weight that waypoints give the frames' tokens, the share of their
own frame's: a sixteenth where they look at all alike, 1 where each looks at its own alone. Beside it the loss with each
window's own condition, with its frames in another order, and with another window's. EMA weights, without dropout.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from torch import Tensor

from decoupled_policy_ros.files import write_json
from decoupled_policy_ros.policy.backbones import DPTBackbone
from decoupled_policy_ros.policy.backbones.dp_t import TOKEN_MECHANISMS, Attention, causal_mask
from decoupled_policy_ros.policy.checkpoint import load_backbone
from decoupled_policy_ros.policy.conditioning import conditioning_for
from decoupled_policy_ros.policy.encoders import VectorEncoder
from decoupled_policy_ros.robot.description import load_robot
from decoupled_policy_ros.training.config import Stage1Config
from decoupled_policy_ros.training.loop import CHECKPOINT
from decoupled_policy_ros.training.runs import diffusion_loss
from decoupled_policy_ros.training.sources import load_motion_windows


@dataclass(frozen=True)
class Arguments:
    """Options of this script.

    Attributes:
        folders: of Stage 1 runs, with their checkpoints.
        batches: of windows, over which all is averaged.
        json: write the figures here.
    """

    folders: tyro.conf.Positional[tuple[Path, ...]]
    batches: int = 40
    json: Path | None = Path('docs/bench/token_attention.json')


#: Whose joints a window is conditioned by: its own, its own with the frames in another order, another window's.
CONDITIONS = ('own', 'reordered', 'another')


class Stage1Run:
    """A finished Stage 1 run with the conditioning network that it throws away, from its checkpoint."""

    def __init__(self, folder: Path):
        config = Stage1Config.model_validate(json.loads((folder / 'run.json').read_text())['config'])
        if config.condition != 'joint_positions':
            raise SystemExit(f'{folder}: conditioned by {config.condition}; valid: joint_positions')
        self.config, self.backbone = config, load_backbone(folder)
        denoiser = self.backbone.denoiser
        if not isinstance(denoiser, DPTBackbone) or denoiser.mechanism not in TOKEN_MECHANISMS:
            raise SystemExit(
                f'{folder}: a {denoiser.kind} by {denoiser.mechanism}; valid: dp_t by {TOKEN_MECHANISMS}'
            )
        self.denoiser = denoiser
        self.windows, _ = load_motion_windows(config, load_robot(config.robot))
        self.joints, self.actions = map(torch.from_numpy, (self.windows.joints, self.windows.actions))
        self.encoder = VectorEncoder(self.joints.shape[1])
        self.conditioning = conditioning_for(denoiser, denoiser.horizon, self.joints.shape[1])
        weights = load_file(folder / CHECKPOINT)
        for name, part in (('encoder', self.encoder), ('conditioning', self.conditioning)):
            prefix = f'average.module.{name}.'
            part.load_state_dict(
                {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
            )

    def loss(self, seed: int, condition: str = 'own') -> float:
        """Prediction error of a batch; `condition` is one of `CONDITIONS`."""
        torch.manual_seed(seed)
        batch = self.windows.draw(64)
        frames = self.encoder(self.joints[batch])
        if condition == 'another':
            frames = frames.roll(1, 0)
        if condition == 'reordered':
            frames = frames[:, torch.randperm(frames.shape[1], generator=torch.Generator().manual_seed(seed))]
        return float(diffusion_loss(self.backbone, self.conditioning, self.actions[batch], frames.flatten(1)))

    def own_shares(self, seed: int) -> list[float]:
        """Of each layer: the share of a waypoint's own frame in its weight on all frames, over a batch."""
        shares: list[float] = []
        hooks = [
            layer.get_submodule(
                'attention' if layer.crossing is None else 'crossing'
            ).register_forward_pre_hook(
                lambda attention, inputs: shares.append(own_share(attention, *inputs[:2]))
            )
            for layer in self.denoiser.layers
        ]
        self.loss(seed)
        for hook in hooks:
            hook.remove()
        return shares


@torch.no_grad()
def own_share(attention: Attention, x: Tensor, source: Tensor) -> float:
    """Mean share of frame i's token in the weight that waypoint i gives all frames' tokens.

    Args:
        x, source: what `attention` is called with: waypoints and memory, or both times both, the memory first.
    """
    weight = attention.query(x), attention.key_value(source).chunk(2, -1)[0]
    query, key = (part.unflatten(-1, (attention.heads, -1)).transpose(1, 2) for part in weight)
    scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
    if x is source:  # a prefix: the last half are the waypoints, which see each other up to themselves
        horizon = (x.shape[1] - 1) // 2
        visible = causal_mask(horizon, horizon + 1, x.device)
        scores = scores.masked_fill(~visible, -torch.inf)[..., horizon + 1 :, :]
    horizon = scores.shape[-2]
    of_frames = scores.softmax(-1)[..., 1 : horizon + 1]  # the first token is the timestep
    share = of_frames / of_frames.sum(-1, keepdim=True)
    return float(share.diagonal(dim1=-2, dim2=-1).mean())


def main(arguments: Arguments) -> None:
    """Measure, print, save."""
    torch.set_num_threads(1)
    table = Table(
        'Stage 1', 'mechanism', 'steps', 'loss', 'reordered', "another's", 'own frame, mean', 'layers'
    )
    report = {}
    for folder in arguments.folders:
        run, seeds = Stage1Run(folder), range(arguments.batches)
        with torch.inference_mode():
            losses = {name: sum(run.loss(s, name) for s in seeds) / len(seeds) for name in CONDITIONS}
            layers = torch.tensor([run.own_shares(s) for s in seeds]).mean(0).tolist()
        mechanism, steps = run.denoiser.mechanism, run.config.optimisation.steps
        report[folder.name] = {
            'mechanism': mechanism,
            'steps': steps,
            'loss_by_condition': losses,
            'alike': 1 / run.denoiser.horizon,
            'share_of_own_frame': layers,
        }
        shares = [f'{share:.3f}' for share in (sum(layers) / len(layers), min(layers), max(layers))]
        table.add_row(
            folder.name,
            mechanism,
            str(steps),
            *(f'{losses[name]:.4f}' for name in CONDITIONS),
            shares[0],
            ' to '.join(shares[1:]),
        )
    Console().print(table)
    if arguments.json:
        write_json(arguments.json, report)


if __name__ == '__main__':
    main(tyro.cli(Arguments))
