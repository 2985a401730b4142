"""Reads traces of PyTorch's profiler: allocations, and the time that each part of a step takes."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch.profiler import profile


FORWARD_DONE = "forward is done"
"""Name of a range between forward and backward."""

STEP, BACKWARD, OPTIMIZER, LAYER = "step", "backward", "optimizer", "layer"
"""Names of ranges: the whole step, its backward, the clipping and update after it, and the forward of one layer."""

WAIT = "flashcp: wait for"
_ATTENTION = ("flashcp::attention", "autograd::engine::evaluate_function: _DocumentAttentionBackward")
_LINEAR = ("aten::mm", "aten::addmm", "aten::bmm", "aten::_grouped_mm")
_NODE = "autograd::engine::evaluate_function: "

PARTS = ("linear", "attention", "waiting", "gradients", "optimizer", "other")

Span = tuple[float, float]


def trace_events(profiler: profile) -> list[dict[str, Any]]:
    """Return the events of a profiler that has stopped.

    `ts` and `dur` are in microseconds; all processes of a machine use the same clock.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        trace = json.loads(path.read_text(encoding="utf-8"))
    return [event for event in trace["traceEvents"] if "ts" in event]


def kept_and_peak(events: Iterable[dict[str, Any]]) -> tuple[int, int]:
    """Return the live bytes at the end of forward, and the peak of live bytes.

    Live bytes have been allocated since the profiler started and not been released.
    """
    live = kept = peak = 0
    for event in sorted((e for e in events if e["name"] in ("[memory]", FORWARD_DONE)), key=lambda e: e["ts"]):
        if event["name"] == FORWARD_DONE:
            kept = live
        else:
            live += event["args"]["Bytes"]
            peak = max(peak, live)
    return kept, peak


def seconds_by_part(events: Iterable[dict[str, Any]]) -> dict[str, float]:
    """Return the seconds of a step on CPU by `PARTS`, which add up to the time of the step.

    - `linear`: matrix products outside attention.
    - `attention`: this library, without waiting.
    - `waiting`: waiting for keys, values and their gradients.
    - `gradients`: the all-reduce after the last gradient has been computed.
    - `optimizer`: clipping and the update.
    - `other`: everything else.
    """
    spans = _spans(events)
    (step,) = spans[STEP]
    (backward,) = spans[BACKWARD]
    nodes = [end for name, found in spans.items() if name.startswith(_NODE) for _, end in found]
    by_part = {
        "waiting": [span for name, found in spans.items() if name.startswith(WAIT) for span in found],
        "attention": [span for name in _ATTENTION for span in spans.get(name, ())],
        "linear": [span for name in _LINEAR for span in spans.get(name, ())],
        "optimizer": spans[OPTIMIZER],
        "gradients": [(max(nodes), backward[1])],
    }
    seconds, covered = {}, []
    for part, found in by_part.items():
        before, covered = _length(covered), _union([*covered, *found])
        seconds[part] = _length(covered) - before
    seconds["other"] = step[1] - step[0] - _length(covered)
    return {part: seconds[part] / 1e6 for part in PARTS}


def layer_bars(events: Iterable[dict[str, Any]]) -> dict[str, list[tuple[str, float, float]]]:
    """Return the ranges of one layer, for "forward" and "backward", as `(name, begin, end)` in seconds.

    The layer is the one whose forward is a range `LAYER`. Its own range comes first, then those of attention and of
    matrix products. Sequence numbers, which autograd gives to an operator and its backward node, tell which ranges
    belong to the layer's backward.
    """
    events = list(events)
    spans = _spans(events)
    (forward,) = spans[LAYER]
    inside = [e for e in events if "dur" in e and _within((e["ts"], e["ts"] + e["dur"]), forward)]
    numbers = {e["args"]["Sequence number"] for e in inside if "Sequence number" in e.get("args", ())}
    nodes = [e for e in events if e["name"].startswith(_NODE) and e["args"].get("Sequence number") in numbers]
    backward = min(e["ts"] for e in nodes), max(e["ts"] + e["dur"] for e in nodes)
    attention = [span for name in _ATTENTION for span in spans.get(name, ())]
    bars = {}
    for name, ranges in spans.items():
        if name.startswith("flashcp: "):
            bars[name.removeprefix("flashcp: ")] = ranges
        elif name in _LINEAR:
            outside = [span for span in ranges if not any(_within(span, other) for other in attention)]
            bars.setdefault("linear", []).extend(outside)
    return {
        direction: [
            (name, begin / 1e6, end / 1e6)
            for name, ranges in {LAYER: [whole], **bars}.items()
            for begin, end in ranges
            if _within((begin, end), whole)
        ]
        for direction, whole in (("forward", forward), ("backward", backward))
    }


def _within(span: Span, other: Span) -> bool:
    return other[0] <= span[0] and span[1] <= other[1]


def _spans(events: Iterable[dict[str, Any]]) -> dict[str, list[Span]]:
    """Return the spans, by name, of the thread that runs the step (on CPU, also its backward)."""
    events = [event for event in events if "dur" in event]
    thread = next(event["tid"] for event in events if event["name"] == STEP)
    spans: dict[str, list[Span]] = {}
    for event in events:
        if event["tid"] == thread:
            spans.setdefault(event["name"], []).append((event["ts"], event["ts"] + event["dur"]))
    return spans


def _union(spans: list[Span]) -> list[Span]:
    merged: list[Span] = []
    for begin, end in sorted(spans):
        if merged and begin <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(merged[-1][1], end)
        else:
            merged.append((begin, end))
    return merged


def _length(spans: list[Span]) -> float:
    return sum(end - begin for begin, end in spans)
