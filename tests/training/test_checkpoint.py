"""CheckpointSaver: whole or absent, verified, pruned, and never the wrong one."""

import asyncio
import dataclasses
import errno
import json
import logging
import math
import os
import re
import shutil
import subprocess
import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sheepop_jax.checkpoint import host_copy, saver, storage
from sheepop_jax.checkpoint.checkpoints import (
    FORMAT,
    MANIFEST,
    REASON,
    Checkpoints,
    DamagedCheckpoint,
    file_names,
)
from sheepop_jax.checkpoint.inventory import delete, inventory, keep_only
from sheepop_jax.checkpoint.saver import CheckpointSaver, SaveFailed
from sheepop_jax.checkpoint.state import TrainState
from sheepop_jax.errors import InputError
from sheepop_jax.files import read_sealed, sealed, sha256_of_file, write_atomic

pytestmark = pytest.mark.usefixtures("fast_compile")


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
    checkpoints = CheckpointSaver(tmp_path, keep=3)
    save_all(checkpoints, [5, 8])
    for step in (5, 8):
        state = make_state(step, seed=step)
        assert_same(checkpoints.restore(step, abstract(state)), state)
        assert_same(checkpoints.restore_params(step, abstract(state.params)), state.params)
    assert checkpoints.manifest(8)["figures"] == {"train_seconds": 8.0}


def test_a_state_may_be_donated_as_soon_as_save_returns(tmp_path, monkeypatch):
    donated, write = threading.Event(), storage.write

    def late(*arguments):
        donated.wait()
        write(*arguments)

    monkeypatch.setattr(storage, "write", late)
    checkpoints = CheckpointSaver(tmp_path)
    overwrite = jax.jit(lambda s: jax.tree.map(lambda x: x * 0 - 1, s), donate_argnums=0)
    big = {"kernel": jnp.arange(1 << 20, dtype=jnp.float32)}
    state = TrainState(jnp.int32(3), jnp.int32(3), big, ())
    expected = np.array(big["kernel"])
    checkpoints.save(state, {})
    try:
        jax.block_until_ready(overwrite(state))
    finally:
        donated.set()
    checkpoints.wait()
    target = abstract(TrainState(jnp.int32(0), jnp.int32(0), {"kernel": jnp.zeros(1 << 20)}, ()))
    np.testing.assert_array_equal(checkpoints.restore(3, target).params["kernel"], expected)


def test_the_latest_and_the_best_are_kept(tmp_path):
    checkpoints = CheckpointSaver(tmp_path, keep=2)
    save_all(checkpoints, [1, 2, 3, 4, 5], {1: 3.0, 2: 1.5, 3: 2.0, 5: 1.6})
    assert checkpoints.steps() == [2, 4, 5]
    assert checkpoints.best() == 2
    assert [checkpoints.resolve(name) for name in ("latest", "best", "4", 4)] == [5, 2, 4, 4]
    assert checkpoints.resolve(None) == 2
    assert [entry.name for entry in tmp_path.iterdir() if entry.name.startswith(".")] == []


def test_order_is_by_step_number_not_by_time(tmp_path):
    checkpoints = CheckpointSaver(tmp_path, keep=3)
    save_all(checkpoints, [100, 20, 3])
    assert checkpoints.steps() == [3, 20, 100]
    assert checkpoints.resolve("latest") == 100


def test_saving_a_step_again_replaces_it(tmp_path):
    checkpoints = CheckpointSaver(tmp_path)
    checkpoints.save(make_state(4, seed=1), {})
    checkpoints.save(make_state(4, seed=2), {})
    checkpoints.wait()
    assert_same(checkpoints.restore(4, abstract(make_state(4))), make_state(4, seed=2))


def test_a_step_that_is_not_there_is_an_error_that_lists_those_that_are(tmp_path):
    checkpoints = CheckpointSaver(tmp_path, keep=3)
    save_all(checkpoints, [2, 7])
    for name in ("0", "best", "3", "newest", "-1"):
        with pytest.raises(InputError) as error:
            checkpoints.resolve(name)
        assert (error.value.field, error.value.got) == ("step", name)
        assert "2, 7" in error.value.expected
        assert ("none has a validation loss" in error.value.expected) == (name == "best")
    assert checkpoints.resolve(None) == 7


