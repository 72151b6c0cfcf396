"""A run that resumes with another number of devices: the same batches, the same losses."""

import pytest

from tests.faults.harness import Here, Snapshots, largest_difference, log_of

pytestmark = pytest.mark.usefixtures("fast_compile")

# Sums over a batch that is split have another order; measured 1e-6 and less.
TOLERANCE = 1e-5


def test_the_number_of_devices_may_change(shared, tmp_path):
    """One device, then two that share the batch, then four that also share the parameters."""
    fields = {"train.batch_size": 4, "mesh.data": -1}
    expected = None
    workdir, began = tmp_path / "one", []
    for devices, fsdp in ((1, 1), (2, 1), (4, 2)):
        runs = Here(shared, {**fields, "mesh.fsdp": fsdp}, devices)
        first_save = Snapshots(workdir, tmp_path / f"after{devices}", {"after-rename": (1,)})
        began.append(runs.run(workdir, observer=first_save).began_at)
        expected = expected or log_of(workdir)
        found = log_of(workdir)
        assert largest_difference(found, expected) < TOLERANCE
        workdir = first_save.found["after-rename", 1].path
    assert began == [0, 2, 4]
