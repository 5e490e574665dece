import pytest
import torch

from cadre.data.tokenizer import train_tokenizer
from cadre.model.transformer import Transformer
from tests.shapes import small

TEXT = "The naïve café served 你好 and 😀🎉 to 3 guests.\nThen the people of the union answered: yes, we do.\n"
# Attention x feed-forward.
CORNERS = {
    "latent, experts": small("deepseek_v3"),
    "latent, dense": small("deepseek_v3", first_k_dense_replace=2),
    "grouped, experts": small("glm4_moe"),
    "grouped, heads normed as one": small("olmoe"),
    "grouped, dense": small("llama"),
}


def lively(config, seed=0):
    """A model with weights large enough that attention is far from uniform."""
    return Transformer(config.model_copy(update={"initializer_range": 0.3})).initialize(seed).eval()


def assert_close(ours, plain):
    """Within 1e-4 of what a plain forward pass over everything gives, measured at its largest number."""
    scale = float(plain.abs().max()) if plain.numel() else 1.0
    torch.testing.assert_close(ours, plain, atol=1e-4 * max(scale, 1.0), rtol=0)


@pytest.fixture(scope="session")
def tokenizer():
    return train_tokenizer([TEXT * 20], 300)


@pytest.fixture(scope="session")
def model(tokenizer):
    """Weights large enough that prompts matter; ids of the tokenizer, its eos among them."""
    config = small("deepseek_v3", vocab_size=300, initializer_range=0.3, bos_token_id=0, eos_token_id=1)
    return Transformer(config).initialize(0)
