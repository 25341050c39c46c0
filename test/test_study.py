"""Studies: the grid is trained and evaluated once, resumes, and becomes tables."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import yaml
from tiny_sentences import save_sentence_model

from decoupled_policy_ros import cli
from decoupled_policy_ros.data.motions.motions import MotionWriter, synth_motions
from decoupled_policy_ros.errors import ConfigError
from decoupled_policy_ros.policy.backbones import DPMLPSize
from decoupled_policy_ros.policy.checkpoint import find_model, read_header, save_backbone
from decoupled_policy_ros.robot.description import load_robot
from decoupled_policy_ros.robot.fingerprint import Fingerprint
from decoupled_policy_ros.training.evaluation import wilson_interval
from decoupled_policy_ros.training.network import DEFAULT_BACKBONE, new_backbone
from decoupled_policy_ros.training.scenes import EpisodeResult
from decoupled_policy_ros.training.study import load_study, publish, require_place, run_studies
from decoupled_policy_ros.training.study.config import merged
from decoupled_policy_ros.training.study.job_kinds import Cell, DemonstrationsJob, Stage1Job, _begin, _pooled
from decoupled_policy_ros.training.study.jobs import plan
from decoupled_policy_ros.training.study.run import _planned, _wanted
from decoupled_policy_ros.training.study.tables import Row, insert_table, table, write_results

ROOT = Path(__file__).resolve().parent.parent
LOOP = {'steps': 2, 'batch_size': 4, 'warmup_steps': 1, 'threads': 1}
SMALL = {'kind': 'dp_mlp', 'width': 16, 'hidden': 32, 'blocks': 1, 'time_width': 16}


def values(dataset, **changes) -> dict:
    return {
        'name': 'small',
        'title': 'A small one',
        'tasks': {'lift': {'dataset': str(dataset), 'demonstrations': 1, 'words': {'other': '12'}}},
        'backbones': {'DP-MLP': {'backbone': SMALL}},
        'recipes': {
            'normal': {'train': 'normal'},
            'decoupled': {'train': 'decoupled', 'stage1': {'sources': [{'demonstrations': '{dataset}'}]}},
            'unconditional': {
                'train': 'decoupled',
                'stage1': {'sources': [{'demonstrations': '{dataset}'}], 'condition': 'none'},
            },
            'random': {'train': 'random'},
        },
        'seeds': [0, 42],
        'rollouts': {'episodes': 1, 'max_steps': 3},
        'stage1': {'rate_hz': 20.0, 'optimisation': LOOP},
        'stage2': {'vectors': ['proprioception', 'object_state'], 'optimisation': LOOP},
    } | changes


def study_file(path, dataset, **changes):
    path.write_text(yaml.safe_dump(values(dataset, **changes), sort_keys=False))
    return path


def test_a_study_runs_resumes_and_writes_its_tables(tmp_path, monkeypatch, capfd):
    recipes = {name: recipe for name, recipe in values('')['recipes'].items() if name != 'unconditional'}
    config = study_file(tmp_path / 'small.yaml', tmp_path / 'demos', seeds=[7], recipes=recipes)
    document = tmp_path / 'evidence.md'
    document.write_text('# Evidence\n\n<!-- study small -->\nold\n<!-- end -->\nThe end.\n')
    command = ['decoupled-policy', 'study', str(config), '--out', str(tmp_path / 'out')]
    command += ['--results', str(tmp_path / 'results'), '--document', str(document)]
    monkeypatch.setattr(sys, 'argv', command)
    cli.main()
    printed = capfd.readouterr().out
    assert '0 of 5 runs are done' in printed and '5/5' in printed  # demonstrations, a backbone, 3 cells
    raw = json.loads((tmp_path / 'results' / 'small.json').read_text())
    assert [row['recipe'] for row in raw['rows']] == ['normal', 'decoupled', 'random']
    outcomes = [row['seeds']['7'] for row in raw['rows']]
    assert all(o['episodes'] == 1 and len(o['results']) == 1 for o in outcomes)
    # Shared or frozen: the same weights count, whoever trained them.
    assert len({o['backbone_parameters'] for o in outcomes}) == 1
    assert outcomes[0]['trained_parameters'] > outcomes[1]['trained_parameters']
    assert all(o['computed_in'] == ['cpu, float32'] for o in outcomes)
    text = document.read_text()
    assert text.startswith('# Evidence') and text.endswith('The end.\n') and 'old' not in text
    assert text.count('| lift |') == 3
    assert (tmp_path / 'results' / 'small.png').stat().st_size > 1000

    stamps = {p: p.stat().st_mtime_ns for p in (tmp_path / 'out').rglob('*.safetensors')}
    (next((tmp_path / 'out' / 'cells').glob('*random*')) / 'outcome.json').unlink()
    cli.main()
    # The outcome that was deleted is in the results, so nothing is done again, there or on another machine.
    assert '5 of 5 runs are done' in capfd.readouterr().out
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / 'out').rglob('*.safetensors')} == stamps
    shutil.rmtree(tmp_path / 'out')
    cli.main()
    assert '5 of 5 runs are done' in capfd.readouterr().out
    assert not list((tmp_path / 'out').rglob('*.safetensors'))
    assert json.loads((tmp_path / 'results' / 'small.json').read_text()) == raw

    foreign = [dict(row, seeds={'7': row['seeds']['7'] | {'run': 'another'}}) for row in raw['rows']]
    (tmp_path / 'results' / 'small.json').write_text(json.dumps(raw | {'rows': foreign}))
    shutil.rmtree(tmp_path / 'out')
    cli.main()
    assert '1 of 5 runs are done' in capfd.readouterr().out  # the demonstrations are there

    (tmp_path / 'results' / 'small.json').write_text('[]')
    with pytest.raises(SystemExit):
        cli.main()
    assert 'holds no results of a study' in capfd.readouterr().err

    for task, count, message in (
        (
            'lift',
            2,
            r"holds 1 demonstrations of 'lift the red cube' without pictures, and 2 demonstrations of lift",
        ),
        (
            'stack',
            1,
            r"holds 1 demonstrations of 'lift the red cube' .* and 1 demonstrations of stack by .* \('stack",
        ),
    ):
        other = {task: {'dataset': str(tmp_path / 'demos'), 'demonstrations': count}}
        recipes = {'random': {'train': 'random'}}
        study = load_study(study_file(tmp_path / 'other.yaml', '', tasks=other, recipes=recipes))
        with pytest.raises(ConfigError, match=message):
            run_studies([study], tmp_path / 'out')


def test_the_plan_shares_what_is_the_same(tmp_path):
    study = load_study(study_file(tmp_path / 'a.yaml', tmp_path / 'demos'))
    jobs, cells = plan(study, tmp_path / 'out')
    kinds = [type(job) for job in jobs]
    # Both seeds use the same two backbones of Stage 1.
    assert [kinds.count(k) for k in (DemonstrationsJob, Stage1Job, Cell)] == [1, 2, 8]
    assert len(cells) == 8
    for job in jobs:  # nothing comes before what it waits for
        assert all(path in [other.folder for other in jobs[: jobs.index(job)]] for path in job.inputs)

    same = values(tmp_path / 'demos', name='other', title='Another', seeds=[42])
    del same['recipes']['normal']
    same['stage1']['optimisation'] = LOOP | {'threads': 2}  # computes the same
    (tmp_path / 'b.yaml').write_text(yaml.safe_dump(same))
    others, _ = plan(load_study(tmp_path / 'b.yaml'), tmp_path / 'out')
    assert {job.folder for job in others} < {job.folder for job in jobs}
    elsewhere, _ = plan(study, tmp_path / 'elsewhere')
    assert [job.folder.name for job in elsewhere] == [job.folder.name for job in jobs]

    longer = values(tmp_path / 'demos', stage1={'optimisation': LOOP | {'steps': 3}})
    (tmp_path / 'c.yaml').write_text(yaml.safe_dump(longer))
    changed, _ = plan(load_study(tmp_path / 'c.yaml'), tmp_path / 'out')
    shared = {job.folder for job in changed} & {job.folder for job in jobs}
    assert sum('normal' in path.name or 'random' in path.name for path in shared) == 4
    assert not any('decoupled' in path.name for path in shared)


def test_a_run_that_fails_is_named_and_the_others_go_on(tmp_path, capfd):
    recipes = {
        'wrong': {
            'train': 'decoupled',
            'stage1': {'sources': [{'demonstrations': str(tmp_path / 'missing')}]},
        },
        'random': {'train': 'random'},
    }
    config = study_file(tmp_path / 'a.yaml', tmp_path / 'demos', recipes=recipes, seeds=[0])
    study = load_study(config)
    cells = run_studies([study], tmp_path / 'out')['small']
    assert {place.recipe: cell.done for place, cell in cells.items()} == {'wrong': False, 'random': True}
    printed = capfd.readouterr().out
    assert 'failed: dp_mlp-' in printed and 'missing' in printed
    again = run_studies([study], tmp_path / 'out', workers=0)['small']
    assert '2 of 4 runs are done' in capfd.readouterr().out and again == cells  # and nothing was tried
    text = write_results(study, cells, tmp_path / 'results')
    assert '| lift | DP-MLP | wrong | - | - |' in text and '| lift | DP-MLP | random | 0.0' in text


def test_a_benchmark_is_evaluated_by_its_own_protocol(tmp_path):
    tasks = {'mimicgen/stack_d1': {'dataset': 'stack_d1.hdf5'}, 'libero_goal/3': {'dataset': 'libero_goal'}}
    stage2 = values('')['stage2'] | {'validation': {'every': 1, 'held_out': 0.1}}
    path = study_file(
        tmp_path / 'a.yaml', '', tasks=tasks, stage2=stage2, rollouts={}, recipes={'n': {'train': 'normal'}}
    )
    _, cells = plan(load_study(path), tmp_path / 'out', [0])
    usual = [(c.rollouts.checkpoint, c.rollouts.episodes, c.rollouts.seed) for c in cells.values()]
    assert usual == [('best', 50, 100_000), ('last', 50, 0)]
    assert [(c.rollouts.sampler, c.rollouts.denoising_steps) for c in cells.values()] == [
        ('ddpm', 100),
        (None, 10),
    ]


def test_a_run_that_fails_is_not_tried_by_another_process(tmp_path, capfd):
    missing = [{'demonstrations': str(tmp_path / 'missing')}]
    recipes = {
        name: {'train': 'decoupled', 'stage1': {'sources': missing, 'rate_hz': rate}}
        for name, rate in (('a', 20.0), ('b', 10.0), ('c', 5.0))
    }
    study = load_study(study_file(tmp_path / 'a.yaml', tmp_path / 'demos', recipes=recipes, seeds=[0]))
    run_studies([study], tmp_path / 'out', workers=2)
    logs = list((tmp_path / 'out' / 'stage1').glob('*/error.txt'))
    assert len(logs) == 3 and capfd.readouterr().out.count('failed: ') == 3


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'recipes': {'a': {'train': 'half'}}}, "'decoupled', 'normal' or 'random'"),
        ({'name': 'a b'}, 'name'),
        ({'seeds': []}, 'seeds'),
        ({'colour': 1}, 'colour'),
        ({'tasks': {'lift': {'dataset': 'nowhere'}}}, 'decoupled-policy demos --task lift'),
        ({'stage2': {'optimisation': LOOP | {'steps': 0}}}, 'lift / DP-MLP / normal.*optimisation.steps'),
        (
            {
                'recipes': {
                    'a': {'train': 'decoupled', 'stage1': {'sources': [{'demonstrations': '{nobody}'}]}}
                }
            },
            '{nobody}.*valid: {dataset}, {other}, {task}',
        ),
        (
            {'tasks': {'liftt': {'dataset': 'demos', 'demonstrations': 1}}},
            "liftt / DP-MLP / normal: unknown.*'liftt'",
        ),
        ({'rollouts': {'checkpoint': 'best'}}, 'no section `validation`'),
        ({'rollouts': {'denoising_steps': 500}}, r'in 1\.\.100 \(the training steps\), got 500'),
        ({'rollouts': {'sampler': 'euler'}}, "'euler' does not exist with a 'squared_cosine'"),
        (
            {
                'backbones': {'flow': {'backbone': SMALL, 'objective': {'kind': 'rectified_flow'}}},
                'recipes': {'a': {'train': 'decoupled', 'stage1': {'sources': [{'synthetic': 2}]}}},
                'rollouts': {'sampler': 'ddim'},
            },
            "'ddim' does not exist with a 'rectified_flow'",
        ),
        (
            {
                'backbones': {'given': {'stage2': {'backbone': 'dp_mixer_panda'}}},
                'recipes': {'decoupled': {'train': 'decoupled'}},
                'rollouts': {'sampler': 'euler'},
            },
            "given / decoupled: sampler 'euler'",
        ),
        *(
            (
                {
                    'backbones': {'named': {**named, 'stage2': {'backbone': 'dp_mixer_panda'}}},
                    'recipes': {'decoupled': {'train': 'decoupled'}},
                },
                message,
            )
            for named, message in (
                (
                    {'backbone': SMALL},
                    "backbone.kind is 'dp_mlp', but the finished .* 'dp_mixer_panda' has 'dp_mixer'",
                ),
                (
                    {'backbone': {'kind': 'dp_mixer', 'width': 512}},
                    'backbone.width is 512, but the finished .* has 256',
                ),
                (
                    {'conditioning': {'kind': 'adaln_zero'}},
                    "conditioning.kind is 'adaln_zero', but .* has 'film'",
                ),
                ({'objective': {'foo': 1}}, 'objective.foo'),
                ({'objective': {'training_steps': 'abc'}}, 'objective.training_steps'),
                (
                    {'objective': {'prediction': 'sample'}},
                    "objective is .*'sample'.*, but .* has .*'epsilon'",
                ),
            )
        ),
        ({'tasks': {'libero_goal/3': {'dataset': 'x'}}, 'rollouts': {'seed': 9}}, 'got scenes 9 to 58'),
        ({'stage1': {'backbone': 'dp_mlp'}, 'backbones': {'any': {}}}, 'backbone: '),
        ({'stage1': {'optimisation': 5}}, 'optimisation: .*got 5'),
        (
            {'stage2': {'instruction': '{dataset.name}', 'optimisation': LOOP}},
            'names a word that is not there',
        ),
        ({'backbones': {'x': {'backbone': {'kind': 5}}}}, r"backbone\.size: Input tag '5'"),
        ({'seeds': [10**14]}, 'optimisation.seed'),
        ({'tasks': {'x': {'task': ['lift', 'lift'], 'dataset': 'x'}}}, 'task names one twice: lift, lift'),
        ({'rollouts': {'seed': 2**32}}, 'a seed is in 0'),
        (
            {'stage2': {'optimisation': LOOP, 'validation': {'every': 3, 'held_out': 0.5}}},
            'validation.every 3',
        ),
        (
            {
                'stage2': {
                    'vectors': ['proprioception'],
                    'optimisation': LOOP,
                    'validation': {'every': 1, 'task': 'left'},
                }
            },
            "unknown simulated task 'left'",
        ),
    ],
)
def test_a_wrong_study_is_refused_before_anything_runs(changes, message, tmp_path):
    config = study_file(tmp_path / 'a.yaml', tmp_path / 'demos', **changes)
    with pytest.raises(ConfigError, match=message):
        run_studies([load_study(config)], tmp_path / 'out')
    assert not (tmp_path / 'out').exists()


def test_motion_for_stage_1_is_made_before_the_backbone_that_reads_it(tmp_path):
    other = tmp_path / 'other'
    recipes = {'other': {'train': 'decoupled', 'stage1': {'sources': [{'demonstrations': str(other)}]}}}
    motions = {str(other): {'task': 'stack', 'robot': 'ur5e_sim', 'episodes': 2}}
    config = study_file(tmp_path / 'a.yaml', tmp_path / 'demos', recipes=recipes, motions=motions, seeds=[0])
    jobs, _ = plan(load_study(config), tmp_path / 'out')
    assert [type(job) for job in jobs] == [DemonstrationsJob, DemonstrationsJob, Stage1Job, Cell]
    assert (jobs[0].folder, jobs[0].tasks, jobs[0].robot, jobs[0].episodes) == (
        other,
        ('stack',),
        'ur5e_sim',
        2,
    )
    assert jobs[2].inputs == (other,)


def test_a_finished_backbone_can_be_named(tmp_path):
    given = {'dp_mixer_panda': {'stage2': {'backbone': 'dp_mixer_panda'}}}
    recipes = {'decoupled': {'train': 'decoupled'}}
    config = study_file(tmp_path / 'a.yaml', tmp_path / 'demos', backbones=given, recipes=recipes, seeds=[0])
    jobs, cells = plan(load_study(config), tmp_path / 'out')
    assert [type(job) for job in jobs] == [DemonstrationsJob, Cell]
    assert next(iter(cells.values())).config.backbone == 'dp_mixer_panda'


def outcome_of(cell: Cell, **changes) -> dict:
    return {
        'run': cell.folder.name, 'successes': 1, 'episodes': 2, 'torn_chunks': 0.0, 'final_loss': 0.1, 'results': [],
        'backbone_parameters': 5, 'trained_parameters': 7,
    } | changes  # fmt: skip


def test_an_outcome_on_another_backbone_of_the_same_name_does_not_count(tmp_path):
    given = {'dp_mixer_panda': {'stage2': {'backbone': 'dp_mixer_panda'}}}
    recipes = {'decoupled': {'train': 'decoupled'}}
    config = study_file(tmp_path / 'a.yaml', tmp_path / 'demos', backbones=given, recipes=recipes, seeds=[0])
    (cell,) = plan(load_study(config), tmp_path / 'out')[1].values()
    sha256 = read_header(find_model('backbones', 'dp_mixer_panda'))['sha256']
    cell.take(outcome_of(cell, backbone_sha256='f' * 64))
    assert not cell.done
    cell.take(outcome_of(cell, backbone_sha256=sha256, demonstrations=2))  # one is wanted
    assert not cell.done
    cell.take(outcome_of(cell, backbone_sha256=sha256, demonstrations=1))
    assert cell.done


def test_what_is_made_anew_under_its_old_name_is_trained_on_anew(tmp_path):
    demos, backbone = tmp_path / 'demos', tmp_path / 'backbone'
    recipes = {'decoupled': values('')['recipes']['decoupled']}
    recipes['on_a_finished_one'] = {'train': 'decoupled', 'stage2': {'backbone': str(backbone)}}
    fingerprint, size = Fingerprint.of(load_robot('panda_sim'), 20.0), DPMLPSize(**SMALL)
    outcomes = []
    for count, name in ((1, 'first'), (2, 'second')):
        tasks = {'lift': {'dataset': str(demos), 'demonstrations': count}}
        config = study_file(tmp_path / 'a.yaml', '', tasks=tasks, recipes=recipes, seeds=[0])
        shutil.rmtree(demos, ignore_errors=True)
        finished = new_backbone(size, None, None, fingerprint, name)
        finished.normaliser.fit([[-2.0] * 10, [2.0] * 10])
        save_backbone(backbone, finished)
        cells = run_studies([load_study(config)], tmp_path / 'out')['small'].values()
        assert all(cell.done for cell in cells)
        outcomes.append([cell.outcome for cell in cells])
    for before, after in zip(*outcomes, strict=True):
        assert (before['run'], before['demonstrations']) == (after['run'], 1) and after['demonstrations'] == 2
        assert before['task_sha256'] != after['task_sha256']
        assert before['backbone_sha256'] != after['backbone_sha256']


@pytest.mark.parametrize(
    ('outcome', 'kept'),
    [(None, True), ({}, True), ({'demonstrations': 2}, True), ({'demonstrations': 1}, False)],
)
def test_a_folder_that_does_not_say_what_it_is_made_of_goes_by_its_outcome(outcome, kept, tmp_path):
    weights = tmp_path / 'best' / 'task.safetensors'
    weights.parent.mkdir()
    weights.touch()
    if outcome is not None:
        (tmp_path / 'outcome.json').write_text(json.dumps(outcome))
    _begin(tmp_path, {'demonstrations': 2})
    assert weights.exists() == (tmp_path / 'best').exists() == kept
    assert (tmp_path / 'outcome.json').exists() == (kept and outcome is not None)
    assert json.loads((tmp_path / 'made_of.json').read_text()) == {'demonstrations': 2}


def test_two_backbones_of_one_name_and_two_kinds_of_demonstrations_in_one_folder_are_refused(tmp_path):
    given = {name: {'stage2': {'backbone': f'out/{name}/backbone'}} for name in 'AB'}
    recipes = {'decoupled': {'train': 'decoupled'}}
    config = study_file(tmp_path / 'a.yaml', tmp_path / 'demos', backbones=given, recipes=recipes)
    with pytest.raises(ConfigError, match='out/A/backbone and out/B/backbone have the same'):
        plan(load_study(config), tmp_path / 'out')
    tasks = {
        name: {'task': 'lift', 'dataset': str(tmp_path / 'demos'), 'demonstrations': count}
        for name, count in (('few', 1), ('many', 9))
    }
    config = study_file(tmp_path / 'b.yaml', '', tasks=tasks, recipes={'random': {'train': 'random'}})
    with pytest.raises(ConfigError, match=r'9 demonstrations of lift .* here and 1 demonstrations of lift'):
        plan(load_study(config), tmp_path / 'out')


def test_a_folder_that_holds_motion_in_place_of_the_demonstrations_is_refused(tmp_path):
    robot = load_robot('panda_sim')
    (tmp_path / 'demos').mkdir()
    for number, motion in enumerate(synth_motions(robot, 3, 0, 20.0)):
        with MotionWriter(tmp_path / 'demos' / f'{number}.arrow', Fingerprint.of(robot, 0.0)) as writer:
            writer.append(motion.stamps_ns, motion.joint_positions, motion.actions)
    study = load_study(study_file(tmp_path / 'a.yaml', tmp_path / 'demos'))
    with pytest.raises(
        ConfigError, match=r"demos holds 3 demonstrations of '.*' without pictures, and 1 demonstrations"
    ):
        run_studies([study], tmp_path / 'out')


def test_some_seeds_leave_what_is_known_of_the_others(tmp_path):
    study = load_study(study_file(tmp_path / 'a.yaml', tmp_path / 'demos'))
    out, results = tmp_path / 'out', tmp_path / 'results'
    cells = run_studies([study], out, workers=0)['small']
    for cell in cells.values():
        cell.take(outcome_of(cell))
    whole = write_results(study, cells, results)
    shutil.rmtree(out)
    cells = run_studies([study], out, seeds=[42], workers=0, results=results)['small']
    assert write_results(study, cells, results) == whole and '| seed 0 | seed 42 |' in whole
    with pytest.raises(ConfigError, match='no study has seed 1; there are 0, 42'):
        run_studies([study], out, seeds=[1], workers=0, results=results)


def test_what_only_a_later_run_needs_is_made_later(tmp_path):
    recipes = {name: values('')['recipes'][name] for name in ('decoupled', 'unconditional')}
    study = load_study(study_file(tmp_path / 'a.yaml', tmp_path / 'demos', recipes=recipes))
    jobs, cells = _planned([study], tmp_path / 'out', None)
    first, second, third, fourth = (job for job in jobs.values() if isinstance(job, Cell))
    assert list(cells['small'].values()) == [first, second, third, fourth]
    demonstrations = jobs[tmp_path / 'demos']
    decoupled, unconditional = (job for job in jobs.values() if isinstance(job, Stage1Job))
    assert _wanted(jobs) == [demonstrations, decoupled, first, unconditional, second, third, fourth]
    first.take(outcome_of(first))
    assert _wanted(jobs) == [demonstrations, unconditional, second, decoupled, third, fourth]


def test_a_backbone_that_is_not_described_is_the_default_one(tmp_path):
    config = study_file(
        tmp_path / 'a.yaml', tmp_path / 'demos', backbones={'A': {}, 'B': {'backbone': {'width': 96}}}
    )
    _, cells = plan(load_study(config), tmp_path / 'out')
    assert {cell.folder.name.split('-')[1] for cell in cells.values()} == {'given', DEFAULT_BACKBONE.kind}


def test_the_best_weights_of_normal_training_are_evaluated_and_a_lost_report_is_made_again(tmp_path):
    tasks = {'lift': {'dataset': str(tmp_path / 'demos'), 'demonstrations': 2}}
    stage2 = values('')['stage2'] | {'validation': {'every': 1, 'held_out': 0.5}}
    rollouts = {'episodes': 1, 'max_steps': 3, 'checkpoint': 'best'}
    recipes = {'normal': {'train': 'normal'}}
    config = study_file(
        tmp_path / 'a.yaml', '', tasks=tasks, stage2=stage2, rollouts=rollouts, recipes=recipes, seeds=[0]
    )
    study = load_study(config)
    (cell,) = run_studies([study], tmp_path / 'out')['small'].values()
    assert cell.done and (cell.folder / 'best' / 'backbone').is_dir()
    sha256 = cell.outcome['task_sha256']
    for name in ('run.json', 'outcome.json'):  # killed after the weights were written
        (cell.folder / name).unlink()
    (cell,) = run_studies([study], tmp_path / 'out')['small'].values()
    assert cell.done and cell.outcome['task_sha256'] == sha256


def test_one_policy_of_a_study_may_do_several_tasks(tmp_path):
    """Told apart by the instruction, in one scene: each is evaluated with its own, and the row counts all episodes."""
    model = save_sentence_model(tmp_path / 'sentences')
    both = ['lift_red', 'lift_green']
    tasks = {'two cubes': {'task': both, 'dataset': str(tmp_path / 'demos'), 'demonstrations': 1}}
    stage2 = values('')['stage2'] | {'language': {'model': str(model), 'feature_dim': 4}}
    rollouts = {'episodes': 2, 'max_steps': 3}
    recipes = {'random': {'train': 'random'}}
    file = study_file(
        tmp_path / 'a.yaml', '', tasks=tasks, stage2=stage2, rollouts=rollouts, recipes=recipes, seeds=[0]
    )
    study = load_study(file)
    cells = run_studies([study], tmp_path / 'out')['small']
    (cell,) = cells.values()
    outcome = cell.outcome
    assert [(r['task'], r['seed']) for r in outcome['results']] == [
        (t, seed) for t in both for seed in (0, 1)
    ]
    assert outcome['episodes'] == 4 and all(r['chunks'] for r in outcome['results'])
    reports = json.loads((cell.folder / 'evaluation.json').read_text())['reports']
    assert [report['task'] for report in reports] == both
    assert '| two cubes | DP-MLP | random |' in write_results(study, cells, tmp_path / 'results')

    DemonstrationsJob(tmp_path / 'demos', ('lift_green', 'lift_red'), 1, 'panda_sim').require_wanted()
    with pytest.raises(ConfigError, match='and 2 demonstrations of lift_red by panda_sim'):
        DemonstrationsJob(tmp_path / 'demos', ('lift_red',), 2, 'panda_sim').require_wanted()


def test_reports_of_several_tasks_are_pooled_by_their_episodes_and_chunks():
    episodes = [
        asdict(EpisodeResult(seed, success, 9, chunks, torn))
        for seed, success, chunks, torn in ((0, True, 10, 1), (1, False, 30, 7))
    ]
    alone = _pooled([{'task': 'lift', 'results': episodes}])
    assert alone['results'] == episodes and (alone['successes'], alone['episodes']) == (1, 2)
    assert alone['torn_chunks'] == 8 / 40
    two = _pooled([{'task': 'lift', 'results': episodes}, {'task': 'stack', 'results': episodes[:1]}])
    assert (two['successes'], two['episodes'], two['torn_chunks']) == (2, 3, 9 / 50)
    assert two['wilson_95'] == wilson_interval(2, 3)
    assert [result['task'] for result in two['results']] == ['lift', 'lift', 'stack']


def test_a_study_of_a_benchmark_has_one_policy_for_all_its_tasks(tmp_path):
    tasks = {'libero_goal': {'dataset': 'libero_goal'}}
    recipes = {'n': {'train': 'normal'}}
    path = study_file(tmp_path / 'a.yaml', '', tasks=tasks, rollouts={}, recipes=recipes, seeds=[0])
    _, cells = plan(load_study(path), tmp_path / 'out')
    (cell,) = cells.values()
    assert cell.tasks == tuple(f'libero_goal/{number}' for number in range(10))
    assert (cell.rollouts.checkpoint, cell.rollouts.episodes) == ('last', 50)


def test_studies_extend_what_they_have_in_common(tmp_path):
    common = values(tmp_path / 'demos')
    del common['name'], common['title']
    (tmp_path / 'common.yaml').write_text(yaml.safe_dump(common))
    own = {'extends': 'common.yaml', 'name': 'a', 'title': 'A', 'stage2': {'optimisation': {'steps': 9}}}
    (tmp_path / 'a.yaml').write_text(yaml.safe_dump(own))
    study = load_study(tmp_path / 'a.yaml')
    assert study.stage2['optimisation'] == LOOP | {'steps': 9} and study.tasks['lift'].demonstrations == 1
    (tmp_path / 'a.yaml').write_text(yaml.safe_dump(own | {'extends': 'nowhere.yaml'}))
    with pytest.raises(ConfigError, match=r'nowhere\.yaml'):
        load_study(tmp_path / 'a.yaml')


@pytest.mark.parametrize('path', sorted((ROOT / 'config' / 'studies').glob('*.yaml')), ids=lambda p: p.stem)
def test_the_studies_of_the_package_can_be_planned(path, tmp_path):
    study = load_study(path)
    _, cells = plan(study, tmp_path)
    assert len(cells) == len(study.tasks) * len(study.backbones) * len(study.recipes) * len(study.seeds)


def test_the_documents_tables_are_those_of_the_raw_outcomes():
    """Every success, seed by seed, is counted again in the episodes that are committed."""
    document = (ROOT / 'docs' / 'evidence.md').read_text()
    for path in (ROOT / 'config' / 'studies').glob('*.yaml'):
        study = load_study(path)
        raw = json.loads((ROOT / 'docs' / 'evidence' / f'{study.name}.json').read_text())
        rows = [
            Row(r['task'], r['backbone'], r['recipe'], {int(seed): o for seed, o in r['seeds'].items()})
            for r in raw['rows']
        ]
        for outcome in (outcome for row in rows for outcome in row.done):
            assert outcome['successes'] == sum(result['success'] for result in outcome['results'])
            assert outcome['episodes'] == len({(r.get('task'), r['seed']) for r in outcome['results']})
        assert f'<!-- study {study.name} -->\n{table(study, rows)}<!-- end -->\n' in document


def test_what_the_document_says_of_instructions_is_what_was_counted():
    document = (ROOT / 'docs' / 'evidence.md').read_text()
    rows = json.loads((ROOT / 'docs' / 'evidence' / 'language.json').read_text())['rows']
    assert len(rows) == 6
    for row in rows:
        results = row['results']
        assert row['done_meant'] == sum(result['done'] == row['meant'] for result in results)
        low, high = wilson_interval(row['done_meant'], len(results))
        line = (
            f'| {row["said"]} | {"yes" if row["trained_on"] else "no"} '
            f'| **{row["done_meant"]} of {len(results)}**, {low:.0%} to {high:.0%} | {row["done_other"]} of 50 '
            f'| {row["lifted_first_meant"]} / {row["lifted_first_other"]} |'
        )
        assert line.replace('% to', ' to').replace('%', ' %') in document


def test_what_the_document_says_of_attention_is_what_was_measured():
    document = (ROOT / 'docs' / 'evidence.md').read_text()
    measured = json.loads((ROOT / 'docs' / 'bench' / 'token_attention.json').read_text())
    assert len(measured) == 3
    for run in measured.values():
        losses = ' | '.join(f'{run["loss_by_condition"][key]:.2g}' for key in ('own', 'reordered', 'another'))
        share = f'{np.mean(run["share_of_own_frame"]):.3f}'
        name = f'{run["mechanism"].replace("_", "-")}, {run["steps"]:,} steps'
        assert f'| {name} | {losses} | {share}' in document


def test_sections_merge_and_lists_are_replaced():
    assert merged({'a': {'b': 1, 'c': [1]}}, {'a': {'c': [2]}}, {'d': 3, 'e': 4}, {'e': None}) == {
        'a': {'b': 1, 'c': [2]},
        'd': 3,
    }


def test_a_document_without_a_place_for_the_table_is_refused(tmp_path, monkeypatch):
    (tmp_path / 'a.md').write_text('nothing\n')
    with pytest.raises(ConfigError, match='<!-- study small -->'):
        insert_table(tmp_path / 'a.md', 'small', 'x')
    with pytest.raises(ConfigError, match=r'b\.md can not be read: '):
        insert_table(tmp_path / 'b.md', 'small', 'x')
    config = study_file(tmp_path / 'small.yaml', tmp_path / 'demos')
    arguments = ['--out', str(tmp_path / 'out'), '--document', str(tmp_path / 'a.md')]
    monkeypatch.setattr(sys, 'argv', ['decoupled-policy', 'study', str(config), *arguments])
    with pytest.raises(SystemExit):
        cli.main()
    assert not (tmp_path / 'out').exists()  # refused before anything is trained


def test_studies_that_can_not_be_told_apart_are_refused(tmp_path):
    first = load_study(study_file(tmp_path / 'a.yaml', tmp_path / 'demos'))
    second = load_study(study_file(tmp_path / 'b.yaml', tmp_path / 'demos', title='Another', seeds=[1]))
    with pytest.raises(ConfigError, match="name 'small': 'A small one' and 'Another'"):
        run_studies([first, second], tmp_path / 'out')
    with pytest.raises(ConfigError, match='no study is given'):
        run_studies([], tmp_path / 'out')


def test_what_another_process_published_meanwhile_stays(tmp_path):
    """Two that share results: each writes what the other has done, too."""
    study = load_study(study_file(tmp_path / 'a.yaml', tmp_path / 'demos'))
    results, document = tmp_path / 'results', tmp_path / 'evidence.md'
    document.write_text('<!-- study small -->\n<!-- end -->\n')
    for out, seed in ((tmp_path / 'one', 0), (tmp_path / 'two', 42)):
        cells = run_studies([study], out, workers=0)['small']
        cell = next(cell for place, cell in cells.items() if place.seed == seed)
        cell.folder.mkdir(parents=True)
        (cell.folder / 'outcome.json').write_text(json.dumps(outcome_of(cell)))
        text = publish(study, cells, results, document)
    assert text.count('1/2') == 2 and '2/4' in text
    assert text in document.read_text()


def test_a_place_whose_end_is_missing_takes_no_other_study_with_it(tmp_path):
    document = tmp_path / 'evidence.md'
    document.write_text('<!-- study a -->\n\n<!-- study b -->\nold\n<!-- end -->\n')
    with pytest.raises(ConfigError, match='no lines `<!-- study a -->`'):
        require_place(document, 'a')
    insert_table(document, 'b', 'new\n')
    assert document.read_text() == '<!-- study a -->\n\n<!-- study b -->\nnew\n<!-- end -->\n'


def test_results_are_found_by_their_run_whatever_their_row_is_called(tmp_path):
    study = load_study(study_file(tmp_path / 'a.yaml', tmp_path / 'demos', seeds=[0]))
    cell, *_ = (cells := run_studies([study], tmp_path / 'one', workers=0)['small']).values()
    cell.folder.mkdir(parents=True)
    (cell.folder / 'outcome.json').write_text(json.dumps(outcome_of(cell)))
    write_results(study, cells, tmp_path / 'results')
    renamed = study_file(
        tmp_path / 'b.yaml', tmp_path / 'demos', seeds=[0], backbones={'a perceptron': {'backbone': SMALL}}
    )
    again = run_studies([load_study(renamed)], tmp_path / 'two', workers=0, results=tmp_path / 'results')
    assert [cell.done for cell in again['small'].values()] == [True, False, False, False]


@pytest.mark.parametrize(
    ('common', 'backbone', 'train'),
    [
        ({'stage1': {'backbone': {'kind': 'dp_t', 'width': 32}}}, {'backbone': {'heads': 2}}, 'decoupled'),
        ({'stage2': {'backbone': {'kind': 'dp_c'}}}, {'backbone': {'widths': [64, 128]}}, 'normal'),
        (
            {'stage1': {'objective': {'kind': 'rectified_flow'}}},
            {'objective': {'prediction': 'velocity'}},
            'decoupled',
        ),
    ],
)
def test_a_row_may_state_a_part_of_what_is_common(common, backbone, train, tmp_path):
    given = values('')
    sections = {key: given[key] | common.get(key, {}) for key in ('stage1', 'stage2')}
    sections['stage1'] |= {'sources': [{'synthetic': 2}]}
    changes = {'backbones': {'x': backbone}, 'recipes': {'y': {'train': train}}, 'seeds': [0], **sections}
    _, cells = plan(
        load_study(study_file(tmp_path / 'a.yaml', tmp_path / 'demos', **changes)), tmp_path / 'out'
    )
    assert len(cells) == 1
