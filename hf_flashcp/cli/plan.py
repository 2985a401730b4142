"""`flashcp plan`: show how documents would be sharded, and what that costs. Does not need torch."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any, NamedTuple

from ..errors import PlanError
from ..plan import ShardPlan, Topology
from ..plan.kernel_calls import GRIDS
from ..plan.slices import rank_pairs
from ..planning import DEFAULT_STRATEGY, STRATEGIES, PlanSettings, plan_with
from ..planning.explanation import Choice, Limits, other_choices, seconds_bound, step_limits
from ..predict import CostModel, HardwareProfile, StepTime
from ..predict.model_shape import ModelShape
from ..tables import GIB, counted, table
from . import options
from .plan_explain import explanation_lines
from .plan_plot import plot_plan


MAX_LISTED_SLICES = 12
"""The slices themselves are listed below the table if no rank has more than this many."""

_SLICES_PER_LINE = 4
_ITEMSIZE = 2  # bytes per element of KV, whose price states are compared with


def add_parser(commands) -> None:
    parser = commands.add_parser(
        "plan",
        help="show how documents would be sharded over ranks, and what that costs",
        description="Plans one packed batch, and prints the tokens, attention work and KV traffic of every rank.",
    )
    options.add_documents(parser)
    options.add_number(parser, "--cp-size", text="context-parallel ranks", required=True)
    parser.add_argument("--strategy", choices=STRATEGIES, default=DEFAULT_STRATEGY, help=options.STRATEGY)
    parser.add_argument(
        "--max-imbalance",
        type=float,
        default=1.05,
        metavar="R",
        help="cap on attention pairs per rank, max / mean (default 1.05)",
    )
    parser.add_argument(
        "--max-token-imbalance",
        type=float,
        default=1.0,
        metavar="R",
        help="cap on tokens per rank, max / mean (default 1.0)",
    )
    parser.add_argument(
        "--sliding-window",
        type=int,
        metavar="W",
        help="also report the costs of layers with a sliding window of W keys",
    )
    options.add_number(
        parser,
        "--ranks-per-node",
        text="ranks that share a node: KV is sent to each node once, traffic between nodes is reported separately, "
        "and the strategy search reduces it (default: the hardware profile's)",
    )
    parser.add_argument(
        "--kernel",
        choices=GRIDS,
        default="torch_flash",
        help="attention kernel whose calls and thread blocks are counted (default torch_flash)",
    )
    options.add_hardware(parser, "predict step times with this profile, and minimize them with the strategy search:")
    options.add_model(parser, "(for --hardware, and to count the states of recurrent layers)")
    parser.add_argument(
        "--explain",
        action="store_true",
        help="also say what limits the predicted step, and what other choices would give; needs --hardware and "
        "--model",
    )
    options.add_json(parser, "plan, report and digest")
    options.add_plot(parser, "the plan")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Plan, draw if asked to, and print."""
    (lengths,) = options.documents(arguments)
    if arguments.hardware is not None and arguments.model is None:
        raise PlanError("--hardware needs --model: times depend on both.")
    if arguments.explain and (arguments.hardware is None or arguments.model is None):
        raise PlanError("--explain needs --hardware and --model: it explains a predicted step.")
    given = topology = None if arguments.ranks_per_node is None else Topology(arguments.ranks_per_node)
    searched, cost_model, state_tokens = arguments.strategy == "search", None, 0.0
    config = None if arguments.model is None else options.read_config(arguments.model)
    shape = None if config is None else ModelShape.from_config(config)
    if arguments.hardware is not None:
        profile = HardwareProfile.load(arguments.hardware)
        topology = given or Topology(profile.ranks_per_node)
        profile = dataclasses.replace(profile, ranks_per_node=topology.ranks_per_node)
        cost_model = CostModel.from_config(config, profile)
    elif shape is not None and searched:
        state_tokens = shape.state_tokens(_ITEMSIZE)
    settings = PlanSettings(
        arguments.cp_size,
        arguments.strategy,
        cost_model=cost_model if searched else None,
        topology=None if searched and cost_model is not None else given,
        max_imbalance=arguments.max_imbalance,
        max_token_imbalance=arguments.max_token_imbalance,
        state_tokens=state_tokens,
    )
    plan = plan_with(settings, lengths)
    planned = _Planned(
        plan,
        arguments.strategy,
        arguments.sliding_window,
        _predicted(plan, settings, cost_model, arguments.explain) if cost_model else None,
        topology,
        arguments.kernel,
        shape,
    )
    # Reports come first, so that an invalid sliding window is an error before anything is drawn.
    shown = _as_dict(planned) if arguments.json else _text(planned)
    if arguments.plot:
        plot_plan(plan, arguments.plot, strategy=arguments.strategy)
    options.show(shown, str, arguments.json)


