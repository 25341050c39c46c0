"""Language: the instruction as one more stream of an observation, embedded by a frozen sentence-transformers model.

Each text is embedded once. The embeddings of the instructions that a policy was trained on are in its task file, so
that sentence-transformers is needed for others only, and the very model that the policy was trained with.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor, nn

from decoupled_policy_ros.errors import ConfigError
from decoupled_policy_ros.resources import resolve_uri, share_dir

#: Key of the embedding among the streams of an observation.
INSTRUCTION = 'instruction'
MAX_CHARACTERS = 1000
#: Embeddings that a sentence model remembers: nobody makes a node grow by telling it something else each time.
MAX_REMEMBERED = 10_000
#: Largest difference between an embedding in a task file and the same text embedded anew, relative to its length:
#: far above what the rounding of another processor makes, far below what another pooling or tokenizer makes.
SAME_EMBEDDING = 1e-2


def checked_instruction(text: str) -> str:
    """The instruction without spaces at its ends.

    Raises:
        ConfigError: nothing is left, or it is longer than 1,000 characters.
    """
    stripped = text.strip()
    if not stripped:
        raise ConfigError('the instruction is empty; say in words what to do')
    if len(stripped) > MAX_CHARACTERS:
        raise ConfigError(
            f'an instruction has at most {MAX_CHARACTERS} characters, got {len(stripped)}: '
            f'{stripped[:40]!r}...'
        )
    return stripped


class SentenceModel:
    """A sentence-transformers model, on the CPU and in float32 whatever its file holds.

    Args:
        name: folder; name of a folder in models/language; `package://<python package>/<folder>`; or a model's name on
            the Hugging Face Hub. A plain transformer such as DistilBERT gets mean pooling.

    Attributes:
        dim: of an embedding.
        sha256: of the weights, without their names, which change from one version of the library to the next.

    Raises:
        ConfigError: no such model, or it can't be had (offline, say).
        ModuleNotFoundError: sentence-transformers is not installed.
    """

    def __init__(self, name: str):
        from sentence_transformers import SentenceTransformer

        self.name, located = name, _located(name)
        try:
            self._model = SentenceTransformer(located, device='cpu').float().eval()
        except Exception as error:  # a hub's client raises what its transport raises
            trouble = (
                f'in {located} can not be read'
                if Path(located).is_dir()
                else f'{name!r} is neither a folder, nor one in {share_dir() / "models/language"}, nor can it be had '
                'from the hub'
            )
            raise ConfigError(
                f'the sentence model {trouble}: {" ".join(str(error).split())[:300]}'
            ) from error
        self.sha256 = _weights_sha256(self._model)
        self._embeddings: dict[str, Tensor] = {}
        self.dim = len(self('dimension'))

    def __call__(self, text: str) -> Tensor:
        """Embedding (dim,) float32 of a text; computed when it is first asked for."""
        if text not in self._embeddings:
            # Alone: beside others it would be padded, and differ in its last digits.
            embedding = self._model.encode([text], convert_to_tensor=True, show_progress_bar=False)
            while len(self._embeddings) >= MAX_REMEMBERED:  # the oldest one goes
                del self._embeddings[next(iter(self._embeddings))]
            self._embeddings[text] = embedding[0].float().cpu().clone()
        return self._embeddings[text]


@lru_cache(maxsize=1)
def sentence_model(name: str) -> SentenceModel:
    """The model of that name; loaded once."""
    return SentenceModel(name)


def _located(name: str) -> str:
    """Folder of the model, or the name itself for the hub to look up."""
    if name.startswith('package://'):
        return str(resolve_uri(name, Path.cwd()))
    installed = share_dir() / 'models' / 'language' / Path(name).name
    return str(installed) if not Path(name).is_dir() and installed.is_dir() else name


def _weights_sha256(model: nn.Module) -> str:
    hashes = []
    for value in model.state_dict().values():
        array = value.detach().cpu().contiguous().numpy()
        hashes.append(hashlib.sha256(f'{array.dtype}{array.shape}'.encode() + array.tobytes()).hexdigest())
    return hashlib.sha256(''.join(sorted(hashes)).encode()).hexdigest()


class InstructionEncoder(nn.Module):
    """Features of an instruction's embedding.

    What distinguishes the instructions of a scene can be a hundredth of their embeddings: they are centred on the
    mean of those trained on, and scaled to a root mean square distance of 1 from it. The projection starts at zero,
    so what training shows no use of (a paraphrase differs in much that says nothing about the task) stays without
    effect; tanh keeps an unknown text from driving the policy further than the known ones do.

    Args:
        instructions: that the policy is trained on.
        model, sha256, dim: name, weights' hash and embedding's size of the sentence model.
        feature_dim: features of an instruction.
    """

    embeddings: Tensor

    def __init__(self, instructions: Sequence[str], model: str, sha256: str, dim: int, feature_dim: int = 64):
        super().__init__()
        self.instructions = tuple(instructions)
        self.config = {'model': model, 'sha256': sha256, 'dim': dim, 'feature_dim': feature_dim}
        self.feature_dim = feature_dim
        self.register_buffer('embeddings', torch.zeros(len(self.instructions), dim))
        self.project = nn.Linear(dim, feature_dim)
        nn.init.zeros_(self.project.weight)
        nn.init.zeros_(self.project.bias)

    @staticmethod
    def of(instructions: Sequence[str], model: str, feature_dim: int) -> InstructionEncoder:
        """A new one, with the embeddings of its instructions.

        Raises:
            ConfigError: an instruction is empty or too long, or the model can't be had; see `SentenceModel`.
        """
        texts = [checked_instruction(text) for text in instructions]
        sentences = sentence_model(model)
        encoder = InstructionEncoder(texts, model, sentences.sha256, sentences.dim, feature_dim)
        encoder.embeddings.copy_(torch.stack([sentences(text) for text in texts]))
        return encoder

    def embedding(self, instruction: str) -> Tensor:
        """Embedding (dim,) of a known instruction from the task file, of any other by the sentence model.

        Raises:
            ConfigError: the model is not there, or is another one than the policy was trained with.
        """
        text = checked_instruction(instruction)
        if text in self.instructions:
            return self.embeddings[self.instructions.index(text)]
        return self._model_for(text)(text).to(self.embeddings)

    def forward(self, embeddings: Tensor) -> Tensor:
        """(B, dim) -> (B, feature_dim)."""
        mean = self.embeddings.mean(0)
        spread = (self.embeddings - mean).square().sum(-1).mean().sqrt()
        scale = torch.where(spread > 0, spread, 1.0)  # one instruction alone is its own mean
        return torch.tanh(self.project((embeddings - mean) / scale))

    def _model_for(self, text: str) -> SentenceModel:
        known = f'known are {list(self.instructions)}'
        name, sha256 = str(self.config['model']), self.config['sha256']
        wanted = f'instruction {text!r} is not one that the policy was trained on ({known})'
        try:
            model = sentence_model(name)
        except ModuleNotFoundError as error:
            raise ConfigError(
                f'{wanted}: it takes sentence-transformers, which is not installed; pip install '
                f"'decoupled_policy_ros[language]' brings it"
            ) from error
        except ConfigError as error:
            raise ConfigError(f'{wanted}: {error}') from error
        if model.sha256 != sha256:
            raise ConfigError(
                f'{wanted}, and the sentence model {name!r} here is not the one that it was trained with: '
                f'sha256 of its weights {model.sha256}, expected {sha256}'
            )
        stored = self.embeddings[0].cpu()
        distance = float((model(self.instructions[0]) - stored).norm() / stored.norm())
        if distance > SAME_EMBEDDING:
            raise ConfigError(
                f'{wanted}, and the sentence model {name!r} here has the same weights but embeds '
                f'{self.instructions[0]!r} differently (by {distance:.0%}): its tokenizer or pooling is another one'
            )
        return model
