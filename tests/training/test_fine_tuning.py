"""A run is fine-tuned on conversations: what is new in it, what the loss counts, and resuming."""

import json
import logging
import shutil

import jax
import numpy as np
import pytest

from sheepop_jax import pipeline
from sheepop_jax.checkpoint.origin import grow_table, sha256_of_params
from sheepop_jax.checkpoint.run import open_run
from sheepop_jax.config.loading import load_config
from sheepop_jax.data.chat import ChatEncoder, with_chat_template
from sheepop_jax.errors import InputError
from sheepop_jax.model.transformer import output_embedding
from sheepop_jax.training import loop
from tests.tiny import MACHINE, TINY, one_device

pytestmark = pytest.mark.usefixtures("fast_compile")

STEPS = 4


def conversation(number):
    turns = [("user", f"line {number}"), ("assistant", f"says {number * number}")]
    return {"messages": [{"role": role, "content": text} for role, text in turns]}


@pytest.fixture(scope="module")
def root(tiny_root, tmp_path_factory):
    """A base run, and conversations that its characters write."""
    root = tmp_path_factory.mktemp("chat")
    shutil.copytree(tiny_root / "run", root / "base")
    rows = "".join(json.dumps(conversation(number)) + "\n" for number in range(60))
    (root / "rows.jsonl").write_text(rows)
    return root


@pytest.fixture(scope="module")
def words(root):
    """`words(*more)`: overrides of `chat` for a run that starts from the base."""
    fields = {
        **{n: v for n, v in TINY.items() if not n.startswith("model.") and n != "data.tokenizer"},
        "data.path": str(root / "rows.jsonl"),
        "data.seq_len": 31,
        "data.cache_dir": str(root / "cache"),
        "optimizer.learning_rate": 0.01,
        "train.init_from": str(root / "base"),
        "train.num_epochs": 0,
        "train.log_every": 1,
        "train.sample_prompt": "line 7",
        "train.sample_tokens": 3,
    }

    def make(*more):
        named = {word.partition("=")[0] for word in more}
        return [f"{name}={value}" for name, value in fields.items() if name not in named] + [*more]

    return make


@pytest.fixture(scope="module")
def trained(root, words):
    """The run after its last step, and the jobs that trained it."""
    jobs, fit = [], pipeline.fit
    with one_device(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "fit", lambda job, stop: jobs.append(job) or fit(job, stop))
        pipeline.train(load_config("chat", words()), root / "whole", MACHINE)
    return open_run(root / "whole"), jobs[0]


def test_the_tokenizer_has_the_template_and_its_tokens(root, trained):
    base, (run, _) = open_run(root / "base"), trained
    assert run.vocab_size == base.vocab_size + 4 == run.tokenizer.vocab_size
    assert run.tokenizer.fingerprint == with_chat_template(base.tokenizer, "sheepop").fingerprint
    end = run.tokenizer.token_text(run.tokenizer.end_ids[1])
    assert (len(run.tokenizer.end_ids), end) == (2, "<|end|>")


def test_batches_count_the_assistants_tokens(trained):
    run, job = trained
    encoder = ChatEncoder(run.tokenizer)
    known = [encoder.examples([conversation(n)["messages"]])[0] for n in range(60)]
    known = {tuple(example.ids.tolist()): example for example in known}
    seen = 0
    for step in range(STEPS):
        batch = job.batches.batch_at(step)
        for inputs, targets, weights, segments in zip(*(array[0] for array in batch), strict=True):
            ids, position = [*inputs.tolist(), int(targets[-1])], 0
            while tuple(ids[position:]) and ids[position] != 0:  # 0 pads, as no conversation has
                found = next(n for n in known if ids[position : position + len(n)] == [*n])
                stop = position + len(found)
                counted = known[found].marks & 1
                assert weights[max(position - 1, 0) : stop - 1].tolist() == (
                    counted.tolist() if position else counted[1:].tolist()
                )
                assert len(set(segments[position:stop].tolist())) == 1
                assert position == 0 or segments[position] == segments[position - 1] + 1
                position, seen = stop, seen + 1
            assert not weights[max(position - 1, 0) :].any()
    assert seen > 8 * STEPS  # several in most windows


def test_a_run_that_is_resumed_is_the_same_bit_by_bit(root, words, trained, caplog):
    run, _ = trained
    halves = shutil.copytree(run.directory, root / "halves")
    shutil.rmtree(halves / "checkpoints/00000004")
    caplog.set_level(logging.INFO)
    with one_device():
        pipeline.train(load_config("chat", words(), halves), halves, MACHINE)
    assert "resuming from step 2" in caplog.messages
    params = [sha256_of_params(found.params(4)[0]) for found in (run, open_run(halves))]
    assert params[0] == params[1] != sha256_of_params(run.params(2)[0])


def test_a_changed_loss_or_template_is_other_data(root, words, trained):
    for word, field in (
        ("data.chat_loss=all", "data.chat_loss"),
        ("data.chat_template=chatml", "data.chat_template"),
    ):
        with pytest.raises(InputError) as error:
            config = load_config("chat", words(word), root / "whole")
            pipeline.train(config, root / "whole", MACHINE)
        assert error.value.field == str(root / "whole") and field in str(error.value.got)


def test_samples_are_conversations(root, words, trained):
    run, job = trained
    params, _ = run.params()
    assert job.sample(params).startswith("<|user|>line 7<|end|><|assistant|>")
    with pytest.raises(InputError, match="fewer than 32 tokens"):
        config = load_config("chat", words(f"train.sample_prompt={'line ' * 7}"))
        pipeline.train(config, root / "new", MACHINE)
    assert not (root / "new").exists()


MESH = ["mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2"]


def test_new_tokens_start_at_the_mean_and_the_rest_is_the_runs(root, words, monkeypatch):
    loops = []
    monkeypatch.setattr(loop._Loop, "run", lambda self: loops.append(self) or {})
    base = open_run(root / "base")
    params, _ = base.params()
    known = base.tokenizer.vocab_size
    pipeline.train(load_config("chat", words(*MESH)), root / "grown", MACHINE)
    grown = loops[0].state.params
    table, before = np.asarray(output_embedding(grown)), np.asarray(params["embedding"])
    mean = before[:known].mean(axis=0)
    np.testing.assert_allclose(table[known : known + 4], np.tile(mean, (4, 1)), rtol=1e-5)
    np.testing.assert_array_equal(table[:known], before[:known])
    np.testing.assert_array_equal(table[known + 4 :], before[known + 4 :])
    others = [{k: v for k, v in tree.items() if k != "embedding"} for tree in (grown, params)]
    jax.tree.map(np.testing.assert_array_equal, *others)


def test_a_table_grows_beyond_its_padding():
    table = np.random.default_rng(0).normal(size=(128, 3)).astype(np.float32)
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    target = jax.ShapeDtypeStruct((256, 3), np.float32, sharding=here)
    grown = np.asarray(grow_table(table, target, 127, 131))
    np.testing.assert_array_equal(grown[:127], table[:127])
    np.testing.assert_allclose(grown[127:131], np.tile(table[:127].mean(axis=0), (4, 1)), rtol=1e-5)
    assert not grown[131:].any()
