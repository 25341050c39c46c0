"""What `policy_cycle.py` runs in an environment with a peer's requirements; this package isn't there.

    python bench/policy_side.py paper CHECKOUT THREADS      the paper's public code, its DP-MLP with MimicGen's settings
    python bench/policy_side.py lerobot THREADS             LeRobot's DiffusionPolicy with its default sizes

Weights are untrained, inputs random: two 84x84 cameras, cropped to 76x76, each with a ResNet-18 of its own, two steps,
9 numbers of proprioception. Both start from pictures that are already cropped floats. First it answers with a line of
JSON that describes it. Then it takes numbers of denoising steps from standard input, one a line; for each it answers
with the milliseconds of one prediction: all of it, and the denoising alone; on one thread those of the processor.
"""

import json
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import torch
from torch import nn

CAMERAS, SIDE, CROP, STEPS, HORIZON, STATE = ('agentview', 'wrist'), 84, 76, 2, 16, 9
TRAINING_STEPS = 100


def paper(checkout: Path) -> tuple[nn.Module, nn.Module, Callable[[], object]]:
    """Their policy, what has its number of denoising steps, and one prediction."""
    sys.path.insert(0, str(checkout.resolve() / 'src'))
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
    from vlaworkspace.policy.dah_dp_mlp import DiffusionMLPHybridImagePolicy

    shapes = {name: {'shape': [3, SIDE, SIDE], 'type': 'rgb'} for name in CAMERAS}
    shapes['state'] = {'shape': [STATE], 'type': 'low_dim'}
    policy = DiffusionMLPHybridImagePolicy(
        shape_meta={'obs': shapes, 'action': {'shape': [10]}},
        noise_scheduler=DDPMScheduler(
            TRAINING_STEPS, beta_schedule='squaredcos_cap_v2', prediction_type='epsilon'
        ),
        horizon=HORIZON,
        n_action_steps=8,
        n_obs_steps=STEPS,
        crop_shape=(CROP, CROP),
        obs_encoder_group_norm=True,
        n_layer=8,
        n_emb=256,
        p_drop_attn=0.1,
        parallel_input_emb=True,
    ).eval()
    seen = {name: torch.rand(1, STEPS, 3, CROP, CROP) for name in CAMERAS}
    seen['state'] = torch.rand(1, STEPS, STATE)
    return policy, policy, lambda: policy.predict_action(seen)


def lerobot() -> tuple[nn.Module, nn.Module, Callable[[], object]]:
    """The same of LeRobot."""
    from lerobot.configs.types import FeatureType, PolicyFeature
    from lerobot.policies.diffusion.configuration_diffusion import DiffusionConfig
    from lerobot.policies.diffusion.modeling_diffusion import DiffusionPolicy

    pictures = {
        f'observation.images.{name}': PolicyFeature(FeatureType.VISUAL, (3, CROP, CROP)) for name in CAMERAS
    }
    config = DiffusionConfig(
        input_features={**pictures, 'observation.state': PolicyFeature(FeatureType.STATE, (STATE,))},
        output_features={'action': PolicyFeature(FeatureType.ACTION, (10,))},
        use_separate_rgb_encoder_per_camera=True,
        device='cpu',
    )
    policy = DiffusionPolicy(config).eval()
    seen = {
        'observation.state': torch.rand(1, STEPS, STATE),
        'observation.images': torch.rand(1, STEPS, len(CAMERAS), 3, CROP, CROP),
    }
    return policy, policy.diffusion, lambda: policy.diffusion.generate_actions(seen)


def now_s() -> float:
    """As in `policy_cycle.py`."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def main() -> None:
    """Make the peer, then take orders."""
    kind, *arguments, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    with redirect_stdout(StringIO()):
        policy, sampler, predict = paper(Path(arguments[0])) if kind == 'paper' else lerobot()
    denoising_s = [0.0]
    sample = sampler.conditional_sample

    def timed(*given, **named):
        start = now_s()
        result = sample(*given, **named)
        denoising_s[0] = now_s() - start
        return result

    sampler.conditional_sample = timed
    print(
        json.dumps(
            {
                'torch': torch.__version__,
                'threads': torch.get_num_threads(),
                'parameters': sum(p.numel() for p in policy.parameters()),
            }
        ),
        flush=True,
    )
    for line in sys.stdin:
        sampler.num_inference_steps = int(line)
        start = now_s()
        with torch.inference_mode(), redirect_stdout(StringIO()):
            predict()
        total_s = now_s() - start
        print(json.dumps({'total': 1e3 * total_s, 'denoise': 1e3 * denoising_s[0]}), flush=True)


if __name__ == '__main__':
    main()
