"""What drafting is worth, of a model that can write nothing: the rest, of one that has trained, is in test_worker.py."""

import numpy as np
import torch

from cadre.hub.save import save
from cadre.model.transformer import Transformer
from cadre.study.drafting import drafting_rates
from tests.shapes import small


class Text:
    """Held-out tokens."""

    def __len__(self):
        return 100

    def tokens(self, start, stop):
        return np.full(stop - start, 3)


def test_a_model_without_a_finite_logit_has_no_rates(tmp_path):
    model = Transformer(small("deepseek_v3", num_nextn_predict_layers=1)).initialize(0)
    with torch.no_grad():
        model.norm.weight.fill_(3e38)
    save(model, tmp_path / "model")
    assert drafting_rates(tmp_path / "model", Text(), 16) is None
