"""Ways to run the denoising loop on a CPU, taking turns in one process.

    python bench/engines.py                with what of onnxruntime, onnx, onnxscript and openvino is installed

Each is given the shipped policy's network with the modulation of one observation, and runs the ten steps for one sample
and for eight. Errors are those of the chunk's positions from what the plain network gives.
"""

from __future__ import annotations

import importlib.util
import platform
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from decoupled_policy_ros.files import write_json
from decoupled_policy_ros.policy import load_policy
from decoupled_policy_ros.policy.packed import usable_precisions
from decoupled_policy_ros.policy.sampling import Sampler
from decoupled_policy_ros.robot.description import load_robot
from decoupled_policy_ros.runtime.fused import FusedNetwork

STEPS = 10
#: What this processor multiplies.
HERE = usable_precisions(torch.device('cpu'))
#: One denoising step: noisy actions (K, 16, 10) and modulation (1, size) -> output.
Network = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Arguments:
    """Options of this script.

    Attributes:
        task, robot: the policy.
        rounds: loops of each.
        samples: chunks of a loop.
        threads: CPU threads.
        json: write the figures here.
    """

    task: str = 'lift'
    robot: str = 'panda_sim'
    rounds: int = 15
    samples: tuple[int, ...] = (1, 8)
    threads: int = 1
    json: Path | None = Path('docs/bench/engines.json')


class Shared(nn.Module):
    """The network with one modulation for all samples; what compilers and exporters get."""

    def __init__(self, denoiser: nn.Module):
        super().__init__()
        self.denoiser = denoiser

    def forward(self, x: Tensor, modulation: Tensor) -> Tensor:
        return self.denoiser(x, modulation.expand(len(x), -1))


def compiled(shared: Shared, samples: int, precision: str) -> Network:
    """torch.compile with weights as constants."""
    import torch._inductor.config as inductor

    inductor.freezing = True
    run = torch.compile(shared, fullgraph=True)

    def network(x: Tensor, modulation: Tensor) -> Tensor:
        with torch.no_grad(), torch.autocast('cpu', torch.bfloat16, enabled=precision == 'bfloat16'):
            return run(x, modulation)

    return network


def exported(shared: Shared, samples: int, modulation: Tensor) -> Path:
    """An ONNX file."""
    path = Path(tempfile.mkdtemp()) / 'network.onnx'
    with torch.no_grad():
        torch.onnx.export(
            shared,
            (torch.zeros(samples, 16, 10), modulation.clone()),
            str(path),
            input_names=['x', 'modulation'],
            output_names=['output'],
            verbose=False,
        )
    return path


def onnxruntime_network(path: Path, threads: int, int8: bool) -> Network:
    """ONNX Runtime, with weights in 8 bits and activations quantised as they come if asked to."""
    import onnxruntime

    if int8:
        from onnxruntime.quantization import quantize_dynamic

        quantised = path.with_suffix('.int8.onnx')
        quantize_dynamic(str(path), str(quantised))
        path = quantised
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(path), options, providers=['CPUExecutionProvider'])

    def network(x: Tensor, modulation: Tensor) -> Tensor:
        (output,) = session.run(None, {'x': x.numpy(), 'modulation': modulation.numpy()})
        return torch.from_numpy(output)

    return network


def openvino_network(path: Path, threads: int, precision: str) -> Network:
    """OpenVINO, for latency."""
    import openvino

    name = {'float32': 'f32', 'bfloat16': 'bf16'}[precision]
    options = {
        'INFERENCE_NUM_THREADS': threads,
        'PERFORMANCE_HINT': 'LATENCY',
        'INFERENCE_PRECISION_HINT': name,
    }
    request = openvino.Core().compile_model(str(path), 'CPU', options).create_infer_request()

    def network(x: Tensor, modulation: Tensor) -> Tensor:
        outputs = request.infer([x.numpy(), modulation.numpy()], share_inputs=True)
        return torch.from_numpy(outputs[0].copy())

    return network


