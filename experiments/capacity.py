"""Measures how many pairs memories recall, without training.

    python -m experiments.capacity --config=configs/capacity.py --workdir=FOLDER

Writes random pairs of keys and values of norm one into each rule, alone and with cached segments,
and asks for the pairs so far: how often the read is nearest to the right value, and its
signal-to-noise ratio. For comparison it measures softmax attention over all pairs, the theory of
linear memories, the share of questions for which SSC's router finds the segment, and GRM that keeps
the tokens that each cached state recalls worst beside it. Rules write without decay and with the
coefficients of ``experiments._capacity.rules``.

Then it draws keys whose topic changes after random numbers of pairs, and counts how often a router
finds a key's own segment, where segments have one size and where they follow the content, and
measures recall there, of random values and of values that are a rotation of their topic's keys.
Last, it counts for how many questions about ``router_pairs`` pairs a router finds the segment if
states have several pooled keys. For routers that search a ``Tree``, it reports the keys that a
question is compared with, how often they find the segment, and the processor time per token of a
stream with so many cached states.

The workdir gets ``results.json``, ``table.md``, ``borders.md``, ``recall.md``, ``router.md``,
``tree.md`` and ``capacity.png``.
"""

import itertools
from typing import Any

import numpy as np

import memcache_jax as mc
from experiments._borders import draw_topics, draw_values, measure_recall, measure_router
from experiments._capacity import (
    draw_pairs,
    draw_questions,
    linear_snr,
    measure_attention,
    measure_memory,
    router_hits,
    rules,
    step_seconds,
)
from experiments._study import Case, Row, Study, new_figure, run

KEYS = (
    *("dim", "pairs", "trials", "questions", "temperature", "enough", "report", "keys"),
    *("alone_every", "rules", "cached_rules", "segments", "aggregations", "top_k", "num_keys"),
    *("exact", "router_pairs", "router_keys", "router_top_k"),
    *("trees", "tree_states", "tree_segment", "tree_top_k", "tree_keys", "tree_trials"),
    *("seed", "borders", "topic_pairs", "topic_correlations", "recall_borders", "recall_beta"),
)
ALONE, ATTENTION = "alone", "attention"


def groups(config: Any) -> list[list[Case]]:
    """The cases, those of one program together.

    Raises:
      ValueError: for unknown rules, or segments that do not end at ``config.report`` pairs.
    """
    known = rules()
    for every in (config.alone_every, *config.segments):
        if config.report % every or config.pairs % every:
            raise ValueError(
                f"segments and alone_every must divide report, {config.report}, and pairs, "
                f"{config.pairs}, got {every}"
            )
    for name in (*config.rules, *config.cached_rules):
        if name not in known:
            raise ValueError(f"rules must be of {', '.join(known)}, got {name}")
    readers: list[dict] = [dict(rule=ATTENTION, reader=ATTENTION, segment=None)]
    readers += [dict(rule=rule, reader=ALONE, segment=None) for rule in config.rules]
    for rule in config.cached_rules:
        deep = known[rule].memory.depth > 1
        for segment in config.segments:
            for name in config.aggregations:
                if name == "Soup" and not deep:
                    continue  # GRM, for a matrix
                options = itertools.product(
                    config.top_k if name == "SSC" else (None,),
                    config.num_keys if name in ("GRM", "SSC") else (1,),
                )
                reader = dict(rule=rule, reader=name, segment=segment)
                readers += [reader | dict(top_k=top_k, num_keys=count) for top_k, count in options]
                if name == "GRM":
                    readers += [
                        reader | dict(top_k=None, num_keys=1, exact=exact)
                        for exact in config.exact
                        if 2 * exact <= segment
                    ]
    common = {
        name: config[name]
        for name in ("dim", "pairs", "trials", "questions", "temperature", "alone_every", "seed")
    }
    for reader in readers:  # what results depend on
        if reader["rule"] != ATTENTION:
            reader["coefficients"] = dict(known[reader["rule"]].controls)
    return [
        [
            common | reader | dict(keys=name, correlation=rho, topic=topic)
            for name, rho, topic in config["keys"]
        ]
        for reader in readers
    ]


def router_groups(config: Any) -> list[list[Case]]:
    """The cases of routers, those of one size of segments together."""
    names = "dim", "trials", "questions", "seed"
    common = {name: config[name] for name in names} | dict(pairs=config.router_pairs)
    return [
        [
            common
            | dict(router=segment, num_keys=count, top_k=top_k)
            | dict(keys=name, correlation=rho, topic=topic)
            for count in sorted({*config.router_keys, segment})
            if segment % count == 0
            for top_k in config.router_top_k
            for name, rho, topic in config["keys"]
        ]
        for segment in config.segments
    ]


