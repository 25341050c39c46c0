"""The backbones: sizes on the meta device, structure, rules of conditioning, the exact split, files, the engine."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from decoupled_policy_ros.errors import CheckpointError, ConfigError
from decoupled_policy_ros.observation.contract import ObservationContract, StreamSpec
from decoupled_policy_ros.policy import (
    Backbone,
    Policy,
    Task,
    load_backbone,
    load_policy,
    load_task,
    save_backbone,
    save_task,
)
from decoupled_policy_ros.policy.backbones import (
    BACKBONES,
    DPCBackbone,
    DPCSize,
    DPMixerBackbone,
    DPMixerSize,
    DPMLPBackbone,
    DPMLPSize,
    DPTBackbone,
    DPTSize,
)
from decoupled_policy_ros.policy.backbones.dp_c import ConvolutionBlock
from decoupled_policy_ros.policy.backbones.dp_t import Attention, causal_mask
from decoupled_policy_ros.policy.backbones.modulation import MemoryLayout, ModulationLayout
from decoupled_policy_ros.policy.backbones.residual import RESIDUALS
from decoupled_policy_ros.policy.conditioning import SplitConditioning, TokenConditioning, conditioning_for
from decoupled_policy_ros.policy.sampling import make_schedule
from decoupled_policy_ros.policy.schedule import ScheduleConfig
from decoupled_policy_ros.robot.description import load_robot
from decoupled_policy_ros.robot.fingerprint import Fingerprint
from decoupled_policy_ros.runtime.engine import Engine

SMALL = {
    'dp_mlp': DPMLPSize(width=32, hidden=64, blocks=2, time_width=16),
    'dp_mixer': DPMixerSize(width=32, hidden=64, blocks=2, time_width=16, mixing=24),
    'dp_c': DPCSize(widths=(16, 24, 32), time_width=16),
    'dp_t': DPTSize(width=32, hidden=64, layers=2, heads=4),
}
EVERY = [(kind, mechanism) for kind, backbone in BACKBONES.items() for mechanism in backbone.mechanisms]
MODULATED = [pair for pair in EVERY if pair[1] not in ('cross_attention', 'prefix')]
every_backbone = pytest.mark.parametrize(('kind', 'mechanism'), EVERY, ids=map('-'.join, EVERY))
every_modulated = pytest.mark.parametrize(('kind', 'mechanism'), MODULATED, ids=map('-'.join, MODULATED))
STEPS, STEP_DIM = 2, 7


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def small(kind: str, mechanism: str) -> nn.Module:
    torch.manual_seed(0)
    return BACKBONES[kind](SMALL[kind], mechanism).eval()


def trained_for_a_while(conditioning: nn.Module) -> nn.Module:
    """The same with random numbers where an untrained one has zeros, so that nothing cancels by chance."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in conditioning.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return conditioning.eval()


# ---- sizes


@pytest.mark.parametrize(
    ('mechanism', 'frozen', 'trainable'),
    [
        ('cross_attention', 8_433_418, 564_224),
        ('prefix', 6_323_978, 564_224),
        ('film', 6_849_546, 4_352_512),
        ('adaln', 6_841_354, 4_352_512),
        ('adaln_zero', 6_841_354, 6_527_488),
        ('ada_rms_norm', 6_841_354, 4_352_512),
        ('additive', 6_849_546, 2_177_536),
    ],
)
def test_dp_t_has_the_papers_sizes(mechanism, frozen, trainable):
    """At its horizon of 10, for MimicGen's two steps of 137 features; ours of 16 has six more position embeddings."""
    with torch.device('meta'):
        backbone = DPTBackbone(DPTSize(horizon=10), mechanism)
        conditioning = conditioning_for(backbone, 2, 137)
        longer = conditioning_for(DPTBackbone(DPTSize(), mechanism), 2, 137)
    assert count(backbone) == frozen
    assert count(conditioning) == trainable
    assert count(longer) == trainable + 6 * 256
    assert count(DPTBackbone(DPTSize(horizon=16, layers=1), mechanism)) == count(
        DPTBackbone(DPTSize(horizon=10, layers=1), mechanism)
    )


