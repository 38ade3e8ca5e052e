"""The loop that generates: prompt in pieces, then token after token, text as soon as it is certain.

A loop of its own rather than transformers' `generate`: it can be stopped between any two tokens, ends at a stop string before the
string is seen, and times what it does. Greedy it gives the tokens that `generate` gives.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from threading import Lock
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from ..errors import InputError
from ..model.anatomy import longest_context, only_last_logits
from .sampling import Chooser, Sampling
from .text import Detokenizer, StopFilter

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Finish = Literal["stop", "length", "cancelled"]

# Tokens of a prompt in one forward pass: enough to keep matrix units busy, few enough that a long prompt can be stopped on its way.
PIECE = 512


class Engine:
    """A model in memory and its tokenizer. Any thread may encode; one at a time may generate.

    Attributes:
        model, tokenizer: as transformers loads them.
        context: tokens that prompt and generated text may have together, or None where the model sets no limit.
        ends: tokens that end a text.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: Any) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.context = longest_context(model.config)
        self.ends = _ends(model, tokenizer)
        self._rows = model.get_input_embeddings().weight.shape[0]
        self._tokenizing = Lock()  # tokenizers of transformers note options of a call in themselves

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, with those the tokenizer adds to any text. Raises `InputError`."""
        check_text(text)
        with self._tokenizing:
            ids = self.tokenizer(text, verbose=False)["input_ids"]
        if not ids:
            raise InputError(
                "the prompt is empty, and this model's tokenizer adds no token to begin with: give some text"
            )
        return self.check_ids(ids)

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Token ids of a conversation (`role`, `content`), ready for the assistant's answer. Raises `InputError`.

        Words in a message that look like the template's own marks are taken as text, so a message cannot pass for another one.
        """
        check_template(self.tokenizer)
        for message in messages:
            check_text(message["content"])
        with self._tokenizing:
            try:
                ids = self.tokenizer.apply_chat_template(
                    [dict(message) for message in messages],
                    add_generation_prompt=True,
                    sanitize_control_tokens=True,
                    return_dict=False,
                )
            except Exception as problem:  # templates are programs of the model's makers, and refuse in their own words
                raise InputError(f"the model's chat template refuses these messages: {problem}") from None
        return self.check_ids(ids)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, special tokens left out."""
        text = self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text

    def check_ids(self, ids: Sequence[int]) -> list[int]:
        """The same ids. Raises `InputError` where there is none, or one that the model's embedding has not."""
        if not ids:
            raise InputError("the prompt has no token: give at least one")
        for token in (min(ids), max(ids)):
            if not 0 <= token < self._rows:
                raise InputError(f"token {token} is not one of the {self._rows} the model's embedding has")
        return list(ids)

    def fit(self, prompt: int, asked: int | None, most: int) -> int:
        """Tokens to generate behind a prompt of `prompt` tokens: as asked, or `most`, or what the context leaves of it.

        Raises `InputError` where prompt and what is asked for do not fit.
        """
        if self.context is None:
            return most if asked is None else asked
        left = self.context - prompt
        if left < 1 or (asked or 0) > left:
            behind = f" and {asked} behind it do" if asked else " does"
            raise InputError(
                f"a prompt of {prompt} tokens{behind} not fit the {self.context} positions the model knows: shorten the prompt"
                + (" or ask for fewer tokens" if left > 0 else "")
            )
        return min(most, left) if asked is None else asked

    def generate(
        self, prompt: list[int], sampling: Sampling, tokens: int, stopped: Callable[[], bool] = lambda: False
    ) -> Generation:
        """A generation of at most `tokens` tokens, which begins when it is iterated over.

        Args:
            prompt: token ids, at least one.
            sampling: how; its `max_tokens` is not looked at.
            tokens: at least 1.
            stopped: asked between tokens whether to end here.
        """
        return Generation(self, prompt, sampling, tokens, stopped)

    @torch.inference_mode()
    def forward(self, ids: Sequence[int], cache: Any) -> tuple[Tensor, Any]:
        """Logits [vocabulary] behind the last of `ids`, which follow what is in `cache`; and the cache with them."""
        tensor = torch.tensor([ids], device=self.model.device)
        output = self.model(input_ids=tensor, past_key_values=cache, use_cache=True, **only_last_logits(self.model))
        return output.logits[0, -1], output.past_key_values


