"""A run that goes on with another number of devices: the same batches, the same losses."""

import numpy as np
import pytest

from tests.faults.harness import KILLED, Runner, log_of

# Sums over a batch that is split have another order; measured 1e-6 and less.
TOLERANCE = 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("fsdp", [1, 2], ids=["data", "fsdp"])
def test_the_number_of_devices_may_change(shared, tmp_path, fsdp):
    fields = {"train.batch_size": 4, "model.d_model": 32, "mesh.data": -1}
    one = Runner(shared, fields)
    whole = tmp_path / "whole"
    assert one.run(whole).code == 0
    workdir = tmp_path / "run"
    assert one.run(workdir, fault="after-rename:1").code == KILLED
    began = []
    for devices, fault in ((2, "after-rename:1"), (4, "")):
        more = Runner(shared, {**fields, "mesh.fsdp": fsdp}, devices=devices)
        result = more.run(workdir, fault=fault)
        assert result.code == (KILLED if fault else 0), result.stderr
        assert f"{devices} x cpu" in result.stderr
        began.append(result.began_at)
    assert began == [2, 4]
    expected, found = log_of(whole), log_of(workdir)
    assert [line[0] for line in found] == [line[0] for line in expected]
    for line, other in zip(found, expected, strict=True):
        for value, wanted in zip(line, other, strict=True):
            if wanted is None or isinstance(wanted, bool):
                assert value == wanted
            else:
                np.testing.assert_allclose(value, wanted, rtol=TOLERANCE)
