"""What the tests of faults share: an undisturbed run, and where its caches are."""

import os

import pytest

from tests.faults.harness import Runner, outcome


@pytest.fixture(scope="session")
def shared(tmp_path_factory):
    """One directory for all test processes: what one has compiled, the others need not."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    directory = base / "faults"
    directory.mkdir(exist_ok=True)
    return directory


@pytest.fixture(scope="session")
def runner(shared):
    """Eight steps, four saves, two evaluations."""
    return Runner(shared, {"train.num_steps": 8})


@pytest.fixture(scope="session")
def undisturbed(runner, tmp_path_factory):
    """The outcome of the run that nobody killed."""
    workdir = tmp_path_factory.mktemp("undisturbed") / "run"
    result = runner.run(workdir)
    assert result.code == 0, result.stderr
    found = outcome(workdir)
    assert [line[0] for line in found["log"] if line[1]] == [1, 2, 3, 4, 5, 6, 7, 8]
    return found
