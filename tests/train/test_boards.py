"""What `train.wandb` is refused for. Its client itself: tests/slow/test_wandb.py."""

import sys

import pytest

from cadre.errors import UsageError
from cadre.train.boards import check_wandb


def test_without_its_package_a_run_that_asks_for_it_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    check_wandb(None)
    with pytest.raises(UsageError, match=r"^train\.wandb: needs wandb: pip install 'cadre-lm\[wandb\]', or leave it out$"):
        check_wandb("project")


@pytest.mark.parametrize("name", ["", "a/", "/b", "a/b/c"])
def test_a_project_has_a_name_and_at_most_one_owner(name):
    with pytest.raises(UsageError, match=f"^train.wandb is '{name}'; it must be PROJECT or ENTITY/PROJECT$"):
        check_wandb(name)
