"""Multiple choice next to lm-evaluation-harness's own loop: the same model in memory, the same questions, the same answers?

    python benchmarks/tasks.py TASK.jsonl [--limit 500] [--batches 1 8 32] [--rounds 3] [--dtype bfloat16] [--model smollm2-135m]
                               [--keep FILE]

What is timed on both sides: from text to log-likelihoods, tokenising included. Theirs is `HFLM.loglikelihood`, once with every batch
size; ours chooses its own. They take turns, and ratios are taken round by round, against the fastest of theirs. Needs prunekit[eval].
"""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import keep, parser_of
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM

from prunekit.calibration.windows import load_tokenizer
from prunekit.checkpoint.locate import locate
from prunekit.evaluation.likelihood import log_likelihoods
from prunekit.evaluation.tasks import Item, encode, judge, read_task


def main() -> None:
    """Measure, print, and keep the figures."""
    parser = parser_of(__doc__)
    parser.add_argument("task", type=Path)
    parser.add_argument("--limit", type=int, default=500)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    asked = parser.parse_args()
    folder = locate(asked.model)
    tokenizer = load_tokenizer(folder, trust_remote_code=False)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, asked.dtype)).eval()
    items = read_task(asked.task, asked.limit)
    longest = model.config.max_position_embeddings
    sides: dict[str, Callable[[], list[list[float]]]] = {
        "prunekit": lambda: log_likelihoods(model, [encode(item, tokenizer, longest) for item in items])
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for batch in asked.batches:
            harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch)
            sides[f"lm-eval, batch {batch}"] = lambda harness=harness: through_harness(harness, items)
    rounds: list[dict[str, float]] = []
    answers: dict[str, Any] = {}
    for number in range(asked.rounds):
        seconds = {}
        for name, side in sides.items():
            begun = time.perf_counter()
            scores = side()
            seconds[name] = time.perf_counter() - begun
            answers[name] = judge(items, scores)
        rounds.append(seconds)
        print(
            f"round {number + 1}: " + ", ".join(f"{name} {value:.2f} s" for name, value in seconds.items()), flush=True
        )
    best = [min(value for name, value in line.items() if name != "prunekit") / line["prunekit"] for line in rounds]
    for name, (acc, acc_norm) in answers.items():
        same = float(np.mean(acc == answers["prunekit"][0]))
        print(f"{name}: acc {acc.mean():.4f}, acc_norm {acc_norm.mean():.4f}, {same:.4f} of the answers as prunekit's")
    print(f"median {statistics.median(best):.2f} x as fast as the fastest of lm-eval's")
    if asked.keep:
        figures = {"benchmark": "tasks", "model": asked.model, "task": asked.task.stem, "questions": len(items)}
        accuracy = {name: [float(acc.mean()), float(acc_norm.mean())] for name, (acc, acc_norm) in answers.items()}
        keep(
            asked.keep, {**figures, "dtype": asked.dtype, "rounds": rounds, "times_as_fast": best, "accuracy": accuracy}
        )


def through_harness(harness: HFLM, items: list[Item]) -> list[list[float]]:
    """Their loop over every choice of every question."""
    ends = np.cumsum([0, *[len(item.pairs) for item in items]])
    pairs = [pair for item in items for pair in item.pairs]
    requests = [
        Instance(request_type="loglikelihood", doc={}, arguments=pair, idx=number) for number, pair in enumerate(pairs)
    ]
    scores = [score for score, _ in harness.loglikelihood(requests, disable_tqdm=True)]
    return [scores[start:end] for start, end in pairwise(ends)]


if __name__ == "__main__":
    main()