def test_the_default_says_that_a_damaged_step_may_have_been_the_best(tmp_path, caplog):
    checkpoints = CheckpointSaver(tmp_path, keep=3)
    save_all(checkpoints, [2, 7, 9], {2: 1.5, 7: 1.0, 9: 2.0})
    assert checkpoints.resolve(None) == 7 and "damaged" not in caplog.text
    (checkpoints.path(7) / MANIFEST).unlink()
    assert checkpoints.resolve(None) == 2
    assert "step 7 is damaged" in caplog.text


def test_no_checkpoint_at_all_is_an_error(tmp_path):
    with pytest.raises(InputError) as error:
        CheckpointSaver(tmp_path / "nowhere").resolve("latest")
    assert error.value.field == str(tmp_path / "nowhere")


def damage_truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def damage_flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(bytes(content))


def damage_delete(path):
    path.unlink()


def test_every_damaged_file_is_detected(tmp_path):
    checkpoints = CheckpointSaver(tmp_path / "whole")
    save_all(checkpoints, [6])
    root = tmp_path / "whole" / "00000006"
    names = sorted(p.relative_to(root) for p in root.rglob("*") if p.is_file())
    assert len(names) > 4
    for name in names:
        content = (root / name).read_bytes()
        for damage in (damage_truncate, damage_flip, damage_delete):
            if not content and damage is not damage_delete:
                continue  # nothing to damage in an empty file
            damage(root / name)
            with pytest.raises(DamagedCheckpoint, match=name.name):
                checkpoints.verify(6)
            (root / name).write_bytes(content)
    assert_same(checkpoints.restore(6, abstract(make_state(6))), make_state(6, seed=6))


def test_a_checkpoint_under_another_number_or_of_another_format_is_damaged(tmp_path, monkeypatch):
    checkpoints = CheckpointSaver(tmp_path)
    save_all(checkpoints, [6])
    (tmp_path / "00000006").rename(tmp_path / "00000009")
    with pytest.raises(DamagedCheckpoint, match="00000009"):
        checkpoints.verify(9)
    (tmp_path / "00000009").rename(tmp_path / "00000006")
    monkeypatch.setattr("sheepop_jax.checkpoint.checkpoints.FORMAT", 2)
    with pytest.raises(DamagedCheckpoint, match="format 1, not 2"):
        checkpoints.verify(6)


def test_the_best_is_neither_damaged_nor_without_a_number(tmp_path):
    checkpoints = CheckpointSaver(tmp_path, keep=4)
    save_all(checkpoints, [1, 2, 3, 4], {1: float("nan"), 2: 1.5, 3: 2.0, 4: float("-inf")})
    assert checkpoints.best() == 2
    (tmp_path / "00000002" / MANIFEST).write_text("{}")
    assert checkpoints.best() == 3
    for step in (3, 1, 4):
        checkpoints.quarantine(step, "a test")
    assert checkpoints.steps() == [2] and checkpoints.best() is None


