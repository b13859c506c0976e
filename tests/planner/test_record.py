"""The kept plans belong to the configurations as they are, and the page shows what is kept."""

from __future__ import annotations

import dataclasses

from intttrain.planner import record


def test_records_are_of_the_configurations_as_they_are():
    wanted = {item.name: item.digest() for item in record.wanted_plans()}
    kept = record.load_records()
    assert kept, "docs/plans.json has no plan"
    stale = [name for name, entry in kept.items() if wanted.get(name) != entry["digest"]]
    assert not stale, f"python -m intttrain.planner.record compiles these again: {stale}"


def test_the_page_shows_what_is_kept(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(record.PAGE.read_text())
    record.write_page(record.load_records(), page)
    assert page.read_text() == record.PAGE.read_text(), "python -m intttrain.planner.record writes the table"


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