@pytest.mark.parametrize(
    ('widths', 'convolutions', 'encoders'),
    [((512, 1024, 2048), 243_925_514, 28_672), ((256, 512, 1024), 61_014_282, 14_336)],
    ids=['mimicgen', 'droid'],
)
def test_dp_c_has_the_papers_sizes_and_runs_at_them(widths, convolutions, encoders):
    with torch.device('meta'):
        backbone = DPCBackbone(DPCSize(widths=widths))
        conditioning = conditioning_for(backbone, 2, 137)
        modulation = conditioning(backbone.tau(torch.zeros(3, dtype=torch.long)), torch.empty(3, 274))
        output = backbone(torch.empty(3, 16, 10), modulation)
    assert count(backbone) - count(backbone.tau) == convolutions
    assert count(backbone.tau) == 131_712
    assert count(conditioning) == encoders * (128 + 274 + 1)
    assert output.shape == (3, 16, 10)


def test_dp_mlp_has_the_papers_sizes():
    with torch.device('meta'):
        backbone = DPMLPBackbone()
        film = conditioning_for(backbone, 2, 137)
    assert count(backbone) - count(backbone.tau) == 4_256_778
    assert count(backbone.tau) == 525_568
    assert count(backbone) == 4_782_346
    assert count(film) == 8_699_904


@pytest.mark.parametrize(
    ('mechanism', 'frozen', 'trainable'),
    [('film', 4_799_370, 11_962_368), ('adaln_zero', 4_795_274, 6_524_928)],
)
def test_dp_mixer_freezes_less_than_five_million(mechanism, frozen, trainable):
    with torch.device('meta'):
        mixer, plain = DPMixerBackbone(None, mechanism), DPMLPBackbone(None, mechanism)
        conditioning = conditioning_for(mixer, 2, 137)
    along_time = 16 * 64 + 64 + 64 * 16 + 16
    assert count(mixer) == count(plain) + 8 * along_time == frozen
    assert count(conditioning) == trainable
    assert mixer.needs.size == plain.needs.size + 8 * 3 * 256


def test_untrained_modulations_are_asked_for_by_name():
    assert {kind: backbone.mechanisms[0] for kind, backbone in BACKBONES.items()} == {
        'dp_mlp': 'film',
        'dp_mixer': 'film',
        'dp_c': 'film',
        'dp_t': 'adaln_zero',
    }


@pytest.mark.parametrize(
    ('make', 'message'),
    [
        (
            lambda: DPMLPBackbone(None, 'prefix'),
            "dp_mlp can not be conditioned by 'prefix'; valid: film, adaln_zero",
        ),
        (lambda: DPCBackbone(None, 'adaln'), "dp_c can not be conditioned by 'adaln'; valid: film"),
        (lambda: DPCSize(horizon=10), 'horizon must be a multiple of 4, .* got 10'),
        (lambda: DPCSize(widths=(20, 32)), r'widths must be multiples of groups \(8\), got \[20, 32\]'),
        (lambda: DPCSize(widths=()), r'widths must be multiples'),
        (lambda: DPCSize(kernel=4), 'kernel must be odd, got 4'),
        (lambda: DPTSize(heads=3), r'heads must divide width \(256\), got 3'),
        (lambda: DPMixerSize(mixing=0), 'backbone.mixing must be at least 1, got 0'),
        (lambda: DPMLPSize(blocks=0), 'backbone.blocks must be at least 1, got 0'),
        (lambda: DPTSize(dropout=1.0), r'backbone.dropout must be in \[0, 1\), got 1.0'),
        (
            lambda: DPMLPBackbone(DPMLPSize(time_width=3)),
            'timestep embedding must be even and at least 4, got 3',
        ),
    ],
)
def test_sizes_that_can_not_be_are_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


