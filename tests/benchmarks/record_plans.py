"""Plans of the shipped configurations: docs/plans.json, the table of docs/benchmarks.md and those of the files.

    python -m tests.benchmarks.record_plans                     # what is missing or out of date, a compilation each
    python -m tests.benchmarks.record_plans qwen3:4b_8k         # only those whose name begins like this
    python -m tests.benchmarks.record_plans --check paper:500m  # compile again and compare with the record

Every file of configs/ with a mapping ``TOPOLOGIES`` (variant -> topology names) takes part. A record carries a digest
of the settings that shape the compiled step, so a changed configuration is seen without compiling anything. A change
of the program itself is not: whoever makes one that moves plans raises ``PROGRAM``, and older records are shown with a
star until they are compiled again.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import importlib.util
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from intttrain.config import Config, as_dict, resolve
from intttrain.config.dotted import flatten
from intttrain.layout.hardware import GIB
from intttrain.planner.plan import VERSIONS, compiler_versions
from intttrain.storage.files import write_json, write_text

REPO = Path(__file__).resolve().parents[2]
RECORDS, PAGE = REPO / "docs" / "plans.json", REPO / "docs" / "benchmarks.md"
BEGIN, END = "<!-- plans: begin (python -m tests.benchmarks.record_plans) -->", "<!-- plans: end -->"

# 2: one product with W0 + S (docs/decisions/0007), one buffer per run of layers (0008)
# 3: scan kernels (0009), one backward kernel of attention (0011), RoPE pinned to its tokens
PROGRAM = 3

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
        "program": PROGRAM,
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
            "without_estimate": len(prediction["unknown"]),
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
            least = "> " if r.get("without_estimate") else ""
            time = [
                f"{least}{r['step_seconds']:.2f}{_star(r)}",
                f"{r['mfu']:.3f}",
                f"{r['tokens_per_second_per_chip']:,}",
            ]
        cells = [
            f"`{name}`", r["mesh"], f"{r['tokens_per_step']:,}", f"{r['remat']}, {r['microbatches']}",
            f"{r['peak_gib']:.2f}", f"{r['spare_gib']:.2f}", *time,
            f"{r['versions']['jax']}, {r['versions']['libtpu']}",
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _star(record: Mapping[str, Any]) -> str:
    """Returns the mark of a plan of an older program."""
    return "" if record.get("program", PROGRAM) == PROGRAM else " *"


def write_page(records: Mapping[str, Mapping[str, Any]], page: Path = PAGE) -> None:
    """Puts the table between its two marks."""
    before, _, rest = page.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    write_text(page, f"{before}{BEGIN}\n{to_table(records)}\n{END}{after}")


def compile_plan(item: Wanted) -> dict[str, Any]:
    """Plans in a process of its own, which gives its memory back; returns the JSON of the command."""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "plan.json"
        command = [sys.executable, "-m", "intttrain", "plan", f"--config=configs/{item.file}.py:{item.variant}"]
        done = subprocess.run([*command, f"--topology={item.topology}", f"--json={target}"], cwd=REPO, check=False)
        if done.returncode not in (0, 1):
            raise SystemExit(f"{item.name}: status {done.returncode}")
        return json.loads(target.read_text())


def fill_table(text: str, file: str, records: Mapping[str, Mapping[str, Any]]) -> str:
    """Returns the text of a configuration file with the last two cells of its table's rows from the records.

    A row is of a variant and a topology; "A / B" is of the variant and of its dense twin, "-" where there is no plan.
    """
    lines, widths = [], (0, 0)
    for line in text.splitlines():
        cells = line.split("|")
        if not line.startswith("    | ") or len(cells) != 8:
            lines.append(line)
            continue
        variant, topology = cells[1].strip(), cells[2].strip()
        if variant == "variant":
            widths = len(cells[5]) - 2, len(cells[6]) - 2
        else:
            twins = [records.get(f"{file}:{one} {topology}", {}) for one in (variant, f"{variant}_dense")]
            peak = " / ".join(f"{r['peak_gib']:.1f}" if r else "-" for r in twins)
            step = " / ".join(f"{r['step_seconds']:.2f}{_star(r)}" if "step_seconds" in r else "-" for r in twins)
            cells[5:7] = f" {peak:{widths[0]}} ", f" {step:{widths[1]}} "
        lines.append("|".join(cells))
    return "\n".join(lines) + "\n"


def write_records(records: Mapping[str, dict[str, Any]], wanted: Sequence[Wanted]) -> None:
    """Writes docs/plans.json, the page and the tables of the configuration files; drops what is no longer wanted."""
    ordered = {item.name: records[item.name] for item in wanted if item.name in records}
    write_json(RECORDS, ordered)
    write_page(ordered)
    for file in dict.fromkeys(item.file for item in wanted):
        path = REPO / "configs" / f"{file}.py"
        write_text(path, fill_table(path.read_text(), file, ordered))


# A plan made with other versions of the compiler than its record may differ by this much.
_OTHER_VERSIONS = {"peak_gib": 0.15, "step_seconds": 0.15, "mfu": 0.15, "tokens_per_second_per_chip": 0.15}
_SAME = 0.005


def _compiler(record: Mapping[str, Any]) -> str:
    return f"jax {record['versions']['jax']}, libtpu {record['versions']['libtpu']}"


def differences(record: Mapping[str, Any], again: Mapping[str, Any]) -> list[str]:
    """Returns what a plan compiled again says otherwise than its record, one line each.

    Made with the same versions every number agrees to 0.5 %; the matmul FLOPs and what the configuration says always.
    """
    same_versions = record["versions"] == again["versions"]
    found = []
    for key, old in record.items():
        new = again.get(key)
        if key in ("versions", "spare_gib", "program"):
            continue
        if isinstance(old, str) or isinstance(new, str | None):
            agrees = old == new
        else:
            tolerance = _SAME if same_versions else _OTHER_VERSIONS.get(key, _SAME)
            agrees = abs(new - old) <= tolerance * abs(old)
        if not agrees:
            found.append(f"{key}: {old} is recorded ({_compiler(record)}), {new} came out ({_compiler(again)})")
    return found


def compare_versions(record: Mapping[str, Any], here: Mapping[str, str]) -> str:
    """Returns one line on how far a record and a plan made with the versions ``here`` can be compared."""

    def named(versions: Mapping[str, str]) -> str:
        return ", ".join(f"{package} {versions[package]}" for package in VERSIONS)

    if record["versions"] == here:
        return f"recorded with these versions ({named(here)}): numbers must agree to {_SAME:.1%}"
    return (
        f"recorded with {named(record['versions'])}; here are {named(here)}. Another compiler makes another program: "
        f"memory and time are compared to {_OTHER_VERSIONS['step_seconds']:.0%} only, and a difference may be its own"
    )


def check(wanted: Sequence[Wanted], report: Callable[[str], None]) -> list[str]:
    """Compiles plans again and returns how they differ from their records; ``report`` is told what is compared."""
    records, here, found = load_records(), compiler_versions(), []
    for item in wanted:
        if item.name not in records:
            found.append(f"{item.name} has no record")
            continue
        record = records[item.name]
        report(f"{item.name}: {compare_versions(record, here)}")
        unlike = differences(record, to_record(compile_plan(item), item.digest()))
        report(f"{item.name}: {f'{len(unlike)} numbers differ' if unlike else 'agrees'}")
        found += [f"{item.name}: {line}" for line in unlike]
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Compiles what is missing or out of date and writes after every plan, or checks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("prefix", nargs="*", help="beginnings of names, for example qwen3:4b_8k; all without one")
    parser.add_argument("--check", action="store_true", help="compile again and compare; write nothing")
    given = parser.parse_args(arguments)
    everything = wanted_plans()
    chosen = [item for item in everything if item.name.startswith(tuple(given.prefix or ("",)))]
    if not chosen:
        raise SystemExit(f"no plan begins with {' or '.join(given.prefix)}: {', '.join(i.name for i in everything)}")
    if given.check:
        found = check(chosen, lambda line: print(line, flush=True))
        raise SystemExit("\n".join(found) if found else 0)
    for item in chosen:
        kept = load_records().get(item.name, {})
        if (kept.get("digest"), kept.get("program")) != (item.digest(), PROGRAM):
            record = to_record(compile_plan(item), item.digest())
            # Minutes later: another process may have added its own.
            write_records(load_records() | {item.name: record}, everything)
    write_records(load_records(), everything)


if __name__ == "__main__":
    main()
