"""Objectives and samplers: diffusion with three predictions and flow matching, step by step against diffusers."""

from __future__ import annotations

import diffusers
import numpy as np
import pytest
import torch

from decoupled_policy_ros.errors import ConfigError
from decoupled_policy_ros.policy.diffusion import NoiseSchedule
from decoupled_policy_ros.policy.flow import FlowSchedule
from decoupled_policy_ros.policy.sampling import Sampler, make_schedule
from decoupled_policy_ros.policy.schedule import ScheduleConfig

# Our names of what the network predicts, and diffusers'.
PREDICTIONS = {'epsilon': 'epsilon', 'sample': 'sample', 'v': 'v_prediction'}
CONFIGS = [
    *(ScheduleConfig(prediction=prediction) for prediction in PREDICTIONS),
    ScheduleConfig(kind='rectified_flow'),
]
every_objective = pytest.mark.parametrize('config', CONFIGS, ids=lambda c: f'{c.kind}-{c.prediction}')


def theirs(kind: type, prediction: str) -> diffusers.SchedulerMixin:
    return kind(
        100, beta_schedule='squaredcos_cap_v2', clip_sample=True, prediction_type=PREDICTIONS[prediction]
    )


def randoms(count: int, *shape: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(len(shape) + count)
    return [torch.randn(*shape, generator=generator) for _ in range(count)]


@pytest.mark.parametrize('prediction', PREDICTIONS)
@pytest.mark.parametrize('steps', [1, 5, 10, 100])
def test_ddim_equals_diffusers(steps, prediction):
    ours = NoiseSchedule(ScheduleConfig(prediction=prediction))
    reference = theirs(diffusers.DDIMScheduler, prediction)
    reference.set_timesteps(steps)
    ks = ours.sampling_steps(steps)
    assert ks == reference.timesteps.tolist()
    x = wanted = torch.randn(2, 16, 10)
    for k, previous_k in zip(ks, [*ks[1:], -1], strict=True):
        output = torch.randn(2, 16, 10)
        x = ours.ddim_step(output, x, k, previous_k)
        wanted = reference.step(output, k, wanted).prev_sample
        torch.testing.assert_close(x, wanted, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize('steps', range(1, 101))
def test_sampling_steps_are_evenly_spaced_from_the_noisiest_on(steps):
    ks = NoiseSchedule().sampling_steps(steps)
    assert len(ks) == steps and ks[-1] == 0
    assert 100 - ks[0] in (100 // steps, -(-100 // steps))  # the first stride is one like the others
    assert set(-np.diff(ks)) <= {100 // steps, -(-100 // steps)}


@pytest.mark.parametrize('prediction', PREDICTIONS)
@pytest.mark.parametrize('steps', [10, 100])
def test_ddpm_equals_diffusers(steps, prediction):
    ours = NoiseSchedule(ScheduleConfig(prediction=prediction))
    reference = theirs(diffusers.DDPMScheduler, prediction)
    reference.set_timesteps(steps)
    ks = ours.sampling_steps(steps)
    x = wanted = torch.randn(1, 16, 10)
    for k, previous_k in zip(ks, [*ks[1:], -1], strict=True):
        output = torch.randn(1, 16, 10)
        noise = torch.randn(1, 16, 10, generator=torch.Generator().manual_seed(k))
        x = ours.ddpm_step(output, x, k, previous_k, noise)
        same_noise = torch.Generator().manual_seed(k)
        wanted = reference.step(output, k, wanted, generator=same_noise).prev_sample
        torch.testing.assert_close(x, wanted, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize('training_steps', [1, 10, 100, 1000])
def test_betas_equal_diffusers(training_steps):
    """Squared-cosine, each beta at most 0.999."""
    reference = diffusers.DDPMScheduler(training_steps, beta_schedule='squaredcos_cap_v2')
    ours = NoiseSchedule(ScheduleConfig(training_steps=training_steps))
    torch.testing.assert_close(ours.beta, reference.betas, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(ours.alpha_bar, reference.alphas_cumprod, rtol=1e-4, atol=1e-9)
    assert ours.beta.max() == pytest.approx(0.999) or training_steps == 1


def test_forward_noise_and_velocity_equal_diffusers():
    reference = theirs(diffusers.DDPMScheduler, 'v')
    (x_0, eps), k = randoms(2, 100, 16, 10), torch.arange(100)
    ours = NoiseSchedule(ScheduleConfig(prediction='v'))
    torch.testing.assert_close(
        ours.add_noise(x_0, eps, k), reference.add_noise(x_0, eps, k), rtol=0, atol=1e-5
    )
    torch.testing.assert_close(
        ours.target(x_0, eps, k), reference.get_velocity(x_0, eps, k), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize('steps', [1, 7, 10, 100])
def test_flow_equals_diffusers_euler(steps):
    """With a velocity that leads inside [-1, 1], where nothing is clipped."""
    ours = FlowSchedule(ScheduleConfig(kind='rectified_flow'))
    ks = ours.sampling_steps(steps)
    times = [float(ours.noise[k]) for k in ks]
    assert len(set(ks)) == steps and times[0] == 1
    reference = diffusers.FlowMatchEulerDiscreteScheduler(100, shift=1.0)
    reference.set_timesteps(sigmas=times)
    x = wanted = torch.randn(2, 16, 10)
    for t, timestep, k, previous_k in zip(times, reference.timesteps, ks, [*ks[1:], -1], strict=True):
        velocity = (x - (2 * torch.rand(2, 16, 10) - 1)) / t
        x = ours.step(velocity, x, k, previous_k, 'euler')
        wanted = reference.step(velocity, timestep, wanted).prev_sample
        torch.testing.assert_close(x, wanted, rtol=1e-5, atol=2e-5)


def test_flow_goes_on_a_straight_line_from_actions_to_noise():
    schedule = FlowSchedule()
    (x_0, eps), k = randoms(2, 100, 16, 10), torch.arange(100)
    x_k, velocity = schedule.add_noise(x_0, eps, k), schedule.target(x_0, eps, k)
    torch.testing.assert_close(x_k[-1], eps[-1])
    torch.testing.assert_close(x_k[24], 0.75 * x_0[24] + 0.25 * eps[24])
    torch.testing.assert_close(x_k - schedule.noise[:, None, None] * velocity, x_0, rtol=0, atol=1e-5)


def test_flows_noise_equals_diffusers():
    reference = diffusers.FlowMatchEulerDiscreteScheduler(100, shift=1.0)
    (x_0, eps), k = randoms(2, 100, 16, 10), torch.arange(100)
    ours = FlowSchedule().add_noise(x_0, eps, k)
    wanted = reference.scale_noise(x_0, reference.timesteps.flip(0), eps)  # theirs count from noise to clean
    torch.testing.assert_close(ours, wanted, rtol=0, atol=1e-6)


@every_objective
@pytest.mark.parametrize('steps', [1, 3, 10, 100])
def test_a_network_that_knows_the_actions_leads_there_in_any_number_of_steps(config, steps):
    """Its output is the target itself, for the noise that is still in x_k."""
    schedule = make_schedule(config)
    x_0, noise = randoms(2, 2, 16, 10)
    x_0 = x_0.clamp(-1, 1)
    for kind in schedule.samplers:
        sampler = Sampler(schedule, steps, kind)

        def knowing(i: int, x: torch.Tensor) -> torch.Tensor:
            k = torch.full((2,), sampler.ks[i])  # noqa: B023 (called before the next sampler is made)
            eps = (x - schedule.clean[k][:, None, None] * x_0) / schedule.noise[k][:, None, None]
            return schedule.target(x_0, eps, k)

        actions = sampler.run(knowing, noise, torch.Generator().manual_seed(0))
        torch.testing.assert_close(actions, x_0, rtol=0, atol=1e-4)


@every_objective
def test_clean_actions_are_clipped(config):
    """The sampler stays within what the action statistics cover, whatever the network says."""
    schedule = make_schedule(config)
    for kind in schedule.samplers:
        actions = Sampler(schedule, 5, kind).run(lambda i, x: 50 * torch.ones_like(x), torch.randn(1, 16, 10))
        assert actions.abs().max() <= 1


@every_objective
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16], ids=str)
def test_the_schedule_stays_float32_whatever_the_network_is(config, dtype, small_backbone):
    """In bfloat16 the late steps' noise would vanish in rounding."""
    schedule = make_schedule(config)
    (x_0, eps), k = randoms(2, 100, 16, 10), torch.arange(100)

    def results(output: torch.Tensor) -> list[torch.Tensor]:
        steps = [schedule.step(output, x_0, 11, 0, sampler, eps) for sampler in schedule.samplers]
        return [schedule.add_noise(x_0, eps, k), schedule.target(x_0, eps, k), *steps]

    wanted = results(eps.to(dtype).float())
    small_backbone.schedule = schedule
    small_backbone.to(dtype)
    with torch.autocast('cpu', torch.bfloat16):
        actual = results(eps.to(dtype))
    assert schedule.clean.dtype == schedule.noise.dtype == torch.float32
    for ours, expected in zip(actual, wanted, strict=True):
        assert ours.dtype == torch.float32
        assert torch.equal(ours, expected)


@every_objective
@pytest.mark.parametrize('count', [0, 101, -1])
def test_denoising_steps_out_of_range_are_refused(config, count):
    with pytest.raises(ConfigError, match=rf'1\.\.100.*{count}'):
        Sampler(make_schedule(config), count)


@pytest.mark.parametrize(
    ('values', 'message'),
    [
        ({'kind': 'linear'}, r"objective.kind 'linear' is unknown; valid: squared_cosine, rectified_flow"),
        (
            {'prediction': 'velocity'},
            r"'velocity' does not exist with 'squared_cosine'; valid: epsilon, sample, v",
        ),
        ({'kind': 'rectified_flow', 'prediction': 'epsilon'}, r"'epsilon' does not exist .* valid: velocity"),
        ({'training_steps': 0}, r'training_steps must be in 1\.\.10000, got 0'),
    ],
)
def test_unknown_objectives_are_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        ScheduleConfig(**values)


@pytest.mark.parametrize(
    ('config', 'sampler'),
    [(ScheduleConfig(), 'euler'), (ScheduleConfig(kind='rectified_flow'), 'ddim')],
    ids=['diffusion', 'flow'],
)
def test_a_sampler_of_another_objective_is_refused(config, sampler):
    with pytest.raises(ConfigError, match=f"sampler '{sampler}' does not exist with a '{config.kind}'"):
        Sampler(make_schedule(config), 10, sampler)


def test_an_objective_states_what_it_predicts():
    assert ScheduleConfig().to_dict() == {
        'training_steps': 100,
        'kind': 'squared_cosine',
        'prediction': 'epsilon',
    }
    assert ScheduleConfig(kind='rectified_flow').prediction == 'velocity'