# ---- which waypoint sees which


def influence(backbone: nn.Module) -> torch.Tensor:
    """Whether input position j (column) moves output position i (row): bool (horizon, horizon)."""
    conditioning = trained_for_a_while(conditioning_for(backbone, STEPS, STEP_DIM))
    tau = backbone.tau(torch.tensor([40]))
    return influence_under(backbone, conditioning(tau, torch.randn(1, STEPS * STEP_DIM)).detach())


def influence_under(backbone: nn.Module, modulation: torch.Tensor) -> torch.Tensor:
    """The same under a given modulation (1, ...)."""
    jacobian = torch.autograd.functional.jacobian(lambda x: backbone(x, modulation), torch.randn(1, 16, 10))
    return jacobian[0, :, :, 0].abs().amax((1, 3)) > 1e-7


@every_backbone
def test_every_output_position_depends_on_the_input_positions_that_it_should(kind, mechanism):
    everywhere = torch.ones(16, 16, dtype=torch.bool)
    expected = {
        'dp_mlp': torch.eye(16, dtype=torch.bool),
        'dp_mixer': everywhere,
        'dp_c': everywhere,
        'dp_t': everywhere.tril(),
    }[kind]
    assert torch.equal(influence(small(kind, mechanism)), expected)


def test_one_block_of_dp_mixer_is_enough_to_see_the_whole_chunk():
    torch.manual_seed(0)
    one = DPMixerBackbone(DPMixerSize(width=32, hidden=64, blocks=1, time_width=16)).eval()
    assert influence(one).all()


# ---- rules


def test_dp_mlp_computes_the_papers_equations_bit_for_bit():
    """x_{l+1} = LayerNorm(x_l + W2 (gamma * gelu(W1 x_l + b1) + beta) + b2), written out from the file's weights."""
    torch.manual_seed(0)
    denoiser = DPMLPBackbone().eval()
    with torch.no_grad():
        for parameter in denoiser.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    w = denoiser.state_dict()
    noisy, modulation = torch.randn(2, 16, 10), torch.randn(2, 8, 2, 1024)
    x = (torch.einsum('bti,tio->bto', noisy, w['embed_weight']) + w['embed_bias']).contiguous()
    for i in range(8):
        gamma, beta = modulation[:, i, 0], modulation[:, i, 1]
        h = F.gelu(F.linear(x, w[f'blocks.{i}.expand.weight'], w[f'blocks.{i}.expand.bias']))
        h = torch.addcmul(beta[:, None], gamma[:, None], h)
        h = F.linear(h, w[f'blocks.{i}.contract.weight'], w[f'blocks.{i}.contract.bias'])
        x = F.layer_norm(x + h, (256,), w[f'blocks.{i}.norm.weight'], w[f'blocks.{i}.norm.bias'])
    x = F.layer_norm(x, (256,), w['norm.weight'], w['norm.bias'])
    wanted = F.linear(x, w['head.weight'], w['head.bias'])
    with torch.inference_mode():
        assert torch.equal(denoiser(noisy, modulation.flatten(1)), wanted)


def layer_norm(x: torch.Tensor) -> torch.Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()


def rms_norm(x: torch.Tensor) -> torch.Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()


RULES = {
    'film': lambda x, sub, gamma, beta: x + gamma * sub(layer_norm(x)) + beta,
    'adaln': lambda x, sub, gamma, beta: x + sub((1 + gamma) * layer_norm(x) + beta),
    'adaln_zero': lambda x, sub, gamma, beta, alpha: x + alpha * sub((1 + gamma) * layer_norm(x) + beta),
    'ada_rms_norm': lambda x, sub, gamma, beta: x + sub((1 + gamma) * rms_norm(x) + beta),
    'additive': lambda x, sub, delta: x + sub(layer_norm(x)) + delta,
}