class _Predicted(NamedTuple):
    """What is predicted of a plan's step."""

    time: StepTime
    bound: float | None  # seconds of the lower bound, if the plan is within the caps
    explained: tuple[Limits, list[Choice]] | None  # with --explain

    def to_dict(self) -> dict[str, Any]:
        seconds = self.time.seconds
        over = None if self.bound is None else seconds / self.bound
        found: dict[str, Any] = {
            "step_time": self.time.to_dict(),
            "lower_bound": {"seconds": self.bound, "step_over_bound": over},
        }
        if self.explained:
            limits, choices = self.explained
            found["explanation"] = {
                "limits": limits._asdict(),
                "choices": [{**each._asdict(), "over_this": each.seconds / seconds} for each in choices],
            }
        return found


def _predicted(plan: ShardPlan, settings: PlanSettings, cost_model: CostModel, explain: bool) -> _Predicted:
    bound = seconds_bound(plan, cost_model, settings.max_imbalance, settings.max_token_imbalance)
    explained = None
    if explain:
        explained = step_limits(plan, cost_model), other_choices(plan, settings, cost_model)
    return _Predicted(cost_model.step_time(plan), bound, explained)


class _Planned(NamedTuple):
    """A plan, and what the command reports about it."""

    plan: ShardPlan
    strategy: str
    sliding_window: int | None
    predicted: _Predicted | None
    topology: Topology | None
    kernel: str
    shape: ModelShape | None

    @property
    def state_bytes(self) -> int:
        """Bytes of a slice's state in all recurrent layers; 0 if the model has none."""
        recurrent = self.shape.recurrent if self.shape else None
        return recurrent.count * recurrent.summary_bytes if recurrent else 0

    def report(self, topology: Topology | None, window: int | None = None) -> dict[str, Any]:
        """Return the plan's report with the kernel's calls."""
        query_heads = self.shape.layers[0].query_heads if self.shape and self.shape.layers else 32
        return self.plan.report(window, topology, self.kernel, query_heads)

    @property
    def slowest_rank(self) -> int:
        """The rank with the longest predicted step or, without a prediction, the most attention pairs."""
        if self.predicted is None:
            pairs = rank_pairs(self.plan.slices)
            return pairs.index(max(pairs))
        return int(self.predicted.time.of_ranks.argmax())


def _as_dict(planned: _Planned) -> dict[str, Any]:
    plan, window = planned.plan, planned.sliding_window
    found: dict[str, Any] = {
        "strategy": planned.strategy,
        "digest": plan.digest,
        "plan": plan.to_dict(),
        "kernel": planned.kernel,
        "slowest_rank": planned.slowest_rank,
        "report": planned.report(planned.topology),
    }
    if planned.predicted is not None:
        found |= planned.predicted.to_dict()
    if window is not None:
        found |= {"sliding_window": window, "sliding_window_report": planned.report(planned.topology, window)}
    return found


