import pytest

import cadre
from cadre.data.tokenizer import train_tokenizer
from cadre.model.transformer import Transformer
from tests.shapes import small


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory):
    """A saved model with a tokenizer, its weights large enough that prompts matter."""
    path = tmp_path_factory.mktemp("model") / "m"
    config = small("deepseek_v3", vocab_size=300, initializer_range=0.3, bos_token_id=0, eos_token_id=1)
    tokenizer = train_tokenizer(["The people of the naïve union answered 😀: yes.\n" * 20], 300)
    cadre.save(Transformer(config).initialize(0), path, tokenizer)
    return path
