"""The stages of a run in order: which steps each makes, with which configuration, and where it reads the data.

All stages read one list of blocks, as long as the longest row of any of them; a stage with shorter rows cuts each block
into rows. The data cursor counts rows of the shortest stage, so it means the same in all of them.
"""

from __future__ import annotations

import dataclasses

from intttrain.config.schema import Config, stage_configs


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage; a run without stages is a single one.

    Attributes:
      number, count: "stage ``number`` of ``count``", from 1.
      first_step, until_step: it makes the steps ``first_step + 1`` to ``until_step``.
      config: resolved, without stages of its own.
      block_tokens: the longest row of all stages.
      cursor_per_row: rows of the shortest stage in a row of this one.
    """

    number: int
    count: int
    first_step: int
    until_step: int
    config: Config
    block_tokens: int
    cursor_per_row: int

    @property
    def tokens_per_step(self) -> int:
        """Tokens of a batch."""
        return self.config.train.batch_rows * self.config.data.seq_len

    def first_row(self, cursor: int) -> int:
        """Returns the row of this stage that comes next; the rest of one that other stages began is passed over."""
        return -(-cursor // self.cursor_per_row)

    def cursor_after(self, cursor: int) -> int:
        """Returns the cursor after one step that began at ``cursor``."""
        return (self.first_row(cursor) + self.config.train.batch_rows) * self.cursor_per_row

    def __str__(self) -> str:
        train = self.config.train
        return (
            f"stage {self.number} of {self.count}, steps {self.first_step + 1} to {self.until_step}: "
            f"{train.batch_rows} rows of {self.config.data.seq_len} tokens"
        )


def make_stages(config: Config) -> tuple[Stage, ...]:
    """Returns the stages of a run."""
    configs = stage_configs(config)
    ends = [stage.until_step for stage in config.train.stages] or [config.train.num_steps]
    lengths = [one.data.seq_len for one in configs]
    return tuple(
        Stage(number, len(configs), first, end, one, max(lengths), one.data.seq_len // min(lengths))
        for number, (first, end, one) in enumerate(zip([0, *ends], ends, configs, strict=False), start=1)
    )


def stage_after(stages: tuple[Stage, ...], step: int) -> Stage:
    """Returns the stage that goes on after ``step`` completed steps (the last one when all are done)."""
    return next((stage for stage in stages if step < stage.until_step), stages[-1])


def stage_before(stages: tuple[Stage, ...], step: int) -> Stage:
    """Returns the stage that made ``step`` (the first one for the initial state)."""
    return next((stage for stage in stages if step <= stage.until_step), stages[-1])
