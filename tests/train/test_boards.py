"""How runs are shown elsewhere, with a stand-in for wandb's client. The real one, offline: tests/slow/test_wandb.py."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest

from cadre.errors import RunError, UsageError
from cadre.train.boards import WeightsAndBiases, check_wandb
from cadre.train.metrics import MetricsLog


class Client:
    """Stands in for the module wandb. `refusals`: what its next calls of `init` raise."""

    class errors:  # noqa: N801
        Error = type("Error", (Exception,), {})
        CommError = type("CommError", (Error,), {})
        AuthenticationError = type("AuthenticationError", (CommError,), {})

    def __init__(self, mode: str = "online") -> None:
        self.mode, self.refusals, self.asked, self.logged, self.ended = mode, [], [], [], []
        self.key, self.torn_down, self.broken = True, 0, False

    def setup(self) -> Any:
        return SimpleNamespace(settings=SimpleNamespace(mode=self.mode))

    def login(self, verify: bool) -> None:
        if not self.key:
            raise self.errors.Error("No API key configured. Use `wandb login` to log in.")

    def init(self, **asked: Any) -> Any:
        self.asked.append(asked)
        if self.refusals:
            raise self.refusals.pop(0)
        offline = asked.get("mode") == "offline" or self.mode != "online"
        return SimpleNamespace(
            offline=offline, url=None if offline else "https://wandb.example/run", define_metric=lambda *_, **__: None,
            log=self.log, finish=lambda exit_code: self.ended.append(exit_code),
        )  # fmt: skip

    def log(self, shown: dict[str, Any]) -> None:
        if self.broken:
            raise ConnectionResetError("Connection lost")
        self.logged.append(shown)

    def teardown(self) -> None:
        self.torn_down += 1

    Settings = staticmethod(lambda **values: SimpleNamespace(**values))
    Image = staticmethod(lambda image: image)


@pytest.fixture
def client(monkeypatch) -> Client:
    made = Client()
    monkeypatch.setitem(sys.modules, "wandb", made)
    return made


def test_without_its_package_a_run_that_asks_for_it_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    check_wandb(None)
    check_wandb("")
    with pytest.raises(UsageError, match=r"^train\.wandb: needs wandb: pip install 'cadre-lm\[wandb\]', or leave it out"):
        check_wandb("project")


@pytest.mark.parametrize("name", ["a/", "/b", "a/b/c", "x:y", "what?", "100%", "a" * 129])
def test_a_project_has_a_name_that_wandb_takes(client, name):
    with pytest.raises(UsageError, match=r"^train\.wandb is '.*'; it must be PROJECT or ENTITY/PROJECT, of at most 128"):
        check_wandb(name)
    check_wandb("a team/a project")


def test_a_key_is_asked_for_before_anything_is_prepared_unless_offline(client):
    client.key = False
    with pytest.raises(UsageError, match=r"^train\.wandb: No API key configured.* Or set WANDB_MODE=offline\.$"):
        check_wandb("project")
    client.mode = "offline"
    check_wandb("project")


def test_a_run_is_shown_under_one_id_and_ends_there_as_it_ended_here(client, tmp_path):
    notes: list[str] = []
    for last, status in (("stopped", 1), ("finished", 0)):
        log = MetricsLog(tmp_path)
        log.boards.append(WeightsAndBiases(tmp_path, "team/project", {"name": "x"}, notes.append))
        log.write({"step": 3, "loss": 2.5, "grad_norm": None})
        log.write({"step": 3, "event": last, "message": "so"})
        log.close()
        assert client.logged[-2:] == [{"step": 3, "loss/train": 2.5}, {"step": 3, "events": f"{last}: so"}]
        assert client.ended[-1] == status
    first, second = client.asked
    assert first["id"] == second["id"] == (tmp_path / "wandb.txt").read_text().strip()
    assert (first["entity"], first["project"], first["config"]) == ("team", "project", {"name": "x"})
    assert (first["resume"], second["resume"]) == (None, "allow")
    assert notes == ["wandb: https://wandb.example/run"] * 2


def test_where_the_network_does_not_answer_it_is_kept(client, tmp_path):
    notes: list[str] = []
    client.refusals = [client.errors.CommError("Timed out\nwhile retrying")]
    WeightsAndBiases(tmp_path, "project", {}, notes.append).close()
    assert notes == [f"wandb does not answer (Timed out): kept in {tmp_path / 'wandb'}, for wandb sync"]
    assert client.asked[-1]["mode"] == "offline" and client.torn_down == 1


def test_what_wandb_refuses_is_one_line(client, tmp_path):
    errors = client.errors
    for refusal in (errors.AuthenticationError("the key is invalid (401)"), errors.CommError("permission denied (403)"),
                    errors.Error("Invalid project name\nand more")):  # fmt: skip
        client.refusals = [refusal]
        with pytest.raises(RunError, match=r"^train\.wandb: wandb refuses: [^\n]*$"):
            WeightsAndBiases(tmp_path, "project", {}, print)


def test_a_board_that_fails_ends_no_run_and_a_full_disk_keeps_none_from_its_end(client, tmp_path, monkeypatch):
    notes: list[str] = []
    log = MetricsLog(tmp_path)
    log.boards.append(WeightsAndBiases(tmp_path, "project", {}, notes.append))
    client.broken = True
    log.write({"step": 1, "loss": 2.5})
    log.write({"step": 2, "loss": 2.5})
    assert notes[1:] == ["wandb: Connection lost: it shows no more of this run"]

    def full() -> None:
        raise OSError(28, "No space left on device")

    closed: list[str] = []
    log._file.close()
    monkeypatch.setattr(log, "_file", SimpleNamespace(close=full))
    monkeypatch.setattr(log.boards[1], "close", lambda: closed.append("wandb"))
    with pytest.raises(RunError, match="the disk is full"):
        log.close()
    assert closed == ["wandb"] and sys.modules["threading"].excepthook is not log.boards[0]._unless_ours