@pytest.mark.parametrize('mechanism', RESIDUALS)
def test_each_mechanism_follows_its_rule(mechanism):
    torch.manual_seed(0)
    residual = RESIDUALS[mechanism](12)
    weighted = mechanism in ('film', 'additive')
    assert count(residual) == (24 if weighted else 0)
    x, sublayer = torch.randn(3, 5, 12), nn.Linear(12, 12)
    vectors = [torch.randn(3, 12) for _ in residual.slots(12)]
    wanted = RULES[mechanism](x, sublayer, *(v[:, None] for v in vectors))
    torch.testing.assert_close(residual(x, sublayer, *vectors), wanted, rtol=1e-5, atol=1e-5)
    with torch.autocast('cpu', torch.bfloat16):
        rough = residual(x, sublayer, *(v.bfloat16() for v in vectors))
    torch.testing.assert_close(rough.float(), wanted, rtol=0.1, atol=0.1)


@pytest.mark.parametrize('masked', [False, True])
def test_attention_equals_pytorchs(masked):
    torch.manual_seed(0)
    ours, theirs = Attention(16, 4, 0.3).eval(), nn.MultiheadAttention(16, 4, batch_first=True).eval()
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([ours.query.weight, ours.key_value.weight]))
        theirs.in_proj_bias.copy_(torch.cat([ours.query.bias, ours.key_value.bias]))
    theirs.out_proj.load_state_dict(ours.out.state_dict())
    x, source = torch.randn(2, 6, 16), torch.randn(2, 6 if masked else 3, 16)
    visible = causal_mask(4, 2, x.device) if masked else None
    wanted, _ = theirs(x, source, source, attn_mask=None if visible is None else ~visible)
    torch.testing.assert_close(ours(x, source, visible), wanted, rtol=0, atol=1e-6)


def test_a_prefix_sees_itself_and_waypoints_see_it_and_the_past():
    assert causal_mask(3, 2, torch.device('cpu')).int().tolist() == [
        [1, 1, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 1, 1, 0],
        [1, 1, 1, 1, 1],
    ]


def test_a_convolution_block_scales_and_shifts_between_its_convolutions():
    torch.manual_seed(0)
    block = ConvolutionBlock(10, 16, DPCSize(widths=(16,)))
    x, scale, shift = torch.randn(2, 10, 8), torch.randn(2, 16), torch.randn(2, 16)
    h = torch.stack([s[:, None] * block.first(x[i : i + 1])[0] + b[:, None] for i, (s, b) in
                     enumerate(zip(scale, shift, strict=True))])  # fmt: skip
    torch.testing.assert_close(block(x, scale, shift), block.skip(x) + block.second(h), rtol=0, atol=1e-5)
    assert [slot.start for slot in block.slots] == [1.0, 0.0]


def test_a_block_of_dp_mixer_mixes_time_between_its_own_modulation_and_goes_on_as_dp_mlp():
    torch.manual_seed(0)
    block = small('dp_mixer', 'film').blocks[0]
    x, gamma, beta, alpha, film = (*torch.randn(4, 3, 1, 32), torch.randn(2, 3, 64))
    x = x + torch.randn(3, 16, 32)
    up, down = block.mixing.expand, block.mixing.contract
    y = torch.einsum('ht,btc->bhc', up.weight, (1 + gamma) * layer_norm(x) + beta) + up.bias[:, None]
    y = torch.einsum('th,bhc->btc', down.weight, F.gelu(y)) + down.bias[:, None]
    wanted = block.channels(x + alpha * y, *film)
    torch.testing.assert_close(
        block(x, *(v[:, 0] for v in (gamma, beta, alpha)), *film), wanted, rtol=0, atol=1e-5
    )


