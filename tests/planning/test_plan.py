"""What a run will need, as the command says it: closed forms, advice that holds, no data read."""

import json

import pytest

from sheepop_jax import __main__ as tools
from sheepop_jax.data.preprocess.train_tokenizer import train_char
from sheepop_jax.planning.plan import USABLE
from sheepop_jax.runtime import devices

GPT2 = ["plan", "--config", "configs/gpt2_124m.py", "--config.data.path=/no/such/text"]
# 12 layers of 768, V 50304 tied, no biases: table, matrices, norms (docs/math.md, section 8).
COUNT = 50304 * 768 + 12 * (4 * 768**2 + 2 * 768 * 3072 + 4 * 768) + 2 * 768


@pytest.fixture(autouse=True)
def in_the_repository(request, monkeypatch):
    monkeypatch.chdir(request.config.rootpath)


def planned(capsys, *words):
    assert tools.main([*GPT2, "--json", *words]) == 0
    return json.loads(capsys.readouterr().out)


def test_closed_forms_on_one_device(capsys):
    found = planned(capsys, "--device", "H100", "--mfu", "0.5")
    assert found["parameters"] == COUNT
    assert found["memory"]["parameters"] == 4 * COUNT
    # Two moments, the norms of 128 updates, and the counts of three transformations.
    assert 0 <= found["memory"]["optimizer"] - 8 * COUNT - 4 * 128 <= 4 * 4
    assert found["tokens"] == 32 * 16 * 1024
    assert found["flops"] == found["tokens"] * (6 * COUNT + 12 * 12 * 1024 * 768)
    assert found["seconds"] == pytest.approx(found["flops"] / (0.5 * 989e12), rel=1e-12)
    assert (
        found["devices"] == 1
        and found["fits"]
        and found["sent"] == {"data": 0, "fsdp": 0, "tensor": 0}
    )
    parts = ("parameters", "optimizer", "gradients", "activations", "loss", "batch")
    total = sum(found["memory"][part] for part in parts)
    assert found["memory"]["total"] == pytest.approx(total, rel=1e-12)


def test_devices_that_are_not_here_share_the_state(capsys):
    mesh = ("--config.mesh.fsdp=4", "--config.mesh.tensor=2", "--config.model.num_heads=12")
    found = planned(capsys, "--device", "TPU v5p", "--devices", "64", *mesh)
    assert found["mesh"] == {"data": 8, "fsdp": 4, "tensor": 2}
    assert found["peak_flops"] == 64 * 459e12 and found["device_memory"] == 95e9
    # Matrices by fsdp x tensor, LayerNorm's vectors by fsdp alone.
    vectors = (12 * 4 + 2) * 768
    assert found["memory"]["parameters"] == 4 * ((COUNT - vectors) / 8 + vectors / 4)


def test_the_vocabulary_is_the_configurations_unless_given(capsys, tmp_path):
    found = planned(capsys, "--device", "H100", "--vocab_size", "1000")
    assert found["parameters"] == COUNT - (50304 - 1024) * 768
    found = planned(capsys, "--device", "H100", "--config.data.tokenizer=char")
    assert found["parameters"] == COUNT - (50304 - 256) * 768
    (tmp_path / "tokenizer.json").write_text(train_char(["abc"]).to_json())
    given = f"--config.data.tokenizer={tmp_path}/tokenizer.json"
    found = planned(capsys, "--device", "H100", given)
    assert found["parameters"] == COUNT - (50304 - 128) * 768


def test_a_device_of_any_name(capsys):
    words = ("--device", "my card", "--devices", "2", "--device_memory", "12e9")
    found = planned(capsys, *words, "--device_flops", "100e12")
    assert (found["device_memory"], found["peak_flops"]) == (12e9, 200e12)
    assert found["seconds"] == pytest.approx(found["flops"] / (0.4 * 200e12), rel=1e-12)
    assert planned(capsys, *words)["seconds"] is None  # its memory alone
    assert planned(capsys, "--device", "H100", "--device_memory", "96e9")["peak_flops"] == 989e12


def test_a_device_may_be_written_small(capsys):
    large, small = (planned(capsys, "--device", kind) for kind in ("TPU v5p", "tpu V5P"))
    assert small == large


