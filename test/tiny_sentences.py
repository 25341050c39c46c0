"""Small transformers with random weights, saved as real folders: for tests of language without a download."""

from pathlib import Path

import torch
from sentence_transformers import SentenceTransformer
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import DistilBertConfig, DistilBertModel, PreTrainedTokenizerFast

WORDS = ['lift', 'stack', 'the', 'red', 'green', 'cube', 'on', 'pick', 'up', 'block', 'put', 'onto']
DIM = 16


def save_transformer(folder: Path, seed: int = 0) -> Path:
    """A plain DistilBERT, as such models come from the hub: no word in it of how a sentence is pooled."""
    torch.manual_seed(seed)
    vocabulary = {word: i for i, word in enumerate(['[PAD]', '[UNK]', '[CLS]', '[SEP]', *WORDS])}
    tokenizer = Tokenizer(WordPiece(vocabulary, unk_token='[UNK]'))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(
        single='[CLS] $A [SEP]', special_tokens=[('[CLS]', 2), ('[SEP]', 3)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token='[PAD]', unk_token='[UNK]', cls_token='[CLS]', sep_token='[SEP]',
        model_max_length=32,
    ).save_pretrained(folder)  # fmt: skip
    size = {'dim': DIM, 'hidden_dim': 32, 'n_layers': 2, 'n_heads': 2, 'max_position_embeddings': 32}
    DistilBertModel(DistilBertConfig(vocab_size=len(vocabulary), **size)).save_pretrained(folder)
    return folder


def save_sentence_model(folder: Path, seed: int = 0) -> Path:
    """The same as a sentence-transformers model, with its modules listed."""
    plain = save_transformer(folder.with_name(f'{folder.name}_plain'), seed)
    SentenceTransformer(str(plain), device='cpu').save(str(folder))
    return folder