@pytest.mark.parametrize('mechanism', DPMixerBackbone.mechanisms)
def test_a_task_can_close_the_mixing_of_a_frozen_dp_mixer(mechanism):
    """With alpha 0 in each block a waypoint sees itself only: what Stage 1 mixed, no task has to live with."""
    backbone = small('dp_mixer', mechanism)
    modulation = torch.randn(1, backbone.needs.size)
    assert influence_under(backbone, modulation).all()
    for vectors in backbone.needs.split(modulation):
        vectors[2].zero_()
    assert torch.equal(influence_under(backbone, modulation), torch.eye(16, dtype=torch.bool))


# ---- conditioning


@every_modulated
def test_split_modulation_equals_the_naive_one(kind, mechanism):
    backbone = small(kind, mechanism)
    assert isinstance(backbone.needs, ModulationLayout)
    conditioning = trained_for_a_while(conditioning_for(backbone, STEPS, STEP_DIM)).double()
    assert isinstance(conditioning, SplitConditioning) and conditioning.kind == mechanism
    tau = backbone.tau(torch.arange(9)).double()
    features = torch.randn(1, STEPS * STEP_DIM).double()
    naive = conditioning(tau, features.expand(9, -1))
    assert naive.shape == (9, backbone.needs.size)
    split = conditioning.time_half(tau) + conditioning.feature_half(features)
    torch.testing.assert_close(split, naive, rtol=0, atol=1e-13)
    torch.testing.assert_close(conditioning.over_steps(tau)(features)[:, 0], naive, rtol=0, atol=1e-13)


@pytest.mark.parametrize('mechanism', ['cross_attention', 'prefix'])
def test_tokens_have_no_halves_and_the_type_says_why(mechanism):
    """What attention reads from them is no sum of a timestep part and an observation part."""
    backbone = small('dp_t', mechanism)
    assert isinstance(backbone.needs, MemoryLayout)
    conditioning = trained_for_a_while(conditioning_for(backbone, STEPS, STEP_DIM))
    assert isinstance(conditioning, TokenConditioning) and not isinstance(conditioning, SplitConditioning)
    assert 'softmax' in TokenConditioning.__doc__ and not hasattr(conditioning, 'time_half')
    taus, observations = backbone.tau(torch.tensor([3, 90])), torch.randn(2, STEPS * STEP_DIM)
    first, waypoints = backbone.layers[0], torch.randn(1, 16, backbone.needs.width)

    def read(i: int, j: int) -> torch.Tensor:
        """What the first layer's attention adds to the waypoints at a timestep and for an observation."""
        memory, _ = backbone.needs.split(conditioning(taus[i : i + 1], observations[j : j + 1]))
        if mechanism == 'cross_attention':
            return first.crossing(waypoints, memory)
        return first.attention(waypoints, torch.cat([memory, waypoints], 1))

    interaction = read(0, 0) - read(0, 1) - read(1, 0) + read(1, 1)
    assert interaction.abs().max() > 1e-3 * read(0, 0).abs().max()


@every_backbone
def test_the_conditioning_moves_the_output_by_timestep_and_by_observation(kind, mechanism):
    backbone = small(kind, mechanism)
    conditioning = trained_for_a_while(conditioning_for(backbone, STEPS, STEP_DIM))
    x, (one, other) = torch.randn(1, 16, 10), torch.randn(2, 1, STEPS * STEP_DIM)
    early, late = backbone.tau(torch.tensor([[3], [90]])[0]), backbone.tau(torch.tensor([90]))
    outputs = [backbone(x, conditioning(tau, c)) for tau, c in ((early, one), (late, one), (early, other))]
    assert (outputs[0] - outputs[1]).abs().max() > 1e-3
    assert (outputs[0] - outputs[2]).abs().max() > 1e-3


@pytest.mark.parametrize(('kind', 'mechanism'), [p for p in EVERY if p[1] in ('adaln_zero', 'additive')])
def test_what_is_closed_before_training_lets_no_observation_through(kind, mechanism):
    backbone = small(kind, mechanism)
    conditioning = conditioning_for(backbone, STEPS, STEP_DIM)
    tau, x = backbone.tau(torch.tensor([50])), torch.randn(1, 16, 10)
    one, other = (backbone(x, conditioning(tau, torch.randn(1, STEPS * STEP_DIM))) for _ in range(2))
    assert torch.equal(one, other)


