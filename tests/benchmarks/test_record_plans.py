"""The kept plans belong to the configurations as they are, and the page shows what is kept."""

from __future__ import annotations

import dataclasses

from tests.benchmarks import record_plans as record


def test_records_are_of_the_configurations_as_they_are():
    wanted = {item.name: item.digest() for item in record.wanted_plans()}
    kept = record.load_records()
    assert kept, "docs/plans.json has no plan"
    stale = [name for name, entry in kept.items() if wanted.get(name) != entry["digest"]]
    assert not stale, f"python -m tests.benchmarks.record_plans compiles these again: {stale}"


def test_the_page_shows_what_is_kept(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(record.PAGE.read_text())
    record.write_page(record.load_records(), page)
    assert page.read_text() == record.PAGE.read_text(), "python -m tests.benchmarks.record_plans writes the table"


def test_the_tables_of_the_files_show_what_is_kept():
    for file in {item.file for item in record.wanted_plans()}:
        text = (record.REPO / "configs" / f"{file}.py").read_text()
        assert record.fill_table(text, file, record.load_records()) == text, "python -m tests.benchmarks.record_plans"


def test_a_row_has_both_twins():
    text = """    | variant | topology | mesh | rows | peak GiB    | step s      |
    |---------|----------|------|------|-------------|-------------|
    | a       | v5e:2x2  | m    | r    |             | old         |
    | b       | v5e:2x2  | m    | r    |             | old         |
"""
    records = {
        "f:a v5e:2x2": {"peak_gib": 3.21, "step_seconds": 1.5}, "f:a_dense v5e:2x2": {"peak_gib": 20.0},
        "f:b v4:2x2x1": {"peak_gib": 1.0, "step_seconds": 1.0},
    }  # fmt: skip
    rows = record.fill_table(text, "f", records).splitlines()
    assert rows[:2] == text.splitlines()[:2]
    assert rows[2] == "    | a       | v5e:2x2  | m    | r    | 3.2 / 20.0  | 1.50 / -    |"
    assert rows[3] == "    | b       | v5e:2x2  | m    | r    | - / -       | - / -       |"


def test_a_plan_compiled_again_is_compared():
    made = {"jax": "1", "jaxlib": "1", "libtpu": "5"}
    old = {"digest": "a", "versions": made, "peak_gib": 10.0, "step_seconds": 2.0, "matmul_tflop": 100.0}
    assert record.differences(old, old | {"step_seconds": 2.009}) == []
    assert record.differences(old, old | {"step_seconds": 2.02}) == [
        "step_seconds: 2.0 is recorded (jax 1, libtpu 5), 2.02 came out (jax 1, libtpu 5)"
    ]
    newer = {"versions": made | {"libtpu": "6"}}
    assert record.differences(old, old | newer | {"step_seconds": 2.2, "peak_gib": 9.0}) == []
    assert len(record.differences(old, old | newer | {"step_seconds": 2.4, "matmul_tflop": 102.0})) == 2
    assert len(record.differences(old, old | {"digest": "b"})) == 1
    assert len(record.differences(old, {**old, "step_seconds": None})) == 1, "no longer fits"


def test_the_digest_follows_what_shapes_the_step():
    item = next(item for item in record.wanted_plans() if item.variant == "4b_8k")
    free = dataclasses.replace(item.config, name="other", train=dataclasses.replace(item.config.train, num_steps=7))
    assert dataclasses.replace(item, config=free).digest() == item.digest()
    model = dataclasses.replace(item.config.model, remat="dots")
    changed = dataclasses.replace(item.config, model=model)
    assert dataclasses.replace(item, config=changed).digest() != item.digest()


def test_a_plan_that_does_not_fit_is_kept_without_a_time():
    plan = {
        "versions": {"jax": "1", "libtpu": "2"}, "mesh": "fsdp 4", "tokens_per_step": 10, "remat": "full",
        "microbatches": 1, "verdict": {"needed": 3 * 2**30, "available": 2 * 2**30}, "prediction": None,
    }  # fmt: skip
    entry = record.to_record(plan, "abc")
    assert (entry["peak_gib"], entry["spare_gib"]) == (3.0, -1.0) and "step_seconds" not in entry
    assert "| -1.00 | - | - | - |" in record.to_table({"a b": entry})


def test_plans_of_an_older_program_have_a_star():
    new = dict.fromkeys(("tokens_per_step", "microbatches", "peak_gib", "spare_gib", "mfu", "step_seconds"), 1)
    new |= {"mesh": "m", "remat": "full", "tokens_per_second_per_chip": 1, "program": record.PROGRAM}
    new |= {"versions": {"jax": "1", "libtpu": "2"}}
    table = record.to_table({"new": new, "old": new | {"program": record.PROGRAM - 1}}).splitlines()
    assert ("| 1.00 |" in table[-2], "| 1.00 * |" in table[-1]) == (True, True)


def test_records_say_what_made_them():
    for name, entry in record.load_records().items():
        assert tuple(entry["versions"]) == record.VERSIONS and all(entry["versions"].values()), name


def test_a_check_says_which_versions_it_compares(monkeypatch):
    """Other versions are neither a silent pass nor a mismatch that looks like the code's."""
    item = record.wanted_plans()[0]
    kept = record.load_records()[item.name] | {"digest": item.digest()}
    here = dict(kept["versions"])
    said: list[str] = []
    monkeypatch.setattr(record, "load_records", lambda: {item.name: kept})
    monkeypatch.setattr(record, "compiler_versions", lambda: here)
    monkeypatch.setattr(record, "compile_plan", lambda item: {})
    monkeypatch.setattr(record, "to_record", lambda plan, digest: kept | {"versions": here} | changed)

    changed: dict = {}
    assert record.check([item], said.append) == []
    assert "recorded with these versions (jax " in said[0] and "must agree to 0.5%" in said[0]
    assert said[1].endswith("agrees")

    here["libtpu"] = "0.0.42.1"
    assert record.check([item], said.append) == []
    for part in (f"libtpu {kept['versions']['libtpu']}; here are", "libtpu 0.0.42.1", "compared to 15% only"):
        assert part in said[2], said[2]

    changed = {"step_seconds": 2 * kept["step_seconds"]}
    (line,) = record.check([item], said.append)
    assert f"libtpu {kept['versions']['libtpu']})" in line and "libtpu 0.0.42.1)" in line
    assert said[-1].endswith("1 numbers differ")


def test_a_time_that_is_a_lower_bound_is_marked():
    plan = {
        "versions": {"jax": "1", "libtpu": "2"}, "mesh": "fsdp 4", "tokens_per_step": 10, "remat": "full",
        "microbatches": 1, "verdict": {"needed": 2**30, "available": 2 * 2**30}, "cost": {"matmul_flops": 1},
        "prediction": {
            "step_seconds": 1.5, "mfu": 0.5, "tokens_per_second_per_chip": 7, "unknown": ["sort at a.py:1"],
        },
    }  # fmt: skip
    entry = record.to_record(plan, "abc")
    assert entry["without_estimate"] == 1
    assert "| > 1.50 |" in record.to_table({"a b": entry})
    plan["prediction"]["unknown"] = []
    assert "| 1.50 |" in record.to_table({"a b": record.to_record(plan, "abc")})