def tree_groups(config: Any) -> list[list[Case]]:
    """The cases of routers with and without a tree, grouped by number of states."""
    common = dict(dim=config.dim, questions=config.questions, seed=config.seed, num_keys=1)
    common |= dict(router=config.tree_segment, trials=config.tree_trials, top_k=config.tree_top_k)
    return [
        [
            common
            | dict(states=states, pairs=states * config.tree_segment, tree=tree)
            | dict(keys=name, correlation=rho, topic=topic)
            for tree in [None, *map(list, config.trees)]
            for name, rho, topic in config.tree_keys
        ]
        for states in config.tree_states
    ]


def step_groups(config: Any) -> list[list[Case]]:
    """The cases of routers' time, grouped by number of states."""
    return [
        [
            dict(states=states, top_k=config.tree_top_k, tree=tree, dim=64)
            for tree in [None, *map(list, config.trees)]
        ]
        for states in config.tree_states
    ]


def measure_steps(cases: list[Case]) -> list[Row]:
    """Measures the time per token."""
    return [
        dict(
            seconds=step_seconds(
                mc.SSC(case["top_k"], router=tree_of(case)), case["states"], case["dim"], steps=50
            )
        )
        for case in cases
    ]


def tree_of(case: Case) -> mc.Tree | None:
    """The router's tree, from its branching and beam; None without one."""
    return mc.Tree(*case["tree"]) if case.get("tree") else None


def measure_routers(cases: list[Case]) -> list[Row]:
    """Measures routers among segments of one size, after all pairs."""
    rows = []
    for case in cases:
        sizes = case["trials"], case["pairs"]
        keys, _ = draw_pairs(case["seed"], *sizes, case["dim"], case["correlation"], case["topic"])
        asked = draw_questions(case["seed"] + 1, *sizes, case["router"], case["questions"])
        how = case["top_k"], case["num_keys"]
        found = router_hits(keys, asked, *how, last=True, tree=tree_of(case))
        rows.append(dict(found=found[-1]))
    return rows


def border_groups(config: Any) -> list[list[Case]]:
    """The cases of segmentations, those of one segmentation together."""
    common = {name: config[name] for name in ("dim", "trials", "seed")}
    common |= dict(pairs=2 * config.pairs, lengths=list(config.topic_pairs))
    return [
        [common | dict(borders=borders, correlation=rho) for rho in config.topic_correlations]
        for borders in [None, *map(dict, config.borders)]
    ]


def measure_borders(cases: list[Case]) -> list[Row]:
    """Measures cases of one segmentation."""
    rows = []
    for case in cases:
        names = ("seed", "trials", "pairs", "dim", "correlation", "lengths")
        drawn = draw_topics(**{name: case[name] for name in names})
        rows.append(measure_router(segmentation(case["borders"]), *drawn))
    return rows


