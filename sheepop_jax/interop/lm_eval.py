"""A run as a model of lm-evaluation-harness (EleutherAI), the optional package `lm-eval`.

`Adapter` computes what the harness asks for and works without it; `evaluate_tasks` runs the
harness.
"""

import importlib.util
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sheepop_jax.data.tokenizer import Tokenizer
from sheepop_jax.errors import InputError
from sheepop_jax.generation.engine import generate
from sheepop_jax.generation.requests import GenerationConfig, SamplingConfig
from sheepop_jax.model.transformer import Transformer
from sheepop_jax.scoring import continuation_log_likelihoods, score

log = logging.getLogger(__name__)

_NEW_TOKENS = 256  # of a task that sets no limit, as for the harness's own models
_SETTINGS = frozenset({"until", "max_gen_toks", "do_sample", "temperature", "top_k", "top_p"})


@dataclass(frozen=True)
class Adapter:
    """Answers the requests of the harness.

    Attributes:
        model: the model, with the dtype to compute in.
        params: its parameters, fp32 or quantized.
        tokenizer: its tokenizer.
        context: maximum positions of a row.
        batch_size: rows per batch.
    """

    model: Transformer
    params: Any
    tokenizer: Tokenizer
    context: int
    batch_size: int

    def log_likelihoods(
        self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]
    ) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation, and whether greedy decoding would write it.

        Args:
            pairs: token ids of (context, continuation). The context begins with BOS, if the
                tokenizer has one; one that is empty otherwise is end-of-text.
        """
        bos = self.tokenizer.prompt_start
        begun = [
            (before if list(before[:1]) == bos else [*bos, *before], after)
            for before, after in pairs
        ]
        return continuation_log_likelihoods(
            self.model,
            self.params,
            [(before or self._start, after) for before, after in begun],
            context=self.context,
            batch_size=self.batch_size,
        )

    @property
    def _start(self) -> list[int]:
        """What stands before a text."""
        return self.tokenizer.prompt_start or [self.tokenizer.end_of_text]

    def rolling_log_likelihoods(self, texts: Sequence[str]) -> list[float]:
        """Log-likelihood of each text after BOS or end-of-text, in windows of the whole context."""
        begun = [[*self._start, *ids] for ids in self.tokenizer.encode_batch(list(texts))]
        scores = score(
            self.model, self.params, begun, context=self.context, batch_size=self.batch_size
        )
        return [math.fsum(scored.logprobs[1:]) for scored in scores]

    def continuations(self, requests: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str]:
        """Continues each text, up to the first of its stop strings.

        Prompts that are too long lose tokens at the start.

        Args:
            requests: (text, settings) as in the harness's `generation_kwargs`: `until`,
                `max_gen_toks`, `do_sample`, `temperature`, `top_k`, `top_p`.

        Raises:
            InputError: another setting, or a value out of range.
        """
        prompts = self.tokenizer.encode_batch([text for text, _ in requests])
        groups: dict[tuple[SamplingConfig, int], list[int]] = {}
        for i, (_, settings) in enumerate(requests):
            groups.setdefault(self._settings(settings), []).append(i)
        found, shortened = [""] * len(requests), 0
        for (sampling, limit), members in groups.items():
            members.sort(key=lambda i: -len(prompts[i]))  # rows of similar length share a batch
            for start in range(0, len(members), self.batch_size):
                chosen = members[start : start + self.batch_size]
                bos = self.tokenizer.prompt_start
                room = self.context - limit - len(bos)
                kept = [[*bos, *prompts[i][max(0, len(prompts[i]) - room) :]] for i in chosen]
                shortened += sum(len(prompts[i]) > room for i in chosen)
                config = GenerationConfig(sampling, limit, context=self.context)
                end = self.tokenizer.end_ids
                written = generate(self.model, self.params, kept, end, config)
                for i, prompt, completion in zip(chosen, kept, written, strict=True):
                    text = self.tokenizer.decode_after(prompt, completion.tokens)
                    found[i] = _until(text, requests[i][1].get("until"))
        if shortened:
            log.warning(
                "lm_eval: %d of %d prompts exceed the context; their beginning was dropped",
                *(shortened, len(requests)),
            )
        return found

    def _settings(self, settings: Mapping[str, Any]) -> tuple[SamplingConfig, int]:
        """Sampling settings and the number of new tokens, which leaves room for a prompt."""
        if unknown := sorted(set(settings) - _SETTINGS):
            rule = "only " + ", ".join(sorted(_SETTINGS))
            raise InputError("generation_kwargs", ", ".join(unknown), rule)
        temperature = float(settings.get("temperature", 0.0))
        if not settings.get("do_sample", temperature > 0):
            sampling = SamplingConfig(temperature=0.0)
        else:
            top_k, top_p = int(settings.get("top_k", 0)), float(settings.get("top_p", 1.0))
            sampling = SamplingConfig(temperature or 1.0, top_k, top_p)
        most = max(1, self.context - 1 - len(self.tokenizer.prompt_start))
        if (wanted := settings.get("max_gen_toks")) is None:
            wanted = min(_NEW_TOKENS, self.context // 2)  # keeps half for the prompt
        return sampling, max(1, min(int(wanted), most))


def _until(text: str, stops: str | Sequence[str] | None) -> str:
    """The text before the first stop string."""
    for stop in [stops] if isinstance(stops, str) else stops or []:
        if stop:
            text = text.partition(stop)[0]
    return text


def check_installed(tasks: str) -> None:
    """Checks that the harness is installed.

    Raises:
        InputError: it is not, or no task is named.
    """
    if not tasks.replace(",", "").strip():
        raise InputError("lm_eval", tasks, "at least one task")
    if importlib.util.find_spec("lm_eval") is None:
        rule = "the Python package lm-eval to be installed"
        raise InputError("lm_eval", tasks, rule, "'pip install lm-eval'")


def evaluate_tasks(
    adapter: Adapter, tasks: str, include_path: str | Path | None = None
) -> tuple[dict[str, Any], str]:
    """Runs tasks of the harness.

    Args:
        adapter: the run.
        tasks: names separated by commas; `*` matches any characters.
        include_path: directory of more task files.

    Returns:
        Task → metrics, and the harness's table.

    Raises:
        InputError: the harness is not installed, or a task is unknown.
    """
    check_installed(tasks)
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import make_table

    manager = TaskManager(include_path=None if include_path is None else str(include_path))
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    found = manager.match_tasks(names)
    for name in names:
        if not manager.match_tasks([name]):
            rule = "a task of lm-evaluation-harness, or of a file in `include_path`"
            raise InputError("lm_eval", name, rule)
    results = simple_evaluate(
        model=harness_model(adapter), tasks=found, task_manager=manager, log_samples=False
    )
    return results["results"], make_table(results)


def harness_model(adapter: Adapter) -> Any:
    """The `TemplateLM` of the harness that answers by `adapter`."""
    from lm_eval.api.model import TemplateLM

    class SheepopLM(TemplateLM):  # a class of an optional package
        @property
        def eot_token_id(self) -> int:
            return adapter.tokenizer.end_of_text

        @property
        def prefix_token_id(self) -> int:
            return (adapter.tokenizer.prompt_start or [self.eot_token_id])[0]

        def tok_encode(self, string: str, add_special_tokens: Any = None, **_: Any) -> list[int]:
            return adapter.tokenizer.encode(string)

        def _loglikelihood_tokens(self, requests: Any, **_: Any) -> list[tuple[float, bool]]:
            return adapter.log_likelihoods([(before, after) for _, before, after in requests])

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
            return adapter.rolling_log_likelihoods([request.args[0] for request in requests])

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
            return adapter.continuations([request.args for request in requests])

    return SheepopLM()