def test_files_of_others_in_a_checkpoint_do_not_matter(tmp_path, monkeypatch, caplog):
    """A file manager adds them at any time, also during a save, and takes them away again."""
    write = storage.write

    def write_with_company(directory, items, *limit):
        write(directory, items, *limit)
        for name in (".DS_Store", "params/d/~sync.tmp", "optimizer/desktop.ini"):
            (directory / name).write_text("x")

    monkeypatch.setattr(storage, "write", write_with_company)
    checkpoints = CheckpointSaver(tmp_path)
    save_all(checkpoints, [6])
    root = tmp_path / "00000006"
    (root / ".DS_Store").unlink()
    (root / "optimizer" / "desktop.ini").write_text("changed")
    (root / "params" / "._other").write_text("added")
    caplog.clear()
    with caplog.at_level("DEBUG", "sheepop_jax.checkpoint"):
        assert checkpoints.verify(6)["step"] == 6
    others = "optimizer/desktop.ini, params/._other, params/d/~sync.tmp"
    assert caplog.messages == [f"{root}: ignoring {others}"]
    state = make_state(6, seed=6)
    assert_same(checkpoints.restore(6, abstract(state)), state)
    save_all(checkpoints, [7])
    assert [entry.name for entry in tmp_path.iterdir()] == ["00000007"]


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.ESTALE, errno.EMFILE])
@pytest.mark.parametrize("name", [MANIFEST, "params/_METADATA"])
def test_a_file_that_cannot_be_read_is_not_damage(tmp_path, monkeypatch, caplog, number, name):
    checkpoints = CheckpointSaver(tmp_path, keep=1)
    save_all(checkpoints, [6, 7], {6: 1.0})  # 6 is the best, 7 the latest
    path = tmp_path / "00000006" / name

    def refusing(read):
        def refuse(file):
            if file == path:
                raise OSError(number, os.strerror(number), str(file))
            return read(file)

        return refuse

    for read in (read_sealed, sha256_of_file):
        here = f"sheepop_jax.checkpoint.checkpoints.{read.__name__}"
        monkeypatch.setattr(here, refusing(read))
    for call in (checkpoints.verify, lambda step: inventory(checkpoints, verify=True)):
        with pytest.raises(InputError) as caught:
            call(6)
        assert (caught.value.field, caught.value.got) == (str(path), os.strerror(number))
    assert checkpoints.resolve("latest") == 7  # which needs no other's manifest
    with pytest.raises(InputError):
        delete(checkpoints, [7])
    save_all(checkpoints, [8])
    # Which is the best cannot be told without its manifest, so none is deleted.
    unknown = name == MANIFEST
    assert checkpoints.steps() == ([6, 7, 8] if unknown else [6, 8])
    assert ("no old checkpoint deleted" in caplog.text) == unknown
    monkeypatch.undo()
    checkpoints.tidy()
    assert checkpoints.steps() == [6, 8]


