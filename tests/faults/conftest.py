"""What the tests of faults share: undisturbed runs, and where their caches are."""

import os

import pytest

from tests.faults.harness import Here, Runner, Snapshots, outcome

# Point → passings at which a kill is looked at: the first, and a later one. "save-writing" is in
# the middle of a write, where only a real process can be killed.
POINTS = {
    "config-write": (1,),
    "log-append": (1, 9),
    "evaluation": (1, 2),
    "save-begun": (1, 4),
    "save-written": (1, 3),
    "before-manifest": (1, 4),
    "before-rename": (1, 4),
    "after-rename": (1, 2, 4),
    "mid-prune": (1, 2),
}


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
    """Processes: eight steps, four saves, two evaluations."""
    return Runner(shared)


@pytest.fixture(scope="session")
def here(shared):
    """The same runs in this process."""
    return Here(shared)


@pytest.fixture(scope="session")
def undisturbed(here, tmp_path_factory):
    """The outcome of the run in this process that nobody killed."""
    workdir = tmp_path_factory.mktemp("undisturbed") / "run"
    here.run(workdir)
    found = outcome(workdir)
    assert [line[0] for line in found["log"] if line[1]] == [1, 2, 3, 4, 5, 6, 7, 8]
    return found


@pytest.fixture(scope="session")
def snapshots(here, undisturbed, tmp_path_factory):
    """(point, passing) → the files that a kill there leaves."""
    directory = tmp_path_factory.mktemp("snapshots")
    taken = Snapshots(directory / "run", directory, POINTS)
    here.run(directory / "run", observer=taken)
    assert outcome(directory / "run") == undisturbed
    return taken.found
