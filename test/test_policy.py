"""The networks: sizes, structure, the exact split of the modulation, diffusion against a reference."""

from __future__ import annotations

import diffusers
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from decoupled_policy_ros.errors import ConfigError, InferenceError
from decoupled_policy_ros.policy.backbone import DPMLPBackbone
from decoupled_policy_ros.policy.conditioning import FiLMConditioning
from decoupled_policy_ros.policy.diffusion import NoiseSchedule, ScheduleConfig
from decoupled_policy_ros.policy.encoders import ImageEncoder, ObservationEncoder, SpatialSoftmax
from decoupled_policy_ros.policy.normalisation import ActionNormaliser, VectorNormaliser
from decoupled_policy_ros.runtime.engine import Engine


def count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_sizes_are_the_papers(image_contract):
    with torch.device('meta'):
        backbone = DPMLPBackbone()
    film = FiLMConditioning(256, 274, backbone.modulation_shape)
    assert count(backbone) - count(backbone.tau) == 4_256_778
    assert count(backbone.tau) == 525_568
    assert count(backbone) == 4_782_346
    assert count(film) == 8_699_904
    assert ObservationEncoder(image_contract, base_channels=16).feature_dim == 274


def test_position_i_of_the_output_depends_on_position_i_of_the_input_only(small_backbone):
    denoiser = small_backbone.denoiser
    x, modulation = torch.randn(1, 16, 10), torch.randn(1, *denoiser.modulation_shape)
    changed = x.clone()
    changed[0, 3] += 1
    difference = (denoiser(changed, modulation) - denoiser(x, modulation)).abs().amax(-1)[0]
    assert difference[3] > 1e-3
    assert difference[torch.arange(16) != 3].max() == 0


def test_split_modulation_equals_the_naive_one():
    film = FiLMConditioning(32, 11, (3, 2, 24)).double()
    tau, features = torch.randn(7, 32).double(), torch.randn(1, 11).double()
    naive = film(tau, features.expand(7, -1))
    torch.testing.assert_close(film.time_half(tau) + film.feature_half(features), naive, rtol=0, atol=1e-13)


def test_engine_equals_the_naive_computation(small_policy):
    observation = random_observation(small_policy.contract)
    engine = Engine(small_policy, steps=10, seed=5)
    noise = torch.randn(1, 16, 10, generator=torch.Generator().manual_seed(5))
    batch = {name: torch.from_numpy(array)[None] for name, array in observation.items()}
    naive = small_policy.predict_naive(batch, noise, 10)[0].numpy()
    np.testing.assert_allclose(engine(observation).actions, naive, atol=2e-5)


def test_engine_repeats_a_seed_and_warming_up_does_not_spend_it(small_policy):
    observation = random_observation(small_policy.contract)
    engine = Engine(small_policy, steps=4, seed=1)
    engine.warm_up()
    first, second = engine(observation).actions, engine(observation).actions
    assert not np.array_equal(first, second)
    engine.reset(1)
    np.testing.assert_array_equal(engine(observation).actions, first)


def test_engine_refuses_a_chunk_that_is_not_finite(small_policy):
    with torch.no_grad():
        small_policy.task.conditioning.bias[0] = float('nan')
    with pytest.raises(InferenceError, match='not finite'):
        Engine(small_policy, steps=2)(random_observation(small_policy.contract))


@pytest.mark.parametrize('device', ['gpu', 'cuda:99', 'meta'])
def test_engine_refuses_a_device_that_is_not_there(small_policy, device):
    with pytest.raises(ConfigError, match=rf"device '{device}' is not usable here .*valid: cpu"):
        Engine(small_policy, device=device)


@pytest.mark.parametrize('steps', [1, 10, 100])
def test_ddim_equals_diffusers(steps):
    ours = NoiseSchedule(ScheduleConfig(100))
    theirs = diffusers.DDIMScheduler(100, beta_schedule='squaredcos_cap_v2', clip_sample=True)
    theirs.set_timesteps(steps)
    ks = ours.sampling_steps(steps)
    assert ks == theirs.timesteps.tolist()
    x = reference = torch.randn(2, 16, 10)
    for k, previous_k in zip(ks, [*ks[1:], -1], strict=True):
        eps = torch.randn(2, 16, 10)
        x = ours.ddim_step(eps, x, k, previous_k)
        reference = theirs.step(eps, k, reference).prev_sample
        torch.testing.assert_close(x, reference, rtol=0, atol=1e-5)


def test_ddpm_and_forward_noise_equal_diffusers():
    ours = NoiseSchedule(ScheduleConfig(100))
    theirs = diffusers.DDPMScheduler(100, beta_schedule='squaredcos_cap_v2', clip_sample=True)
    x_0, eps, k = torch.randn(100, 16, 10), torch.randn(100, 16, 10), torch.arange(100)
    torch.testing.assert_close(ours.add_noise(x_0, eps, k), theirs.add_noise(x_0, eps, k), rtol=0, atol=1e-5)
    x = reference = torch.randn(1, 16, 10)
    for step in reversed(range(100)):
        eps = torch.randn(1, 16, 10)
        noise = torch.randn(1, 16, 10, generator=torch.Generator().manual_seed(step))
        x = ours.ddpm_step(eps, x, step, noise)
        reference = theirs.step(
            eps, step, reference, generator=torch.Generator().manual_seed(step)
        ).prev_sample
        torch.testing.assert_close(x, reference, rtol=0, atol=1e-5)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16], ids=str)
