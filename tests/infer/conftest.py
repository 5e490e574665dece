import pytest

from cadre.data.tokenizer import train_tokenizer
from cadre.model.transformer import Transformer
from tests.shapes import small

TEXT = "The naïve café served 你好 and 😀🎉 to 3 guests.\nThen the people of the union answered: yes, we do.\n"


@pytest.fixture(scope="session")
def tokenizer():
    return train_tokenizer([TEXT * 20], 300)


@pytest.fixture(scope="session")
def model(tokenizer):
    """Weights large enough that prompts matter; ids of the tokenizer, its eos among them."""
    config = small("deepseek_v3", vocab_size=300, initializer_range=0.3, bos_token_id=0, eos_token_id=1)
    return Transformer(config).initialize(0)
