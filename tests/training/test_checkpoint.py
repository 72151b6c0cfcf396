"""Checkpoints: whole or absent, verified, pruned, and never the wrong one."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sheepop_jax.errors import InputError
from sheepop_jax.training.checkpoint import MANIFEST, Checkpoints, DamagedCheckpoint, SaveFailed
from sheepop_jax.training.step import TrainState


def make_state(step, seed=0):
    draw = np.random.default_rng(seed)
    params = {"up": {"kernel": jnp.asarray(draw.standard_normal((3, 5)), jnp.float32)}}
    moments = jax.tree.map(lambda p: p + 1, params)
    return TrainState(
        jnp.int32(step), jnp.int32(step - 1), params, (moments, {"count": jnp.int32(7)})
    )


def abstract(state):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )


def assert_same(first, second):
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def save_all(checkpoints, steps, losses=None):
    for step in steps:
        figures = {"val_loss": losses[step]} if losses and step in losses else {}
        checkpoints.save(make_state(step, seed=step), {**figures, "train_seconds": float(step)})
    checkpoints.wait()


def test_what_is_restored_is_what_was_saved(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=3)
    save_all(checkpoints, [5, 8])
    for step in (5, 8):
        state = make_state(step, seed=step)
        assert_same(checkpoints.restore(step, abstract(state)), state)
        assert_same(checkpoints.restore_params(step, abstract(state.params)), state.params)
    assert checkpoints.manifest(8)["figures"] == {"train_seconds": 8.0}


def test_a_state_may_be_donated_as_soon_as_save_returns(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    overwrite = jax.jit(lambda s: jax.tree.map(lambda x: x * 0 - 1, s), donate_argnums=0)
    big = {"kernel": jnp.arange(1 << 20, dtype=jnp.float32)}
    state = TrainState(jnp.int32(3), jnp.int32(3), big, ())
    expected = np.array(big["kernel"])
    checkpoints.save(state, {})
    jax.block_until_ready(overwrite(state))
    checkpoints.wait()
    target = abstract(TrainState(jnp.int32(0), jnp.int32(0), {"kernel": jnp.zeros(1 << 20)}, ()))
    np.testing.assert_array_equal(checkpoints.restore(3, target).params["kernel"], expected)


def test_the_latest_and_the_best_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    save_all(checkpoints, [1, 2, 3, 4, 5], {1: 3.0, 2: 1.5, 3: 2.0, 5: 1.6})
    assert checkpoints.steps() == [2, 4, 5]
    assert checkpoints.best() == 2
    assert [checkpoints.resolve(name) for name in ("latest", "best", "4", 4)] == [5, 2, 4, 4]
    assert [entry.name for entry in tmp_path.iterdir() if entry.name.startswith(".")] == []


def test_order_is_by_step_number_not_by_time(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=3)
    save_all(checkpoints, [100, 20, 3])
    assert checkpoints.steps() == [3, 20, 100]
    assert checkpoints.resolve("latest") == 100


def test_saving_a_step_again_replaces_it(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(make_state(4, seed=1), {})
    checkpoints.save(make_state(4, seed=2), {})
    checkpoints.wait()
    assert_same(checkpoints.restore(4, abstract(make_state(4))), make_state(4, seed=2))


@pytest.mark.parametrize("name", ["0", "best", "3", "newest", "-1"])
def test_a_step_that_is_not_there_is_an_error_that_lists_those_that_are(tmp_path, name):
    checkpoints = Checkpoints(tmp_path, keep=3)
    save_all(checkpoints, [2, 7])
    with pytest.raises(InputError, match=r"--step: got .* 2, 7"):
        checkpoints.resolve(name)


def test_no_checkpoint_at_all_is_an_error(tmp_path):
    with pytest.raises(InputError, match="no checkpoint"):
        Checkpoints(tmp_path / "nowhere").resolve("latest")


def damage_truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def damage_flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(bytes(content))


def damage_delete(path):
    path.unlink()


@pytest.mark.parametrize("damage", [damage_truncate, damage_flip, damage_delete])
def test_every_damaged_file_is_detected(tmp_path, damage):
    checkpoints = Checkpoints(tmp_path / "whole")
    save_all(checkpoints, [6])
    root = tmp_path / "whole" / "00000006"
    names = sorted(p.relative_to(root) for p in root.rglob("*") if p.is_file())
    assert len(names) > 4
    target = abstract(make_state(6))
    for name in names:
        content = (root / name).read_bytes()
        if not content and damage is not damage_delete:
            continue  # nothing to damage in an empty file
        damage(root / name)
        with pytest.raises(DamagedCheckpoint, match=name.name):
            checkpoints.restore(6, target)
        (root / name).write_bytes(content)
    assert_same(checkpoints.restore(6, target), make_state(6, seed=6))


def test_a_checkpoint_under_another_number_or_of_another_format_is_damaged(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path)
    save_all(checkpoints, [6])
    (tmp_path / "00000006").rename(tmp_path / "00000009")
    with pytest.raises(DamagedCheckpoint, match="00000009"):
        checkpoints.verify(9)
    (tmp_path / "00000009").rename(tmp_path / "00000006")
    monkeypatch.setattr("sheepop_jax.training.checkpoint.FORMAT", 2)
    with pytest.raises(DamagedCheckpoint, match="format 1, not 2"):
        checkpoints.verify(6)


def test_the_best_is_neither_damaged_nor_without_a_number(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=4)
    save_all(checkpoints, [1, 2, 3, 4], {1: float("nan"), 2: 1.5, 3: 2.0, 4: float("-inf")})
    assert checkpoints.best() == 2
    (tmp_path / "00000002" / MANIFEST).write_text("{}")
    assert checkpoints.best() == 3
    for step in (3, 1, 4):
        checkpoints.set_aside(step)
    assert checkpoints.steps() == [2] and checkpoints.best() is None


def test_an_added_file_is_detected(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    save_all(checkpoints, [6])
    (tmp_path / "00000006" / "params" / "extra").write_text("x")
    with pytest.raises(DamagedCheckpoint, match="extra: not a file of this checkpoint"):
        checkpoints.verify(6)


def test_a_damaged_step_can_be_set_aside_and_saved_again(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    save_all(checkpoints, [6])
    (tmp_path / "00000006" / MANIFEST).unlink()
    with pytest.raises(DamagedCheckpoint):
        checkpoints.verify(6)
    aside = checkpoints.set_aside(6)
    assert aside.is_dir() and checkpoints.steps() == []
    save_all(checkpoints, [6])
    assert checkpoints.steps() == [6] and aside.is_dir()
    again = checkpoints.set_aside(6)
    assert again != aside and again.is_dir() and aside.is_dir()


def test_unfinished_saves_do_not_count_and_are_swept(tmp_path):
    (tmp_path / ".pending-00000009" / "params").mkdir(parents=True)
    (tmp_path / ".deleted-00000001").mkdir()
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.steps() == []
    save_all(checkpoints, [2])
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["00000002"]


def test_a_failed_save_is_raised_and_costs_no_older_checkpoint(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path, keep=1)
    save_all(checkpoints, [2])

    def full(*args, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(json, "dump", full)
    checkpoints.save(make_state(3), {})
    with pytest.raises(SaveFailed, match=r"00000003: not saved \(.*No space left.* MB free"):
        checkpoints.wait()
    monkeypatch.undo()
    assert checkpoints.steps() == [2]
    assert_same(checkpoints.restore(2, abstract(make_state(2))), make_state(2, seed=2))


def test_a_failed_save_is_raised_by_the_next_one(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path)

    def full(*args, **options):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(json, "dump", full)
        checkpoints.save(make_state(3), {})
        with pytest.raises(SaveFailed, match="00000003"):
            checkpoints.save(make_state(4), {})
    save_all(checkpoints, [5])  # once raised, it is done with
    assert checkpoints.steps() == [5]


def test_a_deletion_that_is_cut_short_leaves_no_broken_step(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path, keep=1)
    save_all(checkpoints, [2])

    def cut_short(path):
        next(p for p in path.rglob("*") if p.is_file()).unlink()
        raise OSError("cut short")

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", cut_short)
        checkpoints.save(make_state(3, seed=3), {})
        with pytest.raises(SaveFailed, match="cut short"):
            checkpoints.wait()
    assert checkpoints.steps() == [3]
    checkpoints.verify(3)


def test_a_target_of_another_shape_is_refused(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    save_all(checkpoints, [2])
    state = make_state(2)
    wider = {"up": {"kernel": jnp.zeros((3, 6))}}
    with pytest.raises(ValueError):
        checkpoints.restore(2, abstract(dataclasses.replace(state, params=wider)))
