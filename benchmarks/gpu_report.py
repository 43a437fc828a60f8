"""Tables, goals and what was missed, from the result file of the GPU benchmark."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from benchmarks import gpu_cases, gpu_graphs, memory
from benchmarks.gpu_results import Row
from benchmarks.gpu_roofline import Ceilings, Estimate, convolution, dense_linear, tiled_linear
from examples.documents import fill, markdown

# Of the speed-up that the model allows.
GOAL = 0.8


def ceilings(result: Mapping[str, Any]) -> Ceilings | None:
    """What the card reached, if that was measured."""
    found = result.get("ceilings")
    return None if found is None else Ceilings(**found)


def measured(result: Mapping[str, Any], part: str, kind: str | None = None) -> list[Row]:
    """The rows of a part that did not fail."""
    rows = [row for row in result["cases"].values() if row["part"] == part and "failed" not in row]
    return [row for row in rows if kind is None or row.get("kind") == kind]


def goal(m: int, n: int, batch: int, p: int, card: Ceilings) -> float | None:
    """The speed-up over cuBLAS inside a graph that is aimed at; ``None``: none is set.

    Large layers have one, at one row of input and at many.
    """
    if m * n < 4096 * 4096 or 1 < batch < 256:
        return None
    return GOAL * dense_linear(m, n, batch, card).us / tiled_linear(m, n, batch, p, card).us


def linear(result: Mapping[str, Any]) -> list[Row]:
    """Tiled layers beside cuBLAS."""
    dense = {(row["out"], row["in"], row["batch"]): row for row in measured(result, "linear", "dense")}
    card = ceilings(result)
    rows = []
    for row in _sorted(measured(result, "linear", "tiled")):
        m, n, batch, p = row["out"], row["in"], row["batch"], row["p"]
        peer = dense.get((m, n, batch))
        made: Row = {"out x in": f"{m} x {n}", "batch": batch, "p": p}
        made["cuBLAS us"] = peer["graph_us"] if peer else None
        made["us"] = row["graph_us"]
        made["times faster"] = peer["graph_us"] / row["graph_us"] if peer else None
        if card is not None:
            made["model allows us"] = tiled_linear(m, n, batch, p, card).us
            made["goal, times"] = goal(m, n, batch, p, card)
        made["launched by Python us"] = row["eager_us"]
        made["one of many calls us"] = row["wall_us"]
        rows.append(made)
    return rows


def dense(result: Mapping[str, Any]) -> list[Row]:
    """CuBLAS alone."""
    return [
        {
            "out x in": f"{row['out']} x {row['in']}",
            "batch": row["batch"],
            "cuBLAS us": row["graph_us"],
            "launched by Python us": row["eager_us"],
            "one of many calls us": row["wall_us"],
        }
        for row in _sorted(measured(result, "linear", "dense"))
    ]


def passed_on(result: Mapping[str, Any]) -> list[Row]:
    """Layers that write their different rows or channels only."""
    rows: list[Row] = []
    for row in _sorted(measured(result, "linear", "passed on")):
        what = f"linear {row['out']} x {row['in']}, batch {row['batch']}, p {row['p']}"
        rows.append({"layer": what, "different rows us": row["graph_us"], "library's us": row["library_us"]})
    for row in measured(result, "conv", "passed on"):
        what = f"conv {row['channels']} channels, {row['size']} x {row['size']}, {row['images']} images, p {row['p']}"
        rows += [
            {"layer": f"{what}, {name}", "different rows us": row[name], "library's us": row[f"library {name}"]}
            for name in gpu_cases.FORMATS
        ]
    return rows


def conv(result: Mapping[str, Any]) -> list[Row]:
    """Convolutions beside cuDNN, both memory formats, the better of each compared."""
    peers = {(row["channels"], row["size"], row["images"]): row for row in measured(result, "conv", "dense")}
    card = ceilings(result)
    rows = []
    for row in sorted(measured(result, "conv", "tiled"), key=lambda r: (r["channels"], r["images"], r["p"])):
        channels, size, images, p = (row[key] for key in ("channels", "size", "images", "p"))
        peer = peers.get((channels, size, images))
        made: Row = {"channels": channels, "size": size, "images": images, "p": p}
        for name in gpu_cases.FORMATS:
            made[f"cuDNN {name} us"] = peer[name] if peer else None
            made[f"{name} us"] = row[name]
        best = min(row[name] for name in gpu_cases.FORMATS)
        made["times faster"] = min(peer[name] for name in gpu_cases.FORMATS) / best if peer else None
        if card is not None:
            allowed = convolution(channels, size, images, 1, card).us / convolution(channels, size, images, p, card).us
            made["goal, times"] = GOAL * allowed
        rows.append(made)
    return rows


def graphs(result: Mapping[str, Any]) -> list[Row]:
    """Whole models: microseconds an inference, dense and packed."""
    found: dict[tuple[str, int], dict[str, Row]] = {}
    for row in measured(result, "graphs"):
        found.setdefault((row["model"], row["batch"]), {})[row["way"]] = row
    rows = []
    for (model, batch), ways in sorted(found.items()):
        made: Row = {"model": model, "batch": batch}
        eager = ways.get("eager", {})
        made |= {"dense us": eager.get("dense_us"), "packed us": eager.get("us")}
        made |= {"dense, graph us": eager.get("dense_graph_us"), "packed, graph us": eager.get("graph_us")}
        for way in gpu_graphs.WAYS:
            if way != "eager":
                made[f"{way} us"] = ways.get(way, {}).get("us")
        rows.append(made)
    return rows


def peers(result: Mapping[str, Any]) -> list[Row]:
    """Other packages' layers."""
    return [
        {"package": row["peer"], "layer": "", "batch": "", "us": row["absent"]}
        if "absent" in row
        else {
            "package": row["peer"],
            "layer": f"{row['out']} x {row['in']}",
            "batch": row["batch"],
            "us": row["graph_us"],
        }
        for row in measured(result, "peers")
    ]


