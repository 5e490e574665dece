import pytest
import typer

from cadre.cli.options import counts, token_count
from cadre.errors import UsageError


@pytest.mark.parametrize(
    ("text", "number"),
    [("4096", 4096), ("1k", 1000), ("2.3k", 2300), ("1.5M", 1_500_000), ("2b", 2 * 10**9), ("5e3", 5000), ("4,096", 4096),
     (" 1_000 ", 1000), (7, 7)],
)  # fmt: skip
def test_counts(text, number):
    assert counts()(text) == number


@pytest.mark.parametrize("text", ["", "k", "0", "-1", "1.5", "1.2345k", "1kk", "nan", "inf", "1e999", "2T " + "0" * 30 + "x"])
def test_what_is_no_count(text):
    with pytest.raises(typer.BadParameter, match=r"must be a whole number such as 4096, 4k or 1\.5M, at least 1$"):
        counts()(text)
    with pytest.raises(typer.BadParameter, match=r"at least 4$"):
        counts(4)("3")
    assert counts(4)("4") == 4


def test_tokens_need_not_be_whole():
    assert token_count("14.8T") == 14.8e12
    assert token_count("1.2345k") == 1234.5
    with pytest.raises(UsageError, match="--tokens 1e999: must be a number"):
        token_count("1e999")
