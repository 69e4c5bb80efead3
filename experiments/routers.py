"""Trains routers with noise and a balancing loss, and counts how often they find a state.

    python -m experiments.routers --config=configs/routers.py --workdir=FOLDER

Trains the first model on associative recall as ``experiments.mqar`` does, once for each of
``config.variants``: ``router_noise`` is the scale of ``mc.nn.with_router_noise``, ``router_loss``
the weight of each layer's ``mc.nn.RouterLoss``. Tests run without noise. The workdir gets
``results.json`` and ``table.md``: accuracy, and for each layer the share of questions for which the
router of any head selects the segment with the question's pair (1 for an oracle). The same command
resumes an interrupted study.
"""

from typing import Any

from experiments._recall import measure_recall, recall_config, recall_groups, recall_model
from experiments._study import Study, mean_and_spread, run


def program(config: Any, study: Study) -> None:
    """Measures the variants, then writes the table."""
    name, width = config.models[0], config.widths[0]
    model = recall_model(config, name, width, config.vocab_size)
    groups = [
        [case | dict(router=router.to_dict()) for case in group]
        for label, router in config.variants.items()
        for group in recall_groups(config, {label: model})
    ]
    rows = study.measure(groups, measure_recall, workers=config.workers)
    tests = [f"{length}/{pairs}" for length, pairs in config.test]
    table = []
    for label in config.variants:
        mine = [row for row in rows if row["name"] == label]
        accuracies = [mean_and_spread([row["accuracy"][test] for row in mine]) for test in tests]
        found = [row["found"][tests[-1]] for row in mine]
        layers = map(mean_and_spread, map(list, zip(*found, strict=True)))
        table.append([label, *accuracies, *layers])
    layers = (f"layer {i + 1} finds, {tests[-1]}" for i in range(config.num_layers))
    study.write_table([name, *(f"L / K = {test}" for test in tests), *layers], table)


if __name__ == "__main__":
    run(program, (*recall_config(), "variants"))
