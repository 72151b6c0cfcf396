"""Sample text for the training log, continuing `train.sample_prompt` or validation text."""

from dataclasses import dataclass
from typing import Any

from sheepop_jax.config.schema import Config
from sheepop_jax.data.tokenizer import Tokenizer
from sheepop_jax.errors import InputError
from sheepop_jax.generation.engine import generate
from sheepop_jax.generation.requests import GenerationConfig, SamplingConfig
from sheepop_jax.model.transformer import Transformer

PROMPT_TOKENS = 16  # of validation text


@dataclass(frozen=True)
class Preview:
    """Continues one prompt with the current parameters.

    Attributes:
        model: the model in training.
        tokenizer: its tokenizer.
        prompt: text to continue.
        prompt_tokens: token ids of the prompt.
        config: generation settings; the seed is the run's, so all previews use the same keys.
    """

    model: Transformer
    tokenizer: Tokenizer
    prompt: str
    prompt_tokens: list[int]
    config: GenerationConfig

    @classmethod
    def of(
        cls, config: Config, model: Transformer, tokenizer: Tokenizer, validation: list[int]
    ) -> "Preview":
        """Builds a preview from `train.sample_prompt` and `train.sample_tokens`.

        Without a prompt, the preview continues the beginning of the validation text, of which
        `validation` holds the first `PROMPT_TOKENS`.
        """
        train = config.train
        prompt, ids = train.sample_prompt, tokenizer.encode_prompt(train.sample_prompt)
        if not prompt:
            start = validation[: config.model.max_seq_len // 2]
            end = tokenizer.end_of_text
            ids = start[: start.index(end)] if end in start else start
            ids, prompt = [*tokenizer.prompt_start, *ids], tokenizer.decode(ids)
        return cls.continuing(config, model, tokenizer, ids, prompt)

    @classmethod
    def continuing(
        cls, config: Config, model: Transformer, tokenizer: Tokenizer, ids: list[int], prompt: str
    ) -> "Preview":
        """Builds a preview that continues `ids`, shown as `prompt`."""
        train = config.train
        room = config.model.max_seq_len - max(len(ids), 1)
        generation = GenerationConfig(
            sampling=SamplingConfig(temperature=0.8, top_k=50),
            max_new_tokens=min(train.sample_tokens, room),
            seed=config.seed,
        )
        return cls(model, tokenizer, prompt, ids, generation)

    @staticmethod
    def check(config: Config, tokenizer: Tokenizer) -> None:
        """Validates the prompt.

        Raises:
            InputError: `train.sample_prompt` cannot be encoded or fills the context.
        """
        prompt = config.train.sample_prompt
        tokenizer.check(prompt, "train.sample_prompt")
        Preview.check_length(config, len(tokenizer.encode_prompt(prompt)))

    @staticmethod
    def check_length(config: Config, length: int) -> None:
        """Validates the length of a prompt in tokens; raises as `check`."""
        context = config.model.max_seq_len
        length = max(length, 1)  # empty: starts from end-of-text
        if length >= context:
            expected = f"fewer than {context} tokens (model.max_seq_len)"
            hint = "a shorter prompt or `train.sample_tokens=0`"
            raise InputError("train.sample_prompt", f"{length} tokens", expected, hint)

    def __call__(self, params: Any) -> str:
        """Returns the prompt and its continuation, or "none (reason)" if logits are not finite."""
        try:
            [completion] = generate(
                self.model, params, [self.prompt_tokens], self.tokenizer.end_ids, self.config
            )
        except InputError as error:  # do not abort training
            return f"none ({error})"
        return self.prompt + self.tokenizer.decode_after(self.prompt_tokens, completion.tokens)
