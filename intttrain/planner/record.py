"""Plans of the shipped configurations, kept in docs/plans.json and as a table in docs/benchmarks.md.

    python -m intttrain.planner.record                      # what is missing or out of date, one compilation each
    python -m intttrain.planner.record qwen3:4b_8k          # only those whose name begins like this

Every file of configs/ with a mapping ``TOPOLOGIES`` (variant -> topology names) takes part. A record carries a digest
of the settings that shape the compiled step, so a changed configuration is seen without compiling anything.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from intttrain.core.config import Config, as_dict, flatten, resolve
from intttrain.core.hardware import GIB

REPO = Path(__file__).resolve().parents[2]
RECORDS, PAGE = REPO / "docs" / "plans.json", REPO / "docs" / "benchmarks.md"
BEGIN, END = "<!-- plans: begin (python -m intttrain.planner.record) -->", "<!-- plans: end -->"

_SHAPING = ("model.", "mesh.", "data.seq_len", "train.batch_rows", "train.microbatches", "train.optimizer.")


@dataclasses.dataclass(frozen=True)
class Wanted:
    """One shipped plan: ``configs/FILE.py:VARIANT`` on a topology."""

    file: str
    variant: str
    topology: str
    config: Config

    @property
    def name(self) -> str:
        """``qwen3:4b_8k v5p:4x4x4``."""
        return f"{self.file}:{self.variant} {self.topology}"

    def digest(self) -> str:
        """Returns 12 hexadecimal digits of what shapes the compiled step."""
        flat = {key: value for key, value in flatten(as_dict(self.config)).items() if key.startswith(_SHAPING)}
        return hashlib.sha256(json.dumps(flat, sort_keys=True).encode()).hexdigest()[:12]


def wanted_plans(configs: Path = REPO / "configs") -> list[Wanted]:
    """Returns all plans that the configuration files ask for, in the order of files and mappings."""
    found = []
    for path in sorted(configs.glob("*.py")):
        spec = importlib.util.spec_from_file_location(f"shipped_{path.stem}", path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        for variant, topologies in vars(module).get("TOPOLOGIES", {}).items():
            config = resolve(module.get_config(variant))
            found += [Wanted(path.stem, variant, topology, config) for topology in topologies]
    return found


def load_records(path: Path = RECORDS) -> dict[str, dict[str, Any]]:
    """Returns the kept records by name."""
    return json.loads(path.read_text()) if path.exists() else {}


def to_record(plan: Mapping[str, Any], digest: str) -> dict[str, Any]:
    """Returns what is kept of a plan (as ``Plan.to_json`` gives it), rounded to what may be compared."""
    verdict, prediction = plan["verdict"], plan["prediction"]
    record = {
        "digest": digest,
        "versions": plan["versions"],
        "mesh": plan["mesh"],
        "tokens_per_step": plan["tokens_per_step"],
        "remat": plan["remat"],
        "microbatches": plan["microbatches"],
        "peak_gib": round(verdict["needed"] / GIB, 2),
        "spare_gib": round((verdict["available"] - verdict["needed"]) / GIB, 2),
    }
    if prediction is not None:
        record |= {
            "step_seconds": round(prediction["step_seconds"], 3),
            "mfu": round(prediction["mfu"], 4),
            "tokens_per_second_per_chip": round(prediction["tokens_per_second_per_chip"]),
            "matmul_tflop": round(plan["cost"]["matmul_flops"] / 1e12, 2),
        }
    return record


def to_table(records: Mapping[str, Mapping[str, Any]]) -> str:
    """Returns the Markdown table of all records."""
    lines = [
        "| configuration, topology | mesh | tokens a step | remat, microbatches | peak GiB | spare GiB | step s | MFU "
        "| tokens/s/chip | jax, libtpu |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, r in records.items():
        time = ["-", "-", "-"]
        if "step_seconds" in r:
            time = [f"{r['step_seconds']:.2f}", f"{r['mfu']:.3f}", f"{r['tokens_per_second_per_chip']:,}"]
        cells = [
            f"`{name}`", r["mesh"], f"{r['tokens_per_step']:,}", f"{r['remat']}, {r['microbatches']}",
            f"{r['peak_gib']:.2f}", f"{r['spare_gib']:.2f}", *time,
            f"{r['versions']['jax']}, {r['versions']['libtpu']}",
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def write_page(records: Mapping[str, Mapping[str, Any]], page: Path = PAGE) -> None:
    """Puts the table between its two marks."""
    before, _, rest = page.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    page.write_text(f"{before}{BEGIN}\n{to_table(records)}\n{END}{after}")


def compile_plan(item: Wanted) -> dict[str, Any]:
    """Plans in a process of its own, which gives its memory back; returns the JSON of the command."""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "plan.json"
        command = [sys.executable, "-m", "intttrain", "plan", f"--config=configs/{item.file}.py:{item.variant}"]
        done = subprocess.run([*command, f"--topology={item.topology}", f"--json={target}"], cwd=REPO, check=False)
        if done.returncode not in (0, 1):
            raise SystemExit(f"{item.name}: status {done.returncode}")
        return json.loads(target.read_text())


def main(prefixes: Sequence[str]) -> None:
    """Compiles what is missing or out of date and writes after every plan."""
    everything = wanted_plans()
    for item in everything:
        current = load_records().get(item.name, {}).get("digest") == item.digest()
        if current or not item.name.startswith(tuple(prefixes or ("",))):
            continue
        record = to_record(compile_plan(item), item.digest())
        records = load_records() | {item.name: record}  # minutes later: another process may have added its own
        ordered = {one.name: records[one.name] for one in everything if one.name in records}
        partial = RECORDS.with_suffix(".partial")
        partial.write_text(json.dumps(ordered, indent=1) + "\n")
        os.replace(partial, RECORDS)
        write_page(ordered)


if __name__ == "__main__":
    main(sys.argv[1:])
