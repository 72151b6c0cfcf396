"""The parameters that a run's adapters adapt: those of another run, recognised by their hash."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from sheepop_jax.checkpoint import storage
from sheepop_jax.checkpoint.checkpoints import Checkpoints, DamagedCheckpoint
from sheepop_jax.checkpoint.run import Run
from sheepop_jax.errors import InputError
from sheepop_jax.model.lora import init_trained, merged
from sheepop_jax.model.transformer import Transformer, init_params


@dataclass(frozen=True)
class FrozenParams:
    """Where a run found the parameters that it adapts.

    Attributes:
        adapters: the run with the adapters.
        path: the run with the parameters.
        step: its checkpoint.
        sha256: of the parameters (`sha256_of_params`).
    """

    adapters: Path
    path: Path
    step: int
    sha256: str

    @classmethod
    def of(cls, run: Run) -> "FrozenParams":
        """Those that the `config.json` of a run with adapters records.

        Raises:
            InputError: it records none.
        """
        try:
            origin = run.origin
            path, step, sha256 = Path(origin["path"]), int(origin["step"]), str(origin["sha256"])
        except (KeyError, TypeError, ValueError) as error:
            got = f"{type(error).__name__}: {error}"
            expected = "the path, step and sha256 of the parameters that the run adapts"
            raise InputError(f"{run.directory / 'config.json'}: init_from", got, expected) from None
        return cls(run.directory, path, step, sha256)

    def check(self, model: Transformer) -> None:
        """Checks the files of the parameters; loads nothing.

        Raises:
            InputError: they are missing, damaged or those of another model.
        """
        target = jax.eval_shape(lambda: init_params(model, 0))
        try:
            self._checkpoints().check_params(self.step, target)
        except DamagedCheckpoint as damage:
            raise self._refused(f"a damaged step {self.step} ({damage})") from None

    def load(self, target: Any) -> Any:
        """Loads the parameters. With several processes, all must call this.

        Args:
            target: abstract parameters with shardings.

        Raises:
            InputError: they are missing, damaged or not those that were adapted.
        """
        try:
            params = self._checkpoints().restore_params(self.step, target)
        except DamagedCheckpoint as damage:
            raise self._refused(f"a damaged step {self.step} ({damage})") from None
        found = sha256_of_params(params)
        if found != self.sha256:
            raise self._refused(f"parameters of SHA-256 {found}")
        return params

    def _checkpoints(self) -> Checkpoints:
        checkpoints = Checkpoints(self.path / "checkpoints")
        if not self.path.is_dir():
            raise self._refused("no directory")
        if self.step not in checkpoints.steps():
            raise self._refused(f"no step {self.step}")
        return checkpoints

    def _refused(self, got: str) -> InputError:
        expected = f"step {self.step}, SHA-256 {self.sha256}, which {self.adapters} adapts"
        return InputError(str(self.path), got, expected, "putting that run back, or a link to it")


def adapters_of(run: Run, step: str | int | None) -> tuple[Any, int]:
    """The adapters of a run with adapters, and their step; arguments and errors as `Run.params`."""
    model = run.model().clone(lora=run.config.train.lora)
    return run.load(step, jax.eval_shape(lambda: init_trained(model, 0)))


def merged_params(run: Run, step: str | int | None) -> tuple[Any, int]:
    """The parameters of a run with adapters, merged, and their step; see `Run.params`."""
    lora = run.config.train.lora
    if lora is None:
        raise ValueError(f"{run.directory} has no adapters")
    adapters, found = adapters_of(run, step)
    target = jax.eval_shape(lambda: init_params(run.model(), 0))
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    target = jax.tree.map(lambda leaf: leaf.update(sharding=here), target)
    return merged(FrozenParams.of(run).load(target), adapters, lora), found


def sha256_of_params(params: Any) -> str:
    """The hexadecimal SHA-256 of parameters, the same on any mesh.

    In the order of their names, a line `NAME DTYPE[SHAPE]` and the row-major bytes of each. With
    several processes, all must call this.
    """
    digest = hashlib.sha256()
    leaves = jax.tree_util.tree_leaves_with_path(params)
    for name, leaf in sorted((storage.name_of(path), leaf) for path, leaf in leaves):
        array = _on_host(leaf)
        digest.update(f"{name} {array.dtype.name}{json.dumps(array.shape)}\n".encode())
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
    return digest.hexdigest()


def _on_host(leaf: Any) -> np.ndarray[Any, Any]:
    if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable:
        return np.asarray(leaf)
    from jax.experimental import multihost_utils  # lazy: only for several processes

    return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))