# ---- files and the engine

VECTORS = ObservationContract(
    20.0,
    STEPS,
    (
        StreamSpec('proprioception', 'proprioception', (9,), 0.2),
        StreamSpec('object_state', 'vector', (3,), 0.2),
    ),
    0.1,
)


def policy_of(kind: str, mechanism: str, objective: ScheduleConfig | None = None) -> Policy:
    """An untrained policy on vectors, its backbone given a hash so that it passes for saved."""
    robot = load_robot('panda_sim')
    fingerprint = Fingerprint.of(robot, 20.0)
    schedule = make_schedule(objective or ScheduleConfig())
    backbone = Backbone(small(kind, mechanism), fingerprint, schedule, kind)
    backbone.normaliser.fit([[0.3, -0.3, -0.1, *[0.0] * 7], [0.7, 0.3, 0.4, *[0.0] * 7]])
    backbone.sha256 = 'not saved'
    task = Task(VECTORS, backbone, name='task')
    trained_for_a_while(task.conditioning)
    return Policy(backbone, task, robot)


def observation() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {s.name: rng.normal(size=(STEPS, *s.shape)).astype(np.float32) for s in VECTORS.streams}


SAMPLED = [
    *((pair, ScheduleConfig(), 'ddim') for pair in EVERY),
    (('dp_mixer', 'film'), ScheduleConfig(), 'ddpm'),
    (('dp_t', 'prefix'), ScheduleConfig(prediction='v'), 'ddim'),
    (('dp_c', 'film'), ScheduleConfig(prediction='sample'), 'ddpm'),
    (('dp_mlp', 'adaln_zero'), ScheduleConfig(kind='rectified_flow'), 'euler'),
    (('dp_t', 'cross_attention'), ScheduleConfig(kind='rectified_flow'), 'euler'),
]


@pytest.mark.parametrize(
    ('pair', 'objective', 'sampler'),
    SAMPLED,
    ids=lambda v: '-'.join(v) if isinstance(v, tuple) else str(v)[-12:],
)
def test_engine_equals_the_naive_computation(pair, objective, sampler):
    policy = policy_of(*pair, objective)
    engine = Engine(policy, steps=10, seed=5, sampler=sampler)
    generator = torch.Generator().manual_seed(5)
    noise = torch.randn(1, 16, 10, generator=generator)
    batch = {name: torch.from_numpy(array)[None] for name, array in observation().items()}
    naive = policy.predict_naive(batch, noise, 10, sampler, generator)[0].numpy()
    np.testing.assert_allclose(engine(observation()).actions, naive, atol=5e-5)
    assert np.ptp(naive) > 1e-3


@pytest.mark.parametrize(
    ('pair', 'objective', 'sampler'), SAMPLED[-5:], ids=lambda v: '-'.join(v) if isinstance(v, tuple) else ''
)
def test_chunks_of_several_observations_at_once_are_those_of_each_alone(pair, objective, sampler):
    engine = Engine(policy_of(*pair, objective), steps=4, sampler=sampler)
    scenes = [{name: array + 0.3 * i for name, array in observation().items()} for i in range(3)]
    alone = []
    for seed, scene in enumerate(scenes):
        engine.reset(seed)
        alone.append([engine(scene).actions for _ in range(2)])
    generators = [torch.Generator().manual_seed(seed) for seed in range(3)]
    for cycle in range(2):
        together = engine.many(scenes, generators)
        np.testing.assert_allclose(together[:, 0], [chunks[cycle] for chunks in alone], atol=2e-5)
    assert np.abs(together[0] - together[1]).max() > 1e-3


