"""The inference benchmark: what it counts, what it refuses, what it writes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from sheepop_jax.cli import bench
from sheepop_jax.errors import InputError
from sheepop_jax.generation import benchmark, benchmark_report
from sheepop_jax.model.transformer import Transformer

pytestmark = pytest.mark.usefixtures("fast_compile")


@pytest.fixture(scope="module")
def model_and_params(
    make_config: Callable[..., Any], random_params: Callable[..., Any]
) -> tuple[Transformer, Any]:
    model = Transformer(make_config({"model.num_layers": 1}).model, 307)
    return model, random_params(model)


@pytest.fixture(scope="module")
def rows(model_and_params: tuple[Transformer, Any]) -> list[benchmark.Row]:
    config = benchmark.BenchmarkConfig([3, 11], [2], new_tokens=5, repeats=2)
    return benchmark.benchmark(*model_and_params, config)


def test_rows(model_and_params: tuple[Transformer, Any], rows: list[benchmark.Row]) -> None:
    """Every case with the cache and without; both write the same tokens, and as many."""
    cases = [(row.prompt_length, row.batch_size, row.cached) for row in rows]
    assert cases == [(p, 2, c) for p in (3, 11) for c in (True, False)]
    weights = sum(np.size(leaf) * 4 for leaf in _leaves(model_and_params[1]))
    for row in rows:
        assert row.new_tokens == 5
        assert row.agreement == 1.0
        assert row.tokens_per_second * row.seconds == pytest.approx(5 * row.batch_size)
        assert row.first_token_seconds > 0
        assert weights < row.peak_bytes < 10 * weights


def _leaves(tree: Any) -> list[Any]:
    return [x for v in tree.values() for x in _leaves(v)] if isinstance(tree, dict) else [tree]


def test_tokens_of_the_slow_way_are_greedy(model_and_params: tuple[Transformer, Any]) -> None:
    """Against a loop of full forward passes: agreement alone could be of two wrong texts."""
    model, params = model_and_params
    prompts = np.array([[3, 5, 7], [11, 13, 17]], np.int32)
    program = benchmark._uncached(model, params, prompts, 4)
    forward = jax.jit(lambda tokens: model.apply({"params": params}, tokens)[0])
    tokens = np.pad(prompts, ((0, 0), (0, 4)))
    for slot in range(3, 7):
        logits = np.asarray(forward(tokens))[:, slot - 1] @ np.asarray(params["embedding"]).T
        tokens[:, slot] = logits[:, :307].argmax(-1)
    assert np.asarray(program.write(False)).tolist() == tokens[:, 3:].tolist()
    first = np.asarray(program.write(True))
    assert first[:, 0].tolist() == tokens[:, 3].tolist() and not first[:, 1:].any()


@pytest.mark.parametrize(
    ("change", "field", "got"),
    [
        ({"prompt_lengths": [0]}, "prompt_lengths", [0]),
        ({"batch_sizes": []}, "batch_sizes", []),
        ({"new_tokens": 0}, "new_tokens", [0]),
        ({"repeats": 0}, "repeats", [0]),
        ({"prompt_lengths": [3, 27]}, "max_new_tokens", 5),
    ],
)
def test_bad_settings(
    model_and_params: tuple[Transformer, Any], change: dict[str, Any], field: str, got: Any
) -> None:
    """Refused before anything is compiled."""
    settings = {"prompt_lengths": [3], "batch_sizes": [1], "new_tokens": 5, "repeats": 1}
    with pytest.raises(InputError) as error:
        config = benchmark.BenchmarkConfig(**{**settings, **change})
        benchmark.benchmark(*model_and_params, config)
    assert (error.value.field, error.value.got) == (field, got)


def test_report(rows: list[benchmark.Row], tmp_path: Path) -> None:
    table = benchmark_report.format_table(rows)
    lines = [line.split("|") for line in table.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + len(rows)
    assert len({len(line) for line in lines}) == 1
    ratio = rows[0].tokens_per_second / rows[1].tokens_per_second
    assert float(lines[2][6]) == pytest.approx(ratio, abs=0.006)
    assert float(lines[3][6]) == 1

    data, plot = benchmark_report.write_results(rows, tmp_path / "made" / "bench", {"run": "x"})
    content = json.loads(data.read_text())
    assert content["run"] == "x" and content["memory"]
    assert [benchmark.Row(**row) for row in content["rows"]] == rows
    assert plot.read_bytes().startswith(b"\x89PNG")

    before = data.read_bytes()
    benchmark_report.check_writable(data.parent)
    assert {path.name for path in data.parent.iterdir()} == {data.name, plot.name}
    assert data.read_bytes() == before
    plot.unlink()
    plot.mkdir()
    with pytest.raises(InputError) as error:
        benchmark_report.check_writable(data.parent)
    assert error.value.field == "out"

    (tmp_path / "file").write_text("")
    with pytest.raises(InputError) as error:
        benchmark_report.write_results(rows, tmp_path / "file" / "bench", {})
    assert error.value.field == "out"


@pytest.mark.parametrize(
    ("given", "context", "used"),
    [
        ((None, None), 128, ([16, 64], 64)),
        ((None, None), 4096, ([16, 64], 64)),
        ((None, None), 32, ([16], 16)),
        ((None, None), 8, ([4], 4)),
        ((None, None), 2, ([1], 1)),
        (([20], None), 32, ([20], 12)),
        ((None, 30), 32, ([2], 30)),
        (([40], 7), 32, ([40], 7)),  # refused later
    ],
)
def test_defaults_fit_in_the_context(given: Any, context: int, used: Any) -> None:
    assert bench.sizes(*given, context) == used


def test_bench_works_with_its_defaults_on_a_short_context(
    tiny_root: Path, tmp_path: Path, run_program: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measure(model: Any, params: Any, config: Any, report: Any) -> list[Any]:
        assert (config.prompt_lengths, config.new_tokens) == ([16], 16)
        assert (tmp_path / "out").is_dir()  # checked before measuring
        return [benchmark.Row(16, 1, 16, cached, 1, 1, 16, 1, 1) for cached in (True, False)]

    monkeypatch.setattr(benchmark, "benchmark", measure)
    words = ["bench", "--ckpt", str(tiny_root / "run"), "--out", str(tmp_path / "out")]
    code, out, err, _ = run_program("tools", words)
    assert code == 0 and "| 16 | 1 | 16 |" in out, err
    assert (tmp_path / "out" / "inference.png").exists()
