"""`generate`: a text that a model writes behind a prompt, streamed. `serve` opens its model here too."""

from __future__ import annotations

from .calibration.windows import load_tokenizer
from .checkpoint.locate import locate
from .checkpoint.reader import refuse_no_folder
from .generation.engine import Engine, Generation, check_template
from .generation.sampling import Sampling
from .loading import load_model
from .progress import Progress

# Tokens where nobody says how many.
_TOKENS = 256


def open_engine(
    model: str,
    *,
    dtype: str,
    device: str,
    runtime: str,
    revision: str | None,
    trust_remote_code: bool,
    progress: Progress | None,
    chat: bool = False,
) -> Engine:
    """A folder's model and tokenizer, ready to generate; `chat` says that it must have a chat template. Raises `InputError`."""
    folder = locate(model, revision=revision, trust_remote_code=trust_remote_code, progress=progress)
    refuse_no_folder(folder)  # a tokenizer is looked for first, and says less
    tokenizer = load_tokenizer(folder, trust_remote_code=trust_remote_code)
    if chat:
        check_template(tokenizer)
    loaded = load_model(folder, dtype=dtype, device=device, runtime=runtime, trust_remote_code=trust_remote_code)
    return Engine(loaded, tokenizer)


def generate_text(engine: Engine, prompt: str, sampling: Sampling, *, chat: bool) -> Generation:
    """A generation behind `prompt`, a text or with `chat` what a user says; it begins when iterated over. Raises `InputError`."""
    ids = engine.encode_chat([{"role": "user", "content": prompt}]) if chat else engine.encode(prompt)
    return engine.generate(ids, sampling, engine.fit(len(ids), sampling.max_tokens, _TOKENS))