def _sorted(rows: Sequence[Row]) -> list[Row]:
    return sorted(rows, key=lambda row: (row["out"] * row["in"], row["out"], row["batch"], row.get("p", 0)))


TABLES: dict[str, Callable[[Mapping[str, Any]], list[Row]]] = {
    "linear": linear,
    "dense": dense,
    "passed on": passed_on,
    "conv": conv,
    "graphs": graphs,
    "peers": peers,
}


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as a Markdown table, a column for each key."""

    def text(value: Any) -> str:
        if value is None:
            return ""
        if isinstance(value, float):
            return f"{value:.2g}" if abs(value) < 0.01 else f"{value:.2f}" if value < 100 else f"{value:.0f}"
        return str(value)

    titles = list(rows[0])
    return markdown(titles, [[text(row[title]) for title in titles] for row in rows], left=())


def memory_table(result: Mapping[str, Any]) -> str:
    """Table 7, and what the libraries' workspaces add."""
    rows = {row["column"]: row for row in measured(result, "memory") if row["model"] == "ViT"}
    found = {column: rows[column] for column in memory.CONFIGS if column in rows}
    peaks = {column: row["peak"] / memory.MIB for column, row in found.items()}
    more = {column: (row["peak"] + row["library_workspace"]) / memory.MIB for column, row in found.items()}
    return memory.table(peaks, "ViT, measured without the library's workspace [MiB]", more)


def tables(result: Mapping[str, Any]) -> dict[str, str]:
    """The tables of a result, by their names in docs/gpu.md."""
    found = {name: table(rows) for name, make in TABLES.items() if (rows := make(result))}
    if any(row["model"] == "ViT" for row in measured(result, "memory")):
        found["memory"] = memory_table(result)
    return found


def wrong(result: Mapping[str, Any]) -> list[str]:
    """Results that differ from the reference."""
    lines = []
    for name, row in result["cases"].items():
        limit = gpu_graphs.TOLERANCE if row["part"] == "graphs" else gpu_cases.TOLERANCE
        lines += [
            f"WRONG RESULT ({key} {row[key]:.2g}): {name}"
            for key in ("error", "changed_error")
            if key in row and not row[key] <= limit
        ]
    return lines


def _missed(rows: Sequence[Row], words: Sequence[str], why: Callable[[Row], str]) -> Iterator[str]:
    for row in rows:
        aim, reached = row.get("goal, times"), row["times faster"]
        if aim is not None and reached is not None and reached < aim:
            case = ", ".join(f"{word} {row[word]}" for word in words)
            yield f"{reached:.2f} of {aim:.2f} times: {case}; {why(row)}"


def misses(result: Mapping[str, Any]) -> list[str]:
    """Goals that are not met, each with where the model says that the time should go."""
    card = ceilings(result)
    lines: list[str] = []
    if card is not None:

        def allowed(row: Row) -> Estimate:
            m, n = map(int, row["out x in"].split(" x "))
            return tiled_linear(m, n, row["batch"], row["p"], card)

        def even(row: Row) -> Estimate:
            return convolution(row["channels"], row["size"], row["images"], row["p"], card)

        best = [f"{name} us" for name in gpu_cases.FORMATS]
        lines += _missed(linear(result), ["out x in", "batch", "p"], lambda r: f"{r['us']:.1f} us, model {allowed(r)}")
        lines += _missed(
            conv(result),
            ["channels", "size", "images", "p"],
            lambda r: f"{min(r[name] for name in best):.1f} us, limit {even(r)}",
        )
    for row in measured(result, "memory"):
        if row["model"] == "ViT" and row["peak"] / memory.MIB > memory.PAPER[row["column"]][0]:
            peak, paper = row["peak"] / memory.MIB, memory.PAPER[row["column"]][0]
            workspace = row["library_workspace"] / memory.MIB
            lines.append(
                f"{row['column']}: peak {peak:.1f} MiB, paper {paper} (and a workspace of {workspace:.1f} MiB)"
            )
    return lines


def failures(result: Mapping[str, Any]) -> list[str]:
    """Cases that gave no row."""
    return [f"{name}: {row['failed']}" for name, row in result["cases"].items() if "failed" in row]


def described(result: Mapping[str, Any]) -> str:
    """The machine and its ceilings, as a sentence each."""
    text = "Measured: " + ", ".join(f"{key} {value}" for key, value in result["machine"].items()) + "."
    card = ceilings(result)
    if card is None:
        return text
    return (
        f"{text} A copy reaches {card.bytes_per_us / 1e6:.2f} TB/s, a product of bf16 matrices "
        f"{card.flop_per_us / 1e6:.0f} TFLOP/s; a kernel that adds one number takes {card.empty_us:.2f} us between the "
        "events, and every time in a graph holds that."
    )


def fill_document(result: Mapping[str, Any], document: str) -> str:
    """``document`` with the tables of a result, and the machine."""
    return fill(document, tables(result) | {"machine": described(result)})