def recall_groups(config: Any) -> list[list[Case]]:
    """The cases of recall with topics, those of one segmentation together."""
    names = "dim", "trials", "questions", "temperature", "seed"
    common = {name: config[name] for name in names} | dict(beta=config.recall_beta)
    common |= dict(pairs=2 * config.pairs, lengths=list(config.topic_pairs))
    common |= dict(correlation=config.topic_correlations[len(config.topic_correlations) // 2])
    return [
        [common | dict(recall_borders=borders, mapped=mapped) for mapped in (False, True)]
        for borders in map(dict, config.recall_borders)
    ]


def measure_recalls(cases: list[Case]) -> list[Row]:
    """Measures recall after all pairs with one segmentation."""
    rows = []
    for case in cases:
        names = ("seed", "trials", "pairs", "dim", "correlation", "lengths")
        keys, topic = draw_topics(**{name: case[name] for name in names})
        values = draw_values(case["seed"] + 1, keys, topic, case["mapped"])
        sizes = case["trials"], case["pairs"], case["pairs"], case["questions"]
        asked = draw_questions(case["seed"] + 2, *sizes)[:, 0]
        how = segmentation(case["recall_borders"])
        rates = case["beta"], case["temperature"]
        rows.append(measure_recall(how, keys, values, topic, asked, *rates))
    return rows


def segmentation(options: dict | None) -> mc.Segmentation | None:
    """The segmentation of a class name and its arguments; None for none.

    Raises:
      ValueError: for an unknown name.
    """
    if options is None:
        return None
    known = dict(Constant=mc.Constant, Adaptive=mc.Adaptive)
    arguments = dict(options)
    name = arguments.pop("name")
    if name not in known:
        raise ValueError(f"borders must be of {', '.join(known)}, got {name}")
    return known[name](**arguments)


def aggregation(name: str, top_k: int | None, num_keys: int = 1, exact: int = 0) -> mc.Aggregation:
    """The aggregation of a name, as ``measure_memory`` takes it.

    Raises:
      ValueError: for an unknown name.
    """
    if name in (ALONE, "Residual"):
        return mc.Residual()
    if name == "SSC":
        assert top_k is not None
        return mc.SSC(top_k=top_k, pooling="sum", num_keys=num_keys)
    if name not in ("GRM", "Soup"):
        raise ValueError(f"aggregations must be of Residual, GRM, Soup and SSC, got {name}")
    return getattr(mc, name)(pooling="mean" if exact else "sum", num_keys=num_keys, exact=exact)


def measure(cases: list[Case]) -> list[Row]:
    """Measures cases that differ by their keys alone."""
    rows = []
    for case in cases:
        sizes = case["trials"], case["pairs"]
        keys, values = draw_pairs(
            case["seed"], *sizes, case["dim"], case["correlation"], case["topic"]
        )
        every = case["segment"] or case["alone_every"]
        asked = draw_questions(case["seed"] + 1, *sizes, every, case["questions"])
        how = dict(temperature=case["temperature"])
        if case["rule"] == ATTENTION:
            row = measure_attention(keys, values, asked, **how)
        else:
            kind = aggregation(
                case["reader"], case.get("top_k"), case.get("num_keys", 1), case.get("exact", 0)
            )
            row = measure_memory(
                rules()[case["rule"]], kind, case["segment"], keys, values, asked, **how
            )
        if case["reader"] == "SSC":
            row["found"] = router_hits(keys, asked, case["top_k"], case["num_keys"])
        rows.append(row)
    return rows


def counts(row: Row) -> np.ndarray:
    """The numbers of pairs after which a case asked."""
    every = row["segment"] or row["alone_every"]
    return np.arange(every, row["pairs"] + 1, every)


def held(row: Row, enough: float) -> int:
    """The most pairs up to which each measured number was recalled well enough; 0 for none."""
    fine = np.array(row["recall"]) >= enough
    reached = len(fine) if fine.all() else int(np.argmin(fine))
    return int(counts(row)[reached - 1]) if reached else 0


def name_of(row: Row) -> str:
    """What a case is called in the table and the picture."""
    if row["segment"] is None:
        return row["rule"] if row["reader"] == ATTENTION else f"{row['rule']} alone"
    k = f"(k = {row['top_k']})" if row["reader"] == "SSC" else ""
    keys = f", {row['num_keys']} keys" if row["num_keys"] > 1 else ""
    keys = f", {row['exact']} exact" if row.get("exact") else keys
    return f"{row['rule']}, {row['reader']}{k}{keys}, C = {row['segment']}"


def program(config: Any, study: Study) -> None:
    """Measures all cases, then writes the table and the picture."""
    rows = study.measure(groups(config), measure)
    kinds = [name for name, *_ in config["keys"]]
    named: dict[str, list[Row]] = {}
    for row in rows:
        named.setdefault(name_of(row), []).append(row)
    last, report = config.pairs, config.report
    table = []
    for name, mine in named.items():
        first = mine[0]
        most = held(first, config.enough) or f"< {counts(first)[0]}"
        (at,) = np.nonzero(counts(first) == report)
        recalls = [f"{row['recall'][i]:.2f}" for i in (*at, -1) for row in mine]
        found = [f"{row['found'][-1]:.2f}" if "found" in row else "" for row in mine]
        ends = f"{first['snr'][-1]:.3f}", f"{first['bytes'][-1] / 1024:.1f}"
        table.append([name, most, *recalls, *found, *ends])
    theory = f"{linear_snr(last, config.dim):.3f}"
    table.append(["theory, d / (K - 1)", *["" for _ in table[0][1:-2]], theory, ""])
    headers = [
        *(f"recall of {count}, {kind}" for count in (report, last) for kind in kinds),
        *(f"found, {kind}" for kind in kinds),
    ]
    study.write_table(
        ["memory", f"{kinds[0]} pairs at {config.enough}", *headers, f"SNR, {kinds[0]}", "KiB"],
        table,
    )
    study.write_picture(_picture(config, rows), "capacity")
    table = []
    for rows in _grouped(study.measure(border_groups(config), measure_borders), "borders"):
        cells = [x for row in rows for x in (f"{row['segments']:.0f}", f"{row['found']:.2f}")]
        table.append([segmentation(rows[0]["borders"]) or "the topics themselves", *cells])
    kinds = [f"rho = {rho}" for rho in config.topic_correlations]
    header = [x for kind in kinds for x in (f"segments, {kind}", f"found, {kind}")]
    study.write_table(["segmentation", *header], table, "borders")
    table = []
    for rows in _grouped(study.measure(recall_groups(config), measure_recalls), "recall_borders"):
        cells = [x for row in rows for x in (f"{row['segments']:.0f}", f"{row['recall']:.2f}")]
        table.append([segmentation(rows[0]["recall_borders"]), *cells])
    kinds = ("random values", "rotated keys")
    header = [x for kind in kinds for x in (f"segments, {kind}", f"recall, {kind}")]
    study.write_table(["segmentation", *header], table, "recall")
    rows = study.measure(router_groups(config), measure_routers)
    names = ("router", "num_keys", "top_k")
    table = [
        [*(mine[0][name] for name in names), *(f"{row['found']:.2f}" for row in mine)]
        for mine in _grouped(rows, *names)
    ]
    header = [f"found, {name}" for name, *_ in config["keys"]]
    study.write_table(["C", "keys of a state", "k", *header], table, "router")
    rows = study.measure(tree_groups(config), measure_routers)
    steps = {
        str([row["states"], row["tree"]]): row
        for row in study.measure(step_groups(config), measure_steps)
    }
    table = []
    for mine in _grouped(rows, "states", "tree"):
        (states, tree), one = (mine[0][name] for name in ("states", "tree")), tree_of(mine[0])
        compared = states if one is None else one.compared(states)
        seconds = steps[str([states, tree])]["seconds"]
        found = (f"{row['found']:.2f}" for row in mine)
        table.append([states, one or "all keys", compared, *found, f"{1e6 * seconds:.0f}"])
    header = [f"found, {name}" for name, *_ in config.tree_keys]
    study.write_table(["N", "router", "keys", *header, "us of a token"], table, "tree")


def _grouped(rows: list[Row], *names: str) -> list[list[Row]]:
    """Rows that are equal in these, in order."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(str([row[name] for name in names]), []).append(row)
    return list(groups.values())


def _picture(config: Any, rows: list[Row]) -> Any:
    """Signal-to-noise and recall of rules alone; recall with caches; and recall by bytes."""
    figure, ((noise, alone), (cached, size)) = new_figure(2, 2)
    first, routed = config["keys"][0][0], config["keys"][-1][0]
    seen: list[Row] = []
    for row in rows:
        if row["reader"] not in (ALONE, ATTENTION) or row["keys"] != first:
            continue
        if any(row["recall"] == other["recall"] for other in seen):
            continue  # the same memory by another name
        seen.append(row)
        dashes = "k--" if row["rule"] == ATTENTION else "-"
        if row["rule"] != ATTENTION:
            noise.plot(counts(row), row["snr"], dashes, label=row["rule"])
        alone.plot(counts(row), row["recall"], dashes, label=row["rule"])
    pairs = np.arange(config.alone_every, config.pairs + 1)
    noise.plot(pairs, linear_snr(pairs, config.dim), "k:", label="d / (K - 1)")
    noise.set(xscale="log", yscale="log", ylim=(1e-3, None), ylabel="signal-to-noise ratio")
    alone.set(xscale="log", ylabel="recall")
    for axis in (noise, alone):
        axis.set_title(f"one memory, {first} keys")
    chosen = [
        row
        for row in rows
        if row["segment"] and row["rule"] == config.cached_rules[0] and row["keys"] == routed
    ]
    for number, segment in enumerate(config.segments):
        for row in (row for row in chosen if (row["segment"], row["num_keys"]) == (segment, 1)):
            if row["reader"] not in ("GRM", "SSC") or row.get("top_k") not in (None, 1):
                continue
            if row.get("exact"):
                continue
            look = "-" if row["reader"] == "GRM" else ":"
            label = f"{row['reader']}, C = {segment}"
            cached.plot(counts(row), row["recall"], f"C{number}{look}", label=label)
    cached.set(xscale="log", ylabel="recall")
    cached.set_title(f"{config.cached_rules[0]}, {routed}")
    of_rules = {}
    for row in rows:
        if row["keys"] == routed:
            kind = f"{row['rule']}, exact tokens" if row.get("exact") else row["rule"]
            of_rules.setdefault(kind, []).append((row["bytes"][-1], row["recall"][-1]))
    for number, rule in enumerate((ATTENTION, *config.cached_rules)):
        for kind, look in ((rule, "o"), (f"{rule}, exact tokens", "x")):
            if kind in of_rules:
                size.plot(*zip(*of_rules[kind], strict=True), f"C{number}{look}", label=kind)
    size.set(xscale="log", xlabel=f"bytes at {config.pairs} pairs", ylabel="recall")
    size.set_title(f"{config.pairs} pairs, {routed}")
    for axis in (noise, alone, cached):
        axis.set_xlabel("pairs K")
        axis.set_xticks([2**i for i in range(3, 9)], [str(2**i) for i in range(3, 9)], minor=False)
        axis.minorticks_off()
    for axis in (noise, alone, cached, size):
        axis.legend(fontsize="x-small")
    return figure


if __name__ == "__main__":
    run(program, KEYS)
