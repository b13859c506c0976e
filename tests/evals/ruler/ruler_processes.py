"""Run by test_ruler.py as several processes: each evaluates with a folder of its own; only the first may use it."""

from __future__ import annotations

import sys
from pathlib import Path

from intttrain.config.errors import UserError
from intttrain.evals import evaluate_ruler
from intttrain.pod.distributed import process_index, start_distributed
from tests.evals.ruler.ruler_cases import CONFIG, SETTINGS, FakeModel, make_sets

if __name__ == "__main__":
    start_distributed()
    sets, folder = make_sets(), Path(sys.argv[1]) / f"process{process_index()}"
    model, other = FakeModel(sets), FakeModel(sets)
    for path, settings, models in (
        ("answers.jsonl", SETTINGS, {"on": model}),  # begun by the test
        ("answers.jsonl", SETTINGS, {"on": other}),
        ("answers.jsonl", SETTINGS | {"step": 4}, {"on": other}),
    ):
        try:
            report = evaluate_ruler(
                sets,
                models,
                name="x",
                answers=folder / path,
                settings=settings,
                config=CONFIG,
                report=lambda line: None,
            )
            outcome = "no report" if report is None else "report"
        except UserError as error:
            outcome = f"refused: {str(error).split(';')[0][-11:]}"
        print(f"{process_index()}: {outcome}, {len(model.asked)} + {len(other.asked)} asked", flush=True)
    print(f"{process_index()}: folder {folder.exists()}", flush=True)
