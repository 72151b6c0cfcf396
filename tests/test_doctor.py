"""`doctor`: the facts of this machine on one screen, and advice that follows from them."""

import io
import json
from pathlib import Path

import jax
import pytest

from sheepop_jax.cli.main import main
from sheepop_jax.runtime import diagnosis, platform
from sheepop_jax.runtime.devices import Runtime, hypothetical


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, object]:
    """Set `machine["is"]` to a `Runtime`, or to the error that starting JAX raises."""
    found: dict[str, object] = {"is": Runtime("cpu", "cpu", 1, 0.0)}

    def prepare(wanted: str) -> object:
        if isinstance(found["is"], Exception):
            raise found["is"]
        return found["is"]

    monkeypatch.setattr(platform, "prepare", prepare)
    monkeypatch.setattr(platform, "has_nvidia_card", lambda: False)
    monkeypatch.setattr(diagnosis, "_memory_available", lambda: 64 * 10**9)
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    (tmp_path / "program").write_bytes(bytes(1234))
    yield found
    jax.config.update("jax_compilation_cache_dir", before)


def test_json_has_the_facts(
    machine: dict[str, object], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    machine["is"] = hypothetical("H100", 2)
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["versions"]["jax"] == jax.__version__
    assert (found["platform"], found["devices"]) == ("cuda", "2 x H100")
    assert found["peak_flops"] == 2 * 989e12 and found["device_memory"] == 80e9
    assert found["bf16"] is True and found["flash_attention"] is True
    assert (found["compile_cache"], found["compile_cache_bytes"]) == (str(tmp_path), 1234)
    assert found["cpu_count"] >= 1 and found["disk_free"] > 0


def test_it_is_one_screen(machine: dict[str, object], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert len(shown.splitlines()) <= 24
    for name in ("versions", "platform", "bfloat16", "numbers", "compile cache", "free disk"):
        assert f"\n{name}" in f"\n{shown}"


def test_wrong_numbers_are_an_exit_code(
    machine: dict[str, object], capsys: pytest.CaptureFixture[str]
) -> None:
    machine["is"] = RuntimeError("a sum is off by 2.5")
    assert main(["doctor"]) == 1
    assert "off by 2.5" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("runtime", "fields", "word"),
    [
        (Runtime("cpu", "cpu", 1, 0.0), {}, "quickstart"),
        (hypothetical("T4", 1), {}, "bfloat16"),
        (Runtime("cuda", "RTX 9999", 1, 0.0), {}, "MFU"),
        (hypothetical("H100", 1), {"cache": ""}, "compile cache"),
        (hypothetical("H100", 1), {"memory": 10**9}, "train.batch_size"),
        (hypothetical("H100", 1), {"disk": 10**9}, "checkpoint.keep"),
    ],
)
def test_each_piece_of_advice_has_its_cause(
    runtime: Runtime, fields: dict[str, object], word: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(platform, "USER_ENVIRONMENT", {})
    good = {"numbers": "right", "cache": "somewhere", "memory": 64 * 10**9, "disk": 10**12}
    advice = diagnosis._advice(runtime, **(good | fields))
    assert [word in line for line in advice] == [True]
    assert diagnosis._advice(hypothetical("H100", 1), **good) == []


def test_free_memory_is_what_programs_can_get(monkeypatch: pytest.MonkeyPatch) -> None:
    report = "MemTotal:       9 kB\nMemFree:        3 kB\nMemAvailable:   7 kB\n"
    monkeypatch.setattr(diagnosis.sys, "platform", "linux")
    monkeypatch.setattr(diagnosis, "open", lambda *a, **options: io.StringIO(report), raising=False)
    assert diagnosis._memory_available() == 7 * 1024
