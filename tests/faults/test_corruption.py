"""Damaged files of a checkpoint: detected, set aside, never loaded."""

import errno

import jax
import numpy as np
import pytest

from sheepop_jax.checkpoint import checkpoints as checkpoint_files
from sheepop_jax.checkpoint.checkpoints import DamagedCheckpoint
from sheepop_jax.checkpoint.inventory import inventory
from sheepop_jax.checkpoint.saver import CheckpointSaver
from sheepop_jax.errors import InputError
from sheepop_jax.model.partitioning import make_mesh
from sheepop_jax.model.transformer import Transformer
from sheepop_jax.training.optimizer import make_optimizer, make_schedule
from sheepop_jax.training.resume import restore_or_init

pytestmark = pytest.mark.usefixtures("fast_compile")


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def remove(path):
    path.unlink()


@pytest.fixture(scope="module")
def begin(make_config):
    """CheckpointSaver → the state that a run would begin with."""
    config = make_config({"model.d_model": 12, "model.d_ff": 7, "model.num_layers": 1})
    model = Transformer(config.model, 31)
    optimizer = make_optimizer(config.optimizer, make_schedule(config.optimizer, 9))
    mesh = make_mesh(config.mesh, jax.devices()[:1])

    def make(checkpoints):
        with jax.set_mesh(mesh):
            return restore_or_init(model, optimizer, config.seed, mesh, checkpoints)[0]

    return make


def at_step(state, step):
    """A state that differs from those of other steps in every array."""
    numbers = jax.tree.map(lambda x: x + np.asarray(step, x.dtype), state)
    return numbers


def assert_same(first, second):
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def saved_files(begin, tmp_path):
    """CheckpointSaver of steps 2 and 4, their states, and the names of the files of step 4."""
    checkpoints = CheckpointSaver(tmp_path, keep=2)
    fresh = begin(checkpoints)
    two, four = at_step(fresh, 2), at_step(fresh, 4)
    checkpoints.save(two, {})
    checkpoints.save(four, {})
    checkpoints.wait()
    root = tmp_path / "00000004"
    names = sorted(p.relative_to(root) for p in root.rglob("*") if p.is_file())
    assert len(names) > 15
    return checkpoints, two, four, names


def check_damage(begin, checkpoints, two, four, name, damage, caplog):
    """Damage to one file costs one checkpoint and no more; afterwards all is as it was."""
    root = checkpoints.path(4)
    content = (root / name).read_bytes()
    assert content, f"{name} is empty: what is damage to it?"
    damage(root / name)
    with pytest.raises(DamagedCheckpoint, match=name.name):  # no other is taken for it
        checkpoints.verify(4)
    assert checkpoints.steps() == [2, 4]

    caplog.clear()
    assert_same(begin(checkpoints), two)
    assert checkpoints.steps() == [2]
    assert str(name) in caplog.text
    [aside] = [item for item in inventory(checkpoints) if item.quarantined]
    assert aside.step == 4 and str(root / name) in aside.damage

    checkpoints.save(four, {})
    checkpoints.wait()
    assert_same(begin(checkpoints), four)
    # The damaged one is whole but for this file; put it back for the next.
    (aside.path / "REASON.txt").unlink()
    (aside.path / name).write_bytes(content)
    checkpoints.delete(4)
    aside.path.rename(root)


def test_damage_costs_one_checkpoint_and_no_more(begin, tmp_path, caplog):
    """One file of each kind; that every file is verified is tested in test_checkpoint.py."""
    checkpoints, two, four, names = saved_files(begin, tmp_path)
    kinds = [
        next(name for name in names if name.match("params/**/d/*")),
        next(name for name in names if name.match("optimizer/_METADATA")),
        next(name for name in names if name.name == "manifest.json"),
    ]
    for name, damage in zip(kinds, (flip, truncate, remove), strict=True):
        check_damage(begin, checkpoints, two, four, name, damage, caplog)
    assert_same(begin(checkpoints), four)


@pytest.mark.slow
@pytest.mark.parametrize("damage", [truncate, flip, remove])
def test_damage_to_any_file_costs_one_checkpoint_and_no_more(begin, tmp_path, caplog, damage):
    checkpoints, two, four, names = saved_files(begin, tmp_path)
    for name in names:
        check_damage(begin, checkpoints, two, four, name, damage, caplog)
    assert_same(begin(checkpoints), four)


def test_what_cannot_be_read_for_the_moment_is_left_alone(begin, tmp_path, monkeypatch):
    checkpoints, _, four, names = saved_files(begin, tmp_path)
    before = sorted(tmp_path.rglob("*"))
    [name] = [name for name in names if name.match("params/_METADATA")]
    path, digest = checkpoints.path(4) / name, checkpoint_files.sha256_of_file

    def refuse(file):
        if file == path:
            raise OSError(errno.ESTALE, "Stale file handle", str(file))
        return digest(file)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_files, "sha256_of_file", refuse)
        with pytest.raises(InputError) as error:
            begin(checkpoints)
    assert (error.value.field, error.value.got) == (str(path), "Stale file handle")
    assert sorted(tmp_path.rglob("*")) == before
    assert_same(begin(checkpoints), four)


def test_all_damaged_is_an_error_and_never_a_fresh_start(begin, tmp_path):
    checkpoints = CheckpointSaver(tmp_path, keep=2)
    fresh = begin(checkpoints)
    for step in (2, 4):
        checkpoints.save(at_step(fresh, step), {})
    checkpoints.wait()
    for step in (2, 4):
        flip(next(p for p in checkpoints.path(step).rglob("d/*") if p.is_file()))
    for _ in range(2):  # nor when it is tried again
        with pytest.raises(InputError) as error:
            begin(checkpoints)
        assert error.value.field == str(tmp_path)
        assert checkpoints.steps() == []