def _text(planned: _Planned) -> str:
    """Return the printed report: a table with one line per rank, then imbalances and traffic.

    Columns count tokens, except for slices, pairs and states. States are included for models with recurrent layers.
    Traffic between nodes is included if there are several nodes.
    """
    plan, topology = planned.plan, planned.topology
    if topology is not None and plan.cp_size <= topology.ranks_per_node:
        topology = None
    report = planned.report(topology)
    shown = {"tokens": "tokens", "pairs": "attention pairs", "kv_received": "KV received", "kv_sent": "KV sent"}
    if planned.state_bytes:
        shown |= {"states_received": "states received", "states_sent": "states sent"}
    if topology is not None:
        shown |= {"inter_node_received": "from other nodes", "inter_node_sent": "to other nodes"}
    columns = [list(map(len, plan.slices)), *(report[key] for key in shown)]
    rows = [*zip(range(plan.cp_size), *columns), ("sum", *map(sum, columns))]
    lines = [
        f"{counted(len(plan.lengths), 'document')}, {counted(plan.num_tokens, 'token')}, "
        f"{counted(plan.cp_size, 'rank')}, strategy {planned.strategy}",
        "",
        table(dict.fromkeys(("rank", "slices", *shown.values()), ","), rows),
        "",
        f"imbalance (max / mean)  tokens {report['token_imbalance']:.3f}, "
        f"attention pairs {report['pair_imbalance']:.3f}",
        f"KV moved                {report['kv_total']:,} tokens of an all-gather's {report['kv_all_gather']:,} "
        f"({report['kv_fraction']:.1%})",
        *([_state_line(report, planned)] if planned.state_bytes else []),
        *([] if topology is None else [_node_line(report, topology)]),
        *_kernel_lines(report, planned),
        *([] if planned.sliding_window is None else _window_lines(planned, planned.sliding_window)),
        *([] if planned.predicted is None else _time_lines(planned.predicted)),
        f"digest                  {plan.digest}",
    ]
    if max(columns[0]) <= MAX_LISTED_SLICES:
        lines += ["", *_listed_slices(plan)]
    if planned.predicted is not None and planned.predicted.explained:
        lines += ["", *explanation_lines(*planned.predicted.explained)]
    return "\n".join(lines)


def _state_line(report: dict[str, Any], planned: _Planned) -> str:
    received = max(report["states_received"]) * planned.state_bytes / GIB
    return (
        f"states moved            {sum(report['states_received']):,} in each recurrent layer; at most "
        f"{received:,.2f} GiB to a rank in all of them"
    )


def _node_line(report: dict[str, Any], topology: Topology) -> str:
    inside, between = (sum(report[f"{link}_node_received"]) for link in ("intra", "inter"))
    return (
        f"  in nodes of {topology.ranks_per_node:<10}{inside:,} inside, {between:,} between "
        f"({between / max(inside + between, 1):.1%})"
    )


def _kernel_lines(report: dict[str, Any], planned: _Planned) -> list[str]:
    rank, which = planned.slowest_rank, "the slowest" if planned.predicted else "which has the most attention pairs"
    calls, started, useful = (report[name][rank] for name in ("varlen_calls", "blocks_started", "blocks_useful"))
    return [
        f"kernel calls            {calls:,} of {planned.kernel} per layer on rank {rank}, {which}",
        f"  blocks started        {started:,} per query head",
        f"  blocks useful         {useful:,} ({useful / started:.1%})",
    ]


def _window_lines(planned: _Planned, window: int) -> list[str]:
    report = planned.report(None, window)
    return [
        f"with a sliding window of {window:,}",
        f"  attention pairs       {sum(report['pairs']):,}, imbalance {report['pair_imbalance']:.3f}",
        f"  KV moved              {report['kv_total']:,} tokens ({report['kv_fraction']:.1%})",
        *(f"  {line}" for line in _kernel_lines(report, planned)),
    ]


def _time_lines(predicted: _Predicted) -> list[str]:
    time, bound = predicted.time, predicted.bound
    over = "ranks beyond the caps: no bound" if bound is None else f"{time.seconds / bound:.2f} x the lower bound"
    mean, scan = time.attention.mean(), time.scan.max()
    return [
        f"predicted step          {1000 * time.seconds:,.1f} ms on the slowest rank, {over}",
        f"  attention             {1000 * time.attention_seconds:,.1f} ms including waiting, "
        f"{time.attention_seconds / mean:.3f} x the mean kernel time",
        *([f"  recurrent layers      {1000 * scan:,.1f} ms of scans"] if scan else []),
        f"  transfer              {1000 * time.transfer.max():,.1f} ms on the wire, "
        f"of which {1000 * time.exposed.max():,.1f} ms are not hidden by attention",
    ]


def _listed_slices(plan: ShardPlan) -> list[str]:
    named = [[f"doc {document} [{start}, {stop})" for document, start, stop in slices] for slices in plan.slices]
    width = max(len(name) for names in named for name in names)
    margin = len(f"rank {plan.cp_size - 1}")
    lines = []
    for rank, names in enumerate(named):
        for first in range(0, len(names), _SLICES_PER_LINE):
            label = "" if first else f"rank {rank}"
            cells = [label.ljust(margin), *(name.ljust(width) for name in names[first : first + _SLICES_PER_LINE])]
            lines.append("  ".join(cells).rstrip())
    return lines