@every_backbone
def test_a_checkpoint_comes_back_bit_for_bit(kind, mechanism, tmp_path):
    objective = (
        ScheduleConfig(50, 'rectified_flow') if mechanism == 'film' else ScheduleConfig(prediction='v')
    )
    policy = policy_of(kind, mechanism, objective)
    policy.task.backbone_sha256 = save_backbone(tmp_path / 'backbones' / kind, policy.backbone)
    save_task(tmp_path / 'tasks' / 'task', policy.task)
    loaded = load_policy(tmp_path / 'tasks' / 'task', policy.robot)
    denoiser = loaded.backbone.denoiser
    assert (denoiser.kind, denoiser.mechanism) == (kind, mechanism)
    assert denoiser.config == policy.backbone.denoiser.config
    assert loaded.backbone.schedule.config == objective
    assert not any(p.requires_grad for p in loaded.backbone.parameters()) and not loaded.backbone.training
    ours, theirs = Engine(policy, 4, seed=1)(observation()), Engine(loaded, 4, seed=1)(observation())
    np.testing.assert_array_equal(ours.actions, theirs.actions)


def test_a_task_that_conditions_in_another_way_is_refused_with_both(tmp_path):
    film, adaln = (policy_of('dp_t', mechanism) for mechanism in ('film', 'adaln'))
    film.task.backbone_sha256 = save_backbone(tmp_path / 'film', film.backbone)
    save_task(tmp_path / 'task', film.task)
    adaln.backbone.sha256 = film.backbone.sha256
    with pytest.raises(
        CheckpointError, match=r"conditions by 'film', but backbone 'dp_t' is conditioned by 'adaln'"
    ):
        load_task(tmp_path / 'task', adaln.backbone)


def test_sizes_in_a_file_that_can_not_be_are_refused(tmp_path):
    policy = policy_of('dp_c', 'film')
    policy.backbone.denoiser.config['horizon'] = 10
    save_backbone(tmp_path, policy.backbone)
    with pytest.raises(CheckpointError, match=r'does not describe a model.*multiple of 4'):
        load_backbone(tmp_path)


@every_backbone
def test_the_noise_reaches_the_network_in_float32_under_autocast(kind, mechanism):
    """At the last denoising steps it is finer than bfloat16, in which 1 + 2^-9 is 1."""
    backbone = small(kind, mechanism)
    entrance = {'dp_t': 'layers.0', 'dp_c': 'down.0.0.second'}.get(kind, 'blocks.0')
    entered, left = [], []
    backbone.get_submodule(entrance).register_forward_pre_hook(
        lambda module, inputs: entered.append(inputs[0])
    )
    backbone.head.register_forward_hook(lambda module, inputs, output: left.append(output))
    conditioning = conditioning_for(backbone, STEPS, STEP_DIM)
    with torch.inference_mode(), torch.autocast('cpu', torch.bfloat16):
        modulation = conditioning(backbone.tau(torch.tensor([2])), torch.randn(1, STEPS * STEP_DIM))
        for x in (1, 1 + 2**-9):
            backbone(torch.full((1, 16, 10), x), modulation)
    assert all(x.dtype == torch.float32 for x in (*entered, *left))
    assert not torch.equal(*entered)


@pytest.mark.parametrize('precision', ['float32', 'bfloat16'])
@every_backbone
def test_every_weight_is_learned(kind, mechanism, precision):
    backbone = small(kind, mechanism)
    conditioning = trained_for_a_while(conditioning_for(backbone, STEPS, STEP_DIM))
    with torch.autocast('cpu', torch.bfloat16, enabled=precision == 'bfloat16'):
        modulation = conditioning(backbone.tau(torch.arange(4)), torch.randn(4, STEPS * STEP_DIM))
        loss = backbone(torch.randn(4, 16, 10), modulation).square().sum()
    loss.backward()
    for module in (backbone, conditioning):
        idle = [name for name, p in module.named_parameters() if p.grad is None or not p.grad.any()]
        assert idle == []
