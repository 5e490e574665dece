import pytest

from tests.serve.live import Live


@pytest.fixture(scope="session")
def live():
    """One server for all tests that leave it as it was."""
    with Live() as server:
        yield server
        server.until(server.idle)


@pytest.fixture(scope="session")
def bare():
    """One whose model has no chat template."""
    with Live(chat=False) as server:
        yield server