def test_advice_holds_when_it_is_followed(capsys):
    large = ("--device", "H100", "--devices", "8", "--config.train.batch_size=4096")
    found = planned(capsys, *large)
    limit = USABLE * found["device_memory"]
    assert found["fits"] is False and found["memory"]["total"] > limit
    assert len(found["advice"]) >= 3
    said = " ".join(advice["flags"] for advice in found["advice"])
    for field in ("model.remat=", "train.batch_size=", "train.grad_accum_steps=", "mesh.fsdp="):
        assert f"--config.{field}" in said
    assert any(advice["fits"] for advice in found["advice"])
    for advice in found["advice"]:
        changed = planned(capsys, *large, *advice["flags"].split())
        assert changed["memory"]["total"] == advice["total"] < found["memory"]["total"]
        assert changed["fits"] is advice["fits"] is (advice["total"] <= limit)
        assert changed["tokens"] == found["tokens"]


def test_as_a_person_reads_it(capsys):
    assert tools.main([*GPT2, "--device", "H100", "--devices", "8"]) == 0
    said = capsys.readouterr().out
    for words in (
        "123.6M parameters on 8 x H100 (data 8 x fsdp 1 x tensor 1)",
        "vocabulary of 50,257",
        "optimizer state, fp32",
        "of 80 GB: fits",
        "524,288 tokens",
        "at 40% MFU, of",
        "over the mesh's data axis",
    ):
        assert words in said
    assert tools.main([*GPT2, "--device", "T4"]) == 0
    said = capsys.readouterr().out
    assert "attention by xla" in said  # cuDNN has none for a T4
    assert "DOES NOT FIT" in said and "--config.train.batch_size=8 --config.train.grad_acc" in said
    assert tools.main([*GPT2, "--device", "cpu"]) == 0
    assert "time unknown" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--device", "X100"], "--device: got 'X100'; expected cpu or one of GH200, H200"),
        (
            ["--device", "my card", "--device_flops", "1e12"],
            "try --device_memory and --device_flops",
        ),
        (["--device", "x", "--device_memory", "-1"], "--device_memory: got -1.0"),
        (["--device", "x", "--device_memory", "nan"], "--device_memory: got nan"),
        (
            ["--device_memory", "12e9"],
            "--device_memory: got 12000000000.0; expected no value unless",
        ),
        (["--device", "H100", "--devices", "0"], "--devices: got 0"),
        (["--device", "H100", "--devices", "5"], "train.batch_size: got 32"),
        (["--device", "H100", "--config.mesh.data=3"], "mesh: got"),
        (["--device", "H100", "--vocab_size", "-1"], "--vocab_size: got -1"),
        (["--device", "H100", "--mfu", "0"], "--mfu: got 0"),
        (["--device", "H100", "--mfu", "nan"], "--mfu: got nan"),
    ],
)
def test_bad_flags_are_one_line(capsys, words, said):
    with pytest.raises(SystemExit) as stopped:
        tools.main([*GPT2, *words])
    assert stopped.value.code == 2
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.count("\n") == 1
    assert said in shown.err


def test_known_devices():
    names = [name for name, _, _ in devices.DEVICES]
    for i, name in enumerate(names):
        assert not [earlier for earlier in names[:i] if earlier in name]
        peak, memory = devices.known_figures(f"NVIDIA {name} 80GB HBM3")
        assert (peak, memory) == devices.DEVICES[i][1:]
        assert 8e12 < peak < 1e16 and 8e9 <= memory < 400e9
    assert devices.known_figures("NVIDIA GeForce RTX 4070 Ti SUPER") == (88e12, 16e9)
    assert devices.known_figures("NVIDIA GeForce RTX 4090 Laptop GPU") == (0, 0)
    assert not devices.hypothetical("RTX 2060", 1, 6e9).ampere
    assert devices.hypothetical("RTX 3060", 1).ampere
    machine = devices.hypothetical("TPU v5p", 4)
    assert (machine.platform, machine.peak_flops) == ("tpu", 4 * 459e12)
    assert machine.with_devices(6).peak_flops == 6 * 459e12
    assert devices.hypothetical("cpu", 2).peak_flops == 0