def test_the_noise_schedule_stays_float32_whatever_the_network_is(small_backbone, dtype):
    """In bfloat16 the late steps' noise would vanish in rounding."""
    x_0, eps, k = torch.randn(100, 16, 10), torch.randn(100, 16, 10), torch.arange(100)
    x_k, x_previous = NoiseSchedule().add_noise(x_0, eps, k), NoiseSchedule().ddim_step(eps, x_0, 10, 0)
    schedule = small_backbone.to(dtype).schedule
    with torch.autocast('cpu', torch.bfloat16):
        actual = schedule.add_noise(x_0, eps, k), schedule.ddim_step(eps, x_0, 10, 0)
    assert schedule.alpha_bar.dtype == torch.float32
    for ours, wanted in zip(actual, (x_k, x_previous), strict=True):
        assert ours.dtype == torch.float32
        assert torch.equal(ours, wanted)


@pytest.mark.parametrize('count', [0, 101, -1])
def test_denoising_steps_out_of_range_are_refused(count):
    with pytest.raises(ConfigError, match=rf'1\.\.100.*{count}'):
        NoiseSchedule().sampling_steps(count)


def test_unknown_schedule_is_refused():
    with pytest.raises(ConfigError, match="'linear'"):
        ScheduleConfig(kind='linear')


def test_image_encoder_has_group_norm_only_and_keeps_samples_apart():
    encoder = ImageEncoder(base_channels=16).eval()
    assert not any(isinstance(m, torch.nn.modules.batchnorm._BatchNorm) for m in encoder.modules())
    images = torch.randint(256, (3, 2, 84, 84, 3), dtype=torch.uint8)
    with torch.inference_mode():
        together, alone = encoder(images), encoder(images[1:2])
    assert together.shape == (3, 2, 64)
    torch.testing.assert_close(together[1:2], alone, rtol=1e-4, atol=1e-5)


def test_training_crops_a_sample_alike_in_all_steps_and_evaluation_in_the_centre():
    encoder = ImageEncoder(crop=4, base_channels=16)
    ramp = torch.arange(64, dtype=torch.uint8).reshape(1, 1, 8, 8, 1).expand(5, 2, -1, -1, 3)
    cropped = encoder.train()._cropped(ramp)
    assert cropped.shape == (5, 2, 4, 4, 3)
    assert torch.equal(cropped[:, 0], cropped[:, 1])
    corners = cropped[:, 0, 0, 0, 0]
    assert len(set(corners.tolist())) > 1
    assert torch.equal(cropped[:, 0, :, :, 0] - corners[:, None, None], (ramp[:, 0, :4, :4, 0]))
    assert torch.equal(encoder.eval()._cropped(ramp), ramp[:, :, 2:6, 2:6])


def test_spatial_softmax_finds_the_brightest_place():
    pool = SpatialSoftmax(1, 1)
    torch.nn.init.ones_(pool.maps.weight)
    features = torch.zeros(1, 1, 5, 9)
    features[0, 0, 4, 2] = 100
    torch.testing.assert_close(pool(features), torch.tensor([[-0.5, 1.0]]), rtol=0, atol=1e-5)


finite = st.floats(-2, 2, width=32)


@given(arrays(np.float32, (6, 10), elements=finite))
@settings(max_examples=40, deadline=None)
def test_action_normalisation_is_a_round_trip_and_touches_positions_only(actions):
    normaliser = ActionNormaliser()
    normaliser.fit(actions)
    tensor = torch.from_numpy(actions)
    normalised = normaliser(tensor)
    assert torch.equal(normalised[:, 3:], tensor[:, 3:])
    assert normalised[:, :3].abs().max() <= 1 + 1e-4
    torch.testing.assert_close(normaliser.inverse(normalised), tensor, rtol=0, atol=1e-5)


def test_a_component_that_never_varies_is_not_blown_up():
    normaliser = VectorNormaliser(2)
    normaliser.fit([[0.5, 0.0], [0.5, 1.0]])
    noisy = normaliser(torch.tensor([[0.501, 0.5]]))
    torch.testing.assert_close(noisy, torch.tensor([[0.1, 0.0]]), rtol=0, atol=1e-5)


def random_observation(contract, seed=0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        s.name: rng.integers(0, 256, (contract.n_obs_steps, *s.shape)).astype(np.uint8)
        if s.kind == 'image'
        else rng.normal(size=(contract.n_obs_steps, *s.shape)).astype(np.float32)
        for s in contract.streams
    }
