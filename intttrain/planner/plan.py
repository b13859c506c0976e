"""Compiles the step of a configuration for a topology and says what it needs and costs, before anything runs.

What is compiled is ``train.make_program(config, devices).step``: the function, shardings and compiler options of
training, for devices that are only described.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import math
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from intttrain.config import Config
from intttrain.config.errors import UserError
from intttrain.layout.hardware import Chip
from intttrain.layout.sharding import pieces_of
from intttrain.model import FLOP_RULE, kept_values, model_flops_per_token
from intttrain.planner.attention_cost import attention_model
from intttrain.planner.collectives import Traffic, read_collectives, sum_traffic
from intttrain.planner.cost import COLLECTIVE, Cost, Unpriced, step_cost
from intttrain.planner.memory import Memory, Refusal, Verdict, read_memory, read_refusal, verdict
from intttrain.planner.replication import Replicated, replicated_activations, replicated_arguments
from intttrain.planner.scan_cost import scan_model
from intttrain.planner.topology import Topology, describe_topology, topology_devices
from intttrain.planner.xla.hlo import parse_module
from intttrain.planner.xla.kernels import KernelModel, stated_kernel_cost
from intttrain.planner.xla.loops import execution_counts
from intttrain.storage.files import write_text
from intttrain.train import Program, make_program
from intttrain.ttt import MIXED_SCOPE

PACKAGE = str(Path(__file__).resolve().parents[1])
NEGLIGIBLE = 0.001  # of a step
VERSIONS = ("jax", "jaxlib", "libtpu")  # packages that make the text
OTHER_KERNELS_EFFICIENCY = 0.5  # of the peak: kernels without a measurement; stated, not known


@dataclasses.dataclass(frozen=True)
class Prediction:
    """Time of one step, as it follows from the compiler's estimates; not a measurement.

    Attributes:
      step_seconds: ``compute_seconds`` and ``synchronous_seconds``, or ``overlapped_seconds`` where that is longer.
      compute_seconds: estimated cycles of everything but collectives, at the chip's clock.
      synchronous_seconds: collectives that nothing runs beside.
      overlapped_seconds: collectives beside other work.
      tokens_per_second_per_chip: of the whole batch.
      mfu: model FLOPs by ``flop_rule`` over the peak of all chips.
      flop_rule: in words.
      unknown: kinds of work without an estimate that may matter, "OPCODE at FILE:LINE"; with any, ``step_seconds`` is
        a lower bound. Left out is what carries no number at all and moves its arrays in ``NEGLIGIBLE`` of the step, and
        collectives, which have prices of their own. Offloaded work is among it: nobody knows whether it is hidden.
      unknown_seconds: what moving the arrays of all work without an estimate once through main memory takes; not part
        of ``step_seconds``.
    """

    step_seconds: float
    compute_seconds: float
    synchronous_seconds: float
    overlapped_seconds: float
    tokens_per_second_per_chip: float
    mfu: float
    flop_rule: str = FLOP_RULE
    unknown: tuple[str, ...] = ()
    unknown_seconds: float = 0.0


@dataclasses.dataclass(frozen=True)
class Plan:
    """What one configuration needs and costs on one topology.

    ``memory`` to ``prediction`` are ``None`` where the compiler refused the program (see ``refusal``). ``kept_bytes``
    are what the remat policy keeps of all layers, by its definition; ``None`` for "none".
    """

    name: str
    topology: str
    mesh: str
    devices: int
    tokens_per_step: int
    verdict: Verdict
    memory: Memory | None
    cost: Cost | None
    traffic: tuple[Traffic, ...] | None
    replicated: tuple[Replicated, ...] | None
    prediction: Prediction | None
    refusal: Refusal | None
    remat: str
    kept_bytes: int | None
    microbatches: int
    compile_seconds: float
    versions: dict[str, str]

    def to_json(self) -> dict[str, Any]:
        """The same as plain values."""
        return dataclasses.asdict(self)


def make_plan(config: Config, topology_name: str, *, hlo: Path | None = None) -> Plan:
    """Compiles and analyses the training step.

    Args:
      config: of the run; ``mesh.slices`` is the number of slices of the topology.
      topology_name: of one slice, for example "v5p:4x4x4".
      hlo: receives ``NAME.TOPOLOGY.txt``, the compiled text, if given.

    Raises:
      UserError: the topology does not exist, mesh or batch do not fit it, or the text is there already; before
        anything is compiled.
    """
    topology = describe_topology(topology_name, config.mesh.slices)
    target = None if hlo is None else hlo / f"{config.name}.{topology.name.replace(':', '-')}.txt"
    if target is not None and target.exists():
        raise UserError(f"--hlo={hlo}: {target.name} is there already and is not overwritten; name another folder")
    program = make_program(config, topology_devices(topology))
    start = time.monotonic()
    try:
        compiled = lower(program).compile()
    except jax.errors.JaxRuntimeError as error:
        refusal = read_refusal(error)
        if refusal is None:
            raise
        return _refused(config, topology, program, refusal, time.monotonic() - start)
    seconds = time.monotonic() - start
    text = compiled.as_text()
    if target is not None:
        write_text(target, text)
    return _analyse(config, topology, program, compiled, text, seconds)


def lower(program: Program) -> Any:
    """Returns the lowered step, on shapes: the text is the one that training compiles."""
    return program.step.lower(program.state, program.batch)


def _analyse(config: Config, topology: Topology, program: Program, compiled: Any, text: str, seconds: float) -> Plan:
    module = parse_module(text)
    counts = execution_counts(module, MIXED_SCOPE)
    memory = read_memory(compiled, module, state=program.state, batch=program.batch, folder=PACKAGE)
    cost = step_cost(module, kernel_cost=kernel_model(topology.chip), counts=counts, folder=PACKAGE)
    collectives = read_collectives(module, counts, program.mesh, folder=PACKAGE)
    traffic = sum_traffic(collectives)
    rows, tokens = config.train.batch_rows // config.train.microbatches, config.data.seq_len
    replicated = (
        *replicated_arguments(program.state),
        *replicated_activations(module, counts, program.mesh, rows=rows, tokens=tokens, folder=PACKAGE),
    )
    return Plan(
        **_heading(config, topology, program),
        verdict=_verdict(config, topology, program, memory.peak),
        memory=memory,
        cost=cost,
        traffic=traffic,
        replicated=replicated,
        prediction=_predict(config, topology, cost, traffic),
        refusal=None,
        compile_seconds=seconds,
    )


def _refused(config: Config, topology: Topology, program: Program, refusal: Refusal, seconds: float) -> Plan:
    return Plan(
        **_heading(config, topology, program),
        verdict=_verdict(config, topology, program, refusal.needed),
        memory=None, cost=None, traffic=None, replicated=None, prediction=None, refusal=refusal,
        compile_seconds=seconds,
    )  # fmt: skip


def _heading(config: Config, topology: Topology, program: Program) -> dict[str, Any]:
    shape = " x ".join(f"{axis} {size}" for axis, size in program.mesh.shape.items() if size > 1)
    return {
        "name": config.name,
        "topology": str(topology),
        "mesh": shape or "1 device",
        "devices": topology.devices,
        "tokens_per_step": config.train.batch_rows * config.data.seq_len,
        "remat": config.model.remat,
        "kept_bytes": _kept_bytes(config, program),
        "microbatches": config.train.microbatches,
        "versions": compiler_versions(),
    }


def _kept_bytes(config: Config, program: Program) -> int | None:
    """Returns the bytes that all layers keep on one device for the backward pass, by the remat policy.

    Where rows are cut over devices the incoming fast-weight states are among them.
    """
    model, mesh = config.model, program.mesh
    values = kept_values(model, pieces_of(mesh, "mlp"))
    if values is None:
        return None
    rows = config.train.batch_rows // (config.train.microbatches * pieces_of(mesh, "batch"))
    tokens = rows * config.data.seq_len // pieces_of(mesh, "tokens")
    kept = values * tokens * model.num_layers * (2 if model.compute_dtype == "bfloat16" else 4)
    if model.ttt is not None and pieces_of(mesh, "tokens") > 1:
        kept += len(model.ttt.layers) * rows * model.d_model * model.d_ff // pieces_of(mesh, "mlp") * 4
    return kept


def compiler_versions() -> dict[str, str]:
    """Returns the versions of what made the text: predictions of different ones must not be compared."""
    return {package: importlib.metadata.version(package) for package in VERSIONS}


def _verdict(config: Config, topology: Topology, program: Program, needed: int) -> Verdict:
    return verdict(needed, topology.chip, config, batch_pieces=pieces_of(program.mesh, "batch"))


def kernel_model(chip: Chip) -> KernelModel:
    """Returns the price of Pallas calls: measured for attention and scans, a stated part of the peak for others."""
    fallback = stated_kernel_cost(
        peak_flops_per_second=chip.device_peak_flops, matmul_efficiency=OTHER_KERNELS_EFFICIENCY,
        bytes_per_second=chip.device_hbm_bytes_per_second, cycles_per_second=chip.clock_hz,
    )  # fmt: skip
    return attention_model(chip, scan_model(chip, fallback))


def _predict(config: Config, topology: Topology, cost: Cost, traffic: Sequence[Traffic]) -> Prediction:
    compute = cost.cycles / topology.chip.clock_hz
    synchronous = sum((row.synchronous_seconds for row in traffic), 0.0)
    overlapped = sum((row.overlapped_seconds for row in traffic), 0.0)
    step = max(compute + synchronous, overlapped)
    tokens = config.train.batch_rows * config.data.seq_len
    flops = tokens * model_flops_per_token(config.model, config.data.seq_len)
    return Prediction(
        step_seconds=step,
        compute_seconds=compute,
        synchronous_seconds=synchronous,
        overlapped_seconds=overlapped,
        tokens_per_second_per_chip=tokens / step / topology.chips,
        mfu=flops / (step * topology.chips * topology.chip.peak_flops),
        unknown=_unknown_work(cost, topology.chip, step),
        unknown_seconds=sum((_moving_seconds(item, topology.chip) for item in cost.missing), 0.0),
    )


def _moving_seconds(item: Unpriced, chip: Chip) -> float:
    return item.runs * item.bytes / chip.device_hbm_bytes_per_second


def _unknown_work(cost: Cost, chip: Chip, step_seconds: float) -> tuple[str, ...]:
    """Returns ``Prediction.unknown``."""
    seconds: dict[str, float] = defaultdict(float)
    for item in (item for item in cost.unpriced if item.category != COLLECTIVE):
        seconds[f"{item.opcode} at {item.line or item.name}"] += (
            math.inf if item.written else _moving_seconds(item, chip)
        )
    return tuple(sorted(name for name, least in seconds.items() if least > NEGLIGIBLE * step_seconds))
