"""What the fault tests have done is said at the end of the run: a number nobody reads proves nothing."""

from __future__ import annotations

from typing import Any

import pytest


def pytest_terminal_summary(terminalreporter: Any) -> None:
    survived: dict[str, int] = {}
    injected: dict[str, int] = {}
    seeds = set()
    for report in [*terminalreporter.getreports("passed"), *terminalreporter.getreports("failed")]:
        for name, value in report.user_properties:
            if name == "faults":
                for kind, (done, well) in value.items():
                    injected[kind] = injected.get(kind, 0) + done
                    survived[kind] = survived.get(kind, 0) + well
            elif name == "fault seed":
                seeds.add(value)
    if injected:
        parts = ", ".join(f"{kind} {survived[kind]}/{injected[kind]}" for kind in sorted(injected))
        seed = ", ".join(map(str, sorted(seeds)))
        terminalreporter.write_line(
            f"faults survived: {sum(survived.values())} of {sum(injected.values())} ({parts}); PRUNEKIT_FAULT_SEED={seed}"
        )


@pytest.fixture(autouse=True)
def nothing_of_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