def candidates(arguments: Arguments, denoiser: nn.Module, samples: int, modulation: Tensor) -> dict:
    """Functions that make a network, by name; those whose library is not here are left out."""
    shared, threads = Shared(denoiser), arguments.threads
    made: dict[str, Callable[[], Network]] = {'plain PyTorch': lambda: shared}
    for precision in HERE:
        made[f'torch.compile {precision}'] = lambda p=precision: compiled(shared, samples, p)
    if importlib.util.find_spec('onnxscript') is not None:
        path = exported(shared, samples, modulation)
        if importlib.util.find_spec('onnxruntime') is not None:
            made['ONNX Runtime float32'] = lambda: onnxruntime_network(path, threads, False)
            made['ONNX Runtime int8'] = lambda: onnxruntime_network(path, threads, True)
        if importlib.util.find_spec('openvino') is not None:
            for precision in HERE:
                made[f'OpenVINO {precision}'] = lambda p=precision: openvino_network(path, threads, p)
    return made


def measure(arguments: Arguments, samples: int) -> dict[str, dict]:
    """Milliseconds, set-up seconds and errors (mm) of each way, for so many samples."""
    policy = load_policy(arguments.task, load_robot(arguments.robot))
    denoiser, sampler = policy.backbone.denoiser, Sampler(policy.backbone.schedule, STEPS)
    torch.manual_seed(0)
    seen = {
        s.name: torch.randint(0, 256, (1, 2, *s.shape), dtype=torch.uint8)
        if s.kind == 'image'
        else torch.zeros(1, 2, *s.shape)
        for s in policy.contract.streams
    }
    with torch.no_grad():
        tau = denoiser.tau(torch.tensor(sampler.ks))
        features = policy.task.encoder(seen)
        modulation = policy.task.conditioning(tau, features.expand(STEPS, -1))
    noise = torch.randn(samples, 16, 10)
    loops, set_up_s = {}, {}
    for name, make in candidates(arguments, denoiser, samples, modulation[:1]).items():
        start = time.perf_counter()
        network = make()
        loops[name] = lambda n=network: sampler.run(lambda i, x: n(x, modulation[i : i + 1]), noise)
        with torch.no_grad():
            loops[name]()
        set_up_s[name] = time.perf_counter() - start
    for precision, dtype in HERE.items():
        start = time.perf_counter()
        fused = FusedNetwork(denoiser, STEPS, dtype)
        loops[f'ours {precision}'] = lambda f=fused: sampler.run(f.begin(modulation[:, None]), noise)
        set_up_s[f'ours {precision}'] = time.perf_counter() - start
    clock = time.process_time if arguments.threads == 1 else time.perf_counter
    taken: dict[str, list[float]] = {name: [] for name in loops}
    chunks = {}
    with torch.no_grad():
        for _ in range(arguments.rounds):
            for name, loop in loops.items():
                start = clock()
                chunks[name] = policy.backbone.normaliser.inverse(loop())[..., :3]
                taken[name].append(1e3 * (clock() - start))
    exact = chunks['plain PyTorch']
    return {
        name: {
            'ms': statistics.median(values),
            'least_ms': min(values),
            'set_up_s': set_up_s[name],
            'error_mm': 1e3 * float((chunks[name] - exact).abs().max()),
        }
        for name, values in taken.items()
    }


def main(arguments: Arguments) -> None:
    """Measure, print, save."""
    warnings.filterwarnings('ignore')
    torch.set_num_threads(arguments.threads)
    results = {str(samples): measure(arguments, samples) for samples in arguments.samples}
    table = Table('way', *(f'K = {k}: {c}' for k in results for c in ('ms', 'set-up s', 'error mm')))
    for name in results[str(arguments.samples[0])]:
        row = [results[k][name] for k in results]
        cells = [c for r in row for c in (f'{r["ms"]:.1f}', f'{r["set_up_s"]:.1f}', f'{r["error_mm"]:.3f}')]
        table.add_row(name, *cells)
    Console(width=120).print(table)
    if arguments.json:
        names = [n for n in ('onnxruntime', 'openvino') if importlib.util.find_spec(n) is not None]
        versions = {n: importlib.import_module(n).__version__ for n in names}
        report = {
            'torch': torch.__version__,
            **versions,
            'numpy': np.__version__,
            'python': sys.version.split()[0],
            'machine': platform.machine(),
            'threads': arguments.threads,
            'rounds': arguments.rounds,
            'samples': results,
        }
        write_json(arguments.json, report)


if __name__ == '__main__':
    main(tyro.cli(Arguments))
