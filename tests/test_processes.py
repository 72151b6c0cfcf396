"""Which process this is, where the coordinator listens, and that a process alone pays nothing."""

import json

import jax
import numpy as np
import pytest

import train
from sheepop_jax.config.schema import MeshConfig
from sheepop_jax.errors import InputError
from sheepop_jax.model.partitioning import make_mesh
from sheepop_jax.runtime import distributed
from sheepop_jax.runtime.distributed import DistributedConfig, initialize

SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "node[01-02]",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_NTASKS": "4",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1:34911",
}


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in (*SLURM, *OPEN_MPI, "JAX_COORDINATOR_ADDRESS"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def asked(monkeypatch):
    """What jax.distributed is asked for, in place of its doing it."""
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **options: calls.append(options))
    monkeypatch.setattr(distributed, "_leave_stdout_to_results", lambda: None)
    before = jax.config.jax_enable_preemption_service
    yield calls
    jax.config.update("jax_enable_preemption_service", before)


@pytest.mark.parametrize(
    ("given", "field", "got"),
    [
        (("host:1", None, None), "processes", ["host:1"]),
        ((None, 2, 0), "processes", [2, 0]),
        (("host:1", 2, None), "processes", ["host:1", 2]),
        (("host", 2, 0), "coordinator_address", "host"),
        (("host:port", 2, 0), "coordinator_address", "host:port"),
        (("auto", 2, 0), "coordinator_address", "auto"),
        (("host:1", 0, 0), "num_processes", 0),
        (("host:1", 2, 2), "process_id", 2),
        (("host:1", 2, -1), "process_id", -1),
    ],
)
def test_flags_that_do_not_fit_together_are_refused(given, field, got):
    with pytest.raises(InputError) as error:
        DistributedConfig(*given)
    assert (error.value.field, error.value.got) == (field, got)


def test_the_command_refuses_them_before_jax_starts(capsys):
    words = ["--config", "configs/quickstart.py", "--num_processes", "2"]
    with pytest.raises(SystemExit) as left:
        train.main(words)
    assert left.value.code == 2
    assert capsys.readouterr().err.startswith("error: processes: ")


@pytest.mark.parametrize("one", [DistributedConfig(), DistributedConfig("host:1", 1, 0)])
def test_a_process_alone_asks_nobody(asked, one):
    initialize(one)
    assert asked == []
    assert (distributed.count(), distributed.index(), distributed.is_main_process()) == (1, 0, True)


@pytest.mark.parametrize(
    ("address", "bound"),
    [
        ("10.0.0.1:7654", None),  # jax's own: every interface
        ("node7:7654", None),
        ("localhost:7654", "localhost:7654"),
        ("127.0.0.1:7654", "127.0.0.1:7654"),
        ("[::1]:7654", "[::1]:7654"),
    ],
)
def test_on_a_loopback_address_the_coordinator_is_bound_to_it(asked, address, bound):
    initialize(DistributedConfig(address, 2, 1))
    [options] = asked
    assert options["coordinator_address"] == address
    assert options["coordinator_bind_address"] == bound
    assert (options["num_processes"], options["process_id"]) == (2, 1)
    assert options["cluster_detection_method"] == "deactivate"
    assert options["heartbeat_timeout_seconds"] <= 10
    assert jax.config.jax_enable_preemption_service is False  # the signal is StopSignal's


@pytest.mark.parametrize(
    ("env", "joins"),
    [
        ({}, False),
        (SLURM, True),
        ({**SLURM, "SLURM_NTASKS": "1"}, False),
        ({k: v for k, v in SLURM.items() if "STEP" not in k}, False),  # the batch script itself
        (OPEN_MPI, True),
        ({**OPEN_MPI, "OMPI_COMM_WORLD_SIZE": "1"}, False),
        ({"JAX_COORDINATOR_ADDRESS": "host:1"}, True),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, False),  # any pod has it: it takes the flags
    ],
)
def test_a_launcher_of_several_is_noticed(asked, monkeypatch, env, joins):
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    initialize(DistributedConfig())
    assert len(asked) == joins
    if joins:
        assert asked[0]["coordinator_address"] is None  # jax finds it


def test_auto_leaves_everything_to_jax(asked):
    initialize(DistributedConfig("auto"))
    names = ("coordinator_address", "num_processes", "process_id", "cluster_detection_method")
    assert [asked[0][name] for name in names] == [None] * 4


@pytest.mark.parametrize(
    "env",
    [
        {**SLURM, "SLURM_STEP_NUM_NODES": "1"},
        {**OPEN_MPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "4"},
    ],
    ids=["SLURM", "Open MPI"],
)
def test_on_one_host_nobody_else_can_reach_the_coordinator(asked, monkeypatch, env):
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    initialize(DistributedConfig())
    [options] = asked
    host, port = options["coordinator_address"].split(":")
    assert host == "127.0.0.1" and 61440 <= int(port) < 65536
    assert options["coordinator_bind_address"] == options["coordinator_address"]
    # The number of processes and this one's are the launcher's to say.
    assert options["process_id"] is None and options["cluster_detection_method"] is None
    slurm = ("SLURM_JOB_ID", "SLURM_STEP_ID")
    for name in slurm if "SLURM_JOB_ID" in env else ("OMPI_MCA_orte_hnp_uri",):
        monkeypatch.setenv(name, "8")
        initialize(DistributedConfig())
    addresses = [options["coordinator_address"] for options in asked]
    assert len(set(addresses)) == len(addresses)  # jobs, and steps of a job, side by side


def test_who_is_not_found_is_one_line(asked, monkeypatch):
    def fails(**options):
        raise RuntimeError("DEADLINE_EXCEEDED: nobody\nthere")

    monkeypatch.setattr(jax.distributed, "initialize", fails)
    with pytest.raises(InputError) as error:
        initialize(DistributedConfig("h:1", 2, 1))
    assert (error.value.field, error.value.got) == ("coordinator_address", "h:1")
    assert "nobody there" in error.value.expected


def test_what_goes_round_is_json(monkeypatch):
    """Played by one process: what it sends is what it gets."""
    monkeypatch.setattr(distributed, "_count", 2)
    sent = []
    monkeypatch.setattr(distributed, "_from_first", lambda content: sent.append(content) or content)
    assert (
        distributed.broadcast_from_main(lambda: {"step": 4, "best": float("inf")})["best"] == np.inf
    )
    assert json.loads(sent[0])["value"]["step"] == 4

    def refuses():
        raise InputError("a", "b: c", "2", "3")

    with pytest.raises(InputError) as error:
        distributed.broadcast_from_main(refuses)
    assert str(error.value) == str(InputError("a", "b: c", "2", "3"))
    assert error.value.field == "a"


def test_an_answer_comes_one_question_later(monkeypatch):
    mesh = make_mesh(MeshConfig(-1, 1, 1), jax.devices())
    alone = distributed.Agreement(mesh)
    assert [alone(yes) for yes in (False, True, False)] == [False, True, False]
    monkeypatch.setattr(distributed, "_count", 2)
    asks = distributed.Agreement(mesh)
    assert [asks(yes) for yes in (False, True, False, False)] == [False, False, True, False]


def test_what_jax_may_take_away_is_there():
    """`multihost_utils` is experimental, if public."""
    from jax.experimental import multihost_utils

    assert int(multihost_utils.broadcast_one_to_all(np.int32(7))) == 7
    assert distributed._from_first(b"content") == b"content"