class Generation:
    """A text on its way: iterating over it, once, generates it and yields it piece by piece.

    Attributes:
        prompt_tokens: tokens of the prompt.
        tokens: tokens generated so far, the one that ends the text included.
        finish: `stop` (the model ended it, or a stop string came), `length`, `cancelled`; None before that.
        text: what was yielded so far.
        prefill_seconds: of the forward passes over the prompt.
        first_token_seconds: from the beginning to the first token.
        decode_seconds: of the tokens behind the first; the reader's time between them is not counted.
    """

    def __init__(
        self, engine: Engine, prompt: list[int], sampling: Sampling, tokens: int, stopped: Callable[[], bool]
    ) -> None:
        self._engine = engine
        self._prompt = prompt
        self._most = tokens
        self._stopped = stopped
        self._choose = Chooser(sampling, engine.model.device)
        self._detokenizer = Detokenizer(engine.decode, prompt)
        self._filter = StopFilter(sampling.stop)
        self.prompt_tokens = len(prompt)
        self.tokens = 0
        self.finish: Finish | None = None
        self.text = ""
        self.prefill_seconds = self.first_token_seconds = self.decode_seconds = 0.0

    @property
    def prefill(self) -> float | None:
        """Prompt tokens per second, or None before the prompt is through."""
        return self.prompt_tokens / self.prefill_seconds if self.tokens else None

    @property
    def decode(self) -> float | None:
        """Tokens per second behind the first, or None where there was no second."""
        return (self.tokens - 1) / self.decode_seconds if self.tokens > 1 else None

    def summary(self) -> dict[str, Any]:
        """The figures `--json` prints."""
        return {
            "text": self.text,
            "finish": self.finish,
            "prompt_tokens": self.prompt_tokens,
            "tokens": self.tokens,
            "prefill_tokens_per_second": self.prefill,
            "first_token_seconds": self.first_token_seconds,
            "decode_tokens_per_second": self.decode,
        }

    def __iter__(self) -> Iterator[str]:
        for token in self._tokens():
            piece = self._filter.push(self._detokenizer.push(token))
            if piece:
                self.text += piece
                yield piece
            if self._filter.stopped:
                self.finish = "stop"
                return
        rest = self._filter.push(self._detokenizer.flush())
        if self._filter.stopped:
            self.finish = "stop"
        rest += self._filter.flush()
        if rest:
            self.text += rest
            yield rest

    def _tokens(self) -> Iterator[int]:
        """The tokens that are text, one by one. Says how it ended."""
        begun = time.perf_counter()
        cache: Any = None
        for start in range(0, len(self._prompt), PIECE):
            if self._stopped():
                self.finish = "cancelled"
                return
            logits, cache = self._engine.forward(self._prompt[start : start + PIECE], cache)
        self._wait()
        self.prefill_seconds = time.perf_counter() - begun
        token = self._choose(logits)
        self.first_token_seconds = time.perf_counter() - begun
        self.tokens = 1
        while token not in self._engine.ends:
            yield token
            if self.tokens == self._most:
                self.finish = "length"
                return
            if self._stopped():
                self.finish = "cancelled"
                return
            begun = time.perf_counter()
            logits, cache = self._engine.forward([token], cache)
            token = self._choose(logits)
            self.decode_seconds += time.perf_counter() - begun
            self.tokens += 1
        self.finish = "stop"

    def _wait(self) -> None:
        """Until the device has done what it was asked; the choice of a token does so by itself."""
        if self._engine.model.device.type == "cuda":
            torch.cuda.synchronize(self._engine.model.device)


def check_text(text: str) -> None:
    """Raise `InputError` where a text holds half a character, which no tokenizer takes."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as problem:
        raise InputError(f"the text is no valid Unicode at character {problem.start}: give UTF-8") from None


def check_template(tokenizer: Any) -> None:
    """Raise `InputError` where a tokenizer has no chat template."""
    if not tokenizer.chat_template:
        raise InputError("this model has no chat template, so it takes plain prompts and no chat")


def _ends(model: PreTrainedModel, tokenizer: Any) -> frozenset[int]:
    """What ends a text by the model's generation config, and the tokenizer's end of a text or turn."""
    given = model.generation_config.eos_token_id
    ends = [] if given is None else [given] if isinstance(given, int) else list(given)
    return frozenset([*ends, *([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])])