def test_a_directory_that_cannot_be_listed_is_not_damage(tmp_path, monkeypatch):
    checkpoints = CheckpointSaver(tmp_path)
    save_all(checkpoints, [6])
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("params"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(InputError) as caught:
        checkpoints.verify(6)
    assert caught.value.got == "Permission denied"


@pytest.mark.parametrize(
    ("name", "number"),
    [("_METADATA", errno.EISDIR), ("manifest.ocdbt", errno.ELOOP)],
)
def test_a_file_that_cannot_be_read_while_arrays_are_restored(tmp_path, name, number):
    """After its verification. No user can read a directory, or a link to itself."""
    checkpoints = CheckpointSaver(tmp_path)
    save_all(checkpoints, [6])
    path = tmp_path / "00000006" / "params" / name
    path.unlink()
    path.mkdir() if number == errno.EISDIR else path.symlink_to(path)
    with pytest.raises(InputError) as caught:
        checkpoints.restore(6, abstract(make_state(6)))
    assert (caught.value.field, caught.value.got) == (str(path), os.strerror(number))


def test_a_reader_takes_the_next_newest_when_training_deletes_its_step(tmp_path, monkeypatch):
    checkpoints = CheckpointSaver(tmp_path, keep=1)
    save_all(checkpoints, [1])
    tried = []

    def load(step):
        tried.append(step)
        if len(tried) < 3:
            save_all(checkpoints, [step + 1])
        return checkpoints.verify(step)["step"]

    assert checkpoints.read("latest", load) == 3
    assert tried == [1, 2, 3]
    tried.clear()
    with pytest.raises(InputError) as error:  # what was asked for by its number is gone
        checkpoints.read(3, load)
    assert error.value.got == 3 and error.value.expected.endswith("4")
    tried += [0, 0]
    (tmp_path / "00000004" / MANIFEST).unlink()
    with pytest.raises(DamagedCheckpoint):
        checkpoints.read("latest", load)
    assert tried == [3, 0, 0, 4]  # no change: no second attempt

    steps, nothing = checkpoints.steps(), iter([[]])
    monkeypatch.setattr(checkpoints, "steps", lambda: next(nothing, steps))
    assert checkpoints.resolve("latest") == 4  # though a listing missed it


def test_readers_never_fail_while_another_thread_saves_and_prunes(tmp_path):
    """For real, with a save and a deletion for almost every read; which meet is up to chance."""
    checkpoints = CheckpointSaver(tmp_path, keep=1)
    save_all(checkpoints, [1])
    target = abstract(make_state(1).params)

    def write():
        for step in range(2, 17):
            # The best is sometimes an old one, which goes once there is a better one.
            save_all(checkpoints, [step], {step: 9.0 + step % 7 - step / 9})

    def load(step):
        return step, found.restore_params(step, target)

    found, done = Checkpoints(tmp_path), False
    with ThreadPoolExecutor(1) as other:
        writer = other.submit(write)
        while not done:
            done = writer.done()
            for wanted in (None, "best", "latest"):
                if wanted == "best" and found.best() is None:
                    continue  # of step 1
                step, params = found.read(wanted, load)
                assert_same(params, make_state(step, seed=step).params)
            assert inventory(found)[-1].is_latest
        writer.result()
    assert step == 16


def test_reads_that_are_given_up_print_nothing(monkeypatch):
    """As orbax leaves them when another array cannot be read."""
    printed = []
    monkeypatch.setattr(sys, "unraisablehook", lambda found: printed.append(str(found.exc_value)))
    monkeypatch.setattr(logging.getLogger("absl"), "filters", [])
    monkeypatch.setattr(warnings, "filterwarnings", lambda *rule: None)
    with pytest.raises(FileNotFoundError):
        storage.read(Path("/nowhere"), {})

    async def read(message):
        try:
            await asyncio.sleep(0)
        except BaseException as error:
            raise Exception(message) from error

    for message in ("Encountered error while reading array index: 0", "another"):
        given_up = read(message)
        given_up.send(None)
        del given_up
    assert printed == ["another"]


def test_a_reader_that_fails_for_another_reason_does_not_try_again(tmp_path):
    """Although training saves meanwhile."""
    checkpoints = CheckpointSaver(tmp_path, keep=9)
    save_all(checkpoints, [1])

    def load(step):
        save_all(checkpoints, [step + 1])
        raise MemoryError

    with pytest.raises(MemoryError):
        checkpoints.read("latest", load)
    assert checkpoints.steps() == [1, 2]


def test_the_inventory_leaves_out_what_training_deletes_meanwhile(tmp_path, monkeypatch):
    checkpoints = CheckpointSaver(tmp_path, keep=2)
    save_all(checkpoints, [1, 2])
    verify = CheckpointSaver.verify

    def prune(self, step):
        if step in gone:
            self.delete(step)
        return verify(self, step)

    monkeypatch.setattr(CheckpointSaver, "verify", prune)
    gone = {2}
    [item] = inventory(checkpoints, verify=True)
    assert (item.step, item.is_latest, item.damage) == (1, True, "")


def test_a_damaged_step_can_be_set_aside_and_saved_again(tmp_path):
    checkpoints = CheckpointSaver(tmp_path)
    save_all(checkpoints, [6])
    (tmp_path / "00000006" / MANIFEST).unlink()
    with pytest.raises(DamagedCheckpoint):
        checkpoints.verify(6)
    aside = checkpoints.quarantine(6, "a test")
    assert aside.is_dir() and checkpoints.steps() == []
    save_all(checkpoints, [6])
    assert checkpoints.steps() == [6] and aside.is_dir()
    again = checkpoints.quarantine(6, "a test")
    assert again != aside and again.is_dir() and aside.is_dir()


def test_unfinished_saves_do_not_count_and_are_swept(tmp_path):
    (tmp_path / ".pending-00000009" / "params").mkdir(parents=True)
    (tmp_path / ".deleted-00000001").mkdir()
    checkpoints = CheckpointSaver(tmp_path)
    assert checkpoints.steps() == []
    save_all(checkpoints, [2])
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["00000002"]


def test_a_failed_save_is_raised_and_costs_no_older_checkpoint(tmp_path, monkeypatch):
    checkpoints = CheckpointSaver(tmp_path, keep=1)
    save_all(checkpoints, [2])

    def full(*args, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(saver, "write_atomic", full)
    checkpoints.save(make_state(3), {})
    with pytest.raises(SaveFailed, match=r"00000003: not saved \(.*No space left.* MB free"):
        checkpoints.wait()
    monkeypatch.undo()
    assert checkpoints.steps() == [2]
    assert_same(checkpoints.restore(2, abstract(make_state(2))), make_state(2, seed=2))


def test_a_failed_save_is_raised_by_the_next_one(tmp_path, monkeypatch):
    checkpoints = CheckpointSaver(tmp_path)

    def full(*args, **options):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(saver, "write_atomic", full)
        checkpoints.save(make_state(3), {})
        with pytest.raises(SaveFailed, match="00000003"):
            checkpoints.save(make_state(4), {})
    save_all(checkpoints, [5])  # once raised, it is done with
    assert checkpoints.steps() == [5]


def test_a_deletion_that_is_cut_short_is_a_warning_and_leaves_no_broken_step(
    tmp_path, monkeypatch, caplog
):
    checkpoints = CheckpointSaver(tmp_path, keep=1)
    save_all(checkpoints, [2])

    def cut_short(path):
        next(p for p in path.rglob("*") if p.is_file()).unlink()
        raise OSError("cut short")

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", cut_short)
        save_all(checkpoints, [3])
        assert "not deleted (cut short)" in caplog.text
        save_all(checkpoints, [4])  # what the sweep cannot delete is no failure either
    assert checkpoints.steps() == [4]
    checkpoints.verify(4)
    save_all(checkpoints, [5])
    assert [p.name for p in tmp_path.iterdir()] == ["00000005"]


def test_a_step_that_cannot_be_deleted_stays_with_a_warning(tmp_path, monkeypatch, caplog):
    checkpoints = CheckpointSaver(tmp_path, keep=1)
    save_all(checkpoints, [2])
    rename = os.rename

    def refuse(source, target):
        if ".deleted" in str(target):
            raise OSError(16, "Device or resource busy")
        rename(source, target)

    monkeypatch.setattr(os, "rename", refuse)
    save_all(checkpoints, [3])
    assert "00000002: not deleted (Device or resource busy)" in caplog.text
    assert checkpoints.steps() == [2, 3]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_parameters_that_are_not_finite_are_never_saved(tmp_path, value):
    checkpoints = CheckpointSaver(tmp_path)
    save_all(checkpoints, [2])
    state = make_state(3)
    state.params["up"]["kernel"] = state.params["up"]["kernel"].at[2, 4].set(value)
    with pytest.raises(SaveFailed, match=r"00000003: not saved \(not finite: up.kernel\); older"):
        checkpoints.save(state, {})
    checkpoints.wait()
    assert [p.name for p in tmp_path.iterdir()] == ["00000002"]
    save_all(checkpoints, [4])


def other_shape(state):
    params = {"up": {"kernel": jnp.zeros((3, 6))}}
    return dataclasses.replace(
        state, params=params
    ), r"up.kernel float32\[3, 5\], not float32\[3, 6\]"


def other_dtype(state):
    params = {"up": {"kernel": jnp.zeros((3, 5), jnp.bfloat16)}}
    return dataclasses.replace(state, params=params), r"float32\[3, 5\], not bfloat16\[3, 5\]"


def other_name(state):
    params = {"down": {"kernel": jnp.zeros((3, 5))}}
    return (
        dataclasses.replace(state, params=params),
        r"unexpected up.kernel; missing down.kernel",
    )


def other_optimizer(state):
    moments, _ = state.opt_state
    return dataclasses.replace(state, opt_state=(moments,)), r"unexpected opt_state.1.count"


@pytest.mark.parametrize("other", [other_shape, other_dtype, other_name, other_optimizer])
def test_another_model_is_refused_with_a_diff_before_any_array_is_read(
    tmp_path, monkeypatch, other
):
    checkpoints = CheckpointSaver(tmp_path)
    save_all(checkpoints, [2])
    target, message = other(make_state(2))

    def read(*arguments):
        raise AssertionError("arrays were read")

    with monkeypatch.context() as patch:
        patch.setattr("sheepop_jax.checkpoint.storage.read", read)
        with pytest.raises(InputError) as caught:
            checkpoints.restore(2, abstract(target))
        assert re.search(message, caught.value.got)
        assert "00000002" in caught.value.field and "\n" not in str(caught.value)
        if other is not other_optimizer:
            with pytest.raises(InputError) as caught:
                checkpoints.restore_params(2, abstract(target.params))
            assert re.search(message, caught.value.got)
    assert checkpoints.steps() == [2]
    checkpoints.restore(2, abstract(make_state(2)))


def test_restoring_holds_no_second_copy(tmp_path, process_env):
    """In a fresh process, whose peak of memory is its own."""
    code = """
import re, sys
from pathlib import Path
import jax, jax.numpy as jnp
from sheepop_jax.checkpoint.saver import CheckpointSaver
from sheepop_jax.checkpoint.state import TrainState

def make():
    one = jnp.int32(1)
    many = [{f"k{i}": jnp.full((2000, 1000), n, jnp.float32) for i in range(6)} for n in range(3)]
    return TrainState(one, one + 0, many[0], tuple(many[1:]))

def peak():
    # Not getrusage: what it gives is no less than the parent's.
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
target = jax.tree.map(lambda leaf: leaf.update(sharding=here), jax.eval_shape(make))
before = peak()
state = jax.block_until_ready(CheckpointSaver(Path(sys.argv[1])).restore(1, target))
print((peak() - before) / sum(leaf.nbytes for leaf in jax.tree.leaves(state)))
"""
    one = jnp.int32(1)
    many = [{f"k{i}": jnp.full((2000, 1000), n, jnp.float32) for i in range(6)} for n in range(3)]
    checkpoints = CheckpointSaver(tmp_path)
    checkpoints.save(TrainState(one, one + 0, many[0], tuple(many[1:])), {})
    checkpoints.wait()
    shown = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        env={**process_env, "PYTHONPATH": os.getcwd()},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert 0.9 < float(shown) < 1.7


def test_a_directory_that_was_set_aside_says_why(tmp_path):
    checkpoints = CheckpointSaver(tmp_path, keep=2)
    save_all(checkpoints, [2, 4], {2: 1.5, 4: 2.0})
    damaged = tmp_path / "00000004" / "params" / "_METADATA"
    damage_flip(damaged)
    with pytest.raises(DamagedCheckpoint) as caught:
        checkpoints.verify(4)
    aside = checkpoints.quarantine(4, caught.value)
    assert (aside / REASON).read_text() == f"{damaged}: its content has changed\n"
    two, four = inventory(checkpoints)
    assert (four.step, four.path, four.quarantined) == (4, aside, True)
    assert four.damage == f"{damaged}: its content has changed"
    assert (two.step, two.is_latest, two.is_best, two.damage) == (2, True, True, "")
    (aside / REASON).unlink()
    assert inventory(checkpoints)[1].damage == "no reason recorded"


def test_the_inventory_knows_sizes_figures_and_damage(tmp_path):
    checkpoints = CheckpointSaver(tmp_path, keep=3)
    assert inventory(CheckpointSaver(tmp_path / "nowhere")) == []
    save_all(checkpoints, [1, 2, 3], {1: 2.0, 2: 1.5, 3: 1.75})
    damage_flip(tmp_path / "00000001" / "params" / "_METADATA")
    (tmp_path / "00000003" / MANIFEST).unlink()
    quick, full = inventory(checkpoints), inventory(checkpoints, verify=True)
    assert [(i.step, i.is_latest, i.is_best) for i in quick] == [
        (1, False, False),
        (2, False, True),
        (3, True, False),
    ]
    assert [bool(i.damage) for i in quick] == [False, False, True]
    assert [bool(i.damage) for i in full] == [True, False, True]
    assert quick[1].figures == {"val_loss": 1.5, "train_seconds": 2.0} and quick[2].figures == {}
    files = [p for p in (tmp_path / "00000002").rglob("*") if p.is_file()]
    assert quick[1].bytes == sum(len(p.read_bytes()) for p in files)


def test_deleting_leaves_a_whole_checkpoint_and_the_best(tmp_path):
    checkpoints = CheckpointSaver(tmp_path, keep=4)
    save_all(checkpoints, [1, 2, 3, 4], {2: 1.5, 4: 2.0})

    def refused(call, steps):
        with pytest.raises(InputError) as error:
            call(checkpoints, steps)
        assert error.value.field == {delete: "delete", keep_only: "keep"}[call]
        return error.value

    for call, steps in ((delete, [5]), (delete, [1, 2, 3, 4]), (keep_only, [5]), (keep_only, [])):
        refused(call, steps)
    for call, steps in ((delete, [2]), (keep_only, [1, 4])):
        error = refused(call, steps)
        assert "step 2, the best" in error.expected and "`force`" in error.hint
    assert checkpoints.steps() == [1, 2, 3, 4]
    delete(checkpoints, [1])
    assert checkpoints.steps() == [2, 3, 4]
    (tmp_path / "00000003" / MANIFEST).unlink()
    for call, steps in ((keep_only, [3]), (delete, [2, 4])):
        error = refused(call, steps)
        assert error.got == ", ".join(map(str, steps)) and "`force`" in error.hint
    assert checkpoints.steps() == [2, 3, 4]
    assert keep_only(checkpoints, [4], force=True) == [2, 3]
    assert [p.name for p in tmp_path.iterdir()] == ["00000004"]
    assert delete(checkpoints, [4], force=True) == [4]


def test_a_name_in_a_manifest_that_leads_outside_is_never_opened(tmp_path):
    directory = tmp_path / "run"
    checkpoints = CheckpointSaver(directory)
    save_all(checkpoints, [6])
    (tmp_path / "secret").write_text("secret")
    root = directory / "00000006"
    files = {name: sha256_of_file(root / name) for name in file_names(root)}
    for name in ("../../secret", str(tmp_path / "secret")):
        wrong = {**files, name: files[next(iter(files))]}
        manifest = {"format": FORMAT, "step": 6, "figures": {}, "files": wrong}
        write_atomic(root / MANIFEST, json.dumps(sealed(manifest)))
        with pytest.raises(DamagedCheckpoint, match="secret: missing"):
            checkpoints.verify(6)


def test_deletion_follows_no_link_and_touches_no_other_name(tmp_path):
    directory, outside = tmp_path / "run", tmp_path / "outside"
    checkpoints = CheckpointSaver(directory, keep=1)
    save_all(checkpoints, [2])
    shutil.copytree(directory / "00000002", outside / "inner")
    others = ["notes", "1", "000000001", "00000001.bak", "damaged-00000001-0", "٠٠٠٠٠٠٠١"]
    for name in others:
        (directory / name).mkdir()
    (directory / "00000001").symlink_to(outside / "inner")
    (directory / ".pending-00000009").symlink_to(outside)
    (directory / "00000002" / "params" / "link").symlink_to(outside)
    save_all(checkpoints, [3])
    assert checkpoints.steps() == [3]
    assert {p.name for p in directory.iterdir()} == {"00000003", *others}
    assert (outside / "inner" / MANIFEST).is_file()


def test_figures_are_added_to_a_step_that_is_there(tmp_path, monkeypatch):
    checkpoints = CheckpointSaver(tmp_path, keep=3)
    save_all(checkpoints, [1, 2])
    checkpoints.record(1, {"val_loss": 0.5, "other": 3})
    whole = {"train_seconds": 1.0, "val_loss": 0.5, "other": 3}
    assert checkpoints.verify(1)["figures"] == whole
    assert checkpoints.best() == 1

    def full(*names):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(SaveFailed, match="00000001: metrics not recorded .No space left on device"):
        checkpoints.record(1, {"val_loss": 9.0})
    monkeypatch.undo()
    checkpoints.tidy()  # what was left of that is no part of a step
    assert checkpoints.verify(1)["figures"] == whole
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00000001", "00000002"]


def test_steps_of_nine_digits(tmp_path):
    checkpoints = CheckpointSaver(tmp_path, keep=2)
    save_all(checkpoints, [99_999_998, 99_999_999, 100_000_000])
    assert checkpoints.steps() == [99_999_999, 100_000_000]
    checkpoints.quarantine(100_000_000, "a test")
    assert [step for _, step in checkpoints.aside()] == [100_000_000]


def test_an_accelerator_does_not_hold_the_state_twice(tmp_path, monkeypatch):
    checkpoints = CheckpointSaver(tmp_path)
    made = make_state(5)
    with monkeypatch.context() as patched:
        patched.setattr(jax, "default_backend", lambda: "gpu")
        held = host_copy.host_copy(made)
        assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(held))
        checkpoints.save(made, {})
        checkpoints.wait()
    back = checkpoints.restore(5, abstract(made))
    assert_same(back, made)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(back))
    assert_same(checkpoints.restore_params(5, abstract(made.params)), made.params)
