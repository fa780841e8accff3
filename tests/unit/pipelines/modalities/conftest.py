from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing


@pytest.fixture
def tokenizer_json(bundle_folder: Path) -> Path:
    """In the bundle: `a b c` are 4 5 6, between [CLS] 2 and [SEP] 3; what is unknown is 1."""
    vocabulary = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "a": 4, "b": 5, "c": 6}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.enable_padding(length=16)  # as files from a hub often have it
    tokenizer.save(str(bundle_folder / "tokenizer.json"))
    return bundle_folder / "tokenizer.json"
